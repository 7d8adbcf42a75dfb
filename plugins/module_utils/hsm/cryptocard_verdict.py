# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Do the crypto adapters of an IBM Z or LinuxONE host hold the master key it needs? Pure: plain facts in, a verdict out.

A queue (*APQN*: adapter and domain) holds master keys of its own. Requests go to whichever queue is free, so one queue with
another key than its neighbours makes a program fail now and then, never always: that is the cause that is named first.
"""

from __future__ import annotations

import re
import typing as t

from ..common.errors import TdeError

#: Master keys of a queue by the card's mode, in the words of the kernel's attribute ``mkvps`` (drivers/s390/crypto/zcrypt_cex4.c).
#: CCA's DES master key (SYM) is not shown there.
MASTER_KEYS: dict[str, tuple[str, ...]] = {"cca": ("aes", "apka", "asym"), "ep11": ("wk",)}

#: Hexadecimal digits of a verification pattern. Of EP11's the kernel shows 64, and the pattern is the first 32 of them
#: (XCP_WKID_BYTES in openCryptoki's ep11.h; EXPECTED_WKVP in ep11tok.conf takes these).
PATTERN_DIGITS: dict[str, int] = {"aes": 16, "apka": 16, "asym": 32, "wk": 32}
_WK_DIGITS_SHOWN = 64

#: What must be set where nobody says which key is expected.
_NEEDED = {"cca": ("aes",), "ep11": ("wk",)}

_MODE_NAMES = {"cca": "CCA", "ep11": "EP11", "accelerator": "accelerator", "unknown": "unknown"}
_KEY_NAMES = {"aes": "AES master key", "apka": "APKA master key", "asym": "asymmetric master key", "wk": "wrapping key"}

#: States of a register *new* that wait for being set: CCA's full, EP11's committed.
_WAITING = ("full", "committed")


class Register(t.TypedDict):
    """One register of a master key: ``state`` in the kernel's word or ``unknown``, ``pattern`` in lower case without 0x."""

    state: str
    pattern: str | None


class Card(t.TypedDict):
    """A card; ``status`` is online, offline, deconfigured, checkstopped, unbound or unknown."""

    id: str
    type: str | None
    mode: str
    status: str
    restricted: bool | None
    hwtype: int | None
    requests: int | None
    driver: str | None
    serial: str | None


class Queue(t.TypedDict):
    """A queue, ``id`` as CARD.DOMAIN; ``status`` as a card's, or reserved (for KVM guests)."""

    id: str
    card: str
    domain: str
    type: str | None
    mode: str
    status: str
    requests: int | None
    driver: str | None
    se_bind: str | None
    se_associate: str | None
    master_keys: dict[str, dict[str, Register]]


class Bus(t.TypedDict):
    """Attributes of the AP bus; domains as four hexadecimal digits, none where the machine does not tell."""

    default_domain: str | None
    max_domain: str | None
    usage_domains: list[str] | None
    control_domains: list[str] | None
    features: list[str]


class Facts(t.TypedDict):
    """What the verdict looks at."""

    present: bool
    message: str
    bus: Bus
    cards: list[Card]
    queues: list[Queue]


class Verdict(t.TypedDict):
    """``codes`` and ``reasons`` go together, the cause of intermittent failures first; both are empty when ``ready``."""

    queues: list[str]
    ready: bool
    codes: list[str]
    reasons: list[str]


class Finding(t.NamedTuple):
    """Why not: a stable word, and the sentence."""

    code: str
    reason: str


