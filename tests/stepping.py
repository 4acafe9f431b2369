"""Commands in real processes that stop before every file and network call, so that a test decides how each goes on.

The processes, files, locks, sockets and deaths are real; KIS is the sandbox with KIS's own rules. Time is given at the
stops, so that a minute's cool-down costs nothing and a clock can be set between any two calls. A renewal ahead, which
runs in a thread beside its caller, is run inside `Thread.start`: each of its calls is then a stop like the others, and
a process that ends before its thread is one that is killed at one of them.
"""

from __future__ import annotations

import copy
import fcntl
import gc
import importlib
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
from datetime import UTC, datetime, tzinfo
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from builders import forms
from running import Ran

import tokencore
from tokencore import cli
from tokencore.sandbox import APP_SECRET, Sandbox
from tokencore.sandbox.rules import RULES, TOKEN
from tokencore.sandbox.server import _Handler
from tokencore.stores import file_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.connection import Connection
    from typing import Self

    from tokencore.sandbox.rules import Answer, Request

FULL = "TORTURE" in os.environ  # every case; otherwise a part of them that changes with each kind of fault
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
MARKETS = ("us", "kr")
START = datetime(2026, 11, 24, 4, tzinfo=UTC).timestamp()
NAP = 1.0  # seconds that every sleep takes at least: a minute of short looks would be thousands of stops
TICK = 0.001  # seconds that every call takes
ON_PATHS = (
    *("stat", "lstat", "open", "mkdir", "unlink", "remove", "rename", "replace", "link", "chmod", "utime"),
    *("listdir", "scandir", "readlink"),
)
ON_DESCRIPTORS = ("read", "write", "fstat", "fsync", "fchmod", "lseek", "close")
ON_SOCKETS = ("connect", "sendall", "recv_into", "close")
HOLDERS = (".json", ".aside")  # of names of files that may hold a token
ENDS = (".json", "_token_issued_at.dat", ".lock", ".jsonl", ".aside", ".gitignore")  # of names that may stay
_utime, thread_start = os.utime, threading.Thread.start  # before a process watches them
_keys = itertools.count(1)


class Clock:
    """The true time, by which KIS goes, and what this machine makes of it."""

    def __init__(self, start: float = START) -> None:
        """Begin at `start`, in epoch seconds, with a clock that is right."""
        self.set(start)

    def set(self, to: float) -> None:
        """It is `to`, and the clock is right."""
        self.true = to
        self.wrong = 0.0  # seconds that the machine's clock is ahead
        self.slept = 0.0  # seconds in which the machine slept, which no monotonic clock counts

    @property
    def shown(self) -> float:
        """What the machine's clock shows, in epoch seconds."""
        return self.true + self.wrong

    def sleep(self, seconds: float) -> None:
        """Let the machine sleep."""
        self.true += seconds
        self.slept += seconds


class Order(NamedTuple):
    """How a stopped process goes on: at what time, and with which fault, if any."""

    wall: float
    monotonic: float
    error: int = 0
    torn: bool = False


class Asked(NamedTuple):
    """A request that reached tokenP, when, and what it brought."""

    at: float
    outcome: str
    token: str | None


class Kis(Sandbox):
    """The gateway by the clock of the test, which remembers what each key asked for."""

    def __init__(self, clock: Clock) -> None:
        """Keep KIS's own rules: a day, six hours, a minute."""
        super().__init__()
        self.clock = clock
        self.asked: dict[str, list[Asked]] = {}

    def __enter__(self) -> Self:
        self.closing.clear()
        super().__enter__()
        self._port, self._server.RequestHandlerClass = int(self.url.rpartition(":")[2]), _InOnePiece
        return self

    def down(self) -> None:
        """Let the port be closed."""
        self.__exit__()

    def well(self) -> None:
        """Behave again."""
        self.clear()
        self.rules = RULES
        if self.closing.is_set():
            self.__enter__()

    def saved(self, key: str) -> Callable[[], None]:
        """How the key stands now; the call brings that back."""
        customer, asked = copy.copy(self._customers.get(key)), list(self.asked.get(key, []))

        def restore() -> None:
            self.asked[key] = list(asked)
            self._customers.pop(key, None)
            if customer is not None:
                self._customers[key] = copy.copy(customer)

        return restore

    def forget(self, key: str) -> None:
        """Let KIS issue a new token with the next request of the key, whatever the age of the last one."""
        self._customers[key].token = None

    def expiry(self, token: str) -> float:
        """When a token expires, in epoch seconds."""
        return self._tokens[token].expires

    def respond(self, request: Request, now: float) -> Answer:
        """As the gateway, at the time of the test's clock."""
        now = self.clock.true
        answer = super().respond(request, now)
        if request.path == TOKEN:
            token = answer.content.get("access_token") if isinstance(answer.content, dict) else None
            self.asked.setdefault(str(request.body.get("appkey")), []).append(Asked(now, answer.outcome, token))
        return answer


