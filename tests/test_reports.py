"""What people and programs see of a market, its key and the days ahead: tables, JSON, the picture and states."""

import json
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from builders import make_token
from running import Command, Ran, cached, folder, raised, record, tokencore

from tokencore import Key, Settings, TokenManager, USTokenManager, draw_plans
from tokencore.attempts import Attempt, Outcome
from tokencore.calendars import sessions
from tokencore.outlook import Plan, plan_as_json
from tokencore.policy import Renewal
from tokencore.reports.tables import LABEL, print_plan
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.tokens import KST

SUMMER = datetime(2026, 7, 1, 3, 20, tzinfo=UTC)  # a Wednesday, 12:20 in Korea; the US are closed on Friday, 3 July
SVG = "{http://www.w3.org/2000/svg}"
HOUR, DUE = 3600.0, datetime(2024, 11, 19, 8, 15, tzinfo=UTC)  # a Tuesday, 17:15 KST: after the anchor of us and kr
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d"
pytestmark = pytest.mark.usefixtures("gateway")


@pytest.fixture
def key(gateway: Sandbox) -> Key:  # noqa: ARG001 - for its settings
    """The key of us and kr, loaded as a flow run loads it."""
    return Key.load(Settings.load())[0]


def save(key: Key, life: float = 24 * HOUR, age: float = 0, *, now: datetime = DUE, rejected: bool = False) -> None:
    """Save a token of the key that was issued `age` seconds before `now`."""
    with key.store.lock(wait=5):
        key.store.save(make_token(life, age=age, now=now, rejected=rejected))


