"""The lock that one process holds at a time, by way of the operating system, so that it ends with the process."""

from __future__ import annotations

import contextlib
import os

from tokencore.stores import permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT = 8  # in time-outs (KIS_TIMEOUT): enough for a holder that tries to connect four times, then waits for an answer
POLL = 0.05  # seconds between two tries for the lock
VIEW, MARK = "api_token.json", "token_issued_at.dat"  # how the names of files end on which every holder relies
OURS = ("key-", VIEW, MARK, "incidents.", "_krs_token.dat", "config.toml", "prefect", ".gitignore")


@contextlib.contextmanager
def hold(path: str, wait: float, give_up: Callable[[], bool], poll: float = POLL) -> Iterator[bool]:
    """Hold the lock file at `path` inside the block, waiting at most `wait` seconds; its folder is created if missing.

    It is tried every `poll` seconds; -1 for `wait` means to try for ever.

    Raises:
        TokenStoreError: the system refuses the lock, or others could have planted what is there; nothing was changed.
    """
    from filelock import FileLock, Timeout  # takes 60 ms, which a cached `get` must not pay

    folder, name = os.path.split(path)
    permissions.make_private(folder, ours=OURS)
    permissions.refuse_planted(folder, (name.removesuffix(".lock"), VIEW, MARK))
    # A new object each time: one made before a fork refuses to work in the child.
    lock = FileLock(path, mode=permissions.PRIVATE_FILE, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire(timeout=wait, poll_interval=poll, cancel_check=give_up)
        held = True
    except Timeout:
        held = False
    except OSError as error:
        raise permissions.unusable(path, error) from None
    try:
        yield held
    finally:
        with contextlib.suppress(OSError):  # the lock ends with its last reference
            lock.release()
