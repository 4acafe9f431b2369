"""The renewal as a protocol: what always holds while processes of two markets step, die, fail and wait in any order.

Each is the real command on real files and locks, and KIS is the sandbox with KIS's own rules; Hypothesis chooses the
steps.
"""

import errno
import itertools
import os
from collections.abc import Callable
from datetime import datetime

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from stepping import DAY, FULL, HOUR, MARKETS, MINUTE, Desk, Stepped, desks, needs_space

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
EXAMPLES, STEPS = (400, 40) if FULL else (12, 25)
SEARCH = 800  # examples within which a planted bug has to show itself
AT_ONCE = 3  # processes that run at the same time
ROOM = 14.0  # seconds after connecting within which a request may leave; later, a death hides when it left
BUFFER, PROACTIVE = 300.0, 1800.0  # seconds before the expiry, the defaults: no longer served, and renewed ahead
TROUBLES = ("crash", "fail", "fill", "jump")
WRONG = (0.0, HOUR, 25 * HOUR)  # seconds by which the machine's clock may be ahead or behind
FILES = ("open", "write", "fsync", "replace", "mkdir", "read", "close key", "close .")
turns = st.integers(0, AT_ONCE - 1)


class Renewals(RuleBasedStateMachine):
    """Up to three processes at once; a subclass provides `make_desk`."""

    make_desk: Callable[[], Desk]

    @initialize(troubles=st.sets(st.sampled_from(TROUBLES)), side=st.sampled_from([1, -1]))
    def begin(self, troubles: set[str], side: int) -> None:
        """Start with a key that has nothing yet; each example has only some of the troubles, and so more of each.

        The clock is wrong to one side only: a record that is two days ahead of it would be taken for damage.
        """
        # A disk that takes no line together with a clock that is set back is more than the record can bear.
        self.troubles, self.side = troubles - {"fail", "fill"} if "jump" in troubles else troubles, side
        self.desk = type(self).make_desk()
        self.running: list[Stepped] = []
        self.earliest: dict[int, float] = {}  # the earliest time that the machine's clock showed to each process
        self.misled: set[int] = set()  # processes in whose life the clock was set
        self.ahead: list[tuple[float, list[int]]] = []  # when it was set ahead, and which processes ran
        self.useless: set[str] = set()  # tokens that expired, by the machine's clock, before they were handed on
        self.departed: dict[int, float] = {}  # when each process was about to connect
        self.stood: set[int] = set()  # processes that stood still from then on for longer than ROOM
        self.killed: set[int] = set()  # processes that were killed
        self.handed: set[str] = set()  # tokens that stood in a file or went to a caller
        self.failed: set[int] = set()  # processes that have met a failing file call, once each
        self.full: set[int] = set()  # processes that find the disk full
        self.seen: dict[str, str] = {}  # the last token in each file
        self.askers: list[int] = []  # the process behind each request that reached KIS
        self.holding = 0.0  # until when a token in some file needs no renewal

    @precondition(lambda self: len(self.running) < AT_ONCE)
    @rule(market=st.sampled_from(MARKETS))
    def start(self, market: str) -> None:
        """Start another process that wants the token."""
        process = self.desk.start("get", market)
        self.running.append(process)
        self.earliest[process.pid] = self.desk.clock.shown

    @precondition(lambda self: self.running)
    @rule(turn=turns, calls=st.sampled_from([1, 3, 10, 30, 90]))
    def step(self, turn: int, calls: int) -> None:
        """Let one process make some calls; while it sleeps, time passes."""
        process = self.running[turn % len(self.running)]
        for _ in range(calls):
            if process.at is not None:
                self.go(process)
        self.bury(process)

    def go(self, process: Stepped) -> None:
        """Let a process make its next call, and check what holds after it."""
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
        """Kill one process, perhaps in the middle of a write."""
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
        """Let one process go on to a file call that fails, which each process meets once at most."""
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
        """Make the disk full from now on for one process that has met no other fault."""
        pid = self.running[turn % len(self.running)].pid
        if pid not in self.failed:
            self.failed.add(pid)
            self.full.add(pid)

    @rule(hours=st.sampled_from([0.005, 1.0, 7.0, 23.6, 24.5]), asleep=st.booleans())
    def wait(self, hours: float, asleep: bool) -> None:  # noqa: FBT001 - Hypothesis passes it by name
        """Let time pass while nobody does anything, or while the machine sleeps."""
        if asleep:
            self.desk.clock.sleep(hours * HOUR)
        else:
            self.desk.clock.true += hours * HOUR

    @precondition(lambda self: "jump" in self.troubles)
    @rule(by=st.sampled_from(WRONG))
    def jump(self, by: float) -> None:
        """Set the machine's clock, wrong or right."""
        clock, pids, wrong = self.desk.clock, [process.pid for process in self.running], self.side * by
        if wrong > clock.wrong:
            self.ahead.append((clock.true, pids))
        clock.wrong = wrong
        self.misled.update(pids)
        for pid in pids:
            self.earliest[pid] = min(self.earliest[pid], clock.shown)

    @invariant()
    def look(self, pid: int = 0) -> None:
        """Check what holds at every step: one request a minute and none in vain, no valid token lost, no torn file.

        A machine whose clock is set ahead cannot know that KIS's minute goes on. Nor can anyone know when the request
        left if its process stood still while connected to KIS and died before the answer.
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
        """Return the expiry that a token file gives, in epoch seconds; 0 if it has never held a token."""
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
        """Check how a process ended: with a token that had not expired when it started, or with a documented code."""
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
        """Let all processes end and set the clock right; fresh processes then get a valid token for both markets."""
        if not hasattr(self, "desk"):
            return
        with self.desk:
            for turn in itertools.count():
                if not self.running:
                    break
                self.step(turn % AT_ONCE, 90)
            # Tokens that a full disk did not take are handed out and count: past the ceiling, no request for a day.
            self.desk.clock.true += DAY if self.full and len(self.desk.granted) > 1 else 2 * MINUTE
            self.desk.clock.wrong = 0.0
            for token in self.desk.served():
                assert self.desk.kis.expiry(token) - self.desk.clock.true > BUFFER
            self.look()
            lost = set(self.desk.granted) - self.handed - self.useless
            assert len(lost) <= len(self.killed), "a bought token reached neither the cache nor its caller"


def test_the_protocol_holds(make_desk: Callable[[], Desk]) -> None:
    """Whichever process takes a turn, is killed, fails or waits, every invariant holds at each step."""

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
