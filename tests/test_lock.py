"""A lock that one process at a time holds and its holder's death frees."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from builders import ended, in_child, killed

from tokencore.errors import TokenStoreError
from tokencore.lock import KeyLock


@pytest.fixture
def lock(folder: Path) -> KeyLock:
    """The lock of a key."""
    return KeyLock(str(folder), "0123456789abcdef")


def test_one_process_at_a_time_holds_the_lock(folder: Path, lock: KeyLock) -> None:
    """Eight processes that each add to a number under the lock lose no addition."""
    number = folder / "number"
    number.write_text("0", encoding="utf-8")

    def add() -> None:
        for _ in range(25):
            with lock.hold(wait=30) as held:
                assert held
                number.write_text(str(int(number.read_text(encoding="utf-8")) + 1), encoding="utf-8")

    assert [ended(child) for child in [in_child(add) for _ in range(8)]] == [0] * 8
    assert number.read_text(encoding="utf-8") == "200"


def hold_in_child(lock: KeyLock) -> int:
    """A process that holds the lock until it is killed."""
    ready, told = os.pipe()

    def work() -> None:
        with lock.hold(wait=5) as held:
            os.write(told, b"1" if held else b"0")
            time.sleep(60)

    child = in_child(work)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    os.close(told)
    return child


def test_a_killed_holder_frees_the_lock(lock: KeyLock) -> None:
    """After `kill -9` of its holder the lock is had at once, and its file was neither deleted nor replaced."""
    child = hold_in_child(lock)
    inode = Path(lock.path).stat().st_ino
    with lock.hold(wait=0) as held:
        assert not held
    killed(child)
    start = time.monotonic()
    with lock.hold(wait=5) as held:
        assert held
        assert lock.intact()
    assert time.monotonic() - start < 0.5
    assert Path(lock.path).stat().st_ino == inode


def test_waiting_ends_with_the_time_or_with_the_reason_to_wait(lock: KeyLock) -> None:
    """A waiter gives up after its time, or within milliseconds of finding what it waits for."""
    child = hold_in_child(lock)
    start, found = time.monotonic(), threading.Event()
    with lock.hold(wait=0.2) as held:
        assert not held
    assert 0.2 <= time.monotonic() - start < 1
    threading.Timer(0.1, found.set).start()
    start = time.monotonic()
    with lock.hold(wait=30, give_up=found.is_set) as held:
        assert not held
    assert 0.09 <= time.monotonic() - start < 1
    killed(child)


def test_the_lock_survives_a_fork_of_its_holder(lock: KeyLock) -> None:
    """A child that is forked while the lock is held neither has it, nor frees it by its end, nor keeps it."""
    with lock.hold(wait=5):

        def work() -> None:
            with lock.hold(wait=0) as held:
                assert not held

        assert ended(in_child(work)) == 0
        assert ended(in_child(work)) == 0  # the first one's end has freed nothing
        survivor = in_child(lambda: time.sleep(60))
    with lock.hold(wait=1) as held:
        assert held
    killed(survivor)


def test_a_deleted_or_replaced_lock_file_is_noticed(lock: KeyLock) -> None:
    """Whoever holds the lock learns that a second holder has become possible."""
    with lock.hold(wait=1):
        assert lock.intact()
        os.unlink(lock.path)
        assert not lock.intact()
        Path(lock.path).touch()
        assert not lock.intact()
    with lock.hold(wait=1):
        assert lock.intact()


def test_the_lock_is_free_again_after_an_error(lock: KeyLock) -> None:
    """An exception inside the block passes through, and the next one has the lock."""
    with pytest.raises(KeyError), lock.hold(wait=1):
        raise KeyError
    with lock.hold(wait=0) as held:
        assert held


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_an_unlocking_that_fails_is_no_error_and_leaves_no_lock(lock: KeyLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder goes on with what it has, and this process and others have the lock again at once."""
    import fcntl

    flock = fcntl.flock
    failed: list[int] = []

    def broken(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN and not failed:
            failed.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", broken)
    with lock.hold(wait=1) as held:
        assert held
    assert failed

    def again() -> None:
        with lock.hold(wait=1) as held:
            assert held

    again()
    assert ended(in_child(again)) == 0


def test_the_lock_file_is_private_and_stays_empty(lock: KeyLock) -> None:
    """The file is 0600 under umask 0 and holds nothing."""
    before = os.umask(0)
    try:
        with lock.hold(wait=1):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(lock.path).stat().st_mode) == 0o600
    assert Path(lock.path).read_bytes() == b""


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_impossible_lock_is_one_sentence(lock: KeyLock, folder: Path, kind: str) -> None:
    """A lock file that cannot be opened is a `TokenStoreError`, not a wait and not a crash."""
    if kind == "folder":
        os.mkdir(lock.path)
    else:
        os.symlink(folder / "elsewhere", lock.path)
    with pytest.raises(TokenStoreError, match=r"lock.*Nothing was issued"), lock.hold(wait=5):
        pass


@pytest.mark.parametrize("begun", [False, True])
def test_an_attempt_without_a_record_is_kept_in_the_lock_file(begun: bool, lock: KeyLock) -> None:  # noqa: FBT001 - a case
    """The time survives further locking, also by another process, and a fresh lock file tells of none."""
    with lock.hold(wait=1):
        assert lock.unrecorded() is None
        at = datetime.now(UTC).replace(microsecond=0)
        lock.mark_unrecorded(at, begun=begun)

    def work() -> None:
        with lock.hold(wait=1):
            assert lock.unrecorded() == (at, begun)

    assert ended(in_child(work)) == 0
    assert lock.unrecorded() == (at, begun)
    assert KeyLock(os.path.dirname(lock.path), "another").unrecorded() is None
