"""Messages for people, rendered from facts in the reader's language, as plain text and as Block Kit.

They are written for a phone: a headline, the present state and what comes next, a sentence, then one line for each
question. Times are in KST, with the exchange's local time where it differs. The texts are in texts.toml.
"""

from __future__ import annotations

import re
import tomllib
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from flows.runs import KST, clock
from tokencore import sessions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from flows.alerts.causes import Cause
    from flows.alerts.incidents import Incident, Notification

    Overrides = Mapping[str, sessions.Override]
    Notice = Literal["renewed", "forced", "same", "failed"]

HEADLINE, SENTENCE = 150, 600  # characters: Slack's limit of a header, and what a phone shows of a paragraph
DAYS_AHEAD = 5  # how far ahead a session counts as at risk: beyond the longest usual weekend
CLOCKS = timedelta(seconds=30)  # KIS's clock and ours may differ, and a need ends with a pad, long after the close
MOMENT = timedelta(minutes=1)  # trouble younger than this is reported without saying how long it has lasted
HOUR = 60  # minutes
ICONS = {"opened": ":warning:", "escalated": ":rotating_light:", "reminded": ":hourglass_flowing_sand:"}
NAMES = re.compile(r"\b(?:[A-Z]+_[A-Z_\d]+|\w+Error|\w+\.py:\d+)\b")  # in an error's text; the same in any language


class Texts(dict[str, str]):
    """The texts of one language, by dotted key."""

    def __call__(self, key: str, **facts: object) -> str:
        """Return the text of that key, with the facts that it names filled in."""
        return self[key].format(**facts)

    def lasted(self, span: timedelta) -> str:
        """Format a time span in hours and minutes, as one minute at least."""
        hours, minutes = divmod(max(1, round(span.total_seconds() / 60)), HOUR)
        key = "span.minutes" if not hours else "span.hours" if minutes else "span.whole"
        return self(key, hours=hours, minutes=minutes)


