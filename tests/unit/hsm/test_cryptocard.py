# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""sysfs trees of the AP bus read back, and the module's answers on them."""

from __future__ import annotations

import os
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.hsm import cryptocard
from ansible_collections.hsm.tde.tests.integration.support import run_module, run_module_file
from ansible_collections.hsm.tde.tests.unit.hsm import cryptocard_tree as tree
from hypothesis import given, settings
from hypothesis import strategies as st


def told(root: Path, **options: t.Any) -> dict[str, t.Any]:
    """What the module answers; no lszcrypt is on the hosts that these tests run on, or it is asked about the tree."""
    return run_module("cryptocard_info", {"sysfs_root": str(root), **options})


def test_one_of_everything(tmp_path: Path) -> None:
    facts = cryptocard.read(str(tree.build(tmp_path, tree.bus(), tree.zoo())))
    assert {card["id"]: (card["type"], card["mode"], card["status"]) for card in facts["cards"]} == {
        "00": ("CEX7C", "cca", "online"),
        "01": ("CEX7C", "cca", "online"),
        "02": ("CEX8P", "ep11", "online"),
        "03": ("CEX6A", "accelerator", "online"),
        "04": ("CEX8P", "ep11", "checkstopped"),
        "0b": ("CEX7C", "cca", "deconfigured"),
    }
    assert {queue["id"]: (queue["mode"], queue["status"]) for queue in facts["queues"]} == {
        "00.0005": ("cca", "online"),
        "00.0006": ("cca", "online"),
        "01.0005": ("cca", "offline"),
        "01.0006": ("cca", "online"),
        "02.0005": ("ep11", "online"),
        "02.0006": ("ep11", "reserved"),
        "03.0005": ("accelerator", "online"),
        "03.0006": ("accelerator", "unbound"),
        "04.0005": ("ep11", "checkstopped"),
        "0b.0005": ("cca", "deconfigured"),
    }
    assert facts["message"] == "Cards: 6. Queues: 10, 5 of them online. Default domain: 0005."
    assert facts["bus"] == {
        "default_domain": "0005",
        "max_domain": "0054",
        "usage_domains": ["0005", "0006"],
        "control_domains": ["0005", "0006"],
        "features": ["APSC", "APXA", "QACT", "RC8A"],
    }
    assert [card["serial"] for card in facts["cards"]] == ["93AABEE8", "93AABEE8", "93AABEE800000001", None, None, None]
    assert facts["queues"][1]["requests"] == 123456789012
    assert facts["unreadable"] == []


def test_registers_of_cca() -> None:
    text = (
        "AES NEW: partial 0x00aa11bb22cc33dd\nAES CUR: valid 0x2d6f1a5be9c08347\nAES OLD: invalid 0x0000000000000000\n"
        "APKA NEW: empty 0x0000000000000000\nAPKA CUR: invalid 0x0000000000000000\nAPKA OLD: - -\n"
        "ASYM NEW: - -\nASYM CUR: valid 0x00112233445566778899aabbccddeeff\nASYM OLD: invalid 0x00000000000000000000000000000000\n"
    )
    keys = cryptocard.master_keys(text)
    assert keys["aes"] == {
        "new": {"state": "partial", "pattern": "00aa11bb22cc33dd"},
        "current": {"state": "valid", "pattern": "2d6f1a5be9c08347"},
        "old": {"state": "invalid", "pattern": None},
    }
    assert keys["apka"]["current"] == {"state": "invalid", "pattern": None}
    assert keys["apka"]["old"] == {"state": "unknown", "pattern": None}
    assert keys["asym"]["current"]["pattern"] == "00112233445566778899aabbccddeeff"


def test_registers_of_ep11() -> None:
    keys = cryptocard.master_keys(f"WK CUR: invalid -\nWK NEW: uncommitted 0x{tree.WK}\n")
    assert keys == {"wk": {"current": {"state": "invalid", "pattern": None}, "new": {"state": "uncommitted", "pattern": tree.WK}}}


