"""What nShield's commands print, read; and what is not understood, refused as a whole."""

from __future__ import annotations

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_text as text
from hypothesis import given
from hypothesis import strategies as st

ONE = "925f67e72ea3c354cae4e6797bde3753d24e7744"
TWO = "c725e1d27135c1b5dbb296f63be079fa827cf65f"

WORLD = """\
World
 generation  2
 state       0x17a70000 Initialised Usable Recovery PINRecovery !ExistingClient RTC NVRAM FTO
 n_modules   2
 hknso       87aa9edcb8fa5ae0c3ac1f0b7ca1bb3d8d0f9aeb
 hkm         6d1a2d2cb1a34f1bb7e9b3d5c0b6a1d6c0c2b1aa (type Rijndael)
 ex.client   none
 k-out-of-n  1/2
 other quora m=1 r=1 p=1 nv=1 rtc=1 dsee=1 fto=1
 createtime  2018-06-27 13:48:04

Module #1
 generation 2
 state      0x2 Usable
 flags      0x10000 ShareTarget
 n_slots    2
 esn        8F4D-CC8C-6E37
 hkml       b7a3f1b5b9a2c8b0c0ffee00c0ffee00c0ffee00

Module #1 Slot #0 IC 0
 generation    1
 phystype      SmartCard
 slotlistflags 0x2 SupportsAuthentication
 state         0x2 Empty
 flags         0x0
 shareno       0
 shares
 error         OK
No Cardset

Module #1 Slot #1 IC 13
 generation    1
 phystype      SmartCard
 slotlistflags 0x2 SupportsAuthentication
 state         0x5 Operator
 flags         0x10000
 shareno       2
 shares        LTU(PIN) LTFIPS
 error         OK
Cardset
 name          "oracle-ocs"
 k-out-of-n    1/3
 flags         NotPersistent PINRecoveryForbidden(disabled) !RemoteEnabled
 timeout       none
 card names    "" "" ""
 hkltu         {hash}
 gentime       2018-06-27 14:00:00

Module #2
 generation 2
 state      0x6 PreInitMode
 flags      0x0 !ShareTarget
 n_slots    1
 esn        8F4D-CC8C-6E38

Module #2 Slot #0 IC 1
 phystype      SmartCard
 state         0x4 Admin
 shareno       1
No Cardset

No Pre-Loaded Objects
""".replace("{hash}", ONE)


def test_the_world_its_modules_and_cards_in_slots():
    world = text.world(WORLD)
    assert (world.usable, world.recovery, world.mode, world.fips_level) == (True, True, None, 2)
    assert (world.acs_quorum, world.created) == ((1, 2), "2018-06-27 13:48:04")
    first, second = world.modules
    assert (first.number, first.esn, first.usable, second.usable) == (1, "8F4D-CC8C-6E37", True, False)
    assert first.slots == (text.Slot(0, "empty", None, 0), text.Slot(1, "operator", ONE, 2))
    assert second.slots == (text.Slot(0, "admin", None, 1),)


@pytest.mark.parametrize(
    ("mode", "flag", "level"),
    [
        ("fips1402level3", "", 3),
        ("fips1402level2", "", 2),
        ("fips140level3", "", 3),
        ("unrestricted", "", 2),
        ("none", "", 2),
        (None, " StrictFIPS140", 3),
        (None, " !StrictFIPS140", 2),
        ("common-criteria-cmts", "", None),
    ],
)
def test_the_fips_level(mode, flag, level):
    shown = WORLD.replace("NVRAM FTO", f"NVRAM FTO{flag}")
    if mode:
        shown = shown.replace(" createtime", f" mode        {mode}\n createtime")
    assert text.world(shown).fips_level == level


@pytest.mark.parametrize("state", ["!Initialised !Usable", "Initialised !Usable"])
def test_a_world_that_is_not_usable(state):
    assert not text.world(WORLD.replace("Initialised Usable", state)).usable
    assert text.world(WORLD).usable
    assert not text.world(WORLD.replace("Usable\n flags      0x10000", "Foreign\n flags      0x10000")).usable


def test_softcards_with_repeated_names_and_spaces():
    shown = f"SoftCard summary - 3 softcards:\n Operator logical token hash               name\n {ONE}  tde\n {TWO}  tde\n {ONE}  a b\n"
    assert text.softcards(shown) == [text.Softcard(ONE, "tde"), text.Softcard(TWO, "tde"), text.Softcard(ONE, "a b")]
    assert text.softcards("SoftCard summary - 0 softcards:\n") == []
    assert text.softcards("No softcards\n") == []


