"""Trouble with a key, reported while it lasts and once when it is over: in the log, and in Slack.

What happens here never changes how a run ends: nothing is raised, and a Slack that is down, slow or silent delays a
run by `WAIT` at most. What it did not accept is sent by the next run.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.utilities.urls import url_for

from flows.alerts import causes, incidents, messages, slack
from flows.runs import SAFE, clock, harmless, logger, safe_errors
from tokencore import Key, KeyState, Settings, TokenError, open_document, sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect import State

    from flows.alerts.causes import Cause
    from flows.alerts.incidents import Incident, Telling
    from flows.alerts.messages import Facts, Message, Notice, Texts
    from tokencore.stores.base import Document

    Who = Key | KeyState | str  # a key, or the exchange (or whatever else) of a run that came to no key

WAIT = 3.0  # seconds a run waits for Slack, and for others that speak to it
FAILED = "An alert could not be made"
CHECK_MINUTE = 5  # of each hour, when check_tokens runs: its cron in prefect.yaml


class Subject(NamedTuple):
    """Who is in trouble.

    Attributes:
        name: what its incidents are kept under.
        label: what people call it.
        states: the keys whose sessions are endangered, as far as they could be read.
        exchanges: what it trades, where no key could be read.
        reached: whether it is a key.

    """

    name: str
    label: str
    states: list[KeyState]
    exchanges: list[str]
    reached: bool

    @classmethod
    def of(cls, settings: Settings, who: Who, now: datetime) -> Subject:
        """A key by its state, or read now; an exchange by its code; of anything else all keys are at risk."""
        if isinstance(who, str):
            known = who in sessions.EXCHANGES
            return cls(who, who, [] if known else _all_states(settings, now), [who] if known else [], reached=False)
        key, state = (who.key, who) if isinstance(who, KeyState) else (who, _state(who, now))
        return cls(key.name, key.label, [state] if state else [], key.exchanges, reached=state is not None)

    @property
    def state(self) -> KeyState | None:
        """The key whose need is endangered first."""
        endangered = [one for one in self.states if one.outlook.unserved]
        return min(endangered, key=_unserved_from, default=next(iter(self.states), None))

    @property
    def need(self) -> datetime | None:
        """When the need that is endangered first starts, aware UTC."""
        return self.state.outlook.unserved[0] if self.state and self.state.outlook.unserved else None


class Post(NamedTuple):
    """A message to send: at which level it is logged, into which thread it goes, what is noted when Slack has it."""

    message: Message
    level: int
    sent: Callable[[slack.Thread | None], None]
    thread: slack.Thread | None = None
    broadcast: bool = False


def guarded(who: str, work: Callable[[Settings, datetime], State]) -> State:
    """The end of `work`; an error that came to no key becomes Failed with its sentence, and an alert about `who`."""
    now = datetime.now(UTC)
    settings: Settings | None = None
    try:
        with safe_errors():
            settings = Settings.load()
            return work(settings, now)
    except SAFE as error:
        if settings:
            report(settings, who, error, now)
        else:  # nobody knows where Slack is
            logger().error("%s: %s", who, error)
        return Failed(message=str(error))


def report(settings: Settings, who: Who, error: Exception, now: datetime, again_in: float | None = None) -> Exception:
    """Report trouble at `now` (aware), if there is news of it; the error for the run, which is `error` in most cases.

    After `again_in` seconds this very run tries again.
    """
    cause = causes.UNFORESEEN
    with harmless(FAILED):
        subject = Subject.of(settings, who, now)
        cause = _cause(subject, error)
        attempt = _attempt(subject, cause, error, now, again_in)
        happened = messages.sentence(str(error))
        _deliver(settings, lambda known: _trouble(settings, known, subject, cause, happened, attempt, now))
    return causes.as_met(error, cause)


def resolved(settings: Settings, who: KeyState | str, now: datetime) -> None:
    """Report the end of the trouble of a key, or of an exchange, if there was any; and a token that others issued."""
    with harmless(FAILED):
        foreign = who.foreign_issue if isinstance(who, KeyState) else None
        name = who.key.name if isinstance(who, KeyState) else who
        if not foreign and all(one.subject != name for one in incidents.parse(_document(settings).read())):
            return
        _deliver(settings, lambda known: _ended(settings, known, who, now))


def announce(
    settings: Settings, state: KeyState, kind: Notice, *, by: str, why: str, error: Exception | None = None
) -> None:
    """Report what became of a refresh that a person asked for, and which incidents it ended, as one message.

    `error` is why it failed. It is sent once; what Slack does not accept is in the log and in the issuance record.
    """
    with harmless(FAILED):
        subject = Subject.of(settings, state, state.now)

        def posts(known: list[Incident]) -> list[Post]:
            over = [] if kind == "failed" else _over(known, state, state.now)
            texts, facts = _texts(settings), _facts(settings, subject, state.now, at_risk=kind == "failed")
            happened = messages.sentence(str(error)) if error else ""
            message = messages.notice(texts, facts, kind, by=by, why=why, happened=happened, ended=over)
            thread = next((one.thread for one in over if one.thread), None)
            return [Post(message, logging.INFO, lambda _: _forget(known, over), thread, broadcast=True)]

        _deliver(settings, posts)


def _trouble(
    settings: Settings,
    known: list[Incident],
    subject: Subject,
    cause: Cause,
    happened: str,
    attempt: tuple[str, datetime | None],
    now: datetime,
) -> list[Post]:
    """The message about trouble that lasts, or none."""
    harmful = cause is not causes.FOREIGN_TOKEN  # a foreign token serves like one of ours
    facts = _facts(settings, subject, now, at_risk=harmful)
    look_again = min(at for at in (attempt[1], _next_check(now)) if at)
    need = _first_need(subject, settings, now) if harmful else None
    incident, telling = incidents.met(known, subject.name, cause, need, now, look_again)
    if telling is None:
        return []
    message = messages.trouble(_texts(settings), facts, incident, telling, happened, attempt)
    level = logging.WARNING if telling.kind == "reminded" else logging.ERROR
    return [Post(message, level, _heard(incident, telling, now), incident.thread, broadcast=telling.page)]


def _ended(settings: Settings, known: list[Incident], who: KeyState | str, now: datetime) -> list[Post]:
    """The message about all that is over, and the one about a token that someone else issued."""
    subject = Subject.of(settings, who, now)
    over, posts = _over(known, who, now), []
    if over:
        message = messages.solved(_texts(settings), _facts(settings, subject, now, at_risk=False), over)
        thread = next((one.thread for one in over if one.thread), None)
        posts.append(Post(message, logging.INFO, lambda _: _forget(known, over), thread))
    if isinstance(who, KeyState) and (issued_at := who.foreign_issue):
        happened = _texts(settings)("said.foreign", at=clock(issued_at))
        attempt = _attempt(subject, causes.FOREIGN_TOKEN, None, now, None)
        posts += _trouble(settings, known, subject, causes.FOREIGN_TOKEN, happened, attempt, now)
    return posts


def _over(known: list[Incident], who: KeyState | str, now: datetime) -> list[Incident]:
    if isinstance(who, str):
        return incidents.over(known, who, now, foreign=False, lasting=False)
    return incidents.over(known, who.key.name, now, foreign=who.foreign_issue is not None, lasting=who.refused)


def _deliver(settings: Settings, posts: Callable[[list[Incident]], list[Post]]) -> None:
    """Send what `posts` makes of the known incidents, and note what Slack accepted, holding the incidents meanwhile.

    In a thread: not even a name server or an endless answer delays a run for longer.
    """
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_work, settings, posts), daemon=True)
    thread.start()
    thread.join(WAIT)
    if thread.is_alive():
        logger().warning("Slack has not answered within %.0f s; the run goes on.", WAIT)


def _work(settings: Settings, posts: Callable[[list[Incident]], list[Post]]) -> None:
    begun = False
    with harmless(FAILED):
        try:
            with incidents.changing(_document(settings), WAIT) as known:
                begun = True
                _send(settings, posts(known))
        except incidents.Busy:
            logger().warning("Other runs are speaking to Slack; the next run reports what is still wrong.")
        except (OSError, TokenError):
            if not begun:  # nobody knows what people were told: better twice than never
                _send(settings, posts([]))


def _send(settings: Settings, posts: list[Post]) -> None:
    send = slack.sender(settings)
    for post in posts:
        logger().log(post.level, post.message.plain)
        receipt = send(post.message, post.thread, broadcast=post.broadcast) if send else slack.Receipt()
        if receipt.refusal:
            logger().warning("Slack did not accept the message (%s): %s.", receipt.refusal, receipt.fix)
        else:
            post.sent(receipt.thread)


def _heard(incident: Incident, telling: Telling, now: datetime) -> Callable[[slack.Thread | None], None]:
    return lambda thread: incident.heard(telling, now, thread)


def _forget(known: list[Incident], over: list[Incident]) -> None:
    known[:] = [one for one in known if one not in over]


def _cause(subject: Subject, error: Exception) -> Cause:
    state = subject.state if subject.reached else None
    if state is None:
        return causes.cause_of(error, [])
    return causes.cause_of(error, state.attempts, state.token, state.key.market.settings.issue_interval)


def _attempt(
    subject: Subject, cause: Cause, error: Exception | None, now: datetime, again_in: float | None
) -> tuple[str, datetime | None]:
    """What is tried next by itself: the key of its text, and when; None where a person has to act first."""
    if cause in causes.NEEDS_PERSON:
        return "next.person", None
    retry_at = getattr(error, "retry_at", None) or now
    if again_in and cause in (causes.DOWN, causes.RESTRICTED):
        return "next.run", max(now + timedelta(seconds=again_in), retry_at)
    planned = subject.state.next_attempt if subject.reached and subject.state else None
    return ("next.planned", planned) if planned else ("next.check", _next_check(max(now, retry_at)))


def _facts(settings: Settings, subject: Subject, now: datetime, *, at_risk: bool) -> Facts:
    state = subject.state
    until = state.serves_until if state else None
    codes = state.key.exchanges if state and state.outlook.unserved else subject.exchanges
    risks = messages.risks(codes, until, now, settings.overrides) if at_risk else []
    run = flow_run.name or "", url_for("flow-run", flow_run.id) if flow_run.id else None
    return messages.Facts(subject.label, now, until, subject.reached, risks, run, settings.slack_mention)


def _first_need(subject: Subject, settings: Settings, now: datetime) -> datetime | None:
    """When the need that is endangered first starts; of an exchange whose keys were not reached, its next one."""
    if subject.state or not subject.exchanges:
        return subject.need
    soon = now + timedelta(days=messages.DAYS_AHEAD)
    needs = sessions.needs(subject.exchanges, now, soon, settings.overrides)
    return next((start for start, _ in needs if start > now), None)


def _texts(settings: Settings) -> Texts:
    return messages.LANGUAGES[settings.slack_language]


def _document(settings: Settings) -> Document:
    return open_document(settings.token_dir, "incidents")


def _state(key: Key, now: datetime) -> KeyState | None:
    try:
        return key.state(now)
    except TokenError:  # its store cannot be used, which is what is reported
        return None


def _all_states(settings: Settings, now: datetime) -> list[KeyState]:
    try:
        return [state for key in Key.load(settings) if (state := _state(key, now))]
    except TokenError:  # there is no key, which is what is reported
        return []


def _unserved_from(state: KeyState) -> datetime:
    return state.outlook.unserved[0] if state.outlook.unserved else state.now


def _next_check(after: datetime) -> datetime:
    """The first hourly check after that moment."""
    at = after.replace(minute=CHECK_MINUTE, second=0, microsecond=0)
    return at if at > after else at + timedelta(hours=1)
