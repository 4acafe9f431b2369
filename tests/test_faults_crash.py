"""Killed at any step: whatever file or network call a renewal dies before, nothing is lost and no request is wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scenarios import FULL, SCENARIOS, Desk, Scenario, desks, served, still_serving, tokens_of, untidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

RENEWALS = [name for name in SCENARIOS if name != "inside the minute"]  # a long wait, where nothing is left to break
make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
EVERY = 1 if FULL else 16  # calls; the part that a run takes begins elsewhere in each scenario


def killed(desk: Desk, arguments: tuple[str, ...], number: int, *, torn: bool) -> None:
    """Kill the command before its call with this number, or amid it."""
    process = desk.start(*arguments)
    for _ in range(number):
        if process.at is not None:
            process.go()
    if torn and process.at is not None:
        process.go(torn=True)
    if process.at is not None:
        process.kill()


def wrong(scenario: Scenario, desk: Desk, old: dict[str, str | None], issued: int) -> Iterator[str]:
    """What is not as it must be wherever a process died, after `issued` tokens; nothing where all is well."""
    gone = {None} if "delete" in scenario.arguments else set()
    if not all(text in {old[market], *desk.granted, *gone} for market, text in tokens_of(desk).items()):
        yield "a file holds neither the old nor the new token"
    answers = served(desk)
    if not answers <= {desk.granted[-1], *(still_serving(old) if scenario.keeps else ())}:
        yield f"the next processes got {len(answers)} tokens, not only those that serve"
    if len(desk.granted) - issued > scenario.issues:
        yield "KIS issued a second token"
    yield from untidy(desk)


def tortured(
    desk: Desk, name: str, chosen: Callable[[list[str]], Iterable[int]], *, torn: bool = False
) -> tuple[int, list[tuple[int, str, str]]]:
    """Kill the scenario's command at the chosen ones of its calls: how many there were, and all that went wrong."""
    scenario, cases, found = SCENARIOS[name], 0, []
    scenario.prepare(desk)
    old, issued, again = tokens_of(desk), len(desk.granted), desk.saved()
    calls = desk.calls(*scenario.arguments)
    for number in chosen(calls):
        again()
        killed(desk, scenario.arguments, number, torn=torn)
        cases += 1
        found += [(number, calls[number], what) for what in wrong(scenario, desk, old, issued)]
    return cases, found


@pytest.mark.parametrize("name", RENEWALS)
def test_a_kill_before_any_call_loses_nothing(
    name: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """Each file is old or new, the next processes get one token, KIS issued no other and was asked once a minute."""
    first = list(SCENARIOS).index(name) % EVERY
    with make_desk() as desk:
        cases, found = tortured(desk, name, lambda calls: range(first, len(calls), EVERY))
    assert not found, "\n".join(map(str, found))
    assert cases
    record_property("cases", cases)


@pytest.mark.parametrize(
    "name", [name for name in SCENARIOS if name == "damaged file" or (FULL and name != "inside the minute")]
)
def test_a_kill_amid_a_write_loses_nothing(
    name: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """The same holds where half of what was to be written stands on disk."""
    with make_desk() as desk:
        cases, found = tortured(
            desk, name, lambda calls: [n for n, call in enumerate(calls) if call.startswith("write")], torn=True
        )
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)
