"""What people read: one trouble, or its end, as plain text for the log and as Block Kit for Slack.

Written for a phone: a headline, a sentence, then one line a question. Times are KST, with the
exchange's own beside them where it is elsewhere.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

from flows.runs import KST, clock
from tokencore import CLOCK_SLACK, overrides, sessions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CHECK_MINUTE = 5  # of each hour, when check_tokens runs: its cron in prefect.yaml
DAYS_AHEAD = 5  # in which a session counts as at risk: over the longest of usual weekends
HEADLINE, SENTENCE = 150, 600  # characters: Slack's limit of a header, and what a phone shows of a paragraph
_HOUR = timedelta(hours=1)


class Message(NamedTuple):
    """One message.

    Attributes:
        icon: Slack's name of an emoji.
        headline: whose trouble, and which.
        happened: one sentence.
        answers: an operator's questions with their answers.
        run: the name of the run that tells, and its page; an empty name without one.

    """

    icon: str
    headline: str
    happened: str
    answers: Sequence[tuple[str, str]]
    run: tuple[str, str | None]

    @property
    def plain(self) -> str:
        """The message as one line."""
        told = " | ".join([self.headline, self.happened, *(f"{name}: {text}" for name, text in self.answers)])
        return " ".join(told.split())

    @property
    def fallback(self) -> str:
        """What a phone's notification shows, in Slack's escaping."""
        return escape(f"{self.headline}. {self.happened}")

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The message as Block Kit."""
        told = "\n".join(f"*{name}:* {escape(text)}" for name, text in self.answers)
        found = [
            {"type": "header", "text": {"type": "plain_text", "text": f"{self.icon} {self.headline}"[:HEADLINE]}},
            _section(escape(self.happened[:SENTENCE])),
            _section(told),
        ]
        name, url = escape(self.run[0]), self.run[1]
        if name:
            link = f"<{url}|{name}>" if url else name
            found.append({"type": "context", "elements": [{"type": "mrkdwn", "text": f"Run: {link}"}]})
        return found


def escape(text: str) -> str:
    """Slack's three characters, so that no foreign text becomes a link or calls a channel."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def sentence(text: str) -> str:
    """The first sentence of an error's text: what happened; the rest is answered line by line."""
    return text.partition(". ")[0].rstrip(".") + "."


def still_works(reach: datetime | None) -> str:
    """What serves until when; `reach` is the end of the present token's use, None without one."""
    return f"the present token, until {clock(reach)}" if reach else "nothing: there is no valid token"


def sessions_at_risk(codes: Iterable[str], reach: datetime | None, now: datetime) -> str:
    """The next session of each exchange through which no token lasts, the most urgent first."""
    found: dict[tuple[sessions.Session, str], list[str]] = {}
    for code in codes:
        place = sessions.exchange(code)
        session = _unserved(place, reach, now)
        if session:
            found.setdefault((session, place.zone), []).append(place.code)
    told = [_opens(names, session, zone, now) for (session, zone), names in sorted(found.items())]
    return "\n• ".join(["", *told]) if told else "none so far"


def next_check(after: datetime) -> datetime:
    """The first hourly check after that moment."""
    at = after.replace(minute=CHECK_MINUTE, second=0, microsecond=0)
    return at if at > after else at + _HOUR


def lasted(span: timedelta) -> str:
    """A time span as `3 h 05 min`, or `4 min`."""
    minutes = max(1, round(span.total_seconds() / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"  # noqa: PLR2004 - an hour


def _unserved(place: sessions.Exchange, reach: datetime | None, now: datetime) -> sessions.Session | None:
    today, known = now.astimezone(ZoneInfo(place.zone)).date(), overrides()
    for offset in range(-1, DAYS_AHEAD):
        day = today + timedelta(days=offset)
        need = sessions.need(place.code, day, known)
        if need and need[1] > now and (reach is None or need[1] > reach + CLOCK_SLACK):
            return sessions.session(place.code, day, known)
    return None


def _opens(names: Sequence[str], session: sessions.Session, zone: str, now: datetime) -> str:
    who = ", ".join(names)
    if session.open <= now:
        return f"{who}: since {clock(session.open)}, to {clock(session.close)}"
    there = session.open.astimezone(ZoneInfo(zone))
    local = "" if there.utcoffset() == session.open.astimezone(KST).utcoffset() else f" ({there:%a %H:%M} there)"
    return f"{who}: {clock(session.open)}{local}, in {lasted(session.open - now)}"


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text}}