@settings(deadline=None, max_examples=500)
@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    for registers in cryptocard.master_keys(text).values():
        assert set(registers) <= {"new", "current", "old"}


@settings(deadline=None, max_examples=500)
@given(st.sets(st.integers(0, 255)))
def test_domain_masks(domains: set[int]) -> None:
    assert cryptocard.domains_of_mask(tree.mask(domains)) == [f"{domain:04x}" for domain in sorted(domains)]


def test_a_machine_that_does_not_tell_its_domains(tmp_path: Path) -> None:
    attributes = tree.bus(-1, ap_usage_domain_mask="not supported", ap_control_domain_mask="not supported")
    facts = cryptocard.read(str(tree.build(tmp_path, attributes, {})))
    assert facts["bus"]["usage_domains"] is None
    assert facts["bus"]["default_domain"] is None
    assert facts["message"].startswith("The AP bus is there, and no crypto adapter")


def test_an_old_kernel(tmp_path: Path) -> None:
    """Before 5.4 no patterns, before 5.10 no ``config``; counters of a queue that was never used are a dash."""
    queues = {5: tree.queue("", config="", chkstop="", ap_functions="", request_count="-")}
    cards = {0: tree.card("cca", queues, generation=6, config="", chkstop="", serialnr="", max_msg_size="")}
    answer = told(tree.build(tmp_path, tree.bus(features=""), cards))
    (queue,) = answer["queues"]
    assert (queue["status"], queue["requests"], queue["master_keys"]) == ("online", None, {})
    assert answer["default_domain"]["codes"] == ["master_key_unknown"]
    assert "this kernel does not show it" in answer["default_domain"]["reasons"][0]


def test_what_a_kernel_remembers_of_an_offline_queue_is_not_believed(tmp_path: Path) -> None:
    cards = {0: tree.card("cca", {5: tree.queue(tree.cca(), online="0")})}
    facts = cryptocard.read(str(tree.build(tmp_path, tree.bus(), cards)))
    assert facts["queues"][0]["master_keys"] == {}


def test_an_attribute_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    tree.build(tmp_path, tree.bus(), {0: tree.card("cca", {5: tree.queue(tree.cca())})})
    attribute = tmp_path / "devices/ap/card00/00.0005/mkvps"
    attribute.unlink()
    attribute.mkdir()
    answer = told(tmp_path)
    assert answer["unreadable"] == [{"attribute": "00.0005/mkvps", "reason": "Is a directory"}]
    assert answer["default_domain"]["codes"] == ["master_key_unknown"]


def test_a_card_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    queues = {domain: tree.queue(tree.cca()) for domain in (5, 6, 7)}
    tree.build(tmp_path, tree.bus(usage=(5, 6, 7)), {0: tree.card("cca", queues), 1: tree.card("cca", queues)})
    for domain in (5, 6, 7):
        attribute = tmp_path / f"devices/ap/card00/00.{domain:04x}/mkvps"
        attribute.unlink()
        os.mkfifo(attribute)
    start = time.monotonic()
    facts = cryptocard.read(str(tmp_path), 0.3)
    assert time.monotonic() - start < 0.8
    assert facts["unreadable"] == [{"attribute": "00.0005/mkvps", "reason": "the card did not answer within 0.3 seconds"}]
    assert [bool(queue["master_keys"]) for queue in facts["queues"]] == [False] * 3 + [True] * 3
    for domain in (5, 6, 7):
        # Lets the thread end.
        os.close(os.open(tmp_path / f"devices/ap/card00/00.{domain:04x}/mkvps", os.O_RDWR | os.O_NONBLOCK))


def test_without_the_bus_it_does_not_fail(tmp_path: Path) -> None:
    (tmp_path / "bus").mkdir()
    answer = run_module_file("cryptocard_info", {"sysfs_root": str(tmp_path)}, check=True, diff=True)
    assert not answer.get("failed")
    assert (answer["present"], answer["changed"]) == (False, False)
    assert "no IBM Z or LinuxONE system" in answer["message"]
    assert answer["default_domain"] == {"queues": [], "ready": False, "codes": ["bus_absent"], "reasons": [answer["message"]]}