def _flat(texts: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, text in texts.items():
        yield from _flat(text, f"{before}{name}.") if isinstance(text, dict) else [(before + name, text)]


LANGUAGES = {
    name: Texts(_flat(texts))
    for name, texts in tomllib.loads(Path(__file__).with_name("texts.toml").read_text("utf-8")).items()
}


class Risk(NamedTuple):
    """A session through which no token lasts, with its exchanges and their time zone."""

    session: sessions.Session
    exchanges: tuple[str, ...]
    zone: str


class Facts(NamedTuple):
    """What is known of a key, or of a run that reached no key; times are aware UTC."""

    texts: Texts  # the reader's language
    label: str  # its name for people
    now: datetime
    until: datetime | None = None  # until when its present token serves
    reached: bool = False  # whether the key's token was read; if not, `until` means nothing
    risks: Sequence[Risk] = ()  # the sessions at risk, the most urgent first
    run: tuple[str, str | None] = "", None  # the name and the URL of the run that reports; an empty name without one
    mention: str = ""  # who is called when people are paged, in Slack's syntax


class Message(NamedTuple):
    """One message."""

    icon: str  # Slack's name of an emoji
    headline: str  # who is in trouble, and what the trouble is
    preview: str  # the present state and what comes next, in a few words; the first thing that a phone shows
    happened: str  # a sentence or two
    answers: Sequence[tuple[str, str]]  # an operator's questions with their answers
    run: tuple[str, str, str | None]  # the label, the name and the URL of the run that reports
    mention: str = ""  # who is called

    @property
    def plain(self) -> str:
        """The message as one line."""
        parts = [self.headline, self.preview, self.happened, *(f"{name}: {text}" for name, text in self.answers)]
        return clean(" | ".join(filter(None, parts)))

    @property
    def fallback(self) -> str:
        """The text of a phone's notification, with Slack's escaping."""
        parts = [self.preview, f"{self.headline}. {self.happened}"]
        return f"{escape(' · '.join(filter(None, parts)))} {self.mention}".rstrip()

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The message as Block Kit."""
        bold = f"*{escape(self.preview)}*\n" if self.preview else ""
        happened = f"{self.mention} {bold}{escape(self.happened[:SENTENCE])}".lstrip()
        answers = "\n".join([f"*{name}:* {escape(text)}" for name, text in self.answers])
        header = f"{self.icon} {clean(self.headline)}"[:HEADLINE]
        found: list[dict[str, Any]] = [
            {"type": "header", "text": {"type": "plain_text", "text": header}},
            *({"type": "section", "text": {"type": "mrkdwn", "text": text}} for text in (happened, answers)),
        ]
        label, name, url = self.run
        if name:
            link = f"<{url}|{escape(name)}>" if url else escape(name)
            found.append({"type": "context", "elements": [{"type": "mrkdwn", "text": f"{label}: {link}"}]})
        return found


def happened(
    texts: Texts,
    cause: Cause,
    error: str,
    answer: tuple[str, str | None] | None = None,
    retry_at: datetime | None = None,
) -> str:
    """Say what happened in a sentence or two: in English the error's own, in other languages a text with the facts.

    `answer` is the outcome and KIS's code of the last attempt, if the error is about that one; `retry_at` is when a
    limit ends. For a foreign token, `error` is the time of its issue.
    """
    keys = [f"happened.{name}" for name in (answer[0] if answer else "", cause.name, "error")]
    key = next(key for key in keys if key in texts)
    names = ", ".join(dict.fromkeys(NAMES.findall(error)))
    first, code, until = error.partition(". ")[0].rstrip("."), answer and answer[1], retry_at and clock(retry_at)
    return texts(key, error=first, names=names, code=code, until=until).strip()


def trouble(
    facts: Facts, incident: Incident, due: Notification, happened: str, attempt: tuple[str, datetime | None]
) -> Message:
    """Render an incident that goes on; `attempt` is the next automatic attempt: the key of its text, and its time."""
    texts = facts.texts
    key, at = attempt
    cause = f"cause.{incident.kind.name}"
    gone, title = facts.now - incident.opened_at, texts[f"{cause}.title"]
    if due.kind == "reminded":
        title = texts("head.reminded", gone=texts.lasted(gone), title=title)
    if gone >= MOMENT:
        happened += " " + texts("said.since", gone=texts.lasted(gone), since=clock(incident.opened_at))
    fix = texts[f"{cause}.fix"]
    answers = [
        ("works", works(facts)),
        ("risk", _at_risk(facts)),
        ("next", texts(key, at=clock(at)) if at else texts[key]),
        ("do", texts.get(f"{cause}.urgent", fix) if due.stage else fix),
    ]
    icon = ICONS["escalated"] if due.page else ICONS[due.kind]
    mention = facts.mention if due.page else ""
    return _message(facts, icon, title, happened, answers)._replace(preview=_preview(facts), mention=mention)


def solved(facts: Facts, ended: Sequence[Incident]) -> Message:
    """Render the end of one key's incidents as one message, with what works now."""
    titles, length, since = _ended(facts, ended)
    said = facts.texts("said.solved", gone=length, since=clock(since))
    title = facts.texts("head.solved", title=titles)
    return _message(facts, ":white_check_mark:", title, said, [("works_now", works(facts))])


def notice(facts: Facts, kind: Notice, happened: str, why: str, ended: Sequence[Incident]) -> Message:
    """Render the result of a refresh that a person asked for, with the incidents that it ended."""
    answers = [("why", why or facts.texts["notice.unreasoned"]), ("works_now", works(facts))]
    if ended:
        titles, length, _ = _ended(facts, ended)
        answers.insert(0, ("solved", f"{titles} ({length})"))
    message = _message(facts, ":arrows_counterclockwise:", facts.texts[f"notice.{kind}"], happened, answers)
    return message._replace(preview=_preview(facts)) if kind == "failed" else message


def test(texts: Texts, mention: str, now: datetime) -> Message:
    """Render a test message, which shows who would be called without calling them."""
    called = texts("test.mention", mention=mention) if mention else texts["test.nobody"]
    return _message(Facts(texts, "", now), ":wave:", texts["test.head"], texts["test.said"], [("mention", called)])


def works(facts: Facts) -> str:
    """Say what still serves, and until when."""
    if not facts.reached:
        return facts.texts["works.cached"]
    return facts.texts("works.token", until=clock(facts.until)) if facts.until else facts.texts["works.nothing"]


def risks(codes: Iterable[str], until: datetime | None, now: datetime, known: Overrides) -> list[Risk]:
    """Return each exchange's next session that a token serving until `until` does not cover, the nearest first."""
    found: dict[tuple[sessions.Session, str], list[str]] = {}
    for code in codes:
        place = sessions.exchange(code)
        coming = sessions.days(code, now, now + timedelta(days=DAYS_AHEAD), known)
        left = [one.session for one in coming if until is None or one.need[1] > until + CLOCKS]
        if left:
            found.setdefault((left[0], place.zone), []).append(place.code)
    return sorted([Risk(session, tuple(names), zone) for (session, zone), names in found.items()])


def escape(text: str) -> str:
    """Escape Slack's three characters, so that no foreign text becomes a link or calls a channel; `clean` each line."""
    lines = [clean(line) for line in text.splitlines()]
    return "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def clean(text: str) -> str:
    """Put the text on one line, without what a terminal or Slack acts on: control, escape and direction characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _message(facts: Facts, icon: str, title: str, happened: str, answers: Sequence[tuple[str, str]]) -> Message:
    labelled = [(facts.texts[f"label.{name}"], text) for name, text in answers]
    headline = f"{facts.label}: {title}" if facts.label else title
    return Message(icon, headline, "", happened, labelled, (facts.texts["label.run"], *facts.run))


def _preview(facts: Facts) -> str:
    """Say `no token · NASD opens in 9 min`, with only the first session at risk and the first of its exchanges."""
    found, texts = [], facts.texts
    if facts.reached and facts.until:
        until, now = facts.until.astimezone(KST), facts.now.astimezone(KST)
        day = "" if until.date() == now.date() else f"{until:%m-%d} "
        found.append(texts("preview.until", until=f"{day}{until:%H:%M} KST"))
    elif facts.reached:
        found.append(texts["preview.none"])
    if facts.risks:
        session, who = facts.risks[0].session, facts.risks[0].exchanges[0]
        closes, left = f"{session.close.astimezone(KST):%H:%M}", texts.lasted(session.open - facts.now)
        key = "preview.opens" if session.open > facts.now else "preview.running"
        found.append(texts(key, who=who, left=left, closes=closes))
    return " · ".join(found)


def _at_risk(facts: Facts) -> str:
    lines, texts = [], facts.texts
    for session, exchanges, zone in facts.risks:
        there, kst = session.open.astimezone(ZoneInfo(zone)), session.open.astimezone(KST)
        key = "abroad" if there.utcoffset() != kst.utcoffset() else "ahead"
        line = texts(
            f"risk.{key if session.open > facts.now else 'running'}",
            who=", ".join(exchanges),
            opens=clock(kst),
            closes=clock(session.close),
            there=f"{texts['days'].split()[there.weekday()]} {there:%H:%M}",
            left=texts.lasted(session.open - facts.now),
        )
        lines.append(f"\n• {line}")
    return "".join(lines) or texts["risk.none"]


def _ended(facts: Facts, ended: Sequence[Incident]) -> tuple[str, str, datetime]:
    """Return the incidents' titles, how long the first one lasted, and since when."""
    first = min(ended, key=lambda one: one.opened_at)
    titles = "; ".join(dict.fromkeys(facts.texts[f"cause.{one.kind.name}.title"] for one in ended))
    return titles, facts.texts.lasted((first.closed_at or facts.now) - first.opened_at), first.opened_at
