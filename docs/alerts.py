"""Writes the parts of the pages about alerts that come from the code; `make docs` runs it, and a test compares."""

from __future__ import annotations

import html
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

from flows.alerts import causes, messages
from flows.alerts.incidents import LAST_CALL, Notification, new
from flows.alerts.messages import LANGUAGES, Facts, Texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.alerts.messages import Message

PAGES = sorted(Path(__file__).parent.glob("alerts*.md"))
ANCHOR = datetime(2026, 11, 23, 7, 35, tzinfo=UTC)  # Monday 16:35 in Seoul
NEED = datetime(2026, 11, 23, 14, 0, tzinfo=UTC)  # New York opens half an hour later
KEY, EXCHANGES = "us+kr", ("NASD", "NYSE", "AMEX", "KRX")
RUN = "check-tokens 2026-11-23", "http://127.0.0.1:4200/v2/runs/flow-run/0c9d2a51"
DOWN = "KIS reported a fault of its own (EGW00002).", ("server_error", "EGW00002")
HEARD = {  # by whether people hear of it at once, and whether it calls them as soon as that; see `causes.Cause`
    "en": {
        (True, True): "at once; calls people at once",
        (True, False): "at once; calls people once escalated",
        (False, False): "once it is urgent; calls people once escalated",
    },
    "ko": {
        (True, True): "즉시 발송, 즉시 멘션",
        (True, False): "즉시 발송, 에스컬레이션되면 멘션",
        (False, False): "긴급해지면 발송, 에스컬레이션되면 멘션",
    },
}


def current(page: str) -> str:
    """The page with its rendered parts as the code makes them now."""
    for kind, language in re.findall(r"<!-- (causes|samples)-(\w+) -->", page):
        text = table(language) if kind == "causes" else samples(LANGUAGES[language])
        begin, mark, rest = page.partition(f"<!-- {kind}-{language} -->\n")
        page = begin + mark + text + rest[rest.index("<!-- end -->") :]
    return page


def table(language: str) -> str:
    """When people hear of which causes, by their titles."""
    lines = ["| | |", "|---|---|"]
    for which, heard in HEARD[language].items():
        found = [cause.name for cause in causes.CAUSES if (cause.at_once, cause.by_person) == which]
        titles = "<br>".join(LANGUAGES[language][f"cause.{name}.title"] for name in found)
        lines.append(f"| **{heard}** | {titles} |")
    return "\n".join(lines) + "\n"


def samples(texts: Texts) -> str:
    """KIS down as the last call before a session, and its end, as Slack shows them."""
    return "\n".join(f"```text\n{as_seen(message)}\n```\n" for message in rendered(texts))


def rendered(texts: Texts) -> Iterator[Message]:
    """The messages."""
    late = ANCHOR + timedelta(minutes=406)
    known, due = new(KEY, causes.DOWN, NEED, ANCHOR), Notification("escalated", LAST_CALL, page=True)
    happened = messages.happened(texts, causes.DOWN, *DOWN)
    yield messages.trouble(facts(texts, late), known, due, happened, ("next.planned", late + timedelta(minutes=5)))
    over = new(KEY, causes.DOWN, NEED, ANCHOR)
    over.closed_at = ANCHOR + timedelta(minutes=412)
    yield messages.solved(facts(texts, over.closed_at, over.closed_at + timedelta(hours=23, minutes=55)), [over])


def facts(texts: Texts, now: datetime, until: datetime | None = None) -> Facts:
    """What the hourly check knows then, calling the channel."""
    return Facts(texts, KEY, now, until, True, messages.risks(EXCHANGES, until, now, {}), RUN, "<!channel>")  # noqa: FBT003 - as it comes


def as_seen(message: Message) -> str:
    """A message's texts as Slack shows them, without its emphasis."""
    header, *rest = message.blocks
    texts = [header["text"]["text"], *(block.get("text", *block.get("elements", [])[:1])["text"] for block in rest)]
    text = "\n".join(texts).replace("<!channel>", "@channel").replace("*", "")
    text = re.sub(r"<http[^|]*\|([^>]*)>", r"[\1]", text)
    return "\n".join(line.rstrip() for line in html.unescape(text).splitlines())


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8")
