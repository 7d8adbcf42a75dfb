# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From state and wish to steps, and what is refused; pure."""

from __future__ import annotations

import dataclasses
import datetime
import os
import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ..base import SlotWish
from . import conf
from .look import ABSENT, AUTO_OPEN, KEYSTORE, RIGHT, MasterKey, State
from .options import FILE, HSM, PLUGIN, Options

#: What guards the master key of each kind of keystore.
PROTECTIONS = {HSM: "token", FILE: "passphrase", PLUGIN: "token"}
#: Bytes of a file keystore's passphrase (Operation Guide, appendix B.2.2); a token's PIN has the token's own limits.
PASSPHRASE_BYTES = (8, 200)

#: Steps that the server carries out, which therefore must be ready for them.
BY_SERVER = (
    "set_master_key",
    "rotate_master_key",
    "declare_master_key",
    "open_keystore",
    "change_passphrase",
    "create_extension",
)
#: Steps that hand the token's PIN to somebody: the server, or a file.
USES_PIN = ("set_master_key", "rotate_master_key", "open_keystore")


@dataclasses.dataclass(frozen=True)
class Credential:
    """What is wished of the credential, without it.

    :param given: whether there is one at all. :param changes: whether the wished one is another than the present one.
    :param known: whether the wished passphrase is the keystore's: by the record's fingerprint, None if it has none.
    :param old: whether the present one was given, too.
    """

    given: bool = False
    changes: bool = False
    known: bool | None = None
    old: bool = False


def check_slots(options: Options, slots: t.Sequence[SlotWish] | None) -> SlotWish | None:
    """The one keyslot that this engine has.

    :raises TdeError: ``engine_unsupported``.
    """
    for slot in slots or ():
        if slot.name != "primary" or len(slots or ()) > 1:
            raise TdeError(
                "engine_unsupported",
                "Enterprise Postgres has one keystore with one protection: list the keyslot primary alone; a copy of the keystore,"
                " and of the token, kept elsewhere is its recovery",
                obj="option keyslots",
            )
        if slot.protection != PROTECTIONS[options.keystore]:
            raise TdeError(
                "engine_unsupported",
                f"keystore: {options.keystore} is protected by a {PROTECTIONS[options.keystore]}, not by a {slot.protection}",
                obj=f"keyslot {slot.name}",
                next_step="Correct protection, or fep.keystore.",
            )
    return slots[0] if slots else None


def check_kind(options: Options, recorded: str | None, state: State) -> None:
    """Refuse to change the kind of a keystore that is in use.

    :param recorded: the kind that the record knows.
    :raises TdeError: ``protection_unchangeable``.
    """
    facts = state.server.facts
    running = None
    if facts and facts.settings.get("tde_kms.kms_conninfo_file"):
        running = PLUGIN
    elif facts and facts.settings.get("keystore_location") and KEYSTORE in state.location.files:
        running = HSM if "tde_z" in conf.libraries(facts.settings.get("shared_preload_libraries", "")) else FILE
    before = recorded if recorded and state.made else running if state.made else None
    if before is None or before == options.keystore:
        return
    said = (
        "a change from a file-based keystore to one in a key management system, or back, is not supported by Fujitsu Enterprise Postgres"
        if PLUGIN in (before, options.keystore)
        else "Fujitsu Enterprise Postgres describes no way from a keystore in a file to one in a token, or back"
    )
    raise TdeError(
        "protection_unchangeable",
        said,
        obj=f"keystore {before}, wished {options.keystore}",
        next_step="Take the data to a new cluster whose keystore is of the wished kind (pg_dump, or logical replication).",
    )


def settings(options: Options, state: State) -> dict[str, str]:
    """What the include file shall say, the PIN aside."""
    facts = state.server.facts
    ours = state.files.include
    name = "shared_preload_libraries"
    if facts and name in facts.coming:
        others = [value for value, file in facts.coming[name] if os.path.realpath(file) != os.path.realpath(ours)]
        base = others[-1] if others else ""
    elif state.files.settings and name in state.files.settings:
        base = state.files.settings[name]
    else:
        base = conf.parse(state.files.text).get(name, "")
    return conf.wished(options, state.slot_id, base, state.files.kms_file)


