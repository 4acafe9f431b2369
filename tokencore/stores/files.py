"""Files that no reader ever sees half of, and that nobody else can plant: private, whole, durable."""

from __future__ import annotations

import errno
import os
import stat
import time

from tokencore.errors import TokenStoreError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
SIZE_LIMIT = 1 << 20  # bytes; a token file has about 700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_FLAGS = _NO_LINKS | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_IN_PLACE = (errno.EBUSY, errno.EXDEV)  # a single file that is mounted, as Docker does, cannot be replaced

Signature = tuple[int, int, int]  # inode, size, mtime_ns: a difference means another content


def signature(path: str) -> Signature | None:
    """What identifies the present content of `path`; None without a file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_text(path: str, *, limit: int = SIZE_LIMIT, tail: bool = False) -> str | None:
    """The text of a regular file, or None when there is no file; see `read_bytes`."""
    content = read_bytes(path, limit, tail=tail)
    return None if content is None else content.decode(errors="replace" if tail else "strict").removeprefix("\ufeff")


def read_bytes(
    path: str, limit: int = SIZE_LIMIT, *, tail: bool = False, trusted: bool = True, links: bool = False
) -> bytes | None:
    """The content of a regular file, or None when there is no file; of a larger one the end, with `tail`.

    A FIFO or a device is not waited for, nor opened, which alone makes some act; `links` are refused or followed.

    Raises:
        ValueError: something is there, but no readable file of at most `limit` bytes.
        TokenStoreError: it is `trusted`, but belongs to another user or can be written by others.

    """
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=links).st_mode):
            raise ValueError("not a regular file")
        descriptor = os.open(path, os.O_RDONLY | (_FLAGS & ~_NO_LINKS if links else _FLAGS))
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
        _close(descriptor)
    if len(content) > limit and not tail:
        raise ValueError(f"more than {limit} bytes")
    return content


def refuse_strangers(path: str, found: os.stat_result | None = None) -> None:
    """Return where nobody but this user and root can have put `path` there, which was `found`; a folder without it.

    Raises:
        TokenStoreError: another user owns it or can write it, or one of the folders above.

    """
    if fault := stranger(path, found):
        why, command = fault
        raise TokenStoreError(
            f"{why}, so what is there may be planted: it is not used, and nothing was issued. Find out why, then run "
            f"`{command}`, or point KIS_TOKEN_DIR to a folder of your own."
        )


def refuse_planted(folder: str, parts: tuple[str, ...]) -> None:
    """Look in the same way at all files of `folder` with one of `parts` in their name.

    Raises:
        TokenStoreError: another user owns one of them or can write it, or the folder cannot be read.

    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise unusable(folder, error) from None
    for name in names:
        path = os.path.join(folder, name)
        if _has(name, parts) and not name.endswith((".tmp", ".aside")):
            found = _stat(path, follow=False)
            if found and stat.S_ISREG(found.st_mode):
                refuse_strangers(path, found)


def stranger(path: str, found: os.stat_result | None = None, *, lenient: bool = False) -> tuple[str, str] | None:
    """What lets others put `path` there, and the command that ends it; None where only this user and root can.

    As ssh asks of its keys. What is above a folder may be open where it is sticky, as /tmp is, and to a group of
    the owner's own, which many systems give to every user; where other programs write too, so may `path` itself.
    """
    if os.name != "posix":
        return None
    if found is not None:
        return _fault(path, found, _others(found) if lenient else OTHERS_WRITE)
    here, below = path, None
    while (step := _stat(here)) and (place := (step.st_dev, step.st_ino)) != below:
        if fault := _fault(here, step, OTHERS_WRITE if below is None and not lenient else _others(step)):
            return fault
        here, below = os.path.join(here, os.pardir), place  # the system's own way up, which no link deceives
    return None


def write_text(path: str, text: str, *, writer: str = "", durable: bool = True) -> None:
    """Replace the content of `path`; see `write_bytes`."""
    write_bytes(path, text.encode(errors="replace"), writer=writer, durable=durable)


def write_bytes(path: str, content: bytes, *, writer: str = "", durable: bool = True) -> None:
    """Replace the content of `path`; a crash at any step leaves the old or the new one whole.

    `writer` distinguishes those that hold different locks; what a killed one left is overwritten. A mounted
    file that cannot be replaced is written in place. What is not `durable` may be lost in a power cut, but costs no
    wait for the disk: it is for copies.

    Raises:
        OSError: it could not be written; the old content is untouched, and no temporary file is left.

    """
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}.{writer}.tmp")
    if os.path.lexists(draft):
        os.unlink(draft)
    try:
        _write_new(draft, content, durable=durable)
        os.replace(draft, path)
    except OSError as error:
        _unlink(draft)
        if error.errno not in _IN_PLACE:
            raise
        _overwrite(path, content)
    except BaseException:
        _unlink(draft)
        raise
    if durable:
        sync_folder(folder)


