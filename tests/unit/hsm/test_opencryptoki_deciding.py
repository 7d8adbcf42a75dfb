# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is decided about openCryptoki's daemon, folders and files, without one."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_config as config
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_daemon as daemon
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_migrate as migrate
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_rules as rules
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_store as store

NONE = daemon.Daemon((), False, 0, 0.0)
ONE = daemon.Daemon((10,), False, 0, 5.0)
TWO = daemon.Daemon((10, 11), False, 0, 5.0)
UNIT = daemon.Daemon((10,), True, 10, 5.0)
BESIDE = daemon.Daemon((10,), True, 0, 5.0)
STOP, START = "stop_daemon", "start_daemon"


@pytest.mark.parametrize(
    ("there", "wished", "steps"),
    [
        (NONE, "started", [START]),
        (NONE, "restarted", [START]),
        (NONE, "stopped", []),
        (ONE, "started", []),
        (UNIT, "restarted", [STOP, START]),
        (TWO, "restarted", [STOP, START]),
        (TWO, "stopped", [STOP]),
    ],
)
def test_steps_of_the_daemon(there: daemon.Daemon, wished: daemon.State, steps: list[str]) -> None:
    assert [step.action for step in daemon.decide(there, wished)] == steps


@pytest.mark.parametrize(
    ("there", "wished", "programs", "force", "code"),
    [
        (TWO, "started", [], False, "opencryptoki_daemons"),
        (BESIDE, "started", [], False, "opencryptoki_daemons"),
        (ONE, "restarted", [(7, "postgres")], False, "opencryptoki_in_use"),
        (ONE, "stopped", [(7, "postgres")], False, "opencryptoki_in_use"),
        (ONE, "restarted", [(7, "postgres")], True, None),
        (ONE, "started", [(7, "postgres")], False, None),
        (UNIT, "started", [], False, None),
        (BESIDE, "restarted", [], False, None),
    ],
)
def test_what_stands_in_the_way(
    there: daemon.Daemon, wished: daemon.State, programs: list[tuple[int, str]], force: bool, code: str | None
) -> None:
    def act() -> None:
        daemon.check(there, wished, daemon.decide(there, wished), programs, force)

    if code is None:
        act()
        return
    with pytest.raises(TdeError) as caught:
        act()
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("there", "settings", "steps"),
    [
        ("old", {}, ["migrate_store", "set_tokversion"]),
        ("old", {"tokversion": "3.12"}, ["migrate_store"]),
        ("3.12", {}, ["set_tokversion"]),
        ("3.12", {"tokversion": "3.12"}, []),
        ("none", {}, ["set_tokversion"]),
    ],
)
def test_steps_of_a_migration(there: str, settings: dict[str, str], steps: list[str]) -> None:
    assert [step.action for step in migrate.decide(there, settings, "swtok", 3)] == steps


def test_formats_and_names() -> None:
    assert store.wished_format({}) == "old"
    assert store.wished_format({"tokversion": "3.9"}) == "old"
    assert store.wished_format({"tokversion": "3.12"}) == "3.12"
    assert store.shared_memory("swtok") == "/dev/shm/var.lib.opencryptoki.swtok"
    assert rules.folder_of({"stdll": "/usr/lib64/opencryptoki/stdll/libpkcs11_ep11.so"}) == "ep11tok"
    assert rules.folder_of({"stdll": "libother.so"}) is None


def wish(**given: t.Any) -> config.ConfigWish:
    empty: dict[str, t.Any] = {"slots": [], "ep11": [], "cca": [], "statistics": None, "disable_event_support": None}
    return config.wish_of(**{**empty, "exclusive": False, "backup": False, **given})


def slot(number: int, **keys: t.Any) -> dict[str, t.Any]:
    return {"number": number, "state": "present", **keys}


def test_a_wish_is_read() -> None:
    given = wish(
        slots=[slot(3, stdll="a.so", tokname=""), {"number": 4, "state": "absent"}],
        ep11=[
            {"file": "e.conf", "apqns": ["0A.0011", "0a.11"], "expected_wkvp": "0x" + "AB" * 16, "modes": [], "pkey_mode": None}
        ],
        cca=[{"file": "c.conf", "expected_mkvps": {"sym": None, "aes": "01" * 8, "apka": ""}}],
    )
    assert given.slots == {3: {"stdll": "a.so", "tokname": None}, 4: None}
    assert given.ep11[0].apqns == ((10, 17),)
    assert given.ep11[0].expected_wkvp == "AB" * 16
    assert given.cca[0].expected_mkvps == {"AES": "01" * 8}
    texts = config.wished_texts({"e.conf": "APQN_ANY\n"}, given, (3, 23))
    assert texts["opencryptoki.conf"] == "version opencryptoki-3.23\n\nslot 3\n{\nstdll = a.so\n}\n"
    assert texts["e.conf"] == 'APQN_ALLOWLIST\n 0x0a 0x11\nEND\nEXPECTED_WKVP "' + "AB" * 16 + '"\n'


@pytest.mark.parametrize(
    "given",
    [
        {"slots": [slot(3), slot(3)]},
        {"slots": [slot(-1)]},
        {"ep11": [{"file": "opencryptoki.conf", "apqns": None, "expected_wkvp": None, "modes": None, "pkey_mode": None}]},
        {"ep11": [{"file": "e", "apqns": [], "expected_wkvp": None, "modes": None, "pkey_mode": None}]},
        {"cca": [{"file": "c", "expected_mkvps": {"aes": "0102"}}]},
    ],
)
def test_a_wish_that_makes_no_sense(given: dict[str, t.Any]) -> None:
    with pytest.raises(TdeError) as caught:
        wish(**given)
    assert caught.value.code == "invalid_option"