def _same(name: str, one: str, other: str) -> bool:
    if name.lower() == "shared_preload_libraries":
        return conf.libraries(one) == conf.libraries(other)
    return one.rstrip("/") == other.rstrip("/")


def ready(options: Options, state: State) -> bool:
    """Whether the running server works with the wished settings."""
    facts = state.server.facts
    if facts is None:
        return False
    return all(_same(name, facts.settings.get(name.lower(), ""), value) for name, value in settings(options, state).items())


def check_coming(options: Options, state: State) -> None:
    """Refuse settings that something else than our file will set at the next start.

    :raises TdeError: ``setting_overridden``.
    """
    facts = state.server.facts
    if facts is None or state.files.settings is None or not state.files.included:
        return
    for name, value in settings(options, state).items():
        rows = facts.coming.get(name.lower())
        if (
            rows
            and os.path.realpath(rows[-1][1]) != os.path.realpath(state.files.include)
            and not _same(name, rows[-1][0], value)
        ):
            raise TdeError(
                "setting_overridden",
                f"{name} is set to {rows[-1][0]!r} there, after {state.files.include}",
                obj=rows[-1][1],
                next_step="Take it out there (ALTER SYSTEM RESET, if it is postgresql.auto.conf), then run again.",
            )


def configuration(options: Options, state: State, *, pin_wished: bool, pin_given: bool) -> Plan:
    """The steps to files that say what is wished.

    :param pin_wished: the PIN shall rest in the include file.
    :raises TdeError: ``keystore_unreachable``, ``credential_missing``.
    """
    steps: Plan = []
    path = options.keystore_location
    if path and KEYSTORE not in state.location.files:
        _nowhere_else(path, state)
    if path and not state.location.exists:
        steps.append(Step("make_keystore_directory", path, "it is missing", {"path": path}))
    elif path and not state.location.private:
        steps.append(Step("protect_keystore", path, "others than the server's user could read it", {"path": path}))
    files = state.files
    wished = settings(options, state)
    if options.keystore == PLUGIN:
        if state.plugin != options.command:
            link = os.path.join(options.plugin_directory or "", conf.PLUGIN_NAME)
            steps.append(Step("link_plugin", link, "the server runs the command by it", {"path": link}))
        steps += connection(options, state, options.kms_name, "the plugin's connection is missing or another")
    if pin_wished and not pin_given and files.pin == ABSENT:
        raise TdeError("credential_missing", "auto_open writes the PIN, and none was given", obj="option pin")
    why = ""
    if {name.lower(): value for name, value in wished.items()} != dict(files.settings or {}):
        why = "its settings are missing or others"
    elif not files.private:
        why = "others than the server's user could read it"
    elif pin_wished and pin_given and files.pin != RIGHT:
        why = "the PIN is missing or another"
    elif not pin_wished and files.pin != ABSENT:
        why = "a PIN rests there"
    if why:
        data = {"path": files.include, "settings": wished, "with_pin": pin_wished}
        steps.append(Step("write_include_file", files.include, why, data))
    if not files.included:
        steps.append(
            Step(
                "include_settings",
                files.config,
                f"it does not end with {conf.include_line(files.include)}",
                {"path": files.config, "include": files.include},
            )
        )
    return steps


def _nowhere_else(path: str, state: State) -> None:
    """Refuse to make a second keystore: what is encrypted under the first could not be read.

    :raises TdeError: ``keystore_unreachable``.
    """
    said, next_step = "", "Mount the file system that it is on, or restore the keystore from a backup."
    if state.key is not None:
        said = f"this host set a master key on {state.key.since[:10]}, and {KEYSTORE} is not there"
    elif state.adopted:
        said = f"this host found a keystore before, and {KEYSTORE} is not there"
    elif state.elsewhere and not state.standby:
        said = f"{KEYSTORE} is not there, and the server has one in {state.elsewhere}"
        next_step = f"Name that folder, or copy {KEYSTORE} first."
    if said:
        raise TdeError(
            "keystore_unreachable",
            said,
            obj=f"keystore_location {path}",
            kept="Nothing was created in its place.",
            next_step=next_step,
        )


