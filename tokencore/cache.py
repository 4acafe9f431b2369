"""A market's token file as this key sees it: a token, nothing, or something that is not ours."""

from __future__ import annotations

import os

from tokencore import flatjson, store, tokens
from tokencore.market import fingerprint
from tokencore.moments import UTC, datetime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokencore.store import Signature
    from tokencore.tokens import Token

FOREIGN = "of another key or environment"
_kept: dict[tuple[str, str], Token] = {}  # by fingerprint and environment: not saved, so for this process only


class Cache:
    """The token files of one key: read for one market, searched over all, written together.

    Attributes:
        folder: the token directory, absolute.
        fingerprint: names the key in its environment, without telling it.
        path: the first market's token file.

    """

    __slots__ = ("__dict__", "_app_key")  # what `vars` shows has no secret

    def __init__(
        self, folder: str, base_url: str, environment: str, app_key: str, prefixes: Sequence[str], *, own: str = ""
    ) -> None:
        """Serve the markets with `prefixes`, all of the key `app_key` at `base_url`; the first one is read first.

        With `own` that market is the first one, whether it is among them or not.
        """
        self.folder = folder
        self.fingerprint = fingerprint(app_key, base_url)
        self._own = own or prefixes[0]
        self.path = store.token_file(folder, self._own)
        self._prefixes = prefixes
        self._environment = environment
        self._app_key = app_key
        self._known: dict[str, tuple[Signature, Token]] = {}

    def __repr__(self) -> str:
        return f"Cache({self.folder!r}, {self.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Cache knows its key and is not pickled")

    @property
    def paths(self) -> list[str]:
        """The token files of all markets of the key, the first market's first."""
        return [store.token_file(self.folder, prefix) for prefix in dict.fromkeys([self._own, *self._prefixes])]

    def read(self, path: str | None = None) -> tuple[Token | None, str]:
        """The token in the file (the first market's by default), and what is wrong where there is none.

        The second item is empty when there is a token or simply no file. A file is parsed again only when
        its inode, size or time differs, so that another process's renewal is seen by one `stat`.
        """
        token, problem = self._on_file(path or self.path)
        kept = _kept.get((self.fingerprint, self._environment))
        if kept is not None and (token is None or token.expires_at < kept.expires_at):
            return kept, ""
        return token, problem

    def still_has(self, token: Token) -> bool:
        """Whether `token`, as `read` gave it, is still what the first market's file holds, by one `stat`."""
        known = self._known.get(self.path)
        return (
            known is not None
            and known[1] is token
            and token.rejected_at is None
            and not _kept
            and store.signature(self.path) == known[0]
        )

    def newest(self) -> Token | None:
        """The token of the key that lasts longest, whichever of its markets has it; one rejected comes last.

        Markets that the settings do not name (a manager of the user's own) are found by their files.
        """
        return longest(self.read(path)[0] for path in dict.fromkeys([*self.paths, *self._files()]))

    def save(self, token: Token, now: datetime) -> None:
        """Write `token` for every market of the key; the caller holds the key's lock.

        What stands there and is no token of this key is set aside first.

        Raises:
            OSError: a file could not be written and is as it was; all that could be written have the new token.

        """
        import json  # not on the path of a cached token

        content = tokens.to_cache(token, now=now, environment=self._environment, key_fingerprint=self.fingerprint)
        text = json.dumps(content, indent=2) + "\n"

        def put(path: str) -> None:
            if self._on_file(path)[1]:
                store.set_aside(path)
            store.write_text(path, text, temporary=self.fingerprint)

        _try_all(put, self.paths)
        _kept.pop((self.fingerprint, self._environment), None)

    def delete(self) -> bool:
        """Remove the first market's token file; whether there was one. The caller holds the key's lock.

        Raises:
            OSError: it cannot be removed.

        """
        _kept.pop((self.fingerprint, self._environment), None)
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return False
        store.sync_folder(self.folder)
        return True

    def keep(self, token: Token) -> None:
        """Serve `token` to this process although it could not be saved."""
        _kept[self.fingerprint, self._environment] = token

    def is_only_here(self, token: Token) -> bool:
        """Whether no market's file holds this token, so that it ends with this process."""
        found = [self._on_file(path)[0] for path in self.paths]
        return token.access_token not in [one.access_token for one in found if one]

    def issued_mark(self) -> datetime | None:
        """When the key last issued, by the marks that survive a lost record and a deleted token file.

        A mark names no key: beside another key's token file it is that one's.
        """
        marks = [_mark(path) for path in self.paths if self._on_file(path)[1] != FOREIGN]
        return max((mark for mark in marks if mark), default=None)

    def mark_issued(self, now: datetime) -> None:
        """Note the issue, in whole epoch seconds, beside every market's token file.

        Raises:
            OSError: a mark could not be written; the record knows all the same.

        """
        text = f"{int(now.timestamp())}\n"
        _try_all(lambda path: store.write_text(_mark_file(path), text, temporary=self.fingerprint), self.paths)

    def _files(self) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                return [entry.path for entry in entries if entry.name.endswith("api_token.json")]
        except OSError:
            return []

    def _on_file(self, path: str) -> tuple[Token | None, str]:
        seen = store.signature(path)
        if seen is None:
            return None, ""
        known = self._known.get(path)
        if known is None or known[0] != seen:
            token, problem = self._parse(path)
            if token is None:  # perhaps only for now: the next look reads it again
                return None, problem
            known = self._known[path] = (seen, token)
        return known[1], ""

    def _parse(self, path: str) -> tuple[Token | None, str]:
        try:
            text = store.read_text(path)
            if text is None:
                return None, ""
            content = flatjson.loads(text)
            if not isinstance(content, dict):
                return None, "not a JSON object"
            token = tokens.from_cache(content)
        except (ValueError, RecursionError) as error:
            return None, str(error).splitlines()[0][:80] or "unreadable"
        # Caches of earlier tools name no key; then the JWT's `jti`, where there is one, has to be ours.
        bound = content.get("key_fingerprint")
        if bound is None:
            bound_elsewhere = tokens.jwt_claims(token.access_token).get("jti", self._app_key) != self._app_key
        else:
            bound_elsewhere = bound != self.fingerprint
        if bound_elsewhere or content.get("environment", self._environment) != self._environment:
            return None, FOREIGN
        return token, ""


def longest(found: Iterable[Token | None]) -> Token | None:
    """Of these tokens the one that lasts longest; one rejected comes last."""
    known = (token for token in found if token is not None)
    return max(known, key=lambda token: (token.rejected_at is None, token.expires_at), default=None)


def _try_all(write: Callable[[str], None], paths: Sequence[str]) -> None:
    """One market's file may fail: any other that takes the token saves it. The first failure is raised at the end."""
    failed = None
    for path in paths:
        try:
            write(path)
        except OSError as error:
            failed = failed or error
    if failed:
        raise failed


def _mark(path: str) -> datetime | None:
    try:
        return datetime.fromtimestamp(float(store.read_text(_mark_file(path)) or "nan"), UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _mark_file(path: str) -> str:
    return path.removesuffix("api_token.json") + "token_issued_at.dat"
