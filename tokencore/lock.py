"""The lock of a key: check, lock, check again, so that of all threads and processes one asks KIS.

`filelock` holds the native lock, which ends with its holder. Within a process one thread at a time
queues for it, and a forked child starts with a queue of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import store
from tokencore.store import PRIVATE_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


SHORTEST, LONGEST = 0.008, 0.1  # seconds between two looks at what another process is about to finish
SHARE = 0.2  # of the time waited so far: the wait then ends at most that much late, however many wait with us
_UNRECORDED, _UNFINISHED = 1.0, 2.0  # access times that no clock gives: the modification time is then an attempt's
_gates: dict[str, threading.Lock] = {}  # by path
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_gates.clear)  # a gate may be held by a thread that the child does not have


class KeyLock:
    """The lock of one key: whoever holds it is the only one of all processes to decide, issue and write.

    The file is never deleted or renamed. If someone else does, a second holder is possible; `intact`
    tells before anything is issued, and the issuance record is the second line.
    """

    def __init__(self, folder: str, key_fingerprint: str) -> None:
        """Name the lock file; nothing is opened yet."""
        self.path = os.path.join(folder, f"key-{key_fingerprint}.lock")

    @contextlib.contextmanager
    def hold(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the lock inside the block; yields False where it was not had within `wait` seconds.

        `give_up` is asked again and again while another process holds it: a waiter that finds what it
        waits for need not queue for the lock.

        Raises:
            TokenStoreError: the lock file cannot be opened or locked; nothing was changed.

        """
        gate = _gates.setdefault(self.path, threading.Lock())
        if not gate.acquire(timeout=wait):
            yield False
            return
        try:
            with self._among_processes(wait, give_up) as held:
                yield held
        finally:
            gate.release()

    @contextlib.contextmanager
    def _among_processes(self, wait: float, give_up: Callable[[], bool]) -> Iterator[bool]:
        from filelock import FileLock, Timeout  # 60 ms that a cached get must not pay

        # A new object each time: one made before a fork refuses to work in the child.
        lock = FileLock(
            self.path,
            mode=PRIVATE_FILE,
            fallback_to_soft=False,
            preserve_lock_file=True,
            on_acquired=self._remember,
        )
        try:
            held = _won(lambda: lock.acquire(blocking=False), Timeout, wait, give_up)
        except OSError as error:
            raise store.unusable(self.path, error) from None
        try:
            yield held
        finally:
            # A disk that refuses even this takes no token from the holder: the lock goes with its last reference.
            with contextlib.suppress(OSError):
                lock.release()

    def _remember(self, descriptor: int) -> None:
        self._held = os.fstat(descriptor)

    def intact(self) -> bool:
        """Whether the locked file still stands at its path, so that no second holder can exist."""
        try:
            return os.path.samestat(os.stat(self.path), self._held)
        except OSError:
            return False

    def mark_unrecorded(self, at: datetime, *, begun: bool) -> None:
        """Keep the time of an attempt in the lock file's times: all that can be written on a full disk.

        `begun` says that the record has its line, but not its outcome.
        """
        with contextlib.suppress(OSError):
            os.utime(self.path, (_UNFINISHED if begun else _UNRECORDED, at.timestamp()))

    def unrecorded(self) -> tuple[datetime, bool] | None:
        """When an attempt was made that the record could not take, and whether it has the attempt's line; or None."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        if found.st_atime not in (_UNRECORDED, _UNFINISHED):
            return None
        return datetime.fromtimestamp(found.st_mtime, UTC), found.st_atime == _UNFINISHED


@contextlib.contextmanager
def alone_in(folder: str, *, wait: float) -> Iterator[bool]:
    """Nobody else who asks for it works in `folder` inside the block, whichever key's lock they hold.

    The folder itself is locked, which leaves no file there. Yields False where it was not had within `wait` seconds.
    Where folders cannot be locked (Windows, network drives), or this one cannot be opened, nobody is kept waiting.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (ImportError, OSError):
        yield True
        return
    held = True
    try:
        with contextlib.suppress(OSError):  # the system knows no such lock there
            held = _won(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), BlockingIOError, wait)
        yield held
    finally:
        with contextlib.suppress(OSError):  # a child that was forked meanwhile has the descriptor as well
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def pause_after(waited: float) -> float:
    """How many seconds to sleep before the next look, for one who has waited so long already.

    A look costs 0.2 ms: 256 processes that look every 8 ms keep two cores from doing what they wait for.
    """
    return min(max(SHORTEST, SHARE * waited), LONGEST)


def _won(
    acquire: Callable[[], object], taken: type[Exception], wait: float, give_up: Callable[[], bool] = lambda: False
) -> bool:
    """Try for `wait` seconds, or until the waiter gives up; whether the lock is had."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(taken):
            acquire()
            return True
        waited = time.monotonic() - began
        if waited >= wait or give_up():
            return False
        time.sleep(pause_after(waited))
