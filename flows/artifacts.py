"""The artifacts that people see in the UI: `tokens`, the status of every market, and `plan`, the days ahead.

Both are Markdown, because Prefect's own tables cut off the fifth column on a screen that is 1280 pixels wide.

If installations with different keys share one Prefect server, the first one uses these names; those of the others
end with a key's fingerprint, such as `tokens-1a2b3c4d`, so that none overwrites another's.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, cast

from prefect.artifacts import Artifact, create_markdown_artifact

from flows import runs, upcoming
from flows.alerts.causes import cause_of
from flows.alerts.incidents import NEAR
from flows.alerts.messages import LANGUAGES
from flows.runs import KST, borne, clock, harmless
from tokencore import CredentialsError, IssuanceLimitError, IssuerUnavailableError, Key, draw_plans

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prefect.client.schemas.objects import Artifact as ArtifactResponse

    from flows.runs import Done, View
    from tokencore import KeyState
    from tokencore.outlook import Plan

TOKENS, PLAN = "tokens", "plan"
REFUSED = (
    "KIS refused the credentials: no renewal is tried until a person corrects them, "
    "or runs refresh_token once KIS has restored them"
)
COLUMNS = ["market", "status", "until (KST)", "session covered", "next renewal or problem"]
ON_RECORD = (IssuanceLimitError, IssuerUnavailableError, CredentialsError)  # the issuance record says more about these
WORST_FIRST = ("UNREADABLE", "REJECTED", "NO_TOKEN", "EXPIRED", "EXPIRING_SOON", "VALID")
ABANDONED = timedelta(hours=3)  # after so long without a check, an installation's names are free for others
KEYS = "keys "  # precedes the fingerprints in the table's caption
SHORT = 8  # digits of a fingerprint: enough to distinguish a few keys


def update(keys: Sequence[Key], results: Mapping[Key, Done | Exception]) -> None:
    """Publish how a run leaves the keys, and schedule their next renewals."""
    views = runs.views(keys, results)
    publish(views)
    upcoming.update(views)


def publish(views: Sequence[View]) -> None:
    """Publish the tokens' status and the plan; a failure here does not change how a run ends."""
    with harmless("The table of tokens and the plan could not be published"):
        views = worst_first(views)
        now, names = datetime.now(UTC), [view.key.fingerprint[:SHORT] for view in views]
        suffix = _suffix(names, now)
        said = f"{caption(views)} (at {clock(now)}, {KEYS}{', '.join(names)})"
        create_markdown_artifact(table(views), TOKENS + suffix, said)
        said = f"The sessions ahead, the tokens' life and the renewals, at {clock(now)}."
        create_markdown_artifact(described(views), PLAN + suffix, said)


def met(key: Key, error: Exception, again_in: float | None) -> Exception:
    """Return `error`; publish it now if the run retries, or the table would say until its end that all is well."""
    if again_in and isinstance(error, IssuerUnavailableError):
        with harmless("The table of tokens could not be published"):
            publish(runs.views(Key.load(key.market.settings), {key: error}))
    return error


def worst_first(views: Sequence[View]) -> list[View]:
    """Sort the views: first those with a problem, then those without a token, then those where all is well."""
    return sorted(views, key=lambda view: (not _problem(view), WORST_FIRST.index(view.status)))


def caption(views: Sequence[View]) -> str:
    """Name the markets and the status of each key, with its problem or until when its token serves."""
    said = []
    for view in views:
        state, text = view.state, f": {_problem(view)}"
        if state and not _problem(view):
            text = f" until {clock(state.serves_until)}" if state.serves_until else f": {next_renewal(state)}"
        said.append(f"{', '.join(market.name for market in view.key.markets)} {view.status}{text}")
    return "; ".join(said)


def table(views: Sequence[View]) -> str:
    """Return, as Markdown, what a person has to do, and a table with a row for each market."""
    fixes = [f"**To do ({view.key.label}):** {fix}" for view in views if (fix := to_do(view))]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row for view in views for row in rows_of(view))]
    return "\n\n".join([*(fixes or ["**To do:** nothing."]), "\n".join(f"| {' | '.join(line)} |" for line in lines)])


def rows_of(view: View) -> list[list[str]]:
    """Return a row of `COLUMNS` for each of the key's markets, without secrets and without Markdown syntax."""
    state, problem = view.state, _problem(view)
    if state is None:
        return [[market.name, view.status, "none", "no", problem] for market in view.key.markets]
    until, planned = _short(state.serves_until) if state.serves_until else "none", state.outlook.next
    if planned and state.next_attempt:  # without the reason, which `plan` has: the old UI cuts off long cells
        problem = problem or ", ".join(filter(None, [_short(state.next_attempt), planned.exception]))
    return [
        [market.name, view.status, until, _covered(view, state, state.need_of(market)), problem or "none needed"]
        for market in view.key.markets
    ]


