"""The token's copies in the files of other KIS clients, so that one issue serves them all.

The file in another client's folder is (a) ours, known by the digest of what was written, (b) that client's own with a
token of this key, or (c) anything else. (c) is never touched. (b) with a token that lasts longer than ours is left for
`found`, as it is the key's newest. Every other file is written, whole and private, as that client reads it. A copy is
removed only when the key has no living token. Pickles are only written: nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle  # only written, for clients that read nothing else
import pickletools
import re
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from typing import TYPE_CHECKING, NamedTuple

from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.sealing import sealed_class
from tokencore.stores import files
from tokencore.tokens import as_answer, from_text, jwt_claims, longest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokencore.config.market import Market
    from tokencore.stores.base import Store
    from tokencore.tokens import Token

_log = logging.getLogger("tokencore")
FILE_LIMIT = 1 << 16  # bytes; what is larger is no client's file
REMEMBERED = 400  # digests of what was written; the oldest are forgotten
PICKLE_PROTOCOL = 2  # read by every Python that the clients run on
_PICKLED = b"\x80"
_DATED = re.compile(r"KIS[0-9]{8}", re.ASCII)
_JWT = re.compile(r"(?<![\w-])[\w-]++\.[\w-]++\.[\w-]++", re.ASCII)  # possessive: linear, whatever stands there


class Target(NamedTuple):
    """Where a client finds the token: its absolute folder, and the file where the client leaves the name free."""

    client: str
    folder: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.client}:{os.path.join(self.folder, self.name) if self.name else self.folder}"


class Client(NamedTuple):
    """How a client wants the token: its files by name, the folder it looks in by itself, and what they reveal."""

    contents: Callable[[Target, Market, Token, datetime], dict[str, bytes]]
    folder: str | None
    holds_secret: bool = False


@sealed_class()
class Exports:
    """The copies of one key's token; what writes is called under the key's lock."""

    __slots__ = ("_document", "_markets", "_store")

    def __init__(self, markets: Sequence[Market], store: Store) -> None:
        """Serve the `markets` of one key, whose token is in `store`."""
        self._markets = markets
        self._store = store
        self._document = store.document("exports")

    def __repr__(self) -> str:
        return f"Exports({self._store.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("Exports know credentials and are not pickled")

    def found(self, now: datetime) -> Token | None:
        """The living token of this key that another client has put into one of its files, if it outlasts ours."""
        theirs: list[Token | None] = []
        try:
            ours = self._store.newest()
            for target in self._targets():
                with contextlib.suppress(TokenError):  # what cannot be named or trusted is for `sync` to report
                    _refuse_strangers(target)
                    theirs += [self._outlasting(path, ours, now) for path in _present(target, self._markets[0])]
        except Exception as error:  # noqa: BLE001 - another program's files are no reason to fail
            _log.warning("The files of other clients could not be searched for a token: %s", _words(error))
        return longest(theirs)

    def sync(self, token: Token | None) -> None:
        """Write what the settings ask for, or remove the copies where the key has no living token; never raises."""
        failed = {}
        try:
            for target in self._targets():
                try:
                    self._copy(target, token) if token else self._withdraw(target)
                except Exception as error:  # noqa: BLE001 - the next copy gets its turn whatever happened to this one
                    failed[str(target)] = _words(error)
                    _log.error("The token's copy %s is not up to date: %s", target, failed[str(target)])
            if failed != self.failures():
                self._note(failures=failed)
        except Exception as error:  # noqa: BLE001 - a copy is no reason to lose a token
            _log.error("The token's copies for other clients could not be written: %s", _words(error))

    def write(self, client: str, folder: str, token: Token) -> list[str]:
        """Write the files of `client` into `folder`, made if need be; their paths.

        Raises:
            ConfigurationError: no such client, a file there is not this key's, or KIS_HTS_ID is missing; nothing was
                written.
            TokenStoreError: the system refuses; each file is as before or whole.

        """
        target = _target(client, folder)
        try:
            if not os.path.isdir(target.folder):
                files.make_private(target.folder)
        except TokenStoreError:
            _refuse_strangers(target)
            raise _unwritable(target, "the folder cannot be made") from None
        return self._copy(target, token)

    def check(self, client: str, folder: str) -> None:
        """Return where nothing but the token may be missing for `write`.

        Raises:
            ConfigurationError: no such client, a file there is not this key's, or KIS_HTS_ID is missing.
            TokenStoreError: others can exchange the folder.

        """
        target = _target(client, folder)
        _refuse_strangers(target)
        for path in _present(target, self._markets[0]):
            self._refuse_foreign(target, path)

    def failures(self) -> dict[str, str]:
        """The copies that the settings ask for and that could not be brought up to date last time, and why."""
        wanted = {str(target) for target in self._targets()}
        failed = self._document.read().get("failures") if wanted else None
        return {name: str(why) for name, why in failed.items() if name in wanted} if isinstance(failed, dict) else {}

    def _targets(self) -> list[Target]:
        wanted = [_configured(text, market) for market in self._markets for text in market.exports]
        return list(dict.fromkeys(wanted))

    def _copy(self, target: Target, token: Token) -> list[str]:
        now, client = datetime.now(UTC), CLIENTS[target.client]
        _refuse_strangers(target)
        contents = client.contents(target, self._markets[0], token, now)
        paths = {os.path.join(target.folder, name): text for name, text in contents.items()}
        present = {path: _content(path) or b"" for path in paths}
        if all(token.access_token.encode() in text for text in present.values()):
            self._note(written=present.values())  # whoever wrote it: with the token it goes
            return list(paths)
        for path in paths:
            self._refuse_foreign(target, path)
        if any(self._outlasting(path, token, now) for path in paths):
            _log.info("%s has a token of this key that lasts longer than ours; it is left there.", target)
            return list(paths)
        self._put(target, paths)
        secret = ", with the app secret in it" if client.holds_secret else ""
        _log.info("Copied the token for %s%s: %s", target.client, secret, ", ".join(paths))
        self._tidy(target, token, min(contents), now)
        return list(paths)

    def _put(self, target: Target, paths: dict[str, bytes]) -> None:
        self._note(written=paths.values())
        try:
            for path, content in paths.items():
                files.write_bytes(path, content, writer=self._store.fingerprint)
        except OSError as error:
            raise _unwritable(target, error.strerror or type(error).__name__) from None

    def _tidy(self, target: Target, token: Token, first: str, now: datetime) -> None:
        """Remove this key's dated files of past days: a token, even an expired one, reveals the app key."""
        past = [path for path in _present(target, self._markets[0]) if os.path.basename(path) < first]
        for path in past if target.client == "kis-auth" else ():
            if self._is_keys(target, path) and not self._outlasting(path, token, now):
                with contextlib.suppress(OSError):
                    files.remove(path)

    def _withdraw(self, target: Target) -> None:
        for path in _present(target, self._markets[0]):
            if self._is_ours(_content(path)) and files.remove(path):
                _log.warning(
                    "Removed the copy for %s, as the key has no living token: %s. Started before the next renewal, "
                    "that client asks KIS for a token itself.",
                    target.client,
                    path,
                )

    def _outlasting(self, path: str, ours: Token | None, now: datetime) -> Token | None:
        """The token that the client itself has put there, if it is of this key, lives, and lasts longer than `ours`."""
        content = _content(path)
        texts = [] if content is None or self._is_ours(content) else _jwts(content)
        known = ours.access_token if ours else ""
        theirs = longest([from_text(text)[0] for text in texts if _key_of(text) == self._app_key and text != known])
        last = max(now, ours.expires_at if ours else now)
        planted = files.stranger(path, os.lstat(path), lenient=True) if theirs else None
        return theirs if theirs and theirs.expires_at > last and not planted else None

    def _refuse_foreign(self, target: Target, path: str) -> None:
        if os.path.lexists(path) and not self._is_keys(target, path):
            raise ConfigurationError(
                f"{path} holds no token of this key, as far as can be seen: it was left as it is, and nothing was "
                "written. Give this market a folder of its own, or remove the file."
            )

    def _is_keys(self, target: Target, path: str) -> bool:
        """Whether the file may be written over: empty, ours, or that client's own with a token of this key."""
        content = _content(path)
        if content is None or not content.strip() or self._is_ours(content):
            return content is not None
        named = {key for text in _jwts(content) if (key := _key_of(text))}
        by_name = target.client == "python-kis"  # a digest of the key is in it
        by_content = self._app_key.encode() in content if content.startswith(_PICKLED) else bool(named)
        return (by_name or by_content) and named <= {self._app_key}

    def _is_ours(self, content: bytes | None) -> bool:
        return content is not None and _digest(content) in self._written()

    def _written(self) -> list[str]:
        """The digests of what was written, oldest first."""
        known = self._document.read().get("written")
        return [one for one in known if isinstance(one, str)] if isinstance(known, list) else []

    def _note(self, *, written: Iterable[bytes] = (), failures: dict[str, str] | None = None) -> None:
        """Remember what is about to be written, or what failed; a store that cannot be written stops no copy."""
        before = self._document.read()
        digests = dict.fromkeys([*self._written(), *map(_digest, written)])
        after = {"written": list(digests)[-REMEMBERED:], "failures": self.failures() if failures is None else failures}
        if after != before:
            with contextlib.suppress(OSError):
                self._document.write(after)

    @property
    def _app_key(self) -> str:
        return str(self._markets[0].app_key)


