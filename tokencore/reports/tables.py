"""Statuses, plans and issuance records as text for people: aligned, coloured on a terminal, times in KST and local.

Where a token's end is shown, it is the time until which it serves: KIS_BUFFER before it expires.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import pairwise
from typing import TYPE_CHECKING

from tokencore.attempts import GRANTED, Outcome, failure
from tokencore.errors import ConfigurationError
from tokencore.redaction import clean
from tokencore.reports import terminal
from tokencore.reports.terminal import paint
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tokencore.attempts import Attempt
    from tokencore.keys import Decision
    from tokencore.kis.gateway import Evidence
    from tokencore.outlook import Plan
    from tokencore.reports.status import MarketStatus, Seen

COLOURS = {"VALID": "green", "EXPIRING_SOON": "yellow"}  # everything else is red
ANSWERS = {True: "KIS accepts the token", False: "KIS rejects the token", None: "not known"}
LABEL = 7  # characters before a plan's line: an order code and spaces
REFUSED = "KIS refused the credentials: no renewal until you correct them, or run `tokencore refresh MARKET`"
PRIVATE = ("0600", "0400", None)  # modes that only the owner can use
BROAD = 112  # characters: from this width on every column fits; below it, the least important one is left out


def print_statuses(seen: Sequence[Seen], proofs: Mapping[str, Evidence], now: datetime) -> None:
    """Print one row for each market; below, what does not fit into a row, its file, and the quote call's answer."""
    rows, below = [_row(one.status, now) for one in seen], []
    broad = terminal.width() >= BROAD
    fits = slice(None) if broad else slice(-1)
    print(terminal.table(_columns(now)[fits], [row[fits] for row in rows]))
    for one, (name, *_, need) in zip(seen, rows, strict=True):
        below += [] if broad else [f"{name}: next need {need}"]
        below += [] if one.status["valid"] else [f"{name}: {why}" for why in _obstacle(one)]
        below.append(f"{name}: {_file(one)}")
    below += [f"{market}: {ANSWERS[proof.accepted]} ({proof.detail})" for market, proof in proofs.items()]
    print("\n".join(below))


def _obstacle(one: Seen) -> Iterator[str]:
    """Say why there is no new token: what forbids a request or, if nothing does, why the last attempt failed."""
    with suppress(ConfigurationError):  # the keyring with the secret is locked
        if forbidden := one.state.forbidden:
            yield str(forbidden)
            return
    if failed := failure(one.state.attempts):
        yield f"not renewed at {moment(failed[0], KST)} KST: {failed[1]}"


def info_text(status: MarketStatus) -> str:
    """Return a market's status in a few aligned lines."""
    now = datetime.now(UTC)
    found = dict(zip(_columns(now), _row(status, now), strict=True))
    found |= {"environment": status["environment"], "file": status["file"]}
    return "\n".join(f"{label:<19} {value}" for label, value in found.items())


def _columns(now: datetime) -> list[str]:
    return ["market", "status", "serves until (KST)", _local_head(now), "left", "next need"]


def _row(status: MarketStatus, now: datetime) -> list[str]:
    """Return a market's cells; a token serves until KIS_BUFFER before it expires."""
    expires_at, need, name = _parse(status["expires_at"]), status["next_need"], status["status"]
    until = expires_at - timedelta(seconds=status["buffer_seconds"]) if status["valid"] and expires_at else None
    left = duration((until - now).total_seconds()) if until else "-"
    ahead = "-"
    if need:
        covered = "covered" if status["covers_next_need"] else "not yet covered"
        ahead = f"{moment(_parse(need['start']), KST)} to {moment(_parse(need['end']), KST)[11:]} KST, {covered}"
    shown = paint(name, COLOURS.get(name, "red"))
    return [status["market"], shown, moment(until, KST), moment(until, None), left, ahead]


def print_history(found: Sequence[tuple[list[str], Attempt]]) -> None:
    """Print one row for each attempt, oldest first, with the markets of its key."""
    broad = terminal.width() >= BROAD
    rows = []
    for markets, one in found:
        colour = "green" if one.outcome in GRANTED else "yellow" if one.outcome is Outcome.SENT else "red"
        rows.append(
            [
                moment(one.at, KST, seconds=True),
                "+".join(markets),
                paint(one.outcome, colour),
                one.code or "-",
                *[moment(one.expires_at, KST)] * broad,
                # Records of earlier versions may hold control characters. In a fleet, machines are named.
                *(clean(text) for text in (one.by or one.host.partition(":")[0] or "-", one.reason)),
            ]
        )
    columns = ["when (KST)", "markets", "outcome", "code", *["token expires (KST)"] * broad, "by", "reason"]
    print(terminal.table(columns, rows) if found else "No attempt has been recorded.")


def describe_tick(decision: Decision) -> str:
    """Say in one line what was done, and when and why the next renewal comes, unless refused credentials forbid it."""
    planned = decision.state.outlook.next
    done = "renewed" if decision.renewed else "due, but not renewed" if decision.trouble else "nothing due"
    at = planned and (decision.state.next_attempt or planned.at)  # after a failure it is paused
    coming = f"next {moment(at, KST)} KST ({planned.reason})" if planned else "no renewal is needed in the weeks ahead"
    return f"{decision.state.key.label}: {done}; {REFUSED if planned and decision.state.refusal else coming}"


