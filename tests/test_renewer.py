"""Renewal under the key's lock, against a real gateway: what is asked of KIS, and what a failure leaves behind."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
import requests
from builders import SECRET, ended, in_child, make_token
from conftest import QUICK
from running import DAY, asked, cached, folder, issue_of, on_disk, outcomes, raised, tokencore, until

from tokencore import (
    BaseTokenManager,
    ConfigurationError,
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    KRTokenManager,
    TokenError,
    TokenManager,
    TokenStoreError,
    USTokenManager,
    sessions,
)
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable

    from running import Ran

    from tokencore.sandbox import Sandbox

HOUR = 3600.0
FAILURES: dict[str, type[TokenError]] = {
    "limit": IssuanceLimitError,
    "bad-key": CredentialsError,
    "bad-secret": CredentialsError,
    "server-error": IssuerUnavailableError,
    "down": IssuerUnavailableError,
    "drop": IssuerUnavailableError,
    "hang": IssuerUnavailableError,
    "html": IssuerUnavailableError,
    "garbage": IssuerUnavailableError,
    "half": IssuerUnavailableError,
    "no-token": IssuerUnavailableError,
    "past": IssuerUnavailableError,
    "huge": IssuerUnavailableError,
    "redirect": IssuerUnavailableError,
}


def issue_elsewhere(gateway: Sandbox) -> None:
    """Another program, which knows nothing of this package, issues with the same key."""
    body = {"grant_type": "client_credentials", "appkey": APP_KEY, "appsecret": APP_SECRET}
    assert requests.post(f"{gateway.url}/oauth2/tokenP", json=body, timeout=5).status_code == 200


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("mode", FAILURES)
def test_failing_renewal_ahead_keeps_the_old_token_and_a_later_success_replaces_it(quick: Sandbox, mode: str) -> None:
    """With 25 minutes left every failure of KIS leaves the old token served; the next success brings a new one."""
    token = cached(25 * 60)
    before = (folder() / "us_api_token.json").read_bytes()
    quick.fail(mode)
    assert USTokenManager().get_valid_token() == token.access_token
    assert asked(quick) == 1
    assert (folder() / "us_api_token.json").read_bytes() == before
    quick.clear()
    until(lambda: USTokenManager().get_valid_token() != token.access_token)
    assert quick.stats()["granted_new"] == 1
    assert asked(quick) == 2


@pytest.mark.parametrize("mode", [mode for mode in FAILURES if mode != "limit"])
def test_failing_first_issuance_raises_its_own_error_after_one_request(quick: Sandbox, mode: str) -> None:
    """Without a token every failure has its class, and no failure is answered with another request."""
    quick.fail(mode)
    error = raised(USTokenManager().get_valid_token)
    assert type(error) is FAILURES[mode]
    assert "There is no token." in str(error)
    assert asked(quick) == 1
    assert len(outcomes()) == 1


def test_gateway_that_is_gone_is_tried_four_times_and_starts_no_cool_down(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection cannot have reached KIS: it raises, and the next call may ask at once."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    url = gateway.url
    gateway.__exit__()
    error = raised(USTokenManager().get_valid_token)
    assert isinstance(error, IssuerUnavailableError)
    assert outcomes() == ["unreachable"]
    with type(gateway)(port=int(url.rpartition(":")[2])) as back:
        assert USTokenManager().get_valid_token()
        assert asked(back) == 1


@pytest.mark.usefixtures("nowhere")
def test_unreachable_kis_is_left_alone_between_attempts_ahead(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the present token serves, a KIS that cannot be reached is not dialled again before the pause is over."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    token = cached(25 * 60)
    gateway.__exit__()
    for _ in range(3):
        assert USTokenManager().get_valid_token() == token.access_token
    until(lambda: outcomes() == ["unreachable"])


def test_minute_limit_is_waited_out_once_then_one_more_request_is_made(gateway: Sandbox) -> None:
    """Refused because another program has just issued: the call waits for the cool-down, asks once more and gets it."""
    issue_elsewhere(gateway)
    began = time.monotonic()
    assert USTokenManager().get_valid_token()
    assert 0.5 <= time.monotonic() - began < 2
    assert outcomes() == ["limit", "issued"]
    assert asked(gateway) == 3


def test_minute_limit_that_lasts_ends_in_an_error_that_says_when_to_retry(gateway: Sandbox) -> None:
    """Refused again after the cool-down, the call gives up: two requests a cool-down apart, and no loop."""
    gateway.fail("limit")
    error = raised(USTokenManager().get_valid_token)
    assert isinstance(error, IssuanceLimitError)
    assert error.cause == "minute"
    assert error.retry_at is not None
    assert abs(error.retry_at - USTokenManager().history()[-1].at - timedelta(seconds=0.5)) < timedelta(seconds=0.01)
    first, second = (request["at"] for request in gateway.stats()["requests"])
    assert second - first >= 0.5
    assert outcomes() == ["limit", "limit"]


def test_attempt_that_seems_to_lie_ahead_is_waited_out_once_and_then_forgotten(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the clock was set back the last attempt is in the future: one cool-down is waited for, not all of it."""
    monkeypatch.setenv("KIS_TIMEOUT", "0.5")
    cached(-HOUR)
    record = next(folder().glob("key-*.lock")).with_suffix(".jsonl")
    ahead = datetime.now(UTC) + timedelta(hours=1)
    record.write_text(json.dumps({"at": ahead.isoformat(), "outcome": "sent"}) + "\n")
    record.chmod(0o600)
    began = time.monotonic()
    assert USTokenManager().get_valid_token()
    assert 0.5 <= time.monotonic() - began < 3
    assert asked(gateway) == 1


