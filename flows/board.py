"""What people see in the UI at a glance: the artifacts `tokens`, a row per market, and `plan`, the days ahead."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.messages import lasted
from flows.runs import clock
from tokencore import Plan, draw_plans, make_plan, managers

if TYPE_CHECKING:
    from tokencore import TokenManager

TOKENS, PLAN = "tokens", "plan"


def publish(now: datetime) -> None:
    """Put the status of every market and the plan of every key, at `now` (aware), where the UI shows them."""
    create_table_artifact(
        key=TOKENS,
        table=[row(manager) for manager in managers()],
        description=f"The tokens at {clock(now)}, as `tokencore check` tells them.",
    )
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
            parts.append("No renewal is needed in these days.")
    return "\n\n".join(parts)


def row(manager: TokenManager) -> dict[str, Any]:
    """One market for people: times in KST, no path, nothing secret."""
    status = manager.get_token_status()
    need = status["next_need"]
    return {
        "market": status["market"],
        "environment": status["environment"],
        "status": status["status"],
        "expires": _clock(status["expires_at"]),
        "left": lasted(timedelta(seconds=status["remaining_seconds"])) if status["valid"] else "-",
        "next need": f"{_clock(need['start'])} to {_clock(need['end'])}" if need else "-",
        "covered": {True: "yes", False: "not yet", None: "-"}[status["covers_next_need"]],
        "issues in 24 h": status["issues_last_24h"],
        "no request before": _clock(status["cooldown_until"]),
    }


def _clock(iso: str | None) -> str:
    return clock(datetime.fromisoformat(iso).astimezone(UTC)) if iso else "-"
