"""Report trouble with a key while it lasts, and once when it is over, in the log and in Slack.

Nothing here changes how a run ends: no error is raised, and a Slack that is down, slow or silent delays a run by
`WAIT` at most. An alert that Slack did not accept is reported by the next run.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import platform
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.utilities.urls import url_for

from flows.alerts import causes, incidents, messages, slack
from flows.runs import SAFE, borne, clock, harmless, identity, logger, safe_errors
from tokencore import Key, KeyState, Settings, TokenError, open_document, sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect import State

    from flows.alerts.causes import Cause
    from flows.alerts.incidents import Incident
    from flows.alerts.messages import Facts, Message, Notice, Texts

    NextAttempt = tuple[str, datetime | None]  # the key of its text, and its time; None if a person has to act first
    Who = Key | KeyState | str  # a key, or the exchange (or another name) of a run that reached no key

ALL_KEYS = "check_tokens"  # the subject of an incident of a check that reached no key
SETTINGS = f"settings on {platform.node()}"  # that of settings that no run here can use; a run that can ends it
WAIT = 3.0  # seconds that a run waits until Slack has a message
QUEUE = 2.0  # of them, for other runs that are sending: Slack is not blamed for these
FAILED = "An alert could not be made"
CHECK_MINUTE = 5  # the minute of each hour at which check_tokens runs, as its cron in prefect.yaml says


class Subject(NamedTuple):
    """Who is in trouble, and at which time."""

    settings: Settings  # where messages go, and in which language
    now: datetime  # aware
    name: str  # identifies its incidents
    place: str  # identifies those of a key that its market had before; see `_names`
    label: str  # its name for people
    state: KeyState | None  # the key whose session is endangered first; None if none could be read
    exchanges: list[str]  # the exchanges concerned
    reached: bool  # whether it is a key whose token was read

    @classmethod
    def of(cls, settings: Settings, who: Who, now: datetime) -> Subject:
        """Describe a key by its state, or read now, or an exchange; under any other name, all keys are at risk."""
        if isinstance(who, Key | KeyState):
            key, state = (who, _first_endangered([who], now)) if isinstance(who, Key) else (who.key, who)
            return cls(settings, now, *_names(key), key.label, state, key.exchanges, reached=state is not None)
        if who in sessions.EXCHANGES:
            return cls(settings, now, who, "", who, None, [who], reached=False)
        keys = []
        with contextlib.suppress(TokenError):  # that there is no key is what is being reported
            keys = Key.load(settings)
        return cls(settings, now, who, "", who, _first_endangered(keys, now), [], reached=False)

    @property
    def texts(self) -> Texts:
        """The texts in the reader's language."""
        return messages.LANGUAGES[self.settings.slack_language]

    @property
    def need(self) -> datetime | None:
        """When the first endangered need starts, or the exchange's next need if none of its keys was reached."""
        if self.state:
            return self.state.outlook.unserved[0] if self.state.outlook.unserved else None
        soon = self.now + timedelta(days=messages.DAYS_AHEAD)
        needs = sessions.needs(self.exchanges, self.now, soon, self.settings.overrides)
        return next((start for start, _ in needs if start > self.now), None)

    def facts(self, *, at_risk: bool) -> Facts:
        """Return the facts for a message, with the sessions if they are at risk."""
        state = self.state
        until = state.serves_until if state else None
        codes = state.key.exchanges if state and state.outlook.unserved else self.exchanges
        risks = messages.risks(codes, until, self.now, self.settings.overrides) if at_risk else []
        run = flow_run.name or "", url_for("flow-run", flow_run.id) if flow_run.id else None
        mention = self.settings.slack_mention
        return messages.Facts(self.texts, self.label, self.now, until, self.reached, risks, run, mention)

    def diagnosis(self, error: Exception) -> tuple[Cause, str]:
        """Return why it is in trouble, and what happened, in the reader's language."""
        state = self.state if self.reached else None
        cause, last = causes.cause_of(error, state), state.attempts[-1] if state and state.attempts else None
        answer = (last.outcome.value, last.code) if last and cause in causes.BY_ANSWER else None
        return cause, messages.happened(self.texts, cause, str(error), answer, getattr(error, "retry_at", None))

    def over(self, known: list[Incident]) -> list[Incident]:
        """Close its incidents, and return those whose end is to be reported."""
        state = self.state if self.reached else None
        foreign, refused = bool(state and state.foreign_issue), bool(state and state.refusal)
        return incidents.over(known, self.name, self.place, self.now, foreign=foreign, lasting=refused)

    def attempt(self, cause: Cause, error: Exception | None = None, again_in: float | None = None) -> NextAttempt:
        """Return the next automatic attempt; `again_in` is as in `report`."""
        retry_at = getattr(error, "retry_at", None) or self.now
        if cause in causes.NEEDS_PERSON:
            return "next.person", None
        if again_in and cause in (causes.DOWN, causes.RESTRICTED):
            return "next.run", max(self.now + timedelta(seconds=again_in), retry_at)
        planned = self.state.next_attempt if self.reached and self.state else None
        return ("next.planned", planned) if planned else ("next.check", _next_check(max(self.now, retry_at)))


