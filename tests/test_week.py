"""A week played: every run of a winter and a summer week, at its very instant, against the sandbox."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

import pytest
import time_machine
from flow_runs import run
from slack_endpoint import SlackEndpoint
from test_deployments import DEPLOYMENTS, dates

from flows import check_tokens, refresh_token
from flows.warm_up import warm_up
from tokencore import Note, TokenManager, next_attempt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect import State

    from tokencore.sandbox import Sandbox

KST = ZoneInfo("Asia/Seoul")
WEEK = timedelta(days=7)
EXCHANGES = ("KRX", "NASD")
pytestmark = pytest.mark.usefixtures("prefect_home")


class Played(NamedTuple):
    """What a week was: runs with their ends, hourly checks by theirs, requests to KIS, headlines in Slack; in KST."""

    runs: list[str]
    checks: dict[str, int]
    requests: list[str]
    messages: list[str]


WINTER = Played(
    runs=[
        "Sun 22 16:35 renewal Renewed",
        "Mon 23 08:20 KRX Warm",
        "Mon 23 16:35 renewal Renewed",
        "Mon 23 22:50 NASD Warm",
        "Tue 24 08:20 KRX Warm",
        "Tue 24 16:35 renewal Renewed",
        "Tue 24 22:50 NASD Warm",
        "Wed 25 08:20 KRX MarketClosed",
        "Wed 25 16:35 renewal Renewed",
        "Wed 25 22:50 NASD MarketClosed",
        "Thu 26 08:20 KRX Warm",
        "Thu 26 16:35 renewal Renewed",
        "Thu 26 22:50 NASD Warm",
        "Fri 27 08:20 KRX Warm",
        "Fri 27 16:35 renewal Renewed",
        "Fri 27 22:50 NASD Warm",
    ],
    checks={"AlreadyValid": 144, "Completed": 24},  # from Saturday's expiry on there is no token, and none needed yet
    requests=["Sun 22 16:35", "Mon 23 16:35", "Tue 24 16:35", "Wed 25 16:35", "Thu 26 16:35", "Fri 27 16:35"],
    messages=[],
)
SUMMER = Played(
    runs=[
        "Sun 29 16:35 renewal Renewed",
        "Mon 30 08:20 KRX Warm",
        "Mon 30 16:35 renewal Renewed",
        "Mon 30 21:50 NASD Warm",
        "Tue 01 08:20 KRX Warm",
        "Tue 01 16:35 renewal Renewed",
        "Tue 01 21:50 NASD Warm",
        "Wed 02 08:20 KRX Warm",
        "Wed 02 12:00 by hand Renewed",
        "Wed 02 21:50 NASD Warm",
        "Thu 03 07:25 renewal Renewed",
        "Thu 03 08:20 KRX Warm",
        "Thu 03 21:50 NASD Warm",
        "Fri 04 07:25 renewal Renewed",
        "Fri 04 08:20 KRX Warm",
        "Fri 04 21:50 NASD MarketClosed",
    ],
    checks={"AlreadyValid": 135, "Completed": 33},
    requests=["Sun 29 16:35", "Mon 30 16:35", "Tue 01 16:35", "Wed 02 12:00", "Thu 03 07:25", "Fri 04 07:25"],
    messages=["us+kr: refreshed by hand, with force"],
)


class Week:
    """One week of one key, from a Sunday afternoon in Seoul; what became of every run, in order."""

    def __init__(self, begin: datetime, by_hand: datetime | None) -> None:
        """Start without a token; a person refreshes `by_hand` then, with force."""
        self.begin, self.by_hand = begin, by_hand
        self.told: list[str] = []
        self.checks: Counter[str] = Counter()

    def play(self) -> None:
        """Run what is due, in the order of time: warm-ups, hourly checks, the planned renewals, a person."""
        fixed = sorted(self._fixed())
        planned: datetime | None = None
        while fixed:
            at, what = min([fixed[0], *([(planned, "renewal")] if planned else [])])
            if what != "renewal":
                fixed.pop(0)
            with time_machine.travel(at + timedelta(seconds=1)):
                self._tell(at, what, self._run(at, what))
                planned = next_attempt(TokenManager("us"), datetime.now(UTC))

    def _fixed(self) -> Iterator[tuple[datetime, str]]:
        """What the schedules of prefect.yaml start, and the person."""
        for name in (*EXCHANGES, "check_tokens"):
            (schedule,) = DEPLOYMENTS[name]["schedules"]
            for at in dates(schedule, self.begin, 24 * 7):
                if at < self.begin + WEEK:
                    yield at.astimezone(UTC), name
        if self.by_hand:
            yield self.by_hand.astimezone(UTC), "by hand"

    def _run(self, at: datetime, what: str) -> State:
        manager = TokenManager("us")
        if what in EXCHANGES:
            return run(warm_up, at, exchange=what)
        if what == "renewal":
            return run(check_tokens.check_tokens, at)
        if what == "by hand":
            return refresh_token.renew(manager, at, force=True, note=Note("점검 뒤", "Kim Minji"))
        return check_tokens.ended({"us+kr": check_tokens.follow(manager, datetime.now(UTC))})

    def _tell(self, at: datetime, what: str, state: State) -> None:
        if what == "check_tokens":
            self.checks[str(state.name)] += 1
        else:
            self.told.append(f"{at.astimezone(KST):%a %d %H:%M} {what} {state.name}")


WEEKS = [
    pytest.param(datetime(2024, 12, 22, 16, tzinfo=KST), None, WINTER, id="winter: both exchanges closed on Christmas"),
    pytest.param(
        datetime(2025, 6, 29, 16, tzinfo=KST),
        datetime(2025, 7, 2, 12, tzinfo=KST),
        SUMMER,
        id="summer: New York closed on the Fourth, a refresh by hand on Wednesday",
    ),
]


@pytest.mark.parametrize(("begin", "by_hand", "expected"), WEEKS)
def test_a_week_goes_as_the_rule_says(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, begin: datetime, by_hand: datetime | None, expected: Played
) -> None:
    """Every run of seven days, its end, every request to KIS and every message to Slack are those of the table."""
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", "NASD")
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    gateway.set_rules(issue_interval=60)
    with SlackEndpoint() as slack:
        monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{slack.url}/services/T0/B0/x")
        week = Week(begin, by_hand)
        week.play()
    asked = [datetime.fromtimestamp(one["at"], KST) for one in gateway.stats()["requests"]]
    played = Played(week.told, dict(week.checks), [f"{at:%a %d %H:%M}" for at in asked], slack.headlines)
    assert played == expected
