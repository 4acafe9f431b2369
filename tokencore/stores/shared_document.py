"""A document that the machines of a fleet share."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tokencore.errors import TokenError
from tokencore.sealing import Sensitive, sealed_class
from tokencore.stores.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.config.settings import Settings
    from tokencore.stores.database import Database
    from tokencore.stores.file_store import FileDocument

POLL = 0.1  # seconds between two tries for the lock
PROMPT = 1.5  # seconds for a connection: an alert is to leave, with the fleet's copy or the machine's


@sealed_class(but=("lock",))
class SharedDocument(Sensitive):
    """A small JSON object in a row of the store, with a copy in this machine's file, which the lock makes.

    Its lock is a lease of a minute, in which the row changes for nobody else. Where the store is not reached, the
    machine's copy stands in.
    """

    __slots__ = ("_about", "_copied", "_local", "_row", "_session", "_settings", "_version", "place")

    def __init__(self, local: FileDocument, settings: Callable[[], Settings], name: str, *, copied: bool) -> None:
        """The document of that name; `copied` where readers are content with the machine's copy."""
        self.place, self._local, self._settings, self._copied = local.place, local, settings, copied
        self._row = f"document:{name}"
        self._about = {"document": self._row}
        self._session: Database | None = None
        self._version = 0

    def read(self) -> dict[str, Any]:
        """The object; empty where there is none that could be read."""
        if not self._copied:
            try:
                with Fleet.of(self._settings()).connect(PROMPT) as session:
                    return self._opened(session.read([self._row], 0)[self._row].sealed)
            except TokenError as error:
                Fleet.of(self._settings()).warn(error)
        return self._local.read()

    def write(self, content: dict[str, Any]) -> None:
        """Replace it, under the lock.

        Raises:
            OSError: the lease is over, or the store did not answer; what was there before still is.

        """
        if self._session:
            try:
                if not self._session.put(self._row, self._version, self._sealed(content)):
                    raise TimeoutError(None, "the lock on it is over")
            except TokenError:
                raise TimeoutError(None, "the fleet's store does not answer") from None
            self._version += 1
        self._local.write(content)

    @contextmanager
    def lock(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold its lock inside the block, over all machines; yields False where it was not acquired in time."""
        end, copied = time.monotonic() + wait, self._copied
        with self._local.lock(wait=wait, give_up=give_up) as held:
            leased = held
            try:
                if held:
                    self._session = Fleet.of(self._settings()).connect(PROMPT)
                    leased = self._leased(self._session, end, give_up)
            except TokenError as error:
                self._close()
                Fleet.of(self._settings()).warn(error)
            try:
                self._copied = copied or leased
                yield leased
            finally:
                self._copied = copied
                with suppress(TokenError):  # the lease ends by itself
                    if self._session and leased:
                        self._session.release(self._row, self._version)
                self._close()

    def _leased(self, session: Database, end: float, give_up: Callable[[], bool]) -> bool:
        while not (found := session.lease(self._row)):
            if not session.read([self._row], 0)[self._row].version:
                session.put(self._row, 0, self._sealed(self._local.read()))
            elif give_up() or time.monotonic() >= end:
                return False
            else:
                time.sleep(POLL)
        self._version = found[0]
        self._local.write(self._opened(found[1]))
        return True

    def _sealed(self, content: dict[str, Any]) -> str:
        return Fleet.of(self._settings()).seal.close({**self._about, "content": content})

    def _opened(self, sealed: str) -> dict[str, Any]:
        content = Fleet.of(self._settings()).seal.open(sealed, self._about).get("content") if sealed else {}
        return content if isinstance(content, dict) else {}

    def _close(self) -> None:
        if self._session:
            self._session.close()
            self._session = None
