"""Why a key is in trouble: the words by which incidents are kept apart, titled and cured."""

from __future__ import annotations

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
    from typing import Protocol

    class Attempt(Protocol):
        """A line of the issuance record, as far as a cause is read from it."""

        @property
        def outcome(self) -> str:
            """What became of the attempt."""


class Cause(NamedTuple):
    """One kind of trouble.

    Attributes:
        name: what incidents are told apart by.
        title: the headline, at most 100 characters.
        cure: what a person does about it.
        at_once: whether a person hears of it even while a token serves and the next need is far.

    """

    name: str
    title: str
    cure: str
    at_once: bool


LIMIT = Cause(
    "limit",
    "KIS's issuance limit refused a token",
    "Find the other program that issues with this key (`tokencore history` lists our own requests), and let it use "
    "tokencore.",
    at_once=True,
)
WAITING = Cause(
    "cool-down",
    "No token yet: the key's minute is not over",
    "Nothing, if the next attempt succeeds.",
    at_once=False,
)
CEILING = Cause(
    "ceiling",
    "No more tokens today: the daily ceiling is reached",
    "See in `tokencore history` what used them up. If a session needs one, run refresh_token with force, or raise "
    "KIS_MAX_ISSUES_PER_DAY.",
    at_once=True,
)
DEAD = Cause(
    "dead",
    "The token is unusable and KIS would hand out the same one",
    "Find out who revoked it. Until the time above, only KIS's support can help.",
    at_once=True,
)
CREDENTIALS = Cause(
    "credentials",
    "KIS refuses the app key or its secret",
    "Correct KIS_APP_KEY and KIS_APP_SECRET, `make down` and `make up`, then run refresh_token.",
    at_once=True,
)
DOWN = Cause(
    "kis-down",
    "KIS gives no token",
    "Nothing at first. If it lasts, look at KIS's notices of maintenance and at this machine's network.",
    at_once=False,
)
STORE = Cause(
    "store",
    "The token directory cannot be used",
    "Mend its permissions or free space, then run check_tokens.",
    at_once=True,
)
SETTINGS = Cause(
    "settings",
    "A setting is missing or wrong",
    "Correct it, `make down` and `make up`, then run check_tokens. Pause the deployment of an exchange that you "
    "do not trade.",
    at_once=True,
)
UNSERVED = Cause(
    "unserved",
    "No token lasts through the session",
    "Look at the run's log and at `tokencore plan`.",
    at_once=False,
)
UNFORESEEN = Cause(
    "unforeseen",
    "A run met an unexpected error",
    "Look at the run's log; `tokencore check` tells how the tokens are.",
    at_once=True,
)

BY_NAME = {
    cause.name: cause
    for cause in (LIMIT, WAITING, CEILING, DEAD, CREDENTIALS, DOWN, STORE, SETTINGS, UNSERVED, UNFORESEEN)
}

_BY_ERROR: tuple[tuple[type[Exception], Cause], ...] = (
    (CredentialsError, CREDENTIALS),
    (IssuerUnavailableError, DOWN),
    (TokenStoreError, STORE),
    (ConfigurationError, SETTINGS),
    (TokenUnavailableError, UNSERVED),
)
_BY_LIMIT = {"ceiling": CEILING, "same_token": DEAD}
_BY_OUTCOME = {
    **dict.fromkeys(("bad_key", "bad_secret", "denied"), CREDENTIALS),
    **dict.fromkeys(("server_error", "refused", "bad_answer", "no_answer", "unreachable"), DOWN),
    "limit": LIMIT,
}


def cause_of(error: Exception, attempts: Sequence[Attempt]) -> Cause:
    """The cause behind `error`, for a key with this issuance record.

    A pause after a failure is no cause of its own: the last attempt's outcome tells what it waits for.
    """
    if isinstance(error, IssuanceLimitError):
        last = attempts[-1].outcome if attempts else ""
        return _BY_LIMIT.get(error.cause) or _BY_OUTCOME.get(last, WAITING)
    return next((cause for kind, cause in _BY_ERROR if isinstance(error, kind)), UNFORESEEN)


def as_met(error: Exception, attempts: Sequence[Attempt]) -> Exception:
    """The error for the run: the pause after KIS gave no token is KIS giving no token, and may be tried again."""
    if cause_of(error, attempts) is DOWN and not isinstance(error, IssuerUnavailableError):
        return IssuerUnavailableError(str(error))
    return error
