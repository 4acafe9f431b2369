"""What people and programs see of a market, its key and the days ahead: tables, JSON, the picture and states."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from builders import make_token
from running import Ran, cached, folder, raised, record, tokencore

from tokencore import Key, Settings, TokenManager, USTokenManager, draw_plans
from tokencore.attempts import Attempt, Outcome
from tokencore.calendars import sessions
from tokencore.outlook import plan_as_json
from tokencore.reports.tables import LABEL, print_plan
from tokencore.sandbox import APP_KEY, APP_SECRET
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokencore.outlook import Plan

    Command = Callable[..., Ran]
    from tokencore.sandbox import Sandbox

SUMMER = datetime(2026, 7, 1, 3, 20, tzinfo=UTC)  # a Wednesday, 12:20 in Korea; the US are closed on Friday, 3 July
SVG = "{http://www.w3.org/2000/svg}"
HOUR = 3600.0
DUE = datetime(2024, 11, 19, 8, 15, tzinfo=UTC)  # a Tuesday, 17:15 KST: after the anchor of us and kr
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d"


@pytest.fixture
def key(gateway: Sandbox) -> Key:
    """The key of us and kr, as a run of a flow loads it."""
    assert gateway.url
    (found,) = Key.load(Settings.load())
    return found


def save(key: Key, life: float = 24 * HOUR, age: float = 0, *, now: datetime = DUE) -> None:
    """Save a token of the key that was issued `age` seconds before `now`."""
    with key.store.lock(wait=5):
        key.store.save(make_token(life, age=age, now=now))


@pytest.fixture
def on_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command on a terminal that knows colours."""

    def run(*arguments: str, **settings: str) -> Ran:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return command(*arguments, TERM="xterm-256color", **settings)

    return run


