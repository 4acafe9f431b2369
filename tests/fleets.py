"""A fleet's store on a PostgreSQL server of the tests, and machines that share it: folders with their own tokens."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from builders import KEY, SECRET, in_child, make_market
from cryptography.fernet import Fernet
from pydantic import SecretStr
from running import until

from tokencore.renewer import Renewer
from tokencore.stores import database
from tokencore.stores.shared_store import SharedStore

if TYPE_CHECKING:
    from postgres import Postgres

    from tokencore.attempts import Attempt
    from tokencore.sandbox import Sandbox
    from tokencore.stores.shared_store import Fence
    from tokencore.tokens import Token

MINUTE, TIMEOUT = 0.5, 1.0  # seconds: KIS's minute, and KIS_TIMEOUT; what was sent and never answered is over after 2.5


class Fleet(NamedTuple):
    """Its server, its address for the machines' role, and its Fernet key."""

    server: Postgres
    url: str
    key: str

    @classmethod
    def made(cls, server: Postgres) -> Fleet:
        """Empty tables, of the superuser."""
        server.sql("drop table if exists tokencore_key, tokencore_attempt")
        database.make_tables(server.url())
        return cls(server, server.url(), Fernet.generate_key().decode())

    def environment(self, folder: Path) -> dict[str, str]:
        """The settings of a machine with that token directory."""
        return {"KIS_STORE": self.url, "KIS_STORE_KEYS": self.key, "KIS_TOKEN_DIR": str(folder)}

    def numbers(self, folder: Path, **more: object) -> dict[str, object]:
        """The same for `make_market`, and more of them."""
        return {"store": SecretStr(self.url), "store_keys": [SecretStr(self.key)], "token_dir": str(folder), **more}

    def behind(self, relay: Relay) -> Fleet:
        """The same store, reached through the relay."""
        return self._replace(url=self.url.replace(f":{self.server.port}/", f":{relay.port}/"))


class Machine:
    """A machine of the fleet: its own folder, the same key as the others.

    A process of it that is started with a fault `at` a point of a renewal (`begun`, `departed` or `answered`) sends
    itself that signal; without one it makes the file `reached` and waits for the file `go`.
    """

    def __init__(self, fleet: Fleet, folder: Path, gateway: Sandbox, *, key: str = KEY, **numbers: Any) -> None:  # noqa: ANN401 - fields of the settings
        """Nothing is opened yet; `numbers` as of `make_market`."""
        folder.mkdir(parents=True, mode=0o700)
        self.folder = folder
        usual = {"issue_interval": MINUTE, "timeout": TIMEOUT, **numbers}
        self.market = make_market("us", **fleet.numbers(folder, **usual)).given(lambda: (key, SECRET), gateway.url)
        self.store = _Stopping(self.market, lambda: ["us"])
        own = {"KIS_APP_KEY": key, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": gateway.url}
        self.environment = own | fleet.environment(folder)

    def get(self) -> str:
        """What a program on it gets."""
        token = self.store.read()[0]
        if token is None or not token.serves(datetime.now(UTC), 0):
            renewer = Renewer([self.market], self.store)
            token = renewer.obtain(lambda found: found.serves(datetime.now(UTC), 0), "get us")[0]
        return token.access_token

    def start(self, at: str = "", fault: int = 0) -> int:
        """The same in a process of its own, whose token is in the file `got` then, unless it meets a fault."""

        def program() -> None:
            self.store.at, self.store.fault = at, fault
            (self.folder / "got").write_text(self.get())
            for thread in threading.enumerate():  # as at the end of a program
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()

        return in_child(program)

    @property
    def got(self) -> str:
        """What the process got; empty where nothing."""
        path = self.folder / "got"
        return path.read_text() if path.exists() else ""


class _Stopping(SharedStore):
    at, fault = "", 0

    def reach(self, point: str) -> None:
        if point == self.at and self.fault:
            os.kill(os.getpid(), self.fault)
        elif point == self.at:
            folder = Path(self._local.folder)
            (folder / "reached").touch()
            until((folder / "go").exists)

    def begin(self, attempt: Attempt) -> Fence | None:
        fence = super().begin(attempt)
        if fence:
            self.reach("begun")
        return fence

    def depart(self, fence: Fence) -> bool:
        may = super().depart(fence)
        self.reach("departed")
        return may

    def finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        self.reach("answered")
        super().finish(fence, attempt, token)


class Relay:
    """A way to the server on a port of its own that stands still while `open` is not set.

    Where the next statement has the words `lose`, its connection is cut before its answer; without `notifies` LISTEN
    hears nothing, as behind poolers.
    """

    def __init__(self, port: int, *, notifies: bool = True) -> None:
        """Lead to `port`."""
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
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass, args=(*pair, pair[0] is there), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:  # noqa: FBT001
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                self.open.wait()
                if answers and self.lose == b"now":
                    self.lose = b""
                    break
                if not answers and self.lose and self.lose in piece:
                    self.lose = b"now"
                if not self._notifies:
                    piece = piece.replace(b"listen tokencore", b"listen elsewhere")
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
