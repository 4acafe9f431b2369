"""The files of the token directory, written so that no reader ever sees half of one.

Every write goes to a new 0600 file in the same folder, is fsynced, renamed over the old one, and the
folder is fsynced. Every writer of a key's files holds that key's lock (see `lock`).
"""

from __future__ import annotations

import errno
import os
import stat
import time

from tokencore.errors import TokenStoreError

TYPE_CHECKING = False

SIZE_LIMIT = 65_536  # bytes; a token file has about 700
PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700
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


def changed_at(path: str) -> float | None:
    """When the content of a regular file was last changed, in epoch seconds; None where there is no such file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None


def read_text(path: str) -> str | None:
    """The text of a regular file, or None when there is no file.

    Raises:
        ValueError: something is there, but no readable file of at most `SIZE_LIMIT` bytes of UTF-8.

    """
    content = read_bytes(path, SIZE_LIMIT)
    return None if content is None else content.decode().removeprefix("\ufeff")  # the codec for that mark costs 0.3 ms


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
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        content, room = b"", min(limit, found.st_size) + 1  # what is asked for is allocated
        while len(content) <= limit and (piece := os.read(descriptor, room)):
            content += piece
    except OSError as error:
        raise ValueError(error.strerror) from None
    finally:
        _close(descriptor)
    if len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return content


def _close(descriptor: int) -> None:
    """Close what was only read or is synced already: a failure of the call itself takes nothing away."""
    try:
        os.close(descriptor)
    except OSError:
        return


def write_text(path: str, text: str, *, temporary: str) -> None:
    """Replace the content of `path` durably, as `write_bytes` does."""
    write_bytes(path, text.encode(), temporary=temporary)


def write_bytes(path: str, content: bytes, *, temporary: str) -> None:
    """Replace the content of `path` durably; a crash at any step leaves the old or the new one whole.

    `temporary` distinguishes writers that hold different locks; what a killed one of the same lock left is reused.

    Raises:
        OSError: it could not be written, and the old content is untouched; or it was, but a power cut could undo it.
            No temporary file is left.

    """
    import contextlib  # not on the path of a cached token

    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}.{temporary}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, PRIVATE_FILE), "wb") as file:
            file.write(content)
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
        _close(descriptor)


def set_aside(path: str) -> None:
    """Keep what is no token file of ours as `<name>.aside`, readable by its owner only; nothing is thrown away at once.

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


def private_folder(folder: str) -> None:
    """Make `folder` if need be, for its owner only.

    Raises:
        TokenStoreError: it cannot be made, or is no folder.

    """
    import contextlib  # not on the path of a cached token

    try:
        os.makedirs(folder, _PRIVATE_FOLDER, exist_ok=True)
        if os.name == "posix" and os.stat(folder).st_mode & 0o077 and all(map(_ours, os.listdir(folder))):
            with contextlib.suppress(PermissionError):  # a mounted volume's, whose mode is its owner's affair
                os.chmod(folder, _PRIVATE_FOLDER)  # but never a folder that others use too, such as /tmp
    except OSError as error:
        raise unusable(folder, error) from None


def _ours(name: str) -> bool:
    name = name.removeprefix(".")  # of a draft that a killed process left
    parts = ("api_token.json", "token_issued_at.dat", "_krs_token.dat")
    return name.startswith(("key-", "incidents.", "config.toml", "prefect")) or any(part in name for part in parts)


def unusable(path: str, error: OSError) -> TokenStoreError:
    """The error for a `path` in the token directory that the system refuses to serve."""
    return TokenStoreError(
        f"The token directory cannot be used: {path}: {error.strerror or error}. Nothing was issued; "
        "mend its permissions or free space, or point KIS_TOKEN_DIR elsewhere.",
    )
