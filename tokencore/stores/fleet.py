"""How this machine reaches the store of its fleet, and what it has read there lately."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time

from tokencore.config.market import digest
from tokencore.errors import TokenError, TokenStoreError
from tokencore.sealing import Sensitive
from tokencore.stores.database import PATIENCE, Database
from tokencore.stores.encryption import Seal
from tokencore.stores.file_store import FileDocument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokencore.config.settings import Settings
    from tokencore.stores.database import State

FRESH = 1.0  # seconds for which a row that was read without the lock counts as the present one
REST = 3.0  # seconds for which no process of the machine tries a store again that one could not reach
LOOK = 3.0  # seconds that a look may take, which writes nothing, not even that it was in vain
AWAY = 15.0  # seconds for which a process that only looks does not try again
SHALLOW, DEEP = 32, 1024  # attempts of a key that are read: of many keys at once, of all together
_fleets: dict[str, Fleet] = {}


class Fleet(Sensitive):
    """The store of the settings."""

    __slots__ = ("_address", "_away_until", "_down", "_read_at", "_rows", "_warned", "folder", "host", "seal")

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened yet.

        Raises:
            ConfigurationError: KIS_STORE_KEYS cannot be used, or the extra is not installed.

        """
        self._address = settings.store.get_secret_value() if settings.store else ""
        self.seal = Seal(key.get_secret_value() for key in settings.store_keys)
        self.folder = settings.token_dir
        self.host = f"{socket.gethostname()[:50]}:{digest(self.folder, length=6)}"  # process numbers collide
        self._down = FileDocument(os.path.join(self.folder, "key-store.json"))
        self._rows: dict[str, State] = {}
        self._read_at, self._away_until, self._warned = -FRESH, 0.0, False

    @classmethod
    def of(cls, settings: Settings) -> Fleet:
        """The same one for the same settings, so that what was read for one key serves the next."""
        own = [settings.token_dir, *(one.get_secret_value() for one in (settings.store, *settings.store_keys) if one)]
        name = digest(*own, length=16)
        if name not in _fleets:
            _fleets[name] = cls(settings)
        return _fleets[name]

    def connect(self, patience: float = PATIENCE) -> Database:
        """An open connection, to be closed by `with`; tried for so many seconds.

        Raises:
            TokenError: there is none in time, or another process has just found that out.

        """
        known, store = self._down.read(), digest(self._address, length=16)
        if known.get("store") == store and 0 <= time.time() - float(known["at"]) < REST:
            raise TokenStoreError(str(known.get("why")))
        try:
            session = Database(self._address, self.host).open(patience)
        except TokenStoreError as error:
            with contextlib.suppress(OSError):  # the next process tries by itself then
                if patience == PATIENCE:
                    self._down.write({"at": time.time(), "store": store, "why": str(error)})
            raise
        self._away_until = 0.0
        return session

    def look(self, name: str, others: Callable[[], Sequence[str]]) -> State | None:
        """The row, at most a second old, read together with `others`; None where the store is not reached."""
        now = time.monotonic()
        if now >= self._away_until and (now - self._read_at >= FRESH or name not in self._rows):
            names = list(dict.fromkeys([name, *others()]))
            try:
                with self.connect(LOOK) as session:
                    self._rows = session.read(names, max(SHALLOW, DEEP // len(names)))
                self._read_at = time.monotonic()
            except TokenError as error:
                self._rows, self._away_until = {}, time.monotonic() + AWAY
                self.warn(error)
        return self._rows.get(name)

    def forget(self) -> None:
        """Let the next look read anew."""
        self._read_at = -FRESH

    def warn(self, error: TokenError) -> None:
        """Once a process."""
        if not self._warned:
            self._warned = True
            logging.getLogger("tokencore").warning("%s Meanwhile this machine goes by its own files.", error)


def rotate(settings: Settings) -> list[str]:
    """Seal every row with the newest key, whatever it is about; the names of those that no key opens.

    Raises:
        TokenError: the store is not reached, or takes no changes.

    """
    fleet, failed = Fleet.of(settings), []
    with fleet.connect() as session:
        left = session.names()
        while left:
            for name, state in session.read(sorted(left), 0).items():
                renewed = fleet.seal.renewed(state.sealed)
                if renewed is None:
                    failed.append(name)
                if renewed is None or session.put(name, state.version, renewed):
                    left.remove(name)
    return failed
