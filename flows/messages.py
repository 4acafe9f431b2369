"""What people read: one message, as plain text for the log and as Block Kit for Slack, and the facts in it.

Written for a phone: a headline, a sentence, then one line a question. Times are KST, with the
exchange's own beside them where it is elsewhere.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

from flows.runs import KST, clock
from flows.words import ENGLISH
from tokencore import CLOCK_SLACK, overrides, sessions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flows.words import Words

CHECK_MINUTE = 5  # of each hour, when check_tokens runs: its cron in prefect.yaml
DAYS_AHEAD = 5  # in which a session counts as at risk: over the longest of usual weekends
HEADLINE, SENTENCE = 150, 600  # characters: Slack's limit of a header, and what a phone shows of a paragraph
_HOUR = timedelta(hours=1)
lasted = ENGLISH.lasted  # states and tables of the UI are in English


class Message(NamedTuple):
    """One message.

    Attributes:
        icon: Slack's name of an emoji.
        headline: whose trouble, and which.
        happened: one sentence.
        answers: an operator's questions with their answers.
        run: the label, the name and the page of the run that tells; an empty name without one.
        mention: whom it calls, as Slack writes it; empty for nobody.

    """

    icon: str
    headline: str
    happened: str
    answers: Sequence[tuple[str, str]]
    run: tuple[str, str, str | None]
    mention: str = ""

    @property
    def plain(self) -> str:
        """The message as one line."""
        told = " | ".join([self.headline, self.happened, *(f"{name}: {text}" for name, text in self.answers)])
        return " ".join(told.split())

    @property
    def fallback(self) -> str:
        """What a phone's notification shows, in Slack's escaping."""
        return self._calling(escape(f"{self.headline}. {self.happened}"))

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The message as Block Kit."""
        told = "\n".join(f"*{name}:* {escape(text)}" for name, text in self.answers)
        found = [
            {"type": "header", "text": {"type": "plain_text", "text": f"{self.icon} {self.headline}"[:HEADLINE]}},
            _section(self._calling(escape(self.happened[:SENTENCE]))),
            _section(told),
        ]
        label, name, url = self.run
        if name:
            link = f"<{url}|{escape(name)}>" if url else escape(name)
            found.append({"type": "context", "elements": [{"type": "mrkdwn", "text": f"{label}: {link}"}]})
        return found

    def _calling(self, text: str) -> str:
        return f"{self.mention} {text}".lstrip()


def escape(text: str) -> str:
    """Slack's three characters, so that no foreign text becomes a link or calls a channel."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def sentence(text: str) -> str:
    """The first sentence of an error's text: what happened; the rest is answered line by line."""
    return text.partition(". ")[0].rstrip(".") + "."


def still_works(reach: datetime | None, words: Words = ENGLISH) -> str:
    """What serves until when; `reach` is the end of the present token's use, None without one."""
    return words("works.token", until=clock(reach)) if reach else words("works.nothing")


def sessions_at_risk(codes: Iterable[str], reach: datetime | None, now: datetime, words: Words = ENGLISH) -> str:
    """The next session of each exchange through which no token lasts, the most urgent first."""
    found: dict[tuple[sessions.Session, str], list[str]] = {}
    for code in codes:
        place = sessions.exchange(code)
        session = _unserved(place, reach, now)
        if session:
            found.setdefault((session, place.zone), []).append(place.code)
    told = [_opens(names, session, zone, now, words) for (session, zone), names in sorted(found.items())]
    return "\n• ".join(["", *told]) if told else words("risk.none")


def next_need(code: str, now: datetime) -> datetime | None:
    """When the present or coming need of an exchange starts, aware UTC; None where none is in sight."""
    needs = sessions.needs([code], now - timedelta(days=1), now + timedelta(days=DAYS_AHEAD), overrides())
    return next((start for start, end in needs if end > now), None)


def next_check(after: datetime) -> datetime:
    """The first hourly check after that moment."""
    at = after.replace(minute=CHECK_MINUTE, second=0, microsecond=0)
    return at if at > after else at + _HOUR


def _unserved(place: sessions.Exchange, reach: datetime | None, now: datetime) -> sessions.Session | None:
    today, known = now.astimezone(ZoneInfo(place.zone)).date(), overrides()
    for offset in range(-1, DAYS_AHEAD):
        day = today + timedelta(days=offset)
        need = sessions.need(place.code, day, known)
        if need and need[1] > now and (reach is None or need[1] > reach + CLOCK_SLACK):
            return sessions.session(place.code, day, known)
    return None


def _opens(names: Sequence[str], session: sessions.Session, zone: str, now: datetime, words: Words) -> str:
    who, opens = ", ".join(names), clock(session.open)
    if session.open <= now:
        return words("risk.running", who=who, opens=opens, closes=clock(session.close))
    there, left = session.open.astimezone(ZoneInfo(zone)), words.lasted(session.open - now)
    if there.utcoffset() == session.open.astimezone(KST).utcoffset():
        return words("risk.ahead", who=who, opens=opens, left=left)
    return words("risk.abroad", who=who, opens=opens, there=words.weekday(there), left=left)


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text}}
