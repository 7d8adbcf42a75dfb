# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the functions of the stand-in for pg_tde do: providers, keys and their traps. IT ENCRYPTS NOTHING.

Run by the server, one call a process: its argument is a request (JSON in base64), what it prints is the answer. What it
changes lies in ``$PGDATA/<extension>/standin.json`` and at the providers, so that no ROLLBACK takes it back. README.md
names the source of each behaviour, or says that it is assumed.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import struct
import sys
import time

#: KeyInfo of keyring_api.h: name[256], KeyData {data[32], unsigned len}.
ENTRY = struct.Struct("<256s32sI")
GLOBAL, SERVER, DEFAULT = "global", "server", "default"
TYPES = ("file", "vault-v2", "kmip")


def read(path):
    with open(path, "rb") as handle:
        return handle.read()


class Refused(Exception):
    """What the function raises."""

    def __init__(self, sqlstate, message, detail=None, hint=None):
        super().__init__(message)
        self.answer = {"sqlstate": sqlstate, "message": message, "detail": detail, "hint": hint}


class Failed(Exception):
    """A provider's return code other than success, in the product's words."""


warnings = []

# --- the three keyrings: get gives the key, None if there is none


def file_get(options, name):
    try:
        content = read(options["path"])
    except OSError:
        # As the product: a file that cannot be opened has no keys.
        return None
    for start in range(0, len(content), ENTRY.size):
        if len(content) - start < ENTRY.size:
            warnings.append(f'keyring file "{options["path"]}" is corrupted')
            raise Failed("Data corrupted")
        raw, data, length = ENTRY.unpack_from(content, start)
        if raw.rstrip(b"\0").decode().lower() == name.lower():
            return data[:length]
    return None


