"""The interface of a token store, whatever its medium: the rest of the package reaches a store only through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tokencore.attempts import Attempt
    from tokencore.tokens import Token

    Fence = Any  # returned by `begin`, passed to `depart` and `finish`; only the store knows what is in it


class Document(Protocol):
    """A small JSON object that processes share, written under its own lock.

    A failed write raises OSError and leaves the previous content in place.
    """

    @property
    def place(self) -> str:
        """Where the document is, for people to read."""

    def read(self) -> dict[str, Any]:
        """Return the object; empty if there is none or it cannot be read."""

    def write(self, content: dict[str, Any]) -> None:
        """Replace the object durably.

        Raises:
            OSError: it could not be written; the previous content is still there.
        """

    def lock(self, *, wait: float, give_up: Callable[[], bool] = ...) -> AbstractContextManager[bool]:
        """Hold the document's lock inside the block; see `Store.lock`."""


class Store(Protocol):
    """One key as one market sees it. Reading takes no lock; everything that writes is called under `lock`.

    A failed write raises OSError and leaves the previous content in place.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies the key at its address without revealing it."""

    @property
    def place(self) -> str:
        """Where the token is stored, for people to read."""

    def read(self) -> tuple[Token | None, str]:
        """Return the key's living token, else the last one known; if none, also why (empty if nothing is stored)."""

    def unchanged(self, token: Token) -> bool:
        """Whether `read` would still return `token`, which it returned before; as cheap as one `stat`."""

    def newest(self, *, shared: bool = False) -> Token | None:
        """Return the key's token that lasts longest, wherever an earlier version or another tool has put it.

        With `shared`, ignore a token that could not be saved, because no other process can use it.
        """

    def saved(self, token: Token) -> bool:
        """Whether `token` is stored, so that it outlives this process."""

    def attempts(self) -> list[Attempt]:
        """The issuance record, oldest attempt first."""

    def begin(self, attempt: Attempt, *, strict: bool = False) -> Fence | None:
        """Record an attempt durably before its request is sent; None if another one began first.

        Raises:
            OSError: it could not be recorded; or, if `strict`, not where the token would be stored for others.
        """

    def depart(self, fence: Fence) -> bool:
        """Update the attempt's time just before its request is sent; False if it must not be sent."""

    def finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """Save the token for every market of the key, and record the outcome."""

    def note(self, attempt: Attempt) -> None:
        """Record what needed no request for a token: one that was imported, adopted or revoked."""

    def save(self, token: Token) -> None:
        """Save a token that was imported, adopted or rejected, for every market of the key.

        Raises:
            OSError: it could not be written; only this process has it, and what was stored before is unchanged.
        """

    def delete(self) -> bool:
        """Remove this market's token, and the key's with that of its last market; return whether there was one."""

    def clear(self) -> None:
        """Remove the key's token, which is dead, for all markets; the record stays."""

    def lock(self, *, wait: float, give_up: Callable[[], bool] = ...) -> AbstractContextManager[bool]:
        """Hold the key's lock inside the block; yields False if it was not acquired within `wait` seconds.

        `give_up` is called while another process holds the lock; the wait ends when it returns True, for instance
        because the token has come. Attempts that a clock which was set back has left in the future are dated now.

        Raises:
            TokenStoreError: the lock cannot be used; nothing was changed.
        """

    def details(self) -> dict[str, Any]:
        """Return `file`, `permissions` and `cache_exists` for `check`."""

    def document(self, name: str) -> Document:
        """Return the key's document of that name."""