def connection(options: Options, state: State, name: str, why: str) -> Plan:
    """The step that writes a name into the connection file; former names stay, for backups need them."""
    files = state.files
    line = conf.kms_line(name, state.cluster)
    if (files.kms or {}).get(name) == line:
        return []
    data = {"path": files.kms_file, "lines": {**(files.kms or {}), name: line}}
    return [Step("write_connection_file", files.kms_file, why, data)]


def strip_pin(state: State) -> Plan:
    """The steps before a change of the token's PIN: no start in between must try the PIN that it has no more."""
    if state.files.pin == ABSENT:
        return []
    data = {"path": state.files.include, "settings": dict(state.files.settings or {}), "with_pin": False}
    return [Step("take_pin_out", state.files.include, "a start during the change must not try a wrong PIN", data)]


def master_key(options: Options, state: State, credential: Credential) -> Plan:
    """The step that makes the keystore, once: the same call on one that exists would rotate.

    :raises TdeError: ``standby_unsupplied``, ``credential_missing``, ``passphrase_length``.
    """
    if state.made:
        return []
    if state.standby:
        raise _unsupplied(options)
    if options.keystore == PLUGIN:
        steps: Plan = []
        if state.server.facts and not state.server.facts.kms_extension:
            steps.append(Step("create_extension", "extension tde_kms", "its functions declare the key"))
        return [*steps, *declare(options.kms_name, options.key_id, "no key was declared yet")]
    if not credential.given:
        word = "passphrase" if options.keystore == FILE else "PIN"
        raise TdeError("credential_missing", f"the master key needs the {word}, and none was given", obj="keystore")
    return [Step("set_master_key", f"keystore {options.keystore_location}", "it has no master key yet")]


def declare(kms_name: str, key_id: str, why: str, **more: t.Any) -> Plan:
    """The steps that make a key of the token the master key, by way of the plugin."""
    names = {"kms_name": kms_name, "key_id": key_id, **more}
    return [
        Step("make_key", f"key {key_id}", "the plugin needs it in the token, if it is not there", names),
        Step("declare_master_key", f"key {key_id} of {kms_name}", why, names),
    ]


def _unsupplied(options: Options) -> TdeError:
    what = {
        HSM: f"Copy {KEYSTORE} and the whole token directory of openCryptoki from the primary, owners kept, restart pkcsslotd; "
        "the HSM master key must be the same on both.",
        FILE: f"Copy {KEYSTORE} from the primary, never {AUTO_OPEN}.",
        PLUGIN: "Give this host the plugin with the same name and key as the primary.",
    }
    return TdeError(
        "standby_unsupplied",
        "is a standby without the primary's keystore",
        obj="server",
        next_step=f"{what[options.keystore]} Then run again.",
    )


def check_length(length: int) -> None:
    """Refuse a passphrase that no keystore file may have; :param length: in bytes.

    :raises TdeError: ``passphrase_length``.
    """
    least, most = PASSPHRASE_BYTES
    if not least <= length <= most:
        raise TdeError(
            "passphrase_length",
            f"must have {least} to {most} bytes, as Enterprise Postgres demands",
            obj="passphrase of the keystore",
            next_step="Choose one that cannot be guessed: whoever copies the file can try offline.",
        )


def passphrase(options: Options, credential: Credential) -> Plan:
    """The step that changes a file keystore's passphrase.

    :raises TdeError: ``credential_missing``.
    """
    if options.keystore != FILE or not credential.given or credential.known:
        return []
    obj = f"keystore {options.keystore_location}"
    if credential.changes:
        return [Step("change_passphrase", obj, "another one is wished")]
    if credential.known is False:
        raise TdeError(
            "credential_missing",
            "the passphrase wished for is not the one that this host knows, and the present one was not given",
            obj=obj,
            next_step="Give the present one as passphrase, at top level, and the new one in keyslots.",
        )
    return []