def expected_patterns(option: t.Mapping[str, object], mode: str | None = None) -> dict[str, str]:
    """The expected verification patterns in lower case without 0x; those that are none are left out.

    :param option: master key (``aes``, ``apka``, ``asym``, ``wk``) → pattern.
    :param mode: the only mode that is looked at, if so.
    :raises TdeError: ``invalid_option``.
    """
    found: dict[str, str] = {}
    for name, value in option.items():
        if value is None:
            continue
        digits = PATTERN_DIGITS[name]
        pattern = value.strip().lower().removeprefix("0x") if isinstance(value, str) else ""
        lengths = (digits, _WK_DIGITS_SHOWN) if name == "wk" else (digits,)
        if not isinstance(value, str):
            said = "YAML read the pattern as a number or another type; put it in quotes"
        elif not re.fullmatch("[0-9a-f]*", pattern):
            said = "a pattern has hexadecimal digits only"
        elif len(pattern) not in lengths:
            said = f"the pattern has {len(pattern)} hexadecimal digits and not {' or '.join(map(str, lengths))}"
        elif mode and name not in MASTER_KEYS[mode]:
            said = f"no {_MODE_NAMES[mode]} coprocessor has this key"
        else:
            found[name] = pattern[:digits]
            continue
        raise TdeError(
            "invalid_option",
            said,
            obj=f"option expected.{name}",
            next_step="Copy it from the queue's attribute mkvps, in quotes, and name the mode that it belongs to, or none.",
        )
    return found


def default_domain(facts: Facts, expected: t.Mapping[str, str] | None = None, mode: str | None = None) -> Verdict:
    """Whether the default domain holds the key on every card of the mode.

    :param expected: as :func:`expected_patterns` gives them.
    :param mode: ``cca`` or ``ep11``; the modes of what is expected if it is not given, else both.
    """
    if not facts["present"]:
        return _verdict([], [Finding("bus_absent", facts["message"])])
    domain, usable = facts["bus"]["default_domain"], facts["bus"]["usage_domains"]
    if domain is None:
        return _verdict([], [Finding("default_domain_unset", f"The AP bus has no default domain: set one{_set(usable)}.")])
    unavailable = []
    if usable is not None and domain not in usable:
        has = f"its usage domains are {', '.join(usable)}" if usable else "it has none"
        unavailable.append(
            Finding(
                "default_domain_unavailable",
                f"The default domain {domain} is no usage domain of this system ({has}): set another default{_set(usable)}, or have "
                "the domain assigned to this partition or guest.",
            )
        )
    modes = _modes(expected, mode)
    wanted = [f"{card['id']}.{domain}" for card in facts["cards"] if card["mode"] in modes]
    if not wanted:
        return _verdict([], [*unavailable, _no_coprocessor(facts, modes)])
    return _verdict(wanted, unavailable or _judge(facts, wanted, modes, expected or {}))


def usage_domains(facts: Facts, expected: t.Mapping[str, str] | None = None, mode: str | None = None) -> Verdict:
    """Whether every queue that a program can get holds the key: for programs that take any (an EP11 token with APQN_ANY).

    Queues that are not online are left out: no program gets them. The parameters are those of :func:`default_domain`.
    """
    if not facts["present"]:
        return _verdict([], [Finding("bus_absent", facts["message"])])
    modes = _modes(expected, mode)
    cards = {card["id"]: card for card in facts["cards"] if card["mode"] in modes and card["status"] == "online"}
    usable = facts["bus"]["usage_domains"]
    wanted = [
        queue["id"]
        for queue in facts["queues"]
        if queue["card"] in cards and queue["status"] == "online" and (usable is None or queue["domain"] in usable)
    ]
    if wanted:
        return _verdict(wanted, _judge(facts, wanted, modes, expected or {}))
    if not any(card["mode"] in modes for card in facts["cards"]):
        return _verdict([], [_no_coprocessor(facts, modes)])
    return _verdict([], [Finding("no_queue_online", f"No {_named(modes)} queue of this system is online.")])


def ready(
    facts: Facts,
    expected: t.Mapping[str, str] | None = None,
    *,
    mode: str | None = None,
    queues: t.Sequence[str] | None = None,
) -> Verdict:
    """Whether the queues that a program uses are online and hold the key.

    :param facts: what ``hsm.tde.cryptocard_info`` returns, or :func:`.cryptocard.read`.
    :param queues: the queues by name (CARD.DOMAIN), as in a token's allow list; the default domain on every card if not given.
    """
    if queues is None:
        return default_domain(facts, expected, mode)
    if not facts["present"]:
        return _verdict([], [Finding("bus_absent", facts["message"])])
    return _verdict(list(queues), _judge(facts, queues, _modes(expected, mode), expected or {}))