def _configured(text: str, market: Market) -> Target:
    """What a setting such as `mojito2`, `kis-auth` or `mojito2:~/bot` asks for in `market`."""
    client, _, folder = (part.strip() for part in text.partition(":"))
    folder = folder or CLIENTS[client].folder or ""
    return _target(client, folder) if folder else Target(client, market.token_dir, f"{market.name}_krs_token.dat")


def _target(client: str, folder: str) -> Target:
    if client not in CLIENTS:
        raise ConfigurationError(f"There is no export for {client!r}; choose one of {', '.join(CLIENTS)}.")
    return Target(client, os.path.abspath(os.path.expanduser(folder)))


def _present(target: Target, market: Market) -> list[str]:
    """The paths where the client may have a file: the official sample's are named by the day."""
    names = [_file_name(target, market)]
    if target.client == "kis-auth":
        names = []
        with contextlib.suppress(OSError):
            names = sorted(name for name in os.listdir(target.folder) if _DATED.fullmatch(name))
    return [os.path.join(target.folder, name) for name in names]


def _file_name(target: Target, market: Market) -> str:
    return _python_kis_name(market) if target.client == "python-kis" else target.name or "token.dat"


def _mojito2(target: Target, market: Market, token: Token, now: datetime) -> dict[str, bytes]:
    app_key, app_secret = market.credentials()
    content = as_answer(token, now) | {"timestamp": int(token.expires_at.timestamp())}
    content |= {"api_key": app_key, "api_secret": app_secret}
    return {_file_name(target, market): pickle.dumps(content, protocol=PICKLE_PROTOCOL)}


