# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""openCryptoki configured, asked, started and stopped, each on a private instance of the real one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_api as api
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_conf as conf
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_rules as rules
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import opencryptoki as base
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.tests.integration.support import OpenCryptoki, opencryptoki_library, run_module

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not opencryptoki_library(), reason="needs root and openCryptoki: mount namespaces and pkcsslotd"
)

SW = "libpkcs11_sw.so"
Result = t.Dict[str, t.Any]


@pytest.fixture(scope="module")
def version() -> rules.Version:
    answer = api.try_sound(api.library_path())
    assert answer is not None
    assert answer.version
    return answer.version


def module(name: str, home: StateDirectory, check: bool = False, diff: bool = False, **options: t.Any) -> Result:
    if name != "opencryptoki_info":
        options["state_directory"] = home.path
    return run_module(name, options, check=check, diff=diff)


def configured(here: OpenCryptoki, state: StateDirectory, check: bool = False, diff: bool = False, **options: t.Any) -> Result:
    """The module opencryptoki_config in the private instance, whose daemon runs."""
    return here.run(lambda: module("opencryptoki_config", state, check, diff, **options))


def main_file(here: OpenCryptoki) -> Path:
    return here.home / "etc" / "opencryptoki.conf"


# --- the rules against the daemon itself


def _text(*lines: str, opening: str = "slot 3\n{\n") -> str:
    return "version opencryptoki-3.x\n" + opening + "".join(f"{line}\n" for line in lines) + "}\n"


_VARIANTS = {
    "plain": _text(f"stdll = {SW}"),
    "comment_within": _text(f"stdll = {SW}", "# a comment", "tokname = a"),
    "comment_behind": _text(f"stdll = {SW} # behind", "tokname = a"),
    "empty_line_within": _text(f"stdll = {SW}", "", "tokname = a"),
    "comment_behind_the_brace": _text(f"stdll = {SW}", opening="slot 3\n{ # mine\n"),
    "brace_on_the_line": _text(f"stdll = {SW}", opening="slot 3 {\n"),
    "brace_without_a_blank": _text(f"stdll = {SW}", opening="slot 3{\n"),
    "brace_after_an_empty_line": _text(f"stdll = {SW}", opening="slot 3\n\n{\n"),
    "comment_before_the_brace": _text(f"stdll = {SW}", opening="slot 3 # mine\n{\n"),
    "words_quoted": _text(f"stdll = {SW}", 'description = "two words"'),
    "words_unquoted": _text(f"stdll = {SW}", "description = two words"),
    "a_number": _text(f"stdll = {SW}", "description = 17"),
    "odd_signs": _text(f"stdll = {SW}", "description = a$b"),
    "no_blanks": _text(f"stdll={SW}", "tokname=a"),
    "indented": _text(f"\tstdll = {SW}", "   tokname = a"),
    "version_quoted": _text(f"stdll = {SW}", 'hwversion = "2.32"'),
    "version_unquoted": _text(f"stdll = {SW}", "hwversion = 2.32"),
    "one_line": f"version x\nslot 3 {{ stdll = {SW} }}\n",
    "no_version_line": f"slot 3\n{{\nstdll = {SW}\n}}\n",
    "no_line_end": f"version x\nslot 3\n{{\nstdll = {SW}\n}}",
    "two_slots_on_lines": _text(f"stdll = {SW}") + f"slot 5\n{{\nstdll = {SW}\ntokname = b\n}}\n",
    "two_slots_together": _text(f"stdll = {SW}")[:-1] + f" slot 5\n{{\nstdll = {SW}\ntokname = b\n}}\n",
    "carriage_returns": _text(f"stdll = {SW}", "tokname = a").replace("\n", "\r\n"),
    "no_end": _text(f"stdll = {SW}")[:-2],
    "quote_without_end": _text(f"stdll = {SW}", 'description = "no end'),
    "empty_value": _text(f"stdll = {SW}", 'description = ""'),
    "no_stdll": _text("description = nothing"),
    "unknown_at_the_top": "colour\n" + _text(f"stdll = {SW}"),
    "event_support": "disable-event-support\n" + _text(f"stdll = {SW}"),
    "statistics": "statistics (on,implicit)\n" + _text(f"stdll = {SW}"),
    "statistics_with_blanks": "statistics\n(on, # yes\n internal)\n" + _text(f"stdll = {SW}"),
    "a_comment_with_braces": "# slot 9 {\n" + _text(f"stdll = {SW}") + "# }\n",
}


