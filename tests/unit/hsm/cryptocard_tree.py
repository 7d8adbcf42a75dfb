# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""sysfs trees of the AP bus, as the kernel lays them out (drivers/s390/crypto); values are invented."""

from __future__ import annotations

import typing as t
from pathlib import Path

AES, OTHER_AES = "2d6f1a5be9c08347", "77e1f0a2b3c4d596"
APKA = "90c17be24d358f6a"
#: EP11's pattern as the kernel shows it: 32 bytes, of which the first 16 are what people compare.
WK, OTHER_WK = "8ad5a7d8ba8aebbd3a1f2c7c0f1b2a4d" + "1d2e3f40" * 4, "00aa11bb22cc33dd44ee55ff66007711" + "0f0e0d0c" * 4

FUNCTIONS = {"cca": "0x92800000", "ep11": "0x86800000", "accelerator": "0x6A800000"}
LETTER = {"cca": "C", "ep11": "P", "accelerator": "A"}

Attributes = dict[str, str]


def cca(current: str | None = AES, new: str | None = None, old: str | None = None, apka: str | None = APKA) -> str:
    """``mkvps`` of a CCA queue, as cca_mkvps_show of zcrypt_cex4.c prints it."""

    def line(name: str, register: str, states: tuple[str, str], pattern: str | None, width: int = 16) -> str:
        return f"{name} {register}: {states[pattern is not None]} 0x{pattern or '0' * width}\n"

    held, loaded = ("invalid", "valid"), ("empty", "full")
    return (
        line("AES", "NEW", loaded, new)
        + line("AES", "CUR", held, current)
        + line("AES", "OLD", held, old)
        + line("APKA", "NEW", loaded, None)
        + line("APKA", "CUR", held, apka)
        + line("APKA", "OLD", held, None)
        + line("ASYM", "NEW", loaded, None, 32)
        + line("ASYM", "CUR", held, None, 32)
        + line("ASYM", "OLD", held, None, 32)
    )


def ep11(current: str | None = WK, new: str | None = None) -> str:
    """``mkvps`` of an EP11 queue, as ep11_mkvps_show of zcrypt_cex4.c prints it."""
    return f"WK CUR: {f'valid 0x{current}' if current else 'invalid -'}\nWK NEW: {f'committed 0x{new}' if new else 'empty -'}\n"


SILENT_CCA = "".join(f"{name} {register}: - -\n" for name in ("AES", "APKA", "ASYM") for register in ("NEW", "CUR", "OLD"))
SILENT_EP11 = "WK CUR: - -\nWK NEW: - -\n"


def mask(domains: t.Iterable[int]) -> str:
    """A domain mask: bit 0 leftmost."""
    return "0x" + f"{sum(1 << (255 - domain) for domain in domains):064x}"


def bus(default: int = 5, usage: t.Iterable[int] = (5, 6), control: t.Iterable[int] = (5, 6), **more: str) -> Attributes:
    """Attributes of the bus."""
    return {
        "ap_domain": str(default),
        "ap_max_domain_id": "84",
        "ap_usage_domain_mask": mask(usage),
        "ap_control_domain_mask": mask(control),
        "ap_interrupts": "1",
        "config_time": "30",
        "poll_thread": "0",
        "poll_timeout": "250000",
        "features": "APSC APXA QACT RC8A",
        **more,
    }


class Card(t.NamedTuple):
    """A card: attributes, and its queues' by domain. ``driver`` is an attribute that becomes a link."""

    attributes: Attributes
    queues: dict[int, Attributes]


def card(mode: str, queues: dict[int, Attributes], generation: int = 7, **more: str) -> Card:
    """A card that is online, unless told otherwise; an attribute that is empty is left out."""
    attributes = {
        "type": f"CEX{generation}{LETTER[mode]}",
        "hwtype": str(generation + 6),
        "raw_hwtype": str(generation + 6),
        "ap_functions": FUNCTIONS[mode],
        "depth": "8",
        "config": "1",
        "chkstop": "0",
        "online": "1",
        "request_count": "4711",
        "pendingq_count": "0",
        "requestq_count": "0",
        "max_msg_size": "12288",
        "driver": "cex4card",
        **({"serialnr": "93AABEE8" if mode == "cca" else "93AABEE800000001"} if mode != "accelerator" else {}),
        **more,
    }
    return Card({name: value for name, value in attributes.items() if value}, queues)


def queue(mkvps: str = "", **more: str) -> Attributes:
    """A queue that is online, unless told otherwise; an attribute that is empty is left out."""
    attributes = {
        "config": "1",
        "chkstop": "0",
        "online": "1",
        "request_count": "815",
        "pendingq_count": "0",
        "requestq_count": "0",
        "ap_functions": "0x92800000",
        "driver": "cex4queue",
        "mkvps": mkvps,
        **more,
    }
    return {name: value for name, value in attributes.items() if value}


def build(root: Path, attributes: Attributes, cards: dict[int, Card]) -> Path:
    """Write the tree; its root, for ``sysfs_root``."""
    devices, ap = root / "devices/ap", root / "bus/ap"
    (ap / "devices").mkdir(parents=True)
    devices.mkdir(parents=True)
    _write(ap, attributes)
    for number, one in cards.items():
        home = devices / f"card{number:02x}"
        _device(root, home, one.attributes)
        (ap / "devices" / home.name).symlink_to(home)
        for domain, each in one.queues.items():
            below = home / f"{number:02x}.{domain:04x}"
            _device(root, below, each)
            (ap / "devices" / below.name).symlink_to(below)
    return root


def _device(root: Path, home: Path, attributes: Attributes) -> None:
    home.mkdir()
    _write(home, {name: value for name, value in attributes.items() if name != "driver"})
    if "driver" in attributes:
        driver = root / "bus/ap/drivers" / attributes["driver"]
        driver.mkdir(parents=True, exist_ok=True)
        (home / "driver").symlink_to(driver)


def _write(home: Path, attributes: Attributes) -> None:
    for name, value in attributes.items():
        (home / name).write_text(value.rstrip("\n") + "\n", encoding="ascii")


def zoo() -> dict[int, Card]:
    """One of everything; what the golden files of lszcrypt were printed from."""
    return {
        0x00: card("cca", {5: queue(cca()), 6: queue(cca(), request_count="123456789012")}, request_count="123456789827"),
        0x01: card("cca", {5: queue(cca(), online="0"), 6: queue(cca(OTHER_AES))}),
        0x02: card("ep11", {5: queue(ep11()), 6: queue("", online="", driver="vfio_ap", status="in use")}, generation=8),
        0x03: card("accelerator", {5: queue(), 6: queue("", online="", driver="")}, generation=6),
        0x04: card("ep11", {5: queue("", online="0", chkstop="1")}, generation=8, chkstop="1", online="0"),
        0x0B: card("cca", {5: queue("", online="0", config="0")}, config="0", online="0"),
    }


def guest() -> dict[int, Card]:
    """A Secure Execution guest: one queue ready, one bound only, one not bound (bits 16 and 17 of its ``ap_functions``)."""
    queues = {
        5: queue(ep11(), ap_functions="0x86800300", se_bind="bound", se_associate="associated 0"),
        6: queue(SILENT_EP11, ap_functions="0x86804300", se_bind="bound", se_associate="unassociated"),
        7: queue(SILENT_EP11, ap_functions="0x86808300", se_bind="unbound", se_associate="unassociated"),
    }
    return {0x0A: card("ep11", queues, generation=8)}