def guarded(who: str, work: Callable[[Settings, datetime], State]) -> State:
    """Return the state of `work`; an error that belongs to no key becomes Failed with its sentence, and an alert."""
    now = datetime.now(UTC)
    settings: Settings | None = None
    try:
        with safe_errors():
            settings = Settings.load()
            return work(settings, now)
    except SAFE as error:
        if settings:
            report(settings, who, error, now)
        elif known := Settings.for_alerts():
            report(known, who, error, now, name=SETTINGS)
        else:  # nobody knows where Slack is
            logger().error("%s: %s", who, error)
        return Failed(message=str(error))


def report(
    settings: Settings, who: Who, error: Exception, now: datetime, again_in: float | None = None, *, name: str = ""
) -> Exception:
    """Report trouble at `now` (aware) if a message is due; return the error for the run, usually `error` itself.

    After `again_in` seconds, this run itself tries again. `name` identifies the incident if `who` does not.
    """
    cause = causes.UNFORESEEN
    with harmless(FAILED):
        subject = Subject.of(settings, who, now)
        subject = subject._replace(name=name or subject.name, place=name or subject.place)
        cause, happened = subject.diagnosis(error)
        attempt = subject.attempt(cause, error, again_in)
        _deliver(settings, lambda known: _trouble(known, subject, cause, happened, attempt))
    return causes.as_met(error, cause)


def resolved(settings: Settings, who: KeyState | str, now: datetime) -> None:
    """Report the end of trouble with a key or an exchange, if there was any, and a token that someone else issued."""
    with harmless(FAILED):
        foreign = who.foreign_issue if isinstance(who, KeyState) else None
        names = _names(who.key) if isinstance(who, KeyState) else (who, SETTINGS)
        reported = incidents.parse(open_document(settings, "incidents").read())
        if not foreign and not any(one.concerns(*names) for one in reported):
            return

        def work(known: list[Incident]) -> None:
            subject = Subject.of(settings, who, now)._replace(place=names[1])
            if over := subject.over(known):
                _end(known, subject, over, messages.solved(subject.facts(at_risk=False), over))
            if foreign:
                cause = causes.FOREIGN_TOKEN
                happened = messages.happened(subject.texts, cause, clock(foreign))
                _trouble(known, subject, cause, happened, subject.attempt(cause))

        _deliver(settings, work)


def announce(state: KeyState, kind: Notice, *, by: str, why: str, error: Exception | None = None) -> None:
    """Report the result of a refresh that a person asked for, and which incidents it ended, as one message.

    `error` is why it failed: an incident, unless the plan can bear it. If a message about the incident is due, it names
    the person and is the only one. What Slack does not accept is still in the log and in the issuance record.
    """
    with harmless(FAILED):
        subject = Subject.of(settings := state.key.market.settings, state, state.now)
        cause, happened = subject.diagnosis(error) if error else (causes.UNFORESEEN, "")
        person = by or subject.texts["notice.somebody"]
        happened = f"{happened} {subject.texts('notice.asked', person=person, at=clock(state.now))}".lstrip()
        harmful = error is not None and not borne(state, error)

        def work(known: list[Incident]) -> None:
            if harmful and _trouble(known, subject, cause, happened, subject.attempt(cause, error)):
                return
            over = [] if error else subject.over(known)
            message = messages.notice(subject.facts(at_risk=harmful), kind, happened, why, over)
            _end(known, subject, over, message, broadcast=True)

        _deliver(settings, work)


