"""What people see in the UI at a glance: the artifacts `tokens`, a row per market, and `plan`, the days ahead."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.runs import KST, clock, harmless
from tokencore import Plan, draw_plans, look, make_plan, managers, next_attempt

if TYPE_CHECKING:
    from datetime import tzinfo

    from tokencore import Outlook, TokenManager

TOKENS, PLAN = "tokens", "plan"
REFUSED = (
    "KIS refused the credentials: no renewal is tried until a person corrects them, "
    "or runs refresh_token once KIS has restored them"
)


def update(now: datetime) -> None:
    """Publish how the tokens are at `now` (aware); what fails here changes no run's end."""
    with harmless("The table of tokens and the plan could not be published"):
        publish(now)


def publish(now: datetime) -> None:
    """Put the status of every market and the plan of every key, at `now` (aware), where the UI shows them."""
    rows = [row(manager, now) for manager in managers()]
    told = ", ".join(f"{one['market']} {one['status']}" for one in rows)
    create_table_artifact(key=TOKENS, table=rows, description=f"{told}, at {clock(now)}.")
    plans = [make_plan(manager, now) for manager in managers(one_per_key=True)]
    create_markdown_artifact(
        key=PLAN,
        markdown=described(plans),
        description=f"The sessions ahead, the tokens' life and the renewals, at {clock(now)}.",
    )


def described(plans: list[Plan]) -> str:
    """The plans as Markdown: the picture, inline so that no other server is needed, and a table for each key."""
    picture = base64.b64encode(draw_plans(plans).encode()).decode()
    parts = [f"![Sessions, needs, token life and renewals of the coming days](data:image/svg+xml;base64,{picture})"]
    for plan in plans:
        parts += [f"## {' + '.join(plan.markets)}", plan.why]
        if plan.renewals:
            lines = [f"| {clock(one.at)} | {one.reason} | {one.exception or '-'} |" for one in plan.renewals]
            parts.append("\n".join(["| next renewal | why | exception |", "|---|---|---|", *lines]))
        else:
            parts.append(f"{REFUSED}." if plan.refused else "No renewal is needed in these days.")
    return "\n\n".join(parts)


def row(manager: TokenManager, now: datetime) -> dict[str, Any]:
    """One market for people at `now` (aware), what presses first: nothing secret, no path."""
    status = manager.get_token_status()
    need, tried = status["next_need"], next_attempt(manager, now)
    local = now.astimezone().tzname() or "local"
    return {
        "market": status["market"],
        "status": status["status"],
        "valid until (KST)": _short(status["expires_at"]),
        f"valid until ({local})": _short(status["expires_at"], None),
        "need covered": {True: "yes", False: "not yet", None: "-"}[status["covers_next_need"]],
        "next need (KST)": f"{_short(need['start'])} to {_short(need['end']).split()[1]}" if need else "-",
        "next renewal (KST)": _short(tried.isoformat()) if tried else "-",
        "issued in 24 h": status["issues_last_24h"],
        "cool-down": f"until {_short(status['cooldown_until'])}" if status["cooldown_until"] else "none",
        "key": f"{'+'.join(manager.sharing())} ({status['environment']})",
        "why then": _why(look(manager, now), tried),
    }


def _why(ahead: Outlook, tried: datetime | None) -> str:
    if ahead.next is None:
        return "every need ahead is covered"
    return (ahead.next.exception or ahead.next.reason) if tried else REFUSED


def _short(iso: str | None, zone: tzinfo | None = KST) -> str:
    """A time of these days in KST, or in the zone of this machine where that is None."""
    return datetime.fromisoformat(iso).astimezone(zone).strftime("%m-%d %H:%M") if iso else "-"
