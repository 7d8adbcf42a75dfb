# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a library and its tokens show without a PIN, as plain data."""

from __future__ import annotations

import typing as t

from ..common.state import StateDirectory
from .cryptoki import CkError
from .library import Library, LibraryAccess, load
from .refused import RefusedPins
from .registry import Registry, same_serial
from .token import TokenInfo, TokenSelector, matches, scan


def mechanism_name(number: int) -> str:
    """A mechanism's name without its CKM_; vendors' and unknown ones in hexadecimal."""
    from pkcs11 import Mechanism

    try:
        # A leading underscore marks what python-pkcs11 advises against.
        return str(Mechanism(number).name).lstrip("_")
    except ValueError:
        return f"0x{number:08X}"


def mechanisms(library: Library, info: TokenInfo) -> list[str]:
    """The mechanisms that a token lists, by number; none where it does not answer.

    Their flags are not read: several tokens fill them with garbage. Whether one works shows in its use only.
    """
    try:
        return [mechanism_name(number) for number in library.mechanisms(info.slot_id)]
    except CkError:
        return []


def gather(access: LibraryAccess, selector: TokenSelector, state: StateDirectory) -> dict[str, t.Any]:
    """Everything that shows without a login.

    :param selector: only tokens that match; one that names nothing means all.
    :returns: ``library`` (facts), ``tokens`` (list), ``failed_slots`` (those that did not answer), ``missing`` (tokens that the
        host remembers from this library and that it does not list).
    :raises TdeError: the library does not load or answer; the registry or the list of refused PINs is damaged.
    """
    library = load(access)
    listed, failed = scan(library)
    refused = RefusedPins(state)
    shown = []
    for info in sorted(listed, key=lambda info: info.slot_id):
        if matches(info, selector):
            counts = {user: refused.count(info.label, info.serial, user) for user in ("user", "so")}
            shown.append({**info.public(), "mechanisms": mechanisms(library, info), "refused_pins": counts})
    raw = library.raw
    return {
        "library": {
            "path": library.path,
            "manufacturer": raw.manufacturer_id,
            "description": raw.library_description,
            "version": "{}.{}".format(*raw.library_version),
            "cryptoki_version": "{}.{}".format(*raw.cryptoki_version),
        },
        "tokens": shown,
        "failed_slots": [{"slot_id": slot, "answer": ckr} for slot, ckr in sorted(failed.items())],
        "missing": [
            entry
            for entry in Registry(state).tokens()
            if entry["library"] == library.path
            and not any(
                info.initialized and info.label == entry["label"] and same_serial(info.serial, entry["serial"]) for info in listed
            )
        ],
    }
