"""What a person is told before a refresh: which consequences, in which sentences, and when there are none."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import NOW, make_market, make_token

from tokencore import TokenManager, foresee
from tokencore.foresight import consequences
from tokencore.record import Attempt, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokencore.sandbox import Sandbox
    from tokencore.tokens import Token

HOUR = 3600
RUNNING = {"NASD": NOW + timedelta(hours=2), "NYSE": NOW + timedelta(hours=3)}


def kinds(
    token: Token | None, attempts: list[Attempt] | None = None, running: Mapping[str, datetime] | None = None
) -> list[str]:
    """The kinds of consequence at NOW."""
    return [one.kind for one in consequences(NOW, token, attempts or [], running or {}, make_market())]


def issued(hours: float) -> Attempt:
    """An issue so long ago, as the record has it."""
    at = NOW - timedelta(hours=hours)
    return Attempt(at, Outcome.ISSUED, expires_at=at + timedelta(hours=24))


def old(hours: float) -> Token:
    """A token of 24 hours that was issued so long ago."""
    return make_token(age=hours * HOUR, now=NOW)


@pytest.mark.parametrize(
    ("token", "attempts", "running", "expected"),
    [
        pytest.param(None, [], {}, [], id="nothing was ever issued"),
        pytest.param(None, [], RUNNING, [], id="a session without a token has none to exchange"),
        pytest.param(None, [issued(25)], {}, [], id="the last issue is more than a day old"),
        pytest.param(None, [issued(23)], {}, ["another issue"], id="the file is lost, the record is not"),
        pytest.param(old(7), [issued(7)], {}, ["another issue"], id="a token of today"),
        pytest.param(old(7), [], {}, ["another issue"], id="someone else issued it"),
        pytest.param(old(7), [issued(7)], RUNNING, ["another issue", "inside a session"], id="in a session"),
        pytest.param(old(23.95), [issued(23.95)], RUNNING, ["another issue"], id="it serves no more"),
        pytest.param(old(1), [issued(1)], RUNNING, ["same token"], id="six hours: nothing else would happen"),
    ],
)
def test_the_consequences(
    token: Token | None, attempts: list[Attempt], running: Mapping[str, datetime], expected: list[str]
) -> None:
    """Each kind is told where it would come about, and only there."""
    assert kinds(token, attempts, running) == expected


def test_the_sentences_say_how_many_until_when_and_what_it_costs() -> None:
    """A stranger understands what would happen."""
    second, swap = consequences(NOW, old(7), [issued(9), issued(7)], RUNNING, make_market())
    assert second.told == (
        "It would be token number 3 of this key in 24 hours, after the one of 2026-11-23 10:15:00 KST. KIS wants one a "
        "day and may restrict a key that takes more; the account's owner gets another KakaoTalk message. It passes "
        "your ceiling, KIS_MAX_ISSUES_PER_DAY=2."
    )
    assert swap.told == (
        "NASD, NYSE: tokens are in use until 2026-11-23 20:15:00 KST. Programs would get another one inside a session, "
        "and KIS does not say whether the old one goes on."
    )
    (same,) = consequences(NOW, old(1), [issued(1)], {}, make_market())
    assert same.told == (
        "KIS would hand back the present token, as it does until 2026-11-23 22:15:00 KST, six hours after its issue: "
        "nothing would change, and the key's next request would have to wait a minute. The present token goes on "
        "serving until 2026-11-24 16:10:00 KST."
    )


def test_the_ceiling_is_named_only_where_it_is_passed() -> None:
    """A second token in a day is within the default ceiling of two."""
    (second,) = consequences(NOW, old(7), [issued(7)], {}, make_market())
    assert "KIS_MAX_ISSUES_PER_DAY" not in second.told


def test_a_key_is_looked_at_with_all_its_exchanges(gateway: Sandbox) -> None:
    """A refresh for `us` tells of Korea's session too, as both share the token; KIS is asked for nothing."""
    monday = datetime.fromisoformat("2026-11-23T10:00+09:00")
    TokenManager("us").save_token(make_token(age=7 * HOUR, now=monday))
    assert [one.told.partition(":")[0] for one in foresee(TokenManager("us"), monday)][1:] == ["KRX"]
    assert gateway.stats()["token_requests"] == 0
