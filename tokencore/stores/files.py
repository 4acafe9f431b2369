"""Reads files up to a size limit, and replaces them whole, so that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time

from tokencore.stores.permissions import PRIVATE_FILE, refuse_strangers

SIZE_LIMIT = 1 << 20  # bytes; a token file has about 700
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_IN_PLACE = (errno.EBUSY, errno.EXDEV)  # a single mounted file, as in Docker, cannot be replaced

Signature = tuple[int, int, int]  # inode, size, mtime_ns: a difference means other content


def signature(path: str) -> Signature | None:
    """Return what identifies the present content of `path`; None if there is no file."""
    try:
        return _signature(os.stat(path, follow_symlinks=False))
    except OSError:
        return None


def read_text(path: str) -> str | None:
    """Return the text of a regular file, or None if there is no file; see `read_bytes`."""
    content = read_bytes(path)
    return None if content is None else content.decode()


def read_bytes(path: str, limit: int = SIZE_LIMIT, *, tail: bool = False, trusted: bool = True) -> bytes | None:
    """Return the content of a regular file, or None if there is no file; with `tail`, the end of a larger one.

    A FIFO or device is never opened, because that alone may block or make a device act; links are not followed.

    Raises:
        ValueError: something is there, but no readable file of at most `limit` bytes.
        TokenStoreError: the file has to be `trusted`, but belongs to another user or can be written by others.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError("not a regular file")
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(error.strerror) from None
    try:
        found = os.fstat(descriptor)
        if trusted:
            refuse_strangers(path, found)
        if tail and found.st_size > limit:
            os.lseek(descriptor, -limit, os.SEEK_END)
        content = b""
        while len(content) <= limit and (piece := os.read(descriptor, limit + 1 - len(content))):
            content += piece
    except OSError as error:
        raise ValueError(error.strerror) from None
    finally:
        with contextlib.suppress(OSError):  # the file was only read, so nothing is lost
            os.close(descriptor)
    if len(content) > limit and not tail:
        raise ValueError(f"more than {limit} bytes")
    return content


def write_bytes(path: str, content: bytes, *, writer: str = "", durable: bool = True) -> Signature:
    """Replace the content of `path`, and return its signature; a crash at any step leaves the old or the new one whole.

    `writer` tells apart writers that hold different locks; what a killed one left is removed. Only a mounted file,
    which cannot be replaced, is written in place. A write that is not `durable`, as of a copy, does not wait for the
    disk, and may be lost in a power cut.

    Raises:
        OSError: it could not be written, and the old content stays; or the disk did not confirm the new one. No
            temporary file is left.
    """
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}.{writer}.tmp")
    if os.path.lexists(draft):
        os.unlink(draft)
    try:
        written = _write(draft, os.O_CREAT | os.O_EXCL, content, durable=durable)
        os.replace(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        if not isinstance(error, OSError) or error.errno not in _IN_PLACE:
            raise
        written = _write(path, 0, content, durable=True)
    if durable:
        sync_folder(folder)
    return written


def remove(path: str) -> bool:
    """Remove a file durably; return whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    sync_folder(os.path.dirname(path))
    return True


def set_aside(path: str) -> None:
    """Keep what is not a file of ours as `<name>.aside`, readable by its owner only, replacing an earlier one.

    A file also stays in place until its successor is written: it may be a good one that could not be read just now.
    """
    aside, spare = f"{path}.aside", f"{path}.{time.time_ns()}.aside"
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            os.replace(path, spare)
        elif not (os.path.exists(aside) and os.path.samefile(path, aside)):
            with contextlib.suppress(OSError):  # only the file's owner can change its mode
                os.chmod(path, PRIVATE_FILE)  # it may hold another key's token
            os.link(path, spare)
        os.replace(spare, aside)  # fails between a file and a folder: then the longer name stays


def sync_folder(folder: str) -> None:
    """Make a rename in `folder` survive a power cut, where folders can be synced.

    Raises:
        OSError: the disk does not confirm it; the rename is done, but a power cut may undo it.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        with contextlib.suppress(OSError):  # it is synced already
            os.close(descriptor)


def _write(path: str, flags: int, content: bytes, *, durable: bool) -> Signature:
    descriptor, rest = os.open(path, os.O_WRONLY | _FLAGS | flags, PRIVATE_FILE), content
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if not flags:  # in place: what was there may have been longer
            os.ftruncate(descriptor, len(content))
        if durable:
            os.fsync(descriptor)
        return _signature(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _signature(found: os.stat_result) -> Signature:
    return found.st_ino, found.st_size, found.st_mtime_ns