def plain(ran: Ran) -> list[str]:
    """The lines of the output, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", ran.out).splitlines()


def test_check_on_a_terminal_is_aligned_coloured_and_says_one_time(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has the status in colour and until when a token serves; what a narrow terminal cannot fit is below."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    token = cached(50_000)
    TokenManager("kr").delete_token()
    os.environ |= {"KIS_MARKETS__KR__APP_KEY": "PSanother", "KIS_MARKETS__KR__APP_SECRET": "secret"}
    os.environ["TERM"] = "xterm-256color"
    shown = command("check", COLUMNS="140")
    assert ("\x1b[32mVALID\x1b[0m" in shown.out, "\x1b[31mNO_TOKEN\x1b[0m" in shown.out) == (True, True)
    head, us, kr, *_ = plain(shown)
    assert re.search(r"serves until \(KST\).*local \(.*left.*next need", head)
    assert us.index("VALID") == kr.index("NO_TOKEN") == head.index("status")
    serves = token.expires_at - timedelta(minutes=5)
    times = [f"{at:%Y-%m-%d %H:%M}" for at in (serves.astimezone(KST), serves.astimezone())]
    assert (re.findall(TIME, us)[:2], "13 h 4" in us) == (times, True)
    assert times[0] in USTokenManager().get_token_info()
    lines = plain(command("check", COLUMNS="80"))
    assert (len(lines[1]) <= 80, any(line.startswith("kr: next need ") for line in lines)) == (True, True)
    assert "\x1b" not in command("check", NO_COLOR="1").out


def test_check_says_mode_length_and_when_it_was_cached(command: Command) -> None:
    """`check` shows them as the old check script did, and the command that closes a file that others may read."""
    path, length = folder() / "us_api_token.json", len(cached(20_000).access_token)
    said = rf"^us: {path}, mode 0600, cached {TIME} KST, {length} characters$"
    assert re.search(said, command("check").out, re.MULTILINE)
    path.chmod(0o644)
    assert f"mode 0644 (others may use it: chmod 600 {path})" in command("check").out


def test_any_reason_can_be_shown_on_any_terminal() -> None:
    """Markup, escape sequences and foreign bytes are shown as text; a character that the encoding lacks becomes `?`."""
    reasons = ["[/red] [bold]", r"back\[slash]", "줄\n바꿈", "\x1b[31mred", "\udcff", "길" * 200, "수동 refresh"]
    record(*(Attempt(datetime.now(UTC), Outcome.LIMIT, reason=reason) for reason in reasons))
    for encoding, shown in (("utf-8", "수동 refresh"), ("ascii", "?? refresh")):
        ran = tokencore("history", PYTHONIOENCODING=encoding, TZ="UTC+25")
        assert (ran.code, ran.err, "\x1b" in ran.out) == (0, "", False)
        assert all(part in ran.out for part in (shown, *reasons[:2]))
    assert "local (UTC)" in tokencore("check", TZ="UTC+25").out  # an impossible zone is no reason to fail
    assert json.loads(tokencore("history", "--json", PYTHONIOENCODING="ascii").out)[-1]["reason"] == reasons[-1]


STATES: dict[str, Callable[[], object]] = {
    "nothing at all": lambda: None,
    "a rejected token": lambda: TokenManager("us").save_token(make_token(age=28_800, rejected=True)),
    "one market without its file": lambda: (cached(), TokenManager("kr").delete_token()),
}


@pytest.mark.parametrize("state", STATES)
def test_every_report_says_the_same(state: str, key: Key, command: Command) -> None:
    """In every state, `check`, a manager's own status and the key's state agree in each field."""
    STATES[state]()
    listed, now = json.loads(command("check", "--json").out), datetime.now(UTC)
    seen = key.state(now)
    for market, one in zip(key.markets, listed, strict=True):
        own = TokenManager(market.name).get_token_status()
        passing = {"remaining_seconds", "remaining_hours", "cooldown_until"}
        assert [name for name, value in own.items() if one[name] != value and name not in passing] == []
        assert one["expires_at"] == (seen.token.expires_at.isoformat() if seen.token else None)
        assert (one["status"], one["issues_last_24h"]) == (seen.status, seen.issues_last_24h)
        need = sessions.needs(market.exchanges, now, now + timedelta(days=15))[0]
        assert (one["next_need"]["end"], seen.need_of(market)) == (need[1].isoformat(), need)


@pytest.fixture
def week(key: Key) -> Plan:
    """The plan of a week in summer, with a token issued at the last anchor."""
    save(key, age=(SUMMER - datetime(2026, 6, 30, 7, 35, tzinfo=UTC)).total_seconds(), now=SUMMER)
    return key.state(SUMMER).plan()


def test_a_summer_week(week: Plan) -> None:
    """The key renews at 16:35 KST on each day with a session ahead, so not on a closed Friday night and Saturday."""
    plan = json.loads(json.dumps(plan_as_json(week), default=datetime.isoformat))
    assert (plan["markets"], plan["anchor_kst"]) == (["us", "kr"], "16:35")
    days = [f"2026-07-0{day}T07:35" for day in (1, 2, 5, 6, 7)]
    assert [(one["at"][:16], one["exception"]) for one in plan["renewals"]] == [(day, None) for day in days]
    assert [row["exchange"] for row in plan["exchanges"]] == ["NASD", "NYSE", "AMEX", "KRX"]
    assert ["2026-07-01T00:00:00+00:00", "2026-07-01T06:30:00+00:00"] in plan["exchanges"][-1]["sessions"]


def test_the_picture_is_well_formed_and_complete(week: Plan) -> None:
    """The SVG has a bar for each session, need and token, a mark for each renewal, the buffer's tip, and no secret."""
    text = draw_plans([week, week])
    root = ET.fromstring(text)  # noqa: S314 - our own text
    fills = [bar.get("fill") for bar in root.iter(f"{SVG}rect")]  # after the bars come the legends, with one entry each
    assert fills.count("var(--session)") == 2 * (sum(len(row.sessions) for row in week.rows) + 1)
    assert fills.count("var(--need)") == 2 * (sum(len(row.needs) for row in week.rows) + 1)
    assert (fills.count("var(--token)"), fills.count("var(--buffer)"), fills.count("none")) == (4, 4, 10)
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * len(week.renewals)
    assert "06-30 16:35 to 07-01 16:30 KST" in text, "what the token serves"
    assert not any(secret in text + str(plan_as_json(week)) for secret in ("eyJ", APP_KEY, APP_SECRET))