def file_put(options, name, key):
    try:
        fd = os.open(options["path"], os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise Refused("58P01", f"Failed to open keyring file {options['path']}: {exc.strerror}") from None
    with os.fdopen(fd, "r+b") as handle:
        handle.seek(0, os.SEEK_END)
        handle.write(ENTRY.pack(name.encode(), key, len(key)))
        handle.flush()
        os.fsync(fd)


def file_validate(options):
    try:
        os.close(os.open(options["path"], os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as exc:
        raise Refused("58P01", f"Failed to open keyring file {options['path']}: {exc.strerror}") from None


def vault(options, path, data=None):
    """A request to Vault: status and body. :raises OSError: there is no answer."""
    import http.client
    import ssl
    from urllib.parse import urlsplit

    headers = {"X-Vault-Token": read(options["tokenPath"]).decode().split()[0], "Content-Type": "application/json"}
    if options.get("namespace"):
        headers["X-Vault-Namespace"] = options["namespace"]
    parts = urlsplit(options["url"])
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=options.get("caPath") or None)
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    body = json.dumps(data) if data is not None else None
    try:
        connection.request("POST" if body else "GET", f"{parts.path}/v1/{path}", body, headers)
        answer = connection.getresponse()
        raw = answer.read()
    except http.client.HTTPException as exc:
        raise OSError(str(exc)) from None
    return answer.status, json.loads(raw or b"{}") if answer.status == 200 else {}


def vault_get(options, name):
    try:
        status, body = vault(options, f"{options['mountPath']}/data/{name}")
    except OSError:
        warnings.append("HTTP(S) request to keyring provider failed")
        raise Failed("Invalid key") from None
    if status == 404:
        return None
    if status // 100 != 2:
        warnings.append(f"HTTP(S) request to keyring provider returned invalid response {status}")
        raise Failed("Invalid response from keyring provider")
    return base64.b64decode(body["data"]["data"]["key"])


def vault_put(options, name, key):
    try:
        status, _body = vault(options, f"{options['mountPath']}/data/{name}", {"data": {"key": base64.b64encode(key).decode()}})
    except OSError:
        raise Refused("XX000", "HTTP(S) request to keyring provider failed") from None
    if status // 100 != 2:
        raise Refused("XX000", f"Invalid HTTP response from keyring provider: {status}")


def vault_validate(options):
    try:
        status, body = vault(options, f"sys/mounts/{options['mountPath']}")
    except OSError:
        raise Refused("XX000", "HTTP(S) request to keyring provider failed") from None
    if status != 200:
        warnings.append(f'failed to get mount info for "{options["url"]}" (HTTP {status})')
        return
    if body.get("type") != "kv" or (body.get("options") or {}).get("version") != "2":
        raise Refused("22023", f'vault mount at "{options["mountPath"]}" has unsupported engine type or version')


# KMIP 1.2 in TTLV (section 9.1): tag, type, length, value padded to 8 bytes. An import of a library would take longer
# than all the rest of a call.
STRUCTURE, INTEGER, ENUMERATION, TEXT, BYTES = 1, 2, 5, 7, 8
REGISTER, LOCATE, GET = 3, 8, 10


def ttlv(tag, kind, value):
    """One item. :param value: bytes of inner items, a number or a text."""
    value = value.encode() if isinstance(value, str) else value
    raw = value.to_bytes(4, "big") if kind in (INTEGER, ENUMERATION) else value
    return (0x420000 | tag).to_bytes(3, "big") + bytes([kind]) + len(raw).to_bytes(4, "big") + raw + bytes(-len(raw) % 8)


def items(raw):
    """The items of a structure: tag and raw value."""
    at = 0
    while at < len(raw):
        length = int.from_bytes(raw[at + 4 : at + 8], "big")
        yield int.from_bytes(raw[at : at + 3], "big") & 0xFFFF, raw[at + 8 : at + 8 + length]
        at += 8 + length + -length % 8


def within(raw, *path):
    """The raw values at the end of a path of tags."""
    if not path:
        return [raw]
    return [found for tag, inner in items(raw) if tag == path[0] for found in within(inner, *path[1:])]


def attribute(name, kind, value):
    return ttlv(0x08, STRUCTURE, ttlv(0x0A, TEXT, name) + ttlv(0x0B, kind, value))


def named(name):
    return attribute("Name", STRUCTURE, ttlv(0x55, TEXT, name) + ttlv(0x54, ENUMERATION, 1))


def kmip(options):
    """A connection that verifies nothing of the server, as the product's."""
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(options["certPath"], options["keyPath"])
    open(options["caPath"], "rb").close()
    return context.wrap_socket(socket.create_connection((options["host"], int(options["port"])), timeout=10))


def ask(connection, operation, payload):
    """The payload of an answer. :raises Failed: the server refused."""
    version = ttlv(0x69, STRUCTURE, ttlv(0x6A, INTEGER, 1) + ttlv(0x6B, INTEGER, 2))
    header = ttlv(0x77, STRUCTURE, version + ttlv(0x0D, INTEGER, 1))
    item = ttlv(0x0F, STRUCTURE, ttlv(0x5C, ENUMERATION, operation) + ttlv(0x79, STRUCTURE, payload))
    connection.sendall(ttlv(0x78, STRUCTURE, header + item))
    raw = b""
    while len(raw) < 8 or len(raw) < 8 + int.from_bytes(raw[4:8], "big"):
        part = connection.recv(65536)
        if not part:
            raise OSError("the server ended the connection")
        raw += part
    status = within(raw, 0x7B, 0x0F, 0x7F)
    if not status or int.from_bytes(status[0], "big") != 0:
        raise Failed("Resource not available")
    return (within(raw, 0x7B, 0x0F, 0x7C) or [b""])[0]


def kmip_get(options, name):
    try:
        connection = kmip(options)
    except OSError as exc:
        # The trap: no connection, and yet no failure.
        warnings.append(f"SSL error: BIO_do_connect failed ({exc})")
        return None
    with connection:
        try:
            wanted = ttlv(0x4F, INTEGER, 16) + attribute("Object Type", ENUMERATION, 2) + named(name)
            found = within(ask(connection, LOCATE, wanted), 0x94)
            if len(found) > 1:
                warnings.append("KMIP server contains multiple results for key, ignoring")
                raise Failed("Resource not available")
            if not found:
                return None
            return within(ask(connection, GET, ttlv(0x94, TEXT, found[0])), 0x8F, 0x40, 0x45, 0x43)[0]
        except OSError:
            raise Failed("Resource not available") from None


def kmip_put(options, name, key):
    template = attribute("Cryptographic Algorithm", ENUMERATION, 3) + attribute("Cryptographic Length", INTEGER, len(key) * 8)
    template += attribute("Cryptographic Usage Mask", INTEGER, 12) + named(name)
    value = ttlv(0x42, ENUMERATION, 1) + ttlv(0x45, STRUCTURE, ttlv(0x43, BYTES, key))
    block = ttlv(0x40, STRUCTURE, value + ttlv(0x28, ENUMERATION, 3) + ttlv(0x2A, INTEGER, len(key) * 8))
    payload = ttlv(0x57, ENUMERATION, 2) + ttlv(0x91, STRUCTURE, template) + ttlv(0x8F, STRUCTURE, block)
    try:
        with kmip(options) as connection:
            ask(connection, REGISTER, payload)
    except OSError:
        raise Refused("XX000", "SSL error: BIO_do_connect failed") from None
    except Failed:
        raise Refused("XX000", "KMIP server reported error on register symmetric key: -1") from None


def kmip_validate(options):
    try:
        kmip(options).close()
    except OSError:
        raise Refused("XX000", "SSL error: BIO_do_connect failed") from None


KEYRINGS = {
    "file": (file_get, file_put, file_validate, ("path",)),
    "vault-v2": (vault_get, vault_put, vault_validate, ("tokenPath", "url", "mountPath")),
    "kmip": (kmip_get, kmip_put, kmip_validate, ("host", "port", "caPath", "certPath", "keyPath")),
}


# --- the functions


class Server:
    """The state of one server, and one request to it."""

    def __init__(self, request, state):
        self.request = request
        self.state = state
        self.database = str(request.get("database", ""))
        self.providers = state.setdefault("providers", {})
        self.keys = state.setdefault("keys", {})
        # Keys in memory, which a restart forgets.
        if state.get("started") != request.get("started") and "started" in request:
            state["memory"], state["started"] = {}, request["started"]
        self.memory = state.setdefault("memory", {})

    def superuser(self, words):
        if not self.request.get("superuser"):
            raise Refused("42501", f"must be superuser to {words}")

    def scope(self, name):
        return GLOBAL if name == "global" else self.database

    def provider(self, scope, name):
        found = next((one for one in self.providers.get(scope, []) if one["name"] == name), None)
        if found is None:
            raise Refused("22023", f'key provider "{name}" does not exists')
        return found

    def checked(self, kind, name, options):
        if kind not in TYPES:
            raise Refused("22000", "Invalid provider type.")
        if name is None:
            raise Refused("22004", "provider name cannot be null")
        if not name:
            raise Refused("22023", 'provider name "" is too short')
        if len(name.encode()) > 126:
            raise Refused("22023", f'provider name "{name}" is too long', hint="Maximum length is 127 bytes.")
        if len(options.encode()) > 1023:
            raise Refused("22023", "too large provider options, maximum size is 1023 bytes")
        parsed = json.loads(options)
        missing = [one for one in KEYRINGS[kind][3] if parsed.get(one) in (None, "")]
        if missing:
            raise Refused("22023", "missing in the keyring options: " + " ".join(missing))
        return parsed

    def add(self, scope_name, kind, name, options):
        self.superuser("modify key providers")
        parsed, scope = self.checked(kind, name, options), self.scope(scope_name)
        KEYRINGS[kind][2](parsed)
        known = self.providers.setdefault(scope, [])
        if any(one["name"] == name for one in known):
            raise Refused("42710", f'Key provider "{name}" already exists.')
        number = 1 + max((abs(one) for one in self.state.setdefault("ids", {}).get(scope, [])), default=0)
        number = -number if scope == GLOBAL else number
        self.state["ids"].setdefault(scope, []).append(number)
        known.append({"id": number, "name": name, "type": kind, "options": parsed})

    def change(self, scope_name, kind, name, options):
        self.superuser("modify key providers")
        scope = self.scope(scope_name)
        found = self.provider(scope, name)
        parsed = self.checked(kind, name, options)
        KEYRINGS[kind][2](parsed)
        for owner, key in self.keys.items():
            if key["provider"] != found["id"] or (scope != GLOBAL and owner != scope) or owner == DEFAULT:
                continue
            by = "as server key" if owner == SERVER else f'by database "{self.request["databases"].get(owner, owner)}"'
            try:
                there = KEYRINGS[kind][0](parsed, key["name"])
            except Failed as exc:
                raise Refused(
                    "XX000", f'failed to retreive "{key["name"]}" key used {by} from modified key provider "{name}"', str(exc)
                ) from None
            if there is None:
                raise Refused("P0002", f'key "{key["name"]}" used {by} not found in modified key provider "{name}"')
            if digest(there) != key["digest"]:
                raise Refused(
                    "XX000", f'key "{key["name"]}" from modified key provider "{name}" does not match existing key used {by}'
                )
        found.update(type=kind, options=parsed)

    def list(self, scope_name):
        return [dict(one, options=one["options"]) for one in self.providers.get(self.scope(scope_name), [])]

    def delete(self, scope_name, name):
        self.superuser("modify key providers")
        scope = self.scope(scope_name)
        found = self.provider(scope, name)
        for owner, key in self.keys.items():
            if key["provider"] == found["id"] and (scope == GLOBAL or owner == scope):
                raise Refused("55006", "cannot delete provider which is currently in use")
        self.providers[scope].remove(found)

    def names(self, scope_name, key, provider):
        if scope_name == GLOBAL:
            self.superuser("access global key providers")
            if not self.request.get("inherit", True):
                raise Refused("XX000", "usage of global key providers is disabled")
        if key is None:
            raise Refused("22004", "key name cannot be null")
        if not key:
            raise Refused("22023", 'key name "" is too short')
        if len(key.encode()) > 255:
            raise Refused("22023", f'key name "{key}" is too long', hint="Maximum length is 255 bytes.")
        if provider is None:
            raise Refused("22004", "key provider name cannot be null")
        return self.provider(self.scope(scope_name), provider)

    def create_key(self, scope_name, key, provider):
        found = self.names(scope_name, key, provider)
        get, put = KEYRINGS[found["type"]][:2]
        try:
            there = get(found["options"], key)
        except Failed:
            # The trap: the product does not look at the return code here, and stores a key of this name over another.
            there = None
        if there is not None:
            raise Refused("22023", f'cannot create key "{key}" because it already exists')
        put(found["options"], key, os.urandom(self.request.get("bits", 128) // 8))

    def fetch(self, owner):
        """A key that is set, from memory or from its provider; None if none is set."""
        key = self.keys.get(owner)
        if key is None or owner in self.memory:
            return key
        scope = GLOBAL if key["provider"] < 0 else owner
        found = next((one for one in self.providers.get(scope, []) if one["id"] == key["provider"]), None)
        if found is None:
            raise Refused(
                "XX001", f"keyring lookup failed for principal key {key['name']}, unknown keyring with ID {key['provider']}"
            )
        try:
            there = KEYRINGS[found["type"]][0](found["options"], key["name"])
        except Failed as exc:
            message = f'failed to retrieve principal key "{key["name"]}" from key provider "{found["name"]}"'
            raise Refused("XX000", message, str(exc)) from None
        if there is None:
            raise Refused("P0002", f'key "{key["name"]}" not found in key provider "{found["name"]}"')
        if digest(there) != key["digest"]:
            message = (
                f"Failed to verify principal key header for key {key['name']}, incorrect principal key or corrupted key file"
            )
            raise Refused("XX001", message)
        self.memory[owner] = True
        return key

    def set_key(self, owner, scope_name, name, provider):
        found = self.names(scope_name, name, provider)
        before = self.fetch(owner)
        try:
            there = KEYRINGS[found["type"]][0](found["options"], name)
        except Failed as exc:
            raise Refused(
                "XX000", f'failed to retrieve principal key "{name}" from key provider "{found["name"]}"', str(exc)
            ) from None
        if there is None:
            raise Refused(
                "22023",
                f'key "{name}" does not exist',
                hint=f"Use pg_tde_create_key_using_{'global' if scope_name == GLOBAL else 'database'}_key_provider() to create it.",
            )
        made = {"name": name, "provider": found["id"], "time": time.time(), "digest": digest(there)}
        self.keys[owner], self.memory[owner] = made, True
        return before, made

    def set_default(self, name, provider):
        before, made = self.set_key(DEFAULT, GLOBAL, name, provider)
        for owner, key in list(self.keys.items()):
            if before and owner != DEFAULT and (key["name"], key["provider"]) == (before["name"], before["provider"]):
                self.keys[owner], self.memory[owner] = dict(made), True
        if SERVER not in self.keys:
            self.set_key(SERVER, GLOBAL, name, provider)

    def owner(self, kind):
        return {"server_": SERVER, "default_": DEFAULT}.get(kind, self.database)

    def info(self, kind):
        key = self.fetch(self.owner(kind))
        if key is None:
            return [dict.fromkeys(("key_name", "provider_name", "provider_id", "key_creation_time"))]
        named = {one["id"]: one["name"] for one in self.providers.get(GLOBAL if key["provider"] < 0 else self.owner(kind), [])}
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(key["time"])) + f"{key['time'] % 1:.6f}"[1:] + "+00"
        return [{"key_name": key["name"], "provider_name": named.get(key["provider"]), "provider_id": key["provider"],
                 "key_creation_time": when}]  # fmt: skip

    def verify(self, kind):
        owner = self.owner(kind)
        self.memory.pop(owner, None)
        if self.fetch(owner) is None:
            raise Refused("XX000", f"principal key not configured for {kind.rstrip('_') or 'current database'}")

    def delete_key(self, kind):
        owner = self.owner(kind)
        key, default = self.keys.get(owner), self.keys.get(DEFAULT)
        if key is None:
            raise Refused(
                "XX000", "principal key does not exists for the database" if not kind else "default principal key is not set"
            )
        if owner != DEFAULT and self.request.get("encrypted"):
            if default is None or (default["name"], default["provider"]) == (key["name"], key["provider"]):
                raise Refused("55006", "cannot delete principal key", "There are encrypted tables in the database.")
            self.keys[owner] = dict(default)
            return
        del self.keys[owner]
        self.memory.pop(owner, None)

    def use_key(self):
        """A table becomes encrypted: its database needs a key, and takes the default one for its own."""
        if self.fetch(self.database) is None:
            default = self.fetch(DEFAULT)
            if default is None:
                raise Refused(
                    "XX000",
                    "principal key not configured",
                    hint="Use pg_tde_set_key_using_database_key_provider() or pg_tde_set_key_using_global_key_provider() to configure one.",
                )
            self.keys[self.database], self.memory[self.database] = dict(default), True

    def initialize(self):
        """CREATE EXTENSION: what a former one left in this database is forgotten."""
        self.keys.pop(self.database, None)
        self.memory.pop(self.database, None)

    def start(self):
        """The server starts with encrypted WAL."""
        self.memory.pop(SERVER, None)
        if SERVER not in self.keys:
            if DEFAULT not in self.keys:
                raise Refused("XX000", "principal key not configured for WAL encryption")
            self.keys[SERVER] = dict(self.keys[DEFAULT])
        self.fetch(SERVER)

    def act(self, call, arguments):
        verb, _part, rest = call.rpartition("_")
        if verb in ("add", "change", "list", "delete") and rest in ("database", "global"):
            return getattr(self, verb)(rest, *arguments)
        if call in ("create_key_database", "create_key_global"):
            return self.create_key(rest, *arguments)
        if call in ("set_key_database", "set_key_global"):
            self.set_key(self.database, rest, *arguments)
            return None
        if call == "set_server":
            self.set_key(SERVER, GLOBAL, *arguments)
            return None
        return getattr(self, call)(*arguments)


def digest(key):
    """By which a key is known again; the stand-in keeps no key."""
    return hashlib.sha256(b"pg_tde stand-in" + key).hexdigest()


def main():
    request = json.loads(base64.b64decode(sys.argv[1]))
    folder = os.path.join(request["data"], "pg_tde")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, "standin.json")
    answer = {"rows": None}
    # Creating is outside of the lock: two at once are both answered that the key is not there, as with the product.
    with open(os.path.join(folder, "lock"), "w") as lock:
        if not request["call"].startswith("create_key"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(read(path)) if os.path.exists(path) else {}
        before = json.dumps(state)
        try:
            answer["rows"] = Server(request, state).act(request["call"], request.get("arguments", []))
        except Refused as exc:
            answer["error"] = exc.answer
        except Exception as exc:
            answer["error"] = {
                "sqlstate": "XX000",
                "message": f"a defect of the stand-in: {exc!r} at line {exc.__traceback__.tb_next.tb_lineno}",
            }
            state = json.loads(before)
        if json.dumps(state) != before and not request["call"].startswith("create_key"):
            with open(f"{path}.new", "w") as handle:
                handle.write(json.dumps(state))
                handle.flush()
                os.fsync(handle.fileno())
            os.rename(f"{path}.new", path)
    answer["warnings"] = warnings
    print(json.dumps(answer))
    return 1 if request["call"] == "start" and "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
