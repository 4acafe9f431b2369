"""Processes that belong together: started one by one, started again when they exit, stopped in reverse order.

A crew ends when SIGINT or SIGTERM asks for it, at whatever step it is: nothing that it started outlives it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POLL = 0.1  # seconds between two looks at anything
RESTART_PAUSE = 5.0  # seconds before a member that exited is started again: one that cannot run must not spin
PATIENCE = 30.0  # seconds a process may take to end; the worker ends the runs in flight first
NAP = 60.0  # seconds between two looks that count as a sleep of the machine, or a stop of all its processes
LOG_TAIL = 15  # lines of a log that are shown with a failure


class EndedError(Exception):
    """SIGINT or SIGTERM asked the crew to end."""


class CrewError(Exception):
    """A member could not be started; the message has the end of its log."""


@dataclass
class Member:
    """A process of the crew, in a session of its own: a Ctrl-C in the terminal reaches the crew only.

    Attributes:
        name: names its log file too.
        command: what is run; without a shell.
        environment: all of its environment.
        folder: its working directory, and where its log is.

    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)
    start_at: float | None = field(default=None, init=False)  # monotonic seconds of a planned start

    def start(self) -> None:
        """Start it; its output is appended to its log."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - commands of our own
                self.command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.start_at = None

    def stop(self) -> None:
        """End it gently, and with force what has not ended in time."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder / f"{self.name}.log"

    def failure(self, what: str) -> CrewError:
        """An error that shows the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return CrewError("\n".join([f"{self.name}: {what}. The end of its log:", *(f"  {line}" for line in lines)]))


class Asked:
    """Whether SIGINT, SIGTERM or SIGHUP has asked to end since a `with` block began.

    A flag instead of an exception: none can strike between the start of a process and the note of it.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> Self:
        # A signal with a handler has its default action in a new process, where one that is ignored, as in a
        # shell's background jobs, stays ignored: Prefect's worker could then not be stopped but by force.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True


class Crew:
    """The members while a `with` block lasts; leaving it stops them, the last one first."""

    def __init__(self, folder: Path) -> None:
        """Work in `folder`, which exists: logs, and `crew.json` with what others need to know."""
        self._folder = folder
        self._members: list[Member] = []
        self._facts: dict[str, Any] = {}
        self._asked = Asked()

    def __enter__(self) -> Self:
        self._asked.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for member in reversed(self._members):
            member.stop()
        crew_file(self._folder).unlink(missing_ok=True)
        self._asked.__exit__()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Member:
        """Start a lasting member."""
        member = Member(name, command, environment, self._folder)
        member.start()
        self._members.append(member)
        self.tell()
        return member

    def stop(self, name: str) -> None:
        """Stop one lasting member before the others, if there is one of that name."""
        for member in [one for one in self._members if one.name == name]:
            member.stop()
            self._members.remove(member)

    def run(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], patience: float, *, tries: int
    ) -> None:
        """Run a member to its end, within `patience` seconds; again if it fails, up to `tries` times in all.

        Raises:
            CrewError: it failed every time, or took too long.
            EndedError: the crew was asked to end; so was the member.

        """
        for left in reversed(range(tries)):
            member = self._run(name, command, environment, patience)
            if not member.process.returncode:
                return
            if not left:
                raise member.failure(f"failed with code {member.process.returncode}")

    def _run(self, name: str, command: Sequence[str], environment: Mapping[str, str], patience: float) -> Member:
        member = self.start(name, command, environment)
        try:
            self.wait(lambda: member.process.poll() is not None, f"{name} to end", patience)
        finally:
            member.stop()
            self._members.remove(member)
        return member

    def wait(self, ready: Callable[[], bool], what: str, patience: float, *, of: Member | None = None) -> None:
        """Wait until `ready` says so, at most `patience` seconds and as long as the member `of` lives.

        Raises:
            CrewError: it did not come about.
            EndedError: the crew was asked to end.

        """
        give_up = time.monotonic() + patience
        while not ready():
            if self._asked:
                raise EndedError
            if of and of.process.poll() is not None:
                raise of.failure(f"exited with code {of.process.returncode}")
            if time.monotonic() > give_up:
                told = f"waited {patience:.0f} s for {what}"
                raise of.failure(told) if of else CrewError(told)
            time.sleep(POLL)

    def watch(self, woken: Callable[[], None] | None = None, restarting: Callable[[str], None] | None = None) -> None:
        """Start members that exited again, until the crew is asked to end; call `woken` after a sleep of the machine.

        The wall clock tells it: the monotonic one of Linux stands still meanwhile. `restarting` is called with
        a member's name before it is started again.
        """
        seen = time.time()
        while not self._asked:
            for member in self._members:
                self._look_after(member, restarting)
            before, seen = seen, time.time()
            if woken and seen - before > NAP:
                _note(f"nothing ran here for {seen - before:.0f} s")
                woken()
            time.sleep(POLL)

    def _look_after(self, member: Member, restarting: Callable[[str], None] | None) -> None:
        code = member.process.poll()
        if code is None:
            return
        if member.start_at is None:
            _note(f"{member.name} exited with code {code}; it is started again.")
            member.start_at = time.monotonic() + RESTART_PAUSE
        elif time.monotonic() >= member.start_at:
            if restarting:
                restarting(member.name)
            member.start()
            self.tell()

    def tell(self, **facts: object) -> None:
        """Write facts for other programs, and which processes belong to the crew."""
        self._facts |= facts
        own = {"supervisor": os.getpid()} | {member.name: member.process.pid for member in self._members}
        processes = {name: [pid, birth(pid)] for name, pid in own.items()}
        draft = self._folder / "crew.json.tmp"
        draft.write_text(json.dumps(self._facts | {"processes": processes}))
        draft.replace(crew_file(self._folder))


def _note(what: str) -> None:
    print(datetime.now().astimezone().isoformat(timespec="seconds"), what, file=sys.stderr, flush=True)


def crew_file(folder: Path) -> Path:
    """Where the crew of `folder` tells about itself."""
    return folder / "crew.json"


def told(folder: Path) -> dict[str, Any]:
    """What the crew of `folder` told last, with only those `processes` that still live; empty if it ended well."""
    try:
        facts: dict[str, Any] = json.loads(crew_file(folder).read_text())
    except (OSError, ValueError):
        return {}
    processes = {name: pid for name, (pid, born) in facts["processes"].items() if birth(pid) == born}
    return facts | {"processes": processes}


def birth(pid: int) -> str:
    """When the process began, as the system words it; empty if there is none.

    It tells a process from a later one with the same number.
    """
    if not Path("/proc/self/stat").exists():  # macOS
        asked = ["/bin/ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