def test_the_lines_for_a_terminal_show_sessions_over_needs(week: Plan, capfd: pytest.CaptureFixture[str]) -> None:
    """A need begins before its session and ends after it; the token's line shows its life, the renewals and now."""
    print_plan(week)
    lines = {line[:LABEL].strip(): line[LABEL:] for line in capfd.readouterr().out.splitlines()}
    assert re.fullmatch(r"(·+▒?█{5,6}▒){3}·+(▒?█{5,6}▒·+){2}", lines["KRX"]), lines["KRX"]
    assert re.fullmatch(r"━+│━+▲.*", lines["token"])
    assert (lines["token"].count("▲"), set(lines["token"])) == (5, {*"━│▲┄ "})


def test_the_command_prints_and_writes(command: Command, tmp_path: Path) -> None:
    """`plan` shows the anchor and the exchanges, and `plan --svg` writes a picture."""
    picture, shown = tmp_path / "plan.svg", command("plan", "--days", "3").out
    assert re.search(r"renewed at 1[67]:35 KST[^\0]*NASD", shown)  # later while Korea's entrance exam is ahead
    assert command("plan", "--svg", str(picture)) == Ran(0, "", "")
    assert ET.parse(picture).getroot().tag == f"{SVG}svg"  # noqa: S314 - our own file


def test_markets_with_one_key_are_one_key() -> None:
    """Markets of a key share its label and exchanges, and any exchange's name finds it; an untraded one gets advice."""
    os.environ |= {"KIS_MARKETS__HK__EXCHANGES": "SEHK", "KIS_MARKETS__JP__APP_KEY": "another-key"}
    os.environ["KIS_MARKETS__TRIAL__ENVIRONMENT"] = "paper"
    keys = {key.label: key.exchanges for key in Key.load(Settings.load())}
    assert keys == {"us+kr+hk": ["NASD", "NYSE", "AMEX", "KRX", "SEHK"], "jp": [], "trial (paper)": []}
    found = [[key.label for key in Key.trading(Settings.load(), name)] for name in ("NASD", "NAS", "XNAS", "nasdaq")]
    assert found == [["us+kr+hk"]] * 4
    assert "KIS_MARKETS__TSE__EXCHANGES=TKSE" in str(raised(lambda: Key.trading(Settings.load(), "TKSE")))
    del os.environ["KIS_APP_KEY"], os.environ["KIS_MARKETS__JP__APP_KEY"]
    assert "KIS_APP_KEY" in str(raised(lambda: Key.load(Settings.load())))


def test_a_state_says_all_that_is_known_at_one_moment(key: Key) -> None:
    """Without a token a renewal is due now; a new token covers the coming need until the next daily renewal."""
    state = key.state(DUE)
    assert (state.serves_until, state.covered, state.served) == (None, False, "us+kr: no valid token")
    assert (state.outlook.next and state.outlook.next.at) == DUE
    save(key)
    state = key.state(DUE)
    assert (state.serves_until, state.covered) == (DUE + timedelta(hours=24, minutes=-5), True)
    assert state.served == "us+kr: the token serves until 2024-11-20 17:10 KST"
    assert [state.lasts(DUE + timedelta(hours=hours)) for hours in (20, 24)] == [True, False]
    assert state.next_attempt == (state.outlook.next and state.outlook.next.at) is not None


def test_planned_token_lives_until_its_successor_comes_or_its_day_ends(key: Key) -> None:
    """In the plan's picture, no token is drawn past the next renewal, nor past 24 hours."""
    issues = [DUE + timedelta(hours=hours) for hours in (0, 20, 60)]
    plan = key.state(DUE).plan()._replace(renewals=[Renewal(at, "", None) for at in issues])
    assert [(end - begin) / timedelta(hours=1) for begin, end in plan.lives] == [20, 24, 24]
    assert [begin for begin, _ in plan.lives] == issues


