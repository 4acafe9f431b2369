"""Follows the fleet for a machine: what another one renews, rejects or imports is in this one's files within a second.

One thread in one process of the machine does this, the one that holds the follower's lock. It listens for the server's
notifications if a test notification comes back; if not, as behind PgBouncer, it polls ten times a second.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from tokencore.errors import TokenError
from tokencore.stores.lock import hold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tokencore.stores.database import Database
    from tokencore.stores.fleet import Fleet
    from tokencore.stores.shared_store import SharedStore

STAND_BY = 2.0  # seconds between two tries to become the follower
POLL = 0.1  # seconds between two looks if notifications do not come through, or a lock is not free
QUIET = 10.0  # seconds after which the versions are compared although no notification came
PAUSE = 1.0  # seconds between two tries to reach the store
_log = logging.getLogger("tokencore")
_started = 0  # the id of the process that has started its thread


class Follower:
    """Keeps the files of some keys up to date with the fleet's store."""

    def __init__(self, fleet: Fleet, stores: Mapping[str, SharedStore]) -> None:
        """Take the stores to keep up to date, by the names of their rows."""
        self._fleet, self._stores = fleet, stores
        self._lost = False  # whether the store is out of reach, which was logged

    def run(self) -> None:
        """Wait until no other process follows, then follow, whatever happens to the store; never returns.

        Raises:
            TokenStoreError: the lock cannot be used.
        """
        with hold(self._fleet.follower_lock(self._stores), -1, lambda: False, STAND_BY):
            while True:
                try:
                    with self._fleet.connect() as session:
                        self._follow(session)
                except TokenError as error:
                    _log.log(logging.DEBUG if self._lost else logging.WARNING, "%s The follower keeps trying.", error)
                    self._lost = True
                time.sleep(PAUSE)

    def _follow(self, session: Database) -> None:
        hears, names, look_at = _hears(session), list(self._stores), 0.0
        known, due = dict[str, int](), set(names)  # also rows that the store lacks: it gets ours
        while True:
            if not hears or time.monotonic() >= look_at:
                look_at, now = time.monotonic() + QUIET, session.versions(names)
                due |= {name for name, version in now.items() if known.get(name) != version}
                known = now
            due = {name for name in due if not self._stores[name].mirror(session)}
            if self._lost:
                _log.warning("The fleet's store can be reached again, and this machine follows it.")
                self._lost = False
            if hears:
                due |= session.heard(POLL if due else QUIET / 4) & self._stores.keys()
            else:
                time.sleep(POLL)


def _hears(session: Database) -> bool:
    """Whether notifications come through: a pooler accepts LISTEN, but delivers nothing."""
    mine = uuid.uuid4().hex
    session.execute("listen tokencore")
    session.execute("select pg_notify('tokencore', %(mine)s)", mine=mine)
    end = time.monotonic() + PAUSE
    while time.monotonic() < end:
        if mine in session.heard(POLL):
            return True
    return False


def start(make: Callable[[], Follower]) -> None:
    """Start a follower thread in this process, unless it has one; the thread calls `make`."""
    global _started  # noqa: PLW0603 - a forked child has none of its parent's threads
    if _started == os.getpid():
        return

    def run() -> None:
        try:
            make().run()
        except Exception as error:  # noqa: BLE001 - the files are still renewed by whoever needs a token
            detail = error if isinstance(error, TokenError) else type(error).__name__
            _log.warning("This machine does not follow its fleet: %s", detail)

    with suppress(RuntimeError):  # the system has no thread left; the next look tries again
        threading.Thread(target=run, name="tokencore follower", daemon=True).start()
        _started = os.getpid()
