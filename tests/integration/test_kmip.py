# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The client of a KMIP service on a real server: what is the matter is said, each in its own words; nothing is made twice."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import socket
import ssl
import threading
import time
import typing as t
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.kmip import client as clients
from ansible_collections.hsm.tde.plugins.module_utils.kmip import kek, keys
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import KmipAccess, kmip_access, tls_context
from ansible_collections.hsm.tde.plugins.module_utils.kmip.channel import Channel
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.tests.integration.kmip import (
    Authority,
    Certificate,
    KmipServer,
    Relay,
    create_seen_by_all,
    free_port,
)

pytestmark = pytest.mark.root


def access(server: KmipServer, client: Certificate | str = "main", **more: t.Any) -> KmipAccess:
    found = kmip_access(server.options(client, **more))
    assert found
    return found


def refused(act: t.Callable[[], object]) -> TdeError:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value


def locate(one: KmipAccess) -> list[str]:
    with Client(one) as client:
        return client.locate()


# --- the life of a key


def test_a_key_lives_and_dies(kmip_server: KmipServer) -> None:
    with Client(access(kmip_server)) as client:
        uid = client.create("life", "aes", 256, ["encrypt", "decrypt"])
        made = client.attributes(uid)
        assert (made.names, made.algorithm, made.length, made.usage) == (("life",), "aes", 256, ("encrypt", "decrypt"))
        assert made.state == "pre_active"
        assert abs((made.created or 0) - time.time()) < 60
        client.activate(uid)
        assert client.locate("life", state="active") == [uid]
        assert client.locate("lif") == []
        assert refused(lambda: client.destroy(uid)).details["result_reason"] == "PERMISSION_DENIED"
        client.revoke(uid, compromised=False)
        assert client.attributes(uid).state == "deactivated"
        client.revoke(uid, compromised=True)
        assert client.attributes(uid).state == "compromised"
        client.destroy(uid)
        gone = refused(lambda: client.attributes(uid))
        assert (gone.code, gone.cause, gone.details["result_reason"]) == ("kmip_key_absent", "absent", "ITEM_NOT_FOUND")


def test_the_server_encrypts_and_refuses_another_context(kmip_server: KmipServer) -> None:
    with Client(access(kmip_server)) as client:
        uid = client.create("gcm", "aes", 256, ["encrypt", "decrypt"])
        early = refused(lambda: client.encrypt(uid, b"x" * 16, bytes(12), b""))
        assert (early.cause, early.details["result_reason"]) == ("refused", "PERMISSION_DENIED")
        client.activate(uid)
        ciphertext, tag = client.encrypt(uid, b"data key", bytes(12), b"context")
        assert client.decrypt(uid, ciphertext, bytes(12), b"context", tag) == b"data key"
        assert refused(lambda: client.decrypt(uid, ciphertext, bytes(12), b"other", tag)).details["operation"] == "decrypt"


# --- who is believed


def test_tls_is_new_and_verified(kmip_server: KmipServer) -> None:
    context = tls_context(access(kmip_server))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


def test_a_server_of_another_authority_is_refused(kmip_server: KmipServer, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "another authority")
    error = refused(lambda: locate(access(kmip_server, kmip_ca=str(other.path))))
    assert (error.code, error.cause) == ("kmip_ca_mismatch", "refused")


def test_another_host_name_is_refused(kmip_server: KmipServer) -> None:
    error = refused(lambda: locate(access(kmip_server, kmip_servers=[f"127.0.0.1:{kmip_server.port}"])))
    assert (error.code, error.cause) == ("kmip_host_name_mismatch", "refused")


def test_an_expired_server_certificate_is_refused(kmip_server: KmipServer, tmp_path: Path) -> None:
    over = kmip_server.ca.issue("server", ["localhost"], days=-1)
    second = KmipServer(tmp_path / "second", ca=kmip_server.ca, certificate=over)
    try:
        error = refused(lambda: locate(access(second)))
        assert (error.code, error.cause) == ("kmip_certificate_expired", "refused")
        # A refused certificate is no reason to go elsewhere.
        both = access(second, kmip_servers=[second.address, kmip_server.address])
        assert refused(lambda: locate(both)).code == "kmip_certificate_expired"
    finally:
        second.close()


