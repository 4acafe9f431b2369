"""Why a key is in trouble: the words by which incidents are kept apart, and how the issuance record tells them.

What people read of a cause, its title and its cure, is in `flows.texts`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from tokencore import (
    ConfigurationError,
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenStoreError,
    TokenUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from typing import Protocol

    class Attempt(Protocol):
        """A line of the issuance record, as far as a cause is read from it."""

        @property
        def at(self) -> datetime:
            """When it was, aware UTC."""

        @property
        def outcome(self) -> str:
            """What became of the attempt."""

        @property
        def expires_at(self) -> datetime | None:
            """Of the token that it brought, aware UTC."""

    class Token(Protocol):
        """The key's present token, as far as a cause is read from it."""

        @property
        def expires_at(self) -> datetime:
            """Aware UTC."""

        @property
        def issued_at(self) -> datetime | None:
            """Aware UTC."""

        @property
        def rejected_at(self) -> datetime | None:
            """When it was found dead, aware UTC."""


CLOCKS = timedelta(minutes=10)  # by which KIS's clock and ours may differ, as tokencore sees it too
MINUTE = 60.0  # seconds, KIS's own


class Cause(NamedTuple):
    """One kind of trouble.

    Attributes:
        name: what incidents and texts are told apart by.
        at_once: whether a person hears of it even while the next need is far; otherwise once it presses.
        by_person: whether nothing but a person can end it within hours.
        reminds: whether it is told again while it lasts.

    """

    name: str
    at_once: bool = True
    by_person: bool = False
    reminds: bool = True


class SilenceError(Exception):
    """Prefect gives no sign of life; the text says which is missing."""


LIMIT = Cause("limit")
FOREIGN_LIMIT = Cause("foreign-limit")
FOREIGN_TOKEN = Cause("foreign-token", reminds=False)  # nothing is wrong yet; it ends with our next own token
WAITING = Cause("cool-down", at_once=False)
CEILING = Cause("ceiling", by_person=True)
DEAD = Cause("dead", by_person=True)
SAME_DEAD = Cause("same-dead", by_person=True)
CREDENTIALS = Cause("credentials", by_person=True)
DOWN = Cause("kis-down", at_once=False)
STORE = Cause("store", by_person=True)
SETTINGS = Cause("settings", by_person=True)
UNSERVED = Cause("unserved", at_once=False)
UNFORESEEN = Cause("unforeseen")
SILENT = Cause("silent", by_person=True)

REFUSED = (LIMIT, FOREIGN_LIMIT)  # by KIS's minute limit, ours or someone else's
CAUSES = (
    *(LIMIT, FOREIGN_LIMIT, FOREIGN_TOKEN, WAITING, CEILING, DEAD, SAME_DEAD),
    *(CREDENTIALS, DOWN, STORE, SETTINGS, UNSERVED, UNFORESEEN, SILENT),
)
BY_NAME = {cause.name: cause for cause in CAUSES}

_BY_ERROR: tuple[tuple[type[Exception], Cause], ...] = (
    (CredentialsError, CREDENTIALS),
    (IssuerUnavailableError, DOWN),
    (TokenStoreError, STORE),
    (ConfigurationError, SETTINGS),
    (TokenUnavailableError, UNSERVED),
    (SilenceError, SILENT),
)
_NEVER_SENT = ("unreachable", "imported")  # outcomes without a request of ours at KIS
_BY_OUTCOME = {
    **dict.fromkeys(("bad_key", "bad_secret", "denied"), CREDENTIALS),
    **dict.fromkeys(("server_error", "refused", "bad_answer", "no_answer", "unreachable"), DOWN),
}


def cause_of(
    error: Exception, attempts: Sequence[Attempt], token: Token | None = None, interval: float = MINUTE
) -> Cause:
    """The cause behind `error`, for a key with this issuance record, present token and issue interval (seconds).

    A pause after a failure is no cause of its own: the last attempt's outcome tells what it waits for.
    """
    last = attempts[-1].outcome if attempts else ""
    if token and token.rejected_at and last == "same" and isinstance(error, IssuanceLimitError | TokenUnavailableError):
        return SAME_DEAD
    if isinstance(error, IssuanceLimitError):
        return _limited(error, attempts, token, interval)
    return next((cause for kind, cause in _BY_ERROR if isinstance(error, kind)), UNFORESEEN)


def _limited(error: IssuanceLimitError, attempts: Sequence[Attempt], token: Token | None, interval: float) -> Cause:
    if error.cause == "ceiling":
        return CEILING
    if error.cause == "same_token":
        return UNSERVED if token and token.rejected_at is None else DEAD
    if attempts and attempts[-1].outcome == "limit":
        return LIMIT if _is_ours(attempts, interval) else FOREIGN_LIMIT
    return _BY_OUTCOME.get(attempts[-1].outcome if attempts else "", WAITING)


def _is_ours(attempts: Sequence[Attempt], interval: float) -> bool:
    """Whether a request of our own came so shortly before the first of the last refusals that it may be their cause.

    Twice the interval, because nobody knows whether KIS's minute begins with a request or with its answer.
    """
    refused = len(attempts) - 1
    while refused and attempts[refused - 1].outcome == "limit":
        refused -= 1
    seen = [attempt.at for attempt in attempts[:refused] if attempt.outcome not in _NEVER_SENT]
    return bool(seen) and attempts[refused].at - seen[-1] <= timedelta(seconds=2 * interval)


def is_foreign(token: Token | None, attempts: Sequence[Attempt]) -> bool:
    """Whether KIS answered us with a token that this record did not issue.

    The record knows its expiry from an answer that brought nothing new, and no request of ours from about the
    time of its issue. A token that nobody here asked KIS for, such as one put in by hand, is nobody's fault.
    """
    if token is None or token.issued_at is None:
        return False
    first = next((attempt for attempt in attempts if attempt.expires_at == token.expires_at), None)
    if first is None or first.outcome != "same":
        return False
    issued_at = token.issued_at
    return not any(abs(one.at - issued_at) <= CLOCKS for one in attempts if one.outcome not in _NEVER_SENT)


def as_met(error: Exception, attempts: Sequence[Attempt]) -> Exception:
    """The error for the run: the pause after KIS gave no token is KIS giving no token, and may be tried again."""
    if cause_of(error, attempts) is DOWN and not isinstance(error, IssuerUnavailableError):
        return IssuerUnavailableError(str(error))
    return error
