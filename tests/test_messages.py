"""Messages: that they fit where they are read, in every language."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from string import Formatter

import alert_samples
import pytest

from flows.causes import BY_NAME
from flows.messages import Message, next_check
from flows.texts import en, ko
from flows.words import ENGLISH, LANGUAGES, Words

MONDAY = datetime(2026, 11, 22, 23, 20, tzinfo=UTC)
LONGEST = "us+kr+hk+jp+cn+vn (paper)"


def fields(text: str) -> set[str]:
    """What a text wants to be told."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_language_says_the_same() -> None:
    """Korean has English's keys, each with the same facts in it, and no empty text."""
    assert ko.TEXTS.keys() == en.TEXTS.keys()
    assert {key: fields(text) for key, text in ko.TEXTS.items()} == {
        key: fields(text) for key, text in en.TEXTS.items()
    }
    assert all(text.strip() for words in LANGUAGES.values() for text in words.texts.values())


@pytest.mark.parametrize("words", LANGUAGES.values(), ids=list(LANGUAGES))
@pytest.mark.parametrize("cause", BY_NAME)
def test_every_alert_fits_slack_and_a_phone(cause: str, words: Words) -> None:
    """Headers keep below Slack's 150 characters, whatever the key is called, and paragraphs below 3000."""
    title, gone = words(f"cause.{cause}.title"), words.lasted(timedelta(hours=1000, minutes=59))
    for kind in ("opened", "escalated", "missing", "reminded", "solved"):
        headline = words(f"head.{kind}", who=LONGEST, title=title, gone=gone, left=gone)
        message = Message(":x:", headline, "y" * 5000, [("To do", words(f"cause.{cause}.cure"))], ("Run", "", None))
        header, happened, answers = message.blocks
        assert header["text"]["text"] == f":x: {headline}"
        assert max(len(block["text"]["text"]) for block in (happened, answers)) < 3000


def test_the_page_of_alerts_is_current() -> None:
    """What docs/alerts.md shows is what the code says today; `python tests/alert_samples.py` brings it up to date."""
    page = alert_samples.PAGE.read_text(encoding="utf-8")
    assert page == alert_samples.current(page)


def test_spans_and_days_are_written_as_people_write_them() -> None:
    """Hours and minutes, a minute at least; the day before the time."""
    assert ENGLISH.lasted(timedelta(seconds=1)) == "1 min"
    assert ENGLISH.lasted(timedelta(minutes=185)) == "3 h 05 min"
    assert LANGUAGES["ko"].lasted(timedelta(minutes=185)) == "3시간 5분"
    assert LANGUAGES["ko"].lasted(timedelta(minutes=120)) == "2시간"
    assert LANGUAGES["ko"].weekday(MONDAY) == "일 23:20"


def test_the_next_check_is_the_next_hours_fifth_minute() -> None:
    """As check_tokens is scheduled."""
    assert next_check(MONDAY) == datetime(2026, 11, 23, 0, 5, tzinfo=UTC)
    assert next_check(MONDAY.replace(minute=4)) == MONDAY.replace(minute=5)
    assert next_check(MONDAY.replace(minute=5)) == datetime(2026, 11, 23, 0, 5, tzinfo=UTC)
