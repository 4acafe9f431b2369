"""`tokencore import`: a token from elsewhere, checked, saved for all markets of the key, without an issue request."""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import CANARIES, KEY, make_jwt
from running import asked, on_disk, one_line, outcomes, tokencore

from tokencore import TokenManager
from tokencore.sandbox import APP_KEY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from running import Ran

    from tokencore.sandbox import Sandbox


@pytest.fixture
def take(command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `import us` with a text on standard input."""

    def run(text: str, *options: str) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        ran = command("import", "us", *options)
        assert not any(canary in ran.out + ran.err for canary in CANARIES)
        return ran

    return run


@pytest.fixture
def elsewhere(gateway: Sandbox, tmp_path: Path) -> str:
    """What `get us --json` prints on another machine with the same key."""
    gateway.set_rules(issue_interval=0)
    told = tokencore("get", "us", "--json", KIS_TOKEN_DIR=str(tmp_path / "elsewhere"))
    assert told.code == 0
    return told.out


def test_a_token_moves_to_another_machine_without_an_issue(
    elsewhere: str, gateway: Sandbox, take: Callable[..., Ran]
) -> None:
    """What `get --json` prints there is proven by one quote call, serves all markets of the key, and is recorded."""
    ran = take(elsewhere)
    assert ran.code == 0, ran.err
    assert on_disk("us").access_token == on_disk("kr").access_token == json.loads(elsewhere)["access_token"]
    assert on_disk().issued_at == datetime.fromisoformat(json.loads(elsewhere)["issued_at"]).replace(microsecond=0)
    assert TokenManager("kr").get_valid_token() == on_disk().access_token
    assert outcomes() == ["imported"]
    assert (asked(gateway), gateway.stats()["quotes"]) == (1, 1)
    assert "Known already" in take(elsewhere).out


def test_a_bare_token_tells_its_own_expiry(take: Callable[..., Ran], gateway: Sandbox) -> None:
    """A JWT alone is enough; --offline asks nobody."""
    ran = take(f" {make_jwt(APP_KEY, life=7200)}\n", "--offline")
    assert ran.code == 0, ran.err
    assert timedelta(hours=1) < on_disk().expires_at - datetime.now(UTC) <= timedelta(hours=2)
    assert (asked(gateway), gateway.stats()["quotes"]) == (0, 0)
    assert "Known already" in take(f"\ufeff{on_disk().access_token}\r\n", "--offline").out, "as PowerShell pipes it"


def test_an_imported_token_starts_the_six_hours_but_neither_cool_down_nor_ceiling(
    elsewhere: str, gateway: Sandbox, take: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its issue is KIS's affair and counts for the six hours; the request was not ours, so our limits stay free."""
    monkeypatch.setenv("KIS_MAX_ISSUES_PER_DAY", "1")
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "3600")
    assert take(elsewhere).code == 0
    status = TokenManager("us").get_token_status()
    assert (status["issues_last_24h"], status["cooldown_until"]) == (0, None)
    declined = tokencore("refresh", "us")
    assert declined.code == 4
    assert "six hours after its issue" in declined.err
    assert tokencore("refresh", "us", "--force").code == 0
    assert asked(gateway) == 2


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        pytest.param("", 2, "holds no token", id="nothing"),
        pytest.param("x" * 70_000, 2, "holds no token", id="far too much"),
        pytest.param("not-a-jwt", 2, "tells its expiry", id="an opaque token without an expiry"),
        pytest.param("[1]", 2, "tells its expiry", id="JSON that is no object"),
        pytest.param(make_jwt(), 2, "another app key", id="another key's"),
        pytest.param(make_jwt(APP_KEY, life=-60), 3, "of no use any more", id="expired"),
        pytest.param(make_jwt(APP_KEY, life=200), 3, "of no use any more", id="about to expire"),
        pytest.param(
            json.dumps({"access_token": make_jwt(APP_KEY), "expires_at": "2099-01-01T00:00Z", "environment": "paper"}),
            2,
            "is paper",
            id="of the other environment",
        ),
        pytest.param(
            json.dumps({"access_token": make_jwt(APP_KEY), "expires_at": "2099-01-01T00:00Z", "environment": KEY}),
            2,
            "is unknown",
            id="an environment that is none",
        ),
        pytest.param(f'"{make_jwt(APP_KEY)}"', 2, "tells its expiry", id="quoted, which KIS would not take"),
        pytest.param(
            json.dumps({"access_token": "opaque", "expires_at": "2099-01-01T00:00Z"}),
            2,
            "does not tell whose it is",
            id="an opaque one that nobody proves",
        ),
    ],
)
def test_what_is_no_token_of_the_key_is_refused(text: str, code: int, told: str, take: Callable[..., Ran]) -> None:
    """A sentence says what is wrong, nothing is saved, and no output repeats the token."""
    ran = take(text, "--offline")
    assert ran.code == code
    assert told in one_line(ran)
    assert TokenManager("us").load_token() is None
    assert outcomes() == []


def test_a_token_that_kis_refuses_is_not_saved(gateway: Sandbox, take: Callable[..., Ran]) -> None:
    """The probe's refusal is told with KIS's code; where KIS cannot be asked, --offline is offered."""
    stranger = make_jwt(APP_KEY)
    refused = take(stranger)
    assert refused.code == 3
    assert "EGW00121" in one_line(refused)
    gateway.__exit__()  # KIS is gone
    unknown = take(stranger)
    assert unknown.code == 6
    assert "--offline" in one_line(unknown)
    assert TokenManager("us").load_token() is None
    gateway.__enter__()


@pytest.mark.usefixtures("gateway")
def test_a_better_token_is_not_overwritten(take: Callable[..., Ran]) -> None:
    """The present token that lasts longer stays, unless --force says otherwise; one that is dead gives way."""
    longer, shorter = make_jwt(APP_KEY, life=80_000), make_jwt(APP_KEY, life=40_000)
    assert take(longer, "--offline").code == 0
    declined = take(shorter, "--offline")
    assert declined.code == 2
    assert "lasts longer" in one_line(declined)
    assert on_disk().access_token == longer
    assert take(shorter, "--offline", "--force").code == 0
    assert on_disk().access_token == shorter


def test_a_token_that_is_known_to_be_dead_needs_proof(
    elsewhere: str, gateway: Sandbox, take: Callable[..., Ran]
) -> None:
    """What KIS has rejected comes back only when KIS accepts it again."""
    assert take(elsewhere).code == 0
    gateway.fail("down")
    with pytest.raises(Exception, match="six hours"):
        TokenManager("us").report_rejected(on_disk().access_token)
    declined = take(elsewhere, "--offline")
    assert declined.code == 3
    assert "rejected this very token" in one_line(declined)
    assert take(elsewhere).code == 0
    assert not TokenManager("us").is_token_expired()
