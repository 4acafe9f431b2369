"""The parts of docs/alerts.md that come from the code. `python tests/alert_samples.py` brings them up to date."""

from __future__ import annotations

import html
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from flows import causes
from flows.incidents import new
from flows.letters import Case, Pen
from flows.life import HALF, LAST_CALL, Telling
from flows.messages import still_works
from flows.runs import clock
from flows.words import ENGLISH, LANGUAGES, Words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flows.causes import Cause
    from flows.messages import Message

PAGE = Path(__file__).resolve().parent.parent / "docs" / "alerts.md"
ANCHOR = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # Monday 16:35 in Seoul
NEED = datetime(2026, 11, 23, 14, 0, tzinfo=UTC)  # New York opens half an hour later
REACH = ANCHOR - timedelta(minutes=5)  # of Sunday's token
PLACE = "http://127.0.0.1:4200/runs/flow-run/0c9d2a51"
END = "<!-- end -->"
LIMIT = "KIS refused to issue: one request a minute per app key (EGW00133)."
DOWN = "KIS reported a fault of its own (EGW00002)."
KEY = "us+kr"


def current(page: str) -> str:
    """The page with its rendered parts as the code makes them now."""
    for name, text in parts().items():
        begin, rest = page.split(f"<!-- {name} -->\n", 1)
        page = f"{begin}<!-- {name} -->\n{text}{rest[rest.index(END) :]}"
    return page


def parts() -> Mapping[str, str]:
    """The rendered parts by the names of their marks."""
    rows = {f"causes-{name}": table(words) for name, words in LANGUAGES.items()}
    return {"told": told(), **rows, **{name: samples(words) for name, words in LANGUAGES.items()}}


def told() -> str:
    """When people hear of which cause."""
    lines = ["| alert | opens | calls people, in the last 4 hours before the need |", "|---|---|---|"]
    for cause in causes.CAUSES:
        opens = ("at once" if cause.at_once else "once it presses") + ("" if cause.reminds else "; no reminders")
        calls = "never" if cause is causes.FOREIGN_TOKEN else "at once" if cause.by_person else "once escalated"
        lines.append(f"| {ENGLISH(f'cause.{cause.name}.title')} | {opens} | {calls} |")
    return "\n".join(lines) + "\n"


def table(words: Words) -> str:
    """Every cause with what a person does about it, and what once it is escalated, where that differs."""
    lines = []
    for cause in causes.CAUSES:
        urgent = words.texts.get(f"cause.{cause.name}.urgent")
        cures = [words(f"cause.{cause.name}.cure"), *([f"→ {urgent}"] if urgent else [])]
        lines.append(f"| **{words(f'cause.{cause.name}.title')}** | {'<br>'.join(cures)} |")
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def samples(words: Words) -> str:
    """Typical messages as Slack shows them."""
    return "\n".join(f"```text\n{as_seen(message)}\n```\n" for message in messages(words))


def messages(words: Words) -> Iterator[Message]:
    """A limit as it opens, KIS down from its opening to its end, a foreign token, a refresh by hand and a test."""
    yield trouble(words, causes.FOREIGN_LIMIT, LIMIT, Telling("opened", 0, page=False), 0, 2)
    yield trouble(words, causes.DOWN, DOWN, Telling("opened", HALF, page=True), 215, 5)
    yield trouble(words, causes.DOWN, DOWN, Telling("reminded", HALF, page=False), 275, 5)
    yield trouble(words, causes.DOWN, DOWN, Telling("escalated", LAST_CALL, page=True), 355, 5)
    over = new(KEY, causes.DOWN, NEED, ANCHOR)
    over.closed_at = ANCHOR + timedelta(minutes=365)
    reach = over.closed_at + timedelta(hours=23, minutes=55)
    yield pen(words, over.closed_at).end(KEY, still_works(reach, words), over)
    yield foreign(words)
    yield pen(words, ANCHOR).notice("forced", KEY, reach, person="Kim", why="KIS support revoked it")
    yield pen(words, ANCHOR)._replace(run=("", None)).test()


def trouble(words: Words, cause: Cause, happened: str, telling: Telling, minutes: int, again: int) -> Message:
    """A message of trouble since the anchor, so many minutes after it; the next attempt is `again` minutes later."""
    now = ANCHOR + timedelta(minutes=minutes)
    attempt = words("next.planned", at=clock(now + timedelta(minutes=again)))
    case = Case(KEY, ["NASD", "NYSE", "AMEX", "KRX"], still_works(None, words), None, happened, attempt)
    return pen(words, now).trouble(case, new(KEY, cause, NEED, ANCHOR), telling)


def foreign(words: Words) -> Message:
    """KIS answered with a token that someone else had issued at noon."""
    noon = ANCHOR - timedelta(hours=4, minutes=35)
    reach = noon + timedelta(hours=23, minutes=55)
    planned = words("next.planned", at=clock(noon + timedelta(days=1, minutes=5)))
    case = Case(KEY, [], still_works(reach, words), reach, words("said.foreign", at=clock(noon)), planned)
    incident = new(KEY, causes.FOREIGN_TOKEN, None, ANCHOR)
    return pen(words, ANCHOR).trouble(case, incident, Telling("opened", 0, page=False))


def pen(words: Words, now: datetime) -> Pen:
    """Of the hourly check, calling the channel."""
    return Pen(words, (f"check-tokens {now:%Y-%m-%d %H:%M} UTC", PLACE), "<!channel>", now)


def as_seen(message: Message) -> str:
    """A message's texts as Slack shows them, without its emphasis."""
    header, *rest = message.blocks
    texts = [header["text"]["text"], *(block.get("text", *block.get("elements", [])[:1])["text"] for block in rest)]
    text = "\n".join(texts).replace("<!channel>", "@channel").replace("*", "")
    text = re.sub(r"<http[^|]*\|([^>]*)>", r"[\1]", text)
    return "\n".join(line.rstrip() for line in html.unescape(text).splitlines())


if __name__ == "__main__":
    PAGE.write_text(current(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
