"""Writes the parts of `docs/alerts.md` that come from the code; `make docs` runs it, and a test compares."""

from __future__ import annotations

import html
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

from flows.alerts import causes, messages
from flows.alerts.incidents import HALF, LAST_CALL, Telling, new
from flows.alerts.messages import LANGUAGES, Facts, Texts
from flows.runs import clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flows.alerts.causes import Cause
    from flows.alerts.messages import Message

PAGE = Path(__file__).with_suffix(".md")
ANCHOR = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # Monday 16:35 in Seoul
NEED = datetime(2026, 11, 23, 14, 0, tzinfo=UTC)  # New York opens half an hour later
PLACE = "http://127.0.0.1:4200/runs/flow-run/0c9d2a51"
END = "<!-- end -->"
LIMIT = "KIS refused to issue: one request a minute per app key (EGW00133)."
DOWN = "KIS reported a fault of its own (EGW00002)."
KEY, EXCHANGES = "us+kr", ("NASD", "NYSE", "AMEX", "KRX")


def current(page: str) -> str:
    """The page with its rendered parts as the code makes them now."""
    for name, text in parts().items():
        begin, rest = page.split(f"<!-- {name} -->\n", 1)
        page = f"{begin}<!-- {name} -->\n{text}{rest[rest.index(END) :]}"
    return page


def parts() -> Mapping[str, str]:
    """The rendered parts by the names of their marks."""
    rows = {f"causes-{name}": table(texts) for name, texts in LANGUAGES.items()}
    return {"told": told(), **rows, **{name: samples(texts) for name, texts in LANGUAGES.items()}}


def told() -> str:
    """When people hear of which cause."""
    lines = ["| alert | opens | calls people, in the last 4 hours before the need |", "|---|---|---|"]
    for cause in causes.CAUSES:
        opens = ("at once" if cause.at_once else "once it is urgent") + ("" if cause.reminds else "; no reminders")
        calls = "never" if cause is causes.FOREIGN_TOKEN else "at once" if cause.by_person else "once escalated"
        lines.append(f"| {LANGUAGES['en'](f'cause.{cause.name}.title')} | {opens} | {calls} |")
    return "\n".join(lines) + "\n"


def table(texts: Texts) -> str:
    """Every cause with what a person does about it, and what once it is escalated, where that differs."""
    lines = []
    for cause in causes.CAUSES:
        urgent = texts.get(f"cause.{cause.name}.urgent")
        fixes = [texts(f"cause.{cause.name}.fix"), *([f"→ {urgent}"] if urgent else [])]
        lines.append(f"| **{texts(f'cause.{cause.name}.title')}** | {'<br>'.join(fixes)} |")
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def samples(texts: Texts) -> str:
    """Typical messages as Slack shows them, each after what a phone's notification shows."""
    return "\n".join(f"```text\n{as_seen(message)}\n```\n" for message in rendered(texts))


def rendered(texts: Texts) -> Iterator[Message]:
    """A limit as it opens, KIS down from its opening to its end, a dead and a foreign token, a refresh and a test."""
    yield trouble(texts, causes.FOREIGN_LIMIT, LIMIT, Telling("opened", 0, page=False), 0, 2)
    yield trouble(texts, causes.DOWN, DOWN, Telling("opened", HALF, page=True), 215, 5)
    yield trouble(texts, causes.DOWN, DOWN, Telling("reminded", HALF, page=False), 275, 5)
    yield trouble(texts, causes.DOWN, DOWN, Telling("escalated", LAST_CALL, page=True), 406, 5)
    over = new(KEY, causes.DOWN, NEED, ANCHOR)
    over.closed_at = ANCHOR + timedelta(minutes=412)
    reach = over.closed_at + timedelta(hours=23, minutes=55)
    yield messages.solved(texts, facts(over.closed_at, until=reach), [over])
    yield trouble(
        texts,
        causes.DEAD,
        "KIS has rejected the token since 2026-11-23 22:05 KST, and issues another only from 22:25 KST on.",
        Telling("opened", 0, page=True),
        330,
        20,
    )
    yield foreign(texts)
    yield messages.notice(texts, facts(ANCHOR, until=reach), "forced", by="Kim", why="KIS support revoked it")
    yield messages.test(texts, facts(ANCHOR)._replace(run=("", None)))


def trouble(texts: Texts, cause: Cause, happened: str, telling: Telling, minutes: int, again: int) -> Message:
    """A message of trouble since the anchor, so many minutes after it; the next attempt is `again` minutes later."""
    now = ANCHOR + timedelta(minutes=minutes)
    opened = now if cause is causes.DEAD else ANCHOR
    attempt = "next.planned", now + timedelta(minutes=again)
    return messages.trouble(texts, facts(now), new(KEY, cause, NEED, opened), telling, happened, attempt)


def foreign(texts: Texts) -> Message:
    """KIS answered with a token that someone else had issued at noon."""
    noon = ANCHOR - timedelta(hours=4, minutes=35)
    known = facts(ANCHOR, until=noon + timedelta(hours=23, minutes=55))._replace(risks=[])
    planned = "next.planned", noon + timedelta(days=1, minutes=5)
    incident, telling = new(KEY, causes.FOREIGN_TOKEN, None, ANCHOR), Telling("opened", 0, page=False)
    return messages.trouble(texts, known, incident, telling, texts("said.foreign", at=clock(noon)), planned)


def facts(now: datetime, until: datetime | None = None) -> Facts:
    """What the hourly check knows then, calling the channel."""
    risks = messages.risks(EXCHANGES, until, now, {})
    return Facts(KEY, now, until, True, risks, (f"check-tokens {now:%Y-%m-%d %H:%M} UTC", PLACE), "<!channel>")  # noqa: FBT003 - as it comes


def as_seen(message: Message) -> str:
    """A message's texts as Slack shows them, without its emphasis."""
    header, *rest = message.blocks
    texts = [header["text"]["text"], *(block.get("text", *block.get("elements", [])[:1])["text"] for block in rest)]
    text = "\n".join(texts).replace("<!channel>", "@channel").replace("*", "")
    text = re.sub(r"<http[^|]*\|([^>]*)>", r"[\1]", text)
    return "\n".join(line.rstrip() for line in html.unescape(text).splitlines())


if __name__ == "__main__":
    PAGE.write_text(current(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
