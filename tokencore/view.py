"""How statuses and records look to people: aligned, coloured on a terminal, times in KST and local."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tokencore.record import GRANTED, Outcome
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokencore.status import TokenStatus
    from tokencore.rule import Decision

_COLOURS = {"VALID": "green", "EXPIRING_SOON": "yellow"}  # everything else is red
_WIDE = 140  # characters, where no terminal says how wide it is: a pipe must not wrap a table


def print_statuses(
    statuses: Sequence[TokenStatus], proofs: Mapping[str, tuple[bool | None, str]], now: datetime
) -> None:
    """One row a market, the sentences that explain a trouble below."""
    table = _table(
        "market",
        "status",
        "valid until (KST)",
        f"local ({now.astimezone().tzname()})",
        "left",
        "next need",
    )
    for status in statuses:
        colour = _COLOURS.get(status["status"], "red")
        expires = _parse(status["expires_at"])
        table.add_row(
            status["market"],
            f"[{colour}]{status['status']}[/]",
            moment(expires, KST),
            moment(expires, None),
            duration(status["remaining_seconds"]) if status["valid"] else "-",
            _need(status),
        )
    console = _console()
    console.print(table)
    for market, (accepted, told) in proofs.items():
        word = {True: "KIS accepts the token", False: "KIS rejects the token", None: "not known"}[accepted]
        console.print(f"{market}: {word} ({told})", markup=False, highlight=False)


def print_history(lines: Sequence[Mapping[str, Any]]) -> None:
    """One row an attempt, oldest first."""
    table = _table("when (KST)", "markets", "outcome", "code", "token expires (KST)", "reason")
    for line in lines:
        good = line["outcome"] in GRANTED
        colour = "green" if good else "yellow" if line["outcome"] == Outcome.SENT else "red"
        table.add_row(
            moment(line["at"], KST, seconds=True),
            "+".join(line["markets"]),
            f"[{colour}]{line['outcome']}[/]",
            line["code"] or "-",
            moment(line["expires_at"], KST),
            line["reason"].replace("[", r"\["),
        )
    _console().print(table if lines else "No attempt has been recorded.")


def print_decision(markets: str, decision: Decision) -> None:
    """One line: renewed or not, and the next renewal with its reason."""
    ahead = decision.outlook
    done = "renewed" if decision.renewed else "due, but not renewed" if decision.trouble else "nothing due"
    coming = f"next {moment(ahead.next.at, KST)} KST ({ahead.next.reason})" if ahead.next else "no need ahead"
    print(f"{markets}: {done}; {coming}")


def info_text(status: TokenStatus) -> str:
    """A market's status in a few aligned lines."""
    expires = _parse(status["expires_at"])
    rows = {
        "market": f"{status['market']} ({status['environment']})",
        "status": status["status"],
        "valid until": f"{moment(expires, KST)} KST, {moment(expires, None)} local",
        "left": duration(status["remaining_seconds"]),
        "next need": _need(status),
        "file": status["file"],
    }
    return "\n".join(f"{label:<12} {value}" for label, value in rows.items())


def moment(at: datetime | None, zone: Any, *, seconds: bool = False) -> str:  # noqa: ANN401 - a tzinfo, or None for local
    """A time in `zone` (None: this machine's), to the minute; a dash where there is none."""
    if at is None:
        return "-"
    return at.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """A time span as `23 h 05 min`, `4 min` or `12 s`."""
    minutes = int(seconds) // 60
    if minutes >= 60:  # noqa: PLR2004 - an hour
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def _need(status: TokenStatus) -> str:
    need = status["next_need"]
    if need is None:
        return "-"
    start, end = _parse(need["start"]), _parse(need["end"])
    covered = "covered" if status["covers_next_need"] else "not yet covered"
    return f"{moment(start, KST)} to {moment(end, KST)[11:]} KST, {covered}"


def _parse(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console
