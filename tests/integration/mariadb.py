# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Private MariaDB servers for tests: a data directory, a socket, an include directory and no TCP port each."""

from __future__ import annotations

import contextlib
import importlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import typing as t
from pathlib import Path
from unittest import mock

from ansible_collections.hsm.tde.plugins.module_utils.command import main as command
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.tests.integration import estate, support

USER = "mysql"
PASSPHRASE = estate.PASSPHRASE
_PLUGIN = "/usr/lib/mysql/plugin/file_key_management.so"


def usable() -> bool:
    """Whether this host can run these tests."""
    return os.geteuid() == 0 and bool(shutil.which("mariadbd")) and os.path.exists(_PLUGIN) and bool(support.softhsm_library())


class Server:
    """A private server.

    :ivar data: its data directory; :ivar include: its include directory.
    """

    def __init__(self, home: Path, name: str = "db", number: int = 1, **settings: str) -> None:
        self.home = home / name
        self.data, self.run, self.include = self.home / "data", self.home / "run", self.home / "include"
        self.socket = self.run / "sock"
        self.log = self.run / "log.err"
        self.conf = self.home / "my.cnf"
        for path in (self.data, self.run, self.home / "tmp", self.include):
            path.mkdir(parents=True)
            if path != self.include:
                shutil.chown(path, USER, USER)
        given = {
            "datadir": str(self.data), "socket": str(self.socket), "log_error": str(self.log), "tmpdir": str(self.home / "tmp"),
            "pid_file": str(self.run / "pid"), "server_id": str(number), "log_bin": "bin", "innodb_buffer_pool_size": "16M",
            "innodb_log_file_size": "8M", "innodb_flush_log_at_trx_commit": "2", "skip_networking": "1",
            "innodb_encryption_rotation_iops": "2000", "innodb_lock_wait_timeout": "60", **settings,
        }  # fmt: skip
        lines = ["[mariadb]", *(f"{key} = {value}" for key, value in given.items()), f"!includedir {self.include}"]
        self.conf.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """Make the data directory."""
        done = subprocess.run(
            ["mariadb-install-db", f"--defaults-file={self.conf}", f"--user={USER}", "--auth-root-authentication-method=socket", "--skip-test-db"],
            capture_output=True, text=True, check=False, cwd="/", timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, check: bool = True) -> bool:
        """Start it; :returns: whether it answers."""
        user = pwd.getpwnam(USER)
        # The socket of a server that was killed is still there.
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            ["mariadbd", f"--defaults-file={self.conf}"], user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": "/usr/sbin:/usr/bin:/bin"},
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while self._process.poll() is None and time.monotonic() < deadline:
            if self.socket.exists() and self.sql("SELECT 1", check=False).strip() == "1":
                return True
            time.sleep(0.05)
        assert not check, self.log.read_text()[-3000:]
        return False

    def stop(self) -> None:
        """Stop it if it runs."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it without a shutdown."""
        assert self._process
        self._process.kill()
        self._process.wait(10)

    def restart(self) -> None:
        """Stop and start it."""
        self.stop()
        self.start()

    def sql(self, statement: str, database: str = "", check: bool = True) -> str:
        """Run SQL, one row a line, columns parted by tabs."""
        done = subprocess.run(
            ["mariadb", "--no-defaults", "-N", "-B", "-S", str(self.socket), database], input=statement, capture_output=True,
            text=True, check=False, timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return (done.stdout if done.returncode == 0 else done.stderr).strip()

    def files(self, marker: bytes) -> list[str]:
        """The files of the server that hold a text, relative to its folder."""
        return sorted(
            str(path.relative_to(self.home))
            for folder in (self.data, self.home / "tmp")
            for path in folder.rglob("*")
            if path.is_file() and marker in path.read_bytes()
        )


class Host:
    """A server with a token, a state directory and an include directory of its own."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        self.hsm = support.SoftHsm(home / "hsm")
        self.hsm.add_token("demo")
        self.hsm.add_token("second")
        self.state = home / "state"
        self.server = Server(home, **settings)
        # Its parent, too, is made by the task.
        self.keys = home / "memory/keys"
        self.options: dict[str, t.Any] = {"include_directory": str(self.server.include), "key_directory": str(self.keys)}

    def arguments(self, **more: t.Any) -> dict[str, t.Any]:
        """A task's options; one that is None is left out."""
        arguments = {
            "engine": "mariadb", "cluster": "main", "state_directory": str(self.state), "mariadb": self.options,
            "login_unix_socket": str(self.server.socket), "passphrase": estate.PASSPHRASE,
            **self.hsm.options(token_label="demo", pin=self.hsm.pin), **more,
        }  # fmt: skip
        return {name: value for name, value in arguments.items() if value is not None}

    def run(self, module: str, *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        """Run a module, which must succeed."""
        result = support.run_module(module, self.arguments(**more), check=check, diff=True)
        assert not result.get("failed"), result
        return result

    def refused(self, module: str, code: str, **more: t.Any) -> dict[str, t.Any]:
        """Run a module, which must fail with an error code."""
        result = support.run_module(module, self.arguments(**more), diff=True)
        assert result.get("error_code") == code, result
        return result

    def rotate(self, tag: str, **more: t.Any) -> dict[str, t.Any]:
        """Rotate, the data keys too."""
        return self.run("tde_master_key", state="rotated", tag=tag, mariadb={**self.options, "reencrypt": True}, **more)

    def journal(self) -> list[dict[str, t.Any]]:
        """The journal, its chain checked."""
        return Journal(StateDirectory(str(self.state)).journal).entries()

    def configure(self) -> None:
        """The keystore made and opened, the server restarted with it."""
        self.run("tde_keystore", keyslots=estate.SLOTS)
        assert self.run("tde_keystore", state="open")["restart_required"]
        self.server.restart()

    def boots(self, secret: str | None = None) -> bool:
        """The memory is empty, and the host opens its keystore as at boot, with what it keeps or a passphrase; the server is down.

        :returns: whether it could.
        """
        # The call of a killed task's orphan may have the folder open for a moment.
        deadline = time.monotonic() + 10
        while os.path.ismount(self.keys) and time.monotonic() < deadline:
            if subprocess.run(["umount", str(self.keys)], check=False, capture_output=True).returncode:
                time.sleep(0.05)

        def act() -> int:
            arguments = ["--state-directory", str(self.state), "open", "main"]
            if secret:
                reader, writer = os.pipe()
                os.write(writer, secret.encode())
                os.close(writer)
                arguments += ["--passphrase-fd", str(reader)]
            return command.main(arguments)

        return support.in_child(act) == 0

    def spaces(self) -> dict[str, str]:
        """The number of the key of each InnoDB tablespace that is wholly encrypted."""
        rows = self.server.sql(
            "SELECT NAME, CURRENT_KEY_ID FROM information_schema.INNODB_TABLESPACES_ENCRYPTION"
            " WHERE ENCRYPTION_SCHEME = 1 AND MIN_KEY_VERSION >= 1 AND KEY_ROTATION_PAGE_NUMBER IS NULL"
        )
        return dict(line.split("\t") for line in rows.splitlines())


@contextlib.contextmanager
def folder() -> t.Iterator[Path]:
    """A folder in memory where there is one, that other users may pass through."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="hsm-tde-mariadb.", dir=base))
    path.chmod(0o755)
    cheap = mock.patch.object(passphrase, "default_kdf", return_value=passphrase.Scrypt(log_n=10))
    try:
        with cheap:
            yield path
    finally:
        for point in path.rglob("memory/keys"):
            subprocess.run(["umount", str(point)], check=False, capture_output=True)
        shutil.rmtree(path, ignore_errors=True)


#: Keys of a key file that the server had before ours, in the forms that it takes.
FORMER = {1: "AB" * 32, 5: "cd" * 16, 7: "1f" * 24}


class FormerHost(Host):
    """A host whose server is encrypted already. :ivar former: its key file."""

    former: Path


@contextlib.contextmanager
def formerly(home: Path, *, algorithm: str = "AES_CTR", default: int = 1, password: str | None = None) -> t.Iterator[FormerHost]:
    """A running server that a key file of its own encrypts, with tables under three keys."""
    home.mkdir(exist_ok=True)
    made = FormerHost(home)
    made.former = home / "theirs/keys"
    made.former.parent.mkdir()
    lines = "# ours\n" + "".join(f"{number};{key} # a note\n" for number, key in FORMER.items())
    settings = [
        "plugin_load_add = file_key_management", f"file_key_management_filename = {made.former}",
        f"file_key_management_encryption_algorithm = {algorithm}", f"innodb_default_encryption_key_id = {default}",
        "innodb_encrypt_tables = ON", "innodb_encrypt_log = ON", "encrypt_binlog = ON", "innodb_encryption_threads = 4",
    ]  # fmt: skip
    made.former.write_text(lines)
    if password:
        secret = made.former.parent / "password"
        secret.write_text(password)
        settings.append(f"file_key_management_filekey = FILE:{secret}")
        argv = [
            "openssl",
            "enc",
            "-aes-256-cbc",
            "-md",
            "sha1",
            "-pass",
            f"file:{secret}",
            "-in",
            str(made.former),
            "-out",
            str(made.former) + ".enc",
        ]
        subprocess.run(argv, check=True, capture_output=True)
        os.replace(str(made.former) + ".enc", made.former)
    for path in made.former.parent.iterdir():
        shutil.chown(path, USER, USER)
        path.chmod(0o600)
    made.server.install()
    (made.server.include / "enc.cnf").write_text("[mariadb]\n" + "\n".join(settings) + "\n")
    try:
        made.server.start()
        fill(made.server, 2000)
        made.server.sql("CREATE TABLE under_seven ENCRYPTED=YES ENCRYPTION_KEY_ID=7 AS SELECT * FROM orders LIMIT 100", "shop")
        deadline = time.monotonic() + 20
        while "mysql/innodb_index_stats" not in made.spaces() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield made
    finally:
        made.server.stop()
        subprocess.run(["umount", str(made.keys)], check=False, capture_output=True)


@contextlib.contextmanager
def host(home: Path, **settings: str) -> t.Iterator[Host]:
    """A running server that is not encrypted yet."""
    home.mkdir(exist_ok=True)
    made = Host(home, **settings)
    made.server.install()
    try:
        made.server.start()
        yield made
    finally:
        made.server.stop()


def preload() -> None:
    """Import what the tasks import when they come to it."""
    ours = "ansible_collections.hsm.tde.plugins.module_utils.engines.mariadb"
    for name in ("pymysql", *(f"{ours}.{one}" for one in ("engine", "keystore", "rotation", "tablespaces"))):
        importlib.import_module(name)


class Load:
    """Transactions on a table by some clients meanwhile; :ivar failures: what a statement met; :ivar done: how many ended."""

    def __init__(self, server: Server, clients: int = 2) -> None:
        self.server, self.clients = server, clients
        self.failures: list[str] = []
        self.done = 0

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)

    def _work(self, number: int) -> None:
        import pymysql

        connection = pymysql.connect(unix_socket=str(self.server.socket), user="root", database="shop", autocommit=False)
        with connection, connection.cursor() as cursor:
            while not self._stop.is_set():
                try:
                    row = 1 + (self.done * 7 + number) % 1000
                    cursor.execute("UPDATE orders SET body = CONCAT(body, '') WHERE id = %s", (row,))
                    cursor.execute("INSERT INTO orders (body) VALUES (%s)", (f"{MARKER} load",))
                    cursor.execute("SELECT body FROM orders WHERE id = %s", (row,))
                    connection.commit()
                    self.done += 1
                except pymysql.err.MySQLError as error:
                    self.failures.append(repr(error))
                    connection.rollback()
                time.sleep(0.002)


#: Of shop: its partitions, its full-text index and its name that must be quoted.
TABLES = ("orders", "parts", "words", "`a.b é#P# x`")


def rows(host: Host, *more: str) -> list[str]:
    """Count and checksum of each table of shop; :param more: further tables of it."""
    each = (f"SELECT COUNT(*), MD5(GROUP_CONCAT(MD5(body) ORDER BY id)) FROM shop.{table}" for table in (*TABLES, *more))
    return host.server.sql("SET SESSION group_concat_max_len = 100000000; " + "; ".join(each)).splitlines()


MARKER = "hsmtde-marker-2291"


def fill(server: Server, rows: int = 5000) -> None:
    """A database with tables of several kinds, full of the marker."""
    server.sql("CREATE DATABASE shop; CREATE DATABASE other")
    body = f"CONCAT('{MARKER} ', seq, MD5(seq))"
    server.sql(
        f"CREATE TABLE orders (id INT PRIMARY KEY AUTO_INCREMENT, body VARCHAR(200), KEY (body)) CHARACTER SET utf8mb4;"
        f"INSERT INTO orders (body) SELECT {body} FROM seq_1_to_{rows};"
        f"CREATE TABLE parts (id INT PRIMARY KEY, body VARCHAR(200)) PARTITION BY HASH(id) PARTITIONS 2;"
        f"INSERT INTO parts SELECT seq, {body} FROM seq_1_to_200;"
        f"CREATE TABLE words (id INT PRIMARY KEY, body TEXT, FULLTEXT (body)); INSERT INTO words VALUES (1, '{MARKER}');"
        f"CREATE TABLE `a.b é#P# x` (id INT PRIMARY KEY, body TEXT); INSERT INTO `a.b é#P# x` VALUES (1, '{MARKER}');"
        f"CREATE TABLE old (id INT, body TEXT) ENGINE=MyISAM",
        "shop",
    )
    server.sql(f"CREATE TABLE secret (id INT PRIMARY KEY, body TEXT); INSERT INTO secret VALUES (1, '{MARKER}')", "other")
