"""The messages of an incident's life, from the facts of a case and the words of a language."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from flows import causes
from flows.life import CALM
from flows.messages import Message, sessions_at_risk, still_works
from flows.runs import clock

if TYPE_CHECKING:
    from datetime import datetime

    from flows.incidents import Incident
    from flows.life import Telling
    from flows.words import Words

    Run = tuple[str, str | None]

MOMENT = timedelta(minutes=1)  # for which trouble has not lasted yet
ICONS = {"opened": ":warning:", "escalated": ":rotating_light:", "reminded": ":hourglass_flowing_sand:"}


class Case(NamedTuple):
    """What is known of a trouble as it is told; times are aware UTC.

    Attributes:
        who: what people call the key, or the exchange of a run that came to no key.
        exchanges: what it trades.
        works: what still works until when.
        reach: until when its present token serves; None without one.
        happened: one sentence.
        attempt: when something will be tried next, by itself.

    """

    who: str
    exchanges: list[str]
    works: str
    reach: datetime | None
    happened: str
    attempt: str


class Pen(NamedTuple):
    """Who writes: in which language, from which run (its name and page), calling whom on page level, and when."""

    words: Words
    run: Run
    mention: str
    now: datetime

    def trouble(self, case: Case, incident: Incident, telling: Telling) -> Message:
        """An incident that lasts."""
        words = self.words
        answers = [
            ("works", case.works),
            ("risk", sessions_at_risk(case.exchanges, case.reach, self.now, words)),
            ("next", case.attempt),
            ("do", self._cure(incident, telling)),
        ]
        return self._message(
            ":rotating_light:" if telling.page else ICONS[telling.kind],
            self._headline(case.who, incident, telling),
            self._happened(case.happened, incident),
            answers,
            self.mention if telling.page else "",
        )

    def end(self, who: str, works: str, incident: Incident) -> Message:
        """An incident that is over, and what works now."""
        words = self.words
        gone = words.lasted((incident.closed_at or self.now) - incident.opened_at)
        return self._message(
            ":white_check_mark:",
            words("head.solved", who=who, title=self._title(incident)),
            words("said.solved", gone=gone, since=clock(incident.opened_at)),
            [("works_now", works)],
        )

    def notice(self, what: str, label: str, reach: datetime | None, *, person: str, why: str) -> Message:
        """What a person had done."""
        words = self.words
        return self._message(
            ":arrows_counterclockwise:",
            words(f"notice.{what}", who=label),
            words("notice.asked", person=person or words("notice.somebody"), at=clock(self.now)),
            [("why", why or words("notice.unreasoned")), ("works_now", still_works(reach, words))],
        )

    def test(self) -> Message:
        """Nothing but a sign of life; it shows whom a page calls without calling them."""
        words, mention = self.words, self.mention
        called = words("test.mention", mention=mention) if mention else words("test.nobody")
        return self._message(":wave:", words("test.head"), words("test.said"), [("mention", called)])

    def _title(self, incident: Incident) -> str:
        known = incident.cause if incident.cause in causes.BY_NAME else causes.UNFORESEEN.name  # a later version's
        return self.words(f"cause.{known}.title")

    def _cure(self, incident: Incident, telling: Telling) -> str:
        """What a person does; where that is to wait, something else once there is no time to."""
        urgent = self.words.texts.get(f"cause.{incident.cause}.urgent")
        return urgent if urgent and telling.stage > CALM else self.words(f"cause.{incident.cause}.cure")

    def _headline(self, who: str, incident: Incident, telling: Telling) -> str:
        facts = {"who": who, "title": self._title(incident)}
        words, need = self.words, incident.need
        if telling.kind == "escalated" and need and need > self.now:
            return words("head.escalated", left=words.lasted(need - self.now), **facts)
        if telling.kind == "escalated" and need:
            return words("head.missing", gone=words.lasted(self.now - need), **facts)
        if telling.kind == "reminded":
            return words("head.reminded", gone=words.lasted(self.now - incident.opened_at), **facts)
        return words("head.opened", **facts)

    def _happened(self, happened: str, incident: Incident) -> str:
        gone = self.now - incident.opened_at
        if gone < MOMENT:
            return happened
        since = clock(incident.opened_at)
        return self.words("said.since", happened=happened, gone=self.words.lasted(gone), since=since)

    def _message(
        self, icon: str, headline: str, happened: str, answers: list[tuple[str, str]], mention: str = ""
    ) -> Message:
        labelled = [(self.words(f"label.{name}"), text) for name, text in answers]
        return Message(icon, headline, happened, labelled, (self.words("label.run"), *self.run), mention)