def auto_open(options: Options, state: State, credential: Credential) -> Plan:
    """The steps to keystore.aks as it is wished; a copied one opens nothing, so one that was not made here is made anew.

    :raises TdeError: ``credential_missing``.
    """
    if options.keystore != FILE or KEYSTORE not in state.location.files:
        return []
    there = AUTO_OPEN in state.location.files
    path = os.path.join(options.keystore_location or "", AUTO_OPEN)
    if options.auto_open is None:
        # An operator's own copy is not taken away by a task that does not speak of it.
        return []
    if not options.auto_open:
        return [Step("disable_auto_open", path, "automatic opening is not wished", {"path": path})] if there else []
    if there and state.auto_open_here:
        return []
    if not credential.given:
        raise TdeError("credential_missing", "automatic opening needs the passphrase once on this host", obj=path)
    why = f"a copied {AUTO_OPEN} opens nothing" if there else "the server cannot open the keystore by itself"
    return [Step("enable_auto_open", path, why, {"path": path})]


def opening(options: Options, state: State, credential: Credential) -> Plan:
    """The step that opens the keystore in a server that is ready.

    :raises TdeError: ``credential_missing``.
    """
    if not state.made or state.known_open:
        return []
    if options.keystore != PLUGIN and not credential.given:
        word = "passphrase" if options.keystore == FILE else "PIN"
        raise TdeError("credential_missing", f"opening needs the {word}, and none was given", obj="keystore")
    return [Step("open_keystore", _name(options), "it is not known to be open since the server's start")]


def opens_by_itself(options: Options, state: State) -> bool:
    """Whether the running server ought to have opened the keystore when it started."""
    if options.keystore == HSM:
        return bool(state.server.facts and state.server.facts.pin_in_memory)
    return options.keystore == FILE and AUTO_OPEN in state.location.files and state.auto_open_here


def _name(options: Options) -> str:
    return (
        f"key {options.key_id} of {options.kms_name}" if options.keystore == PLUGIN else f"keystore {options.keystore_location}"
    )


def rotation(
    options: Options, state: State, *, tag: str | None, max_age: int | None, tags: t.Collection[str], today: datetime.date
) -> Plan:
    """The steps to a rotated master key.

    :param tag: names it; :param max_age: days; both None: nothing is wished.
    :param tags: of all former master keys.
    :raises TdeError: ``tag_superseded``, ``server_is_standby``.
    """
    key = state.key or MasterKey("", "")
    if max_age is not None:
        age = age_days(state.key, today)
        if age is not None and age <= max_age:
            return []
        tag = today.strftime("%Y%m%d")
    if tag is None or tag == key.tag:
        return []
    if tag in tags:
        raise TdeError(
            "tag_superseded",
            "was used, and a newer master key replaced it",
            obj=f"tag {tag}",
            next_step=f"The current tag is {key.tag or '(none)'}; take a new one.",
        )
    if state.standby:
        raise TdeError("server_is_standby", "is a standby", obj="server", next_step="Rotate on the primary; standbys follow.")
    why = f"the current one is of tag {key.tag}" if key.tag else "the current one has no tag"
    if options.keystore == PLUGIN:
        kms_name, key_id = f"{options.kms_name}.{tag}", f"{options.key_id}.{tag}"
        steps = connection(options, state, kms_name, "a new key comes under a new name")
        if steps:
            steps.append(Step("reload_server", state.files.kms_file, "it reads the new name"))
        return [*steps, *declare(kms_name, key_id, why, tag=tag)]
    return [Step("rotate_master_key", f"keystore {options.keystore_location}", why, {"tag": tag})]


def age_days(key: MasterKey | None, today: datetime.date) -> int | None:
    """Days since the master key was set; None if this host does not know."""
    return (today - datetime.date.fromisoformat(key.since[:10])).days if key else None
