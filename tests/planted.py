"""Bugs to plant in a process: each breaks one rule of the renewal, and the model has to notice."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from tokencore import cache, issuance, keeper, limits, lock, record, store, tokens
from tokencore.errors import TokenStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime


def _always(_: lock.KeyLock) -> bool:
    return True


def no_lock() -> None:
    """Everyone believes to hold the lock."""

    @contextlib.contextmanager
    def hold(_: object, **__: object) -> Iterator[bool]:
        yield True

    lock.KeyLock.hold = hold  # type: ignore[assignment, method-assign]
    lock.KeyLock.intact = _always  # type: ignore[assignment, method-assign]


def lock_deleted() -> None:
    """Whoever releases the lock deletes its file, and nobody looks whether it still stands there."""
    hold = lock.KeyLock.hold

    @contextlib.contextmanager
    def deleting(self: lock.KeyLock, **how: Any) -> Iterator[bool]:  # noqa: ANN401 - passed on
        with hold(self, **how) as held:
            yield held
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    lock.KeyLock.hold = deleting  # type: ignore[method-assign]
    lock.KeyLock.intact = _always  # type: ignore[assignment, method-assign]


def no_second_look() -> None:
    """Under the lock nobody looks whether another process was quicker."""
    keeper.Keeper._serving = lambda *_: None  # type: ignore[method-assign]  # noqa: SLF001


def recorded_afterwards() -> None:
    """The attempt is written when its outcome is known."""
    begin = record.IssuanceRecord.begin
    record.IssuanceRecord.begin = lambda *_: 0  # type: ignore[method-assign]

    def complete(self: record.IssuanceRecord, _: int, attempt: record.Attempt) -> None:
        begin(self, attempt)

    record.IssuanceRecord.complete = complete  # type: ignore[assignment, method-assign]


def no_cool_down() -> None:
    """Nobody minds when the last request was."""
    limits.cooldown_until = lambda *_: None


def no_waiting() -> None:
    """The cool-down is not sat out before the second try."""
    keeper.Keeper._await = lambda *_: None  # type: ignore[method-assign]  # noqa: SLF001


def written_in_place() -> None:
    """Files are overwritten where they stand."""

    def write(path: str, content: bytes, **_: object) -> None:
        with open(path, "wb") as file:
            file.write(content)

    store.write_bytes = write


def old_deleted_first() -> None:
    """The old token goes before its successor is there."""
    save = cache.Cache.save

    def saved(self: cache.Cache, token: tokens.Token, now: datetime) -> None:
        for path in self.paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        save(self, token, now)

    cache.Cache.save = saved  # type: ignore[method-assign]


def thrown_away() -> None:
    """A token that cannot be saved is no token."""
    save = issuance.Issuance._save  # noqa: SLF001

    def saved(self: issuance.Issuance, token: tokens.Token, *args: Any, **how: Any) -> None:  # noqa: ANN401 - passed on
        save(self, token, *args, **how)
        if self._cache.is_only_here(token):
            raise TokenStoreError("The token could not be saved.")

    issuance.Issuance._save = saved  # type: ignore[method-assign]  # noqa: SLF001


def never_expired() -> None:
    """A token serves for as long as nobody rejects it."""
    tokens.Token.serves = lambda self, *_: self.rejected_at is None  # type: ignore[method-assign]


BUGS = {
    "no lock": no_lock,
    "lock file deleted": lock_deleted,
    "no second look": no_second_look,
    "recorded afterwards": recorded_afterwards,
    "no cool-down": no_cool_down,
    "no waiting": no_waiting,
    "written in place": written_in_place,
    "old one deleted first": old_deleted_first,
    "unsaved is thrown away": thrown_away,
    "never expired": never_expired,
}
