# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From options to a service, and from a server's refusals to ours."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import ERROR_CODES, TdeError
from ansible_collections.hsm.tde.plugins.module_utils.engines.record import Record, parse
from ansible_collections.hsm.tde.plugins.module_utils.kmip import errors
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import (
    KmipAccess,
    from_record,
    host_and_port,
    kmip_access,
    service_of,
)

FILES = {"kmip_ca": "/ca", "kmip_certificate": "/cert", "kmip_certificate_key": "/key"}
ACCESS = KmipAccess("kms", ("a", "b:1"), "/ca", "/cert", "/key", 3.0)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("kms.example.com", ("kms.example.com", 5696)),
        ("kms:99", ("kms", 99)),
        ("10.0.0.1:5697", ("10.0.0.1", 5697)),
        ("[2001:db8::1]", ("2001:db8::1", 5696)),
        ("[::1]:1", ("::1", 1)),
    ],
)
def test_a_server_s_host_and_port(server: str, expected: tuple[str, int]) -> None:
    assert host_and_port(server) == expected


@pytest.mark.parametrize("server", ["", "a b", "kms:0", "kms:65536", "kms:x", "2001:db8::1:5696", "https://kms", "kms/x", "[::1"])
def test_what_is_no_server(server: str) -> None:
    with pytest.raises(TdeError, match="host or host:port"):
        host_and_port(server)


def test_a_task_that_names_nothing_means_what_the_record_says() -> None:
    assert kmip_access({}) is None
    assert kmip_access({}, ACCESS) == ACCESS
    assert kmip_access({"kmip_servers": ["c"]}, ACCESS) == KmipAccess("kms", ("c",), "/ca", "/cert", "/key", 3.0)
    assert kmip_access({"kmip_servers": ["c"], **FILES}) == KmipAccess("kmip", ("c",), "/ca", "/cert", "/key", 10.0)
    assert service_of({"servers": ["c"], "service": "other"}, ACCESS) == KmipAccess("other", ("c",), "/ca", "/cert", "/key", 3.0)


@pytest.mark.parametrize(
    "params",
    [
        {"kmip_ca": "/ca"},
        {"kmip_servers": ["a"]},
        {"kmip_servers": ["a"], **FILES, "kmip_timeout": 0},
        {"kmip_servers": ["a"], **FILES, "kmip_timeout": 601},
        {"kmip_servers": ["a"], **FILES, "kmip_service": "../x"},
    ],
)
def test_what_is_incomplete_or_impossible(params: dict[str, t.Any]) -> None:
    with pytest.raises(TdeError) as caught:
        kmip_access(params)
    assert caught.value.code == "invalid_option"


def test_the_record_keeps_a_service() -> None:
    record = Record("main", "postgresql").with_service(ACCESS)
    again = parse(record.public(), "record")
    assert again == record
    assert (again.service("kms"), again.service(None), again.service("other")) == (ACCESS, ACCESS, None)
    two = record.with_service(KmipAccess("other", ("z",), "/ca", "/cert", "/key"))
    assert two.service(None) is None, "which of the two is not said"
    assert from_record(ACCESS.stored()) == ACCESS
    before = record.public()
    del before["kmip"]
    assert parse(before, "record").kmip == (), "a record of before"


def test_every_result_reason_has_a_code_of_its_cause() -> None:
    from kmip.core import enums

    causes = {
        "ITEM_NOT_FOUND": "absent",
        "AUTHENTICATION_NOT_SUCCESSFUL": "refused",
        "PERMISSION_DENIED": "refused",
        "OBJECT_ARCHIVED": "locked",
        "GENERAL_FAILURE": "unreachable",
        "OPERATION_NOT_SUPPORTED": "unsupported",
        "CRYPTOGRAPHIC_FAILURE": "damaged",
        "INVALID_FIELD": "client_error",
    }
    for reason in enums.ResultReason:
        error = errors.refused(reason.name, "said \x1b[31m" + "x" * 500, "create", "key 1")
        assert error.details["result_reason"] == reason.name
        assert reason.name.lower().replace("_", " ") in error.message
        assert len(error.message) < 400
        assert "\x1b" not in error.message
        assert error.next_step, ERROR_CODES[error.code]
        assert causes.get(reason.name, error.cause) == error.cause
