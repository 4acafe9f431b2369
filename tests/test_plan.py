"""The plan: what the rule will do, as data, as lines for a terminal and as a picture."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from running import tokencore

from tokencore import Key, Settings, draw_plans
from tokencore.outlook import plan_as_json
from tokencore.reports.tables import LABEL, print_plan
from tokencore.tokens import Token

if TYPE_CHECKING:
    from pathlib import Path

    from tokencore.outlook import Plan

KEY, SECRET, TEXT = "PSplan" + "x" * 30, "s" * 180, "the-text-of-a-token"
SUMMER = datetime(2026, 7, 1, 3, 20, tzinfo=UTC)  # a Wednesday, 12:20 in Korea; the US are closed on Friday, 3 July
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, so that there are markets to plan for."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)


def planned(now: datetime = SUMMER, days: int = 7, *, token: bool = True) -> Plan:
    """The plan of us and kr, with a token issued at the last anchor."""
    key = Key.load(Settings.load())[0]
    if token:
        issued = (now - timedelta(days=1)).replace(hour=7, minute=35)
        save(key, Token(TEXT, issued + timedelta(days=1), issued))
    return key.state(now).plan(days)


def save(key: Key, token: Token) -> None:
    """Put a token into the key's store, as a renewal does."""
    with key.store.lock(wait=1):
        key.store.save(token)


def test_a_summer_week() -> None:
    """US and KR renew at 16:35 KST on each day with a session ahead, not before a closed Friday night and Saturday."""
    plan = planned()
    assert plan.markets == ["us", "kr"]
    assert plan.outlook.anchor is not None
    assert plan.outlook.anchor.strftime("%H:%M") == "16:35"
    days = [renewal.at.strftime("%m-%d %H:%M") for renewal in plan.renewals]
    assert days == ["07-01 07:35", "07-02 07:35", "07-05 07:35", "07-06 07:35", "07-07 07:35"]
    assert all(later.at - sooner.at >= timedelta(hours=24) for sooner, later in pairwise(plan.renewals))
    assert all(renewal.exception is None for renewal in plan.renewals)


def test_without_a_token_the_next_anchor_is_planned() -> None:
    """A missing token is renewed at once where a session needs it, and planned otherwise."""
    assert planned(token=False).renewals[0].at == SUMMER
    saturday = datetime(2026, 7, 4, 3, 0, tzinfo=UTC)
    assert planned(saturday, token=False).renewals[0].at == datetime(2026, 7, 5, 7, 35, tzinfo=UTC)


def test_as_json_holds_what_a_program_needs() -> None:
    """Anchor, reasons, sessions and needs come as plain JSON, without the token."""
    text = json.dumps([plan_as_json(planned())])
    (plan,) = json.loads(text)
    assert plan["anchor_kst"] == "16:35"
    assert [row["exchange"] for row in plan["exchanges"]] == ["NASD", "NYSE", "AMEX", "KRX"]
    assert ["2026-07-01T00:00:00+00:00", "2026-07-01T06:30:00+00:00"] in plan["exchanges"][-1]["sessions"]
    assert not any(secret in text for secret in (TEXT, KEY, SECRET))


def test_the_picture_is_well_formed_and_complete() -> None:
    """The SVG has a bar for each session, a mark for each renewal, and no secret."""
    plan = planned()
    text = draw_plans([plan, plan])
    root = ET.fromstring(text)  # noqa: S314 - our own text
    fills = [bar.get("fill") for bar in root.iter(f"{SVG}rect")]
    # Behind the bars stand the legends, one entry each.
    assert fills.count("var(--session)") == 2 * (sum(len(row.sessions) for row in plan.rows) + 1)
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * len(plan.renewals)
    assert "prefers-color-scheme:dark" in text
    assert not any(secret in text for secret in (TEXT, KEY, SECRET))


def test_the_lines_for_a_terminal_show_sessions_over_needs(capfd: pytest.CaptureFixture[str]) -> None:
    """A need begins before its session and ends after it; the token's line has the present one, those planned, now."""
    print_plan(planned())
    lines = {line[:LABEL].strip(): line[LABEL:] for line in capfd.readouterr().out.splitlines()}
    assert re.fullmatch(r"(·+▒?█{5,6}▒){3}·+(▒?█{5,6}▒·+){2}", lines["KRX"]), lines["KRX"]
    assert re.fullmatch(r"━+│━+▲.*", lines["token"])
    assert (lines["token"].count("▲"), set(lines["token"])) == (5, {*"━│▲┄ "})


def test_overrides_reach_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A day closed by the settings is no session, and the after-market moves the anchor to the longer quiet."""
    monkeypatch.setenv("KIS_EXCHANGES__KRX__CLOSED", "2026-10-01")
    monkeypatch.setenv("KIS_EXCHANGES__KRX__EXTENDED", "true")
    plan = planned(datetime(2026, 9, 30, 3, 20, tzinfo=UTC))
    krx = next(row for row in plan.rows if row.code == "KRX")
    assert not any(opens.date().isoformat() == "2026-10-01" for opens, _ in krx.sessions)
    assert krx.sessions[0][1] == datetime(2026, 9, 30, 11, 0, tzinfo=UTC)
    assert plan.outlook.anchor is not None
    assert (
        plan.outlook.anchor.strftime("%H:%M") == "05:05"
    )  # after the US close: longer quiet than between 20:00 and the US open


def test_without_exchanges_the_plain_rule_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key whose markets trade nothing renews in the proactive window, and the plan says so."""
    for name in ("US", "KR"):
        monkeypatch.delenv("KIS_APP_KEY", raising=False)
        monkeypatch.setenv(f"KIS_MARKETS__{name}__APP_KEY", f"PSother{name}")
    monkeypatch.setenv("KIS_MARKETS__BARE__APP_KEY", KEY)
    key = next(key for key in Key.load(Settings.load()) if key.name == "bare")
    save(key, Token(TEXT, SUMMER + timedelta(hours=5), SUMMER - timedelta(hours=19)))
    plan = key.state(SUMMER).plan()
    assert [renewal.at for renewal in plan.renewals] == [SUMMER + timedelta(hours=4, minutes=30)]
    assert "No exchange is configured" in plan.why
    assert draw_plans([plan]).endswith("</svg>\n")


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    """`plan` shows anchor and exchanges, `--svg` writes a picture, `--json` a list."""
    shown = tokencore("plan", "--days", "3")
    assert shown.code == 0, shown.err
    assert "16:35 KST" in shown.out
    assert "NASD" in shown.out
    picture = tmp_path / "plan.svg"
    assert tokencore("plan", "--svg", str(picture)).code == 0
    assert ET.parse(picture).getroot().tag == f"{SVG}svg"  # noqa: S314 - our own file
    assert json.loads(tokencore("plan", "--json").out)[0]["markets"] == ["us", "kr"]