def test_waiting_for_the_cool_down_ends_as_soon_as_the_winner_has_saved(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that sits out a minute returns another process's token at once when that is saved."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    gateway.fail("down")
    raised(USTokenManager().get_valid_token)
    winner = make_token()
    threading.Timer(0.3, lambda: KRTokenManager().save_token(winner)).start()
    began = time.monotonic()
    assert USTokenManager().get_valid_token() == winner.access_token
    assert 0.2 < time.monotonic() - began < 2
    assert asked(gateway) == 1


def test_bad_key_is_asked_once_and_again_only_by_a_person(quick: Sandbox) -> None:
    """KIS does not know the key: no later call asks again by itself, until `refresh` succeeds."""
    quick.fail("bad-key")
    for _ in range(3):
        assert isinstance(raised(USTokenManager().get_valid_token), CredentialsError)
        time.sleep(QUICK)
    assert asked(quick) == 1
    quick.clear()
    assert isinstance(raised(KRTokenManager().get_valid_token), CredentialsError)
    assert USTokenManager().refresh()
    assert KRTokenManager().get_valid_token()
    assert asked(quick) == 2


def test_corrected_secret_is_tried_at_once(quick: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other credentials than those KIS refused need no person's `refresh`."""
    quick.fail("bad-secret", 1)
    raised(USTokenManager().get_valid_token)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    assert USTokenManager().get_valid_token()


def test_ceiling_refuses_until_a_day_after_the_first_issue_and_force_passes_it(
    quick: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that has issued as often as the settings allow issues again a day later, or by force."""
    monkeypatch.setenv("KIS_MAX_ISSUES_PER_DAY", "1")
    USTokenManager().get_valid_token()
    first = USTokenManager().history()[0].at
    cached(-HOUR, age=DAY)
    time.sleep(QUICK)
    error = raised(USTokenManager().get_valid_token)
    assert isinstance(error, IssuanceLimitError)
    assert (error.cause, error.retry_at) == ("ceiling", first + timedelta(days=1))
    assert isinstance(raised(USTokenManager().refresh), IssuanceLimitError)
    assert asked(quick) == 1
    quick.set_rules(same_token=0)
    time.sleep(1)  # KIS tells expiries to the second: two tokens of one second would look the same
    assert USTokenManager().refresh(force=True)
    assert USTokenManager().get_valid_token()
    assert outcomes() == ["issued", "issued"]


def test_refresh_declines_within_six_hours_and_a_forced_one_that_brings_the_same_token_is_no_renewal(
    quick: Sandbox,
) -> None:
    """KIS hands the same token back for six hours: nothing is asked, and by force nothing is won and nothing counts."""
    token = USTokenManager().get_valid_token()
    error = raised(USTokenManager().refresh)
    assert isinstance(error, IssuanceLimitError)
    time.sleep(QUICK)
    error = raised(USTokenManager().refresh)
    assert isinstance(error, IssuanceLimitError)
    assert error.cause == "same_token"
    assert USTokenManager().refresh(force=True) is False
    assert USTokenManager().get_valid_token() == token
    assert outcomes() == ["issued", "same"]
    assert USTokenManager().get_token_status()["issues_last_24h"] == 1
    assert quick.stats()["granted_same"] == 1


def test_refresh_after_six_hours_brings_a_new_token(gateway: Sandbox) -> None:
    """Past the six hours a person's refresh renews and says so; the reason is kept in the record."""
    token = cached(17 * HOUR)
    assert USTokenManager().refresh(reason="테스트", by="김민지") is True
    assert USTokenManager().get_valid_token() != token.access_token
    attempt = USTokenManager().history()[0]
    assert (attempt.reason, attempt.by) == ("테스트", "김민지")
    assert asked(gateway) == 1


def test_minute_holds_for_a_forced_refresh_too(slow: Sandbox) -> None:
    """Inside the cool-down nobody asks, not even by force."""
    USTokenManager().get_valid_token()
    error = raised(lambda: USTokenManager().refresh(force=True))
    assert isinstance(error, IssuanceLimitError)
    assert error.cause == "minute"
    assert asked(slow) == 1


def test_rejected_young_token_is_dead_for_every_process_until_six_hours_after_its_issue(quick: Sandbox) -> None:
    """KIS would hand the dead token back: nothing is asked, nobody serves it, and `retry_at` says when that ends."""
    token = USTokenManager().get_valid_token()
    retry_at = issue_of(on_disk()) + timedelta(hours=6)
    quick.kill_tokens()
    time.sleep(QUICK)
    error = raised(lambda: KRTokenManager().report_rejected(token))
    assert isinstance(error, IssuanceLimitError)
    assert (error.cause, error.retry_at) == ("same_token", retry_at)
    assert "rejected" in str(error)
    ran = tokencore("get", "us")
    assert (ran.code, ran.out) == (4, "")
    assert USTokenManager().get_token_status()["status"] == "REJECTED"
    assert asked(quick) == 1


def test_rejected_old_token_is_renewed_at_once(gateway: Sandbox) -> None:
    """After six hours KIS has another token: the report returns it, and the dead one is never served again."""
    token = cached(17 * HOUR)
    renewed = USTokenManager().report_rejected(token.access_token)
    assert renewed != token.access_token
    assert KRTokenManager().get_valid_token() == renewed
    assert asked(gateway) == 1


def test_rejected_token_that_was_already_replaced_costs_nothing(gateway: Sandbox) -> None:
    """Who reports a token that another process has renewed since gets the present one, without a request."""
    old, new = cached(17 * HOUR), cached(23 * HOUR)
    assert USTokenManager().report_rejected(old.access_token) == new.access_token
    assert USTokenManager().get_token_status()["status"] == "VALID"
    assert asked(gateway) == 0


def test_rejected_token_gives_way_to_a_newer_one_in_a_markets_view(gateway: Sandbox) -> None:
    """An earlier version has renewed and written the views alone: the report finds its token, without a request."""
    new = cached(17 * HOUR)
    content = (folder() / "us_api_token.json").read_bytes()
    old = cached(16 * HOUR)
    (folder() / "us_api_token.json").write_bytes(content)
    assert USTokenManager().get_valid_token() == old.access_token
    assert USTokenManager().report_rejected(old.access_token) == new.access_token
    assert on_disk().access_token == new.access_token
    assert asked(gateway) == 0


def test_dead_token_that_kis_hands_back_stays_dead(quick: Sandbox) -> None:
    """A forced refresh inside the six hours brings the dead token again: the error says until when it will."""
    token = USTokenManager().get_valid_token()
    time.sleep(QUICK)
    raised(lambda: USTokenManager().report_rejected(token))
    error = raised(lambda: USTokenManager().refresh(force=True))
    assert isinstance(error, IssuanceLimitError)
    assert error.cause == "same_token"
    assert KRTokenManager().get_token_status()["status"] == "REJECTED"
    assert asked(quick) == 2


def test_disk_that_fills_up_after_the_issue_does_not_cost_the_token(
    quick: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets the token with a loud word, and the next process has it handed back by KIS, not issued again."""

    def issue_on_a_full_disk() -> None:
        import resource  # not on every platform

        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # a line of the record fits, a token file does not
        held = USTokenManager()
        token = held.get_valid_token()
        assert token == held.get_valid_token() == KRTokenManager().get_valid_token()
        assert caplog.records[-1].levelno == logging.CRITICAL
        assert "could not be saved" in caplog.records[-1].getMessage()

    assert ended(in_child(issue_on_a_full_disk)) == 0
    assert not (folder() / "us_api_token.json").exists()
    assert asked(quick) == 1
    assert USTokenManager().get_valid_token()
    assert quick.stats()["granted_same"] == 1
    assert outcomes() == ["issued", "same"]


def test_renewal_for_others_that_reaches_no_file_is_an_error(quick: Sandbox, command: Callable[..., Ran]) -> None:
    """On a full disk `refresh` does not say that it renewed: exit code 7, and a later one has the same token back."""
    cached(left=17 * HOUR)

    def refresh_on_a_full_disk() -> None:
        import resource  # not on every platform

        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # a line of the record fits, a token file does not
        ran = command("refresh", "us")
        assert ran.code == TokenStoreError.exit_code
        assert "only this process has it" in ran.err
        assert "Renewed" not in ran.out
        assert USTokenManager().get_valid_token() != old.access_token

    old = on_disk()
    assert ended(in_child(refresh_on_a_full_disk)) == 0
    assert on_disk().access_token == old.access_token
    assert quick.stats()["granted_new"] == 1
    time.sleep(QUICK)
    assert USTokenManager().refresh(force=True)
    assert quick.stats()["granted_same"] == 1


def test_mark_that_cannot_be_written_is_no_lost_token(quick: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Where only the mark of the issue fails, nobody hears that the token could not be saved."""
    folder().mkdir()
    (folder() / "us_token_issued_at.dat").mkdir()
    assert USTokenManager().get_valid_token() == on_disk().access_token
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert asked(quick) == 1


def test_disk_so_full_that_the_attempt_cannot_be_recorded_still_keeps_the_minute(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing at all can be written: the token is served, and the lock file tells other processes that one asked."""
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "30")
    USTokenManager().save_token(make_token(-HOUR, age=DAY))

    def issue_where_nothing_can_be_written() -> None:
        import resource  # not on every platform

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        assert USTokenManager().get_valid_token()

    assert ended(in_child(issue_where_nothing_can_be_written)) == 0
    error = raised(USTokenManager().refresh)
    assert isinstance(error, IssuanceLimitError)
    assert error.cause == "minute"
    assert asked(gateway) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"access_token": "x"}'])
def test_corrupt_cache_is_set_aside_and_not_fatal(gateway: Sandbox, content: bytes) -> None:
    """What is no token file counts as a miss; it is kept beside the new one."""
    folder().mkdir()
    path = folder() / "us_api_token.json"
    path.write_bytes(content)
    token = USTokenManager().get_valid_token()
    assert json.loads(path.read_text())["access_token"] == token
    assert (folder() / "us_api_token.json.aside").read_bytes() == content
    assert asked(gateway) == 1


def test_corrupt_view_costs_no_request_and_is_replaced_with_the_next_token(quick: Sandbox) -> None:
    """The key's own file has the token; what stood in the market's file is kept aside."""
    token = cached(-1)
    (folder() / "us_api_token.json").write_text("garbage")
    fresh = USTokenManager().get_valid_token()
    assert fresh != token.access_token
    assert json.loads((folder() / "us_api_token.json").read_text())["access_token"] == fresh
    assert (folder() / "us_api_token.json.aside").read_text() == "garbage"
    assert asked(quick) == 1


def test_deleting_keeps_the_record_and_the_token_that_kis_repeats_is_no_new_one(
    quick: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `delete` KIS hands the same token back: the record knows it; neither ceiling nor six hours move."""
    monkeypatch.setenv("KIS_MAX_ISSUES_PER_DAY", "1")
    quick.set_rules(issue_interval=0)
    token = USTokenManager().get_valid_token()
    issued_at = on_disk().issued_at
    assert USTokenManager().delete_token()
    assert KRTokenManager().delete_token()
    assert not USTokenManager().delete_token()
    assert outcomes() == ["issued"]
    error = raised(lambda: USTokenManager().get_valid_token(datetime.now(UTC)))
    assert isinstance(error, IssuanceLimitError)
    monkeypatch.setenv("KIS_MAX_ISSUES_PER_DAY", "2")
    assert USTokenManager().get_valid_token() == token
    assert on_disk().issued_at == issued_at
    assert outcomes() == ["issued", "same"]


def test_revoked_token_is_dead_for_every_market(gateway: Sandbox) -> None:
    """After `revoke` no market has the token that KIS has forgotten."""
    USTokenManager().get_valid_token()
    assert USTokenManager().revoke()
    assert gateway.stats()["revokes"] == 1
    assert {TokenManager(name).get_token_status()["status"] for name in ("us", "kr")} == {"NO_TOKEN"}
    assert USTokenManager().is_token_expired()


def test_revoke_that_kis_does_not_do_changes_nothing(gateway: Sandbox) -> None:
    """KIS cannot be asked to revoke: an error, and the token is served on."""
    token = USTokenManager().get_valid_token()
    gateway.__exit__()
    assert isinstance(raised(USTokenManager().revoke), IssuerUnavailableError)
    assert USTokenManager().get_valid_token() == token


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(("minutes", "issues"), [(15, 0), (40, 1)])
def test_session_that_the_present_token_serves_to_its_end_is_free_of_swaps(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, minutes: int, issues: int
) -> None:
    """With 25 minutes left a renewal waits for the end of a need that is over before; a longer one wants it now."""
    now = datetime.now(UTC)
    local = {code: now.astimezone(ZoneInfo(sessions.exchange(code).zone)) for code in ("KRX", "NASD")}
    code = next(code for code in local if 3 <= local[code].hour < 23)  # at any time of the day one of them is
    close = local[code] + timedelta(minutes=minutes) - sessions.exchange(code).pad
    hours = f"{close - timedelta(hours=1):%H:%M}-{close:%H:%M}"
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGES", code)
    monkeypatch.setenv(f"KIS_EXCHANGES__{code}__HOURS__{close:%Y-%m-%d}", hours)
    token = cached(25 * 60)
    assert (USTokenManager().get_valid_token() != token.access_token) == issues
    assert asked(gateway) == issues


def test_renewal_ahead_keeps_nobody_waiting_longer_than_a_second(gateway: Sandbox) -> None:
    """KIS takes its time: eight threads go on with the old token, one of them waits a moment; then all have the new."""
    gateway.set_rules(latency=2.5)
    token = cached(25 * 60)
    shared = USTokenManager()
    slow: list[float] = []

    def call_for_a_while() -> None:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            began = time.monotonic()
            assert shared.get_valid_token() == token.access_token
            slow.append(time.monotonic() - began)
            time.sleep(0.001)

    threads = [threading.Thread(target=call_for_a_while) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(slow) < 1
    assert len([one for one in slow if one > 0.5]) == 1
    until(lambda: shared.get_valid_token() != token.access_token)
    assert asked(gateway) == 1


def test_misspelt_setting_does_not_stop_a_token_that_still_serves(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the proactive window settings that forbid a renewal are told in the log; the token is served all the same."""
    token = cached(25 * 60)
    monkeypatch.setenv("KIS_MARKETS__US__EXCHANGE", "NASD")
    assert USTokenManager().get_valid_token() == token.access_token
    assert "KIS_MARKETS__US__EXCHANGE" in caplog.text
    cached_until = (folder() / "us_api_token.json").read_text()
    assert asked(gateway) == 0
    monkeypatch.setenv("KIS_PROACTIVE_WINDOW", "0")
    assert USTokenManager().get_valid_token() == token.access_token
    assert (folder() / "us_api_token.json").read_text() == cached_until


@pytest.mark.usefixtures("nowhere")
def test_unusable_directory_is_told_once_and_the_token_served_on(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal ahead that cannot lock says so once in a cool-down, not at every call."""
    monkeypatch.setattr("tokencore.manager.FRESH", 0.0)
    monkeypatch.setattr("tokencore.manager.AHEAD_PAUSE", 0.0)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    token = cached(25 * 60)
    lock = next(folder().glob("*.lock"))
    lock.unlink()
    lock.mkdir()
    shared = USTokenManager()
    assert {shared.get_valid_token() for _ in range(20)} == {token.access_token}
    assert len([line for line in caplog.records if line.levelno >= logging.WARNING]) == 1
    assert asked(gateway) == 0


@pytest.mark.usefixtures("nowhere")
def test_busy_lock_is_no_trouble_for_a_renewal_ahead(gateway: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """While another process renews, the present token is served at once and without a word."""
    gateway.set_rules(latency=1.5)
    token = cached(25 * 60)
    child = in_child(lambda: USTokenManager().get_valid_token())
    until(lambda: asked(gateway) == 1)
    began = time.monotonic()
    assert USTokenManager().get_valid_token() == token.access_token
    assert time.monotonic() - began < 1
    assert ended(child) == 0
    assert not caplog.records
    assert asked(gateway) == 1


def test_credentials_go_to_no_plain_address_of_a_subclass(gateway: Sandbox) -> None:
    """A manager whose own URL is http beyond loopback gets a settings error before anything is sent."""

    class Careless(USTokenManager):
        def get_api_url(self) -> str:
            return "http://192.0.2.1:9443"

    with pytest.raises(ConfigurationError, match="https"):
        Careless().get_valid_token()
    assert asked(gateway) == 0


def test_rejected_token_of_a_deleted_file_is_marked_where_another_market_has_it(gateway: Sandbox) -> None:
    """Without a file of its own a market's report reaches the key's other files: the dead token is not handed back."""
    token = cached(23 * HOUR, age=HOUR)
    USTokenManager().delete_token()
    error = raised(lambda: USTokenManager().report_rejected(token.access_token))
    assert isinstance(error, IssuanceLimitError)
    assert on_disk("kr").rejected_at is not None
    assert asked(gateway) == 0


def test_managers_of_ones_own_with_one_key_share_the_token(gateway: Sandbox) -> None:
    """Markets that only exist as subclasses make one issue together, even where they write key or URL differently."""

    class First(BaseTokenManager):
        prefix, space = "first_", ""

        def get_api_url(self) -> str:
            return gateway.url + "/" * len(self.space)

        def get_app_credentials(self) -> tuple[str, str]:
            return APP_KEY + self.space, APP_SECRET + self.space

        def get_token_file_prefix(self) -> str:
            return self.prefix

    class Second(First):
        prefix, space = "second_", " "

    assert First().get_valid_token() == Second().get_valid_token()
    assert asked(gateway) == 1


def test_token_that_someone_else_issued_is_no_issue_of_ours(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was issued long before our request is recorded as handed back, with its own time as the mark."""
    monkeypatch.setattr("tokencore.renewer.FOREIGN_AGE", timedelta(0))  # the gateway's clock cannot be set
    issue_elsewhere(gateway)
    time.sleep(1.1)
    token = USTokenManager().get_valid_token()
    assert outcomes() == ["same"]
    issued_at = USTokenManager().get_token_status()["issued_at"]
    assert issued_at
    mark = int((folder() / "us_token_issued_at.dat").read_text())
    assert mark == int(datetime.fromisoformat(issued_at).timestamp())
    assert token


def test_mark_beside_another_keys_token_does_not_delay_a_new_key(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of the key its first request does not wait out the minute of the key before."""
    gateway.set_rules(issue_interval=60)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    USTokenManager().get_valid_token()
    monkeypatch.setenv("KIS_APP_KEY", "PSanother" + "k" * 27)
    began = time.monotonic()
    USTokenManager().get_valid_token()
    assert time.monotonic() - began < 5


def test_time_without_a_zone_is_refused_before_anything_is_issued(gateway: Sandbox) -> None:
    """A naive `valid_until` gets the package's error, and no request is spent on it."""
    naive = datetime.now(UTC).replace(tzinfo=None)
    assert "time zone" in str(raised(lambda: USTokenManager().get_valid_token(valid_until=naive)))
    assert asked(gateway) == 0


def test_who_waited_while_kis_could_not_be_reached_shares_that_finding(gateway: Sandbox) -> None:
    """Of threads that want a token at once one tries to connect; the others hear of it instead of trying in turn."""
    managers = [USTokenManager() for _ in range(4)]
    gateway.__exit__()
    with ThreadPoolExecutor(len(managers)) as pool:
        errors = list(pool.map(lambda manager: raised(manager.get_valid_token), managers))
    assert all(isinstance(error, IssuerUnavailableError) for error in errors)
    assert outcomes() == ["unreachable"]
