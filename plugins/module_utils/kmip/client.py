# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A client of a KMIP service: requests as PyKMIP encodes them, on connections of our own.

PyKMIP 0.11's own client verifies no host name, reads its settings from files in home folders, and gives up at once or
waits for ever; of it only the messages are used here. KMIP 1.2 to 1.4 are spoken, the newest that the server offers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ..common.errors import TdeError
from ..common.secret import Secret
from .access import KmipAccess, tls_context
from .channel import FAIL_OVER, Channel
from .errors import refused

#: Versions of the protocol, the newest first.
VERSIONS = ((1, 4), (1, 3), (1, 2))

#: Attributes that are asked for (KMIP 1.4, section 3), by the field that they become. Dates are seconds since 1970, UTC.
_ATTRIBUTES = {
    "Name": "names",
    "Object Type": "type",
    "Cryptographic Algorithm": "algorithm",
    "Cryptographic Length": "length",
    "Cryptographic Usage Mask": "usage",
    "State": "state",
    "Initial Date": "created",
    "Activation Date": "activated",
    "Deactivation Date": "deactivated",
    "Compromise Date": "compromised",
    "Destroy Date": "destroyed",
    "Last Change Date": "changed",
    "Sensitive": "sensitive",
    "Extractable": "extractable",
    "Object Group": "groups",
    "Operation Policy Name": "policy",
}

T = t.TypeVar("T")


@dataclasses.dataclass(frozen=True)
class KeyFacts:
    """An object's attributes as the server tells them; None where it does not.

    :param uid: the server's unique identifier; :param type: ``symmetric_key`` …, :param algorithm: ``aes`` …
    :param length: bits; :param usage: ``encrypt``, ``decrypt`` …
    :param state: ``pre_active``, ``active``, ``deactivated``, ``compromised``, ``destroyed``, ``destroyed_compromised``.
    """

    uid: str
    names: tuple[str, ...] = ()
    type: str | None = None
    algorithm: str | None = None
    length: int | None = None
    usage: tuple[str, ...] = ()
    state: str | None = None
    created: int | None = None
    activated: int | None = None
    deactivated: int | None = None
    compromised: int | None = None
    destroyed: int | None = None
    changed: int | None = None
    sensitive: bool | None = None
    extractable: bool | None = None
    groups: tuple[str, ...] = ()
    policy: str | None = None

    @property
    def gone(self) -> bool:
        """Whether only its attributes are left."""
        return self.state in ("destroyed", "destroyed_compromised")


