# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What may go wrong with an openCryptoki token, each its own answer, and nothing changed by it."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration.support import OpenCryptoki, opencryptoki_library, run_module

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not opencryptoki_library(), reason="needs root and openCryptoki: mount namespaces and pkcsslotd"
)

Result = t.Dict[str, t.Any]


def module(here: OpenCryptoki, state: StateDirectory, name: str, daemon: bool = True, **options: t.Any) -> Result:
    given = here.options(token_label="demo", state_directory=state.path, **options)
    return here.run(lambda: run_module(name, given), daemon=daemon)


def token(here: OpenCryptoki, state: StateDirectory, **options: t.Any) -> Result:
    return module(here, state, "pkcs11_token", **{"pin": here.pin, "so_pin": here.so_pin, **options})


def files(here: OpenCryptoki) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (here.home / "var").rglob("*") if path.is_file()}


def test_a_slot_that_is_not_there(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    failed = token(factory_opencryptoki, state, slot_id=9)
    assert failed["error_code"] == "token_slot_absent"
    assert "no slot 9; it lists 0" in failed["msg"]
    assert "opencryptoki_info" in failed["next_step"]
    assert not state.exists() or not os.path.exists(state.registry)


def test_a_slot_without_a_token(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    here = factory_opencryptoki
    config = here.home / "etc/opencryptoki.conf"
    config.write_text(config.read_text() + "slot 2\n{\nstdll = libpkcs11_cca.so\ntokname = ccatok\n}\n")
    new = here.run(lambda: load(here.library_access()).version) >= (3, 23)
    failed = token(here, state, slot_id=2)
    # 3.8 does not list such a slot, newer versions list it empty.
    assert failed["error_code"] == ("token_slot_empty" if new else "token_slot_absent")
    assert module(here, state, "pkcs11_key_info", slot_id=2, pin=here.pin)["error_code"] == failed["error_code"]
    info = here.run(lambda: run_module("opencryptoki_info", {}))
    assert [slot["reason"] for slot in info["slots"]] == ["", "libpkcs11_cca.so finds no token"]


@pytest.mark.parametrize("what", ["pin", "so_pin"])
def test_a_pin_of_nine_characters(factory_opencryptoki: OpenCryptoki, state: StateDirectory, what: str) -> None:
    here = factory_opencryptoki
    here.run(lambda: load(here.library_access()).slots())
    before = files(here)
    failed = token(here, state, **{what: "123456789"})
    assert failed["error_code"] == "pin_length"
    assert "4 to 8 bytes" in failed["msg"]
    assert "123456789" not in str(failed)
    assert files(here) == before
    assert token(here, state)["changed"], "the token is still to be had"


def test_a_new_pin_of_nine_characters(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    before = files(opencryptoki)
    failed = module(opencryptoki, state, "pkcs11_pin", pin=opencryptoki.pin, new_pin="123456789")
    assert failed["error_code"] == "pin_length"
    assert files(opencryptoki) == before


def test_locked_and_unlocked(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    here = opencryptoki
    codes = [token(here, state, pin=f"wrong-{number}", allow_low_pin_count=True)["error_code"] for number in range(3)]
    assert codes == ["pin_refused"] * 3
    before = files(here)
    assert token(here, state)["error_code"] == "pin_locked"
    assert module(here, state, "pkcs11_pin", pin=here.pin, new_pin="newpin-1")["error_code"] == "pin_locked"
    assert module(here, state, "pkcs11_key_info", pin=here.pin)["error_code"] == "pin_locked"
    assert files(here) == before, "no try was spent on a locked PIN"
    assert token(here, state, unlock_user_pin=True)["changed"]
    assert module(here, state, "pkcs11_key_info", pin=here.pin).get("failed") is None


def test_a_user_pin_from_the_factory_is_told(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    """Its flags tell nothing of a user PIN that somebody set to the one everybody knows (3.8 and 3.23)."""
    here = opencryptoki

    def set_it() -> None:
        token = load(here.library_access()).raw.get_token(token_label="demo")
        with token.open(rw=True, so_pin=here.so_pin) as session:
            session.init_pin(here.factory_pin)

    here.run(set_it)
    assert "from the factory" in str(token(here, state, pin=here.factory_pin)["warnings"])
    changed = module(here, state, "pkcs11_pin", pin=here.factory_pin, new_pin=here.pin)
    assert changed["changed"]
    assert "warnings" not in token(here, state)


def test_the_pin_changes_at_rest_too_while_a_program_is_logged_in(
    opencryptoki: OpenCryptoki, state: StateDirectory, tmp_path: Path
) -> None:
    here = opencryptoki
    path = tmp_path / "pin"
    path.write_text(here.pin + "\n")
    path.chmod(0o600)

    def act() -> list[t.Any]:
        import pkcs11

        with open_session(here.access(), state, rw=True) as session:
            key = session.raw.generate_key(pkcs11.KeyType.AES, 256, store=True, label="k")
            options = here.options(token_label="demo", new_pin="newpin-1", pin_file=str(path), state_directory=state.path)
            changed = run_module("pkcs11_pin", options)
            sealed = key.encrypt(b"x" * 16, mechanism=pkcs11.Mechanism.AES_CBC_PAD, mechanism_param=bytes(16))
            return [changed["changed"], len(sealed)]

    assert here.run(act) == [True, 32]
    assert path.read_text() == "newpin-1\n"

    def opens() -> bool:
        with open_session(here.access(pin=Secret("newpin-1").reveal().decode()), state):
            return True

    assert here.run(opens)


def test_the_daemon_is_down(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    before = files(opencryptoki)
    for name, options in (
        ("pkcs11_token", {"so_pin": opencryptoki.so_pin}),
        ("pkcs11_pin", {"new_pin": "newpin-1"}),
        ("pkcs11_key_info", {}),
        ("pkcs11_token_info", {}),
    ):
        given = options if name == "pkcs11_token_info" else {"pin": opencryptoki.pin, **options}
        failed = module(opencryptoki, state, name, daemon=False, **given)
        assert failed["error_code"] == "opencryptoki_daemon_down", name
    assert files(opencryptoki) == before
