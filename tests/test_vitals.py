"""What monitoring sees is what `tokencore check` and the rule say, however often it looks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import make_token
from running import DAY, cached, folder, snapshot

from tokencore import TokenManager, managers, next_attempt, status, vitals
from tokencore.market import digest, fingerprint
from tokencore.record import Attempt, IssuanceRecord, Outcome
from tokencore.sandbox import APP_KEY, APP_SECRET
from tokencore.status import word
from tokencore.vitals import Vitals, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.market import Market
    from tokencore.sandbox import Sandbox
    from tokencore.tokens import Token

pytestmark = pytest.mark.usefixtures("gateway")


def look(watch: Watch | None = None) -> dict[str, Vitals]:
    """What a watch sees now, by market."""
    return {one.market: one for one in (watch or Watch()).look(datetime.now(UTC))}


def record_of_all() -> IssuanceRecord:
    """The record of the key of us and kr, in a token directory that is there."""
    folder().mkdir(exist_ok=True)
    return IssuanceRecord(str(folder()), fingerprint(APP_KEY, TokenManager("us").get_api_url()))


def recorded(outcome: Outcome, *, age: float = 0) -> None:
    """An attempt of `age` seconds ago in the record of us and kr."""
    credentials = digest(APP_KEY, APP_SECRET, length=8)
    done = Attempt(datetime.now(UTC) - timedelta(seconds=age), outcome, credentials=credentials)
    record = record_of_all()
    record.complete(record.begin(done), done)


STATES: dict[str, Callable[[], object]] = {
    "nothing at all": lambda: None,
    "a fresh token": lambda: TokenManager("us").get_valid_token(),
    "an old token": lambda: cached(5_000),
    "a token about to expire": lambda: cached(1_000),
    "an expired token": lambda: cached(-100, age=DAY),
    "a rejected token": lambda: TokenManager("us").save_token(make_token(age=DAY / 3, rejected=True)),
    "a damaged file": lambda: (cached(), (folder() / "us_api_token.json").write_text("{")),
    "one market without its file": lambda: (cached(), TokenManager("kr").delete_token()),
    "a token lost an hour after its issue": lambda: recorded(Outcome.ISSUED, age=3_600),
    "a cool-down": lambda: recorded(Outcome.LIMIT),
    "refused credentials": lambda: recorded(Outcome.BAD_KEY, age=90),
}


@pytest.mark.parametrize("state", STATES)
def test_vitals_are_what_check_and_the_rule_say(state: str) -> None:
    """In every state each fact equals that of `check --json` and of `next_attempt`, which compute it anew."""
    STATES[state]()
    watch = Watch()
    for _ in range(2):  # also from what it keeps
        now = datetime.now(UTC)
        seen = {one.market: one for one in watch.look(now)}
        for manager in managers():
            told, one = manager.get_token_status(), seen[manager.market.name]
            assert (one.status, one.valid, one.issues) == (told["status"], told["valid"], told["issues_last_24h"])
            assert one.covered == told["covers_next_need"]
            assert [at and at.isoformat() for at in (one.expires_at, one.issued_at, one.cooldown_until)] == [
                told["expires_at"], told["issued_at"], told["cooldown_until"],
            ]  # fmt: skip
            assert told["next_need"] is not None
            assert one.need is not None
            assert one.need[1].isoformat() == told["next_need"]["end"]
            assert one.renewal_at == next_attempt(manager, now)


def test_another_process_is_seen_at_the_next_look() -> None:
    """A renewal, an attempt and a deletion by others show at once, without a new watch."""
    watch = Watch()
    assert look(watch)["us"].status == "NO_TOKEN"
    TokenManager("us").get_valid_token()
    seen = look(watch)["us"]
    assert seen.status == "VALID"
    assert seen.attempts == {Outcome.ISSUED: 1}
    recorded(Outcome.LIMIT)
    seen = look(watch)["us"]
    assert seen.attempts == {Outcome.ISSUED: 1, Outcome.LIMIT: 1}
    assert seen.cooldown_until is not None
    TokenManager("us").delete_token()
    assert look(watch)["us"].status == "NO_TOKEN"


def test_looking_changes_nothing_and_asks_for_nothing(gateway: Sandbox) -> None:
    """Neither a file's time nor a counter of KIS moves, with and without a token, and no folder is made."""
    look()
    assert not folder().exists()
    cached(1_000)
    before = snapshot(folder())
    look()
    assert snapshot(folder()) == before
    assert gateway.stats()["requests"] == []


def test_one_broken_key_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read for one key is told as its trouble, in words of ours; the other markets are as ever."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", "PSanother")
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", "secret")
    cached()
    watch = Watch()

    def bug(token: Token | None, problem: str, market: Market, now: datetime) -> str:
        if market.name == "kr":
            raise RuntimeError("Canary")
        return word(token, problem, market, now)

    monkeypatch.setattr(status, "word", bug)
    seen = look(watch)
    assert seen["us"].status == "VALID"
    assert seen["kr"].trouble == seen["kr"].unready == "it cannot be read (RuntimeError)"


def test_an_unreadable_record_is_told_and_hides_nothing_else() -> None:
    """Attempts are unknown, rather than none, while the record cannot be read; the token is as ever."""
    cached()
    path = Path(record_of_all().path)
    path.mkdir()
    watch = Watch()
    seen = look(watch)["us"]
    assert (seen.attempts, seen.status) == (None, "VALID")
    path.rmdir()
    assert look(watch)["us"].attempts == {}


def test_settings_are_read_again_and_bad_ones_leave_the_last_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A market that is added is seen, malformed settings change nothing but the flag, and mended ones clear it."""
    monkeypatch.setattr(vitals, "FRESH", -1.0)
    watch = Watch()
    monkeypatch.setenv("KIS_MARKETS__HK__EXCHANGES", "SEHK")
    assert list(look(watch)) == ["us", "kr", "hk"]
    monkeypatch.setenv("KIS_BUFFER", "long")
    assert list(look(watch)) == ["us", "kr", "hk"]
    assert not watch.settings_good
    monkeypatch.setenv("KIS_BUFFER", "300")
    look(watch)
    assert watch.settings_good


def test_readiness_says_what_lacks_and_when_it_comes() -> None:
    """The reason names the token's end, the need and the next renewal, in KST; a covered market has none."""
    now = datetime(2026, 11, 23, 0, 0, tzinfo=UTC)
    need = (now, now + timedelta(hours=7))
    one = Vitals("us", "real", "key", "VALID", now + timedelta(hours=2), now, need, covered=False, renewal_at=now)
    assert one.unready == (
        "the token expires at 2026-11-23 11:00:00 KST; it is needed from 2026-11-23 09:00:00 KST to "
        "2026-11-23 16:00:00 KST; next renewal at 2026-11-23 09:00:00 KST"
    )
    assert one._replace(covered=True).unready == ""
    assert one._replace(covered=None, need=None).unready == ""
    gone = one._replace(covered=None, need=None, status="NO_TOKEN", expires_at=None, renewal_at=None)
    assert gone.unready == "there is no token; it is needed now; no renewal is planned"