def plain(ran: Ran) -> list[str]:
    """The lines without their colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", ran.out).splitlines()


@pytest.mark.usefixtures("gateway")
def test_check_on_a_terminal_is_aligned_coloured_and_says_one_time(on_a_terminal: Command) -> None:
    """Status in colour, and until when the token serves: five minutes before its expiry.

    On a narrow terminal what does not fit beside stands below; NO_COLOR is respected.
    """
    token = make_token(50_000)
    USTokenManager().save_token(token)
    TokenManager("kr").delete_token()
    own = {"KIS_MARKETS__KR__APP_KEY": "PSanother", "KIS_MARKETS__KR__APP_SECRET": "secret"}
    shown = on_a_terminal("check", COLUMNS="140", **own)
    assert ("\x1b[32mVALID\x1b[0m" in shown.out, "\x1b[31mNO_TOKEN\x1b[0m" in shown.out) == (True, True)
    head, us, kr, *_ = plain(shown)
    assert re.search(r"serves until \(KST\).*local \(.*left.*next need", head)
    assert us.index("VALID") == kr.index("NO_TOKEN") == head.index("status")
    serves = token.expires_at - timedelta(minutes=5)
    times = [f"{at:%Y-%m-%d %H:%M}" for at in (serves.astimezone(KST), serves.astimezone())]
    assert (re.findall(TIME, us)[:2], "13 h 4" in us) == (times, True)
    assert times[0] in USTokenManager().get_token_info()
    lines = plain(on_a_terminal("check", COLUMNS="80", **own))
    assert (max(map(len, lines[:3])) <= 80, any(line.startswith("kr: next need ") for line in lines)) == (True, True)
    assert "\x1b" not in on_a_terminal("check", NO_COLOR="1").out


@pytest.mark.usefixtures("gateway")
def test_check_says_mode_length_and_when_it_was_cached(command: Command) -> None:
    """As the old check script did; a file that others may read is said to be so, with the command that closes it."""
    path, length = folder() / "us_api_token.json", len(cached(20_000).access_token)
    said = rf"^us: {path}, mode 0600, cached {TIME} KST, {length} characters$"
    assert re.search(said, command("check").out, re.MULTILINE)
    path.chmod(0o644)
    assert f"mode 0644 (others may use it: chmod 600 {path})" in command("check").out
    assert json.loads(command("check", "--json").out)[0]["permissions"] == "0644"


@pytest.mark.usefixtures("gateway")
def test_a_zone_that_cannot_be_is_no_reason_to_fail() -> None:
    """`TZ=UTC+25`: local times are UTC then, in every table."""
    cached(20_000)
    for line in ("plan", "history", "check"):
        ran = tokencore(line, TZ="UTC+25")
        assert (ran.code, ran.err) == (0, "")
    assert "local (UTC)" in ran.out


@pytest.mark.usefixtures("gateway")
def test_any_reason_can_be_shown_on_any_terminal() -> None:
    """Markup, escape sequences and bytes of another encoding are text; what an encoding lacks costs that character."""
    reasons = ["[/red] [bold]", r"back\[slash]", "줄\n바꿈", "\x1b[31mred", "\udcff", "길" * 200, "수동 refresh"]
    record(*(Attempt(datetime.now(UTC), Outcome.LIMIT, reason=reason) for reason in reasons))
    for encoding, shown in (("utf-8", "수동 refresh"), ("ascii", "?? refresh")):
        ran = tokencore("history", PYTHONIOENCODING=encoding)
        assert (ran.code, ran.err, "\x1b" in ran.out) == (0, "", False)
        assert all(part in ran.out for part in (shown, "[/red] [bold]", r"back\[slash]"))
    found = json.loads(tokencore("history", "--json", PYTHONIOENCODING="ascii").out)
    assert (len(found), found[-1]["reason"]) == (len(reasons), "수동 refresh")


STATES: dict[str, Callable[[], object]] = {
    "nothing at all": lambda: None,
    "a token about to expire": lambda: cached(1_000),
    "an expired token": lambda: cached(-100, age=86_400),
    "a rejected token": lambda: TokenManager("us").save_token(make_token(age=28_800, rejected=True)),
    "one market without its file": lambda: (cached(), TokenManager("kr").delete_token()),
}


@pytest.mark.parametrize("state", STATES)
def test_every_report_says_the_same(state: str, key: Key, command: Command) -> None:
    """In every state `check`, a manager's own status and the key's state agree, fact by fact."""
    STATES[state]()
    listed, now = json.loads(command("check", "--json").out), datetime.now(UTC)
    seen = key.state(now)
    for market, one in zip(key.markets, listed, strict=True):
        own = TokenManager(market.name).get_token_status()
        passing = {"remaining_seconds", "remaining_hours", "cooldown_until"}
        assert [name for name, value in own.items() if one[name] != value and name not in passing] == []
        assert one["expires_at"] == (seen.token.expires_at.isoformat() if seen.token else None)
        assert (one["status"], one["issues_last_24h"]) == (seen.status, seen.issues_last_24h)
        need = next(iter(sessions.needs(market.exchanges, now, now + timedelta(days=15))))
        assert (one["next_need"]["end"], seen.need_of(market)) == (need[1].isoformat(), need)


@pytest.fixture
def week(key: Key) -> Plan:
    """The plan of a week in summer, with a token of the last anchor."""
    save(key, age=(SUMMER - datetime(2026, 6, 30, 7, 35, tzinfo=UTC)).total_seconds(), now=SUMMER)
    return key.state(SUMMER).plan()


def test_a_summer_week(week: Plan) -> None:
    """US and KR renew at 16:35 KST on each day with a session ahead, not before a closed Friday night and Saturday.

    As JSON the plan has reasons, sessions and needs too, and no token, key or secret.
    """
    text = json.dumps(plan_as_json(week))
    plan = json.loads(text)
    assert (plan["markets"], plan["anchor_kst"]) == (["us", "kr"], "16:35")
    days = [f"2026-07-0{day}T07:35" for day in (1, 2, 5, 6, 7)]
    assert [(one["at"][:16], one["exception"]) for one in plan["renewals"]] == [(day, None) for day in days]
    assert [row["exchange"] for row in plan["exchanges"]] == ["NASD", "NYSE", "AMEX", "KRX"]
    assert ["2026-07-01T00:00:00+00:00", "2026-07-01T06:30:00+00:00"] in plan["exchanges"][-1]["sessions"]
    assert not any(secret in text for secret in ("eyJ", APP_KEY, APP_SECRET))


def test_without_a_token_the_next_anchor_is_planned(key: Key) -> None:
    """A missing token is renewed at once where a session needs it, and planned otherwise."""
    assert key.state(SUMMER).plan().renewals[0].at == SUMMER
    saturday = datetime(2026, 7, 4, 3, 0, tzinfo=UTC)
    assert key.state(saturday).plan().renewals[0].at == datetime(2026, 7, 5, 7, 35, tzinfo=UTC)


def test_the_picture_is_well_formed_and_complete(week: Plan) -> None:
    """The SVG has a bar for each session, need and token, a mark for each renewal, the buffer's tip, and no secret."""
    text = draw_plans([week, week])
    root = ET.fromstring(text)  # noqa: S314 - our own text
    fills = [bar.get("fill") for bar in root.iter(f"{SVG}rect")]
    # Behind the bars stand the legends, one entry each.
    assert fills.count("var(--session)") == 2 * (sum(len(row.sessions) for row in week.rows) + 1)
    assert fills.count("var(--need)") == 2 * (sum(len(row.needs) for row in week.rows) + 1)
    assert (fills.count("var(--token)"), fills.count("var(--buffer)"), fills.count("none")) == (4, 4, 10)
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * len(week.renewals)
    assert "06-30 16:35 to 07-01 16:30 KST" in text, "what the token serves"
    assert not any(secret in text for secret in ("eyJ", APP_KEY, APP_SECRET))


