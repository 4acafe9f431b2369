"""What a store of tokens can do, whichever medium it is on: the only way for the rest of the package to reach one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tokencore.attempts import Attempt
    from tokencore.tokens import Token

    Fence = Any  # what `begin` gives and `depart` and `finish` take; only the store knows what is in it


class Document(Protocol):
    """A small JSON object that processes share, written under its own lock.

    What cannot be written raises OSError and leaves what was there before.
    """

    @property
    def place(self) -> str:
        """Where it is, for people."""

    def read(self) -> dict[str, Any]:
        """The object; empty where there is none that could be read."""

    def write(self, content: dict[str, Any]) -> None:
        """Replace it durably.

        Raises:
            OSError: it could not be written; what was there before still is.

        """

    def lock(self, *, wait: float, give_up: Callable[[], bool] = ...) -> AbstractContextManager[bool]:
        """Hold its lock inside the block; see `Store.lock`."""


class Store(Protocol):
    """One key as one market sees it. Reading takes no lock; everything that writes is called under `lock`.

    What cannot be written raises OSError and leaves what was there before.
    """

    @property
    def fingerprint(self) -> str:
        """Names the key in its environment, without revealing it."""

    @property
    def place(self) -> str:
        """Where the token is, for people."""

    def read(self) -> tuple[Token | None, str]:
        """The key's living token, or the last one known; where there is none, why (empty if nothing is stored)."""

    def unchanged(self, token: Token) -> bool:
        """Whether `token`, as `read` gave it, is what a read would still give; as cheap as one `stat`."""

    def newest(self, *, shared: bool = False) -> Token | None:
        """The key's token that lasts longest, wherever an earlier version or another tool has put one.

        With `shared` without one that could not be saved, which no other process can use.
        """

    def saved(self, token: Token) -> bool:
        """Whether `token` is stored, so that it outlives this process."""

    def attempts(self) -> list[Attempt]:
        """The issuance record, oldest attempt first."""

    def begin(self, attempt: Attempt) -> Fence | None:
        """Record an attempt durably before its request is sent; None where another one began first."""

    def depart(self, fence: Fence) -> bool:
        """Re-date the attempt as its request leaves; False where it must not be sent."""

    def finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """Save the token for every market of the key, and record the outcome."""

    def note(self, attempt: Attempt) -> None:
        """Record what needed no request: a token that was taken over."""

    def save(self, token: Token) -> None:
        """Save a token that was imported, adopted or rejected, for every market of the key.

        Raises:
            OSError: it could not be written: only this process has it; what was stored before still is.

        """

    def delete(self) -> bool:
        """Remove this market's token, and the key's with its last market; whether there was one."""

    def clear(self) -> None:
        """Remove the key's token for all markets; the record stays."""

    def lock(self, *, wait: float, give_up: Callable[[], bool] = ...) -> AbstractContextManager[bool]:
        """Hold the key's lock inside the block; yields False where it was not acquired within `wait` seconds.

        `give_up` is asked while another process holds it: who finds what he waits for need not queue.

        Raises:
            TokenStoreError: the lock cannot be used; nothing was changed.

        """

    def details(self) -> dict[str, Any]:
        """For `check`: `file`, `permissions` and `cache_exists`."""

    def document(self, name: str) -> Document:
        """The key's document of that name."""
