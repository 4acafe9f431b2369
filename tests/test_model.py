"""The renewal as a protocol, stepped by Hypothesis: one request a minute, no valid token lost, none bought in vain."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from model import Renewals
from stepping import FULL, Desk, desks

if TYPE_CHECKING:
    from collections.abc import Callable

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
EXAMPLES, STEPS = (400, 40) if FULL else (12, 25)
SEARCH = 800  # examples in which a planted bug has to show itself


def test_the_protocol_holds(make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]) -> None:
    """Whoever's turn it is, and whoever is killed, fails or waits: every invariant holds at each step."""

    class Machine(Renewals):
        pass

    Machine.make_desk = staticmethod(make_desk)
    planted = "PLANTED" in os.environ
    examples = SEARCH if planted else EXAMPLES
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=planted or not FULL,
            database=None,
            phases=[Phase.generate],  # shrinking takes minutes; the steps are printed as they are
            suppress_health_check=list(HealthCheck),
        ),
    )
    record_property("cases", examples)
