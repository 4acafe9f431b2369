"""A fleet's store on the tests' PostgreSQL server, and machines that share it, each with its own token directory."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from builders import KEY, SECRET, in_child, make_market
from cryptography.fernet import Fernet
from postgres import Postgres
from pydantic import SecretStr

from tokencore.renewer import Renewer
from tokencore.sandbox import Sandbox
from tokencore.stores import database
from tokencore.stores.file_store import FileStore
from tokencore.stores.shared_store import SharedStore
from tokencore.tokens import Token

MINUTE, TIMEOUT = 0.5, 1.0  # seconds: KIS's minute, KIS_TIMEOUT; an unanswered request holds the others back for 2.5


class Fleet(NamedTuple):
    """A fleet's store: its server, its address for the machines' role, and its Fernet key."""

    server: Postgres
    url: str
    key: str

    @classmethod
    def made(cls, server: Postgres) -> Fleet:
        """Make the tables, empty and owned by the superuser."""
        server.sql("drop table if exists tokencore_key, tokencore_attempt")
        database.make_tables(server.url())
        return cls(server, f"{server.url()}?sslmode=disable", Fernet.generate_key().decode())

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment variables of a machine with that token directory."""
        return {"KIS_STORE": self.url, "KIS_STORE_KEYS": self.key, "KIS_TOKEN_DIR": str(folder)}

    def numbers(self, folder: Path) -> dict[str, Any]:
        """Return the same settings as arguments for `make_market`."""
        return {"store": SecretStr(self.url), "store_keys": [SecretStr(self.key)], "token_dir": str(folder)}

    def behind(self, relay: Relay) -> Fleet:
        """Return the same store, reached through the relay."""
        return self._replace(url=self.url.replace(f":{self.server.port}/", f":{relay.port}/"))


POINTS = {"begun": "begin", "departed": "depart", "answered": "finish"}  # points of a renewal: the store's method


class Machine:
    """A machine of the fleet, with a folder of its own and the same key as the others."""

    def __init__(self, fleet: Fleet, folder: Path, gateway: Sandbox, *, key: str = KEY, **numbers: Any) -> None:  # noqa: ANN401 - fields of the settings
        """Make the folder without connecting to the store yet; `numbers` are those of `make_market`."""
        folder.mkdir(parents=True, mode=0o700)
        self.folder = folder
        numbers = {"issue_interval": MINUTE, "timeout": TIMEOUT, **fleet.numbers(folder), **numbers}
        self.market = make_market("us", **numbers).given(lambda: (key, SECRET), gateway.url)
        self.store = SharedStore(self.market, lambda: ["us"])
        own = {"KIS_APP_KEY": key, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": gateway.url}
        self.environment = own | fleet.environment(folder)

    def get(self) -> str:
        """Return the token that a program on this machine gets."""
        token = self.store.read()[0]
        if token is None or not token.serves(datetime.now(UTC), 0):
            renewer = Renewer(self.market, self.store, lambda: [self.market])
            token = renewer.obtain(lambda found: found.serves(datetime.now(UTC), 0), "get us")[0]
        return token.access_token

    def start(self, at: str = "", fault: int = 0) -> int:
        """Do the same in a child process, which sends itself the signal `fault` at that point; `got` has its token."""

        def program() -> None:
            if at:
                self._stop(at, fault)
            (self.folder / "got").write_text(self.get())
            for thread in threading.enumerate():  # as the interpreter does at its end
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()

        return in_child(program)

    def _stop(self, at: str, fault: int) -> None:
        work = getattr(self.store, POINTS[at])

        def stopped(*given: Any, **how: Any) -> Any:  # noqa: ANN401 - as the store's method has it
            done = None if at == "answered" else work(*given, **how)
            os.kill(os.getpid(), fault)
            return work(*given, **how) if at == "answered" else done

        setattr(self.store, POINTS[at], stopped)

    @property
    def got(self) -> str:
        """The token that the process got, or an empty string."""
        path = self.folder / "got"
        return path.read_text() if path.exists() else ""

    @property
    def has(self) -> str:
        """The token in its files: empty if there is none, `rejected` if KIS has rejected it."""
        token = FileStore(self.market, tuple).read()[0]
        return "" if token is None else "rejected" if token.rejected_at else token.access_token

    def look(self) -> str:
        """Look into the store, then return `has`."""
        with self.store.lock(wait=5):
            return self.has

    def save(self, token: Token) -> str:
        """Save the token for all machines and return its text."""
        with self.store.lock(wait=5):
            self.store.save(token)
        return token.access_token


class Relay:
    """A proxy to the server on a port of its own, which passes nothing on while `open` is not set.

    The next statement that contains `lose` loses its connection before the answer; without `notifies`, LISTEN hears
    nothing, as behind a pooler.
    """

    def __init__(self, port: int, *, notifies: bool = True) -> None:
        """Forward to `port` on loopback."""
        self._target, self._notifies = port, notifies
        self.open, self.lose = threading.Event(), b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        self.open.set()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, there = self._socket.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                cut = threading.Event()
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass, args=(*pair, pair[0] is there, cut), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool, cut: threading.Event) -> None:  # noqa: FBT001
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                self.open.wait()
                if answers and cut.is_set():
                    break
                if not answers and self.lose and self.lose in piece:
                    self.lose = b""
                    cut.set()
                if not self._notifies:
                    piece = piece.replace(b"listen tokencore", b"listen elsewhere")
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
