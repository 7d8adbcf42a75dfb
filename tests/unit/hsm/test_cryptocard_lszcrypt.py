# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""lszcrypt's listings over four releases: read by their headers, compared with sysfs, never believed against it."""

from __future__ import annotations

import copy
import stat
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.hsm import cryptocard
from ansible_collections.hsm.tde.plugins.module_utils.hsm import cryptocard_lszcrypt as lszcrypt
from ansible_collections.hsm.tde.tests.unit.hsm import cryptocard_tree as tree
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent / "golden/lszcrypt"
RELEASES = ("2.3.0", "2.15.0", "2.36.0", "2.43.0")


def golden(release: str, name: str) -> str:
    return (GOLDEN / release / f"{name}.txt").read_text(encoding="ascii")


@pytest.fixture
def facts(tmp_path: Path) -> cryptocard.Read:
    return cryptocard.read(str(tree.build(tmp_path / "sys", tree.bus(), tree.zoo())))


#: Where the releases are wrong of the same tree, and sysfs is right.
WRONG = {
    "2.3.0": [
        "Card 04: sysfs says status checkstopped, lszcrypt says offline.",
        "Queue 04.0005: sysfs says status checkstopped, lszcrypt says offline.",
        "Card 0b: sysfs says status deconfigured, lszcrypt says offline.",
        "Queue 0b.0005: sysfs says status deconfigured, lszcrypt says offline.",
    ],
    "2.15.0": [
        "Card 04: sysfs says status checkstopped, lszcrypt says offline.",
        "Queue 04.0005: sysfs says status checkstopped, lszcrypt says offline.",
    ],
    "2.36.0": [],
    "2.43.0": [],
}


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_says_what_sysfs_says_but_where_it_is_wrong(release: str, facts: cryptocard.Read) -> None:
    listing = lszcrypt.devices(golden(release, "devices"))
    before = copy.deepcopy(facts)
    filled, differences = lszcrypt.reconcile(facts, listing, golden(release, "bus"))
    assert listing.strange == []
    assert sorted(differences) == sorted(WRONG[release])
    assert filled == []
    assert facts == before


@pytest.mark.parametrize("release", RELEASES)
def test_cells_that_push_the_others_aside(release: str) -> None:
    rows = lszcrypt.devices(golden(release, "devices")).rows
    assert rows["00.0006"] == {
        "type": "CEX7C",
        "mode": "cca",
        "status": "online",
        "requests": 123456789012,
        "hwtype": 13,
        "driver": None if release == "2.3.0" else "cex4queue",
    }
    assert len(rows) == (14 if release == "2.3.0" else 16)


@pytest.mark.parametrize("release", RELEASES[2:])
def test_a_status_of_two_words(release: str) -> None:
    row = lszcrypt.devices(golden(release, "devices")).rows["02.0006"]
    assert (row["status"], row["driver"], row["requests"]) == ("reserved", "vfio_ap", 815)


@pytest.mark.parametrize("release", RELEASES)
def test_no_card(release: str) -> None:
    assert lszcrypt.devices(golden(release, "devices-empty")) == lszcrypt.Listing({}, [], [])


@pytest.mark.parametrize("release", RELEASES)
def test_the_default_domain(release: str) -> None:
    assert lszcrypt.bus_domain(golden(release, "bus")) == (True, "0005")
    assert lszcrypt.bus_domain(golden(release, "bus-unavailable")) == (True, "0009")
    assert lszcrypt.bus_domain(golden(release, "bus-unset")) == (True, None)
    assert lszcrypt.bus_domain("nothing of the kind\n") == (False, None)


def test_the_newest_release_warns() -> None:
    listing = lszcrypt.devices(golden("2.43.0", "devices-unavailable"))
    assert listing.warnings == ["Warning: Default domain 0x09 is not available."]
    assert sorted(listing.rows) == ["00", "00.0005", "00.0006"]


@pytest.mark.parametrize("release", RELEASES[2:])
def test_secure_execution_has_one_column_more(release: str) -> None:
    rows = lszcrypt.devices(golden(release, "devices-secure-execution")).rows
    assert [(name, row["status"], row["driver"]) for name, row in rows.items()] == [
        ("0a", "online", "cex4card"),
        ("0a.0005", "online", "cex4queue"),
        ("0a.0006", "online", "cex4queue"),
        ("0a.0007", "online", "cex4queue"),
    ]


