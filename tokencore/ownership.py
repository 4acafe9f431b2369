"""Whose a file for another client is: this environment's of the key, or one that must not be written over.

A token tells its app key, but not whether it is for real or for paper. So what is written is remembered by its digest,
and a file that tokencore may have written, but not for this environment, is another's.
"""

from __future__ import annotations

import contextlib
import os
import re
from hashlib import sha256
from typing import TYPE_CHECKING

from tokencore import store
from tokencore.clients import PICKLE_PROTOCOL
from tokencore.tokens import jwt_claims

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencore.clients import Holder

FILE_LIMIT = 1 << 20  # bytes; what is larger is no client's file
REMEMBERED = 3_000  # digests, a year of eight a day; the oldest are forgotten
_JWT = re.compile(rb"(?<![\w-])[\w-]++\.[\w-]++\.[\w-]++", re.ASCII)  # possessive: linear, whatever stands there
_DIGEST = re.compile(r"[0-9a-f]{16}", re.ASCII)
_OTHERS = 0o077


class Ownership:
    """Tells which files are a key's in its environment; whoever adds to them holds the key's lock."""

    __slots__ = ("_holder", "_path", "_sole")

    def __init__(self, token_dir: str, holder: Holder, *, sole: bool) -> None:
        """Judge for the `holder`.

        `sole` says that the settings use its app key in no other environment. Then a file that the client wrote by
        itself is the holder's as well, since KIS gives every key for one environment only.
        """
        self._holder, self._sole = holder, sole
        self._path = os.path.join(token_dir, f"key-{holder.fingerprint}-exports.txt")

    def __repr__(self) -> str:
        return f"Ownership({self._path!r})"

    def __reduce__(self) -> str:
        raise TypeError("an Ownership knows credentials and is not pickled")

    def has(self, path: str) -> bool:
        """Whether the file there is the holder's: not where there is none, nor where that cannot be told."""
        found = content(path)
        if found is None:
            return False
        named = {jti for text in _JWT.findall(found) if isinstance(jti := jwt_claims(text.decode()).get("jti"), str)}
        if named - {self._holder.app_key}:
            return False
        if self._known(found):
            return True
        tells_key = bool(named) or self._holder.app_key.encode() in found
        return tells_key and (tells_environment(path) or (self._sole and _of_client(path, found)))

    def wrote(self, path: str) -> bool:
        """Whether what stands there was written from this token directory for the holder, as it is."""
        found = content(path)
        return found is not None and self._known(found)

    def note(self, contents: Iterable[bytes]) -> None:
        """Remember what is about to be written.

        Raises:
            TokenStoreError: the token directory cannot be written.

        """
        remembered = self._remembered()
        fresh = dict.fromkeys(digest for each in contents if (digest := self._digest(each)) not in remembered)
        if not fresh:
            return
        text = "".join(f"{digest}\n" for digest in [*remembered, *fresh][-REMEMBERED:])
        try:
            store.write_text(self._path, text, temporary=self._holder.fingerprint)
        except OSError as error:
            raise store.unusable(os.path.dirname(self._path), error) from None

    def _known(self, found: bytes) -> bool:
        return self._digest(found) in self._remembered()

    def _remembered(self) -> list[str]:
        """The digests, oldest first; of an unreadable file none."""
        with contextlib.suppress(ValueError):
            return [line for line in (store.read_text(self._path) or "").split() if _DIGEST.fullmatch(line)]
        return []

    def _digest(self, written: bytes) -> str:
        """Real and paper may have one address, and so one fingerprint and one file of digests."""
        return sha256(self._holder.environment.encode() + b"\0" + written).hexdigest()[:16]


def content(path: str) -> bytes | None:
    """What stands there; None without a file, or where it is no readable one."""
    try:
        return store.read_bytes(path, FILE_LIMIT)
    except ValueError:
        return None


def tells_environment(path: str) -> bool:
    """Whether the name of the file does so, as python-kis' does; it has a digest of the key, too."""
    return path.endswith(".json")


def _of_client(path: str, found: bytes) -> bool:
    """Whether the client wrote it and no tokencore: a pickle of another protocol, or a file open to others."""
    pickled = found[:1] == b"\x80"
    with contextlib.suppress(OSError):
        return (pickled and found[1:2] != bytes([PICKLE_PROTOCOL])) or bool(os.lstat(path).st_mode & _OTHERS)
    return False
