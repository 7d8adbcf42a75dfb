"""Rules that hold for every module: action groups, secrets without no_log, documentation in step with the options."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest
import yaml
from ansible_collections.hsm.tde.plugins.module_utils.common.options import kmip_options, pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.engines import database_options
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import nshield_options

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py"))
GROUPS = yaml.safe_load((ROOT / "meta/runtime.yml").read_text(encoding="utf-8"))["action_groups"]

#: A secret by its name. sanity knows "password", not "pin".
SECRET = re.compile(r"(^|_)(pin|passphrase|password|secret|value|private_key|puk)$")


def spec_of(name, monkeypatch):
    module = importlib.import_module(f"ansible_collections.hsm.tde.plugins.modules.{name}")
    seen = {}

    def capture(act, argument_spec, **rules):
        seen.update(argument_spec)

    monkeypatch.setattr(module, "run_module", capture)
    module.main()
    return seen, module


def walk(spec, prefix=""):
    for name, definition in spec.items():
        yield prefix + name, name, definition
        yield from walk(definition.get("options") or {}, f"{prefix}{name}.")


def test_there_are_modules():
    assert "pkcs11_token" in MODULES
    assert "tde_keystore" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_every_secret_option_is_no_log(name, monkeypatch):
    spec, dummy = spec_of(name, monkeypatch)
    texts = [row for row in walk(spec) if row[2].get("type", "str") != "bool"]
    open_secrets = [path for path, last, definition in texts if SECRET.search(last) and definition.get("no_log") is not True]
    assert open_secrets == []


@pytest.mark.parametrize("name", MODULES)
def test_a_secret_is_text(name, monkeypatch):
    """Any other type would be converted before the bridge sees what YAML made of it."""
    spec, dummy = spec_of(name, monkeypatch)
    others = [
        path for path, dummy, definition in walk(spec) if definition.get("no_log") and definition.get("type", "str") != "str"
    ]
    assert others == []


@pytest.mark.parametrize(
    ("group", "options"),
    [("pkcs11", pkcs11_options()), ("kmip", kmip_options()), ("database", database_options()), ("nshield", nshield_options())],
)
def test_a_group_s_modules_accept_all_its_options(group, options, monkeypatch):
    for name in GROUPS[group]:
        spec, dummy = spec_of(name, monkeypatch)
        missing = sorted(option for option in options if option not in spec)
        assert missing == [], name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_takes_a_group_s_options_is_in_the_group(name, monkeypatch):
    spec, dummy = spec_of(name, monkeypatch)
    assert (name in GROUPS["pkcs11"]) == (set(pkcs11_options()) <= set(spec))
    assert (name in GROUPS["kmip"]) == (set(kmip_options()) <= set(spec))
    assert (name in GROUPS["database"]) == ("engine" in spec)
    assert (name in GROUPS["nshield"]) == (set(nshield_options()) <= set(spec))


@pytest.mark.parametrize("name", MODULES)
def test_examples_use_the_full_name_and_no_secret_in_the_clear(name, monkeypatch):
    dummy, module = spec_of(name, monkeypatch)
    tasks = yaml.safe_load(module.EXAMPLES)
    assert tasks
    text = module.EXAMPLES
    assert f"hsm.tde.{name}:" in text
    for line in text.splitlines():
        found = re.match(r"\s*(?:- )?(\w+): (.+)", line)
        if found and SECRET.search(found.group(1)) and found.group(2) not in ("true", "false"):
            assert "{{" in found.group(2), line