@pytest.mark.parametrize("name", sorted(_VARIANTS))
def test_the_rules_say_what_the_daemon_does(name: str, version: rules.Version) -> None:
    text = _VARIANTS[name]
    answer = api.try_out(api.library_path(), {"opencryptoki.conf": text.encode()}, {"swtok": base.GROUP, "a": base.GROUP})
    assert answer is not None
    problems = rules.problems(text, version)
    if problems:
        meant: dict[int, str] = {}
        with contextlib.suppress(conf.ConfSyntaxError):
            meant = {number: keys.get("description") or "Linux" for number, keys in conf.slots(text).items()}
        shown = {number: slot.description for number, slot in answer.slots.items()}
        assert not meant or shown != meant, f"{problems} and the daemon takes it"
    else:
        wished = {number: keys.get("description") or "Linux" for number, keys in conf.slots(text).items()}
        assert {number: slot.description for number, slot in answer.slots.items()} == wished, answer


def test_the_packages_own_file_is_taken_and_stays(version: rules.Version) -> None:
    raw = Path(api.CONF).read_bytes()
    assert rules.problems(conf.decode(raw), version) == []
    text = conf.decode(raw)
    assert conf.slots(text)[3]["stdll"] == SW
    assert conf.encode(conf.set_slot(text, 3, {"stdll": SW})) == raw
    for name, check in (("ep11tok.conf", rules.ep11_problems), ("ccatok.conf", rules.cca_problems)):
        path = Path(api.CONF_DIR, name)
        if path.exists():
            assert check(conf.decode(path.read_bytes()), version) == []


# --- opencryptoki_config


