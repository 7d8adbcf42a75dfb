# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""openCryptoki's configuration brought to the wished state, proved by a daemon of its own before a file is replaced."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import stat
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.files import os_error, read_private, write_atomic
from ..common.plan import Plan, Step
from ..common.run import run_program
from ..common.state import StateDirectory
from ..pkcs11 import opencryptoki as base
from . import opencryptoki_api as api
from . import opencryptoki_conf as conf
from . import opencryptoki_rules as rules
from . import opencryptoki_store as store

MAIN = os.path.basename(api.CONF)
#: What stands in a file of a token that is new (the project's own sample files).
_NEW_FILE = {"ep11": "", "cca": "version cca-0\n"}
_MODE = 0o644


@dataclasses.dataclass(frozen=True)
class Ep11Wish:
    """An EP11 token's file; None leaves a thing as it is.

    :param apqns: pairs of adapter and domain; empty for any.
    :param modes: words of :data:`.opencryptoki_rules.EP11_MODES`; all others are taken out.
    """

    file: str
    apqns: tuple[tuple[int, int], ...] | None = None
    expected_wkvp: str | None = None
    modes: tuple[str, ...] | None = None
    pkey_mode: str | None = None


@dataclasses.dataclass(frozen=True)
class CcaWish:
    """A CCA token's file. :param expected_mkvps: SYM, AES, APKA and their patterns; those not named are taken out."""

    file: str
    expected_mkvps: t.Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ConfigWish:
    """The configuration as it shall be; None leaves a thing as it is.

    :param slots: by number: keys and values, where None removes the key; or None, which removes the slot.
    :param exclusive: slots that are not named go.
    """

    slots: t.Mapping[int, t.Mapping[str, str | None] | None]
    exclusive: bool = False
    disable_event_support: bool | None = None
    statistics: tuple[str, ...] | None = None
    ep11: tuple[Ep11Wish, ...] = ()
    cca: tuple[CcaWish, ...] = ()
    backup: bool = False


@dataclasses.dataclass
class Outcome:
    """What :func:`configure` did, or would do.

    :param texts: by file name, before and after.
    :param answer: the library's with these files; None where it could not be asked.
    :param not_listed: configured slots that the library does not list, with the reason.
    """

    plan: Plan
    texts: dict[str, tuple[str, str]]
    version: rules.Version
    answer: api.Answer | None
    not_listed: dict[int, str]
    backups: list[str]
    warnings: list[str]


def parse_apqn(word: str) -> tuple[int, int]:
    """``0a.0011`` as lszcrypt shows it: adapter and domain in hexadecimal.

    :raises TdeError: ``invalid_option``.
    """
    found = re.fullmatch(r"([0-9a-fA-F]{1,2})\.([0-9a-fA-F]{1,4})", word)
    if not found or int(found[2], 16) > rules.MAX_APQN:
        raise TdeError("invalid_option", "is no CARD.DOMAIN as lszcrypt shows it, such as 03.0011", obj=f"option apqns: {word!r}")
    return int(found[1], 16), int(found[2], 16)


def wish_of(
    *,
    slots: t.Sequence[t.Mapping[str, t.Any]],
    exclusive: bool,
    disable_event_support: bool | None,
    statistics: t.Sequence[str] | None,
    ep11: t.Sequence[t.Mapping[str, t.Any]],
    cca: t.Sequence[t.Mapping[str, t.Any]],
    backup: bool,
) -> ConfigWish:
    """The wish of the options of hsm.tde.opencryptoki_config.

    :raises TdeError: ``invalid_option``.
    """
    wished: dict[int, dict[str, str | None] | None] = {}
    for slot in slots:
        number = slot["number"]
        if number in wished:
            raise TdeError("invalid_option", "is named twice", obj=f"slot {number} of the option slots")
        if not 0 <= number <= rules.MAX_SLOT:
            raise TdeError("invalid_option", f"slots go from 0 to {rules.MAX_SLOT}", obj=f"slot {number} of the option slots")
        keys = {key: slot[key] or None for key in rules.SLOT_KEYS if slot.get(key) is not None}
        wished[number] = keys if slot["state"] == "present" else None
    for file in [*(one["file"] for one in ep11), *(one["file"] for one in cca)]:
        if "/" in file or file in ("", ".", "..", MAIN):
            raise TdeError("invalid_option", f"is not the name of a token's file in {api.CONF_DIR}", obj=f"option file {file!r}")
    return ConfigWish(
        wished,
        exclusive,
        disable_event_support,
        tuple(statistics) if statistics is not None else None,
        tuple(_ep11_wish(one) for one in ep11),
        tuple(
            CcaWish(
                one["file"],
                {
                    name.upper(): _pattern(value, rules.MKVP_BYTES, f"expected_mkvps.{name}")
                    for name, value in one["expected_mkvps"].items()
                    if value
                },
            )
            for one in cca
        ),
        backup,
    )


