"""Why a key is in trouble: the causes that distinguish incidents, read from the error and the issuance record.

The functions are pure. The texts about a cause, its title and what to do, are in texts.toml.
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
    from tokencore import KeyState

DAY = timedelta(days=1)


class Cause(NamedTuple):
    """One kind of trouble."""

    name: str  # identifies its incidents and its texts
    at_once: bool = True  # whether it is reported even while the next need is far; otherwise once it is urgent
    by_person: bool = False  # whether only a person can end it within hours


class SilenceError(Exception):
    """Prefect shows no sign of life; the text says which one is missing."""


LIMIT = Cause("limit")
FOREIGN_LIMIT = Cause("foreign-limit")
FOREIGN_TOKEN = Cause("foreign-token")  # nothing is wrong yet, and nobody is reminded
RESTRICTED = Cause("restricted")
WAITING = Cause("cool-down", at_once=False)
SAME = Cause("same", at_once=False)
CEILING = Cause("ceiling", by_person=True)
DEAD = Cause("dead", by_person=True)
SAME_DEAD = Cause("same-dead", by_person=True)
CREDENTIALS = Cause("credentials", by_person=True)
DENIED = Cause("denied", by_person=True)  # the credentials are right
DOWN = Cause("kis-down", at_once=False)
STORE = Cause("store", by_person=True)
SETTINGS = Cause("settings", by_person=True)
UNSERVED = Cause("unserved", at_once=False)
UNFORESEEN = Cause("unforeseen")
SILENT = Cause("silent", by_person=True)

CAUSES = (
    *(LIMIT, FOREIGN_LIMIT, FOREIGN_TOKEN, RESTRICTED, WAITING, SAME, CEILING, DEAD, SAME_DEAD),
    *(CREDENTIALS, DENIED, DOWN, STORE, SETTINGS, UNSERVED, UNFORESEEN, SILENT),
)
BY_NAME = {cause.name: cause for cause in CAUSES}
NEEDS_PERSON = (CREDENTIALS, DENIED, SETTINGS, SILENT)  # nothing is tried until a person has acted
BY_ANSWER = (LIMIT, FOREIGN_LIMIT, RESTRICTED, CREDENTIALS, DENIED, DOWN)  # the last outcome says why

_BY_ERROR: tuple[tuple[type[Exception], Cause], ...] = (
    (CredentialsError, CREDENTIALS),
    (IssuerUnavailableError, DOWN),
    (TokenStoreError, STORE),
    (ConfigurationError, SETTINGS),
    (TokenUnavailableError, UNSERVED),
    (SilenceError, SILENT),
)
_BY_OUTCOME = {  # what a pause after a failed attempt waits for
    **dict.fromkeys(("bad_key", "bad_secret", "denied"), CREDENTIALS),
    **dict.fromkeys(("server_error", "refused", "bad_answer", "no_answer", "unreachable"), DOWN),
    "same": SAME,
}


def cause_of(error: Exception, state: KeyState | None) -> Cause:
    """Return the cause of `error`, for a key in this state; None if it could not be read, or no key was reached.

    A pause after a failure is not a cause of its own: the last attempt's outcome shows what it waits for.
    """
    attempts, token = (state.attempts, state.token) if state else ([], None)
    last = attempts[-1].outcome if attempts else ""
    if token and token.rejected_at and last == "same" and isinstance(error, IssuanceLimitError | TokenUnavailableError):
        return SAME_DEAD
    if isinstance(error, IssuanceLimitError):
        found = _limited(error, state)
    else:
        found = next((cause for kind, cause in _BY_ERROR if isinstance(error, kind)), UNFORESEEN)
    if found is CREDENTIALS and last == "denied":
        return DENIED
    day = [one for one in attempts if one.outcome == "issued" and attempts[-1].at - one.at < DAY]
    return RESTRICTED if found is DOWN and last == "refused" and len(day) > 1 else found


def as_met(error: Exception, cause: Cause) -> Exception:
    """Return the error for the run: a pause because KIS gave no token counts as KIS giving none, and may be retried."""
    down = cause in (DOWN, RESTRICTED) and not isinstance(error, IssuerUnavailableError)
    return IssuerUnavailableError(str(error)) if down else error


def _limited(error: IssuanceLimitError, state: KeyState | None) -> Cause:
    if error.cause == "ceiling":
        return CEILING
    if error.cause == "same_token":
        return UNSERVED if state and state.token and state.token.rejected_at is None else DEAD
    last = state.attempts[-1].outcome if state and state.attempts else ""
    if state and last == "limit":
        return LIMIT if _is_ours(state) else FOREIGN_LIMIT
    if error.cause == "minute" and last == "same":  # a request left less than a minute ago, whatever it brought
        return WAITING
    return _BY_OUTCOME.get(last, WAITING)


def _is_ours(state: KeyState) -> bool:
    """Whether a request of our own came so shortly before the latest series of refusals that it may be their cause.

    The limit is twice the interval, because nobody knows whether KIS's minute begins with a request or its answer.
    """
    attempts, interval = state.attempts, state.key.market.settings.issue_interval
    refused = len(attempts) - 1
    while refused and attempts[refused - 1].outcome == "limit":
        refused -= 1
    seen = [attempt.at for attempt in attempts[:refused] if attempt.counts]
    return bool(seen) and attempts[refused].at - seen[-1] <= timedelta(seconds=2 * interval)