def print_plan(plan: Plan) -> None:
    """Print why and when the key's token is renewed, then the days ahead with a line for each exchange."""
    print(f"{paint(' + '.join(plan.markets), 'bold')}  {plan.why}")
    rows = []
    for renewal in plan.renewals:
        why = renewal.reason + (f" ({renewal.exception})" if renewal.exception else "")
        rows.append([moment(renewal.at, KST), moment(renewal.at, None), why])
    none = REFUSED if plan.refused else "No renewal is needed in these days."
    columns = ["next renewal (KST)", _local_head(plan.now), "why"]
    print(terminal.table(columns, rows) if rows else none)
    width = max(40, terminal.width() - LABEL - 1)
    print(paint(" " * LABEL + _ruler(plan, width), "dim"))
    for row in plan.rows:
        marks = paint("·", "dim"), paint("▒", "blue"), paint("█", "bold", "blue")
        layers = dict(zip(marks, ([(plan.start, plan.until)], row.needs, row.sessions), strict=True))
        print(f"{row.code:<{LABEL}}" + "".join(_cells(plan, width, layers)))
    print(f"{'token':<{LABEL}}" + "".join(_token_cells(plan, width)))
    certain = min((row.certain_until for row in plan.rows), default="")
    if certain and certain < plan.until.date().isoformat():
        print(f"Closures are known until {certain}; a later or suddenly declared one costs a check.")
    print(paint("█ session  ▒ need  ━ token  ┄ tokens planned  ▲ renewal  │ now\n", "dim"))


def moment(at: datetime | None, zone: tzinfo | None, *, seconds: bool = False) -> str:
    """Format a time in `zone` (None: this machine's), to the minute or the second; a dash if there is no time."""
    if at is None:
        return "-"
    there = at.astimezone(zone) if zone else _local(at)
    return there.strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """Format a time span as `23 h 05 min`, `4 min` or `12 s`."""
    minutes = int(seconds) // 60
    if minutes >= 60:  # noqa: PLR2004 - an hour
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{max(0, int(seconds))} s"


def _local_head(now: datetime) -> str:
    return f"local ({_local(now).tzname()})"


def _local(at: datetime) -> datetime:
    """Return the time in this machine's zone, or in UTC if TZ names an impossible one."""
    try:
        return at.astimezone()
    except ValueError:
        return at.astimezone(UTC)


def _file(one: Seen) -> str:
    """Describe the market's file: its mode, when it was cached, the token's length; or why it gives no token."""
    status = one.status
    if not status["cache_exists"]:
        elsewhere = ", but the store has the token" if one.state.token else ""  # which other machines share
        return f"no token file at {status['file']}{elsewhere}"
    readable = "" if status["permissions"] in PRIVATE else f" (others may use it: chmod 600 {status['file']})"
    cached = f", cached {moment(_parse(status['cached_at']), KST)} KST" if status["cached_at"] else ""
    length = f", {len(one.state.token.access_token)} characters" if one.state.token else ""
    why = {"NO_TOKEN": ", of another key or environment", "UNREADABLE": f", no token: {one.state.problem}"}
    return f"{status['file']}, mode {status['permissions']}{readable}{cached}{length}{why.get(status['status'], '')}"


def _cells(plan: Plan, width: int, layers: Mapping[str, Sequence[tuple[datetime, datetime]]]) -> list[str]:
    """Return a character for each of `width` equal steps of time: the mark of the last layer that covers its middle."""
    step = (plan.until - plan.start) / width
    middles = [plan.start + step * (n + 0.5) for n in range(width)]
    over = [
        [mark for mark, spans in layers.items() if any(begin <= at < end for begin, end in spans)] for at in middles
    ]
    return [marks[-1] if marks else " " for marks in over]


def _token_cells(plan: Plan, width: int) -> list[str]:
    token, step = plan.token, (plan.until - plan.start) / width
    expiry = token.expires_at - timedelta(seconds=plan.buffer) if token and token.rejected_at is None else plan.start
    life = token.issued_at or plan.start if token else plan.start
    cells = _cells(plan, width, {paint("┄", "green"): plan.lives, paint("━", "green"): [(life, expiry)]})
    marks = [(renewal.at, paint("▲", "red")) for renewal in plan.renewals]
    for at, mark in [*marks, (plan.now, paint("│", "bold"))]:
        cells[min(width - 1, max(0, int((at - plan.start) / step)))] = mark
    return cells


def _ruler(plan: Plan, width: int) -> str:
    """Return the names of the days, each above its own cells."""
    count = (plan.until - plan.start).days
    edges = [round(width * n / count) for n in range(count + 1)]
    names = [(plan.start + timedelta(days=n)).astimezone(KST).strftime("%a %d") for n in range(count)]
    return "".join(
        f"{name:{right - left}.{right - left}}" for name, (left, right) in zip(names, pairwise(edges), strict=True)
    )


def _parse(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None