def _ep11_wish(one: t.Mapping[str, t.Any]) -> Ep11Wish:
    apqns, wkvp, modes = one["apqns"], one["expected_wkvp"], one["modes"]
    if apqns is not None and (not apqns or ("any" in apqns and len(apqns) > 1)):
        raise TdeError("invalid_option", "names adapters and domains, or any alone", obj="option apqns")
    return Ep11Wish(
        one["file"],
        None if apqns is None else () if apqns == ["any"] else tuple(dict.fromkeys(parse_apqn(word) for word in apqns)),
        _pattern(wkvp, rules.WKVP_BYTES, "expected_wkvp") if wkvp else wkvp,
        tuple(modes) if modes is not None else None,
        one["pkey_mode"],
    )


def _pattern(value: str, size: int, option: str) -> str:
    """A verification pattern without 0x.

    :raises TdeError: ``invalid_option``.
    """
    if not rules.is_pattern(value, size):
        raise TdeError("invalid_option", f"has {size} bytes in hexadecimal", obj=f"option {option}")
    return value[2:] if value[:2].lower() == "0x" else value


def wished_texts(present: t.Mapping[str, str], wish: ConfigWish, version: rules.Version) -> dict[str, str]:
    """The files as wished, by name. Pure.

    :param present: the files as they are; one that is missing is not in it.
    :raises TdeError: ``opencryptoki_conf_invalid`` where a file cannot be edited; ``invalid_option``.
    """
    found: dict[str, str] = {}

    def edit(name: str, new: str, change: t.Callable[[str], str]) -> None:
        before = found.get(name, present.get(name, new))
        try:
            found[name] = change(before)
        except conf.ConfSyntaxError as exc:
            raise _invalid(name, [rules.Problem(exc.line, exc.reason)]) from None

    edit(MAIN, "version opencryptoki-{}.{}\n".format(*version), lambda text: _main(text, wish))
    for ep11 in wish.ep11:
        edit(ep11.file, _NEW_FILE["ep11"], lambda text, ep11=ep11: _ep11(text, ep11, version))  # type: ignore[misc]
    for cca in wish.cca:
        edit(cca.file, _NEW_FILE["cca"], lambda text, cca=cca: conf.set_expected_mkvps(text, cca.expected_mkvps))  # type: ignore[misc]
    return found


def _main(text: str, wish: ConfigWish) -> str:
    gone = [number for number, keys in wish.slots.items() if keys is None]
    if wish.exclusive:
        gone += [number for number in conf.slots(text) if number not in wish.slots]
    for number in gone:
        text = conf.remove_slot(text, number)
    for number, keys in wish.slots.items():
        if keys is not None:
            text = conf.set_slot(text, number, keys)
    if wish.statistics is not None:
        text = conf.set_statistics(text, wish.statistics)
    if wish.disable_event_support is not None:
        text = conf.set_flag(text, "disable-event-support", wish.disable_event_support)
    return text


def _ep11(text: str, wish: Ep11Wish, version: rules.Version) -> str:
    if wish.apqns is not None:
        text = conf.set_apqns(text, wish.apqns or None, rules.allowlist_word(version))
    for mode in rules.EP11_MODES if wish.modes is not None else ():
        text = conf.set_flag(text, mode, mode in (wish.modes or ()))
    if wish.pkey_mode is not None:
        text = conf.set_keyword(text, "PKEY_MODE", wish.pkey_mode, quoted=False)
    if wish.expected_wkvp == "":
        text = conf.remove_keyword(text, "EXPECTED_WKVP")
    elif wish.expected_wkvp is not None:
        text = conf.set_keyword(text, "EXPECTED_WKVP", wish.expected_wkvp, quoted=True)
    return text


def _invalid(name: str, problems: t.Sequence[rules.Problem], said: str = "") -> TdeError:
    reasons = "; ".join(str(problem) for problem in problems[:5])
    return TdeError(
        "opencryptoki_conf_invalid",
        reasons + (f". pkcsslotd said: {said}" if said else ""),
        obj=os.path.join(api.CONF_DIR, name),
        kept="The files are as they were.",
        details={"problems": [{"line": problem.line, "reason": problem.reason} for problem in problems]},
    )


