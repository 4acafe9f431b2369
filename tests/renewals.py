"""The renewal as a protocol: processes of two markets step, die, fail and wait in any order, and what always holds.

Nothing is paraphrased: each process is the real command on real files and locks, and KIS is the sandbox with KIS's own
rules. Hypothesis only decides whose turn it is, and what befalls them.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scenarios import HOUR, MARKETS, MINUTE, Desk, served

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepping import Stepped

AT_ONCE = 3  # processes
BUFFER, PROACTIVE = 300.0, 1800.0  # seconds before the expiry in which a token is renewed; the settings' defaults
FILES = ("open", "write", "fsync", "replace", "mkdir", "read", "close key", "close .")
turns = st.integers(0, AT_ONCE - 1)


class Renewals(RuleBasedStateMachine):
    """Up to three processes at once; a subclass says where desks come from, and which bug is in each process."""

    make_desk: Callable[[], Desk]
    planted: Callable[[], None] | None = None

    @initialize()
    def begin(self) -> None:
        """A key without anything."""
        self.desk = type(self).make_desk()
        self.running: list[Stepped] = []
        self.begun: dict[int, float] = {}  # when each process was started
        self.killed = 0  # processes
        self.handed: set[str] = set()  # tokens that stood in a file or went to a caller
        self.failed: set[int] = set()  # processes whose call failed: once each
        self.seen: dict[str, str] = {}  # the last token in each market's file
        self.asked = 0
        self.holding = 0.0  # until when a token that any market has need not be renewed

    @precondition(lambda self: len(self.running) < AT_ONCE)
    @rule(market=st.sampled_from(MARKETS))
    def start(self, market: str) -> None:
        """Another process wants the token."""
        process = self.desk.start("get", market, first=type(self).planted)
        self.running.append(process)
        self.begun[process.pid] = self.desk.clock.true

    @precondition(lambda self: self.running)
    @rule(turn=turns, calls=st.sampled_from([1, 3, 10, 30, 90]))
    def step(self, turn: int, calls: int) -> None:
        """One of them makes some calls; while it sleeps, time passes."""
        process = self.running[turn % len(self.running)]
        for _ in range(calls):
            if process.at is not None:
                slept = process.at.startswith("sleep")
                process.go()
                if not slept:
                    self.look()
        self.bury(process)

    @precondition(lambda self: self.running)
    @rule(turn=turns, torn=st.booleans())
    def crash(self, turn: int, torn: bool) -> None:  # noqa: FBT001 - Hypothesis passes it by name
        """One of them is killed, perhaps amid a write."""
        process = self.running[turn % len(self.running)]
        if process.at and torn and process.at.startswith("write"):
            process.go(torn=True)
        if process.at:
            process.kill()
        self.killed += 1
        self.running.remove(process)

    @precondition(lambda self: self.running)
    @rule(turn=turns, error=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EACCES]), skip=st.integers(0, 60))
    def fail(self, turn: int, error: int, skip: int) -> None:
        """One of them goes on to a file call that fails; each meets that once at most."""
        process = self.running[turn % len(self.running)]
        while process.at and (skip > 0 or not process.at.startswith(FILES)):
            process.go()
            self.look()
            skip -= 1
        if process.at and process.pid not in self.failed:
            self.failed.add(process.pid)
            process.go(error)
        self.bury(process)

    @rule(hours=st.sampled_from([0.005, 1.0, 7.0, 23.6, 24.5]))
    def wait(self, hours: float) -> None:
        """Time passes while nobody does anything."""
        self.desk.clock.true += hours * HOUR

    @invariant()
    def look(self) -> None:
        """What holds at every step: one request a minute and none in vain, no valid token lost, no torn file."""
        if not hasattr(self, "desk"):
            return
        now, asked = self.desk.clock.true, self.desk.asked
        for earlier, later in itertools.pairwise(asked):
            assert later.at - earlier.at >= MINUTE, "two requests within KIS's minute"
        if len(asked) > self.asked:
            assert self.failed or asked[-1].at >= self.holding, "a request although a market had a token that serves"
            self.asked = len(asked)
        granted = self.desk.granted
        for market in MARKETS:
            token, before = self.desk.token(market), self.seen.get(market)
            if before and token != before:
                assert token, "a token file is gone"
                assert granted.index(token) > granted.index(before), "an older token came back"
            if token:
                self.seen[market] = token
                self.handed.add(token)
        reach = [self.desk.expiry(token) - PROACTIVE for token in self.seen.values()]
        self.holding = max(reach, default=0.0) if max(reach, default=0.0) > now else 0.0

    def bury(self, process: Stepped) -> None:
        """What holds at the end of a process: a token that served since its start, or a sentence."""
        if process.at is not None:
            return
        self.running.remove(process)
        ran, token = process.ran, process.ran.out.strip()
        assert ran.code in {0, 3, 4, 6, 7}, ran
        if ran.code == 0:
            assert self.desk.expiry(token) > self.begun[process.pid], "an expired token was handed out"
        if token:
            self.handed.add(token)

    def teardown(self) -> None:
        """At last all run to their ends, and fresh processes get one token for both markets."""
        if not hasattr(self, "desk"):
            return
        with self.desk:
            for turn in itertools.count():
                if not self.running:
                    break
                self.step(turn % AT_ONCE, 90)
            self.desk.clock.true += 2 * MINUTE
            for token in served(self.desk):
                assert self.desk.expiry(token) - self.desk.clock.true > BUFFER
            self.look()
            lost = set(self.desk.granted) - self.handed
            assert len(lost) <= self.killed, "a bought token reached neither the cache nor its caller"
