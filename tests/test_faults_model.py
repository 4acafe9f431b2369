"""The renewal as a protocol, stepped by Hypothesis: one request a minute, no valid token lost, none bought in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from planted import BUGS
from renewals import Renewals
from scenarios import FULL, Desk, desks

if TYPE_CHECKING:
    from collections.abc import Callable

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
EXAMPLES, STEPS = (400, 40) if FULL else (12, 25)
SEARCH = 800  # examples in which a planted bug has to show itself
SHOWN = BUGS if FULL else {name: BUGS[name] for name in ("no lock", "written in place")}


def explore(make: Callable[[], Desk], bug: Callable[[], None] | None, examples: int) -> int:
    """Run the machine; how many examples it took until all held or one did not."""
    begun = 0

    def counted() -> Desk:
        nonlocal begun
        begun += 1
        return make()

    class Machine(Renewals):
        make_desk = staticmethod(counted)
        planted = staticmethod(bug) if bug else None

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=bool(bug) or not FULL,
            database=None,
            phases=[Phase.generate],  # shrinking takes minutes; the steps are printed as they are
            suppress_health_check=list(HealthCheck),
        ),
    )
    return begun


def test_the_protocol_holds(make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]) -> None:
    """Whoever's turn it is, and whoever is killed, fails or waits: every invariant holds at each step."""
    record_property("cases", explore(make_desk, None, EXAMPLES))


@pytest.mark.parametrize("name", SHOWN)
def test_a_planted_bug_breaks_it(name: str, make_desk: Callable[[], Desk]) -> None:
    """The machine finds each bug of the list within a few hundred examples, so it would find one like it."""
    with pytest.raises((AssertionError, ValueError, KeyError)) as caught:
        explore(make_desk, BUGS[name], SEARCH)
    print(f"{name}: {str(caught.value).splitlines()[0]}")