def _set(usable: t.Sequence[str] | None) -> str:
    """How a default domain is set; chzcrypt reads a number with leading zeros as octal, and lszcrypt's are hexadecimal."""
    return f" (chzcrypt -q {int(usable[0], 16)} sets {usable[0]})" if usable else ""


def _verdict(queues: list[str], findings: t.Sequence[Finding]) -> Verdict:
    return {
        "queues": queues,
        "ready": not findings,
        "codes": [finding.code for finding in findings],
        "reasons": [finding.reason for finding in findings],
    }


def _modes(expected: t.Mapping[str, str] | None, mode: str | None) -> tuple[str, ...]:
    if mode:
        return (mode,)
    return tuple(name for name, keys in MASTER_KEYS.items() if set(keys) & set(expected or ())) or tuple(MASTER_KEYS)


def _named(modes: t.Sequence[str]) -> str:
    return " or ".join(_MODE_NAMES[mode] for mode in modes)


def _no_coprocessor(facts: Facts, modes: t.Sequence[str]) -> Finding:
    if not facts["cards"]:
        return Finding("no_card", "This system has no crypto adapter: assign one to the partition or guest.")
    has = ", ".join(f"{card['id']} ({_MODE_NAMES[card['mode']]})" for card in facts["cards"])
    return Finding(
        "no_coprocessor", f"No card is a coprocessor in {_named(modes)} mode; there are {has}. The mode is set at the HMC."
    )


def _judge(facts: Facts, wanted: t.Sequence[str], modes: t.Sequence[str], expected: t.Mapping[str, str]) -> list[Finding]:
    """Findings of queues by name: why each is not usable, then what the usable ones hold."""
    cards = {card["id"]: card for card in facts["cards"]}
    queues = {queue["id"]: queue for queue in facts["queues"]}
    findings: list[Finding] = []
    usable: list[Queue] = []
    for name in wanted:
        card, queue = cards.get(name.partition(".")[0]), queues.get(name)
        found = _hindered(name, card, queue, modes)
        if found is None and queue is not None:
            usable.append(queue)
        elif found is not None and found not in findings:
            # Several queues of one card: what is the matter with the card is said once.
            findings.append(found)
    mixed = []
    for mode in modes:
        same = [queue for queue in usable if queue["mode"] == mode]
        named = {key: expected[key] for key in MASTER_KEYS[mode] if key in expected}
        shown = [key for key in MASTER_KEYS[mode] if any(key in queue["master_keys"] for queue in same)]
        mixed += [found for key in (named or shown) if (found := _mixed(key, same, named.get(key)))]
        findings += [
            found for queue in same for key in (named or _NEEDED[mode]) if (found := _lacking(key, queue, named.get(key)))
        ]
    return mixed + findings


_CARD_STATUS = {
    "offline": "is offline: set it online (chzcrypt -e {id})",
    "deconfigured": "is deconfigured: configure it at the HMC or with chzcrypt --config-on {id}",
    "checkstopped": "is checkstopped: the adapter failed and needs service",
    "unbound": "has no driver: the kernel does not know this adapter, or its apmask takes the card away",
}
_QUEUE_STATUS = {
    **_CARD_STATUS,
    "deconfigured": "is deconfigured, as its card is",
    "reserved": "is reserved for KVM guests of this host (driver vfio_ap)",
    "unbound": "has no driver: the kernel does not know this adapter, or its apmask and aqmask take the queue away",
}


def _hindered(name: str, card: Card | None, queue: Queue | None, modes: t.Sequence[str]) -> Finding | None:
    """Why no program can use the queue, if so."""
    if card is None:
        return Finding("card_absent", f"Queue {name}: this system has no such card.")
    if card["mode"] not in modes:
        return Finding("queue_other_mode", f"Queue {name}: its card is in {_MODE_NAMES[card['mode']]} mode, not {_named(modes)}.")
    if card["status"] != "online":
        what = _CARD_STATUS.get(card["status"], "does not say whether it is online").format(id=card["id"])
        return Finding(f"card_{card['status']}", f"Card {card['id']} {what}.")
    if queue is None:
        return Finding(
            "queue_absent",
            f"Card {card['id']} has no queue {name}: the domain is not assigned to this partition or guest on that card.",
        )
    if queue["status"] != "online":
        what = _QUEUE_STATUS.get(queue["status"], "does not say whether it is online").format(id=name)
        return Finding(f"queue_{queue['status']}", f"Queue {name} {what}.")
    if card["restricted"]:
        return Finding("functions_restricted", f"Card {card['id']}: the hypervisor lets this guest use clear keys only.")
    if queue["se_bind"] == "unbound":
        return Finding(
            "queue_not_bound", f"Queue {name} is not bound to this Secure Execution guest (chzcrypt --se-bind {name})."
        )
    if queue["se_associate"] in ("unassociated", "association pending"):
        return Finding(
            "queue_not_associated",
            f"Queue {name} is not associated with a secret of this Secure Execution guest (chzcrypt --se-associate INDEX {name}).",
        )
    return None


