"""Copies of the token in the files of other KIS clients, so that one issue serves them all.

A file in another client's folder is (a) ours, recognised by the digest of what was written there, (b) the client's own,
with a token of this key, or (c) anything else. (c) is never touched. (b) with a token that lasts longer than ours is
left for `found`, because that token is the key's newest. Any other file is replaced as a whole, private and in the
client's own format. A copy is removed only when the key has no living token. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle  # only written, for clients that read nothing else
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from typing import TYPE_CHECKING, NamedTuple

from tokencore.config.sources import EXPORT_FOLDERS, FILE_LIMIT
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.sealing import Sensitive, sealed_class
from tokencore.stores import files, permissions
from tokencore.tokens import as_answer, from_text, jwt_claims, jwts_in, longest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokencore.config.market import Market
    from tokencore.stores.base import Store
    from tokencore.tokens import Token

_log = logging.getLogger("tokencore")
DAY = timedelta(days=1)
PICKLE_PROTOCOL = 2  # readable by every Python that the clients run on


class Client(NamedTuple):
    """How a client wants the token: the names of its files, and their content."""

    names: Callable[[Market, datetime], list[str]]
    content: Callable[[Market, Token, datetime], bytes]
    holds_secret: bool = False


class Target(NamedTuple):
    """A client, its absolute folder, and the file's name if the client does not fix it."""

    client: str
    folder: str
    name: str = ""

    @property
    def label(self) -> str:
        """The target as it is written in the settings, with its folder."""
        return f"{self.client}:{self.folder}"

    def paths(self, market: Market, now: datetime) -> list[str]:
        """Return the files that the client reads.

        Raises:
            ConfigurationError: a setting for their names is missing.
        """
        names = [self.name] if self.name else CLIENTS[self.client].names(market, now)
        return [os.path.join(self.folder, name) for name in names]


class Found(NamedTuple):
    """What a client's file holds."""

    path: str
    content: bytes = b""
    replaceable: bool = False  # whether it may be overwritten
    longer: Token | None = None  # the client's own token of this key, if it outlasts ours


