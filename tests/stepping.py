"""Commands in real processes that stop before every file and network call, where a test decides how each goes on.

The processes, files, locks, sockets and deaths are real; KIS is the sandbox with KIS's own rules. Each stop tells the
process the time, so that a minute's cool-down costs nothing and a clock can be set between any two calls. A renewal
ahead, normally a thread of its caller, runs inside `Thread.start`: each of its calls is then a stop like the others,
and killing the process at one of them shows what happens if it ends before the thread does.
"""

from __future__ import annotations

import copy
import fcntl
import gc
import importlib
import io
import itertools
import json
import logging
import os
import pkgutil
import random
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import time_machine
from builders import forms
from running import Ran

import tokencore
from tokencore import cli
from tokencore.config.market import fingerprint
from tokencore.sandbox import APP_SECRET, Sandbox
from tokencore.sandbox.rules import RULES, TOKEN, Answer, Request
from tokencore.sandbox.server import _Handler
from tokencore.stores import file_store

FULL = "TORTURE" in os.environ  # try every case; otherwise a part, which differs between the kinds of fault
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
MARKETS = ("us", "kr")
START = datetime(2026, 11, 24, 4, tzinfo=UTC).timestamp()
NAP = 1.0  # seconds that every sleep takes at least: polling for a minute would be thousands of stops
TICK = 0.001  # seconds that every call takes
ON_PATHS = "stat lstat open mkdir unlink remove rename replace link chmod utime listdir scandir readlink"
ON_DESCRIPTORS = "read write fstat fsync fchmod lseek close"
WATCHED = {fcntl: "flock", os: f"{ON_PATHS} {ON_DESCRIPTORS}", socket.socket: "connect sendall recv_into close"}
HOLDERS = (".json", ".aside")  # endings of the files that may hold a token
ENDS = (".json", "_token_issued_at.dat", ".lock", ".jsonl", ".aside", ".gitignore")  # of all files that may stay
_utime = os.utime  # the real one, before a process replaces it
_keys = itertools.count(1)


@dataclass
class Clock:
    """The true time in epoch seconds, which KIS uses, and how the machine's clocks differ from it."""

    true: float = START
    wrong: float = 0.0  # seconds that the machine's clock is ahead
    slept: float = 0.0  # seconds that the machine has slept, which its monotonic clock does not count

    @property
    def shown(self) -> float:
        """What the machine's clock shows, in epoch seconds."""
        return self.true + self.wrong

    def sleep(self, seconds: float) -> None:
        """Let the machine sleep."""
        self.true += seconds
        self.slept += seconds


class Asked(NamedTuple):
    """A request that reached tokenP: when, its outcome, and the token in the answer."""

    at: float
    outcome: str
    token: str | None


class Kis(Sandbox):
    """The sandbox gateway on the test's clock; it remembers each key's requests."""

    def __init__(self) -> None:
        """Use KIS's own rules: a day, six hours, a minute."""
        super().__init__()
        self.clock = Clock()
        self.asked: dict[str, list[Asked]] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self._port, self._server.RequestHandlerClass = int(self.url.rpartition(":")[2]), _InOnePiece
        return self

    def well(self) -> None:
        """End all faults and open the port again."""
        self.clear()
        self.rules = RULES
        if self.closing.is_set():
            self.__enter__()

    def forget(self, key: str) -> None:
        """Let the key's next request get a new token, however young the last one is."""
        self._customers[key].token = None

    def expiry(self, token: str) -> float:
        """Return when a token expires, in epoch seconds."""
        return self._tokens[token].expires

    def respond(self, request: Request, now: float) -> Answer:
        """Answer as the gateway does, at the time of the test's clock."""
        now = self.clock.true
        answer = super().respond(request, now)
        if request.path == TOKEN:
            token = answer.content.get("access_token") if isinstance(answer.content, dict) else None
            self.asked.setdefault(str(request.body.get("appkey")), []).append(Asked(now, answer.outcome, token))
        return answer


class _InOnePiece(_Handler):
    wbufsize = -1  # so that a process always needs the same number of reads
    server: Any

    def date_time_string(self, _: float | None = None) -> str:
        """Return the test's time for the header `Date`, by which a process notices that its clock is ahead of KIS's."""
        return super().date_time_string(self.server.gateway.clock.true)


