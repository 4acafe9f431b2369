"""How this machine reaches its fleet's store, and what it has recently read there."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from tokencore.attempts import host_name
from tokencore.errors import TokenError, TokenStoreError
from tokencore.sealing import Sensitive, digest
from tokencore.stores import files
from tokencore.stores.database import PATIENCE, Database
from tokencore.stores.encryption import Seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencore.config.settings import Settings
    from tokencore.stores.database import State

FRESH = 1.0  # seconds for which a row that was read without the lock counts as current
REST = 3.0  # seconds for which no process of the machine tries again after one could not reach the store
LOOK = 3.0  # seconds to connect for a look, which writes nothing, not even that it failed
AWAY = 15.0  # seconds for which a process that only looks does not try again after a failure
SHALLOW, DEEP = 32, 1024  # attempts that a look reads: the least for each key, and roughly the total
_fleets: dict[str, Fleet] = {}


class Fleet(Sensitive):
    """The fleet's store that the settings name, as this machine reaches it.

    Attributes:
        folder: the machine's token directory.
        seal: what encrypts and decrypts the store's rows.
    """

    __slots__ = ("_away_until", "_host", "_read_at", "_rows", "_settings", "folder", "seal")

    def __init__(self, settings: Settings) -> None:
        """Take the store's keys from the settings; nothing is opened yet.

        Raises:
            ConfigurationError: KIS_STORE_KEYS cannot be used.
        """
        self._settings, self.folder = settings, settings.token_dir
        self.seal = Seal(key.get_secret_value() for key in settings.store_keys)
        self._host = host_name(self.folder)
        self._rows: dict[str, State] = {}
        self._read_at, self._away_until = -FRESH, 0.0

    @classmethod
    def of(cls, settings: Settings) -> Fleet:
        """Return the same fleet for the same settings, so that what was read for one key serves the next."""
        own = [settings.token_dir, *(one.get_secret_value() for one in (settings.store, *settings.store_keys) if one)]
        name = digest(*own, length=16)
        if name not in _fleets:
            _fleets[name] = cls(settings)
        return _fleets[name]

    def connect(self, patience: float = PATIENCE) -> Database:
        """Return an open connection, to be closed by `with`, retrying for `patience` seconds.

        Raises:
            TokenError: there is no connection in time, or another process has just failed to get one.
        """
        address = self._settings.store.get_secret_value() if self._settings.store else ""
        down = os.path.join(self.folder, f"key-store-{digest(address, length=16)}.down")
        found, why = files.signature(down), None
        if found and 0 <= time.time() - found[2] / 1e9 < REST:
            with suppress(ValueError):  # not a note of ours: this process tries by itself
                why = files.read_text(down)
        if why:
            raise TokenStoreError(why)
        try:
            session = Database(address, self._host, patience)
        except TokenStoreError as error:
            with suppress(OSError):  # without the note, the next process tries by itself
                if patience == PATIENCE:
                    files.write_bytes(down, str(error).encode(), durable=False)
            raise
        self._away_until = 0.0
        return session

    def look(self, name: str) -> State | None:
        """Return the row, up to a second old, read with all rows of the settings; None soon after a failure.

        Raises:
            TokenError: the store cannot be reached.
        """
        now = time.monotonic()
        if now >= self._away_until and (now - self._read_at >= FRESH or name not in self._rows):
            names = list({name, *self.rows()})
            try:
                with self.connect(LOOK) as session:
                    self._rows = session.read(names, max(SHALLOW, DEEP // len(names)))
                self._read_at = time.monotonic()
            except TokenError:
                self._rows, self._away_until = {}, time.monotonic() + AWAY
                raise
        return self._rows.get(name)

    def forget(self) -> None:
        """Make the next look read the rows again."""
        self._read_at = -FRESH

    def rows(self) -> set[str]:
        """Return the names of the rows of all keys in the settings."""
        return {market.key_name for market in self._settings.all_markets() if market.app_key}

    def follower_lock(self, rows: Iterable[str]) -> str:
        """Return the lock file of these rows' follower; programs with other settings have a follower of their own."""
        return os.path.join(self.folder, f"key-follower-{digest(*sorted(rows), length=16)}.lock")


def rotate(settings: Settings) -> list[str]:
    """Encrypt every row again with the newest key, and return the names of the rows that no key decrypts.

    Raises:
        TokenError: the store cannot be reached, or accepts no changes.
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
