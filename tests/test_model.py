"""The renewal as a protocol: processes of two markets step, die, fail and wait in any order, and what always holds.

Each is the real command on real files and locks, KIS the sandbox with KIS's own rules; Hypothesis decides what befalls.
"""

from __future__ import annotations

import errno
import itertools
import os
from datetime import datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from stepping import DAY, FULL, HOUR, MARKETS, MINUTE, Desk, desks, needs_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepping import Stepped

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
EXAMPLES, STEPS = (400, 40) if FULL else (12, 25)
SEARCH = 800  # examples in which a planted bug has to show itself
AT_ONCE = 3  # processes
ROOM = 14.0  # seconds after its connection in which a request may leave whose outcome nobody learns
BUFFER, PROACTIVE = 300.0, 1800.0  # seconds before the expiry in which a token is renewed; the settings' defaults
TROUBLES = ("crash", "fail", "fill", "jump")
WRONG = (0.0, HOUR, 25 * HOUR)  # seconds by which the machine's clock may be ahead or behind
FILES = ("open", "write", "fsync", "replace", "mkdir", "read", "close key", "close .")
turns = st.integers(0, AT_ONCE - 1)


class Renewals(RuleBasedStateMachine):
    """Up to three processes at once; a subclass says where desks come from."""

    make_desk: Callable[[], Desk]

    @initialize(troubles=st.sets(st.sampled_from(TROUBLES)), side=st.sampled_from([1, -1]))
    def begin(self, troubles: set[str], side: int) -> None:
        """A key without anything; some troubles come in this example, which leaves more of it for the others.

        Its clock is wrong to one side: a record that is two days ahead of it would be taken for damage.
        """
        # A disk that takes no line and a clock that is set back at once are more than the record can bear.
        self.troubles, self.side = troubles - {"fail", "fill"} if "jump" in troubles else troubles, side
        self.desk = type(self).make_desk()
        self.running: list[Stepped] = []
        self.earliest: dict[int, float] = {}  # the earliest time that the machine's clock showed to each process
        self.misled: set[int] = set()  # processes in whose life the clock was set
        self.ahead: list[tuple[float, list[int]]] = []  # when it was set ahead, and who ran
        self.useless: set[str] = set()  # tokens that expired, by the machine's clock, while who asked had them in hand
        self.departed: dict[int, float] = {}  # when each process was about to connect
        self.stood: set[int] = set()  # those that stood still from then on for longer than there is room
        self.killed: set[int] = set()  # processes
        self.handed: set[str] = set()  # tokens that stood in a file or went to a caller
        self.failed: set[int] = set()  # processes whose call failed: once each
        self.full: set[int] = set()  # processes that find no more space
        self.seen: dict[str, str] = {}  # the last token in each file
        self.askers: list[int] = []  # of each request that reached KIS
        self.holding = 0.0  # until when a token that any file has need not be renewed

    @precondition(lambda self: len(self.running) < AT_ONCE)
    @rule(market=st.sampled_from(MARKETS))
    def start(self, market: str) -> None:
        """Another process wants the token."""
        process = self.desk.start("get", market)
        self.running.append(process)
        self.earliest[process.pid] = self.desk.clock.shown

    @precondition(lambda self: self.running)
    @rule(turn=turns, calls=st.sampled_from([1, 3, 10, 30, 90]))
    def step(self, turn: int, calls: int) -> None:
        """One of them makes some calls; while it sleeps, time passes."""
        process = self.running[turn % len(self.running)]
        for _ in range(calls):
            if process.at is not None:
                self.go(process)
        self.bury(process)

    def go(self, process: Stepped) -> None:
        """Its next call, and what holds after it."""
        assert process.at
        if process.at.startswith(("connect", "sendall")):
            left = self.departed.get(process.pid, self.desk.clock.true)
            self.stood.update([process.pid] if self.desk.clock.true - left > ROOM else [])
        slept, full = process.at.startswith("sleep"), process.pid in self.full and needs_space(process.at)
        process.go(errno.ENOSPC if full else 0)
        if process.at and process.at.startswith("connect"):
            self.departed[process.pid] = self.desk.clock.true
        if not slept:
            self.look(process.pid)

    @precondition(lambda self: self.running and "crash" in self.troubles)
    @rule(turn=turns, torn=st.booleans())
    def crash(self, turn: int, torn: bool) -> None:  # noqa: FBT001 - Hypothesis passes it by name
        """One of them is killed, perhaps amid a write."""
        process = self.running[turn % len(self.running)]
        if process.at and torn and process.at.startswith("write"):
            process.go(torn=True)
        if process.at:
            process.kill()
        self.killed.add(process.pid)
        self.running.remove(process)

    @precondition(lambda self: self.running and "fail" in self.troubles)
    @rule(turn=turns, error=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EACCES]), skip=st.integers(0, 60))
    def fail(self, turn: int, error: int, skip: int) -> None:
        """One of them goes on to a file call that fails; each meets that once at most."""
        process = self.running[turn % len(self.running)]
        while process.at and (skip > 0 or not process.at.startswith(FILES)):
            self.go(process)
            skip -= 1
        if process.at and process.pid not in self.failed:
            self.failed.add(process.pid)
            process.go(error)
        self.bury(process)

    @precondition(lambda self: self.running and "fill" in self.troubles)
    @rule(turn=turns)
    def fill(self, turn: int) -> None:
        """The disk is full from now on for one of them that has met no other fault."""
        pid = self.running[turn % len(self.running)].pid
        if pid not in self.failed:
            self.failed.add(pid)
            self.full.add(pid)

    @rule(hours=st.sampled_from([0.005, 1.0, 7.0, 23.6, 24.5]), asleep=st.booleans())
    def wait(self, hours: float, asleep: bool) -> None:  # noqa: FBT001 - Hypothesis passes it by name
        """Time passes while nobody does anything, or while the machine sleeps."""
        if asleep:
            self.desk.clock.sleep(hours * HOUR)
        else:
            self.desk.clock.true += hours * HOUR

    @precondition(lambda self: "jump" in self.troubles)
    @rule(by=st.sampled_from(WRONG))
    def jump(self, by: float) -> None:
        """Someone sets the machine's clock, wrong or right."""
        clock, pids, wrong = self.desk.clock, [process.pid for process in self.running], self.side * by
        if wrong > clock.wrong:
            self.ahead.append((clock.true, pids))
        clock.wrong = wrong
        self.misled.update(pids)
        for pid in pids:
            self.earliest[pid] = min(self.earliest[pid], clock.shown)

    @invariant()
    def look(self, pid: int = 0) -> None:
        """What holds at every step: one request a minute and none in vain, no valid token lost, no torn file.

        Nothing tells a machine whose clock is set ahead that KIS's minute goes on. Nor does anything tell when the
        request left of a process that stood still with its connection to KIS, and died before its answer.
        """
        if not hasattr(self, "desk"):
            return
        now, asked = self.desk.clock.shown, self.desk.asked
        if len(asked) > len(self.askers):
            self.askers += [pid] * (len(asked) - len(self.askers))
            excused = pid in self.failed or pid in self.misled
            assert excused or now >= self.holding, "a request although a market had a token that serves"
        for (earlier, later), asker in zip(itertools.pairwise(asked), self.askers, strict=False):
            unknowing = any(earlier.at <= at <= later.at or asker in pids for at, pids in self.ahead)
            unknowing = unknowing or asker in self.killed & self.stood
            assert unknowing or later.at - earlier.at >= MINUTE, "two requests within KIS's minute"
        living = {process.pid for process in self.running}
        in_hand = [one.token for one, asker in zip(asked, self.askers, strict=True) if asker in living and one.token]
        self.useless.update(token for token in in_hand if self.desk.kis.expiry(token) <= now)
        reach = max((self.expiry_in(name) - PROACTIVE for name in self.desk.tokens()), default=0.0)
        self.holding = reach if reach > now else 0.0

    def expiry_in(self, name: str) -> float:
        """When the token in a file expires as the file gives it, in epoch seconds; 0 where it has never had one."""
        content, before = self.desk.content(name), self.seen.get(name)
        assert content or not before, "a token file is gone, or torn"
        if not content:
            return 0.0
        granted, token = self.desk.granted, content["access_token"]
        assert not before or granted.index(token) >= granted.index(before), "an older token came back"
        self.seen[name] = token
        self.handed.add(token)
        return datetime.fromisoformat(content["expires_at"]).timestamp()

    def bury(self, process: Stepped) -> None:
        """What holds at the end of a process: a token that served since its start, or a sentence."""
        if process.at is not None:
            return
        self.running.remove(process)
        ran, token = process.ran, process.ran.out.strip()
        assert ran.code in {0, 3, 4, 6, 7}, ran
        if ran.code == 0:
            assert self.desk.kis.expiry(token) > self.earliest[process.pid], "an expired token was handed out"
        if token:
            self.handed.add(token)

    def teardown(self) -> None:
        """At last all run to their ends, the clock is right, and fresh processes get one token for both markets."""
        if not hasattr(self, "desk"):
            return
        with self.desk:
            for turn in itertools.count():
                if not self.running:
                    break
                self.step(turn % AT_ONCE, 90)
            # Tokens that no disk took are handed out, and count: beyond the ceiling nothing is asked for a day.
            self.desk.clock.true += DAY if self.full and len(self.desk.granted) > 1 else 2 * MINUTE
            self.desk.clock.wrong = 0.0
            for token in self.desk.served():
                assert self.desk.kis.expiry(token) - self.desk.clock.true > BUFFER
            self.look()
            lost = set(self.desk.granted) - self.handed - self.useless
            assert len(lost) <= len(self.killed), "a bought token reached neither the cache nor its caller"


def test_the_protocol_holds(make_desk: Callable[[], Desk]) -> None:
    """Whoever's turn it is, and whoever is killed, fails or waits: every invariant holds at each step."""

    class Machine(Renewals):
        pass

    Machine.make_desk = staticmethod(make_desk)
    planted = "PLANTED" in os.environ
    run(
        Machine,
        settings=settings(
            max_examples=SEARCH if planted else EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=planted or not FULL,
            database=None,
            phases=[Phase.generate],  # shrinking takes minutes; the steps are printed as they are
            suppress_health_check=list(HealthCheck),
        ),
    )