class Stepped:
    """A process that is stopped before its next call, named by `at`, which is None once the process has ended."""

    ran: Ran  # its exit code and output

    def __init__(self, work: Callable[[], int], folder: Path, clock: Clock, settings: dict[str, str]) -> None:
        """Start `work`, which returns the exit code, and stop it before its first call in `folder`."""
        self._clock = clock
        self._pipe, theirs = Pipe()
        self.pid = os.fork()
        if not self.pid:
            _live(work, _Parent(str(folder), theirs), settings)
        theirs.close()
        self.at = self._arrived()

    def go(self, error: int = 0, *, torn: bool = False) -> None:
        """Let the call succeed, fail with `error` or, if `torn`, write only half; then stop before the next call."""
        assert self.at is not None
        self._clock.true += max(NAP, float(self.at.removeprefix("sleep "))) if self.at.startswith("sleep ") else TICK
        self._pipe.send((self._clock.shown, self._clock.true - self._clock.slept, error, torn))
        self.at = self._arrived()

    def advance(self, calls: int) -> None:
        """Let it make that many calls, or all that are left."""
        while calls > 0 and self.at is not None:
            self.go()
            calls -= 1

    def kill(self) -> None:
        """Kill it where it has stopped, as `kill -9` does, unless it has ended."""
        if self.at is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.at = self._arrived()

    def finish(self, error: int = 0) -> Ran:
        """Let it run to its end; with an `error`, every call that needs disk space fails with it."""
        while self.at is not None:
            self.go(error if needs_space(self.at) else 0)
        return self.ran

    def _arrived(self) -> str | None:
        try:
            said: str | Ran | None = self._pipe.recv()
        except EOFError:  # it was killed or crashed
            said = None
        if isinstance(said, str):
            return said
        self._pipe.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.ran = said or Ran(code, "", "")
        return None


class Desk:
    """A new key for two markets, in a folder of its own, and what KIS saw of it."""

    def __init__(self, kis: Kis, base: Path) -> None:
        """Choose a new key and a path for its folder, which the product is to make."""
        self.key = f"PSfault{next(_keys):029d}"
        self.folder = base / f"desk-{self.key[-5:]}" / "tokens"
        self.record = self.folder / f"key-{fingerprint(self.key, kis.url)}.jsonl"
        self.key_file = self.record.with_suffix(".json")
        self.kis, self.clock = kis, Clock()
        kis.clock = self.clock
        self._started: list[Stepped] = []
        self._secrets = forms(self.key) | forms(APP_SECRET) | {b"eyJ"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._started:
            process.kill()
        said = [process.ran.err for process in self._started]  # only standard output may hold a token
        said += [process.ran.out for process in self._started if not process.ran.out.startswith("eyJ")]
        assert kind or not [text for text in said if self._finds_secret(text.encode())]

    def _finds_secret(self, content: bytes) -> bool:
        return any(form in content for form in self._secrets)

    def start(self, *arguments: str, work: Callable[[], int] | None = None, **variables: str) -> Stepped:
        """Start a command, or other `work`, and stop it before its first call; `variables` are further settings."""
        settings = {"KIS_TOKEN_DIR": str(self.folder), "KIS_BASE_URL": self.kis.url, "KIS_APP_KEY": self.key}
        settings |= {f"KIS_MARKETS__{market.upper()}__EXCHANGES": "[]" for market in MARKETS}  # none forbids a swap
        settings |= {"KIS_APP_SECRET": APP_SECRET, **variables}
        process = Stepped(work or (lambda: cli.main(arguments)), self.folder, self.clock, settings)
        self._started.append(process)
        return process

    def run(self, *arguments: str, work: Callable[[], int] | None = None, **variables: str) -> Ran:
        """Run a command to its end in a process of its own."""
        return self.start(*arguments, work=work, **variables).finish()

    def content(self, name: str) -> dict[str, str] | None:
        """Return a token file's fields, or None if it is missing or damaged."""
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def tokens(self) -> dict[str, str | None]:
        """Return the tokens in the key's and the markets' files by file name; None for a missing or damaged file."""
        names = [*(f"{market}_api_token.json" for market in MARKETS), self.key_file.name]
        return {name: (self.content(name) or {}).get("access_token") for name in names}

    def saved(self) -> Callable[[], None]:
        """Remember folder, key and clock as they are now, and return a function that restores them."""
        kept, true, asked = self.folder.with_name("kept"), self.clock.true, [*self.asked]
        customers = self.kis._customers  # noqa: SLF001 - what KIS knows of the key
        customer = copy.copy(customers.get(self.key))
        if self.folder.exists():
            shutil.copytree(self.folder, kept)

        def back() -> None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if kept.exists():
                shutil.copytree(kept, self.folder)
            self.clock.true = true
            self.kis.asked[self.key] = [*asked]
            customers.pop(self.key, None)
            if customer:
                customers[self.key] = copy.copy(customer)

        return back

    @property
    def asked(self) -> list[Asked]:
        """All requests of the key that reached tokenP."""
        return self.kis.asked.get(self.key, [])

    @property
    def granted(self) -> list[str]:
        """The tokens that KIS issued, oldest first."""
        return [asked.token for asked in self.asked if asked.outcome == "new" and asked.token]

    def served(self) -> set[str]:
        """Return the tokens that a fresh process gets for the markets."""
        ran = self.run(work=lambda: max(cli.main(("get", market)) for market in MARKETS))
        assert ran.code == 0, ran
        return set(ran.out.split())

    def untidy(self) -> Iterator[str]:
        """Yield what is wrong after the next day's renewal; only private files of the contract may be left."""
        self.clock.true += 1.1 * DAY
        if self.served() != {self.granted[-1]}:
            yield "the next day's processes did not get one new token"
        for path in self.folder.iterdir():
            if not path.name.endswith(ENDS) or stat.S_IMODE(path.stat().st_mode) != 0o600:
                yield f"left over: {path.name} of mode {stat.S_IMODE(path.stat().st_mode):o}"
            if not path.name.endswith(HOLDERS) and self._finds_secret(path.read_bytes()):
                yield f"a secret stands in {path.name}"
        gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(self.asked)]
        if min(gaps, default=MINUTE) < MINUTE:
            yield f"KIS was asked twice within its minute: {gaps}"