@sealed_class()
class Exports(Sensitive):
    """The copies of one key's token; methods that write are called under the key's lock."""

    __slots__ = ("_failed", "_market", "_markets", "_store", "_written")

    def __init__(self, markets: Sequence[Market], store: Store) -> None:
        """Serve the `markets` of one key, whose token is in `store`."""
        self._markets, self._market = markets, markets[0]
        self._store = store
        self._written = store.document("exports")  # the digest of what was written, by path
        self._failed = store.document("export-failures")

    def found(self, now: datetime) -> Token | None:
        """Return the living token of this key that another client has saved in its files, if it outlasts ours."""
        if not (targets := self._targets()):
            return None
        ours, theirs = self._store.newest(), []
        for target in targets:
            with contextlib.suppress(Exception):  # another program's files must not cause a failure; `sync` reports it
                paths = target.paths(self._market, now - DAY) + target.paths(self._market, now)
                theirs += [one.longer for one in self._look(target, paths, ours, now)]
        return longest(theirs)

    def sync(self, token: Token | None) -> None:
        """Write the copies that the settings ask for, or remove all if the token is dead or None; never raises."""
        failed = {}
        if token and (token.rejected_at is not None or token.expires_at <= datetime.now(UTC)):
            token = None
        for target in self._targets():
            try:
                if token:
                    self._copy(target, token)
            except Exception as error:  # noqa: BLE001 - the other copies are written whatever happens to this one
                # The text of any other error may contain a secret.
                failed[target.label] = str(error) if isinstance(error, TokenError) else type(error).__name__
                _log.error("The token's copy %s is not up to date: %s", target.label, failed[target.label])
        with contextlib.suppress(Exception):  # the next call tries again
            if not token:
                self._remove()
            if failed != self.failures():
                self._failed.write(failed)

    def write(self, client: str, folder: str, token: Token) -> list[str]:
        """Write the files of `client` into `folder`, created if needed, and return their paths.

        Raises:
            ConfigurationError: no such client, a file there is not this key's, or KIS_HTS_ID is missing; nothing was
                written.
            TokenStoreError: writing failed; each file is either unchanged or complete.
        """
        return self._copy(_target(f"{client}:{folder}", self._market), token, make=True)

    def check(self, client: str, folder: str) -> Token | None:
        """Check that `write` needs nothing more than a token, and return one that is there already and outlasts ours.

        Raises:
            ConfigurationError: no such client, a file there is not this key's, or KIS_HTS_ID is missing.
            TokenStoreError: other users could replace the folder.
        """
        now, target = datetime.now(UTC), _target(f"{client}:{folder}", self._market)
        present = self._look(target, target.paths(self._market, now), self._store.newest(), now)
        _refuse_foreign(present)
        return longest(one.longer for one in present)

    def failures(self) -> dict[str, str]:
        """Return the copies asked for by the settings that could not be updated last time, and why."""
        wanted = {target.label for target in self._targets()}
        return {name: str(why) for name, why in self._failed.read().items() if name in wanted}

    def _targets(self) -> list[Target]:
        return list(dict.fromkeys(_target(text, market) for market in self._markets for text in market.exports))

    def _copy(self, target: Target, token: Token, *, make: bool = False) -> list[str]:
        now = datetime.now(UTC)
        paths = target.paths(self._market, now)
        present = self._look(target, paths, token, now)
        if not all(token.access_token.encode() in one.content for one in present):
            _refuse_foreign(present)
            if any(one.longer for one in present):
                _log.info("%s has a token of this key that lasts longer than ours; it is left there.", target.label)
                return paths
            content = CLIENTS[target.client].content(self._market, token, now)
            try:
                if make and not os.path.isdir(target.folder):
                    permissions.make_private(target.folder)
                for path in paths:
                    files.write_bytes(path, content, writer=self._store.fingerprint)
            except (OSError, TokenStoreError) as error:
                why = getattr(error, "strerror", "the folder cannot be made")
                raise _unwritable(target, f"{why}; make the folder, fix its permissions or free space") from None
            _log.info("Copied the token for %s: %s", target.client, ", ".join(paths))
            present = [Found(path, content) for path in paths]
        self._note(present)  # files already up to date too, so that they are removed with the token
        return paths

    def _look(self, target: Target, paths: list[str], ours: Token | None, now: datetime) -> list[Found]:
        """Judge each file; empty ones, ours, and those with tokens of this key only are replaceable."""
        if fault := permissions.stranger(target.folder, lenient=True):  # a secret is written into that folder
            raise _unwritable(target, f"{fault[0]}; find out why, then run `{fault[1]}`")
        written, app_key, looked = self._written.read(), str(self._market.app_key), []
        for path in dict.fromkeys(paths):
            try:
                content = files.read_bytes(path, FILE_LIMIT, trusted=False) or b""
            except ValueError:  # something exists there, but it is not a readable file
                looked.append(Found(path))
                continue
            mine = not content.strip() or _digest(content) in str(written.get(path))
            # What we wrote tells us nothing new: our copy of an earlier token is overwritten, however long that lasts.
            jwts = [] if mine else jwts_in(content)
            keys = {jwt: key for jwt in jwts if isinstance(key := jwt_claims(jwt).get("jti"), str)}
            theirs = set(keys.values()) == {app_key}
            longer = longest([_longer(jwt, ours, now) for jwt, key in keys.items() if key == app_key])
            with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
                if longer and permissions.stranger(path, os.lstat(path), lenient=True):  # someone may have planted it
                    longer = None
            looked.append(Found(path, content, theirs or mine, longer))
        return looked

    def _note(self, copies: list[Found]) -> None:
        before = self._written.read()
        after = {path: digest for path, digest in before.items() if os.path.lexists(path)}
        after |= {copy.path: _digest(copy.content) for copy in copies}
        if after != before:
            with contextlib.suppress(OSError):  # the copies are in place all the same
                self._written.write(after)

    def _remove(self) -> None:
        for path, digest in self._written.read().items():
            with contextlib.suppress(OSError, ValueError):
                content = files.read_bytes(path, FILE_LIMIT, trusted=False) or b""
                if _digest(content) in str(digest) and files.remove(path):
                    why = "the key has no living token. That client may issue itself."
                    _log.warning("Removed the copy %s: %s", path, why)


