"""When a key may issue: KIS's minute, the pauses after failures, the six hours, the ceiling, refused credentials."""

import copy
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from builders import DAY, NOW, make_market, make_token
from hypothesis import given
from hypothesis import strategies as st

from tokencore import limits
from tokencore.attempts import CREDENTIALS, GRANTED, Attempt, Outcome
from tokencore.errors import CredentialsError, IssuanceLimitError, TokenError
from tokencore.limits import Intent, Standing
from tokencore.tokens import Token, format_time

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
REQUIRED, DUE, AHEAD, REFRESH, FORCE = Intent
UNKNOWN = 75  # seconds after a request whose end nobody knows: a failure's pause and KIS_TIMEOUT
RIGHT = make_market().credentials_digest
FAILED = [outcome for outcome in Outcome if outcome not in GRANTED | CREDENTIALS]


def tried(outcome: Outcome, age: timedelta, credentials: str = RIGHT) -> Attempt:
    """An attempt of this age."""
    return Attempt(NOW - age, outcome, code="EGW00103", credentials=credentials)


def verdict(
    intent: Intent,
    attempts: Sequence[Attempt],
    token: Token | None = None,
    waited_out: datetime | None = None,
    **settings: float,
) -> TokenError | None:
    """The error that forbids a request at NOW, or None."""
    try:
        limits.check(intent, Standing(NOW, make_market(**settings), attempts, token, waited_out))
    except TokenError as error:
        return error
    return None


def limit(found: TokenError | None) -> tuple[str, timedelta | None] | None:
    """The limit that forbids the request, and for how long."""
    if isinstance(found, IssuanceLimitError):
        return found.cause, found.retry_at - NOW if found.retry_at else None
    return ("credentials", None) if isinstance(found, CredentialsError) else None


@pytest.mark.parametrize("intent", Intent)
@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome not in CREDENTIALS])
def test_the_minute_holds_after_every_attempt_that_kis_may_have_seen(intent: Intent, outcome: Outcome) -> None:
    """Whoever asks waits a minute after an attempt that left, and longer if its end is unknown, but after no other."""
    length = UNKNOWN * SECOND if outcome is Outcome.SENT else MINUTE
    attempts = [tried(outcome, length - SECOND / 10)]
    if outcome not in (Outcome.UNREACHABLE, Outcome.IMPORTED, Outcome.REVOKED):
        assert limit(verdict(intent, attempts)) == ("minute", SECOND / 10)
    elif intent not in (AHEAD, DUE):
        assert verdict(intent, attempts) is None


def aged(age: timedelta) -> dict[str, Any]:
    """A token that was issued this long ago."""
    return {"token": make_token(age=age.total_seconds(), now=NOW)}


LATE = make_token(age=20 * 3600, now=NOW)  # four hours left, and past KIS's six
LIMITED, REFUSED = [tried(Outcome.LIMIT, MINUTE)] * 9, [tried(Outcome.REFUSED, HOUR)] * 9
ISSUED = [tried(Outcome.ISSUED, age * HOUR) for age in (25, 20, 10)]
TWICE = [one._replace(expires_at=NOW + DAY) for one in ISSUED[1:]]  # by machines that did not know of each other
RETURNED = [*ISSUED[:2], tried(Outcome.SAME, HOUR), tried(Outcome.SAME, HOUR)]
BUT_FORCE, EVERYONE = (REQUIRED, DUE, AHEAD, REFRESH), tuple(Intent)
TABLE: dict[str, tuple[Sequence[Intent], list[Attempt], dict[str, Any], tuple[str, timedelta | None] | None]] = {
    "no record": (EVERYONE, [], {}, None),
    "over after 60 s": ((REQUIRED, REFRESH), LIMITED, {}, None),
    "a minute of 5 min": ([FORCE], [tried(Outcome.LIMIT, 2 * MINUTE)], {"issue_interval": 300}, ("minute", 3 * MINUTE)),
    "switched off": ([FORCE], [tried(Outcome.LIMIT, 0 * HOUR)], {"issue_interval": 0}, None),
    "clock set back": ([FORCE], [tried(Outcome.LIMIT, -47 * HOUR)], {}, ("minute", MINUTE)),
    "clock set back by a year": ([DUE], [tried(Outcome.LIMIT, -365 * DAY)] * 3, {}, None),
    "waited out": ([REQUIRED], [tried(Outcome.LIMIT, -5 * HOUR)], {"waited_out": NOW + 5 * HOUR}, None),
    "another waited out": ([REQUIRED], [tried(Outcome.LIMIT, -5 * HOUR)], {"waited_out": NOW}, ("minute", MINUTE)),
    "a failure ahead": ([AHEAD], [tried(Outcome.UNREACHABLE, -5 * HOUR)], {"token": LATE}, ("backoff", 65 * SECOND)),
    "a new token ends pauses": ([AHEAD], [*REFUSED, tried(Outcome.ISSUED, MINUTE)], {"token": LATE}, None),
    "a repeated one": ([DUE], [*REFUSED, tried(Outcome.SAME, MINUTE)], {"token": LATE}, ("backoff", 4 * MINUTE)),
    "other credentials": ([REQUIRED], [tried(Outcome.BAD_SECRET, HOUR, "wrong")], {}, None),
    **{
        one: ((REQUIRED, DUE), [tried(one, 30 * DAY)], {"token": LATE}, ("credentials", None))
        for one in sorted(CREDENTIALS)
    },
    "corrected by a person": ((REFRESH, FORCE), [tried(Outcome.BAD_SECRET, HOUR)], {"token": LATE}, None),
    "a locked key": ([AHEAD], [tried(Outcome.BAD_KEY, 4 * MINUTE)], {"token": LATE}, ("backoff", MINUTE)),
    "a locked key, later": ([AHEAD], [tried(Outcome.BAD_KEY, 5 * MINUTE)], {"token": LATE}, None),
    "the same token": (BUT_FORCE, [], aged(6 * HOUR - SECOND), ("same_token", 2 * SECOND)),
    "the same token, just issued": (BUT_FORCE, [], aged(SECOND / 4), ("same_token", 6 * HOUR + SECOND * 3 / 4)),
    "the same token, insisted": ([FORCE], [], aged(6 * HOUR - SECOND), None),
    "another token after six hours": (EVERYONE, [], aged(6 * HOUR + SECOND), None),
    "two in 24 hours": (BUT_FORCE, ISSUED, {}, ("ceiling", 4 * HOUR)),
    "one in 24 hours": (BUT_FORCE, ISSUED, {"max_issues_per_day": 1}, ("ceiling", 14 * HOUR)),
    "over the ceiling, insisted": ([FORCE], ISSUED, {"max_issues_per_day": 1}, None),
    "below the ceiling": (EVERYONE, ISSUED, {"max_issues_per_day": 3}, None),
    "one token, two records": (EVERYONE, TWICE, {}, None),
    "returned ones do not count": ([REQUIRED, REFRESH], RETURNED, {}, None),
}


