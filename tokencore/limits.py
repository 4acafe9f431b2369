"""Whether this key may ask KIS for a token now, by KIS's own rules and our more cautious ones.

Pure functions of the record's attempts, the present token and `now`; they raise an error that says why not.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tokencore import attempts as record
from tokencore.attempts import CLOCK_ERROR, CREDENTIALS, SETTLED, Outcome, retry_delay
from tokencore.errors import CredentialsError, IssuanceLimitError
from tokencore.tokens import SAME_TOKEN, TRUNCATED, format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencore.attempts import Attempt
    from tokencore.config.market import Market
    from tokencore.tokens import Token

SELDOM = 1000  # a pretended number of failures, large enough for the longest wait


class Intent(Enum):
    """Why an issue is wanted; the more a person insists on it, the fewer rules forbid it."""

    REQUIRED = "required"  # there is no token that serves
    DUE = "due"  # the renewal rule says so
    AHEAD = "ahead"  # the present token still serves but is about to expire
    REFRESH = "refresh"  # a person asked
    FORCE = "force"  # a person insisted: only the limit of one request a minute applies


class Standing(NamedTuple):
    """What the rules are judged on; `waited_out` is when the attempt was made whose cool-down the caller waited out."""

    now: datetime
    market: Market
    attempts: Sequence[Attempt]
    token: Token | None
    waited_out: datetime | None = None

    @property
    def serves(self) -> str:
        """The sentence that says what still works, and until when."""
        return what_serves(self.token, self.now, self.market.buffer)


def check(intent: Intent, standing: Standing) -> None:
    """Check that a request is allowed now.

    A key whose token is about to expire worked until recently, and KIS gives the same answer to a locked key, so AHEAD
    tries refused credentials again a few times; otherwise only a person does.

    Raises:
        CredentialsError: KIS refused these very credentials before; a person has to act.
        IssuanceLimitError: the minute, the pause after failures, the six hours or the ceiling forbids it until
            `retry_at`. The present token, if any, is untouched.
    """
    if intent in (Intent.REQUIRED, Intent.DUE) and (refused := refusal(standing)):
        raise refused
    if intent is not Intent.FORCE:  # the limits that last for hours come first: nobody waits a minute to learn of them
        _check_same_token(standing)
        _check_ceiling(standing)
    _check_pauses(intent, standing)


def allowed_from(standing: Standing) -> datetime | None:
    """Return when a renewal that is due at `standing.now` is allowed; None if refused credentials forbid it."""
    while True:  # each turn moves past one of a few limits, and all of them end
        try:
            check(Intent.DUE, standing)
        except IssuanceLimitError as limit:
            standing = standing._replace(now=limit.retry_at or standing.now)
        except CredentialsError:
            return None
        else:
            return standing.now


def cooldown_until(attempts: Sequence[Attempt], now: datetime, market: Market) -> datetime | None:
    """Return when the key's next request is allowed; None if it is allowed now.

    An attempt that seems to lie in the future, because the clock was set back, counts as made now (`Store.lock` dates
    it so); one more than `CLOCK_ERROR` ahead does not count. The request of an attempt without an outcome, whose
    process died or still waits, may have left later than recorded, while it was connecting: KIS_TIMEOUT and the pause
    after a failure cover that.
    """
    last = record.latest(attempts)
    if last is None or last.at > now + CLOCK_ERROR:
        return None
    length = timedelta(seconds=market.settings.issue_interval)
    if last.outcome is Outcome.SENT:
        length = retry_delay(1, market.settings.issue_interval) + timedelta(seconds=market.timeout)
    until = min(last.at, now) + length
    return until if until > now else None


def same_token_until(token: Token | None, now: datetime) -> datetime | None:
    """Return until when KIS would return this token instead of issuing another; None if it would issue one now."""
    until = token.same_until() if token else None
    if token is None or until is None or not now < until < token.expires_at:
        return None
    return min(until, now + SAME_TOKEN + TRUNCATED)  # a later one: the clock was set back


def what_serves(token: Token | None, now: datetime, buffer: float) -> str:
    """Return the sentence that says what still works, and until when."""
    if token is None:
        return "There is no token."
    until = format_time(token.expires_at - timedelta(seconds=buffer))
    if token.serves(now, buffer):
        return f"The present token serves until {until}."
    if token.rejected_at is not None:
        issued = format_time(token.issued_at or token.rejected_at)
        return f"There is no valid token: KIS has rejected the present one (issued {issued})."
    return f"There is no valid token: the last one served until {until}."


def refusal(standing: Standing) -> CredentialsError | None:
    """Return the error to raise if KIS refused these very credentials at the last attempt; None otherwise."""
    last = record.latest(standing.attempts)
    if last is None or last.outcome not in CREDENTIALS or last.credentials != standing.market.credentials_digest:
        return None
    return CredentialsError(
        f"KIS refused these credentials at {format_time(last.at)} ({last.code}), so they are not tried again "
        f"automatically. {standing.serves} Correct them, or run `tokencore refresh {standing.market.name}` when KIS "
        "has restored them.",
    )


def _check_pauses(intent: Intent, standing: Standing) -> None:
    now, market, attempts = standing.now, standing.market, standing.attempts
    if not attempts:
        return
    last = record.latest(attempts)
    until = cooldown_until(attempts, now, market)
    if last and until and standing.waited_out != last.at:
        failed = record.failure([last])  # the first thing that the person has to know
        fault = f"KIS gave no new token at {format_time(last.at)}: {failed[1]}. " if failed else ""
        raise IssuanceLimitError(
            f"{fault}KIS allows one request a minute, and the last one of this key was at {format_time(last.at)}. "
            f"{standing.serves} The next is allowed at {format_time(until)}.",
            retry_at=until,
            cause="minute",
        )
    final = attempts[-1]  # even one that was never sent: an unreachable issuer is left alone for as long
    if intent not in (Intent.DUE, Intent.AHEAD) or final.outcome in SETTLED or final.at > now + CLOCK_ERROR:
        return
    seldom = final.outcome is Outcome.SAME or (last and last.outcome in CREDENTIALS)
    failures = SELDOM if seldom else record.failures(attempts)
    until = min(final.at, now) + retry_delay(failures, market.settings.issue_interval)
    if until > now:
        raise IssuanceLimitError(
            f"The last attempt brought no new token ({final.outcome}). {standing.serves} "
            f"The next attempt is at {format_time(until)}.",
            retry_at=until,
            cause="backoff",
        )


def _check_same_token(standing: Standing) -> None:
    token, force = standing.token, ""
    until = same_token_until(token, standing.now)
    if until is None:
        return
    # After KIS has just returned the dead token once more, there is no point in suggesting --force again.
    if token and token.rejected_at and standing.attempts and standing.attempts[-1].outcome is not Outcome.SAME:
        force = f" If KIS has withdrawn it sooner, `tokencore refresh {standing.market.name} --force` asks KIS now."
    raise IssuanceLimitError(
        f"KIS returns the same token until {format_time(until)}, six hours after its issue. "
        f"{standing.serves} A new one can be issued from {format_time(until)}.{force}",
        retry_at=until,
        cause="same_token",
    )


def _check_ceiling(standing: Standing) -> None:
    issued = record.issued_within(standing.attempts, standing.now)
    ceiling = standing.market.settings.max_issues_per_day
    if len(issued) < ceiling:
        return
    until = issued[-ceiling].at + record.DAY
    raise IssuanceLimitError(
        f"The 24-hour limit is reached: this key has issued {len(issued)} token{'s' * (len(issued) > 1)} in 24 hours, "
        f"and KIS_MAX_ISSUES_PER_DAY is {ceiling}. {standing.serves} The next is allowed at {format_time(until)}; "
        f"`tokencore refresh {standing.market.name} --force` overrides the limit.",
        retry_at=until,
        cause="ceiling",
    )