def _target(text: str, market: Market) -> Target:
    client, _, folder = (part.strip() for part in text.partition(":"))
    if client not in EXPORT_FOLDERS:
        raise ConfigurationError(f"There is no export for {client!r}; choose one of {', '.join(EXPORT_FOLDERS)}.")
    if folder := folder or EXPORT_FOLDERS[client]:
        try:
            return Target(client, os.path.abspath(os.path.expanduser(folder)))
        except FileNotFoundError:
            why = "is relative to the current folder, which is gone; give an absolute path. Nothing was written."
            raise ConfigurationError(f"{folder} {why}") from None
    return Target(client, market.token_dir, f"{market.name}_krs_token.dat")


def _refuse_foreign(present: list[Found]) -> None:
    if path := next((one.path for one in present if not one.replaceable), ""):
        raise ConfigurationError(
            f"{path} holds no token of this key, as far as can be seen: it was left as it is, and nothing was written. "
            "Give this market a folder of its own, or remove the file."
        )


def _unwritable(target: Target, why: str) -> TokenStoreError:
    return TokenStoreError(
        f"The files of {target.client} in {target.folder} cannot be written, and the token is untouched: {why}."
    )


def _mojito2(market: Market, token: Token, now: datetime) -> bytes:
    app_key, app_secret = market.credentials()
    content = as_answer(token, now) | {"timestamp": int(token.expires_at.timestamp())}
    return pickle.dumps(content | {"api_key": app_key, "api_secret": app_secret}, protocol=PICKLE_PROTOCOL)


def _python_kis_names(market: Market, _: datetime) -> list[str]:
    hts_id = market.settings.hts_id or ""
    if not hts_id or os.path.basename(hts_id) != hts_id:
        raise ConfigurationError(
            "KIS_HTS_ID is not set to the account's HTS id, which python-kis has in the name of its file; set it."
        )
    source = "".join(("pykis", hts_id, *market.credentials(), "token"))  # as python-kis computes it
    digest = sha1(source.encode(), usedforsecurity=False).hexdigest()
    return [f"token_{'virtual' if market.environment == 'paper' else 'real'}_{hts_id}_{digest}.json"]


def _kis_auth_names(_: Market, now: datetime) -> list[str]:
    # Names for today and tomorrow, in the zone of this machine, where they are read.
    return [f"KIS{day.astimezone():%Y%m%d}" for day in (now, now + DAY)]


def _kis_auth(_: Market, token: Token, __: datetime) -> bytes:
    # The client compares the expiry with the local time of the machine that it runs on.
    return f"token: {token.access_token}\nvalid-date: {token.expires_at.astimezone():%Y-%m-%d %H:%M:%S}\n".encode()


CLIENTS = {  # to support another client, write two functions, and add a line here and to EXPORT_FOLDERS
    "mojito2": Client(lambda *_: ["token.dat"], _mojito2, holds_secret=True),
    "python-kis": Client(_python_kis_names, lambda _, *held: json.dumps(as_answer(*held)).encode()),
    "kis-auth": Client(_kis_auth_names, _kis_auth),
}


def _longer(jwt: str, ours: Token | None, now: datetime) -> Token | None:
    """Return the token if it is alive, states its expiry, and lasts longer than `ours`; otherwise None."""
    with contextlib.suppress(ValueError):
        token, _ = from_text(jwt)
        if token.expires_at > now and (not ours or (token.expires_at > ours.expires_at and jwt != ours.access_token)):
            return token
    return None


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]