def test_the_client_s_own_certificate(kmip_server: KmipServer, tmp_path: Path) -> None:
    over = kmip_server.ca.issue("late", days=-1)
    assert refused(lambda: locate(access(kmip_server, over))).code == "kmip_client_certificate_expired"
    for name in ("kmip test authority", "another authority"):
        stranger = Authority(tmp_path / name, name).issue("main")
        error = refused(lambda one=stranger: locate(access(kmip_server, one)))
        assert (error.code, error.cause) == ("kmip_client_certificate_refused", "refused")
    swapped = Certificate("main", kmip_server.client("main").path, stranger.key)
    assert refused(lambda: locate(access(kmip_server, swapped))).code == "kmip_client_certificate_invalid"
    # Its purpose is another: the server tells it in its answer.
    wrong = kmip_server.ca.issue("main", ["localhost"])
    error = refused(lambda: locate(access(kmip_server, wrong)))
    assert error.code in ("kmip_login_refused", "kmip_client_certificate_refused")


def test_tls_1_3_tells_a_refused_certificate_from_a_server_that_is_down(kmip_server: KmipServer, tmp_path: Path) -> None:
    """There the client has shaken hands before its certificate is judged, and its first request may cost it the alert."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(kmip_server.ca.path)
    context.load_cert_chain(kmip_server.certificate.path, kmip_server.certificate.key)
    stranger = Authority(tmp_path / "strangers", "another authority").issue("main")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, dummy = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"localhost:{listener.getsockname()[1]}"
        both = access(kmip_server, stranger, kmip_servers=[address, kmip_server.address])
        assert {refused(lambda: locate(both)).code for dummy in range(20)} == {"kmip_client_certificate_refused"}


def test_files_that_others_could_read_or_change_are_refused(kmip_server: KmipServer, tmp_path: Path) -> None:
    for option, mode in (("kmip_certificate_key", 0o640), ("kmip_ca", 0o622), ("kmip_certificate", 0o666)):
        copy = tmp_path / option
        copy.write_bytes(Path(kmip_server.options()[option]).read_bytes())
        copy.chmod(mode)
        error = refused(lambda path=str(copy), name=option: locate(access(kmip_server, **{name: path})))
        assert (error.code, error.obj) == ("file_not_private", str(copy))


# --- who answers


def test_down_and_slow_are_two_things(kmip_server: KmipServer) -> None:
    nobody = access(kmip_server, kmip_servers=[f"localhost:{free_port()}"])
    assert refused(lambda: locate(nobody)).code == "kmip_unreachable"
    kmip_server.pause()
    try:
        began = time.monotonic()
        error = refused(lambda: locate(access(kmip_server, kmip_timeout=0.5)))
        assert (error.code, error.cause) == ("kmip_timeout", "unreachable")
        assert time.monotonic() - began < 3
    finally:
        kmip_server.resume()
    assert refused(lambda: locate(access(kmip_server, kmip_servers=["no-such-host.invalid"]))).code == "kmip_unreachable"


def test_the_next_server_is_asked(kmip_server: KmipServer) -> None:
    order = [f"localhost:{free_port()}", f"localhost:{free_port()}", kmip_server.address]
    with Client(access(kmip_server, kmip_servers=order)) as client:
        client.locate()
        assert client.server == kmip_server.address


def test_a_question_whose_answer_is_lost_goes_to_the_next_server(kmip_server: KmipServer) -> None:
    relay = Relay(kmip_server.port)
    try:
        with Client(access(kmip_server, kmip_servers=[relay.address, kmip_server.address], kmip_timeout=0.5)) as client:
            client.locate()
            assert client.server == relay.address
            relay.deaf.set()
            client.locate()
            assert client.server == kmip_server.address
    finally:
        relay.close()


def test_item_not_found_does_not_fail_over(kmip_server: KmipServer) -> None:
    relay = Relay(kmip_server.port)
    try:
        with Client(access(kmip_server, kmip_servers=[relay.address, kmip_server.address])) as client:
            assert refused(lambda: client.attributes("999999")).code == "kmip_key_absent"
            assert client.server == relay.address
    finally:
        relay.close()


def test_what_is_no_kmip_server(kmip_server: KmipServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            connection, dummy = plain.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")

        threading.Thread(target=answer, daemon=True).start()
        error = refused(lambda: locate(access(kmip_server, kmip_servers=[f"localhost:{plain.getsockname()[1]}"])))
    assert error.code == "kmip_tls_failed"


# --- nothing is made twice


def test_a_change_is_sent_once_and_looked_for_when_its_answer_is_lost(kmip_server: KmipServer, state: StateDirectory) -> None:
    relay = Relay(kmip_server.port)
    try:
        one = access(kmip_server, kmip_servers=[relay.address], kmip_timeout=0.5)
        with Client(one) as client:
            client.locate()
            relay.deaf.set()
            error = refused(lambda: client.create("lost", "aes", 256, ["encrypt"]))
        assert (error.code, error.cause) == ("kmip_answer_lost", "unreachable")
        assert "not known" in error.kept
        # With a second server to look at, the key is found and nothing is made anew.
        relay.deaf.clear()
        two = dataclasses.replace(one, servers=(relay.address, kmip_server.address))
        with Client(two) as client:
            client.locate()
            relay.deaf.set()
            made = keys.create(client, keys.Spec("lost-too"), Journal(state.journal))
    finally:
        relay.close()
    with Client(access(kmip_server)) as client:
        assert [len(client.locate(name)) for name in ("lost", "lost-too")] == [1, 1]
        assert client.locate("lost-too") == [made.uid]


def _ensure(one: KmipAccess, name: str, state: str) -> str:
    journal = Journal(StateDirectory(state).journal)
    with Client(one) as client, keys.one_at_a_time(StateDirectory(state)):
        found = keys.find_one(client, name, journal) or keys.create(client, keys.Spec(name), journal)
        if found.state == "pre_active":
            client.activate(found.uid)
        return found.uid


def _racer(one: KmipAccess, name: str, state: str, barrier: t.Any, answers: t.Any) -> None:
    barrier.wait()
    try:
        answers.put(_ensure(one, name, state))
    except TdeError as exc:
        answers.put(exc.code)


@pytest.mark.parametrize("hosts", ["one host", "eight hosts"])
def test_eight_at_once_make_one(kmip_server: KmipServer, tmp_path: Path, hosts: str) -> None:
    """On one host a lock keeps them apart; eight hosts have only the server between them."""
    name = f"race on {hosts}"
    one = access(kmip_server, kmip_timeout=30)
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(8), fork.Queue()
    states = [str(tmp_path / ("state" if hosts == "one host" else f"state{number}")) for number in range(8)]
    racers = [fork.Process(target=_racer, args=(one, name, state, barrier, answers)) for state in states]
    for racer in racers:
        racer.start()
    found = [answers.get(timeout=60) for dummy in racers]
    for racer in racers:
        racer.join(10)
    with Client(one) as client:
        uids = client.locate(name)
    assert len(uids) == 1
    assert set(found) == set(uids)


def test_two_of_one_name_are_named(kmip_server: KmipServer, state: StateDirectory) -> None:
    with Client(access(kmip_server)) as client:
        uids = [client.create("twice", "aes", 256, ["encrypt"]) for dummy in range(2)]
        for uid in uids:
            client.activate(uid)
        error = refused(lambda: keys.find_one(client, "twice", Journal(state.journal)))
    assert (error.code, sorted(error.details["ids"])) == ("key_ambiguous", sorted(uids))
    assert all(re.search(rf"\b{uid}\b", error.message) for uid in uids)


def test_a_key_of_another_owner(kmip_server: KmipServer, state: StateDirectory) -> None:
    with Client(access(kmip_server, "other")) as other:
        hidden = other.create("hidden", "aes", 256, ["encrypt"])
        create_seen_by_all(other, "shown")
    with Client(access(kmip_server)) as client:
        assert client.locate("hidden") == []
        assert refused(lambda: client.attributes(hidden)).code == "kmip_permission_denied"
        error = refused(lambda: keys.find_one(client, "shown", Journal(state.journal)))
    assert (error.code, error.cause) == ("kmip_key_foreign", "refused")


# --- KEKs


@pytest.fixture
def made(kmip_server: KmipServer, state: StateDirectory) -> Iterator[tuple[Client, kek.KekRef]]:
    with Client(access(kmip_server)) as client:
        label = f"hsm-tde.{os.urandom(4).hex()}"
        yield client, create_kek(client, label, state)


def create_kek(client: Client, label: str, state: StateDirectory) -> kek.KekRef:
    return kek.create_kek(client, label, cluster="main", registry=Registry(state), journal=Journal(state.journal), state=state)


def test_a_kek_is_made_once_and_never_leaves_the_server(made: tuple[Client, kek.KekRef], state: StateDirectory) -> None:
    client, ref = made
    assert create_kek(client, ref.label, state) == ref
    assert client.attributes(ref.id).state == "active"
    assert [entry["action"] for entry in Journal(state.journal).entries()] == [
        "generate_kek",
        "create_kmip_key",
        "activate_kmip_key",
        "generate_kek",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "get", lambda self, uid: pytest.fail("the KEK was got"))
        blob = kek.wrap(client, ref, b"data key" * 8, b"context")
        assert kek.unwrap(client, blob, b"context") == b"data key" * 8
    assert blob["mechanism"] == kek.BY_SERVER


def test_before_kmip_1_4_the_kek_is_got(made: tuple[Client, kek.KekRef], kmip_server: KmipServer) -> None:
    newest, ref = made
    blob = kek.wrap(newest, ref, b"data key" * 8, b"context")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients, "VERSIONS", ((1, 2),))
        with Client(access(kmip_server)) as client:
            older = kek.wrap(client, ref, b"data key" * 8, b"context")
            assert client.version == (1, 2)
            assert refused(lambda: kek.unwrap(client, blob, b"context")).code == "kmip_unsupported"
            assert kek.unwrap(client, older, b"context") == b"data key" * 8
            assert refused(lambda: kek.unwrap(client, older, b"other")).code == "envelope_damaged"
    assert older["mechanism"] == kek.BY_US
    assert older["kek_kcv"] == blob["kek_kcv"], "both see the same key"


def test_why_a_wrapped_key_does_not_open(made: tuple[Client, kek.KekRef], state: StateDirectory) -> None:
    client, ref = made
    blob = kek.wrap(client, ref, b"data key" * 8, b"context")
    assert refused(lambda: kek.unwrap(client, blob, b"another context")).code == "envelope_damaged"
    other = create_kek(client, ref.label + ".2", state)
    # Another key under its id, as after a restore of another server.
    assert refused(lambda: kek.unwrap(client, {**blob, "kek_id": other.id}, b"context")).code == "kek_mismatch"
    client.revoke(ref.id, compromised=False)
    error = refused(lambda: kek.unwrap(client, blob, b"context"))
    assert (error.code, error.message) == ("kmip_key_state", "is deactivated")
    client.destroy(ref.id)
    assert refused(lambda: kek.unwrap(client, blob, b"context")).code == "key_unreachable"
    lost = refused(lambda: create_kek(client, ref.label, state))
    assert (lost.code, lost.kept) == ("key_unreachable", "Nothing was created in its place.")
    assert client.locate(ref.label) == []


def test_a_kek_of_somebody_else_is_not_taken(made: tuple[Client, kek.KekRef], tmp_path: Path) -> None:
    client, ref = made
    error = refused(lambda: create_kek(client, ref.label, StateDirectory(str(tmp_path / "another host"))))
    assert (error.code, error.cause) == ("key_foreign", "client_error")


def test_a_kek_that_a_killed_run_made_is_used(kmip_server: KmipServer, state: StateDirectory) -> None:
    label = f"hsm-tde.{os.urandom(4).hex()}"
    with Client(access(kmip_server)) as client:
        with pytest.MonkeyPatch.context() as patch:

            def killed(self: Client, uid: str) -> None:
                raise KeyboardInterrupt

            patch.setattr(Client, "activate", killed)
            with pytest.raises(KeyboardInterrupt):
                create_kek(client, label, state)
        ref = create_kek(client, label, state)
        assert client.locate(label) == [ref.id]
        assert client.attributes(ref.id).state == "active"


def _killed_after(one: KmipAccess, label: str, state: StateDirectory, number: int) -> bool:
    """Make a KEK in a process that is killed after the answer to its n-th request; :returns: whether it came to that one."""
    pid = os.fork()
    if pid == 0:
        call, calls = Channel.call, itertools.count(1)

        def until(self: Channel, request: bytes) -> bytes:
            answer = call(self, request)
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        Channel.call = until  # type: ignore[method-assign]
        try:
            with Client(one) as client:
                create_kek(client, label, state)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_kek_is_made_once_whatever_request_its_maker_is_killed_at(kmip_server: KmipServer, tmp_path: Path) -> None:
    one = access(kmip_server)
    for number in itertools.count(1):
        label, state = f"hsm-tde.killed.{number}", StateDirectory(str(tmp_path / str(number)))
        killed = _killed_after(one, label, state, number)
        with Client(one) as client:
            ref = create_kek(client, label, state)
            assert client.locate(label) == [ref.id]
            assert kek.unwrap(client, kek.wrap(client, ref, b"data key", b""), b"") == b"data key"
        assert [entry["id"] for entry in Registry(state).keys()] == [ref.id]  # noqa: SIM118 - no mapping
        if not killed:
            break
    assert number > 8, "there were no requests to be killed at"
