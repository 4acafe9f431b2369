"""Trouble with a key, told once: in the log, and in Slack where its settings are given.

What happens here never changes what becomes of a run: nothing is raised, and a Slack that is down, slow
or silent costs a run `PATIENCE` at most. What it did not take is told by the next run.
"""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows import causes, slack
from flows.incidents import Incidents
from flows.messages import Message, lasted, next_check, sentence, sessions_at_risk, still_works
from flows.runs import clock, harmless, logger
from tokencore import Settings, TokenManager, next_attempt, sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from flows.causes import Cause
    from flows.incidents import Incident

Notice = Literal["renewed", "forced", "same", "declined", "failed"]
NOTICES: dict[Notice, str] = {
    "renewed": "refreshed by hand",
    "forced": "refreshed by hand, with force",
    "same": "a refresh by hand brought the same token",
    "declined": "a refresh by hand was declined",
    "failed": "a refresh by hand failed",
}
FAILED = "An alert could not be made"
PATIENCE = 5.0  # seconds a run waits for Slack


class Subject(NamedTuple):
    """Who is in trouble: a key, or the exchange of a run that came to no key.

    Attributes:
        name: what its incidents are kept under.
        label: what people call it.
        exchanges: what it trades.
        reach: until when its present token serves, aware UTC; None without one.

    """

    name: str
    label: str
    exchanges: list[str]
    reach: datetime | None

    @classmethod
    def of(cls, who: TokenManager | str, now: datetime) -> Subject:
        """A key by one of its managers, or an exchange (or all markets) by name."""
        if isinstance(who, str):
            return cls(who, who, [who] if who in sessions.EXCHANGES else [], None)
        token, buffer = who.newest_token(), who.market.buffer
        serves = token is not None and token.serves(now, buffer)
        paper = " (paper)" if who.market.environment == "paper" else ""
        return cls(
            who.sharing()[0],
            "+".join(who.sharing()) + paper,
            who.key_exchanges(),
            token.expires_at - timedelta(seconds=buffer) if token and serves else None,
        )


def report(who: TokenManager | str, error: Exception, now: datetime, again_in: float | None = None) -> None:
    """Tell of trouble at `now` (aware), unless it is known; after `again_in` seconds this very run tries again."""
    with harmless(FAILED):
        subject = Subject.of(who, now)
        cause = causes.cause_of(error, [] if isinstance(who, str) else who.history())
        incidents = _incidents()
        if _is_news(incidents, subject, cause, now):
            message = _opening(subject, cause, error, now, _attempt(who, cause, error, now, again_in))
            logger().error(message.plain)
            _tell([(message, partial(incidents.opening_told, subject.name, cause.name))])


def all_clear(who: TokenManager | str, now: datetime) -> None:
    """Tell that all trouble of a key, or of an exchange, is over, if there was any."""
    with harmless(FAILED):
        incidents = _incidents()
        subject = Subject.of(who, now)
        over = incidents.close(subject.name, now)
        messages = [(_end(subject, one, now), partial(incidents.end_told, one)) for one in over]
        for message, _ in messages:
            logger().info(message.plain)
        _tell(messages)


def announce(manager: TokenManager, what: Notice, *, who: str, why: str, now: datetime) -> None:
    """Tell that a person had a token refreshed at `now` (aware): what became of it, who asked, and why.

    It is told once, as it happens; what Slack does not take is in the log and in the issuance record.
    """
    with harmless(FAILED):
        subject = Subject.of(manager, now)
        message = Message(
            icon=":arrows_counterclockwise:",
            headline=f"{subject.label}: {NOTICES[what]}",
            happened=f"{who or 'Somebody'} asked for it, {clock(now)}.",
            answers=[("Why", why or "no reason given"), ("Works now", still_works(subject.reach))],
            run=_run(),
        )
        logger().info(message.plain)
        _tell([(message, lambda: None)])


def _is_news(incidents: Incidents, subject: Subject, cause: Cause, now: datetime) -> bool:
    try:
        return incidents.open(subject.name, cause.name, now)
    except OSError:  # nobody knows what was told: better twice than never
        return True


def _incidents() -> Incidents:
    return Incidents(Settings.load().token_dir.expanduser().absolute())


def _attempt(who: TokenManager | str, cause: Cause, error: Exception, now: datetime, again_in: float | None) -> str:
    """When something will be tried next, by itself."""
    if cause in (causes.CREDENTIALS, causes.SETTINGS):
        return "none by itself: a person has to act first"
    retry_at: datetime = getattr(error, "retry_at", None) or now
    if again_in and cause is causes.DOWN:
        at = max(now + timedelta(seconds=again_in), retry_at)
        return f"about {clock(at)}, then every few minutes, then with each hourly check"
    planned = None if isinstance(who, str) else next_attempt(who, now)
    return f"about {clock(planned)}" if planned else f"{clock(next_check(max(now, retry_at)))}, the hourly check"


def _opening(subject: Subject, cause: Cause, error: Exception, now: datetime, attempt: str) -> Message:
    serves = still_works(subject.reach) if subject.exchanges else "cached tokens, until they expire"
    return Message(
        icon=":rotating_light:",
        headline=f"{subject.label}: {cause.title}",
        happened=sentence(str(error)),
        answers=[
            ("Still works", serves),
            ("Sessions at risk", sessions_at_risk(subject.exchanges, subject.reach, now)),
            ("Next attempt", attempt),
            ("To do", cause.cure),
        ],
        run=_run(),
    )


def _end(subject: Subject, incident: Incident, now: datetime) -> Message:
    end = incident.closed_at or now
    return Message(
        icon=":white_check_mark:",
        headline=f"{subject.label}: solved: {causes.BY_NAME.get(incident.cause, causes.UNFORESEEN).title}",
        happened=f"It lasted {lasted(end - incident.opened_at)}, from {clock(incident.opened_at)}.",
        answers=[
            ("Works now", still_works(subject.reach)),
        ],
        run=_run(),
    )


def _tell(messages: Sequence[tuple[Message, Callable[[], None]]]) -> None:
    """Send, and note what was taken, in a thread: not even a name server or an endless answer holds a run up longer."""
    send, log = slack.sender(Settings.load()), logger()

    def deliver() -> None:
        for message, note in messages:
            if send and (why := send(message)):
                log.warning("Slack did not take the message (%s); the next run tells it.", why)
                continue
            with contextlib.suppress(OSError):  # then it is told once more
                note()

    if messages:
        courier = threading.Thread(target=deliver, daemon=True)
        courier.start()
        courier.join(PATIENCE)
        if courier.is_alive():
            log.warning("Slack has not answered within %.0f s; the run goes on.", PATIENCE)


def _run() -> tuple[str, str | None]:
    """The name and the page of this run, where there is one."""
    return flow_run.name or "", url_for("flow-run", flow_run.id) if flow_run.id else None
