"""Refuses files and folders that other users own or can write, since they may be planted; ssh refuses such keys too."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from tokencore.errors import TokenStoreError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def stranger(path: str, found: os.stat_result | None = None, *, lenient: bool = False) -> tuple[str, str] | None:
    """Return why others could have planted `path`, and the command that fixes it; None if only this user or root could.

    With its stat result as `found`, `path` is checked alone; else it is a folder, and those above it are checked too.
    Those may be writable by others if they are sticky, like /tmp, and by the owner's private group, which many systems
    give to every user. `lenient` allows the same for `path` itself, where other programs write too.
    """
    if found is not None:
        return _fault(path, found, _others(found) if lenient else OTHERS_WRITE)
    here, below = path, None
    while (step := _stat(here)) and (place := (step.st_dev, step.st_ino)) != below:
        if fault := _fault(here, step, OTHERS_WRITE if below is None and not lenient else _others(step)):
            return fault
        here, below = os.path.join(here, os.pardir), place  # resolved by the system, so that no link misleads
    return None


def refuse_strangers(path: str, found: os.stat_result | None = None, *, reading: bool = False) -> None:
    """Check `path` with `stranger`, and raise an error if that finds a fault.

    For `reading`, an open folder of this user's is no fault while it is empty, as `make_private` then closes it.

    Raises:
        TokenStoreError: another user owns or can write to it or one of the folders above it; or this user may not look
            into the folder, so that its content is unknown.
    """
    if found is None:
        try:
            os.stat(os.path.join(path, os.curdir))
        except OSError as error:
            missing = isinstance(error, FileNotFoundError) and not os.path.islink(path)  # another may just make it
            if not missing:  # a link that leads nowhere, as to a drive that is not mounted, hides what is there
                raise unusable(path, error) from None
    fault = stranger(path, found)
    if fault and reading and _is_unused(path):
        fault = stranger(os.path.join(path, os.pardir), lenient=True)
    _refuse(fault)


def _refuse(fault: tuple[str, str] | None) -> None:
    if fault:
        raise TokenStoreError(
            f"{fault[0]}, so its content may have been planted: it is not used, and nothing was issued. Find out why, "
            f"then run `{fault[1]}`, or point KIS_TOKEN_DIR to a folder of your own."
        )


def refuse_planted(folder: str, parts: tuple[str, ...]) -> None:
    """Check all files in `folder` with one of `parts` in their name, as `refuse_strangers` does.

    Raises:
        TokenStoreError: another user owns or can write to one of them, or the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise unusable(folder, error) from None
    for name in _with(names, parts):
        if not name.endswith((".tmp", ".aside")):
            path = os.path.join(folder, name)
            found = _stat(path, follow=False)
            if found and stat.S_ISREG(found.st_mode):
                refuse_strangers(path, found)


def make_private(folder: str, *, ours: tuple[str, ...] = ()) -> None:
    """Create `folder` and its missing parents for this user only, whatever the umask.

    If every name in it contains one of `ours`, it gets a `.gitignore`; and if it is this user's, it is closed to
    others, unless they could have put files there.

    Raises:
        TokenStoreError: it cannot be created, is not a folder, belongs to another user or can be written by others.
    """
    try:
        _make_folders(folder)
        found, names = os.stat(folder), os.listdir(folder)
        only_ours = _with(names, ours) == names
        others_see = found.st_mode & 0o077 and not (names and found.st_mode & OTHERS_WRITE)
        if sys.platform != "win32" and only_ours and others_see and found.st_uid == os.geteuid():
            os.chmod(folder, PRIVATE_FOLDER)
    except OSError as error:
        raise unusable(folder, error) from None
    refuse_strangers(folder)
    if only_ours:
        with contextlib.suppress(OSError):  # it exists, or the folder cannot be written to
            descriptor = os.open(os.path.join(folder, ".gitignore"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
            try:
                os.write(descriptor, b"*\n")
            except OSError:  # a full disk: an empty one would hide nothing, for ever
                os.unlink(os.path.join(folder, ".gitignore"))
            finally:
                os.close(descriptor)


def unusable(path: str, error: OSError) -> TokenStoreError:
    """Return the error for a `path` in the token directory to which the system refuses access."""
    return TokenStoreError(
        f"The token directory cannot be used: {path}: {error.strerror or type(error).__name__}. Nothing was issued; "
        "fix its permissions or free space, or point KIS_TOKEN_DIR elsewhere.",
    )


def _fault(path: str, found: os.stat_result, writers: int) -> tuple[str, str] | None:
    if sys.platform == "win32":  # where modes and owners mean nothing
        return None
    foreign = found.st_uid not in (os.geteuid(), 0)
    if not foreign and not found.st_mode & writers:
        return None
    import shlex  # only when something is wrong

    path, sudo = os.path.realpath(path), "sudo " if foreign and os.geteuid() else ""
    why = (
        f"belongs to another user (uid {found.st_uid}, not {os.geteuid()})"
        if foreign
        else "can be written by other users"
    )
    command = f"chown {os.geteuid()}" if foreign else "chmod go-w"
    return f"{path} {why}", f"{sudo}{command} {shlex.quote(path)}"


def _others(found: os.stat_result) -> int:
    if found.st_mode & stat.S_ISVTX:
        return 0
    return stat.S_IWOTH if found.st_gid == found.st_uid else OTHERS_WRITE


def _is_unused(folder: str) -> bool:
    try:
        return sys.platform != "win32" and os.stat(folder).st_uid == os.geteuid() and not os.listdir(folder)
    except OSError:
        return False


def _with(names: list[str], parts: tuple[str, ...]) -> list[str]:
    """Return the names that contain one of the parts."""
    return [name for name in names if any(map(name.__contains__, parts))]


def _stat(path: str, *, follow: bool = True) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except OSError:
        return None


def _make_folders(folder: str) -> None:
    """Like `os.makedirs`, but create the parents private too; `os.makedirs` leaves their modes to the umask."""
    if os.path.isdir(folder):
        return
    if (parent := os.path.dirname(folder)) != folder:
        _make_folders(parent)
        _refuse(stranger(parent, lenient=True))  # `sudo tokencore` would lock the user out with a folder of root's
    try:
        os.mkdir(folder, PRIVATE_FOLDER)
    except FileExistsError:
        if not os.path.isdir(folder):  # else another process was quicker
            os.stat(folder)  # the error says that a link leads nowhere, as to a drive that is not mounted
            raise