def judge(texts: t.Mapping[str, str], wish: ConfigWish, version: rules.Version) -> None:
    """Refuse what the version would not take.

    :raises TdeError: ``opencryptoki_conf_invalid``, ``opencryptoki_store_format``.
    """
    checks = {MAIN: rules.problems}
    checks |= {ep11.file: rules.ep11_problems for ep11 in wish.ep11}
    checks |= {cca.file: rules.cca_problems for cca in wish.cca}
    for name, check in checks.items():
        problems = check(texts[name], version)
        if problems:
            raise _invalid(name, problems)
    for number, settings in conf.slots(texts[MAIN]).items():
        folder = rules.folder_of(settings)
        there = store.store_format(folder) if folder else "none"
        if there in ("old", "3.12") and there != store.wished_format(settings):
            says = f"tokversion = {settings['tokversion']}" if "tokversion" in settings else "no tokversion"
            raise TdeError(
                "opencryptoki_store_format",
                f"the slot has {says}, and {store.folder(t.cast(str, folder))} is in the {there} format",
                obj=f"slot {number}",
                kept="The files are as they were.",
            )


def installed_version(path: str, answer: api.Answer) -> rules.Version:
    """openCryptoki's version: as the library says, else as the package does.

    :param path: of the library.
    :raises TdeError: ``command_failed``, ``command_missing`` where neither does.
    """
    if answer.version:
        return answer.version
    query = (
        ["dpkg-query", "--show", "--showformat=${Version}", "opencryptoki"]
        if os.path.exists("/usr/bin/dpkg-query")
        else ["rpm", "--query", "--queryformat=%{VERSION}", "--file", path]
    )
    found = re.match(r"(?:\d+:)?(\d+)\.(\d+)", run_program(query).stdout.decode("utf-8", "replace"))
    if not found:
        raise TdeError("command_failed", "shows no version of openCryptoki", obj=" ".join(query[:2]))
    return int(found[1]), int(found[2])


def configure(wish: ConfigWish, state: StateDirectory, *, check_mode: bool = False) -> Outcome:
    """Bring the configuration to the wished state.

    :raises TdeError: ``opencryptoki_missing`` and what :func:`judge` and :func:`prove` raise.
    """
    if check_mode:
        return apply(wish, act=False)
    with state.locked(2.0):
        return apply(wish, act=True)


def apply(wish: ConfigWish, *, act: bool) -> Outcome:
    """As :func:`configure`; the caller holds the lock.

    :param act: False to plan only.
    """
    warnings: list[str] = []
    path = api.library_path()
    names = {MAIN, *(ep11.file for ep11 in wish.ep11), *(cca.file for cca in wish.cca)}
    present = {name: text for name in names if (text := _read(name)) is not None}
    before = api.try_out(path, {}, _folders(present.get(MAIN, "")))
    known = before
    if before is not None and not before.version:
        # The present file stops the daemon or the library.
        known = api.try_sound(path)
    version = installed_version(path, known or api.ask(path))
    texts = wished_texts(present, wish, version)
    judge(texts, wish, version)
    after = before
    if texts != present and before is not None:
        after = api.try_out(path, {name: conf.encode(text) for name, text in texts.items()}, _folders(texts[MAIN]))
    if after is None:
        warnings.append(
            "This process may not make name spaces (a container without CAP_SYS_ADMIN), so the new configuration was checked "
            "by its grammar only, not by a daemon. Compare hsm.tde.opencryptoki_info after the restart."
        )
    not_listed = prove(path, texts[MAIN], wish, before, after) if after is not None else {}
    plan = [*decide(present, texts), *_closed_folders(texts[MAIN], wish)]
    backups: list[str] = []
    if act and plan:
        _Runner(texts, wish.backup, backups).run(plan)
    both = {name: (present.get(name, ""), texts[name]) for name in sorted(names)}
    return Outcome(plan, both, version, after, not_listed, backups, warnings)


def _read(name: str) -> str | None:
    try:
        return conf.decode(read_private(os.path.join(api.CONF_DIR, name), forbidden_mode=0o022))
    except TdeError as exc:
        if exc.code != "file_absent":
            raise
        return None


def _folders(text: str) -> dict[str, str]:
    """The tokens' folders of a configuration, with their groups; none where it cannot be read."""
    try:
        slots = conf.slots(text).values()
    except conf.ConfSyntaxError:
        return {}
    return {folder: keys.get("usergroup", base.GROUP) for keys in slots if (folder := rules.folder_of(keys))}