def _trouble(known: list[Incident], subject: Subject, cause: Cause, happened: str, attempt: NextAttempt) -> bool:
    """Send the message about trouble that goes on, and return whether one was due."""
    harmful = cause is not causes.FOREIGN_TOKEN  # a foreign token serves like one of ours
    now, following = subject.now, _next_check(subject.now)
    look_again = min(attempt[1] or following, following)
    incident, due = incidents.met(known, subject.name, cause, subject.need if harmful else None, now, look_again)
    incident.place = subject.place
    if due is None:
        return False
    message = messages.trouble(subject.facts(at_risk=harmful), incident, due, happened, attempt)
    level = logging.WARNING if due.kind == "reminded" else logging.ERROR
    receipt = _send(subject.settings, message, level, incident.thread, broadcast=due.page)
    if not receipt.refusal:
        incident.notified(due, now, receipt.thread)
    return True


def _end(
    known: list[Incident], subject: Subject, over: list[Incident], message: Message, *, broadcast: bool = False
) -> None:
    """Send the message about the end of these incidents, and forget them once Slack has accepted it."""
    thread = next((one.thread for one in over if one.thread), None)
    if not _send(subject.settings, message, logging.INFO, thread, broadcast=broadcast).refusal:
        known[:] = [one for one in known if one not in over]


def _send(
    settings: Settings, message: Message, level: int, thread: slack.Thread | None, *, broadcast: bool
) -> slack.Receipt:
    """Log a message and send it; if Slack does not accept it, log why."""
    logger().log(level, message.plain)
    receipt = slack.send(settings, message, thread, broadcast=broadcast)
    if receipt.refusal:
        logger().warning("Slack did not accept the message (%s): %s.", receipt.refusal, receipt.fix)
    return receipt


def _deliver(settings: Settings, work: Callable[[list[Incident]], object]) -> None:
    """Do the `work` that sends messages and notes what Slack accepted, with the incidents locked meanwhile.

    It runs in a thread, so that not even a slow name server or an endless answer delays a run for longer.
    """
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_hold, settings, work), daemon=True)
    thread.start()
    thread.join(WAIT)
    if thread.is_alive():
        logger().warning("Slack has not answered within %.0f s; the run goes on.", WAIT)


def _hold(settings: Settings, work: Callable[[list[Incident]], object]) -> None:
    known: list[Incident] | None = None
    with harmless(FAILED):
        try:
            document = open_document(settings, "incidents")
            with document.lock(wait=QUEUE) as held:
                if not held:
                    logger().warning("Other runs are sending alerts; the next run reports what is still wrong.")
                    return
                known = incidents.parse(document.read())
                before = incidents.dumped(known)
                try:
                    work(known)
                finally:  # what was sent before an error is not sent again
                    if (after := incidents.dumped(known)) != before:
                        document.write(after)
        except (OSError, TokenError):
            if known is None:  # nobody knows what was reported: better twice than never
                work([])


def _names(key: Key) -> tuple[str, str]:
    """Return what identifies the key's incidents: its first market, so that they end when the app key is corrected.

    In a fleet it is the key itself, as other machines may have other keys, or other markets, under the same name; so
    the market on this machine identifies those of the key that it had before.
    """
    market = key.market
    return (identity(key), f"{platform.node()}:{market.token_dir}:{market.name}") if market.store else (key.name, "")


def _first_endangered(keys: list[Key], now: datetime) -> KeyState | None:
    """Return the state of the readable key whose need is endangered first, or of any; None if none is readable."""
    states = []
    for key in keys:
        with contextlib.suppress(TokenError):  # that its store cannot be used is what is being reported
            states.append(key.state(now))
    return min(states, key=lambda one: one.outlook.unserved or (datetime.max.replace(tzinfo=UTC),), default=None)


def _next_check(after: datetime) -> datetime:
    """Return the time of the first hourly check after that moment."""
    at = after.replace(minute=CHECK_MINUTE, second=0, microsecond=0)
    return at if at > after else at + timedelta(hours=1)
