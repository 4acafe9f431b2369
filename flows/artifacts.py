"""What people see in the UI at a glance: the artifacts `tokens`, a row per market, and `plan`, the days ahead.

Where two installations with different keys share one Prefect server, the first one has these names; those of the
others end with their key's fingerprint, such as `tokens-1a2b3c4d`, so that neither overwrites the other's.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

from flows.runs import KST, clock, harmless
from tokencore import draw_plans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flows.runs import View
    from tokencore import KeyState

    Row = dict[str, str]

TOKENS, PLAN = "tokens", "plan"
REFUSED = (
    "KIS refused the credentials: no renewal is tried until a person corrects them, "
    "or runs refresh_token once KIS has restored them"
)
COMING = "next renewal or problem"  # the last column
WORST_FIRST = ("UNREADABLE", "REJECTED", "NO_TOKEN", "EXPIRED", "EXPIRING_SOON", "VALID")
ABANDONED = timedelta(hours=3)  # without an hourly check, an installation has left its names to others
KEYS = "keys "  # before their fingerprints in the table's caption
SHORT = 8  # digits of a fingerprint: enough to tell a few keys apart


def publish(views: Sequence[View]) -> None:
    """Publish how the tokens are and what lies ahead; what fails here changes no run's end."""
    with harmless("The table of tokens and the plan could not be published"):
        now, names = datetime.now(UTC), [view.key.fingerprint[:SHORT] for view in views]
        suffix = _suffix(names, now)
        rows = [row for view in views for row in rows_of(view)]
        said = f"{caption(rows)} ({clock(now)}, {KEYS}{', '.join(names)})"
        create_table_artifact(key=TOKENS + suffix, table=rows, description=said)
        create_markdown_artifact(
            key=PLAN + suffix,
            markdown=described([view.state for view in views if view.state]),
            description=f"The sessions ahead, the tokens' life and the renewals, at {clock(now)}.",
        )


def rows_of(view: View) -> list[Row]:
    """The key's markets for people, in five columns: nothing secret, no path, nothing that Markdown acts on."""
    key, state, problem = view
    if state is None:
        return [_row(market.name, "UNREADABLE", "none", "no", problem) for market in key.markets]
    until = _short(state.serves_until) if state.serves_until else "none"
    # Of the last column a screen shows two dozen letters: where all is well, they are the time.
    well = state.status == WORST_FIRST[-1]
    coming = problem or next_renewal(state, _short, *[""] * well)
    return [
        _row(market.name, state.status, until, _covered(state, state.need_of(market)), coming) for market in key.markets
    ]


def next_renewal(state: KeyState, time: Callable[[datetime], str] = clock, before: str = "next renewal ") -> str:
    """When the key is renewed next and why then; where a renewal has failed, why, and when the next attempt is."""
    planned, tried = state.outlook.next, state.next_attempt
    if planned is None:
        return "no renewal is needed"
    if tried is None:
        return REFUSED
    if state.failed:
        at, why = state.failed
        return f"{why} at {time(at)}; next attempt {time(tried)}"
    return f"{before}{time(tried)}, {planned.exception or planned.reason}"


def caption(rows: Sequence[Row]) -> str:
    """The markets by their status, the worst first, and with their problem where they have one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: (not _problem(row), WORST_FIRST.index(row["status"]))):
        alike.setdefault((row["status"], _problem(row)), []).append(row["market"])
    return "; ".join(f"{', '.join(names)} {status}{problem}" for (status, problem), names in alike.items())


def described(states: Sequence[KeyState]) -> str:
    """The plans as Markdown: the picture, inline so that no other server is needed, and a table for each key."""
    plans = [state.plan() for state in states]
    picture = base64.b64encode(draw_plans(plans).encode()).decode()
    parts = [f"![Sessions, needs, token life and renewals of the coming days](data:image/svg+xml;base64,{picture})"]
    for state, plan in zip(states, plans, strict=True):
        parts += [f"## {state.key.label}, key {state.key.fingerprint[:SHORT]}", plan.why]
        if plan.renewals:
            lines = [f"| {clock(one.at)} | {one.reason} | {one.exception or 'none'} |" for one in plan.renewals]
            parts.append("\n".join(["| next renewal | why | exception |", "|---|---|---|", *lines]))
        else:
            parts.append(f"{REFUSED}." if plan.refused else "No renewal is needed in these days.")
    return "\n\n".join(parts)


def _row(market: str, status: str, until: str, covered: str, coming: str) -> Row:
    return {"market": market, "status": status, "until": until, "session covered": covered, COMING: _plain(coming)}


def _covered(state: KeyState, need: tuple[datetime, datetime] | None) -> str:
    if need is None:
        return "no session ahead"
    if state.lasts(need[1]):
        return f"yes, until {_short(need[1])}"
    planned = state.outlook.next
    in_time = planned and state.now < planned.at <= need[0] and state.next_attempt
    return ("by the next renewal, until " if in_time else "no, needed until ") + _short(need[1])


def _problem(row: Row) -> str:
    if row[COMING] == _plain(REFUSED):
        return ": KIS refused the credentials"
    return "" if row["status"] == WORST_FIRST[-1] else f": {row[COMING]}"


def _suffix(names: Sequence[str], now: datetime) -> str:
    """Nothing for the first installation on this server; a key's fingerprint where another one publishes too."""
    wanted = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[TOKENS]))
    with get_client(sync_client=True) as client:
        there = next(iter(client.read_latest_artifacts(artifact_filter=wanted)), None)
    if there is None or there.updated is None or now - there.updated > ABANDONED:
        return ""
    _, named, theirs = (there.description or "").rpartition(KEYS)  # version 0.1 named no keys
    return f"-{min(names)}" if named and not any(name in theirs for name in names) else ""


def _short(at: datetime) -> str:
    return f"{at.astimezone(KST):%m-%d %H:%M} KST"


def _plain(text: str) -> str:
    """On one line, without the signs by which Markdown makes lists, headings and tables."""
    return " ".join(text.split()).lstrip("-*+#> ").replace("|", "/").replace("`", "'")