def test_exchanges_that_are_closed_for_weeks_want_no_renewal(key: Key) -> None:
    """With a month of holidays in the settings nobody needs a token, not even to replace one that KIS has rejected."""
    month = [f"{DUE + timedelta(days=day):%Y-%m-%d}" for day in range(-3, 30)]
    os.environ |= {f"KIS_EXCHANGES__{code}__CLOSED": json.dumps(month) for code in key.exchanges}
    (closed,) = Key.load(Settings.load())
    for rejected, covered in ((None, False), (True, False), (False, True)):
        if rejected is not None:
            save(closed, rejected=rejected)
        state = closed.state(DUE)
        assert (state.outlook.needs, state.outlook.next, state.covered) == ([], None, covered)


def test_a_dead_token_is_replaced_at_once_only_with_a_session_within_a_day(key: Key) -> None:
    """Then KIS is asked as soon as it issues another; over a weekend the renewal rule decides, as without a token."""
    found = []
    for days, age in ((0, 8), (0, 1), (4, 8)):  # from DUE, and of the token in hours
        now = DUE + timedelta(days=days)
        save(key, age=age * HOUR, now=now, rejected=True)
        planned = key.state(now).outlook.next
        assert planned is not None
        assert key.state(now).plan().renewals[0] == planned
        found.append((round((planned.at - now) / timedelta(hours=1)), planned.reason.partition(" at ")[0]))
    rejected = "KIS has rejected the present token"
    assert found == [(0, rejected), (5, rejected), (23, "renews daily")]


@pytest.mark.usefixtures("nowhere")
def test_without_exchanges_a_renewal_comes_half_an_hour_before_each_expiry() -> None:
    """Where no exchange is configured, the plan has one renewal and says so; without a token it is due at once."""
    (key,) = Key.load(Settings.load())
    for age, ahead in ((None, timedelta(0)), (HOUR, timedelta(hours=22, minutes=30))):
        if age:
            save(key, age=age)
        plan = key.state(DUE).plan()
        assert [one.at for one in plan.renewals] == [DUE + ahead]
        assert (key.state(DUE).covered, plan.why.partition(":")[0]) == (bool(age), "No exchange is configured")


def test_a_plan_without_a_quiet_time_says_so() -> None:
    """If some exchange is open at any time of day, the plan and its picture say when the key renews instead."""
    os.environ |= {"KIS_MARKETS__KR__EXCHANGES": "NXT", "KIS_EXCHANGES__NASD__EXTENDED": "true"}
    plan = Key.load(Settings.load())[0].state(SUMMER).plan()
    assert plan.why.startswith("No time of the day is quiet on all days: ")
    assert (plan_as_json(plan)["quiet_kst"], "renewed before it expires" in draw_plans([plan])) == (None, True)


def test_a_state_knows_a_token_that_another_program_issued(key: Key) -> None:
    """Such a token is one that KIS returned although no request of ours is from its time, and that was not imported."""
    save(key, age=2 * HOUR)
    found = [key.state(DUE).foreign_issue]
    record(Attempt(DUE, Outcome.SAME, expires_at=DUE + timedelta(hours=22)))
    found.append(key.state(DUE).foreign_issue)
    record(Attempt(DUE - timedelta(hours=2), Outcome.NO_ANSWER))
    assert [*found, key.state(DUE).foreign_issue] == [None, DUE - timedelta(hours=2), None]


def test_warnings_name_what_a_refresh_would_cost_and_only_where_something_can_be_lost(key: Key) -> None:
    """If a token serves, they name the same one within six hours, a second issue in 24 h or a swap in a session."""
    inside = datetime(2024, 11, 19, 2, 0, tzinfo=UTC)  # 11:00 KST, KRX is open
    assert key.state(inside).warnings() == []
    save(key, age=7 * HOUR, now=inside, rejected=True)
    assert key.state(inside).warnings() == []
    for hours, kinds in ((1, ["same token"]), (12, ["another issue", "inside a session"]), (25, [])):
        save(key, age=hours * HOUR, now=inside)
        assert [one.kind for one in key.state(inside).warnings()] == kinds