class _InOnePiece(_Handler):
    wbufsize = -1  # how often a process reads must not be chance


class Stepped:
    """A process that stands before its next call, named by `at`; None once it has ended."""

    def __init__(self, work: Callable[[], int], folder: Path, clock: Clock, **settings: str) -> None:
        """Start `work`, whose result is the exit code, and stop it before its first call in `folder`."""
        self._clock = clock
        self._pipe, theirs = Pipe()
        self._written = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - for the life of this
        self._end: Ran | None = None
        self.pid = os.fork()
        if not self.pid:
            _live(work, str(folder), theirs, [file.fileno() for file in self._written], settings)
        theirs.close()
        self.at = self._arrived()

    def go(self, error: int = 0, *, torn: bool = False) -> str | None:
        """Make the call, or let it fail with `error`, or write only half; the next call is where it stops then."""
        assert self.at is not None
        self._clock.true += max(NAP, float(self.at.removeprefix("sleep "))) if self.at.startswith("sleep ") else TICK
        monotonic = self._clock.true - self._clock.slept
        self._pipe.send(Order(self._clock.shown, monotonic, error, torn))
        self.at = self._arrived()
        return self.at

    def advance(self, calls: int) -> None:
        """Make so many calls, or as many as there are."""
        for _ in range(calls):
            if self.at is not None:
                self.go()

    def kill(self) -> None:
        """End it where it stands, as `kill -9` does."""
        os.kill(self.pid, signal.SIGKILL)
        self.at = self._arrived()

    def finish(self) -> Ran:
        """Let it run to its end."""
        while self.at is not None:
            self.go()
        return self.ran

    @property
    def ran(self) -> Ran:
        """What it left behind."""
        assert self._end is not None
        return self._end

    def _arrived(self) -> str | None:
        try:
            stopped: str = self._pipe.recv()
        except EOFError:
            self._pipe.close()
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._end = Ran(code, *(_content(file) for file in self._written))
            return None
        return stopped


