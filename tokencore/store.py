"""The files of the token directory: token files, written so that no reader ever sees half of one, and the key's lock.

Every write goes to a new 0600 file in the same folder, is fsynced, renamed over the old one, and the
folder is fsynced. Every writer of a key's files holds that key's lock: check, lock, check again. The
reading half imports nothing heavy; the lock imports `filelock` when it is first taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from datetime import UTC, datetime

from tokencore.errors import TokenStoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_UNRECORDED = 1.0  # an access time that no clock gives: the modification time is then an attempt's
SIZE_LIMIT = 65_536  # bytes; a token file has about 700
POLL = 0.008  # seconds between looks at a lock that another process holds
_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

Signature = tuple[int, int, int]  # inode, size, mtime_ns: a difference means another content


def token_file(folder: str, prefix: str) -> str:
    """The path of the token file with the market's `prefix`, such as `us_`."""
    return os.path.join(folder, f"{prefix}api_token.json")


def signature(path: str) -> Signature | None:
    """What identifies the present content of `path`, to be compared for difference only; None without a file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_text(path: str) -> str | None:
    """The text of a regular file, or None when there is no file.

    Raises:
        ValueError: something is there, but no readable file of at most `SIZE_LIMIT` bytes of UTF-8.

    """
    content = read_bytes(path, SIZE_LIMIT)
    return None if content is None else content.decode("utf-8-sig")


def read_bytes(path: str, limit: int) -> bytes | None:
    """The content of a regular file, or None when there is no file.

    Raises:
        ValueError: something is there, but no readable file of at most `limit` bytes.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(error.strerror) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        content = b""
        while len(content) <= limit and (piece := os.read(descriptor, limit + 1 - len(content))):
            content += piece
    except OSError as error:
        raise ValueError(error.strerror) from None
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return content


def write_text(path: str, text: str, *, temporary: str) -> None:
    """Replace the content of `path` durably; a crash at any step leaves the old or the new one whole.

    `temporary` distinguishes writers that hold different locks; what a killed one of the same lock left is reused.

    Raises:
        OSError: it could not be written, and the old content is untouched; or it was, but a power cut could undo it.
            No temporary file is left.

    """
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}.{temporary}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, _PRIVATE_FILE), "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Make a rename in `folder` survive a power cut; file systems that cannot sync folders are left alone."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def set_aside(path: str) -> None:
    """Move what is no token file of ours out of the way, under a name of its own; nothing is thrown away at once.

    The last one set aside is kept as `<name>.aside`, readable by its owner only.
    """
    with contextlib.suppress(OSError):  # of a file that someone else owns, the owner keeps the mode
        if stat.S_ISREG(os.lstat(path).st_mode):
            os.chmod(path, _PRIVATE_FILE)  # it may hold another key's token
    for aside in (f"{path}.aside", f"{path}.{time.time_ns()}.aside"):  # a folder does not replace a file, nor a file it
        with contextlib.suppress(OSError):
            os.replace(path, aside)
            return


def private_folder(folder: str) -> None:
    """Make `folder` if need be, for its owner only.

    Raises:
        TokenStoreError: it cannot be made, or is no folder.

    """
    try:
        os.makedirs(folder, _PRIVATE_FOLDER, exist_ok=True)
        if os.name == "posix" and os.stat(folder).st_mode & 0o077 and all(map(_ours, os.listdir(folder))):
            with contextlib.suppress(PermissionError):  # a mounted volume's, whose mode is its owner's affair
                os.chmod(folder, _PRIVATE_FOLDER)  # but never a folder that others use too, such as /tmp
    except OSError as error:
        raise unusable(folder, error) from None


def _ours(name: str) -> bool:
    name = name.removeprefix(".")  # of a draft that a killed process left
    parts = ("_api_token.json", "_token_issued_at.dat", "_krs_token.dat")
    return name == "config.toml" or name.startswith("key-") or any(part in name for part in parts)


def unusable(path: str, error: OSError) -> TokenStoreError:
    """The error for a `path` in the token directory that the system refuses to serve."""
    return TokenStoreError(
        f"The token directory cannot be used: {path}: {error.strerror or error}. Nothing was issued; "
        "mend its permissions or free space, or point KIS_TOKEN_DIR elsewhere.",
    )


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

        `give_up` is asked every few milliseconds while another process holds it: a waiter that finds
        what it waits for need not queue for the lock.

        Raises:
            TokenStoreError: the lock file cannot be opened or locked; nothing was changed.

        """
        from filelock import FileLock, Timeout  # 60 ms that a cached get must not pay

        # A new object each time: one made before a fork refuses to work in the child.
        lock = FileLock(
            self.path,
            wait,
            _PRIVATE_FILE,
            poll_interval=POLL,
            fallback_to_soft=False,
            preserve_lock_file=True,
            on_acquired=self._remember,
        )
        try:
            lock.acquire(cancel_check=give_up)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise unusable(self.path, error) from None
        try:
            yield True
        finally:
            lock.release()

    def _remember(self, descriptor: int) -> None:
        self._held = os.fstat(descriptor)

    def intact(self) -> bool:
        """Whether the locked file still stands at its path, so that no second holder can exist."""
        try:
            return os.path.samestat(os.stat(self.path), self._held)
        except OSError:
            return False

    def mark_unrecorded(self, at: datetime) -> None:
        """Keep the time of an attempt in the lock file's times: all that can be written on a full disk."""
        with contextlib.suppress(OSError):
            os.utime(self.path, (_UNRECORDED, at.timestamp()))

    def unrecorded(self) -> datetime | None:
        """When an attempt was made that the record could not take, or None."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return datetime.fromtimestamp(found.st_mtime, UTC) if found.st_atime == _UNRECORDED else None
