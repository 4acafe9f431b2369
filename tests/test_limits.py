"""When a key may issue: KIS's minute, the pauses after failures, the six hours, the ceiling, refused credentials."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import DAY, NOW, make_market, make_token
from hypothesis import given
from hypothesis import strategies as st

from tokencore import limits
from tokencore.attempts import CREDENTIALS, GRANTED, Attempt, Outcome
from tokencore.errors import CredentialsError, IssuanceLimitError, TokenError
from tokencore.limits import Intent, Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencore.tokens import Token

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
UNKNOWN = 75  # seconds after a request whose end nobody knows: a failure's pause and KIS_TIMEOUT
FAILED = [outcome for outcome in Outcome if outcome not in GRANTED | CREDENTIALS and outcome is not Outcome.UNREACHABLE]


def tried(outcome: Outcome, age: timedelta, credentials: str = "right") -> Attempt:
    """An attempt that is so old."""
    return Attempt(NOW - age, outcome, code="EGW00103", credentials=credentials)


def verdict(
    intent: Intent,
    attempts: Sequence[Attempt],
    token: Token | None = None,
    waited_out: datetime | None = None,
    **settings: float,
) -> TokenError | None:
    """What forbids a request at NOW."""
    try:
        limits.check(intent, Standing(NOW, attempts, token, "right", waited_out), make_market(**settings))
    except TokenError as error:
        return error
    return None


def limit(found: TokenError | None) -> tuple[str, datetime | None] | None:
    """The rule that forbids it, and until when."""
    if found is None:
        return None
    assert isinstance(found, IssuanceLimitError)
    return found.cause, found.retry_at


@pytest.mark.parametrize("intent", Intent)
@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome not in CREDENTIALS])
def test_the_minute_holds_after_every_attempt_that_kis_may_have_seen(intent: Intent, outcome: Outcome) -> None:
    """Whoever asks and whatever became of the last attempt, 59.9 s after it a request waits, unless it never left.

    A token that was imported is no request of ours. One whose end nobody knows was noted before it left: KIS's minute
    began as much later as it took to get there, and it is given 65 s.
    """
    length = UNKNOWN * SECOND if outcome is Outcome.SENT else MINUTE
    attempts = [tried(outcome, length - SECOND / 10)]
    if outcome not in (Outcome.UNREACHABLE, Outcome.IMPORTED):
        assert limit(verdict(intent, attempts)) == ("minute", NOW + SECOND / 10)
    elif intent not in (Intent.AHEAD, Intent.DUE):
        assert verdict(intent, attempts) is None


@pytest.mark.parametrize("intent", [Intent.REQUIRED, Intent.REFRESH, Intent.FORCE])
def test_after_the_minute_whoever_needs_a_token_may_ask(intent: Intent) -> None:
    """At 60 s the cool-down is over, and failures do not delay a caller that has no token."""
    assert verdict(intent, [tried(Outcome.LIMIT, MINUTE)] * 9) is None
    assert verdict(intent, []) is None


def test_the_minute_is_as_long_as_the_setting() -> None:
    """`KIS_ISSUE_INTERVAL` sets the cool-down; 0 switches it off."""
    attempts = [tried(Outcome.LIMIT, 2 * MINUTE)]
    assert limit(verdict(Intent.FORCE, attempts, issue_interval=300)) == ("minute", NOW + 3 * MINUTE)
    assert verdict(Intent.FORCE, [tried(Outcome.LIMIT, SECOND * 0)], issue_interval=0) is None


def test_who_sat_the_cool_down_out_asks_at_once() -> None:
    """A caller that waited by the monotonic clock is not held by a wall clock that was set back meanwhile."""
    attempts = [tried(Outcome.LIMIT, -5 * HOUR)]
    assert verdict(Intent.REQUIRED, attempts, waited_out=attempts[0].at) is None
    assert limit(verdict(Intent.REQUIRED, attempts, waited_out=NOW)) == ("minute", NOW + MINUTE)


@pytest.mark.parametrize("hours", [1, 25, 47])
def test_a_clock_set_back_does_not_shorten_the_minute(hours: int) -> None:
    """An attempt that seems to lie ahead counts as one of this moment."""
    assert limits.cooldown_until([tried(Outcome.LIMIT, -hours * HOUR)], NOW, make_market()) == NOW + MINUTE


@pytest.mark.parametrize("intent", Intent)
@pytest.mark.parametrize("outcome", FAILED)
def test_a_clock_that_was_wrong_by_a_year_forbids_nothing_for_a_year(intent: Intent, outcome: Outcome) -> None:
    """Attempts of a clock that ran far ahead hold neither a person nor the rule when it is right again."""
    assert verdict(intent, [tried(outcome, -365 * DAY)] * 3) is None
    assert verdict(intent, [tried(Outcome.ISSUED, -365 * DAY)] * 3) is None


@pytest.mark.parametrize("intent", [Intent.DUE, Intent.AHEAD])
@pytest.mark.parametrize("outcome", [*FAILED, Outcome.UNREACHABLE])
def test_ahead_of_need_failures_are_followed_by_longer_pauses(intent: Intent, outcome: Outcome) -> None:
    """While the present token serves: 65 s after each of three failures in a row, then five minutes."""
    token = make_token(age=20 * 3600, now=NOW)
    for count, pause in ((1, 65), (2, 65), (3, 65), (4, 300), (50, 300)):
        for early in (0, 0.1):
            attempts = [tried(Outcome.ISSUED, 20 * HOUR)]
            attempts += [tried(outcome, timedelta(seconds=pause - early)) for _ in range(count)]
            expected = ("backoff", NOW + timedelta(seconds=early)) if early else None
            if outcome is Outcome.SENT and pause < UNKNOWN:  # it may have left that much later
                expected = ("minute", NOW + timedelta(seconds=UNKNOWN - pause + early))
            assert limit(verdict(intent, attempts, token)) == expected


def test_a_clock_set_back_does_not_prolong_the_pauses() -> None:
    """A failure that seems to lie ahead is one of this moment: the pause ends 65 s from now."""
    token = make_token(age=20 * 3600, now=NOW)
    found = verdict(Intent.AHEAD, [tried(Outcome.UNREACHABLE, -5 * HOUR)], token)
    assert limit(found) == ("backoff", NOW + 65 * SECOND)


def test_a_success_ends_the_pauses() -> None:
    """After a new token the minute alone counts again; where KIS repeats an old one, it is asked seldom."""
    failed, token = [tried(Outcome.REFUSED, HOUR)] * 9, make_token(age=20 * 3600, now=NOW)
    assert verdict(Intent.AHEAD, [*failed, tried(Outcome.ISSUED, MINUTE)], token) is None
    repeated = verdict(Intent.DUE, [*failed, tried(Outcome.SAME, MINUTE)], token)
    assert limit(repeated) == ("backoff", NOW + 4 * MINUTE)


@pytest.mark.parametrize("intent", [Intent.REQUIRED, Intent.DUE])
@pytest.mark.parametrize("outcome", sorted(CREDENTIALS))
def test_refused_credentials_are_not_tried_again_by_themselves(intent: Intent, outcome: Outcome) -> None:
    """Neither who lacks a token nor the rule asks again, however late; a person may. The error stays the same."""
    attempts = [tried(outcome, 30 * DAY)]
    found = verdict(intent, attempts)
    assert isinstance(found, CredentialsError)
    assert "tokencore refresh us" in str(found)
    assert "There is no token." in str(found)
    assert verdict(Intent.REFRESH, attempts) is None
    assert verdict(Intent.FORCE, attempts) is None


def test_other_credentials_are_tried_at_once() -> None:
    """A corrected key or secret is no longer the refused one."""
    assert verdict(Intent.REQUIRED, [tried(Outcome.BAD_SECRET, HOUR, credentials="wrong")]) is None


def test_a_locked_key_that_still_has_a_token_is_tried_seldom() -> None:
    """KIS answers `wrong key` to a locked key too: ahead of need it is asked every five minutes, not every 65 s."""
    token = make_token(age=20 * 3600, now=NOW)
    assert limit(verdict(Intent.AHEAD, [tried(Outcome.BAD_KEY, 4 * MINUTE)], token)) == ("backoff", NOW + MINUTE)
    assert verdict(Intent.AHEAD, [tried(Outcome.BAD_KEY, 5 * MINUTE)], token) is None
    assert isinstance(verdict(Intent.DUE, [tried(Outcome.BAD_KEY, HOUR)], token), CredentialsError)


@pytest.mark.parametrize("intent", [Intent.REQUIRED, Intent.DUE, Intent.AHEAD, Intent.REFRESH])
def test_kis_is_not_asked_while_it_would_hand_back_the_same_token(intent: Intent) -> None:
    """For six hours after its issue no request is spent on the present token; only force passes."""
    for age, expected in ((6 * HOUR - SECOND, ("same_token", NOW + SECOND)), (6 * HOUR, None)):
        token = make_token(age=age.total_seconds(), now=NOW)
        attempts = [tried(Outcome.ISSUED, age)]
        assert limit(verdict(intent, attempts, token)) == expected
        assert verdict(Intent.FORCE, attempts, token) is None


@pytest.mark.parametrize("intent", [Intent.REQUIRED, Intent.DUE, Intent.AHEAD, Intent.REFRESH])
def test_the_ceiling_holds_for_any_24_hours(intent: Intent) -> None:
    """After as many new tokens as the setting allows, the next waits until the oldest of them is a day old."""
    attempts = [tried(Outcome.ISSUED, age * HOUR) for age in (25, 20, 10)]
    assert limit(verdict(intent, attempts)) == ("ceiling", NOW + 4 * HOUR)
    assert limit(verdict(intent, attempts, max_issues_per_day=1)) == ("ceiling", NOW + 14 * HOUR)
    assert verdict(intent, attempts, max_issues_per_day=3) is None
    assert verdict(intent, [*attempts[:2], tried(Outcome.SAME, HOUR), tried(Outcome.SAME, HOUR)]) is None
    assert verdict(Intent.FORCE, attempts, max_issues_per_day=1) is None


ATTEMPTS = st.lists(
    st.builds(tried, st.sampled_from(Outcome), st.timedeltas(-3 * DAY, 3 * DAY), st.sampled_from(["right", "wrong"])),
    max_size=6,
)
TOKENS = st.none() | st.builds(
    make_token,
    st.integers(1, 90_000),
    age=st.integers(0, 90_000),
    now=st.just(NOW),
    rejected=st.booleans(),
)


@given(ATTEMPTS, TOKENS)
def test_what_a_person_wills_is_never_forbidden_by_more(attempts: list[Attempt], token: Token | None) -> None:
    """Whatever forbids force forbids a refresh too, and every limit names the moment, soon enough, that ends it."""
    found = {intent: verdict(intent, attempts, token) for intent in Intent}
    assert found[Intent.FORCE] is None or found[Intent.REFRESH]
    for intent, error in found.items():
        if isinstance(error, IssuanceLimitError):
            assert error.retry_at
            assert NOW < error.retry_at <= NOW + 3 * DAY
            assert error.retry_at.utcoffset() == timedelta(0)
            assert limits.format_time(error.retry_at) in str(error)
        elif error:
            assert intent in (Intent.REQUIRED, Intent.DUE)
            assert isinstance(error, CredentialsError)
        if error and token:
            assert limits.what_serves(token, NOW, 300) in str(error)


def test_every_refusal_says_what_still_works_until_when() -> None:
    """The sentence tells, in KST, until when the present token serves, or since when none does."""
    attempts = [tried(Outcome.LIMIT, SECOND)]
    serving = str(verdict(Intent.REFRESH, attempts, make_token(age=20 * 3600, now=NOW)))
    assert "The present token serves until 2026-11-23 21:10:00 KST" in serving  # 4 h left, less the buffer of 5 min
    assert "The next is allowed at 2026-11-23 17:15:59 KST" in serving
    dead = str(verdict(Intent.REFRESH, attempts, make_token(age=3600, now=NOW, rejected=True)))
    assert "There is no valid token: KIS has rejected the present one (issued 2026-11-23 16:15:00 KST)" in dead
    assert "expired at 2026-11-23 16:15:00 KST" in str(
        verdict(Intent.REFRESH, attempts, make_token(3600, age=7200, now=NOW)),
    )
    assert "There is no token." in str(verdict(Intent.REFRESH, attempts))


def test_the_ceilings_sentence_names_the_way_past_it() -> None:
    """Who needs a token all the same is told the command."""
    found = str(verdict(Intent.REQUIRED, [tried(Outcome.ISSUED, HOUR)] * 2))
    assert "KIS_MAX_ISSUES_PER_DAY is 2" in found
    assert "`tokencore refresh us --force`" in found