class Client:
    """A client of a service; connects at its first request. Use it as a context manager.

    A server that does not take a connection, or does not answer a question in time, is left for the next one. A refusal
    ends the request wherever it comes from, and what changes something is sent once only.
    """

    def __init__(self, access: KmipAccess) -> None:
        self.access = access
        self._context = tls_context(access)
        self._waiting = list(access.servers)
        self._failed: list[TdeError] = []
        self._channel: Channel | None = None
        #: The protocol's version with the present server.
        self.version = VERSIONS[0]

    def __enter__(self) -> Client:
        _require()
        return self

    def __exit__(self, *exc: object) -> None:
        self._drop()

    @property
    def server(self) -> str:
        """The server that answers."""
        return self._connected().server

    # --- questions

    def locate(self, name: str | None = None, *, state: str | None = None) -> list[str]:
        """Unique identifiers of the symmetric keys that this client sees, filtered by the server.

        :param name: exact; :param state: as in :class:`KeyFacts`.
        """
        from kmip.core import attributes, enums, objects
        from kmip.core.factories.attributes import AttributeFactory
        from kmip.core.messages import payloads

        make = AttributeFactory().create_attribute
        wanted: list[objects.Attribute] = [make(enums.AttributeType.OBJECT_TYPE, enums.ObjectType.SYMMETRIC_KEY)]
        if name is not None:
            kind = attributes.Name.NameType(enums.NameType.UNINTERPRETED_TEXT_STRING)
            wanted.append(make(enums.AttributeType.NAME, attributes.Name(attributes.Name.NameValue(name), kind)))
        if state is not None:
            wanted.append(make(enums.AttributeType.STATE, enums.State[state.upper()]))
        answer = self._ask(enums.Operation.LOCATE, payloads.LocateRequestPayload(attributes=wanted))
        return [str(uid) for uid in answer.unique_identifiers or ()]

    def attributes(self, uid: str) -> KeyFacts:
        """An object's attributes.

        :raises TdeError: ``kmip_key_absent``, ``kmip_permission_denied``.
        """
        from kmip.core import enums
        from kmip.core.messages import payloads

        asked = payloads.GetAttributesRequestPayload(unique_identifier=uid, attribute_names=list(_ATTRIBUTES))
        answer = self._ask(enums.Operation.GET_ATTRIBUTES, asked, f"key {uid}")
        fields: dict[str, t.Any] = {"names": [], "groups": []}
        for one in answer.attributes or ():
            field = _ATTRIBUTES.get(one.attribute_name.value)
            if field == "names":
                fields["names"].append(one.attribute_value.name_value.value)
            elif field == "groups":
                fields["groups"].append(one.attribute_value.value)
            elif field == "usage":
                bits = one.attribute_value.value
                fields["usage"] = tuple(use.name.lower() for use in enums.CryptographicUsageMask if bits & use.value)
            elif field:
                fields[field] = _plain(one.attribute_value.value)
        return KeyFacts(uid, **{**fields, "names": tuple(fields["names"]), "groups": tuple(fields["groups"])})

    def get(self, uid: str) -> Secret:
        """A symmetric key's value, which leaves the server with this.

        :raises TdeError: ``kmip_unsupported`` for a key that is wrapped or of another kind.
        """
        from kmip.core import enums
        from kmip.core.messages import payloads

        raw = enums.KeyFormatType.RAW
        answer = self._ask(enums.Operation.GET, payloads.GetRequestPayload(uid, key_format_type=raw), f"key {uid}")
        try:
            material = answer.secret.key_block.key_value.key_material.value
        except AttributeError:
            material = None
        if answer.object_type != enums.ObjectType.SYMMETRIC_KEY or not isinstance(material, bytes):
            raise TdeError("kmip_unsupported", "is not given out as a plain symmetric key", obj=f"key {uid}")
        return Secret(material)

    def encrypt(self, uid: str, data: bytes, iv: bytes, associated: bytes) -> tuple[bytes, bytes]:
        """AES-GCM by the server, from KMIP 1.4 on. :returns: ciphertext and tag, of 16 bytes.

        :raises TdeError: ``kmip_unsupported`` and what the server answers.
        """
        from kmip.core import enums
        from kmip.core.messages import payloads

        self._demand_gcm()
        asked = payloads.EncryptRequestPayload(uid, _gcm(), data, iv, associated)
        answer = self._ask(enums.Operation.ENCRYPT, asked, f"key {uid}")
        if answer.iv_counter_nonce not in (None, iv) or len(answer.auth_tag or b"") != 16:
            raise TdeError("kmip_unsupported", "took another IV than was given, or gave no tag of 16 bytes", obj=f"key {uid}")
        return answer.data, answer.auth_tag

    def decrypt(self, uid: str, data: bytes, iv: bytes, associated: bytes, tag: bytes) -> bytes:
        """The reverse of :meth:`encrypt`."""
        from kmip.core import enums
        from kmip.core.messages import payloads

        self._demand_gcm()
        asked = payloads.DecryptRequestPayload(uid, _gcm(), data, iv, associated, tag)
        return t.cast(bytes, self._ask(enums.Operation.DECRYPT, asked, f"key {uid}").data)

    def _demand_gcm(self) -> None:
        self._connected()
        if self.version < (1, 4):
            # Associated data and tags came with it (KMIP 1.4, sections 4.29 and 4.30).
            raise TdeError("kmip_unsupported", "does not speak KMIP 1.4", obj=f"KMIP server {self.server}")

    # --- changes

    def create(self, name: str, algorithm: str, length: int, usage: t.Iterable[str]) -> str:
        """Make a symmetric key, pre-active. :returns: its unique identifier.

        :raises TdeError: ``kmip_answer_lost``: it may have been made.
        """
        from kmip.core import attributes, enums, objects
        from kmip.core.factories.attributes import AttributeFactory
        from kmip.core.messages import payloads

        make = AttributeFactory().create_attribute
        kind = attributes.Name.NameType(enums.NameType.UNINTERPRETED_TEXT_STRING)
        template = [
            make(enums.AttributeType.CRYPTOGRAPHIC_ALGORITHM, enums.CryptographicAlgorithm[algorithm.upper()]),
            make(enums.AttributeType.CRYPTOGRAPHIC_LENGTH, length),
            make(enums.AttributeType.CRYPTOGRAPHIC_USAGE_MASK, [enums.CryptographicUsageMask[use.upper()] for use in usage]),
            make(enums.AttributeType.NAME, attributes.Name(attributes.Name.NameValue(name), kind)),
        ]
        asked = payloads.CreateRequestPayload(enums.ObjectType.SYMMETRIC_KEY, objects.TemplateAttribute(attributes=template))
        return str(self._tell(enums.Operation.CREATE, asked, f"key {name!r}").unique_identifier)

    def activate(self, uid: str) -> None:
        from kmip.core import attributes, enums
        from kmip.core.messages import payloads

        payload = payloads.ActivateRequestPayload(attributes.UniqueIdentifier(uid))
        self._tell(enums.Operation.ACTIVATE, payload, f"key {uid}")

    def revoke(self, uid: str, *, compromised: bool) -> None:
        """Deactivate a key, or declare it compromised; neither can be taken back."""
        from kmip.core import attributes, enums, objects, primitives
        from kmip.core.messages import payloads

        codes = enums.RevocationReasonCode
        reason = objects.RevocationReason(code=codes.KEY_COMPROMISE if compromised else codes.CESSATION_OF_OPERATION)
        # The time of the compromise, which the server demands with this reason (KMIP 1.4, section 4.21).
        occurred = primitives.DateTime(tag=enums.Tags.COMPROMISE_OCCURRENCE_DATE) if compromised else None
        payload = payloads.RevokeRequestPayload(attributes.UniqueIdentifier(uid), reason, occurred)
        self._tell(enums.Operation.REVOKE, payload, f"key {uid}")

    def destroy(self, uid: str) -> None:
        """Destroy a key's value for good."""
        from kmip.core import attributes, enums
        from kmip.core.messages import payloads

        payload = payloads.DestroyRequestPayload(attributes.UniqueIdentifier(uid))
        self._tell(enums.Operation.DESTROY, payload, f"key {uid}")

    # --- requests

    def _ask(self, operation: t.Any, payload: t.Any, obj: str = "") -> t.Any:
        """A question: put to the next server if one does not answer."""
        while True:
            channel = self._connected()
            try:
                return self._exchange(channel, operation, payload, obj)
            except TdeError as exc:
                if exc.code not in FAIL_OVER:
                    raise
                self._give_up(exc)

    def _tell(self, operation: t.Any, payload: t.Any, obj: str) -> t.Any:
        """A change: sent once, whatever becomes of the answer."""
        channel = self._connected()
        try:
            return self._exchange(channel, operation, payload, obj)
        except TdeError as exc:
            if exc.code not in FAIL_OVER:
                raise
            self._give_up(exc)
            raise TdeError(
                "kmip_answer_lost",
                f"{operation.name.lower()} was sent to {channel.server}, and it {exc.message}",
                obj=obj,
                kept="It is not known whether it was done.",
                details={"server": channel.server, "operation": operation.name},
            ) from None

    def _connected(self) -> Channel:
        while self._channel is None:
            if not self._waiting:
                raise self._nobody()
            server = self._waiting[0]
            try:
                self._channel = Channel(server, self._context, self.access.timeout)
                self.version = self._negotiate(self._channel)
            except TdeError as exc:
                if exc.code not in FAIL_OVER:
                    self._drop()
                    raise
                self._give_up(exc)
        return self._channel

    def _give_up(self, exc: TdeError) -> None:
        """Leave the present server for the rest of this client's life."""
        self._drop()
        self._failed.append(exc)
        self._waiting.pop(0)

    def _drop(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = None

    def _nobody(self) -> TdeError:
        slow = all(exc.code == "kmip_timeout" for exc in self._failed)
        said = "; ".join(f"{exc.obj}: {exc.message}" for exc in self._failed)
        return TdeError("kmip_timeout" if slow else "kmip_unreachable", said, obj=self.access.words())

    def _negotiate(self, channel: Channel) -> tuple[int, int]:
        """The newest version that both speak (KMIP 1.4, section 4.26)."""
        from kmip.core import enums
        from kmip.core.messages import contents, payloads

        self.version = VERSIONS[-1]
        ours = [contents.ProtocolVersion(*version) for version in VERSIONS]
        operation = enums.Operation.DISCOVER_VERSIONS
        answer = self._exchange(channel, operation, payloads.DiscoverVersionsRequestPayload(ours), "")
        theirs = {(one.major, one.minor) for one in answer.protocol_versions}
        found = next((version for version in VERSIONS if version in theirs), None)
        if found is None:
            raise TdeError("kmip_unsupported", "speaks no version of KMIP from 1.2 to 1.4", obj=f"KMIP server {channel.server}")
        return found

    def _exchange(self, channel: Channel, operation: t.Any, payload: t.Any, obj: str) -> t.Any:
        from kmip.core import enums, primitives, utils
        from kmip.core.messages import contents, messages

        obj = f"{obj} at {channel.server}" if obj else f"KMIP server {channel.server}"
        version = enums.KMIPVersion[f"KMIP_{self.version[0]}_{self.version[1]}"]
        header = messages.RequestHeader(
            protocol_version=contents.ProtocolVersion(*self.version), batch_count=contents.BatchCount(1)
        )
        named = primitives.Enumeration(enums.Operation, operation, tag=enums.Tags.OPERATION)
        item = messages.RequestBatchItem(operation=named, request_payload=payload)
        stream = utils.BytearrayStream()
        messages.RequestMessage(request_header=header, batch_items=[item]).write(stream, version)
        raw = channel.call(bytes(stream.buffer))
        answer = messages.ResponseMessage()
        with _readable(obj):
            answer.read(utils.BytearrayStream(raw), version)
            found = answer.batch_items[0]
            status = found.result_status.value
        if status != enums.ResultStatus.SUCCESS:
            reason = found.result_reason.value.name if found.result_reason else ""
            message = found.result_message.value if found.result_message else ""
            raise refused(reason, message, operation.name.lower(), obj)
        if found.response_payload is None:
            raise TdeError("kmip_answer_invalid", f"gave nothing back for {operation.name.lower()}", obj=obj)
        return found.response_payload


@contextlib.contextmanager
def _readable(obj: str) -> t.Iterator[None]:
    try:
        yield
    except Exception as exc:
        # PyKMIP's decoder raises what comes; its text may hold a value.
        raise TdeError("kmip_answer_invalid", f"its answer cannot be read ({type(exc).__name__})", obj=obj) from None


def _plain(value: t.Any) -> t.Any:
    name = getattr(value, "name", None)
    return name.lower() if isinstance(name, str) else value


def _gcm() -> t.Any:
    from kmip.core import attributes, enums

    return attributes.CryptographicParameters(
        block_cipher_mode=enums.BlockCipherMode.GCM,
        cryptographic_algorithm=enums.CryptographicAlgorithm.AES,
        tag_length=16,
    )


def _require() -> None:
    """A task that needs no KMIP server needs no PyKMIP.

    :raises TdeError: ``library_missing``.
    """
    import sys

    try:
        __import__("kmip")
    except ImportError:
        raise TdeError(
            "library_missing",
            f"{sys.executable} has no PyKMIP",
            obj="the target's Python",
            next_step="Run the role hsm.tde.prerequisites, or set ansible_python_interpreter to an environment that has it.",
        ) from None