def test_the_lines_for_a_terminal_show_sessions_over_needs(week: Plan, capfd: pytest.CaptureFixture[str]) -> None:
    """A need begins before its session and ends after it; the token's line has the present one, those planned, now."""
    print_plan(week)
    lines = {line[:LABEL].strip(): line[LABEL:] for line in capfd.readouterr().out.splitlines()}
    assert re.fullmatch(r"(·+▒?█{5,6}▒){3}·+(▒?█{5,6}▒·+){2}", lines["KRX"]), lines["KRX"]
    assert re.fullmatch(r"━+│━+▲.*", lines["token"])
    assert (lines["token"].count("▲"), set(lines["token"])) == (5, {*"━│▲┄ "})


@pytest.mark.usefixtures("gateway")
def test_overrides_reach_the_plan() -> None:
    """A day closed by the settings is no session, and the after-market moves the anchor to the longer quiet."""
    os.environ |= {"KIS_EXCHANGES__KRX__CLOSED": "2026-10-01", "KIS_EXCHANGES__KRX__EXTENDED": "true"}
    plan = Key.load(Settings.load())[0].state(datetime(2026, 9, 30, 3, 20, tzinfo=UTC)).plan()
    krx = next(row for row in plan.rows if row.code == "KRX")
    assert not any(opens.date().isoformat() == "2026-10-01" for opens, _ in krx.sessions)
    assert krx.sessions[0][1] == datetime(2026, 9, 30, 11, 0, tzinfo=UTC)
    assert f"{plan.outlook.anchor:%H:%M}" == "05:05", "after the US close: longer than from 20:00 to the US open"


@pytest.mark.usefixtures("nowhere")
def test_without_exchanges_the_plain_rule_is_said() -> None:
    """A key whose markets trade nothing renews in the proactive window, and the plan says so."""
    (key,) = Key.load(Settings.load())
    save(key, age=19 * HOUR, now=SUMMER)
    plan = key.state(SUMMER).plan()
    assert [renewal.at for renewal in plan.renewals] == [SUMMER + timedelta(hours=4, minutes=30)]
    assert "No exchange is configured" in plan.why
    assert draw_plans([plan]).endswith("</svg>\n")