def test_a_slot_is_added_tried_out_and_listed_after_a_restart(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    here = factory_opencryptoki
    before = main_file(here).read_bytes().replace(b"slot 0", b"# the first\nslot 0")
    main_file(here).write_bytes(before)
    time.sleep(0.02)
    wish = {"slots": [{"number": 5, "stdll": SW, "tokname": "payroll", "description": "The payroll's"}], "backup": True}

    def act() -> dict[str, t.Any]:
        pids = base.daemons()
        foreseen = module("opencryptoki_config", state, check=True, diff=True, **wish)
        unchanged = main_file(here).read_bytes()
        done = module("opencryptoki_config", state, diff=True, **wish)
        again = module("opencryptoki_config", state, **wish)
        listed = [slot["number"] for slot in module("opencryptoki_info", state)["slots"] if slot["listed"]]
        return {
            "foreseen": foreseen,
            "unchanged": unchanged,
            "done": done,
            "again": again,
            "listed": listed,
            "same_daemon": pids == base.daemons(),
            "required": module("opencryptoki_info", state)["daemon"]["restart_required"],
        }

    seen = here.run(act)
    assert seen["foreseen"]["plan"] == [
        {"action": "write_file", "object": api.CONF, "why": "slot 5 is not there"},
    ]
    assert seen["unchanged"] == before, "check mode changes nothing"
    done = seen["done"]
    assert done["changed"]
    assert done["tried_out"]
    assert [slot["number"] for slot in done["slots"]] == [0, 5]
    assert done["slots"][1]["description"] == "The payroll's"
    assert done["restart_required"]
    assert done["diff"][0]["after"].startswith(before.decode())
    assert main_file(here).read_bytes() == done["diff"][0]["after"].encode()
    copy = here.home / "etc" / os.path.basename(done["backup_files"][0])
    assert copy.read_bytes() == before
    assert not seen["again"]["changed"]
    assert seen["again"]["restart_required"], "still, until the daemon is started anew"
    assert seen["listed"] == [0], "the host's daemon was not disturbed"
    assert seen["same_daemon"]
    assert seen["required"]
    slots = here.run(lambda: module("opencryptoki_info", state)["slots"])
    assert [slot["number"] for slot in slots if slot["listed"]] == [0, 5]


def test_slots_change_and_go(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    here = factory_opencryptoki
    two = [{"number": 0, "description": "First"}, {"number": 7, "stdll": SW, "tokname": "second", "hwversion": "2.32"}]
    configured(here, state, slots=two)
    changed = configured(here, state, slots=[{"number": 0, "description": "", "manufacturer": "Some One"}])
    assert changed["plan"][0]["why"] == "slot 0 differs in description, manufacturer"
    assert 'manufacturer = "Some One"' in main_file(here).read_text()
    gone = configured(here, state, slots=[{"number": 0}], exclusive=True)
    assert gone["plan"][0]["why"] == "slot 7 is not wished"
    assert list(conf.slots(main_file(here).read_text())) == [0]
    assert configured(here, state, slots=[{"number": 9, "state": "absent"}])["changed"] is False


def test_the_packages_token_folders_are_opened_to_their_users(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    """Debian's are root's with mode 0755: the server's user then logs in, and cannot make a key (CKR_FUNCTION_FAILED)."""
    here = factory_opencryptoki
    places = [here.home / "var/swtok", here.home / "var/swtok/TOK_OBJ"]
    for place in places:
        os.chown(place, 0, 0)
        place.chmod(0o755)
    wish = {"slots": [{"number": 0, "stdll": SW}]}
    foreseen = configured(here, state, check=True, diff=True, **wish)
    assert [(step["action"], step["object"]) for step in foreseen["plan"]] == [
        ("open_folder", "/var/lib/opencryptoki/swtok"), ("open_folder", "/var/lib/opencryptoki/swtok/TOK_OBJ"),
    ]  # fmt: skip
    assert foreseen["diff"][1]["before"] == "root 0755\n"
    assert foreseen["diff"][1]["after"] == "pkcs11 0770\n"
    assert places[0].stat().st_gid == 0, "check mode changes nothing"
    done = configured(here, state, **wish)
    assert done["changed"]
    assert not done["restart_required"]
    assert [(place.group(), place.stat().st_mode & 0o7777) for place in places] == [("pkcs11", 0o770)] * 2
    assert not configured(here, state, **wish)["changed"]
    places[1].chmod(0o755)
    assert not configured(here, state, slots=[{"number": 9, "state": "absent"}])["changed"], "a slot that was not asked for stays"


@pytest.mark.parametrize(
    ("slot", "code", "said"),
    [
        ({"number": 4, "description": "no library"}, "opencryptoki_conf_invalid", "slot 4 has no stdll"),
        ({"number": 4, "stdll": "libpkcs11_none.so"}, "opencryptoki_stdll_absent", "libpkcs11_none.so is not installed"),
        ({"number": 4, "stdll": "libpkcs11_cca.so"}, "opencryptoki_slot_without_token", "libpkcs11_cca.so finds no token"),
        ({"number": 0, "stdll": "libpkcs11_cca.so"}, "opencryptoki_slot_without_token", "finds no token"),
        ({"number": 4, "stdll": SW}, "opencryptoki_conf_invalid", "the same token folder"),
        ({"number": 1024, "stdll": SW}, "invalid_option", "slots go from 0 to 1023"),
        ({"number": 4, "stdll": SW, "tokname": "../x"}, "opencryptoki_conf_invalid", "plain name of a folder"),
        ({"number": 4, "stdll": SW, "tokname": "x", "description": 'a"b'}, "invalid_option", "no quote"),
        ({"number": 4, "stdll": SW, "tokname": "x", "description": "x" * 65}, "opencryptoki_conf_invalid", "64 bytes"),
        ({"number": 4, "stdll": SW, "tokname": "x", "tokversion": "new"}, "opencryptoki_conf_invalid", "tokversion"),
    ],
)
def test_what_is_refused_leaves_the_file_as_it_is(
    factory_opencryptoki: OpenCryptoki, state: StateDirectory, slot: dict[str, t.Any], code: str, said: str
) -> None:
    before = main_file(factory_opencryptoki).read_bytes()
    entries = sorted(path.name for path in main_file(factory_opencryptoki).parent.iterdir())
    failed = configured(factory_opencryptoki, state, slots=[slot], backup=True)
    assert failed.get("failed"), failed
    assert (failed["error_code"], said in failed["msg"]) == (code, True), failed["msg"]
    assert failed["next_step"]
    assert main_file(factory_opencryptoki).read_bytes() == before
    assert sorted(path.name for path in main_file(factory_opencryptoki).parent.iterdir()) == entries


def test_a_file_that_stops_the_daemon_is_mended(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    here = factory_opencryptoki
    main_file(here).write_text(main_file(here).read_text() + "slot 2\n{\ndescription = nothing\n}\n")
    refused = here.run(lambda: module("opencryptoki_config", state, slots=[{"number": 0}]), daemon=False)
    assert refused["error_code"] == "opencryptoki_conf_invalid"
    assert "slot 2 has no stdll" in refused["msg"]
    mended = here.run(lambda: module("opencryptoki_config", state, slots=[{"number": 2, "state": "absent"}]), daemon=False)
    assert mended["changed"]
    assert [slot["number"] for slot in mended["slots"]] == [0]
    assert not mended["restart_required"], "no daemon runs"


def test_a_file_whose_slot_vanishes_names_the_line(
    factory_opencryptoki: OpenCryptoki, state: StateDirectory, version: rules.Version
) -> None:
    here = factory_opencryptoki
    text = main_file(here).read_text() + f"slot 2\n{{\nstdll = {SW}\ntokname = b\ndescription = two words\n}}\n"
    main_file(here).write_text(text)
    refused = here.run(lambda: module("opencryptoki_config", state, slots=[{"number": 0}]), daemon=False)
    assert refused["error_code"] == "opencryptoki_conf_invalid"
    assert f"line {text.count(chr(10)) - 1}: " in refused["msg"]
    mended = here.run(
        lambda: module("opencryptoki_config", state, slots=[{"number": 0}, {"number": 2, "state": "absent"}]), daemon=False
    )
    assert mended["changed"]
    unended = text + 'slot 4\n{\nstdll = "x\n}\n'
    main_file(here).write_text(unended)
    refused = here.run(lambda: module("opencryptoki_config", state, slots=[{"number": 0}]), daemon=False)
    assert "quote that does not end" in refused["msg"]
    assert main_file(here).read_text() == unended


def test_files_that_somebody_else_can_write_are_not_edited(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    main_file(factory_opencryptoki).chmod(0o664)
    assert configured(factory_opencryptoki, state, slots=[{"number": 0}])["error_code"] == "file_not_private"


def test_where_no_name_space_can_be_made(
    factory_opencryptoki: OpenCryptoki, state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container without CAP_SYS_ADMIN the grammar alone decides, the version is the running library's or the package's."""
    monkeypatch.setattr(api, "try_out", lambda path, files, folders: None)
    here, wish = factory_opencryptoki, {"slots": [{"number": 5, "stdll": SW, "tokname": "payroll"}]}
    done = configured(here, state, **wish)
    assert done["changed"]
    assert not done["tried_out"]
    assert "CAP_SYS_ADMIN" in str(done["warnings"])
    refused = here.run(lambda: module("opencryptoki_config", state, slots=[{"number": 6}]), daemon=False)
    assert "slot 6 has no stdll" in refused["msg"]


def test_an_ep11_tokens_file(factory_opencryptoki: OpenCryptoki, state: StateDirectory, version: rules.Version) -> None:
    here = factory_opencryptoki
    path = here.home / "etc" / "ep11tok.conf"
    done = configured(here, state, ep11=[{"apqns": ["03.0011", "0a.0011"]}])
    assert [step["object"] for step in done["plan"]] == ["/etc/opencryptoki/ep11tok.conf"]
    assert path.read_text() == f"{rules.allowlist_word(version)}\n 0x03 0x11\n 0x0a 0x11\nEND\n"
    assert not configured(here, state, ep11=[{"apqns": ["03.0011", "0a.0011"]}])["changed"]
    assert configured(here, state, ep11=[{"apqns": ["any"]}])["changed"]
    assert path.read_text() == "APQN_ANY\n"
    assert configured(here, state, ep11=[{"apqns": ["3.1", "any"]}])["error_code"] == "invalid_option"
    assert configured(here, state, ep11=[{"apqns": ["3.0100"]}])["error_code"] == "invalid_option"
    assert configured(here, state, ep11=[{"expected_wkvp": "0123"}])["error_code"] == "invalid_option"
    assert configured(here, state, ep11=[{"file": "../passwd", "apqns": ["any"]}])["error_code"] == "invalid_option"
    pattern = configured(here, state, ep11=[{"expected_wkvp": "0x" + "0f" * 16, "modes": ["FORCE_SENSITIVE"]}])
    cca = configured(here, state, cca=[{"expected_mkvps": {"aes": "0123456789abcdef"}}])
    if version >= (3, 20):
        assert pattern["changed"]
        assert path.read_text() == f'APQN_ANY\nFORCE_SENSITIVE\nEXPECTED_WKVP "{"0f" * 16}"\n'
        assert configured(here, state, ep11=[{"expected_wkvp": "", "modes": []}])["changed"]
        assert path.read_text() == "APQN_ANY\n"
        assert cca["changed"]
        assert (
            here.home / "etc" / "ccatok.conf"
        ).read_text() == 'version cca-0\nEXPECTED_MKVPS\n{\n  AES = "0123456789abcdef"\n}\n'
    else:
        assert pattern["error_code"] == "opencryptoki_conf_invalid"
        assert "knows no FORCE_SENSITIVE" in pattern["msg"]
        assert cca["error_code"] == "opencryptoki_conf_invalid"
        assert path.read_text() == "APQN_ANY\n"


# --- opencryptoki_info


def test_everything_at_a_glance(opencryptoki: OpenCryptoki, state: StateDirectory, version: rules.Version) -> None:
    here = opencryptoki
    main_file(here).write_text(main_file(here).read_text() + "slot 2\n{\nstdll = libpkcs11_none.so\n}\n")

    def act() -> Result:
        load(here.library_access())
        return module("opencryptoki_info", state, users=["root", "nobody", "no-such-user"])

    info = here.run(act)
    assert info["version"] == "{}.{}".format(*version)
    assert info["api"]["answers"]
    assert [(slot["number"], slot["listed"], slot["label"], slot["reason"]) for slot in info["slots"]] == [
        (0, True, "demo", ""),
        (2, False, "", "libpkcs11_none.so is not installed"),
    ]
    assert info["slots"][0]["store"]["format"] == "old"
    assert info["slots"][0]["store"]["group"] == base.GROUP
    assert info["daemon"]["running"]
    assert len(info["daemon"]["pids"]) == 1
    assert [user["may_use"] for user in info["users"]] == [True, False, False]
    assert len(info["programs"]) == 1, "the test itself uses the library"


def test_the_daemon_is_down(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    info = opencryptoki.run(lambda: module("opencryptoki_info", state), daemon=False)
    assert info["api"]["error_code"] == "opencryptoki_daemon_down"
    assert info["version"], "known without the daemon"
    assert not info["daemon"]["running"]
    assert [slot["listed"] for slot in info["slots"]] == [False]
    assert info["slots"][0]["reason"] == ""

    def token() -> Result:
        options = opencryptoki.options(token_label="demo", pin=opencryptoki.pin, state_directory=state.path)
        return run_module("pkcs11_token", options)

    assert opencryptoki.run(token, daemon=False)["error_code"] == "opencryptoki_daemon_down"


# --- opencryptoki_daemon


@contextlib.contextmanager
def no_daemon_after() -> t.Iterator[None]:
    try:
        yield
    finally:
        for pid in base.daemons():
            os.kill(pid, signal.SIGKILL)


def test_one_daemon_and_never_two(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    def act() -> list[t.Any]:
        with no_daemon_after():
            foreseen = module("opencryptoki_daemon", state, check=True)
            none = base.daemons()
            started = module("opencryptoki_daemon", state, diff=True)
            first = base.daemons()
            again = module("opencryptoki_daemon", state)
            # Somebody starts a second one by hand.
            subprocess.run([api.PROGRAM], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            two = base.daemons()
            refused = module("opencryptoki_daemon", state)
            info = module("opencryptoki_info", state)["daemon"]["pids"]
            restarted = module("opencryptoki_daemon", state, state="restarted", only_if_required=True)
            one = base.daemons()
            idle = module("opencryptoki_daemon", state, state="restarted", only_if_required=True)
            answers = module("opencryptoki_info", state)["api"]["answers"]
            stopped = module("opencryptoki_daemon", state, state="stopped")
            left = [path for path in (*base.SOCKETS, "/run/pkcsslotd.pid") if os.path.exists(path)]
            return [foreseen, none, started, first, again, two, refused, info, restarted, one, idle, answers, stopped, left]

    foreseen, none, started, first, again, two, refused, info, restarted, one, idle, answers, stopped, left = opencryptoki.run(
        act, daemon=False
    )
    assert [step["action"] for step in foreseen["plan"]] == ["start_daemon"]
    assert none == []
    assert started["daemon"]["pids"] == first
    assert len(first) == 1
    assert not again["changed"]
    if len(two) == 2:
        assert refused["error_code"] == "opencryptoki_daemons"
        assert info == two
        assert [step["action"] for step in restarted["plan"]] == ["stop_daemon", "start_daemon"]
        assert set(one).isdisjoint(two)
    assert len(one) == 1
    assert answers
    assert not idle["changed"]
    assert stopped["changed"]
    assert not stopped["daemon"]["running"]
    assert left == []


def test_a_restart_waits_for_those_who_use_it(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    def act() -> list[t.Any]:
        with no_daemon_after():
            module("opencryptoki_daemon", state)
            pids = base.daemons()
            time.sleep(0.05)
            os.utime(main_file(opencryptoki))
            load(opencryptoki.library_access())
            refused = module("opencryptoki_daemon", state, state="restarted", only_if_required=True)
            same = base.daemons() == pids
            forced = module("opencryptoki_daemon", state, state="restarted", only_if_required=True, force=True)
            return [refused, same, forced, base.daemons() == pids]

    refused, same, forced, after = opencryptoki.run(act, daemon=False)
    assert refused["error_code"] == "opencryptoki_in_use"
    assert same
    assert forced["changed"]
    assert not after


def test_a_daemon_that_does_not_start_says_why(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    main_file(opencryptoki).write_text("version x\nslot 0\n{\ndescription = nothing\n}\n")
    failed = opencryptoki.run(lambda: module("opencryptoki_daemon", state), daemon=False)
    assert failed["error_code"] == "opencryptoki_daemon_failed"