@pytest.mark.parametrize("case", TABLE)
def test_verdicts(case: str) -> None:
    """Each limit has its length, also after the clock was set back, and a person may pass some of them."""
    intents, attempts, beside, expected = TABLE[case]
    for intent in intents:
        assert limit(verdict(intent, attempts, **beside)) == expected


@pytest.mark.parametrize("intent", [DUE, AHEAD])
@pytest.mark.parametrize("outcome", FAILED)
def test_ahead_of_need_failures_are_followed_by_longer_pauses(intent: Intent, outcome: Outcome) -> None:
    """While the present token serves, the pause is 65 s after each of the first three failures, then five minutes."""
    for count, pause in ((1, 65), (3, 65), (4, 300), (50, 300)):
        for early in (0, 0.1):
            attempts = [tried(Outcome.ISSUED, 20 * HOUR)]
            attempts += [tried(outcome, timedelta(seconds=pause - early)) for _ in range(count)]
            expected = ("backoff", timedelta(seconds=early)) if early else None
            if outcome is Outcome.SENT and pause < UNKNOWN:  # the request may have left that much later
                expected = ("minute", timedelta(seconds=UNKNOWN - pause + early))
            assert limit(verdict(intent, attempts, LATE)) == expected


ATTEMPTS = st.lists(
    st.builds(tried, st.sampled_from(Outcome), st.timedeltas(-3 * DAY, 3 * DAY), st.sampled_from([RIGHT, "wrong"])),
    max_size=6,
)
TOKENS = st.builds(
    make_token, st.integers(1, 90_000), age=st.integers(0, 90_000), now=st.just(NOW), rejected=st.booleans()
)


@given(ATTEMPTS, st.none() | TOKENS)
def test_what_a_person_wills_is_never_forbidden_by_more(attempts: list[Attempt], token: Token | None) -> None:
    """Whatever forbids a forced refresh forbids a plain one too, and every limit names its end, at most 3 days away."""
    found = {intent: verdict(intent, attempts, token) for intent in Intent}
    assert found[FORCE] is None or found[REFRESH]
    for error in found.values():
        if isinstance(error, IssuanceLimitError):
            assert error.retry_at
            assert NOW < error.retry_at <= NOW + 3 * DAY
            assert vars(copy.copy(error)) == vars(error)  # as pickle copies it from process to process
            assert format_time(error.retry_at) in str(error)
        if error and token:
            assert limits.what_serves(token, NOW, 300) in str(error)


def test_every_refusal_says_what_still_works_until_when() -> None:
    """A refusal says, in KST, until when the present token serves or the last one served; some say what to do."""

    def said(token: Token | None) -> str:
        return str(verdict(REFRESH, [tried(Outcome.LIMIT, SECOND)], token))

    assert "The present token serves until 2026-11-23 21:10:00 KST" in said(LATE)  # 4 h left, less the buffer of 5 min
    assert "The next is allowed at 2026-11-23 17:15:59 KST" in said(LATE)
    dead = make_token(age=3600, now=NOW, rejected=True)
    assert "no valid token: KIS has rejected the present one (issued 2026-11-23 16:15:00 KST)" in said(dead)
    assert "the last one served until 2026-11-23 16:10:00 KST" in said(make_token(3600, age=7200, now=NOW))
    assert "There is no token." in said(None)
    assert "`tokencore refresh us --force`" in str(verdict(REQUIRED, [tried(Outcome.ISSUED, HOUR)] * 2))
    assert "`tokencore refresh us` when" in str(verdict(DUE, [tried(Outcome.DENIED, HOUR)]))
    for outcome, advised in ((Outcome.ISSUED, True), (Outcome.SAME, False)):  # not advised again after it was in vain
        assert ("--force" in str(verdict(REFRESH, [tried(outcome, HOUR)], dead))) == advised