def remove(path: str) -> bool:
    """Remove a file durably; whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    sync_folder(os.path.dirname(path))
    return True


def set_aside(path: str) -> None:
    """Keep what is no file of ours as `<name>.aside`, readable by its owner only; nothing is thrown away at once.

    A file gets that as its second name and stays in its place until a successor replaces it there: it may be a good
    one that could not be read just now. Anything else is moved out of the way.
    """
    import contextlib  # not on the path of a cached token

    aside, spare = f"{path}.aside", f"{path}.{time.time_ns()}.aside"
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.lstat(path).st_mode):
            with contextlib.suppress(OSError):  # of a file that someone else owns, the owner keeps the mode
                os.chmod(path, PRIVATE_FILE)  # it may hold another key's token
            if not (os.path.exists(aside) and os.path.samefile(path, aside)):
                os.link(path, spare)
                with contextlib.suppress(OSError):  # a file does not replace a folder
                    os.replace(spare, aside)
            return
    for name in (aside, spare):  # a folder does not replace a file, nor a file it
        with contextlib.suppress(OSError):
            os.replace(path, name)
            return


def sync_folder(folder: str) -> None:
    """Make a rename in `folder` survive a power cut, where folders can be synced."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        _close(descriptor)


def make_private(folder: str, *, ours: tuple[str, ...] = ()) -> None:
    """Make `folder` and its missing parents for this user only, whatever the umask.

    One that holds nothing but names with one of `ours` in them is closed to others, if this user made it before, and
    hides itself from git.

    Raises:
        TokenStoreError: it cannot be made, is no folder, belongs to another user or can be written by others.

    """
    try:
        _make_folders(folder)
        found, names = os.stat(folder), os.listdir(folder)
        only_ours = all(_has(name, ours) for name in names)
        others_see = found.st_mode & 0o077 and not (names and found.st_mode & OTHERS_WRITE)
        if os.name == "posix" and only_ours and others_see and found.st_uid == os.geteuid():
            os.chmod(folder, PRIVATE_FOLDER)
    except OSError as error:
        raise unusable(folder, error) from None
    refuse_strangers(folder)
    if only_ours:
        _hide_from_git(folder)


def _hide_from_git(folder: str) -> None:
    try:
        _write_new(os.path.join(folder, ".gitignore"), b"*\n", durable=False)
    except OSError:  # it is there, or the folder is not to be written
        return


def _fault(path: str, found: os.stat_result, writers: int) -> tuple[str, str] | None:
    foreign = found.st_uid not in (os.geteuid(), 0)
    if not foreign and not found.st_mode & writers:
        return None
    import shlex  # only for a mistake

    path, sudo = os.path.realpath(path), "sudo " if foreign and os.geteuid() else ""
    why = f"belongs to another user (uid {found.st_uid})" if foreign else "can be written by other users"
    command = f"chown {os.geteuid()}" if foreign else "chmod go-w"
    return f"{path} {why}", f"{sudo}{command} {shlex.quote(path)}"


def _others(found: os.stat_result) -> int:
    if found.st_mode & stat.S_ISVTX:
        return 0
    return stat.S_IWOTH if found.st_gid == found.st_uid else OTHERS_WRITE


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any([part in name for part in parts])  # noqa: C419 - a list costs a tenth of a generator's calls


def _stat(path: str, *, follow: bool = True) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except OSError:
        return None


def unusable(path: str, error: OSError) -> TokenStoreError:
    """The error for a `path` in the token directory that the system refuses."""
    return TokenStoreError(
        f"The token directory cannot be used: {path}: {error.strerror or type(error).__name__}. Nothing was issued; "
        "fix its permissions or free space, or point KIS_TOKEN_DIR elsewhere.",
    )


def _make_folders(folder: str) -> None:
    """As `os.makedirs`, which gives the parents what the umask leaves."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    if parent != folder:
        _make_folders(parent)
    try:
        os.mkdir(folder, PRIVATE_FOLDER)
    except FileExistsError:
        if not os.path.isdir(folder):  # else another process was quicker
            raise


def _write_new(path: str, content: bytes, *, durable: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
    with open(os.open(path, flags, PRIVATE_FILE), "wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _overwrite(path: str, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | _FLAGS), "wb") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:  # what was only read, or is synced already, is not lost by it
        return


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return