def _register(queue: Queue, key: str, register: str) -> Register:
    return queue["master_keys"].get(key, {}).get(register) or {"state": "unknown", "pattern": None}


def _pattern(queue: Queue, key: str, register: str = "current") -> str | None:
    pattern = _register(queue, key, register)["pattern"]
    return pattern[: PATTERN_DIGITS[key]] if pattern else None


def _mixed(key: str, queues: t.Sequence[Queue], expected: str | None) -> Finding | None:
    """Queues that share the work with different keys, if so. One whose key cannot be told is left to :func:`_lacking`."""
    held: dict[str | None, list[str]] = {}
    for queue in queues:
        if _register(queue, key, "current")["state"] != "unknown":
            held.setdefault(_pattern(queue, key), []).append(queue["id"])
    if len(held) < 2 or (expected and expected not in held):
        return None
    if expected:
        right = held.pop(expected)
        wrong = sorted(name for names in held.values() for name in names)
        who = f"{_list(right)} the expected {_KEY_NAMES[key]} (pattern {expected}) and {_list(wrong, no=True)}"
    else:
        who = ", ".join(
            f"{_list(names)} the {_KEY_NAMES[key]} with pattern {pattern}" if pattern else f"{_list(names)} no {_KEY_NAMES[key]}"
            for pattern, names in held.items()
        )
    return Finding(
        "master_keys_differ",
        f"Queues that share the work hold different keys: {who}. Requests go to whichever queue is free, so the same key works now "
        "and fails the next time: this is the cause of failures that come and go. Set the same master key in all of them, or take "
        "the others out of use.",
    )


def _list(names: t.Sequence[str], *, no: bool = False) -> str:
    verb = ("do not" if len(names) > 1 else "does not") if no else ("hold" if len(names) > 1 else "holds")
    return f"{', '.join(names)} {verb}"


def _lacking(key: str, queue: Queue, expected: str | None) -> Finding | None:
    """Why the queue does not hold the master key, if so."""
    name, what, current = queue["id"], _KEY_NAMES[key], _register(queue, key, "current")
    pattern = _pattern(queue, key)
    if current["state"] == "unknown":
        return Finding(
            "master_key_unknown",
            f"Queue {name}: the pattern of the {what} cannot be told: the adapter did not answer, or this kernel does not show it.",
        )
    if pattern is not None and expected in (None, pattern):
        return None
    wanted = f"the expected pattern {expected}" if expected else "a master key"
    if expected and _pattern(queue, key, "new") == expected:
        new = _register(queue, key, "new")["state"]
        step = "it waits for being set" if new in _WAITING else f"it is loaded only in part or not committed ({new})"
        return Finding(
            "master_key_not_set", f"Queue {name}: the {what} with {wanted} is in the register of the new key only: {step}."
        )
    if expected and _pattern(queue, key, "old") == expected:
        return Finding(
            "master_key_changed",
            f"Queue {name}: the {what} with {wanted} is the old one, the current one has {pattern or 'none'}: the master key was "
            "changed, and keys wrapped under the old one must be re-enciphered.",
        )
    if pattern is None:
        waiting = " One is loaded and waits for being set." if _register(queue, key, "new")["state"] in _WAITING else ""
        return Finding("master_key_missing", f"Queue {name} holds no {what} ({current['state']}).{waiting}")
    return Finding("master_key_other", f"Queue {name}: the {what} has the pattern {pattern}, not {wanted}.")
