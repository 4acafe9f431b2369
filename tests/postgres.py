"""A PostgreSQL server of one's own on loopback, for tests: made, started, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from running import until
from stacks import free_port

PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
PASSWORD = "CanaryPassword"  # of every role
USER = "postgres" if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # PostgreSQL does not run as root
needs_postgres = pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL server in /usr/lib/postgresql")


class Postgres:
    """The server while a `with` block lasts, with SCRAM passwords, TLS and a superuser `admin`, on `port`."""

    def __init__(self, *options: str) -> None:
        """Take more settings, such as `max_connections=10`; `fsync` is on as usual only where they say so."""
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="tokencore-postgres-")), free_port()
        self.options = [f"-c{one}" for one in ("listen_addresses=127.0.0.1", "ssl=on", "fsync=off", *options)]
        self.certificate = self.folder / "data" / "server.crt"  # of `localhost`, signed by itself
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        password, data = self.folder / "password", self.folder / "data"
        password.write_text(PASSWORD)
        own(self.folder, password)
        how = ["-U", "admin", "-A", "scram-sha-256", "-E", "UTF8", f"--pwfile={password}"]
        run("initdb", "--no-sync", "-D", str(data), *how)
        how = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost", "-addext"]
        made = ["subjectAltName=DNS:localhost", "-out", f"{self.certificate}", "-keyout", f"{data / 'server.key'}"]
        subprocess.run(["/usr/bin/openssl", "req", "-x509", *how, *made], check=True, capture_output=True)
        own(self.certificate, data / "server.key")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it, or start it again; returns when it takes connections."""
        where = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-p", str(self.port)]
        with (self.folder / "log").open("wb") as log:
            command = [f"{PROGRAMS}/postgres", *where, *self.options]
            self.process = subprocess.Popen(command, user=USER, cwd="/", stdout=log, stderr=log)
        until(lambda: b"ready to accept connections" in (self.folder / "log").read_bytes(), 60)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it, and its connections: SIGINT in order, SIGQUIT at once, as a crash does."""
        if self.process:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def send(self, number: int) -> None:
        """SIGSTOP to all its processes, as on a host that hangs, or SIGCONT; each has a session of its own."""
        main = self.process.pid if self.process else 0
        os.kill(main, signal.SIGSTOP)  # the list of its children is whole while it stands still
        for child in (*Path(f"/proc/{main}/task/{main}/children").read_text().split(), str(main)):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(int(child), number)

    def url(self, database: str = "postgres", role: str = "admin", scheme: str = "postgresql") -> str:
        """The address of a database for a role."""
        return f"{scheme}://{role}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """What the statements, each in a transaction of its own, print: a row a line, columns apart by `|`."""
        commands = [part for one in statements for part in ("-c", one)]
        return run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *commands, self.url(database)).strip()


def run(name: str, *arguments: str) -> str:
    """What PostgreSQL's program of that name prints."""
    return subprocess.run(
        [f"{PROGRAMS}/{name}", *arguments], user=USER, cwd="/", check=True, capture_output=True, text=True
    ).stdout


def own(*paths: Path) -> None:
    """Give the files to the server."""
    for path in paths:
        if USER:
            shutil.chown(path, USER)
