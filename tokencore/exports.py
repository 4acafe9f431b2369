"""The files of other clients, written for one key: whole, private, and never over what is somebody else's.

A file that is there already is read as plain bytes, to see whose it is (see `ownership`).
"""

from __future__ import annotations

import contextlib
import os
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import store
from tokencore.clients import CLIENTS, file_name
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.lock import alone_in
from tokencore.ownership import content, tells_environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tokencore.clients import Holder, Target
    from tokencore.ownership import Ownership
    from tokencore.tokens import Token

WAIT = 5  # seconds: another key's export writes two small files
_DATED = re.compile(r"KIS[0-9]{8}", re.ASCII)


def write(to: Target, holder: Holder, token: Token, owned: Ownership) -> list[str]:
    """Write the client's files and return their paths; the caller holds the key's lock.

    All of them or, where one is not the holder's, none.

    Raises:
        ConfigurationError: a file there is not this key's, or python-kis lacks KIS_HTS_ID; nothing was written.
        TokenStoreError: the system refuses; files before that one are written, the others as they were. Or another
            process holds the folder; none is written.

    """
    now = datetime.now(UTC)
    files = CLIENTS[to.client].files(to, holder, token, now)
    paths = {os.path.join(to.folder, name): text for name, text in files.items()}
    with _alone(to, paths, owned):
        for path in paths:
            _refuse_foreign(path, owned)
        owned.note(paths.values())
        try:
            for path, text in paths.items():
                store.write_bytes(path, text, temporary=holder.fingerprint)
        except OSError as error:
            raise _unwritable(to, error) from None
        if to.client == "kis-auth":
            _tidy(to, owned, before=min(files))
    return list(paths)


def make_folder(to: Target) -> None:
    """Make the client's folder, for its owner only, where there is none.

    Raises:
        TokenStoreError: it cannot be made, or is no folder.

    """
    try:
        os.makedirs(to.folder, 0o700, exist_ok=True)
    except OSError as error:
        raise _unwritable(to, error) from None


def current(to: Target, holder: Holder, token: Token) -> bool:
    """Whether every file of the client has this token already."""
    files = CLIENTS[to.client].files(to, holder, token, datetime.now(UTC))
    return all(token.access_token.encode() in (content(os.path.join(to.folder, name)) or b"") for name in files)


def withdraw(to: Target, holder: Holder, owned: Ownership) -> list[str]:
    """Remove the client's files that are the holder's; their paths. The caller holds the key's lock.

    Raises:
        ConfigurationError: python-kis' file cannot be named without KIS_HTS_ID.
        TokenStoreError: the system refuses, or another process holds the folder, which the sentence names.

    """
    name = file_name(to, holder)
    names = [name] if name else _dated(to.folder)
    paths = [path for name in names if owned.has(path := os.path.join(to.folder, name))]
    with _alone(to, paths, owned):
        paths = [path for path in paths if owned.has(path)]
        try:
            for path in paths:
                os.unlink(path)
            if paths:
                store.sync_folder(to.folder)
        except OSError as error:
            raise _unwritable(to, error) from None
    return paths


@contextlib.contextmanager
def _alone(to: Target, paths: Iterable[str], owned: Ownership) -> Iterator[None]:
    """Whose a file is stays as it was found until ours is written: another key or environment has another lock.

    What we wrote ourselves nobody else writes over, so then a bot that locks its folder for its life stops no copy.
    """
    if all(owned.wrote(path) for path in paths):
        yield
        return
    with alone_in(to.folder, wait=WAIT) as held:
        if not held:
            raise TokenStoreError(
                f"Another process has held {to.folder} for {WAIT} s. The files of {to.client} in it are as they were, "
                "and so is the token; look for a hanging process there."
            )
        yield


def _dated(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir(folder) if _DATED.fullmatch(name)]
    return []


def _tidy(to: Target, owned: Ownership, *, before: str) -> None:
    """Remove this key's files of past days: a token, even an expired one, tells the app key."""
    for name in _dated(to.folder):
        path = os.path.join(to.folder, name)
        if name < before and owned.has(path):
            with contextlib.suppress(OSError):
                os.unlink(path)


def _refuse_foreign(path: str, owned: Ownership) -> None:
    found = content(path)
    if found is None and not os.path.lexists(path):
        return
    empty = found is not None and not found.strip()  # as the official sample makes it when it starts
    if not (empty or tells_environment(path) or owned.has(path)):
        raise ConfigurationError(
            f"{path} is not this key's in this environment, as far as can be told: it holds a token of another one, "
            "or none at all. It was left as it is, and nothing was written; give this market a folder of its own, or "
            "remove the file."
        )


def _unwritable(to: Target, error: OSError) -> TokenError:
    return TokenStoreError(
        f"The files of {to.client} in {to.folder} cannot be written: {error.strerror or type(error).__name__}. "
        "The token itself is untouched; make the folder, mend its permissions or free space."
    )
