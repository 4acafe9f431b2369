"""The issuance record of a key as a file, a line for each attempt, which other programs read too."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.attempts import Attempt, Outcome, issued_within, parse, redated, render
from tokencore.stores import files
from tokencore.stores.permissions import refuse_strangers

if TYPE_CHECKING:
    from tokencore.stores.files import Signature

KEEP = 1024  # attempts: years of daily renewals, or days of KIS being down
# If the record cannot be written, the lock file gets the time of the last attempt as its modification time, marked by
# an access time that no clock gives. Each second of that after the first stands for one issue that the record lacks.
UNRECORDED, MANY = 1, 50
_log = logging.getLogger("tokencore")


class Record:
    """The record of a key in a file; if the disk takes no line, the times of the key's lock file keep the last attempt.

    Only the holder of the key's lock changes it.
    """

    def __init__(self, path: str, lock_path: str) -> None:
        """Set the paths; nothing is opened yet."""
        self._path, self._lock_path = path, lock_path
        self._known: tuple[Signature | None, list[Attempt]] | None = None

    def attempts(self) -> list[Attempt]:
        """Return all known attempts, oldest first; an unchanged file is not parsed again."""
        seen = files.signature(self._path)
        if self._known is None or self._known[0] != seen:
            refuse_strangers(os.path.dirname(self._path), reading=True)
            try:
                found = parse((files.read_bytes(self._path, tail=True) or b"").decode(errors="replace"))
            except ValueError:  # unreadable; an attempt was made when it last changed
                found = [Attempt(datetime.fromtimestamp(seen[2] / 1e9, UTC), Outcome.SENT)] if seen else []
            self._known = seen, found
        known = self._known[1]
        return [*known, *(one for one in self._unrecorded() if not known or one.at > known[-1].at)]

    def append(self, attempt: Attempt, *, strict: bool = False) -> None:
        """Add an attempt durably; see `write`."""
        self.write([*self.attempts(), attempt], strict=strict)

    def complete(self, begun: Attempt, attempt: Attempt) -> None:
        """Replace the line that was `begun` with `attempt`; append it if the disk did not take that line."""
        known = self.attempts()
        mine = bool(known) and (known[-1].outcome, known[-1].pid) == (Outcome.SENT, begun.pid)
        self.write([*(known[:-1] if mine else known), attempt])

    def redate(self, now: datetime) -> None:
        """Date attempts that a clock which was set back has left in the future as made `now`."""
        known = self.attempts()
        if (dated := redated(known, now)) != known:
            self.write(dated)

    def write(self, attempts: list[Attempt], *, strict: bool = False) -> None:
        """Replace the record; on a full disk the lock file's times, which can still be set, keep the last attempt.

        Raises:
            OSError: it could not be written, and `strict` forbids to make do with the lock file; or that failed too.
        """
        try:
            files.write_bytes(self._path, render(attempts[-KEEP:]).encode(errors="replace"), writer="record")
        except OSError as error:
            if strict:
                raise
            last, noted = attempts[-1], self._unrecorded()
            issued = issued_within(noted, last.at)
            issues = len(issued) + (last.outcome is Outcome.ISSUED)
            os.utime(self._lock_path, (UNRECORDED + issues, last.at.timestamp()))
            if not noted:  # said at the first step of a request, not at each
                _log.warning(
                    "The issuance record cannot be written (%s); the lock file keeps the time.", error.strerror
                )
        else:
            if self._unrecorded():
                os.utime(self._lock_path)
        self._known = None

    def _unrecorded(self) -> list[Attempt]:
        try:
            found = os.stat(self._lock_path)
        except OSError:
            return []
        if not UNRECORDED <= found.st_atime <= MANY or found.st_atime % 1:
            return []
        at, issues = datetime.fromtimestamp(found.st_mtime, UTC), int(found.st_atime) - UNRECORDED
        return [Attempt(at, Outcome.ISSUED)] * issues or [Attempt(at, Outcome.SENT)]
