# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""docs/from-a-bare-linuxone-host.md: each of its blocks as it stands, in the page's order, on one host (linuxone.py).

The tests of this file are run together: each goes on where the one before it stopped.
"""

from __future__ import annotations

import json
import os
import re
import typing as t

import pytest
import yaml
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import ERROR_CODES
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_api, opencryptoki_rules
from ansible_collections.hsm.tde.tests.integration import linuxone, postgres, support
from ansible_collections.hsm.tde.tests.unit.hsm import cryptocard_tree as tree

PAGE = linuxone.Page(linuxone.DOCUMENT.read_text(encoding="utf-8"))

HOSTS = PAGE.file("hosts")
ENCRYPT = PAGE.command("ansible-vault encrypt")

LOOK = PAGE.command("-m hsm.tde.cryptocard_info")
PATTERNS = PAGE.command("mkvps")
EXPECTED, CHECK_PLAY = PAGE.file("group_vars/hsm_tde/adapters.yml"), PAGE.file("adapters.yml")
CHECK = PAGE.command("adapters.yml")

SLOT, SLOT_PLAY = PAGE.file("group_vars/hsm_tde/opencryptoki.yml"), PAGE.file("opencryptoki.yml")
SLOT_PLAN, MAKE_SLOT = PAGE.command("opencryptoki.yml --check"), PAGE.command("opencryptoki.yml\n")
ANSWERS = PAGE.command("-m hsm.tde.opencryptoki_info")
CCA = PAGE.file("group_vars/hsm_tde/adapters.yml", 1), PAGE.file("group_vars/hsm_tde/opencryptoki.yml", 1)
TOKEN, MAKE_TOKEN = PAGE.file("group_vars/hsm_tde/token.yml"), PAGE.command("hsm.tde.init_token")

DATABASE, SITE = PAGE.file("group_vars/hsm_tde/database.yml"), PAGE.command("hsm.tde.site")
TABLE, PROOF = PAGE.sql(), PAGE.command("-m hsm.tde.tde_proof")
STATE, OPEN = PAGE.command("-m hsm.tde.tde_info"), PAGE.command("hsm-tde open")
PIN_PLAY, CHANGE_PIN = PAGE.file("pin.yml"), PAGE.command("pin.yml")
ROTATE = PAGE.command("hsm.tde.rotate_keys")

SO_PIN, PIN, NEW_PIN = "76543210", "01234567", "24681357"


def test_every_block_is_named_here() -> None:
    assert [f"line {block.line}: {block.text}" for block in PAGE.blocks if block not in PAGE.claimed] == []
    assert len(re.findall("^ *(?:```|~~~)", PAGE.text, re.MULTILINE)) == 2 * len(PAGE.blocks), "a block that nobody reads"


def test_every_code_is_one_that_modules_return() -> None:
    tables = PAGE.text.split("| `error_code` | what it means |\n")[1:]
    codes = re.findall(r"^\| `(\w+)` \|", "".join(table.split("\n\n")[0] + "\n" for table in tables), re.MULTILINE)
    assert len(codes) > 10
    assert [code for code in codes if code not in ERROR_CODES] == []
    (table,) = re.findall(r"^\| `codes` \|.*?\n\n", PAGE.text, re.MULTILINE | re.DOTALL)
    known = (support.ROOT / "plugins/modules/cryptocard_info.py").read_text(encoding="utf-8")
    assert [code for code in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[1:] if f"V({code})" not in known] == []


@pytest.fixture(scope="module")
def host() -> t.Iterator[linuxone.LinuxOne]:
    if os.geteuid() != 0 or not support.opencryptoki_library() or not postgres.programs():
        pytest.skip("needs root, openCryptoki and PostgreSQL")
    with postgres.folder() as home, linuxone.LinuxOne(home, PAGE) as made:
        made.has(HOSTS, EXPECTED, CHECK_PLAY)
        made.adapters(cards(tree.ep11(), tree.ep11()))
        yield made


def cards(*mkvps: str, mode: str = "ep11") -> dict[int, tree.Card]:
    """Cards 02 and up, each with one queue of these master keys in domain 0005."""
    return {number: tree.card(mode, {5: tree.queue(held)}, generation=8) for number, held in enumerate(mkvps, 2)}


def fitting(text: str) -> str:
    """Without the lines that the page leaves out before openCryptoki 3.20."""
    sound = opencryptoki_api.try_sound(opencryptoki_api.library_path())
    assert sound
    assert sound.version
    new = sound.version >= opencryptoki_rules.CCA_FILE
    return text if new else re.sub(r"\n    expected_wkvp: .*$|\nopencryptoki_cca:\n.*$", "", text)


def changed(output: str) -> list[str]:
    """The tasks of a playbook that changed something."""
    tasks = re.split(r"^TASK \[(?:[\w.]+ : )?(.*)\] \**$", output, flags=re.MULTILINE)
    return [name for name, said in zip(tasks[1::2], tasks[2::2], strict=True) if re.search("^changed: ", said, re.MULTILINE)]


def answer(output: str) -> dict[str, t.Any]:
    """What a module answered to a command without a playbook."""
    return t.cast("dict[str, t.Any]", json.loads(output[output.index("=> ") + 3 :]))


# --- the adapters


def test_what_is_there(host: linuxone.LinuxOne) -> None:
    seen = answer(host.does(LOOK))
    assert seen["present"]
    assert seen["message"] == "Cards: 2. Queues: 2, 2 of them online. Default domain: 0005."


def test_which_master_key(host: linuxone.LinuxOne) -> None:
    assert f"/sys/bus/ap/devices/02.0005/mkvps <==\nWK CUR: valid 0x{tree.WK}\n" in host.does(PATTERNS)


def test_the_check_stops_and_says_why(host: linuxone.LinuxOne) -> None:
    host.adapters(cards(tree.ep11(), tree.ep11(tree.OTHER_WK)))
    said = host.does(CHECK, code=2)
    assert "02.0005 holds the expected wrapping key" in said
    assert "failures that come and go" in said
    host.adapters(cards(tree.ep11(), tree.ep11()))


def test_the_check_passes(host: linuxone.LinuxOne) -> None:
    assert "Ready: 02.0005, 03.0005." in host.does(CHECK)


# --- openCryptoki


@pytest.mark.slow
def test_cards_in_cca_mode(host: linuxone.LinuxOne) -> None:
    host.has(SLOT_PLAY, *CCA, fit=fitting)
    host.adapters(cards(tree.cca(), tree.cca(), mode="cca"))
    assert "Ready: 02.0005, 03.0005." in host.does(CHECK)
    before = host.file("/etc/opencryptoki/opencryptoki.conf")
    assert "+confname = ccatok.conf" in host.does(SLOT_PLAN, shows=False)
    assert host.file("/etc/opencryptoki/opencryptoki.conf") == before


@pytest.mark.slow
def test_the_slot(host: linuxone.LinuxOne) -> None:
    host.adapters(cards(tree.ep11(), tree.ep11()))
    host.has(EXPECTED, SLOT_PLAY, SLOT, fit=fitting)
    before = host.file("/etc/opencryptoki/opencryptoki.conf")
    foreseen = changed(host.does(SLOT_PLAN))
    assert {"Make them members of openCryptoki's group", "Configure slots and tokens"} < {*foreseen}
    assert host.file("/etc/opencryptoki/opencryptoki.conf") == before
    assert changed(host.does(MAKE_SLOT)) == foreseen
    assert "\n 0x02 0x05\n 0x03 0x05\nEND\n" in host.file("/etc/opencryptoki/ep11tok.conf")
    seen = answer(host.does(ANSWERS))
    assert len(seen["daemon"]["pids"]) == 1
    assert [(slot["number"], slot["listed"]) for slot in seen["slots"]] == [(4, True)]
    assert seen["slots"][0]["store"]["path"] == "/var/lib/opencryptoki/database"
    assert os.path.samefile(seen["library"], support.opencryptoki_library() or "")


@pytest.mark.slow
def test_the_token(host: linuxone.LinuxOne) -> None:
    host.write({"vault.yml": yaml.safe_dump({"vault_so_pin": SO_PIN, "vault_pin": PIN, "vault_new_pin": NEW_PIN})})
    host.does(ENCRYPT)
    assert (host.play / "vault.yml").read_text().startswith("$ANSIBLE_VAULT")
    host.has(TOKEN)
    assert len(changed(host.does(MAKE_TOKEN))) == 1
    flags = answer(host.does(ANSWERS, shows=False))["slots"][0]["flags"]
    assert {"token_initialized", "user_pin_initialized"} <= {*flags}
    assert not [flag for flag in flags if "to_be_changed" in flag]


# --- Enterprise Postgres


@pytest.mark.slow
def test_from_the_server_to_a_table(host: linuxone.LinuxOne) -> None:
    host.has(DATABASE)
    host.does(SITE)
    assert host.is_open()
    host.does(TABLE)
    view = "SELECT spcencalgo FROM pgx_tablespaces v JOIN pg_class c ON c.reltablespace = v.spctablespace WHERE relname = 'secure_tbl'"
    assert host.sql(view) == "AES256"
    (proof,) = answer(host.does(PROOF))["proofs"]
    assert (proof["place"], proof["verdict"]) == ("secure_tablespace", "plain"), "the stand-in encrypts nothing"
    assert proof["reasons"]


@pytest.mark.slow
def test_after_a_start(host: linuxone.LinuxOne) -> None:
    host.server("restart")
    assert not host.is_open()
    host.does(STATE)
    host.does(OPEN)
    assert host.is_open()
    assert changed(host.does(SITE)) == []


@pytest.mark.slow
def test_another_pin_and_another_master_key(host: linuxone.LinuxOne) -> None:
    host.has(PIN_PLAY)
    assert changed(host.does(CHANGE_PIN)) == ["Change it in the token and wherever it rests"]
    host.write({"vault.yml": yaml.safe_dump({"vault_so_pin": SO_PIN, "vault_pin": NEW_PIN})})
    assert len(changed(host.does(ROTATE))) == 1
    host.server("restart")
    host.does(OPEN)
    assert host.is_open()
    assert not [pin for pin in (SO_PIN, PIN, NEW_PIN) if pin in host.said()]


@pytest.mark.slow
def test_every_block_was_run(host: linuxone.LinuxOne) -> None:
    assert [f"line {block.line}: {block.text}" for block in host.page.blocks if block not in host.page.ran] == []