class Desk:
    """One key of its own in a folder of its own, for two markets, and what KIS saw of it."""

    def __init__(self, kis: Kis, base: Path) -> None:
        """Take a new key and name the folder; the product makes it."""
        self.key = f"PSfault{next(_keys):029d}"
        self.folder = base / f"desk-{self.key[-5:]}" / "tokens"
        self.kis, self.clock = kis, kis.clock
        self.clock.set(START)
        self.user = 0  # who runs the commands, where it is not the one who runs the tests
        self._started: list[Stepped] = []
        self._secrets = forms(self.key) | forms(APP_SECRET) | {b"eyJ"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._started:
            if process.at is not None:
                process.kill()
        assert kind or not self._leaks(), "\n".join(self._leaks())

    def _leaks(self) -> list[str]:
        """What its commands wrote and should not have; a token is for standard output, alone."""
        said = [process.ran.err for process in self._started]
        said += [process.ran.out for process in self._started if not process.ran.out.startswith("eyJ")]
        return [text for text in said if self.finds_secret(text.encode())]

    def finds_secret(self, content: bytes) -> bool:
        """Whether the app key, its secret or a token is in there, in whichever dress."""
        return any(form in content for form in self._secrets)

    def start(self, *arguments: str, work: Callable[[], int] | None = None, **variables: str) -> Stepped:
        """A command, or other `work`, in a process before its first call; `variables` go beside its settings."""
        nowhere = {f"KIS_MARKETS__{market.upper()}__EXCHANGES": "[]" for market in MARKETS}  # no session forbids a swap
        settings = {
            "KIS_TOKEN_DIR": str(self.folder),
            "KIS_BASE_URL": self.kis.url,
            "KIS_APP_KEY": self.key,
            "KIS_APP_SECRET": APP_SECRET,
            **nowhere,
        }
        doing = work or (lambda: cli.main(arguments))
        doing = _as_user(self.user, doing) if self.user else doing
        process = Stepped(doing, self.folder, self.clock, **settings | variables)
        self._started.append(process)
        return process

    def run(self, *arguments: str, work: Callable[[], int] | None = None, **variables: str) -> Ran:
        """A command, run to its end in a process of its own."""
        return self.start(*arguments, work=work, **variables).finish()

    def calls(self, *arguments: str) -> list[str]:
        """The calls that a command makes, in their order."""
        process, made = self.start(*arguments), []
        while process.at is not None:
            made.append(process.at)
            process.go()
        assert process.ran.code == 0, process.ran
        return made

    def tokens(self) -> dict[str, str | None]:
        """What stands in the key's file and in the markets', by name; None for a file that is missing or damaged."""
        found: dict[str, str | None] = {f"{market}_api_token.json": None for market in MARKETS}
        found[self.key_file.name] = None
        for name in found:
            content = self.content(name)
            found[name] = content["access_token"] if content else None
        return found

    def content(self, name: str) -> dict[str, str] | None:
        """A token file's fields; None where it is missing or damaged."""
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    @property
    def key_file(self) -> Path:
        """The key's own file, whether it is there or not."""
        return self.record.with_suffix(".json")

    @property
    def record(self) -> Path:
        """The issuance record, whether it is there or not."""
        from tokencore.config.market import fingerprint  # the product's own names

        return self.folder / f"key-{fingerprint(self.key, self.kis.url)}.jsonl"

    def last_line(self) -> tuple[str, str | None]:
        """The record's last outcome and code."""
        line = json.loads(self.record.read_text(encoding="utf-8").splitlines()[-1])
        return line["outcome"], line["code"]

    def saved(self) -> Callable[[], None]:
        """How folder, key and clock are now; the call brings that back."""
        kept, true, restore = self.folder.with_name("kept"), self.clock.true, self.kis.saved(self.key)
        if self.folder.exists():
            shutil.copytree(self.folder, kept)

        def back() -> None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if kept.exists():
                shutil.copytree(kept, self.folder)
            self.clock.set(true)
            restore()

        return back

    @property
    def asked(self) -> list[Asked]:
        """Every request of the key that reached tokenP."""
        return self.kis.asked.get(self.key, [])

    @property
    def granted(self) -> list[str]:
        """The tokens that KIS issued, oldest first."""
        return [asked.token for asked in self.asked if asked.outcome == "new" and asked.token]

    def hurried(self) -> list[float]:
        """The seconds between two requests, where that is less than KIS's minute."""
        gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(self.asked)]
        return [gap for gap in gaps if gap < MINUTE]

    def served(self) -> set[str]:
        """The tokens that a fresh process gets for the markets, all of them from KIS."""

        def both() -> int:
            return max(cli.main(("get", market)) for market in MARKETS)

        ran = self.run(work=both)
        assert ran.code == 0, ran
        return set(ran.out.split())

    def untidy(self) -> Iterator[str]:
        """What is wrong after the next day's renewal, when only private files of the contract stand in the folder."""
        self.clock.true += 1.1 * DAY
        if self.served() != {self.granted[-1]}:
            yield "the next day's processes did not get one new token"
        for path in self.folder.iterdir():
            if not path.name.endswith(ENDS) or stat.S_IMODE(path.stat().st_mode) != 0o600:
                yield f"left over: {path.name} of mode {stat.S_IMODE(path.stat().st_mode):o}"
            if not path.name.endswith(HOLDERS) and self.finds_secret(path.read_bytes()):
                yield f"a secret stands in {path.name}"
        if self.hurried():
            yield f"KIS was asked twice within its minute: {self.hurried()}"


def needs_space(call: str) -> bool:
    """Whether a full disk refuses the call: what exists can be opened, read, renamed and deleted."""
    return call.startswith(("write", "mkdir", "fsync")) or (
        call.endswith(".tmp") and not call.startswith(("unlink", "lstat", "close"))
    )


def desks() -> Iterator[Callable[[], Desk]]:
    """A gateway and a place for folders, from which a test makes as many desks as it likes."""
    _preload()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a disk's own fsync proves nothing here
    with tempfile.TemporaryDirectory(dir=memory) as base, Kis(Clock()) as kis:
        yield lambda: Desk(kis, Path(base))


def _preload() -> None:
    """Import all that a command may import, once, so that every process starts with it."""
    for room in pkgutil.walk_packages(tokencore.__path__, "tokencore."):
        if not room.name.endswith("__main__"):
            importlib.import_module(room.name)
    for late in ("filelock", "binascii", "_strptime", "encodings.ascii", "encodings.idna", "holidays"):
        importlib.import_module(late)


def _as_user(number: int, work: Callable[[], int]) -> Callable[[], int]:
    """The same work, without the rights of root."""

    def changed() -> int:
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)
        return work()

    return changed