def _closed_folders(text: str, wish: ConfigWish) -> Plan:
    """The folders of the tokens that were asked for in which their users cannot make keys."""
    found = {
        folder: keys.get("usergroup", base.GROUP)
        for number, keys in conf.slots(text).items()
        if wish.slots.get(number) is not None and (folder := rules.folder_of(keys))
    }
    return [step for folder, group in found.items() for step in store.closed_folders(folder, group)]


def prove(path: str, text: str, wish: ConfigWish, before: api.Answer | None, after: api.Answer) -> dict[int, str]:
    """Refuse a configuration with which the library lists less than it did, or not what was asked for.

    :param text: of opencryptoki.conf as wished; :param before: what the library lists now.
    :returns: slots that are configured, were not listed before either and were not asked for, with the reason.
    :raises TdeError: ``opencryptoki_conf_invalid``, ``opencryptoki_stdll_absent``, ``opencryptoki_slot_without_token``.
    """
    if not after.version:
        raise _invalid(MAIN, [rules.Problem(0, after.error.get("message", "the daemon does not serve"))], after.said)
    not_listed: dict[int, str] = {}
    listed_before = before.slots if before is not None else {}
    for number, settings in conf.slots(text).items():
        wished = wish.slots.get(number) is not None
        slot = after.slots.get(number)
        if slot is not None:
            if wished:
                _read_back(number, settings, slot)
            continue
        absent = not api.stdll_installed(path, settings.get("stdll", ""))
        reason = f"{settings.get('stdll')} is not installed" if absent else f"{settings.get('stdll')} finds no token"
        if wished or number in listed_before:
            raise TdeError(
                "opencryptoki_stdll_absent" if absent else "opencryptoki_slot_without_token",
                f"the library would not list it: {reason}" + (f". pkcsslotd said: {after.said}" if after.said else ""),
                obj=f"slot {number}",
                kept="The files are as they were.",
            )
        not_listed[number] = reason
    return not_listed


def _read_back(number: int, settings: t.Mapping[str, str], slot: api.Slot) -> None:
    """Whether the library shows a slot as it was asked for."""
    for key, shown in (("description", slot.description), ("manufacturer", slot.manufacturer)):
        if key in settings and settings[key] != shown:
            raise _invalid(
                MAIN, [rules.Problem(0, f"slot {number}: the library would show {key} as {shown!r}, not {settings[key]!r}")]
            )


def decide(present: t.Mapping[str, str], texts: t.Mapping[str, str]) -> Plan:
    """One step a file that changes."""
    steps: Plan = []
    for name, text in texts.items():
        if present.get(name) == text:
            continue
        why = "it does not exist" if name not in present else "it differs from what was asked for"
        if name == MAIN:
            slots, wished = conf.slots(present.get(name, "")), conf.slots(text)
            changed = [
                f"slot {slot} {_difference(slots.get(slot), wished.get(slot))}"
                for slot in sorted({*slots, *wished})
                if slots.get(slot) != wished.get(slot)
            ]
            why = "; ".join(changed) or why
        steps.append(Step("write_file", os.path.join(api.CONF_DIR, name), why, {"name": name}))
    return steps


def _difference(before: t.Mapping[str, str] | None, after: t.Mapping[str, str] | None) -> str:
    if before is None:
        return "is not there"
    if after is None:
        return "is not wished"
    return "differs in " + ", ".join(sorted(key for key in {*before, *after} if before.get(key) != after.get(key)))


class _Runner:
    """Carries a plan out."""

    def __init__(self, texts: t.Mapping[str, str], backup: bool, backups: list[str]) -> None:
        self._texts, self._backup, self._backups = texts, backup, backups

    def run(self, plan: Plan) -> None:
        planning.run(plan, {"write_file": self._write, "open_folder": store.open_folder})

    def _write(self, step: Step) -> None:
        path, name = step.obj, step.data["name"]
        mode, uid, gid = _MODE, 0, 0
        try:
            info = os.stat(path)
            mode, uid, gid = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
        except FileNotFoundError:
            info = None
        except OSError as exc:
            raise os_error(exc, path) from None
        if self._backup and info is not None:
            now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
            copy = f"{path}.{now}.{os.getpid()}"
            write_atomic(copy, read_private(path, forbidden_mode=0o022), mode=mode, uid=uid, gid=gid)
            self._backups.append(copy)
        write_atomic(path, conf.encode(self._texts[name]), mode=mode, uid=uid, gid=gid)