def needs_space(call: str) -> bool:
    """Return whether a full disk refuses the call; existing files can still be opened, read, renamed and deleted."""
    return call.startswith(("write", "mkdir", "fsync")) or (
        call.endswith(".tmp") and not call.startswith(("unlink", "lstat", "close"))
    )


def desks() -> Iterator[Callable[[], Desk]]:
    """Yield a function that makes desks, which share a gateway and a temporary folder.

    Everything that a command may import is imported here first, so that no import is a stop.
    """
    rooms = [room.name for room in pkgutil.walk_packages(tokencore.__path__, "tokencore.")]
    late = ("filelock", "binascii", "_strptime", "encodings.ascii", "encodings.idna", "holidays")
    for name in (*(room for room in rooms if not room.endswith("__main__")), *late):
        importlib.import_module(name)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a real disk would only be slower
    with tempfile.TemporaryDirectory(dir=memory) as base, Kis() as kis:
        yield lambda: Desk(kis, Path(base))


def _live(work: Callable[[], int], parent: _Parent, settings: dict[str, str]) -> None:
    """Run `work` in the child with its calls watched, and send its end to the parent; skip the parent's clean-up."""
    code = 99
    gc.disable()  # a collection would copy the parent's memory pages
    try:
        sys.stdout, sys.stderr = said = io.StringIO(), io.StringIO()
        os.environ.update(settings)
        time.tzset()
        logging.root.handlers.clear()  # those of pytest; warnings are to go to standard error, as in a program
        random.seed(0)  # waits with jitter must be the same in every run
        file_store._unsaved.clear()  # noqa: SLF001 - a new process has none in memory
        parent.watch()
        code = work()
        parent.pipe.send(Ran(code, *(one.getvalue() for one in said)))
    finally:
        os._exit(code)


class _Parent:
    """The child's link to the test, which is asked before each call on the folder or a socket."""

    def __init__(self, folder: str, pipe: Connection) -> None:
        self.pipe, self._folder = pipe, folder
        self._wall = time_machine.travel(START, tick=False).start()
        self._monotonic = START
        self._names: dict[int, str] = {}  # of files, by open descriptor

    def watch(self) -> None:
        """Replace the functions that the process calls; the first stop tells it the time."""
        self._stop("start")
        for owner, names in WATCHED.items():
            for name in names.split():
                setattr(owner, name, self._watched(name, getattr(owner, name)))
        time.sleep = lambda seconds: self._stop(f"sleep {max(0.0, float(seconds))}")  # type: ignore[assignment]
        time.monotonic = time.perf_counter = lambda: self._monotonic
        threading.Thread.start = threading.Thread.run  # type: ignore[method-assign]
        threading.Thread.join = lambda *_: None  # type: ignore[method-assign]

    def _stop(self, what: str) -> tuple[int, bool]:
        """Stop before the call, take the time from the test, and return the fault: its error number, whether torn."""
        self.pipe.send(what)
        wall, self._monotonic, error, torn = self.pipe.recv()
        self._wall.move_to(wall)
        return error, torn

    def _name(self, called: Any) -> str | None:  # noqa: ANN401 - as the system's
        """Return a name for the call's object, or None for a path outside the folder, such as a parent."""
        if isinstance(called, socket.socket):
            return "socket"
        if isinstance(called, int):
            return self._names.get(called)
        path = str(os.fspath(called))
        inside = path.startswith(self._folder) and not path.endswith("..")
        return os.path.relpath(path, self._folder) if inside else None

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(called: Any = ".", *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the system's
            place = self._name(called)
            if place is None:
                return real(called, *args, **kwargs)
            if name == "recv_into":  # stop only once KIS has answered, so that the clock does not move meanwhile
                select.select([called], [], [], 1)
            error, torn = self._stop(f"{name} {place}")
            if error and name != "close":
                raise OSError(error, os.strerror(error))
            if torn:
                args = (args[0][: len(args[0]) // 2],)
            result = real(called, *args, **kwargs)
            if name in ("write", "fsync"):  # replace the system's time stamp, as the test has its own clock
                _utime(called, (time.time(), time.time()))
            if name == "open":
                self._names[result] = place
            if name == "close":
                self._names.pop(called, None)
                if error:  # even a close that fails closes the descriptor
                    raise OSError(error, os.strerror(error))
            return result

        return call
