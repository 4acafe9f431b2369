"""A key's token, issuance record and lock as files in the token directory, shared by every process of the machine.

`key-<fingerprint>.json` holds the token; `<market>_api_token.json` is each market's view of it;
`key-<fingerprint>.jsonl` is the issuance record; `key-<fingerprint>.lock` is locked through the operating system, so
that the lock ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from datetime import UTC, datetime, timedelta
from functools import cached_property

from tokencore import tokens
from tokencore.config.market import key_name
from tokencore.errors import TokenStoreError
from tokencore.redaction import log
from tokencore.sealing import Sensitive
from tokencore.stores import files, permissions
from tokencore.stores.lock import MARK, VIEW, hold

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from tokencore.attempts import Attempt
    from tokencore.config.market import Market
    from tokencore.stores.files import Signature
    from tokencore.stores.record import Record
    from tokencore.tokens import Token

FOREIGN = "of another key or environment"
PROMPT = timedelta(seconds=1)  # if a request leaves later than this after it was recorded, its line gets the new time
_owners: dict[str, tuple[Signature, tuple[str, str]]] = {}  # by path, whose file it is, so as not to parse it
_unsaved: dict[str, Token] = {}  # by the path of the key's file: what could not be saved, for this process only


class FileStore(Sensitive):
    """The `Store` of one key in one folder, as one market sees it."""

    __slots__ = ("__dict__", "_app_key")  # so that `vars` shows no secret

    def __init__(self, market: Market, siblings: Callable[[], Sequence[str]]) -> None:
        """Set the paths; nothing is opened yet. `siblings` returns the names of all markets of the key."""
        self.folder = market.token_dir
        self.fingerprint = market.fingerprint
        self.place = self._path(f"{market.name}_{VIEW}")
        self._identity = market.fingerprint, market.environment
        self._key_path = self._path(f"key-{market.key_name}.json")
        self._lock_path = self._path(f"key-{self.fingerprint}.lock")
        self._app_key = market.app_key
        self._siblings = siblings
        self._known: dict[str, tuple[Signature, Token]] = {}

    def __repr__(self) -> str:
        return f"FileStore({self.folder!r}, {self.fingerprint!r})"

    def read(self) -> tuple[Token | None, str]:
        """Return the key's living token, else the last one known, and why there is none; only changed files are parsed.

        Raises:
            TokenStoreError: the folder or a file belongs to another user or is writable by others; or this user has no
                access to the folder.
        """
        token, problem = self._on_file(self._key_path)
        if token is None or token.rejected_at is not None or token.expires_at.timestamp() <= time.time():
            token = self._longest(token)
            if token is None and not problem:
                permissions.refuse_strangers(self.folder, reading=True)
                problem = self._on_file(self.place)[1]
        return self._or_unsaved(token), "" if problem == FOREIGN else problem  # that is a miss, not a fault

    def unchanged(self, token: Token) -> bool:
        """Whether the key's file still holds `token`, which `read` returned before; costs one `stat`."""
        served = self._known.get(self._key_path)
        return (
            served is not None
            and served[1] is token
            and token.rejected_at is None
            and not _unsaved
            and files.signature(self._key_path) == served[0]
        )

    def newest(self, *, shared: bool = False) -> Token | None:
        """Return the longest-lasting token of the key's file and all views; earlier versions write views only."""
        token = self._longest(self._on_file(self._key_path)[0])
        return token if shared else self._or_unsaved(token)

    def saved(self, token: Token) -> bool:
        """Whether the key's file or a market's view has this token."""
        if (own := self._on_file(self._key_path)[0]) and own.access_token == token.access_token:
            return True  # whatever the views hold
        return any(one.access_token == token.access_token for _, one in self._views())

    def save(self, token: Token) -> None:
        """Write the key's file, which alone decides whether this succeeds, then each market's view.

        Raises:
            OSError: the key's file could not be written; it is unchanged, and only this process has the token.
        """
        now = datetime.now(UTC)
        text = tokens.to_cache(token, now=now, environment=self._identity[1], key_fingerprint=self.fingerprint)
        views = self._own_views()
        try:
            self._set_aside([self._key_path, *views])
            written = files.write_bytes(self._key_path, text.encode(), writer=self.fingerprint)
        except (OSError, TokenStoreError):
            _unsaved[self._key_path] = token
            raise
        _owners[self._key_path] = written, self._identity
        _unsaved.pop(self._key_path, None)
        for path in views:
            if seen := self._copy(path, text.encode()):
                _owners[path] = seen, self._identity

    def delete(self) -> bool:
        """Remove this market's view, and the key's file with the last view.

        A view that another key wrote last stays, as it only hides ours; the key's file lists the deleted markets.
        """
        hidden = {path for path in self._own_views() if self._on_file(path)[1] == FOREIGN}
        found = self.place not in hidden and files.remove(self.place)
        content = FileDocument(self._key_path).read()
        deleted = {self._path(name) for name in content.get("deleted", [])}
        found = found or (bool(content) and self.place in hidden - deleted)
        deleted.add(self.place)
        if not (hidden - deleted or any(self._views())):
            return self._forget() or found
        if content:
            content["deleted"] = sorted(map(os.path.basename, deleted))
            files.write_bytes(self._key_path, json.dumps(content, indent=2).encode() + b"\n", writer=self.fingerprint)
        return found

    def clear(self) -> None:
        """Remove the key's file and all views of it."""
        for path, _ in self._views():
            files.remove(path)
        self._forget()

    def details(self) -> dict[str, Any]:
        """Return the path and mode of the market's view, or else of the key's file, and whether it exists."""
        for path in (self.place, self._key_path):
            with contextlib.suppress(OSError):  # there is no such file
                mode = stat.S_IMODE(os.lstat(path).st_mode)
                return {"file": path, "permissions": f"{mode:04o}", "cache_exists": True}
        return {"file": self.place, "permissions": None, "cache_exists": False}

    def attempts(self) -> list[Attempt]:
        """Return the record or, if it is lost, the last issue as the `.dat` files have it."""
        return self.record.attempts() or self._marked()

    def begin(self, attempt: Attempt, *, strict: bool = False) -> Attempt:
        """Append to the record durably; if the disk takes no line, the lock file keeps the time, unless `strict`."""
        self.record.append(attempt, strict=strict)
        return attempt

    def depart(self, fence: Attempt) -> bool:
        """Update the attempt's time, as connecting may take most of a minute; False if the record cannot be changed."""
        now = datetime.now(UTC)
        try:
            if abs(now - fence.at) > PROMPT:
                self.record.complete(fence, fence._replace(at=now))
        except OSError:
            return False
        return True

    def finish(self, fence: Attempt, attempt: Attempt, token: Token | None = None) -> None:
        """Save the token first, so that no crash leaves an outcome without it; then replace the attempt's line."""
        try:
            if token is not None:
                self.save(token)
        finally:
            if token is not None:
                self.mark(token.issued_at or attempt.at)
            self.record.complete(fence, attempt)

    def mark(self, issued_at: datetime) -> None:
        """Write the time of the key's last issue beside each market's view."""
        for path in self._own_views():
            self._copy(path.removesuffix(VIEW) + MARK, b"%d\n" % issued_at.timestamp())

    def note(self, attempt: Attempt) -> None:
        """Append an attempt that needed no request; the lock file's time would stand for one.

        Raises:
            OSError: it could not be written.
        """
        self.record.append(attempt, strict=True)

    @contextlib.contextmanager
    def lock(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the lock file's lock inside the block; first, date attempts that lie in the future as made now."""
        with hold(self._lock_path, wait, give_up) as held:
            if held:
                with contextlib.suppress(OSError):
                    self.record.redate(datetime.now(UTC))
            yield held

    def document(self, name: str) -> FileDocument:
        """Return the document in `key-<fingerprint>-<name>.json`."""
        return FileDocument(self._path(f"key-{self.fingerprint}-{name}.json"))

    @cached_property
    def record(self) -> Record:
        """The issuance record."""
        from tokencore.stores.record import Record  # a cached token needs no record

        return Record(self._path(f"key-{self.fingerprint}.jsonl"), self._lock_path)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _own_views(self) -> list[str]:
        return list(dict.fromkeys([self.place, *(self._path(f"{name}_{VIEW}") for name in self._siblings())]))

    def _views(self) -> Iterator[tuple[str, Token]]:
        """Yield the views with a token of this key, own first, also of markets that only a subclass names."""
        try:
            with os.scandir(self.folder) as entries:
                found = [entry.path for entry in entries if entry.name.endswith(f"_{VIEW}")]
        except OSError:
            return
        if found:
            permissions.refuse_strangers(self.folder)
        for path in sorted(found, key=lambda path: (path != self.place, path)):
            if token := self._on_file(path, trusted=True)[0]:
                yield path, token

    def _longest(self, token: Token | None) -> Token | None:
        """Return the longest-lasting of `token` and the views' tokens, ignoring copies of `token` if it is rejected."""
        found = [one for _, one in self._views()]
        if token is not None and token.rejected_at is not None:
            found = [one for one in found if one.access_token != token.access_token]
        return tokens.longest([token, *found])

    def _or_unsaved(self, token: Token | None) -> Token | None:
        return tokens.longest([token, _unsaved.get(self._key_path)]) if _unsaved else token

    def _forget(self) -> bool:
        _unsaved.pop(self._key_path, None)
        return files.remove(self._key_path)

    def _on_file(self, path: str, *, trusted: bool = False) -> tuple[Token | None, str]:
        """Return the token in the file, or why there is none; `trusted` if the folder has just been checked."""
        seen = files.signature(path)
        if seen is None:
            return None, ""
        known = self._known.get(path)
        if known is None or known[0] != seen:
            owner = _owners.get(path)
            if owner and owner[0] == seen and owner[1] != self._identity:
                return None, FOREIGN
            if not trusted:
                permissions.refuse_strangers(self.folder)
            token, problem = self._parse(path, seen)
            if token is None:  # that may be temporary, so the next look reads it again
                return None, problem
            known = self._known[path] = (seen, token)
        return known[1], ""

    def _parse(self, path: str, seen: Signature) -> tuple[Token | None, str]:
        try:
            text = files.read_text(path)
            if text is None:
                return None, ""
            token, content = tokens.from_text(text)
        except ValueError as error:
            return None, (str(error).splitlines() or ["unreadable"])[0][:80]
        # Other tools' caches name no key; then the JWT's `jti`, if there is one, has to be our app key.
        bound = content.get("key_fingerprint")
        if isinstance(bound, str) and isinstance(content.get("environment"), str):
            _owners[path] = seen, (bound, content["environment"])
        if bound is None and tokens.jwt_claims(token.access_token).get("jti", self._app_key) == self._app_key:
            bound = self.fingerprint
        if (bound, content.get("environment", self._identity[1])) != self._identity:
            return None, FOREIGN
        return token, ""

    def _copy(self, path: str, content: bytes) -> Signature | None:
        """Write a copy of what the key's file or the record has, and return its signature; only log a failure."""
        try:
            return files.write_bytes(path, content, writer=self.fingerprint, durable=False)
        except OSError as error:
            unaffected = "programs that use tokencore are not affected"
            log().warning(f"{path} could not be updated ({error.strerror}); {unaffected}.")
            return None

    def _set_aside(self, paths: Sequence[str]) -> None:
        """Set aside what is no token of this key, unless it is a view of another key that has its own file here."""
        kept = []
        for path in paths:
            if _owners.get(path) == (files.signature(path), self._identity):
                continue  # unchanged since this process read or wrote it as this key's
            problem = self._on_file(path, trusted=True)[1]  # the lock has checked the folder
            if problem and not (problem == FOREIGN and self._kept_elsewhere(path)):
                files.set_aside(path)
                kept.append(f"{path} did not contain a token of this key ({problem}); it is kept as {path}.aside.")
        if kept:
            log().warning(" ".join(kept))

    def _kept_elsewhere(self, view: str) -> bool:
        """Whether the other key that wrote `view` has a file of its own; 0.1 wrote none, so `view` becomes that."""
        seen, owner = _owners.get(view, (None, ("", "")))
        own_file = self._path(os.path.basename(f"key-{key_name(*owner)}.json"))
        if seen is None or seen != files.signature(view):
            return False
        with contextlib.suppress(OSError):  # it is there already, or no file can have two names here
            os.link(view, own_file)
        return os.path.exists(own_file)

    def _marked(self) -> list[Attempt]:
        """Return the last issue as the `.dat` files give it; a file next to another key's view belongs to that key."""
        from tokencore.attempts import Attempt, Outcome

        marks = []
        for path in self._own_views():
            if self._on_file(path)[1] != FOREIGN:
                with contextlib.suppress(ValueError, OverflowError, OSError):
                    text = files.read_text(path.removesuffix(VIEW) + MARK) or "nan"
                    # The file has whole seconds, and KIS counts the rest of the last one too.
                    marks.append(datetime.fromtimestamp(float(text) + 1, UTC))
        return [Attempt(max(marks), Outcome.ISSUED)] if marks else []


class FileDocument:
    """A small JSON object in a file of its own, with a lock file beside it."""

    def __init__(self, place: str) -> None:
        """Set the path; nothing is opened yet."""
        self.place = place

    def read(self) -> dict[str, Any]:
        """Return the object; empty if there is none or it cannot be read."""
        try:
            found = json.loads(files.read_text(self.place) or "{}")
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, content: dict[str, Any]) -> None:
        """Replace the file durably."""
        files.write_bytes(self.place, json.dumps(content, indent=1).encode() + b"\n", writer="document")

    def lock(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> AbstractContextManager[bool]:
        """Hold the document's lock inside the block; yield False if it was not acquired in time."""
        return hold(self.place.removesuffix(".json") + ".lock", wait, give_up)
