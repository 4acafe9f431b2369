"""Trouble with a key, told as long as it lasts and once when it is over: in the log, and in Slack.

What happens here never changes what becomes of a run: nothing is raised, and a Slack that is down, slow
or silent costs a run the courier's `PATIENCE` at most. What it did not take is told by the next run.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows import causes
from flows.courier import Post, deliver, incidents_here
from flows.incidents import new
from flows.letters import Case, Pen
from flows.life import next_telling
from flows.messages import next_check, next_need, sentence, still_works
from flows.runs import clock, harmless, logger
from flows.words import LANGUAGES
from tokencore import ConfigurationError, Settings, TokenManager, look, managers, next_attempt, sessions

if TYPE_CHECKING:
    from datetime import datetime

    from flows.causes import Cause
    from flows.incidents import Incident
    from flows.slack import Thread
    from flows.words import Words

Notice = Literal["renewed", "forced", "same", "failed"]
FAILED = "An alert could not be made"


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

    @property
    def served(self) -> str:
        """Whose token serves until when, for people."""
        return f"{self.label}: " + (f"the token serves until {clock(self.reach)}" if self.reach else "no valid token")


class _Attempt(NamedTuple):
    """What will be tried next by itself: the key of its text, and when; None where a person has to act first."""

    key: str
    at: datetime | None


class _Risk(NamedTuple):
    """What has no token: which exchanges, after what their present one serves, and when the next need starts."""

    exchanges: list[str]
    reach: datetime | None
    need: datetime | None


def report(who: TokenManager | str, error: Exception, now: datetime, again_in: float | None = None) -> None:
    """Tell of trouble at `now` (aware), if there is news of it; after `again_in` seconds this very run tries again."""
    with harmless(FAILED):
        cause, retry_at = _cause(who, error), getattr(error, "retry_at", None) or now
        attempt = _next(who, cause, now, retry_at, again_in)
        deliver([*_trouble(who, cause, sentence(str(error)), attempt, now), *_foreign(who, now)], now)


def all_clear(who: TokenManager | str, now: datetime) -> None:
    """Tell that the trouble of a key, or of an exchange, is over, if there was any; and what `foreign` tells."""
    with harmless(FAILED):
        subject, pen = Subject.of(who, now), _pen(now)
        lasting = _lasting(who, now)
        over = incidents_here().over(subject.name, now, but=lasting)
        works = _works(who, subject, pen.words)
        deliver([*(_end(pen, subject.label, works, one) for one in over), *_foreign(who, now)], now)


def foreign(who: TokenManager | str, now: datetime) -> None:
    """Tell that someone else issued the present token, where nothing failed but not all is clear."""
    with harmless(FAILED):
        deliver(_foreign(who, now), now)


def announce(manager: TokenManager, what: Notice, *, who: str, why: str, now: datetime) -> None:
    """Tell that a person had a token refreshed at `now` (aware): what became of it, who asked, and why.

    It is told once, as it happens; what Slack does not take is in the log and in the issuance record.
    """
    with harmless(FAILED):
        subject = Subject.of(manager, now)
        message = _pen(now).notice(what, subject.label, subject.reach, person=who, why=why)
        logger().info(message.plain)
        deliver([Post(message, lambda _: None)], now)


def _cause(who: TokenManager | str, error: Exception) -> Cause:
    if isinstance(who, str):
        return causes.cause_of(error, [])
    return causes.cause_of(error, who.history(), who.newest_token(), who.market.issue_interval)


def _foreign(who: TokenManager | str, now: datetime) -> list[Post]:
    """What is to be told of the present token, if someone else issued it."""
    issued_at = _issued_elsewhere(who)
    if issued_at is None:
        return []
    happened = _pen(now).words("said.foreign", at=clock(issued_at))
    return _trouble(who, causes.FOREIGN_TOKEN, happened, _next(who, causes.FOREIGN_TOKEN, now, now), now)


def _lasting(who: TokenManager | str, now: datetime) -> list[str]:
    """What is not over although a token serves: someone else's issue, and credentials that KIS refused."""
    lasting = [causes.FOREIGN_TOKEN.name] if _issued_elsewhere(who) else []
    if isinstance(who, TokenManager) and who.renewal_allowed_from(now) is None:
        lasting.append(causes.CREDENTIALS.name)
    return lasting


