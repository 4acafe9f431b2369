"""The files of other clients, written for one key: whole, private, and never over what is somebody else's.

A file that is there already is read as plain bytes, to see whose it is.
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
from tokencore.tokens import jwt_claims

if TYPE_CHECKING:
    from tokencore.clients import Holder, Target
    from tokencore.tokens import Token

FILE_LIMIT = 1 << 20  # bytes; what is larger is no client's file
_JWT = re.compile(rb"(?<![\w-])[\w-]++\.[\w-]++\.[\w-]++", re.ASCII)  # possessive: linear, whatever stands there
_DATED = re.compile(r"KIS[0-9]{8}", re.ASCII)


def write(to: Target, holder: Holder, token: Token, known: tuple[str, ...]) -> list[str]:
    """Write the client's files and return their paths; the caller holds the key's lock.

    All of them or, where one is another's, none: files that name another key, and those that are no token file. A
    file with one of the `known` texts is this key's also where the token itself names no key.

    Raises:
        ConfigurationError: a file there is not this key's, or python-kis lacks KIS_HTS_ID; nothing was written.
        TokenStoreError: the system refuses; files before that one are written, the others as they were.

    """
    now = datetime.now(UTC)
    files = CLIENTS[to.client].files(to, holder, token, now)
    paths = {os.path.join(to.folder, name): content for name, content in files.items()}
    for path in paths:
        _refuse_foreign(path, holder, (token.access_token, *known))
    try:
        for path, content in paths.items():
            store.write_bytes(path, content, temporary=holder.fingerprint)
    except OSError as error:
        raise _unwritable(to, error) from None
    if to.client == "kis-auth":
        _tidy(to, holder, before=min(files))
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
    return all(token.access_token.encode() in (_content(os.path.join(to.folder, name)) or b"") for name in files)


def withdraw(to: Target, holder: Holder, token: Token | None) -> list[str]:
    """Remove the client's files that name this key, or hold this token; their paths. The caller holds the key's lock.

    Raises:
        ConfigurationError: python-kis' file cannot be named without KIS_HTS_ID.
        TokenStoreError: the system refuses; the sentence names the folder.

    """
    name = file_name(to, holder)
    names = [name] if name else _dated(to.folder)
    known = (token.access_token,) if token else ()
    paths = [path for name in names if _ours(_content(path := os.path.join(to.folder, name)), holder, known)]
    try:
        for path in paths:
            os.unlink(path)
        if paths:
            store.sync_folder(to.folder)
    except OSError as error:
        raise _unwritable(to, error) from None
    return paths


def _dated(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir(folder) if _DATED.fullmatch(name)]
    return []


def _tidy(to: Target, holder: Holder, *, before: str) -> None:
    """Remove this key's files of past days: a token, even an expired one, tells the app key."""
    for name in _dated(to.folder):
        path = os.path.join(to.folder, name)
        if name < before and _ours(_content(path), holder, ()):
            with contextlib.suppress(OSError):
                os.unlink(path)


def _content(path: str) -> bytes | None:
    """What stands there; None without a file, or where it is no readable one."""
    try:
        return store.read_bytes(path, FILE_LIMIT)
    except ValueError:
        return None


def _ours(content: bytes | None, holder: Holder, known: tuple[str, ...]) -> bool:
    """Whether it names this key: by the `jti` of the tokens in it, else by the key or a known token in clear."""
    if content is None:
        return False
    named = {jti for text in _JWT.findall(content) if isinstance(jti := jwt_claims(text.decode()).get("jti"), str)}
    if named:
        return named == {holder.app_key}
    return any(text.encode() in content for text in (holder.app_key, *known))


def _refuse_foreign(path: str, holder: Holder, known: tuple[str, ...]) -> None:
    content = _content(path)
    if content is None and not os.path.lexists(path):
        return
    # The official sample makes an empty file when it starts; python-kis' name tells the key.
    empty = content is not None and not content.strip()
    if not (empty or os.path.basename(path).endswith(".json") or _ours(content, holder, known)):
        raise ConfigurationError(
            f"{path} is not this key's: it holds a token of another key or environment, or no token at all. It was "
            "left as it is, and nothing was written; give this market a folder of its own, or remove the file."
        )


def _unwritable(to: Target, error: OSError) -> TokenError:
    return TokenStoreError(
        f"The files of {to.client} in {to.folder} cannot be written: {error.strerror or type(error).__name__}. "
        "The token itself is untouched; make the folder, mend its permissions or free space."
    )
