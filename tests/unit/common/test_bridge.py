"""What the bridge shows of a play's options: never a secret, whatever is wrong with the options."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import mask, not_text
from hypothesis import given
from hypothesis import strategies as st

SPEC = {
    "library": {"type": "path"},
    "pin": {"type": "str", "no_log": True, "aliases": ["user_pin"]},
    "slot_id": {"type": "int"},
    "keyslots": {
        "type": "list",
        "elements": "dict",
        "options": {"name": {"type": "str"}, "passphrase": {"type": "str", "no_log": True}},
    },
}


def test_secrets_go_by_field_and_facts_stay():
    shown = mask(SPEC, {"pin": "1234", "slot_id": 1234, "library": "/l1234.so", "_ansible_verbosity": 3})
    assert shown == {"pin": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER", "slot_id": 1234, "library": "/l1234.so"}


def test_an_alias_is_as_secret_as_its_option():
    assert "77" not in json.dumps(mask(SPEC, {"user_pin": "7777"}))


def test_a_misspelt_option_is_not_shown():
    shown = mask(SPEC, {"pni": "geheim", "keyslots": [{"name": "a", "pasphrase": "geheim"}]})
    assert "geheim" not in json.dumps(shown)
    assert shown["keyslots"][0]["name"] == "a"


def test_what_is_no_choice_is_not_shown():
    """Somebody typed the passphrase into the wrong field."""
    spec = {"protection": {"type": "str", "choices": ["token", "passphrase"]}}
    assert mask(spec, {"protection": "token"}) == {"protection": "token"}
    assert "geheim" not in json.dumps(mask(spec, {"protection": "geheim"}))


@pytest.mark.parametrize("kind", ["int", "float", "bool", "dict"])
def test_a_text_where_something_else_belongs_is_not_shown(kind):
    spec = {"option": {"type": kind}}
    assert "geheim" not in json.dumps(mask(spec, {"option": "geheim"}))
    for value in {"int": [5, "5"], "float": [0.5, "0.5"], "bool": [True, "yes"], "dict": [{"a": 1}]}[kind]:
        assert mask(spec, {"option": value}) == {"option": value}


def test_a_uri_that_carries_a_pin_is_not_shown():
    assert "8642" not in json.dumps(mask(SPEC, {"library": "pkcs11:token=demo?Pin-Value=8642"}))


secret = st.text(alphabet="QZ7", min_size=6, max_size=12)


@given(secret, st.sampled_from(["pin", "user_pin", "unknown", "keyslots"]), st.booleans())
def test_no_shape_of_options_shows_a_secret(value, name, nested):
    given_value = [{"passphrase": value, "other": {"deep": [value]}}] if nested else value
    assert value not in json.dumps(mask(SPEC, {name: given_value}))


def test_a_secret_that_yaml_read_as_a_number_is_found_by_its_path():
    assert not_text(SPEC, {"pin": 1234}) == "pin"
    assert not_text(SPEC, {"keyslots": [{"passphrase": "a"}, {"passphrase": 1}]}) == "keyslots[1].passphrase"
    assert not_text(SPEC, {"pin": "1234", "slot_id": 3}) is None


#: A module that tells whether its process could be dumped (prctl(2), PR_GET_DUMPABLE is 3).
DUMPS = """
import ctypes, resource
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import run_module
run_module(lambda module: {"dumps": [*resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)]}, {})
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: modules run as root")
def test_a_crash_of_a_vendors_library_leaves_no_core_dump_with_the_pin():
    given_args = json.dumps({"ANSIBLE_MODULE_ARGS": {"_ansible_remote_tmp": "/tmp"}})
    shell = ["prlimit", "--core=unlimited", sys.executable, "-c", DUMPS]
    done = subprocess.run(shell, input=given_args, capture_output=True, text=True, check=True, env={**os.environ})
    assert json.loads(done.stdout)["dumps"] == [0, 0, 0]
