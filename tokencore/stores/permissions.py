"""Who else could have put a file there: what other users own or can write is refused, as ssh refuses such keys."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from tokencore.errors import TokenStoreError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def stranger(path: str, found: os.stat_result | None = None, *, lenient: bool = False) -> tuple[str, str] | None:
    """What lets others put `path` there, and the command that ends it; None where only this user and root can.

    With what was `found` there it is judged alone; else it is a folder, and those above it count too. These may be
    open where they are sticky, as /tmp is, and to a group of the owner's own, which many systems give to every user.
    `lenient`, where other programs write too, grants that to `path` itself.
    """
    if found is not None:
        return _fault(path, found, _others(found) if lenient else OTHERS_WRITE)
    here, below = path, None
    while (step := _stat(here)) and (place := (step.st_dev, step.st_ino)) != below:
        if fault := _fault(here, step, OTHERS_WRITE if below is None and not lenient else _others(step)):
            return fault
        here, below = os.path.join(here, os.pardir), place  # the system's own way up, which no link deceives
    return None


def open_to_others(found: os.stat_result) -> bool:
    """Whether others can write it, or what is in it, beside a group of the owner's own."""
    return sys.platform != "win32" and bool(found.st_mode & _others(found))


def refuse_strangers(path: str, found: os.stat_result | None = None) -> None:
    """Return where `stranger` finds nothing.

    Raises:
        TokenStoreError: another user owns it or can write it, or one of the folders above; or the system does not let
            this one look into the folder, so that nobody knows what is in it.

    """
    if found is None:
        try:
            os.stat(os.path.join(path, os.curdir))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise unusable(path, error) from None
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
        if _has(name, parts) and not name.endswith((".tmp", ".aside")):
            path = os.path.join(folder, name)
            found = _stat(path, follow=False)
            if found and stat.S_ISREG(found.st_mode):
                refuse_strangers(path, found)


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
        if sys.platform != "win32" and only_ours and others_see and found.st_uid == os.geteuid():
            os.chmod(folder, PRIVATE_FOLDER)
    except OSError as error:
        raise unusable(folder, error) from None
    refuse_strangers(folder)
    if only_ours:
        with contextlib.suppress(OSError):  # it is there, or the folder is not to be written
            descriptor = os.open(os.path.join(folder, ".gitignore"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
            os.write(descriptor, b"*\n")
            os.close(descriptor)


def unusable(path: str, error: OSError) -> TokenStoreError:
    """The error for a `path` in the token directory that the system refuses."""
    return TokenStoreError(
        f"The token directory cannot be used: {path}: {error.strerror or type(error).__name__}. Nothing was issued; "
        "fix its permissions or free space, or point KIS_TOKEN_DIR elsewhere.",
    )


def _fault(path: str, found: os.stat_result, writers: int) -> tuple[str, str] | None:
    if sys.platform == "win32":  # where modes and owners say nothing
        return None
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


def _make_folders(folder: str) -> None:
    """As `os.makedirs`, which gives the parents what the umask leaves."""
    if os.path.isdir(folder):
        return
    if (parent := os.path.dirname(folder)) != folder:
        _make_folders(parent)
    try:
        os.mkdir(folder, PRIVATE_FOLDER)
    except FileExistsError:
        if not os.path.isdir(folder):  # else another process was quicker
            raise
