"""The token directory: who may use it, what lies in it, who holds its locks, and how much room there is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from typing import TYPE_CHECKING

from tokencore.doctor.finding import STORE, fail, ok, skipped, warn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencore.doctor.finding import Finding

LITTLE, TOO_LITTLE = 100 << 20, 1 << 20  # bytes free: time to look, and no token could be saved
SHOWN = 3  # names in a line
PROC = "/proc"  # where Linux tells who holds a lock
_OTHERS = 0o077
_OF_KEY = re.compile(r"key-([0-9a-f]{16})\b", re.ASCII)
_OF_MARKET = re.compile(r"(.+)_(?:api_token\.json|token_issued_at\.dat|krs_token\.dat|approval_key\.json)", re.ASCII)
_BESIDES = ("config.toml", "incidents.", "prefect", "key-")


def check(folder: str, markets: Iterable[str], keys: Iterable[str]) -> list[Finding]:
    """The directory `folder` of these markets and keys (fingerprints); nothing in it is opened or changed."""
    if not os.path.lexists(folder):
        return [_absent(folder), disk(folder)]
    findings = [_directory(folder)]
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return [*findings, disk(folder)]
    return [
        *findings,
        _modes(folder, names),
        _leftovers(names, set(markets), set(keys)),
        *locks(folder, keys),
        disk(folder),
    ]


def _absent(folder: str) -> Finding:
    above = _existing(folder)
    if os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK):
        return ok("token directory", f"{folder} does not exist yet; the first issue makes it")
    return fail("token directory", f"{folder} cannot be made: {above} is not writable", _cure(above), STORE)


def _directory(folder: str) -> Finding:
    if not os.path.isdir(folder):
        cure = "move it away, or point KIS_TOKEN_DIR elsewhere"
        return fail("token directory", f"{folder} is no directory", cure, STORE)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return fail("token directory", f"{folder} cannot be read and written", _cure(folder), STORE)
    found = os.stat(folder)
    mode = stat.S_IMODE(found.st_mode)
    if os.name == "posix" and mode & _OTHERS:
        return warn("token directory", f"{folder} is open to other users (mode {mode:04o})", f"chmod 700 {folder}")
    if os.name == "posix" and found.st_uid != os.geteuid():
        return warn("token directory", f"{folder} belongs to another user", "run everything as one user")
    return ok("token directory", f"{folder}, mode {mode:04o}")


def _modes(folder: str, names: list[str]) -> Finding:
    if os.name != "posix":
        return skipped("file modes", "this system has no modes")
    wide = []
    for name in names:
        with contextlib.suppress(OSError):
            found = os.lstat(os.path.join(folder, name))
            if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) & _OTHERS:
                wide.append(name)
    if wide:
        return warn("file modes", f"open to more than their owner: {_some(wide)}", f"chmod go= {folder}/*")
    return ok("file modes", "no file is open to other users")


def _leftovers(names: list[str], markets: set[str], keys: set[str]) -> Finding:
    """What nobody needs any more, and what is not ours: told, never removed.

    While the settings name no key at all, nothing is called another's: a record that is deleted is missed.
    """
    found = {
        "drafts of killed processes": [n for n in names if n.endswith(".tmp")],
        "set aside as no token of this key": [n for n in names if n.endswith(".aside")],
        "not tokencore's": [n for n in names if not _known(n)],
    }
    if keys:
        found |= {
            "of a key that is not configured": [n for n in names if (of := _OF_KEY.search(n)) and of[1] not in keys],
            "of a market that is not configured": [
                n for n in names if (of := _OF_MARKET.fullmatch(n)) and of[1] not in markets
            ],
        }
    told = [f"{what}: {_some(which)}" for what, which in found.items() if which]
    if told:
        return warn("leftover files", "; ".join(told), "look at them, and delete those that you do not need")
    return ok("leftover files", "none")


def _known(name: str) -> bool:
    return name.endswith((".tmp", ".aside")) or name.startswith(_BESIDES) or bool(_OF_MARKET.fullmatch(name))


def locks(folder: str, keys: Iterable[str]) -> list[Finding]:
    """Whether the lock of each key is held now; it is not touched to find out."""
    paths = {key: os.path.join(folder, f"key-{key}.lock") for key in keys}
    there = {key: path for key, path in paths.items() if os.path.lexists(path)}
    return [_lock(key, path, several=len(paths) > 1) for key, path in there.items()]


def _lock(key: str, path: str, *, several: bool) -> Finding:
    name = f"lock {key}" if several else "lock"
    try:
        holders = _holders(path)
    except OSError:
        return skipped(name, "only Linux tells who holds a lock without touching it")
    if not holders:
        return ok(name, "free")
    who = ", ".join(f"process {pid} ({_command(pid)})" for pid in holders)
    return ok(name, f"held now by {who}: normal while it renews; if it lasts for minutes, end that process")


def _holders(path: str) -> list[int]:
    """The processes that hold a lock on the file, as Linux lists them: `1: FLOCK ADVISORY WRITE 71 08:01:913 0 EOF`."""
    found = os.stat(path)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open(f"{PROC}/locks", encoding="ascii", errors="replace") as file:
        lines = [line.split() for line in file]
    return [int(fields[4]) for fields in lines if len(fields) > 5 and fields[1] != "->" and fields[5] == place]  # noqa: PLR2004


def _command(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"{PROC}/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return "".join(sign for sign in file.read() if sign.isprintable())
    return "of another user or container"


def disk(folder: str) -> Finding:
    """The room on the disk of `folder`, or of the folder it would be made in."""
    try:
        free = shutil.disk_usage(_existing(folder)).free
    except OSError as error:
        return skipped("disk", f"cannot be told: {error.strerror}")
    told = f"{free >> 20:,} MB free"
    if free < TOO_LITTLE:
        return fail("disk", told, "free space: an issued token could not be saved", STORE)
    if free < LITTLE:
        return warn("disk", told, "free space before it runs out")
    return ok("disk", told)


def _existing(path: str) -> str:
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _cure(path: str) -> str:
    return f"give your user the right to read and write {path}, or point KIS_TOKEN_DIR elsewhere"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name)[1:-1] for name in names[:SHOWN]) + more