def to_do(view: View) -> str:
    """Return what a person has to do about the key; empty if there is nothing to do."""
    state, error = view.state, view.trouble
    if state and error and borne(state, error):
        return ""
    if error is None and _problem(view):
        is_dead = state and state.status == "REJECTED" and not state.failed  # else the record has the cause
        error = IssuanceLimitError("", retry_at=None, cause="same_token" if is_dead else "backoff")
    if error is None:
        return ""
    cause = f"cause.{cause_of(error, state).name}"
    texts, need = LANGUAGES["en"], state.outlook.unserved if state else None
    is_near = state and need and need[0] - state.now <= NEAR
    fix = texts[f"{cause}.fix"]
    return texts.get(f"{cause}.urgent", fix) if is_near else fix


def next_renewal(state: KeyState) -> str:
    """Say when the key is renewed next and why then; after a failure, why it failed and when the next attempt is."""
    planned, tried = state.outlook.next, state.next_attempt
    if planned is None:
        return "no renewal is needed"
    if tried is None:
        return REFUSED
    if state.failed:
        at, why = state.failed
        return f"{why} at {clock(at)}; next attempt {clock(tried)}"
    return f"next renewal {clock(tried)}, {planned.exception or planned.reason}"


def described(views: Sequence[View]) -> str:
    """Return the plans as Markdown: the picture, inline so that it needs no other server, and a table for each key."""
    plans: dict[Key, Plan] = {}
    for view in views:
        with harmless(f"{view.key.label} has no plan"):  # for example if the keyring with its secret is locked
            plans |= {view.key: view.state.plan()} if view.state else {}
    picture = base64.b64encode(draw_plans(list(plans.values())).encode()).decode()
    parts = [f"![Sessions, needs, token life and renewals of the coming days](data:image/svg+xml;base64,{picture})"]
    for key, plan in plans.items():
        parts += [f"## {key.label}, key {key.fingerprint[:SHORT]}", plan.why]
        if plan.renewals:
            lines = [f"| {clock(one.at)} | {one.reason} | {one.exception or 'none'} |" for one in plan.renewals]
            parts.append("\n".join(["| next renewal | why | exception |", "|---|---|---|", *lines]))
        else:
            parts.append(f"{REFUSED}." if plan.refused else "No renewal is needed in these days.")
    return "\n\n".join(parts)


def _problem(view: View) -> str:
    """Say what keeps the key from being renewed; empty if nothing does."""
    state, trouble = view.state, view.trouble
    if trouble and not isinstance(trouble, ON_RECORD):
        return _first_sentence(trouble)
    planned, tried = (state.outlook.next, state.next_attempt) if state else (None, None)
    if state is None or planned is None:
        return ""
    if isinstance(trouble, CredentialsError) and tried:  # it comes from a quote call
        return _first_sentence(trouble)
    if state.failed or tried is None:
        return next_renewal(state).partition(": no renewal")[0]
    if isinstance(trouble, IssuanceLimitError) and planned.at <= state.now:  # KIS was not asked: no record of it
        return f"{_first_sentence(trouble)}; next attempt {clock(tried)}"
    return f"KIS rejects the token; next attempt {clock(tried)}" if state.status == "REJECTED" else ""


def _covered(view: View, state: KeyState, need: tuple[datetime, datetime] | None) -> str:
    if need is None:
        return "no session ahead"
    if state.lasts(need[1]):
        return f"yes, to {_short(need[1])}"
    planned = state.outlook.next
    is_tried = state.next_attempt is not None and not isinstance(view.trouble, CredentialsError)
    in_time = planned and is_tried and state.now < planned.at <= need[0]
    return ("by next renewal, to " if in_time else "no, needed to ") + _short(need[1])


def _suffix(names: Sequence[str], now: datetime) -> str:
    """Return what ends the artifacts' names: nothing, or a key's fingerprint if another installation has the names."""
    there = cast("ArtifactResponse | None", Artifact.get(TOKENS))
    if there is None or there.updated is None or now - there.updated > ABANDONED:
        return ""
    _, named, theirs = (there.description or "").rpartition(KEYS)  # version 0.1 named no keys
    return f"-{min(names)}" if named and not any(name in theirs for name in names) else ""


def _short(at: datetime) -> str:
    return f"{at.astimezone(KST):%m-%d %H:%M}"


def _first_sentence(error: Exception) -> str:
    """Return the error's first sentence on one line, without the characters of Markdown lists, headings and tables."""
    text = str(error).partition(". ")[0]
    return " ".join(text.split()).lstrip("-*+#> ").replace("|", "/").replace("`", "'")
