"""A PostgreSQL server of one's own on loopback, for tests: made, started, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from running import until
from stacks import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
PASSWORD = "CanaryPassword"  # of every role
USER = "postgres" if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # PostgreSQL does not run as root
needs_postgres = pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL server in /usr/lib/postgresql")


class Postgres:
    """The server while a `with` block lasts, with SCRAM passwords and a superuser `admin`.

    Attributes:
        folder: its data, its log and its socket.
        port: where it listens on 127.0.0.1.
        process: the running server; None while it is stopped.

    """

    def __init__(self, *options: str) -> None:
        """Take more settings, such as `max_connections=10`; `fsync` is on as usual only where they say so."""
        self.options = [f"-c{one}" for one in ("fsync=off", *options)]
        self.folder, self.port = Path(), 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="tokencore-postgres-")), free_port()
        (self.folder / "password").write_text(PASSWORD)
        for path in (self.folder, self.folder / "password"):
            if USER:
                shutil.chown(path, USER)
        how = ["-U", "admin", "-A", "scram-sha-256", "-E", "UTF8", f"--pwfile={self.folder / 'password'}"]
        try:
            self._run("initdb", "--no-sync", "-D", str(self.folder / "data"), *how)
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, or start it again; returns when it takes connections."""
        where = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-p", str(self.port)]
        command = [self._program("postgres"), *where, "-clisten_addresses=127.0.0.1", *self.options]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, user=USER, cwd="/", stdout=log, stderr=log)
        until(lambda: b"ready to accept connections" in (self.folder / "log").read_bytes(), 60)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it, and its connections: SIGINT in order, SIGQUIT at once, as a crash does."""
        if self.process:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def freeze(self) -> None:
        """Stop all its processes, as a host does that hangs; `thaw` lets them go on."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        """Each of its processes has a session of its own, so that the group does not do."""
        main = str(self.process.pid if self.process else 0)
        for path in Path("/proc").glob("[0-9]*/stat"):
            fields = _text(path).rpartition(")")[2].split()
            if path.parent.name == main or (len(fields) > 1 and fields[1] == main):
                os.kill(int(path.parent.name), number)

    def url(self, database: str = "postgres", role: str = "admin", scheme: str = "postgresql") -> str:
        """The address of a database for a role."""
        return f"{scheme}://{role}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """What the statements, each in a transaction of its own, print: a row a line, columns apart by `|`."""
        commands = [part for one in statements for part in ("-c", one)]
        return self._run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *commands, self.url(database)).strip()

    @staticmethod
    def _program(name: str) -> str:
        assert PROGRAMS
        return str(PROGRAMS / name)

    def _run(self, name: str, *arguments: str) -> str:
        command: Sequence[str] = [self._program(name), *arguments]
        return subprocess.run(command, user=USER, cwd="/", check=True, capture_output=True, text=True).stdout


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""