def test_cardsets():
    shown = (
        "Cardset list - 2 cardsets:  (P)ersistent/(N)ot, (R)emoteable/(L)ocal-only\n"
        " Operator logical token hash               k/n timeout  name\n"
        f" {ONE}  1/3  none-NL  oracle-ocs\n {TWO}  2/5  60s-PR  other set\n"
    )
    assert text.cardsets(shown) == [
        text.Cardset(ONE, "oracle-ocs", 1, 3, False, False, "none"),
        text.Cardset(TWO, "other set", 2, 5, True, True, "60s"),
    ]


KEYS = f"""\
Keys with module protection:
key_pkcs11_ua114f29785ea013fd5eca7e6cd7614c796bc24a06 `15e7f5e09ff2030'
 key_simple_pubkeyenckey `'

Keys protected by softcards:
 key_pkcs11_uc{ONE}-0317f899c8a6737e8506278850b57bf1b7b29e9e `it's a key'

Keys protected by cardsets:
 key_pkcs11_uc{TWO}-49b37b070741ea08fccdafffcd3298e01306806e `ORACLE.TDE.HSM.MK.01'
"""


def test_keys_by_protection():
    assert [(key.application, key.name, key.protection, key.token) for key in text.keys(KEYS)] == [
        ("pkcs11", "15e7f5e09ff2030", "module", None),
        ("simple", "", "module", None),
        ("pkcs11", "it's a key", "softcard", ONE),
        ("pkcs11", "ORACLE.TDE.HSM.MK.01", "ocs", TWO),
    ]
    assert text.keys("No keys.\n") == []


def test_one_key():
    shown = (
        'Key AppName pkcs11 Ident uc1\n BlobKA length        1128\n name                 "x"\n hash                 '
        f"abcd\n recovery             Enabled\n protection           CardSet\n cardset              {TWO}\n"
    )
    assert text.key_detail(shown) == text.KeyDetail("ocs", TWO, True, "abcd")
    module = shown.replace("CardSet", "Module").replace("Enabled", "Disabled")
    assert text.key_detail(module) == text.KeyDetail("module", None, False, "abcd")


def test_rocs_keys():
    shown = (
        "`rocs' key recovery tool\nUseful commands: `help', `help intro', `quit'.\nrocs> No. Name                 App        Protected by\n"
        "N  1 key with spaces      simple     module\n   2 ORACLE.TDE.HSM.MK.01 pkcs11     one -> two\nR  3 x                    pkcs11     one\nrocs> "
    )
    rows = text.rocs_keys(shown)
    assert [(row.name, row.protected_by, row.recoverable) for row in rows] == [
        ("key with spaces", "module", False),
        ("ORACLE.TDE.HSM.MK.01", "one", True),
        ("x", "one", True),
    ]


@pytest.mark.parametrize(
    ("parse", "shown"),
    [
        (text.world, ""),
        (text.world, "What you see here was not in the manual.\n"),
        (text.softcards, "nothing of the kind\n"),
        (text.softcards, f"SoftCard summary - 2 softcards:\n {ONE}  tde\n"),
        (text.softcards, f"SoftCard summary - 1 softcards:\n {ONE}  tde\n and another line\n"),
        (text.cardsets, f"Cardset list - 1 cardsets:\n {ONE}  1 of 3  oracle\n"),
        (text.keys, KEYS + " a line without a shape\n"),
        (text.keys, "key_pkcs11_ua1 `x'\n"),
        (text.key_detail, "Key AppName pkcs11 Ident uc1\n hash 1\n protection CardSet\n"),
        (text.key_detail, "Key AppName pkcs11 Ident uc1\n hash 1\n protection Unheard\n"),
        (text.rocs_keys, "rocs> "),
        (text.rocs_keys, "No. Name App Protected by\n 1 a b  one\n 3 c d  one\n"),
    ],
)
def test_what_is_not_understood_is_refused(parse, shown):
    with pytest.raises(TdeError) as caught:
        parse(shown)
    assert caught.value.code == "nshield_answer_unknown"


@given(st.text(max_size=400))
def test_no_text_brings_anything_but_an_answer_or_that_error(shown):
    for parse in (text.world, text.softcards, text.cardsets, text.keys, text.key_detail, text.rocs_keys):
        try:
            parse(shown)
        except TdeError as error:
            code = error.code
        else:
            code = "nshield_answer_unknown"
        assert code == "nshield_answer_unknown"


@given(st.lists(st.sampled_from(WORLD.splitlines()), max_size=40))
def test_no_mixture_of_lines_brings_anything_but_an_answer_or_that_error(lines):
    try:
        text.world("\n".join(lines))
    except TdeError as error:
        code = error.code
    else:
        code = "nshield_answer_unknown"
    assert code == "nshield_answer_unknown"