@pytest.mark.usefixtures("gateway")
def test_the_command_prints_and_writes(command: Command, tmp_path: Path) -> None:
    """`plan` shows anchor and exchanges, `--svg` writes a picture, `--json` a list."""
    shown, picture = command("plan", "--days", "3"), tmp_path / "plan.svg"
    assert (shown.code, "NASD" in shown.out) == (0, True)
    assert re.search("renewed at 1[67]:35 KST", shown.out)  # an hour later while Korea's entrance exam is ahead
    assert command("plan", "--svg", str(picture)) == Ran(0, "", "")
    assert ET.parse(picture).getroot().tag == f"{SVG}svg"  # noqa: S314 - our own file
    assert json.loads(command("plan", "--json").out)[0]["markets"] == ["us", "kr"]


@pytest.mark.usefixtures("gateway")
def test_markets_with_one_key_are_one_key() -> None:
    """They share label and exchanges, by any of whose names it is found; what nobody trades is a setting to add."""
    os.environ["KIS_MARKETS__HK__EXCHANGES"] = "SEHK"
    os.environ["KIS_MARKETS__JP__APP_KEY"] = "another-key"
    os.environ["KIS_MARKETS__TRIAL__ENVIRONMENT"] = "paper"
    keys = {key.label: key.exchanges for key in Key.load(Settings.load())}
    assert keys == {"us+kr+hk": ["NASD", "NYSE", "AMEX", "KRX", "SEHK"], "jp": [], "trial (paper)": []}
    for name in ("NASD", "NAS", "XNAS", "nasdaq"):
        assert [key.label for key in Key.trading(Settings.load(), name)] == ["us+kr+hk"]
    assert "KIS_MARKETS__TSE__EXCHANGES=TKSE" in str(raised(lambda: Key.trading(Settings.load(), "TKSE")))
    del os.environ["KIS_APP_KEY"], os.environ["KIS_MARKETS__JP__APP_KEY"]
    assert "KIS_APP_KEY" in str(raised(lambda: Key.load(Settings.load())))


def test_a_state_says_all_that_is_known_at_one_moment(key: Key) -> None:
    """Without a token a renewal is due now; one that lasts covers the coming need until the next daily renewal."""
    state = key.state(DUE)
    assert (state.token, state.problem, state.serves_until, state.covered) == (None, "", None, False)
    assert (state.served, state.outlook.next and state.outlook.next.at) == ("us+kr: no valid token", DUE)
    save(key)
    state = key.state(DUE)
    assert state.serves_until == DUE + timedelta(hours=24, minutes=-5)
    assert state.served == "us+kr: the token serves until 2024-11-20 17:10 KST"
    assert (state.covered, [state.lasts(DUE + timedelta(hours=hours)) for hours in (20, 24)]) == (True, [True, False])
    assert state.outlook.next is not None
    assert (state.outlook.next.exception, state.next_attempt) == (None, state.outlook.next.at)
    assert (state.refusal, state.cooldown_until, state.issues_last_24h, state.foreign_issue) == (None, None, 0, None)


def test_a_state_knows_a_token_that_another_program_issued(key: Key) -> None:
    """KIS returned it to us although no request of ours is from its time; our own, or an imported one, is none."""
    save(key, age=2 * HOUR)
    issued_at = DUE - timedelta(hours=2)
    assert key.state(DUE).foreign_issue is None
    record(Attempt(DUE, Outcome.SAME, expires_at=DUE + timedelta(hours=22)))
    assert key.state(DUE).foreign_issue == issued_at
    record(Attempt(issued_at, Outcome.NO_ANSWER))
    assert key.state(DUE).foreign_issue is None


def test_warnings_name_what_a_refresh_would_cost_and_only_where_something_can_be_lost(key: Key) -> None:
    """The same token within six hours, a second issue in 24 hours, a swap inside a session; nothing without a token."""
    inside = datetime(2024, 11, 19, 2, 0, tzinfo=UTC)  # 11:00 KST, KRX is open
    costs = {0.0: [], HOUR: ["same token"], 12 * HOUR: ["another issue", "inside a session"], 25 * HOUR: []}
    for age, kinds in costs.items():
        if age:
            save(key, age=age, now=inside)
        assert [one.kind for one in key.state(inside).warnings()] == kinds