def test_what_sysfs_lacks_is_filled_in_and_said(facts: cryptocard.Read) -> None:
    facts["cards"][0]["type"] = None
    facts["queues"][0]["status"] = "unknown"
    filled, differences = lszcrypt.reconcile(facts, lszcrypt.devices(golden("2.43.0", "devices")), "")
    assert filled == ["Card 00: type CEX7C is from lszcrypt.", "Queue 00.0005: status online is from lszcrypt."]
    assert differences == []
    assert (facts["cards"][0]["type"], facts["queues"][0]["status"]) == ("CEX7C", "online")


def test_devices_that_only_one_of_them_has(facts: cryptocard.Read) -> None:
    text = golden("2.43.0", "devices").replace("01.0006", "01.0007")
    dummy, differences = lszcrypt.reconcile(facts, lszcrypt.devices(text), "ap_domain=0x06\n")
    assert differences == [
        "Default domain: sysfs says 0005, lszcrypt says 0006.",
        "Queue 01.0006: sysfs has it, lszcrypt does not list it.",
        "01.0007: lszcrypt lists it, sysfs does not have it.",
    ]


def program(path: Path, release: str, devices: str = "devices", ending: str = "exit 0") -> str:
    """Prints a release's listings, if it is asked about the tree beside it."""
    path.write_text(
        f'#!/bin/sh\n[ "$SYSFS_ROOT" = "{path.parent}/sys" ] || exit 3\n'
        f'case "$1" in -V) cat {GOLDEN}/{release}/{devices}.txt;; -b) cat {GOLDEN}/{release}/bus.txt;; esac\n{ending}\n',
        encoding="ascii",
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_program_is_asked_about_the_same_tree(tmp_path: Path, facts: cryptocard.Read) -> None:
    path = program(tmp_path / "lszcrypt", "2.3.0")
    compared = lszcrypt.compare(facts, str(tmp_path / "sys"), path)
    assert (compared["path"], compared["message"]) == (path, "")
    assert sorted(compared["differences"]) == sorted(WRONG["2.3.0"])


def test_a_listing_that_ends_in_an_error_is_used_and_the_error_told(tmp_path: Path, facts: cryptocard.Read) -> None:
    path = program(
        tmp_path / "lszcrypt",
        "2.36.0",
        "devices-no-queues",
        "[ $1 = -b ] || { echo 'Error - no subdevices found.' >&2; exit 1; }",
    )
    compared = lszcrypt.compare(facts, str(tmp_path / "sys"), path)
    assert compared["message"] == "Error - no subdevices found."
    assert compared["differences"] == []


@pytest.mark.parametrize("release", RELEASES)
@settings(deadline=None)
@given(data=st.data())
def test_garbage_is_told_and_never_a_crash(release: str, data: st.DataObject) -> None:
    lines = golden(release, "devices").splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = data.draw(st.text(st.characters(codec="ascii", exclude_characters="\n"), max_size=120))
    listing = lszcrypt.devices("\n".join(lines))
    assert set(listing.rows) <= {line.split()[0] for line in lines if line.split()}


def test_missing_programs(tmp_path: Path, facts: cryptocard.Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ansible_collections.hsm.tde.plugins.module_utils.common.run._PATH", str(tmp_path))
    compared = lszcrypt.compare(facts, str(tmp_path / "sys"), None)
    assert compared["path"] is None
    assert "s390-tools" in compared["message"]
    with pytest.raises(TdeError) as caught:
        lszcrypt.compare(facts, str(tmp_path / "sys"), str(tmp_path / "nowhere"))
    assert caught.value.code == "command_missing"


def test_a_program_that_fails_is_told(tmp_path: Path, facts: cryptocard.Read) -> None:
    path = tmp_path / "lszcrypt"
    path.write_text("#!/bin/sh\necho 'lszcrypt: broken' >&2\nexit 4\n", encoding="ascii")
    path.chmod(0o755)
    compared = lszcrypt.compare(facts, str(tmp_path / "sys"), str(path))
    assert "lszcrypt: broken" in compared["message"]
    assert compared["differences"] == []