def _issued_elsewhere(who: TokenManager | str) -> datetime | None:
    """When someone else issued the present token, aware UTC; None where it is our own, or there is none."""
    if isinstance(who, str):
        return None
    token = who.newest_token()
    return token.issued_at if token and causes.is_foreign(token, who.history()) else None


def _next(
    who: TokenManager | str, cause: Cause, now: datetime, retry_at: datetime, again_in: float | None = None
) -> _Attempt:
    if cause in (causes.CREDENTIALS, causes.SETTINGS, causes.SILENT):
        return _Attempt("next.person", None)
    if again_in and cause is causes.DOWN:
        return _Attempt("next.run", max(now + timedelta(seconds=again_in), retry_at))
    planned = None if isinstance(who, str) else next_attempt(who, now)
    return _Attempt("next.planned", planned) if planned else _Attempt("next.check", next_check(max(now, retry_at)))


def _trouble(who: TokenManager | str, cause: Cause, happened: str, attempt: _Attempt, now: datetime) -> list[Post]:
    """What is to be told of trouble that lasts: one message, or none."""
    subject, incidents = Subject.of(who, now), incidents_here()
    # A foreign token serves like one of ours.
    risk = _Risk([], None, None) if cause is causes.FOREIGN_TOKEN else _at_risk(who, subject, now)
    look_again = min(at for at in (attempt.at, next_check(now)) if at)
    try:
        incident, telling = incidents.met(subject.name, cause, risk.need, now, look_again)
    except OSError:  # nobody knows what was told: better twice than never
        incident = new(subject.name, cause, risk.need, now)
        telling = next_telling(incident, cause, now, look_again)
    if telling is None:
        return []
    pen = _pen(now)
    works = _works(who, subject, pen.words)
    tried = pen.words(attempt.key, at=clock(attempt.at)) if attempt.at else pen.words("next.person")
    case = Case(subject.label, risk.exchanges, works, risk.reach, happened, tried)
    message = pen.trouble(case, incident, telling)
    logger().log(logging.WARNING if telling.kind == "reminded" else logging.ERROR, message.plain)

    def note(thread: Thread | None) -> None:
        incidents.heard(incident, telling, now, thread)

    return [Post(message, note, incident.thread, broadcast=telling.page)]


def _at_risk(who: TokenManager | str, subject: Subject, now: datetime) -> _Risk:
    """Of a key; of an exchange whatever the tokens; of all markets what the key endangers whose need is next."""
    if isinstance(who, str) and subject.exchanges:
        return _Risk(subject.exchanges, None, next_need(who, now))
    try:
        keys = managers(one_per_key=True) if isinstance(who, str) else [who]
    except ConfigurationError:  # that is what is told
        return _Risk([], None, None)
    ahead = [(unserved[0], key) for key in keys if (unserved := look(key, now).unserved)]
    if not ahead:
        return _Risk(subject.exchanges, subject.reach, None)
    need, key = min(ahead, key=lambda pair: pair[0])
    return _Risk(key.key_exchanges(), Subject.of(key, now).reach, need)


def _works(who: TokenManager | str, subject: Subject, words: Words) -> str:
    """Until when the key's token serves; of trouble that came to no key, what holds for all tokens."""
    return words("works.cached") if isinstance(who, str) else still_works(subject.reach, words)


def _end(pen: Pen, label: str, works: str, incident: Incident) -> Post:
    message = pen.end(label, works, incident)
    logger().info(message.plain)
    return Post(message, lambda _: incidents_here().end_heard(incident), incident.thread)


def _pen(now: datetime) -> Pen:
    """In the language of the settings, from this run, where there is one."""
    settings = Settings.load()
    run = flow_run.name or "", url_for("flow-run", flow_run.id) if flow_run.id else None
    return Pen(LANGUAGES[settings.slack_language], run, settings.slack_mention, now)