def test_without_sysfs_nothing_is_known(tmp_path: Path) -> None:
    answer = told(tmp_path)
    assert answer["failed"]
    assert answer["error_code"] == "file_absent"


def test_nobody_needs_to_be_root(tmp_path: Path) -> None:
    tree.build(tmp_path, tree.bus(), tree.zoo())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    answer = run_module_file("cryptocard_info", {"sysfs_root": str(tmp_path)}, prefix=prefix)
    assert len(answer["queues"]) == 10


def test_offline_domain(tmp_path: Path) -> None:
    cards = {0: tree.card("cca", {5: tree.queue(tree.cca())}), 1: tree.card("cca", {5: tree.queue(tree.cca(), online="0")})}
    answer = told(tree.build(tmp_path, tree.bus(), cards), expected={"aes": tree.AES})
    assert answer["default_domain"]["ready"] is False
    assert answer["default_domain"]["codes"] == ["queue_offline"]
    assert answer["default_domain"]["reasons"] == ["Queue 01.0005 is offline: set it online (chzcrypt -e 01.0005)."]
    # Nobody gets the queue that is offline.
    assert answer["usage_domains"] == {"queues": ["00.0005"], "ready": True, "codes": [], "reasons": []}


def test_one_of_two_domains_without_the_current_pattern(tmp_path: Path) -> None:
    cards = {2: tree.card("ep11", {5: tree.queue(tree.ep11()), 6: tree.queue(tree.ep11(tree.OTHER_WK))}, generation=8)}
    answer = told(tree.build(tmp_path, tree.bus(), cards), expected={"wk": f"0x{tree.WK.upper()}"})
    assert answer["default_domain"] == {"queues": ["02.0005"], "ready": True, "codes": [], "reasons": []}
    assert answer["usage_domains"]["codes"] == ["master_keys_differ", "master_key_other"]
    cause = answer["usage_domains"]["reasons"][0]
    assert f"02.0005 holds the expected wrapping key (pattern {tree.WK[:32]}) and 02.0006 does not" in cause
    assert "failures that come and go" in cause


def test_ready(tmp_path: Path) -> None:
    queues = {5: tree.queue(tree.cca()), 6: tree.queue(tree.cca())}
    cards = {0: tree.card("cca", queues), 1: tree.card("cca", queues), 3: tree.card("accelerator", {5: tree.queue()})}
    answer = told(tree.build(tmp_path, tree.bus(), cards), mode="cca", expected={"aes": f"0x{tree.AES}", "apka": tree.APKA})
    assert answer["default_domain"] == {"queues": ["00.0005", "01.0005"], "ready": True, "codes": [], "reasons": []}
    assert answer["usage_domains"]["ready"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expected": {"aes": 0x2D6F1A5BE9C08347}}, "put it in quotes"),
        ({"expected": {"aes": "2d6f"}}, "has 4 hexadecimal digits and not 16"),
        ({"expected": {"wk": "z" * 32}}, "hexadecimal digits only"),
        ({"expected": {"wk": "0" * 48}}, "not 32 or 64"),
        ({"mode": "cca", "expected": {"wk": "0" * 32}}, "no CCA coprocessor has this key"),
        ({"mode": "pkcs11"}, "must be one of"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, t.Any], said: str) -> None:
    answer = told(tree.build(tmp_path, tree.bus(), {}), **options)
    assert answer["failed"]
    assert answer["error_code"] == "invalid_option"
    assert said in answer["msg"]


def test_a_program_that_was_named_must_be_there(tmp_path: Path) -> None:
    answer = told(tree.build(tmp_path, tree.bus(), {}), lszcrypt=str(tmp_path / "lszcrypt"))
    assert answer["error_code"] == "command_missing"


def test_read_refuses_a_root_without_sysfs(tmp_path: Path) -> None:
    with pytest.raises(TdeError):
        cryptocard.read(str(tmp_path / "nowhere"))