def _content(file: Any) -> str:  # noqa: ANN401 - a temporary file has no public type
    with file:
        file.seek(0)
        text: str = file.read().decode()
        return text


def _live(
    work: Callable[[], int], folder: str, pipe: Connection, descriptors: list[int], settings: Mapping[str, str]
) -> None:
    """The life of the process: its output into files, its calls watched, its end without the parent's clean-up."""
    code = 99
    gc.disable()  # a collection would copy all that the parent has in memory
    try:
        for standard, own in enumerate(descriptors, 1):
            os.dup2(own, standard)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - to the end
        os.environ.update(settings)
        time.tzset()
        logging.root.handlers.clear()  # those of pytest: warnings go to standard error, as in a program of its own
        random.seed(0)  # how long one waits must not be chance
        file_store._unsaved.clear()  # noqa: SLF001 - a new process has kept nothing
        _Watch(folder, pipe).begin()
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class _Watch:
    """Stands between the process and the system: asks the parent before each call on the folder or a socket."""

    def __init__(self, folder: str, pipe: Connection) -> None:
        self._folder = folder
        self._pipe = pipe
        self._names: dict[int, str] = {}  # of open descriptors
        self._order = Order(START, START)

    def begin(self) -> None:
        """Replace what the process calls; the first stop tells it the time."""
        self.stop("start")
        self.on(fcntl, "flock", self._descriptor)
        for name in ON_PATHS:
            self.on(os, name, self._path)
        for name in ON_DESCRIPTORS:
            self.on(os, name, self._descriptor)
        for name in ON_SOCKETS:
            self.on(socket.socket, name, lambda _: "socket")
        self._tell_time()
        threading.Thread.start = threading.Thread.run  # type: ignore[method-assign]
        threading.Thread.join = lambda *_: None  # type: ignore[method-assign]

    @property
    def now(self) -> float:
        """What the machine's clock shows, in epoch seconds."""
        return self._order.wall

    def stop(self, what: str) -> Order:
        """Wait for the parent's order; the fault it asks for is raised."""
        self._pipe.send(what)
        try:
            self._order = self._pipe.recv()
        except EOFError:
            os._exit(98)
        return self._order

    def on(self, owner: Any, name: str, watched: Callable[[tuple[Any, ...]], str | None]) -> None:  # noqa: ANN401 - patched
        """Ask before each call of `owner.name` that is `watched`, under the name of its file."""
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the system's
            place = watched(args)
            if place is None:
                return real(*args, **kwargs)
            if name == "recv_into":  # the stop comes when KIS has answered, so that its clock stands still meanwhile
                select.select([args[0]], [], [], 1)
            order = self.stop(f"{name} {place}")
            if order.error and name != "close":
                raise OSError(order.error, os.strerror(order.error))
            if order.torn:
                args = args[0], args[1][: len(args[1]) // 2]
            result = real(*args, **kwargs)
            if name == "write":  # the system's own clock is not the test's
                _utime(args[0], (self.now, self.now))
            if name == "open":
                self._names[result] = place
            if name == "close":
                self._names.pop(args[0] if isinstance(args[0], int) else -1, None)
                if order.error:  # a failed close has closed anyway
                    raise OSError(order.error, os.strerror(order.error))
            return result

        setattr(owner, name, call)

    def _path(self, args: tuple[Any, ...]) -> str | None:
        """The name of what is called; None for what is not in the folder, as the folders above it."""
        if args and isinstance(args[0], int):
            return self._descriptor(args)
        path = str(os.fspath(args[0])) if args else ""
        inside = path.startswith(self._folder) and not path.endswith("..")
        return os.path.relpath(path, self._folder) if inside else None

    def _descriptor(self, args: tuple[Any, ...]) -> str | None:
        return self._names.get(args[0])

    def _tell_time(self) -> None:
        def sleep(seconds: float) -> None:
            self.stop(f"sleep {max(0.0, seconds)}")

        time.sleep = sleep  # type: ignore[assignment]  # a plain number is all that is asked for
        time.time = lambda: self._order.wall
        time.time_ns = lambda: int(time.time() * 1e9)
        time.monotonic = time.perf_counter = lambda: self._order.monotonic
        for name, module in list(sys.modules.items()):
            if name.startswith("tokencore") and getattr(module, "datetime", None) is datetime:
                module.__dict__["datetime"] = _Datetime


class _AsDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


class _Datetime(datetime, metaclass=_AsDatetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # what it gives is a plain datetime
        return datetime.fromtimestamp(time.time(), tz)
