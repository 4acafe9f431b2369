"""A key's token in the files of other KIS clients: mojito2, python-kis, and the sample that KIS publishes.

mojito2's file holds the app secret, because that client compares it; the others hold none. A file that is there
already is read as plain bytes, to see whose it is; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle  # only written, for clients that read nothing else
import re
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from typing import TYPE_CHECKING, NamedTuple

from tokencore import store
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.tokens import KST, Token, jwt_claims

if TYPE_CHECKING:
    from collections.abc import Callable

PICKLE_PROTOCOL = 2  # read by every Python that the clients run on
FILE_LIMIT = 1 << 20  # bytes; what is larger is no client's file
_JWT = re.compile(rb"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
_DATED = re.compile(r"KIS[0-9]{8}", re.ASCII)
_KRS_FILE = "_krs_token.dat"


class Holder:
    """Whose token it is: what the files and their names are made of.

    Attributes:
        fingerprint: names the key in its environment.
        app_key, app_secret: its credentials.
        environment: `real` or `paper`.
        hts_id: the account's HTS id, which python-kis has in its file's name; None when not set.

    """

    __slots__ = ("app_key", "app_secret", "environment", "fingerprint", "hts_id")

    def __init__(self, fingerprint: str, credentials: tuple[str, str], environment: str, hts_id: str | None) -> None:
        """Keep them for the files that are written next."""
        self.fingerprint, self.environment, self.hts_id = fingerprint, environment, hts_id
        self.app_key, self.app_secret = credentials

    def __repr__(self) -> str:
        return f"Holder({self.environment!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Holder knows credentials and is not pickled")


class Target(NamedTuple):
    """Where a client finds the token: its absolute folder, and the file where the client leaves the name free."""

    client: str
    folder: str
    name: str = ""


class Client(NamedTuple):
    """How a client wants the token: its files by name, the folder it looks in by itself, and what they tell."""

    files: Callable[[Target, Holder, Token, datetime], dict[str, bytes]]
    folder: str | None
    holds_secret: bool = False


def target(text: str, market: str, token_dir: str) -> Target:
    """What a setting such as `mojito2`, `kis-auth` or `mojito2:/home/me/bot` asks for in `market`.

    Raises:
        ValueError: the client is unknown, or the folder is not absolute.

    """
    client, _, folder = (part.strip() for part in text.partition(":"))
    if client not in CLIENTS:
        raise ValueError(f"{client!r} is none of the clients {', '.join(CLIENTS)}")
    if folder:
        if not os.path.isabs(os.path.expanduser(folder)):
            raise ValueError(f"the folder in {text!r} must be absolute, or begin with ~")
        return Target(client, _absolute(folder))
    default = CLIENTS[client].folder
    return Target(client, _absolute(default)) if default else Target(client, token_dir, f"{market}{_KRS_FILE}")


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


def check(to: Target, holder: Holder) -> None:
    """Return where the client's files can be named.

    Raises:
        ConfigurationError: python-kis' file cannot be named without KIS_HTS_ID.

    """
    if to.client == "python-kis":
        _python_kis_name(holder)


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
    names = [to.name or "token.dat"]
    if to.client == "python-kis":
        names = [_python_kis_name(holder)]
    elif to.client == "kis-auth":
        names = _dated(to.folder)
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


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder))


def _answer(token: Token, now: datetime) -> dict[str, object]:
    """What tokenP would answer for this token now; its expiry in KST, its life in seconds."""
    return {
        "access_token": token.access_token,
        "access_token_token_expired": f"{token.expires_at.astimezone(KST):%Y-%m-%d %H:%M:%S}",
        "token_type": token.token_type,
        "expires_in": max(0, int((token.expires_at - now).total_seconds())),
    }


def _mojito2(to: Target, holder: Holder, token: Token, now: datetime) -> dict[str, bytes]:
    content = _answer(token, now) | {"timestamp": int(token.expires_at.timestamp())}
    content |= {"api_key": holder.app_key, "api_secret": holder.app_secret}
    return {to.name or "token.dat": pickle.dumps(content, protocol=PICKLE_PROTOCOL)}


def _python_kis(_: Target, holder: Holder, token: Token, now: datetime) -> dict[str, bytes]:
    return {_python_kis_name(holder): json.dumps(_answer(token, now)).encode()}


def _python_kis_name(holder: Holder) -> str:
    if not holder.hts_id:
        raise ConfigurationError(
            "KIS_HTS_ID is not set, and python-kis has it in the name of its file; set it to the account's HTS id."
        )
    if os.path.basename(holder.hts_id) != holder.hts_id:
        raise ConfigurationError("KIS_HTS_ID cannot be part of a file's name; set it to the account's HTS id.")
    told = f"pykis{holder.hts_id}{holder.app_key}{holder.app_secret}token"
    digest = sha1(told.encode(), usedforsecurity=False).hexdigest()  # the name that python-kis computes
    return f"token_{'virtual' if holder.environment == 'paper' else 'real'}_{holder.hts_id}_{digest}.json"


def _kis_auth(_: Target, __: Holder, token: Token, now: datetime) -> dict[str, bytes]:
    """The file is named by the day and compared with the clock, both in the zone of the machine that reads it."""
    expiry = f"{token.expires_at.astimezone():%Y-%m-%d %H:%M:%S}"
    content = f"token: {token.access_token}\nvalid-date: {expiry}\n".encode()
    today = now.astimezone().date()
    return {f"KIS{day:%Y%m%d}": content for day in (today, today + timedelta(days=1))}


CLIENTS = {
    "mojito2": Client(_mojito2, None, holds_secret=True),
    "python-kis": Client(_python_kis, "~/.pykis/cache"),
    "kis-auth": Client(_kis_auth, "~/KIS/config"),
}


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
    named = {claims.get("jti") for text in _JWT.findall(content) if (claims := jwt_claims(text.decode()))}
    if named - {None}:
        return named - {None} == {holder.app_key}
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
