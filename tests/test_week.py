"""A week played: every run of a winter and a summer week, at its very instant, against the sandbox."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

import pytest
import time_machine
from flow_runs import run

from flows import check_tokens, refresh_token
from flows.warm_up import warm_up
from tokencore import Key, Settings, TokenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect import State
    from slack_endpoint import SlackEndpoint

    from tokencore.sandbox import Sandbox

KST = ZoneInfo("Asia/Seoul")
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
WARM_UPS = {"KRX": (time(8, 20), KST), "NASD": (time(8, 50), ZoneInfo("America/New_York"))}  # on weekdays
MANUAL, KILL = "manually", "maintenance"
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
        "Wed 02 12:00 manually Renewed",
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
    messages=["us+kr: refreshed manually, with force"],
)
MAINTENANCE = Played(
    runs=[
        "Wed 05 16:05 check Renewed",
        "Wed 05 22:05 renewal Renewed",
        "Wed 05 22:50 NASD Warm",
        "Thu 06 08:20 KRX Warm",
    ],
    checks={"Renewed": 1, "AlreadyValid": 21, "Failed": 1, "Completed": 1},
    requests=["Wed 05 16:05", "Wed 05 22:05"],
    messages=[
        "us+kr: KIS rejects the token, and issues no other yet",
        "us+kr: solved: KIS rejects the token, and issues no other yet",
    ],
)


class Week:
    """Some days of one key, from an afternoon in Seoul; what became of every run, in order."""

    def __init__(self, gateway: Sandbox, begin: datetime, days: int, extra: tuple[datetime, str] | None) -> None:
        """Start without a token; `extra` is when a person refreshes with force, or KIS kills its tokens."""
        self.gateway, self.begin, self.end, self.extra = gateway, begin, begin + days * DAY, extra
        self.told: list[str] = []
        self.checks: Counter[str] = Counter()

    def play(self) -> None:
        """Run what is due, in the order of time: warm-ups, hourly checks, the planned renewals, the extra."""
        fixed = sorted((at.astimezone(UTC), what) for at, what in self._fixed() if self.begin <= at < self.end)
        planned: datetime | None = None
        while fixed:
            at, what = min([fixed[0], *([(planned, "renewal")] if planned else [])])
            if what != "renewal":
                fixed.pop(0)
            with time_machine.travel(at + timedelta(seconds=1)):
                self._tell(at, what, self._run(at, what))
                planned = _key().state(datetime.now(UTC)).next_attempt

    def _fixed(self) -> Iterator[tuple[datetime, str]]:
        """What the schedules of prefect.yaml start, and the extra."""
        for number in range((self.end - self.begin).days + 1):
            day = self.begin.date() + number * DAY
            yield from ((datetime.combine(day, time(hour, 5), KST), "check") for hour in range(24))
            if day.weekday() < 5:
                yield from ((datetime.combine(day, at, zone), name) for name, (at, zone) in WARM_UPS.items())
        if self.extra:
            yield self.extra

    def _run(self, at: datetime, what: str) -> State | None:
        if what in WARM_UPS:
            return run(warm_up, at, exchange=what)
        if what == "renewal":
            return run(check_tokens.check_tokens, at)
        if what == MANUAL:
            asked = refresh_token.Request("us", force=True, reason="점검 뒤", operator="Kim Minji")
            return refresh_token.renew(_key(), asked, at)
        if what == KILL:
            self.gateway.kill_tokens()
            return None
        key = _key()
        try:
            return check_tokens.ended({key: check_tokens.follow(key, datetime.now(UTC))})
        except TokenError as error:
            return check_tokens.ended({key: error})

    def _tell(self, at: datetime, what: str, state: State | None) -> None:
        if state and what == "check":
            self.checks[str(state.name)] += 1
        if state and (what != "check" or state.name == "Renewed"):
            self.told.append(f"{at.astimezone(KST):%a %d %H:%M} {what} {state.name}")


def _key() -> Key:
    (key,) = Key.load(Settings.load())
    return key


WEEKS = [
    pytest.param(datetime(2024, 12, 22, 16, tzinfo=KST), 7, None, WINTER, id="winter: Christmas on both exchanges"),
    pytest.param(
        datetime(2025, 6, 29, 16, tzinfo=KST),
        7,
        (datetime(2025, 7, 2, 12, tzinfo=KST), MANUAL),
        SUMMER,
        id="summer: New York closed on the Fourth, a manual refresh on Wednesday",
    ),
    pytest.param(
        datetime(2025, 3, 5, 16, tzinfo=KST),
        1,
        (datetime(2025, 3, 5, 20, 30, tzinfo=KST), KILL),
        MAINTENANCE,
        id="maintenance kills the token in the evening",
    ),
]


@pytest.mark.parametrize(("begin", "days", "extra", "expected"), WEEKS)
def test_a_week_goes_as_the_rule_says(
    gateway: Sandbox,
    slack: SlackEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    begin: datetime,
    days: int,
    extra: tuple[datetime, str] | None,
    expected: Played,
) -> None:
    """Every run of the days, its end, every request to KIS and every message to Slack are those of the table."""
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", "NASD")
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    gateway.set_rules(issue_interval=60)
    week = Week(gateway, begin, days, extra)
    week.play()
    asked = [datetime.fromtimestamp(one["at"], KST) for one in gateway.stats()["requests"]]
    played = Played(week.told, dict(week.checks), [f"{at:%a %d %H:%M}" for at in asked], slack.headlines)
    assert played == expected
