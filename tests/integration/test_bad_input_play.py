# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What only a real ansible-playbook shows: options misspelt beside a PIN at -vvv, YAML's numbers, hosts with nothing installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible_collections.hsm.tde.tests.integration import support
from ansible_collections.hsm.tde.tests.integration.refusals import clear

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="modules act as root")]

#: Each where it must not be seen: a short PIN, a passphrase, and what stands under a name or in a shape that no option has.
SECRETS = {
    "pin": "q7x9",
    "passphrase": "marker of a passphrase",
    "typo": "marker-beside",
    "inner": "marker-inside",
    "shape": "marker-shaped",
}
#: Covered with an empty file system: the environment of the role prerequisites, SoftHSM, PostgreSQL.
INSTALLED = ("/opt", "/usr/lib/softhsm", "/usr/lib/postgresql")


class Play:
    """Playbooks run on this host, and what their tasks answered.

    :ivar output: all that ansible-playbook said.
    """

    def __init__(
        self,
        home: Path,
        *playbooks: str | list[dict[str, t.Any]],
        flags: t.Sequence[str] = (),
        bare: bool = False,
        **variables: t.Any,
    ):
        written = []
        for number, one in enumerate(playbooks):
            if isinstance(one, str):
                written.append(str(support.ROOT / "playbooks" / one))
                continue
            path = home / f"play{number}.yml"
            path.write_text(yaml.safe_dump(one, sort_keys=False))
            written.append(str(path))
        (home / "variables.json").write_text(
            json.dumps({"ansible_python_interpreter": sys.executable, "secrets": SECRETS, **variables})
        )
        argv = [
            str(Path(sys.executable).parent / "ansible-playbook"),
            "-i",
            "localhost,",
            "-c",
            "local",
            "-e",
            f"@{home}/variables.json",
        ]
        if bare:
            mounts = " && ".join(f"mount -t tmpfs none {path}" for path in INSTALLED if os.path.isdir(path))
            argv = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", *argv]
        done = subprocess.run(
            [*argv, *flags, *written], cwd=support.ROOT, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(support.ROOT / ".collections"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_GATHERING": "explicit"},
        )  # fmt: skip
        self.output = done.stdout + done.stderr
        self.code = done.returncode
        found = re.search(r"failed=(\d+) ", self.output)
        assert found, self.output[-3000:]
        self.failed = int(found[1])


def play_of(home: Path, tasks: t.Mapping[str, tuple[str, dict[str, t.Any]]]) -> list[dict[str, t.Any]]:
    """A play that runs each task whatever comes of it, and keeps the answers in ``results.json``."""
    steps: list[dict[str, t.Any]] = [
        {"name": name, f"hsm.tde.{module}": options, "register": f"result_{number}", "ignore_errors": True}
        for number, (name, (module, options)) in enumerate(tasks.items())
    ]
    answers = "{" + ", ".join(f"'{name}': result_{number}" for number, name in enumerate(tasks)) + "}"
    kept = {"content": "{{ " + answers + " | to_json }}", "dest": f"{home}/results.json", "mode": "0600"}
    steps.append({"name": "Keep", "ansible.builtin.copy": kept, "check_mode": False, "diff": False})
    return [{"name": "Bad input", "hosts": "localhost", "gather_facts": False, "tasks": steps}]


def answers(home: Path) -> dict[str, t.Any]:
    return t.cast("dict[str, t.Any]", json.loads((home / "results.json").read_text()))


def tasks_of(home: Path) -> dict[str, dict[str, t.Any]]:
    """Each module with the options that it asks for, a PIN among them."""
    token = {
        "library": "/usr/lib/softhsm/libsofthsm2.so",
        "token_label": "demo",
        "pin": "{{ secrets.pin }}",
        "state_directory": f"{home}/state",
    }
    passphrase = [{"name": "recovery", "protection": "passphrase", "passphrase": "{{ secrets.passphrase }}"}]
    kmip = {
        "kmip_servers": ["localhost:1"],
        "kmip_ca": f"{home}/ca",
        "kmip_certificate": f"{home}/certificate",
        "kmip_certificate_key": f"{home}/key",
        "state_directory": f"{home}/state",
    }
    database = {**token, "engine": "postgresql", "cluster": "main", "postgresql": {"mount_point": f"{home}/mnt"}}
    return {
        "pkcs11_token": {**token, "so_pin": "{{ secrets.pin }}"},
        "pkcs11_token_info": token,
        "pkcs11_pin": {**token, "new_pin": "{{ secrets.pin }}"},
        "pkcs11_key": {**token, "keys": [{"label": "data", "value": "{{ secrets.passphrase }}"}]},
        "pkcs11_key_info": token,
        "wrapped_secret": {**token, "path": f"{home}/secret", "secret": "{{ secrets.passphrase }}", "keyslots": passphrase},
        "tde_keystore": {**database, "keyslots": passphrase},
        "tde_master_key": database,
        "tde_tablespace": {**database, "tablespaces": [{"name": "sealed"}], "passphrase": "{{ secrets.passphrase }}"},
        "tde_info": {**database, "login_password": "{{ secrets.passphrase }}"},
        "tde_proof": {**database, "tablespaces": ["sealed"]},
        "tde_command": {"path": f"{home}/hsm-tde", "units": "never", "state_directory": f"{home}/state"},
        "cryptocard_info": {},
        "kmip_key": {**kmip, "keys": [{"name": "data"}]},
        "kmip_key_info": kmip,
        "opencryptoki_config": {"slots": []},
        "opencryptoki_daemon": {},
        "opencryptoki_info": {},
        "opencryptoki_migrate": {"slot": 0, "so_pin": "{{ secrets.pin }}", "pin": "{{ secrets.passphrase }}"},
        "opencryptoki_token_copy": {"slot": 0, "state": "requested"},
        "nshield_info": {},
        "nshield_client": {},
        "nshield_softcard": {"name": "card", "passphrase": "{{ secrets.passphrase }}"},
        "nshield_cardset": {"name": "cards", "passphrase": "{{ secrets.passphrase }}"},
        "nshield_key_protection": {"protection": "softcard", "token": "card", "passphrase": "{{ secrets.passphrase }}"},
    }


def test_an_option_misspelt_beside_a_pin_shows_no_secret(tmp_path: Path) -> None:
    """Every module, and every shape of a secret in the wrong place, without Ansible in between."""
    given = json.loads(re.sub(r"{{ secrets\.(\w+) }}", lambda found: SECRETS[found[1]], json.dumps(tasks_of(tmp_path))))
    assert set(given) == {path.stem for path in (support.ROOT / "plugins/modules").glob("*.py")}
    for module, options in given.items():
        result = support.run_module(module, {**options, "pinn": SECRETS["typo"]})
        clear(result, "invalid_option", "options", "pinn", "ansible-doc", secrets=SECRETS.values())
    for module, options in (
        ("pkcs11_key", {"keys": SECRETS["shape"]}),
        ("tde_keystore", {"postgresql": SECRETS["shape"]}),
        ("pkcs11_key_info", {"slot_id": SECRETS["shape"]}),
        ("tde_keystore", {"force": SECRETS["shape"]}),
        ("tde_keystore", {"state": SECRETS["shape"]}),
    ):
        clear(support.run_module(module, {**given[module], **options}), "invalid_option", "options", secrets=SECRETS.values())
    wrong = support.run_module("tde_keystore", {**given["tde_keystore"], "pin": {"value": SECRETS["shape"]}})
    clear(wrong, "secret_not_text", "option pin", secrets=SECRETS.values())
    assert list(tmp_path.iterdir()) == []


def test_options_misspelt_beside_a_pin_show_no_secret_at_vvv(tmp_path: Path) -> None:
    """Core drops what it knows of secrets when an option is misspelt, and prints the PIN."""
    own = tasks_of(tmp_path)
    inner = {"pin": "{{ secrets.pin }}", "pas": "{{ secrets.inner }}"}
    tasks = {
        "beside it": ("pkcs11_token", {**own["pkcs11_token"], "pinn": "{{ secrets.typo }}"}),
        "inside a list": ("tde_keystore", {**own["tde_keystore"], "keyslots": [inner]}),
    }
    play = Play(tmp_path, play_of(tmp_path, tasks), flags=["-vvv"])
    results = answers(tmp_path)
    for name, (module, _options) in tasks.items():
        clear(results[name], "invalid_option", "options", f"ansible-doc hsm.tde.{module}", secrets=SECRETS.values())
    assert "pinn" in results["beside it"]["msg"]
    assert "keyslots.pas" in results["inside a list"]["msg"]
    assert "module_args" in play.output
    assert [name for name, value in SECRETS.items() if value in play.output] == []
    assert not (tmp_path / "state").exists()


def test_a_pin_that_yaml_read_as_a_number_is_refused_by_modules_and_roles(tmp_path: Path) -> None:
    """01234567 is octal to YAML: 342391, which the token would count as a wrong try."""
    (tmp_path / "numbers.yml").write_text("hsm_tde_pin: 01234567\n")
    steps = {
        "module": {"hsm.tde.pkcs11_key_info": {**tasks_of(tmp_path)["pkcs11_key_info"], "pin": "{{ hsm_tde_pin }}"}},
        "init_token": {"ansible.builtin.include_role": {"name": "hsm.tde.init_token"}},
        "configure_tde": {"ansible.builtin.include_role": {"name": "hsm.tde.configure_tde"}},
    }
    again = [{"name": "It failed", "ansible.builtin.debug": {"msg": "It failed"}}]
    tasks = [{"name": name, "block": [{"name": name, **step}], "rescue": again} for name, step in steps.items()]
    play = [
        {
            "name": "Bad input",
            "hosts": "localhost",
            "gather_facts": False,
            "vars_files": [f"{tmp_path}/numbers.yml"],
            "tasks": tasks,
        }
    ]
    given = {
        "hsm_tde_library": "/usr/lib/softhsm/libsofthsm2.so", "hsm_tde_token_label": "demo", "hsm_tde_state_directory": f"{tmp_path}/state",
        "hsm_tde_cluster": "main", "hsm_tde_so_pin": "marker-of-so", "hsm_tde_postgresql": {"mount_point": f"{tmp_path}/mnt"},
    }  # fmt: skip
    output = Play(tmp_path, play, flags=["-vvv"], **given).output
    assert len(re.findall(r"rescued=3", output)) == 1, output[-3000:]
    assert len(re.findall(r"error_code\W+secret_not_text", output)) == 3
    # The message's own example is the number that was typed here; what YAML made of it is nowhere.
    assert "342391" not in output
    assert "marker-of-so" not in output
    assert not (tmp_path / "state").exists()


def test_the_role_that_makes_a_token_takes_the_number_of_its_slot(tmp_path: Path, empty_softhsm: support.SoftHsm) -> None:
    given = {
        "hsm_tde_library": empty_softhsm.library, "hsm_tde_library_environment": empty_softhsm.environment, "hsm_tde_token_label": "one",
        "hsm_tde_state_directory": f"{tmp_path}/state", "hsm_tde_pin": SECRETS["pin"], "hsm_tde_so_pin": SECRETS["pin"],
        "hsm_tde_hosts": "localhost",
    }  # fmt: skip
    flags = ["--skip-tags", "prerequisites"]
    elsewhere = Play(tmp_path, "init_token.yml", flags=flags, hsm_tde_slot_id=4711, **given)
    assert elsewhere.code != 0
    assert "token_slot_absent" in elsewhere.output, elsewhere.output[-3000:]
    assert not list(empty_softhsm.tokendir.iterdir())
    assert Play(tmp_path, "init_token.yml", flags=flags, hsm_tde_slot_id=0, **given).code == 0
    assert len(list(empty_softhsm.tokendir.iterdir())) == 1
    # The token has another slot by now, which its label finds.
    again = Play(tmp_path, "init_token.yml", flags=flags, **given)
    assert (again.code, "changed=0" in again.output) == (0, True), again.output[-3000:]


@pytest.fixture
def empty_python(tmp_path: Path) -> str:
    """An interpreter without any library."""
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", tmp_path / "empty"], check=True, timeout=60)
    return str(tmp_path / "empty/bin/python")


def test_check_mode_on_a_host_where_nothing_is_installed(tmp_path: Path, empty_python: str) -> None:
    """The roles, and the modules that no role uses."""
    own = tasks_of(tmp_path)
    rest = {module: (module, own[module]) for module in ("pkcs11_pin", "pkcs11_key", "wrapped_secret", "tde_proof")}
    given = {
        "hsm_tde_hosts": "localhost", "hsm_tde_library": "/usr/lib/softhsm/libsofthsm2.so", "hsm_tde_token_label": "demo",
        "hsm_tde_pin": SECRETS["pin"], "hsm_tde_so_pin": SECRETS["pin"], "hsm_tde_recovery_passphrase": SECRETS["passphrase"],
        "hsm_tde_cluster": "main", "hsm_tde_state_directory": f"{tmp_path}/state", "hsm_tde_tablespaces": [{"name": "sealed"}],
        "hsm_tde_postgresql": {"storage": "image", "image": f"{tmp_path}/image", "image_size": "64M", "mount_point": f"{tmp_path}/mnt"},
        "hsm_tde_command_path": f"{tmp_path}/hsm-tde", "ansible_python_interpreter": empty_python,
    }  # fmt: skip
    flags = ["--check", "--diff", "--skip-tags", "prerequisites"]
    play = Play(tmp_path, play_of(tmp_path, rest), "site.yml", "assess.yml", flags=flags, bare=True, **given)
    assert (play.code, play.failed) == (0, 0), play.output[-3000:]
    assert "Run the role hsm.tde.prerequisites" in play.output
    for module, result in answers(tmp_path).items():
        assert (result["error_code"], result["prepared"]) == ("library_missing", False)
        assert result["changed"] is (module != "tde_proof"), module
        assert "hsm.tde.prerequisites" in json.dumps(result["warnings"])
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "play0.yml", "variables.json", "results.json"}
    assert [name for name, value in SECRETS.items() if value in play.output] == []


def test_without_check_mode_the_missing_libraries_are_named(tmp_path: Path, empty_python: str) -> None:
    Play(
        tmp_path,
        play_of(tmp_path, {"it": ("tde_keystore", tasks_of(tmp_path)["tde_keystore"])}),
        bare=True,
        ansible_python_interpreter=empty_python,
    )
    clear(answers(tmp_path)["it"], "library_missing", empty_python, "pkcs11", "hsm.tde.prerequisites", secrets=SECRETS.values())
    assert not (tmp_path / "state").exists()
