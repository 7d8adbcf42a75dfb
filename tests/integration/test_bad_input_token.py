# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""PINs, libraries and tokens that are not as a task takes them to be: each module says so, and spends and makes nothing."""

from __future__ import annotations

import os
import struct
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, SLOTS, Estate, estate, usable
from ansible_collections.hsm.tde.tests.integration.refusals import clear, unchanged
from ansible_collections.hsm.tde.tests.integration.support import Installation, OpenCryptoki, SoftHsm, run_module, run_module_file

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="modules act as root")]

#: What every task that works with the keys of a token has in common, and what it adds.
Task = t.Tuple[str, t.Dict[str, t.Any]]
TASKS: list[Task] = [
    ("pkcs11_key", {"keys": [{"label": "data"}]}),
    ("pkcs11_key_info", {}),
    ("wrapped_secret", {"path": "{home}/secret.json", "secret": "marker of a secret", "keyslots": [{"name": "primary"}]}),
    ("pkcs11_pin", {"new_pin": "another1"}),
]


def run(
    task: Task, hsm: Installation, state: StateDirectory, *, check: bool = False, prefix: t.Sequence[str] = (), **more: t.Any
) -> dict[str, t.Any]:
    """Run a task on the token ``demo``; :param prefix: a command to run the module's file under."""
    module, own = task
    own = {name: value.format(home=home(state)) if isinstance(value, str) else value for name, value in own.items()}
    options = {**hsm.options(token_label="demo", pin=hsm.pin), "state_directory": state.path, **own, **more}
    options = {name: value for name, value in options.items() if value is not None}
    return run_module_file(module, options, check=check, prefix=prefix) if prefix else run_module(module, options, check=check)


def home(state: StateDirectory) -> Path:
    """The folder above all that a test has: state directory, token and what is wrapped."""
    return Path(state.path).parent


def same(state: StateDirectory) -> t.ContextManager[None]:
    """Nothing changes there, but for what openCryptoki counts in memory."""
    return unchanged(home(state), skip=[home(state) / "opencryptoki" / name for name in ("shm", "log", "run")])


# --- PINs