def _python_kis(target: Target, market: Market, token: Token, now: datetime) -> dict[str, bytes]:
    return {_file_name(target, market): json.dumps(as_answer(token, now)).encode()}


def _python_kis_name(market: Market) -> str:
    """The name that python-kis computes, with a digest of the key in it."""
    hts_id = market.settings.hts_id or ""
    if not hts_id or os.path.basename(hts_id) != hts_id:
        raise ConfigurationError(
            "KIS_HTS_ID is not set to the account's HTS id, which python-kis has in the name of its file; set it."
        )
    source = "".join(("pykis", hts_id, *market.credentials(), "token"))
    digest = sha1(source.encode(), usedforsecurity=False).hexdigest()
    return f"token_{'virtual' if market.environment == 'paper' else 'real'}_{hts_id}_{digest}.json"


def _kis_auth(_: Target, __: Market, token: Token, now: datetime) -> dict[str, bytes]:
    """The file is named by the day and compared with the clock, both in the zone of the machine that reads it."""
    expiry = f"{token.expires_at.astimezone():%Y-%m-%d %H:%M:%S}"
    content = f"token: {token.access_token}\nvalid-date: {expiry}\n".encode()
    today = now.astimezone().date()
    return {f"KIS{day:%Y%m%d}": content for day in (today, today + timedelta(days=1))}


# A new client is a function and a line here.
CLIENTS = {
    "mojito2": Client(_mojito2, None, holds_secret=True),
    "python-kis": Client(_python_kis, "~/.pykis/cache"),
    "kis-auth": Client(_kis_auth, "~/KIS/config"),
}


def _content(path: str) -> bytes | None:
    """The content at `path`; None without a file, or where it is no readable one."""
    try:
        return files.read_bytes(path, FILE_LIMIT, trusted=False)
    except ValueError:
        return None


def _jwts(content: bytes) -> list[str]:
    """The JWTs in a file of any client; a pickle's parts are listed, not loaded."""
    if not content.startswith(_PICKLED):
        return _JWT.findall(content.decode("utf-8", errors="replace"))
    with contextlib.suppress(Exception):  # pickletools raises whatever damage leads to
        return [part for _, part, _ in pickletools.genops(content) if isinstance(part, str) and _JWT.fullmatch(part)]
    return []


def _key_of(jwt: str) -> str | None:
    key = jwt_claims(jwt).get("jti")
    return key if isinstance(key, str) else None


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def _refuse_strangers(target: Target) -> None:
    """Return where nobody else can have made or can exchange the folder that the secret goes into."""
    if fault := files.stranger(target.folder, lenient=True):
        raise _unwritable(target, f"{fault[0]}; find out why, then run `{fault[1]}`")


def _unwritable(target: Target, why: str) -> TokenStoreError:
    return TokenStoreError(
        f"The files of {target.client} in {target.folder} cannot be written: {why}. The token itself is untouched; "
        "make the folder, fix its permissions or free space."
    )


def _words(error: Exception) -> str:
    """An error for the log and the doctor; an unknown one's text may hold anything."""
    return str(error) if isinstance(error, TokenError) else type(error).__name__
