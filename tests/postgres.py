"""A PostgreSQL server of the tests' own on loopback, which can be started, killed and started again."""

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
    """A server on `port` for the length of a `with` block, with SCRAM passwords, TLS and a superuser `admin`."""

    def __init__(self, *options: str) -> None:
        """Take further settings, such as `max_connections=10`; `fsync` is off unless they turn it on."""
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="tokencore-postgres-")), free_port()
        self.options = [f"-c{one}" for one in ("listen_addresses=127.0.0.1", "ssl=on", "fsync=off", *options)]
        self.certificate = self.folder / "data" / "server.crt"  # self-signed, for `localhost`
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
        """Start the server, also after `stop`, and wait until it accepts connections."""
        where = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-p", str(self.port)]
        with (self.folder / "log").open("wb") as log:
            command = [f"{PROGRAMS}/postgres", *where, *self.options]
            self.process = subprocess.Popen(command, user=USER, cwd="/", stdout=log, stderr=log)
        until(lambda: b"ready to accept connections" in (self.folder / "log").read_bytes(), 60)

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stop the server and its connections: in order with SIGINT, at once with SIGQUIT, as in a crash."""
        if self.process:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def send(self, number: int) -> None:
        """Send SIGSTOP (as if the host hung) or SIGCONT to each of its processes, as each has a session of its own."""
        main = self.process.pid if self.process else 0
        os.kill(main, signal.SIGSTOP)  # its list of children cannot change while it is stopped
        for child in (*Path(f"/proc/{main}/task/{main}/children").read_text().split(), str(main)):
            with suppress(ProcessLookupError):  # ended in the meantime
                os.kill(int(child), number)

    def url(self, database: str = "postgres", role: str = "admin", scheme: str = "postgresql") -> str:
        """Return the address of a database for a role."""
        return f"{scheme}://{role}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """Run each statement in its own transaction; return the rows, one a line, with columns separated by `|`."""
        commands = [part for one in statements for part in ("-c", one)]
        return run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *commands, self.url(database)).strip()


def run(name: str, *arguments: str) -> str:
    """Run the PostgreSQL program of that name and return its output."""
    return subprocess.run(
        [f"{PROGRAMS}/{name}", *arguments], user=USER, cwd="/", check=True, capture_output=True, text=True
    ).stdout


def own(*paths: Path) -> None:
    """Make the server's user the owner of the files."""
    for path in paths:
        if USER:
            shutil.chown(path, USER)