def test_a_wrong_pin_is_tried_once_and_never_again_until_it_changes(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    """On a token that counts: three tries would lock it."""
    wrong = "65432109"

    def refused(code: str, task: Task, **more: t.Any) -> None:
        with same(state):
            clear(run(task, opencryptoki, state, **more), code, "token 'demo'", secrets=[wrong, opencryptoki.pin])

    def flags() -> list[str]:
        [token] = run(("pkcs11_token_info", {}), opencryptoki, state, pin=None)["tokens"]
        return t.cast("list[str]", token["flags"])

    def act() -> None:
        refused("pin_refused", TASKS[0], pin=wrong)
        for task in TASKS:
            refused("pin_refused_before", task, pin=wrong, allow_low_pin_count=True)
        refused("pin_refused_before", TASKS[0], pin=wrong, check=True)
        # The right one waits for a word, too.
        refused("pin_tries_low", TASKS[0])
        assert "user_pin_count_low" in flags()
        assert not {"user_pin_final_try", "user_pin_locked"} & set(flags())
        # Another PIN is another try; and once the token's PIN has changed to it, the one refused before is welcome.
        assert run(TASKS[1], opencryptoki, state, allow_low_pin_count=True)["pkcs11_keys"] == []
        assert run(("pkcs11_pin", {"new_pin": wrong}), opencryptoki, state)["changed"]
        assert run(TASKS[1], opencryptoki, state, pin=wrong)["pkcs11_keys"] == []

    opencryptoki.run(act)


def test_a_locked_pin_is_not_tried(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    def act() -> None:
        for number in range(3):
            result = run(TASKS[0], opencryptoki, state, pin=f"wrong-{number}", allow_low_pin_count=True)
            assert result["error_code"] == "pin_refused"
        for task in TASKS:
            with same(state):
                for check in (True, False):
                    result = run(task, opencryptoki, state, check=check, allow_low_pin_count=True)
                    clear(result, "pin_locked", "token 'demo'", "unlock_user_pin", "No try was made", secrets=[opencryptoki.pin])

    opencryptoki.run(act)


NUMBERS: list[tuple[str, dict[str, t.Any], str]] = [
    ("pkcs11_token", {"pin": 7654123}, "pin"),
    ("pkcs11_token", {"pin": "12345678", "so_pin": 6543210}, "so_pin"),
    ("pkcs11_token_info", {"pin": 7654123}, "pin"),
    ("pkcs11_pin", {"new_pin": 7654123}, "new_pin"),
    ("pkcs11_key", {"pin": 7654123, "keys": [{"label": "data"}]}, "pin"),
    ("pkcs11_key", {"keys": [{"label": "data"}, {"label": "given", "value": 7654123}]}, "keys[1].value"),
    ("pkcs11_key_info", {"pin": 7654123}, "pin"),
    ("wrapped_secret", {"path": "/nonexistent/x", "secret": 7654123}, "secret"),
    ("wrapped_secret", {"path": "/nonexistent/x", "keyslots": [{"pin": 7654123}]}, "keyslots[0].pin"),
    (
        "tde_keystore",
        {"keyslots": [{"name": "primary"}, {"protection": "passphrase", "passphrase": 7654123}]},
        "keyslots[1].passphrase",
    ),
    ("tde_keystore", {"pin": 7654123}, "pin"),
    ("tde_master_key", {"pin": 7654123}, "pin"),
    ("tde_tablespace", {"pin": 7654123, "tablespaces": []}, "pin"),
    ("tde_tablespace", {"passphrase": 7654123, "tablespaces": []}, "passphrase"),
    ("tde_info", {"login_password": 7654123}, "login_password"),
    ("tde_proof", {"pin": 7654123, "tablespaces": []}, "pin"),
]


@pytest.mark.parametrize(("module", "options", "path"), NUMBERS, ids=[f"{row[0]}-{row[2]}" for row in NUMBERS])
def test_a_secret_that_yaml_read_as_a_number_is_not_tried(
    softhsm: SoftHsm, state: StateDirectory, module: str, options: dict[str, t.Any], path: str
) -> None:
    """``pin: 035145353`` is 7654123 by the time it gets here: not what was typed, and nobody can tell any more."""
    if module.startswith("tde_"):
        options = {"engine": "postgresql", "cluster": "main", **options}
    with same(state):
        result = run((module, options), softhsm, state)
    clear(result, "secret_not_text", f"option {path}", "quotes", secrets=["7654123", "6543210", softhsm.pin])


LENGTHS = {
    "new token, user PIN": ("pkcs11_token", {"token_label": "new", "so_pin": "12345678", "pin": "123"}),
    "new token, SO PIN": ("pkcs11_token", {"token_label": "new", "so_pin": "x" * 300, "pin": "12345678"}),
    "new PIN": ("pkcs11_pin", {"new_pin": "x" * 300}),
    "login": ("pkcs11_key", {"keys": [{"label": "data"}], "pin": "123"}),
    "wrapping": ("wrapped_secret", {**TASKS[2][1], "pin": "x" * 300}),
}


@pytest.mark.parametrize("task", LENGTHS.values(), ids=[name.replace(" ", "-") for name in LENGTHS])
def test_a_pin_of_impossible_length_is_not_tried(softhsm: SoftHsm, state: StateDirectory, task: Task) -> None:
    for check in (True, False):
        with same(state):
            clear(run(task, softhsm, state, check=check), "pin_length", "token ", "4 to 255 bytes", secrets=["x" * 300])


def test_no_pin(softhsm: SoftHsm, state: StateDirectory) -> None:
    for task in (TASKS[0], TASKS[2], TASKS[3]):
        with same(state):
            clear(run(task, softhsm, state, pin=None), "pin_missing", "token 'demo'", "Give the PIN")


# --- libraries


def elf(path: Path, machine: int) -> Path:
    """The header of a shared object for 64 bits (elf(5))."""
    path.write_bytes(b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack("<HHI", 3, machine, 1) + bytes(40))
    return path


@pytest.fixture
def libraries(softhsm: SoftHsm, tmp_path: Path) -> dict[str, tuple[str, Path, str]]:
    """By kind: code, path and what the message must say."""
    unreadable = tmp_path / "unreadable.so"
    unreadable.write_bytes(Path(softhsm.library).read_bytes())
    unreadable.chmod(0)
    loose = tmp_path / "loose.so"
    loose.write_bytes(Path(softhsm.library).read_bytes())
    loose.chmod(0o666)
    text = tmp_path / "text.so"
    text.write_text("#!/bin/sh\n")
    other = 183 if os.uname().machine != "aarch64" else 62
    return {
        "missing": ("library_absent", tmp_path / "missing.so", "Install the token's software"),
        "unreadable": ("library_unreadable", unreadable, "Run it as root"),
        "architecture": ("library_wrong_architecture", elf(tmp_path / "other.so", other), "this host's architecture"),
        "replaceable": ("library_not_trusted", loose, "0666"),
        "no library": ("library_not_pkcs11", text, "option library"),
    }


@pytest.mark.parametrize("kind", ["missing", "unreadable", "architecture", "replaceable", "no library"])
def test_a_library_that_cannot_be_loaded(
    softhsm: SoftHsm, state: StateDirectory, libraries: dict[str, tuple[str, Path, str]], kind: str
) -> None:
    code, path, word = libraries[kind]
    # Root reads whatever its mode is, unless a container takes that right away.
    drop = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"] if kind == "unreadable" else []
    keystore = ("tde_keystore", {"engine": "postgresql", "cluster": "main", "postgresql": {"mount_point": f"{path.parent}/mnt"}})
    for task in (TASKS[0], TASKS[2], keystore):
        with same(state):
            clear(run(task, softhsm, state, library=str(path), prefix=prefix), code, str(path), word)


def test_a_library_whose_configuration_is_missing(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    for task in TASKS:
        with same(state):
            result = run(task, softhsm, state, library_environment={"SOFTHSM2_CONF": str(tmp_path / "missing.conf")})
            clear(result, "library_not_started", os.path.realpath(softhsm.library), "missing.conf")


# --- tokens


def test_no_token_and_two_tokens_of_the_label(softhsm: SoftHsm, state: StateDirectory) -> None:
    for task in TASKS:
        with same(state):
            clear(run(task, softhsm, state, token_label="nosuch"), "token_absent", "'nosuch'", "hsm.tde.pkcs11_token")
    softhsm.add_token("demo")
    for task in (*TASKS, ("pkcs11_token", {"so_pin": softhsm.so_pin})):
        for check in (True, False):
            with same(state):
                clear(run(task, softhsm, state, check=check), "token_ambiguous", "'demo'", "token_serial or slot_id")


def test_a_folder_of_tokens_that_is_not_mounted_leads_to_nothing_new(softhsm: SoftHsm, state: StateDirectory) -> None:
    """An empty folder of tokens looks like a host that never had one; only the registry knows better."""
    assert run(("pkcs11_token", {"so_pin": softhsm.so_pin}), softhsm, state)["changed"]
    # Remembered as a token alone, and with keys in it.
    for step in ((), (TASKS[0], TASKS[2])):
        for task in step:
            run(task, softhsm, state)
        away = softhsm.tokendir.with_name("away")
        softhsm.tokendir.rename(away)
        softhsm.tokendir.mkdir()
        for task in (("pkcs11_token", {"so_pin": softhsm.so_pin}), *TASKS):
            for check in (True, False):
                with same(state):
                    clear(run(task, softhsm, state, check=check), "token_unreachable", "'demo'", "Mount the token's folder")
        assert list(softhsm.tokendir.iterdir()) == []
        # Nor where somebody puts another token of the same name there.
        if step:
            softhsm.add_token("demo")
            for task in (("pkcs11_token", {"so_pin": softhsm.so_pin}), *TASKS):
                with same(state):
                    clear(run(task, softhsm, state), "token_unreachable", "another token with its label")
            softhsm.tokendir.rename(softhsm.tokendir.with_name("other"))
        else:
            softhsm.tokendir.rmdir()
        away.rename(softhsm.tokendir)
    assert not run(TASKS[0], softhsm, state)["changed"]


# --- keys


def test_a_key_of_the_label_with_other_attributes_is_left_as_it_is(softhsm: SoftHsm, state: StateDirectory) -> None:
    assert run(("pkcs11_key", {"keys": [{"label": "data"}]}), softhsm, state)["changed"]
    for wish in (
        {"size": 128},
        {"type": "hmac"},
        {"extractable": True, "sensitive": False},
        {"value": "MDEyMzQ1Njc4OWFiY2RlZg=="},
    ):
        items = [{"label": "before"}, {"label": "data", **wish}]
        for check in (True, False):
            with same(state):
                result = run(("pkcs11_key", {"keys": items}), softhsm, state, check=check)
                clear(result, "key_mismatch", "'data'", "regenerate")


@pytest.fixture
def fresh() -> t.Iterator[Estate]:
    """A host on which nothing was done yet."""
    if not usable():
        pytest.skip("needs PostgreSQL, SoftHSM and loop devices")
    with estate(coverage="cluster", data_directory="{home}/mnt/data", image_size="64M") as host:
        yield host


def keystore_refused(host: Estate, code: str, *names: str, **more: t.Any) -> None:
    """The whole keystore is wished for, and not one step of it is done."""
    with unchanged(host.home):
        result = run_module("tde_keystore", host.arguments(**{"keyslots": SLOTS, **more}))
    clear(result, code, *names, secrets=[host.hsm.pin, PASSPHRASE])


def test_a_new_keystore_is_refused_before_its_first_step(fresh: Estate) -> None:
    host = fresh
    keystore_refused(host, "pin_refused", "token 'demo'", pin="wrong-pin")
    keystore_refused(host, "pin_refused_before", "token 'demo'", pin="wrong-pin")
    keystore_refused(host, "pin_missing", "token 'second'", token_label="second", pin=None)
    keystore_refused(host, "pin_length", "4 to 255 bytes", token_label="second", pin="123")
    keystore_refused(host, "token_absent", "'nosuch'", token_label="nosuch")
    short = {**SLOTS[1], "passphrase": "short"}
    keystore_refused(
        host, "passphrase_length", "keyslot recovery", "12 characters", token_label="second", keyslots=[SLOTS[0], short]
    )
    missing = {"name": "recovery", "protection": "passphrase"}
    keystore_refused(host, "credential_missing", "keyslot recovery", token_label="second", keyslots=[SLOTS[0], missing])
    keystore_refused(host, "recovery_keyslot_missing", "no_recovery", token_label="second", keyslots=SLOTS[:1])


def test_a_foreign_key_under_the_master_key_s_label_is_not_used(fresh: Estate) -> None:
    host = fresh
    elsewhere = StateDirectory(str(host.home / "elsewhere"))
    assert run(("pkcs11_key", {"keys": [{"label": "hsm-tde.main"}]}), host.hsm, elsewhere)["changed"]
    keystore_refused(host, "key_foreign", "'hsm-tde.main'", "this host did not make")


def test_a_token_without_the_mechanisms_gets_no_key(fresh: Estate) -> None:
    host = fresh
    # SoftHSM lets a configuration take mechanisms away; the first name after the minus is lost on it.
    conf = host.hsm.conf.read_text()
    host.hsm.conf.write_text(conf + "slots.mechanisms = -CKM_DES_ECB,CKM_AES_GCM,CKM_AES_CBC_PAD\n")
    keystore_refused(host, "mechanism_unsupported", "token 'demo'", "AES-GCM")
    state = StateDirectory(str(host.state))
    with unchanged(host.home):
        clear(run(TASKS[2], host.hsm, state), "mechanism_unsupported", "token 'demo'", "AES-GCM")
    host.hsm.conf.write_text(conf)
    assert host.run("tde_keystore", keyslots=SLOTS)["changed"]


def test_a_mechanism_that_the_token_lacks(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    """The soft token has no elliptic curves."""

    def act() -> None:
        with same(state):
            result = run(("pkcs11_key", {"keys": [{"label": "sign", "type": "ec"}]}), opencryptoki, state)
            clear(result, "pkcs11_unsupported", "key 'sign'", "CKR_", "pkcs11_token_info")

    opencryptoki.run(act)


def test_a_token_that_is_not_finished(empty_softhsm: SoftHsm, state: StateDirectory) -> None:
    def initialise() -> None:
        library = load(empty_softhsm.library_access())
        library.init_token(library.slots()[0], Secret(empty_softhsm.so_pin), "demo")

    empty_softhsm.run(initialise)
    for task in TASKS:
        with same(state):
            clear(run(task, empty_softhsm, state), "token_not_ready", "token 'demo'", "security officer")
