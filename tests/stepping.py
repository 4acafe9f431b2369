"""A command in a process of its own that stops before every file and network call, to be told how it goes on.

The process is real, and so are its files, locks, sockets and its death. It is told the time at every stop,
so that a minute's cool-down costs nothing and a clock can be set between any two steps.
"""

from __future__ import annotations

import builtins
import copy
import fcntl
import gc
import importlib
import io
import os
import pkgutil
import select
import signal
import socket
import sys
import tempfile
import time
from datetime import UTC, datetime, tzinfo
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any, NamedTuple

from running import Ran

import tokencore
from tokencore import cache, cli, lock
from tokencore.sandbox import APP_SECRET, Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection
    from pathlib import Path

    from tokencore.sandbox_answers import Answer

START = datetime(2026, 11, 24, 4, tzinfo=UTC).timestamp()
UTIME = os.utime  # before a process watches it
NAP = 1.0  # seconds that every sleep takes at least: a minute of short looks would be thousands of stops
TICK = 0.001  # seconds that every call takes
ON_PATHS = (
    *("stat", "lstat", "open", "mkdir", "unlink", "remove", "rename", "replace", "chmod", "utime", "listdir"),
    *("scandir", "readlink"),
)
ON_DESCRIPTORS = ("read", "write", "fstat", "fsync", "fchmod", "close")
ON_SOCKETS = ("connect", "sendall", "recv_into", "close")


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
        self._clock = clock
        self.asked: dict[str, list[Asked]] = {}

    def saved(self, key: str) -> Callable[[], None]:
        """How the key stands now; the call brings that back."""
        customer, asked = copy.copy(self._customers.get(key)), list(self.asked.get(key, []))

        def restore() -> None:
            self.asked[key] = list(asked)
            self._customers.pop(key, None)
            if customer is not None:
                self._customers[key] = copy.copy(customer)

        return restore

    def expiry(self, token: str) -> float:
        """When a token expires, in epoch seconds."""
        return self._tokens[token].expires

    def issue(self, asked: Mapping[str, Any], now: float) -> Answer:
        """As the gateway, at the time of the test's clock."""
        now = self._clock.true
        answer = super().issue(asked, now)
        entry = Asked(now, answer.outcome, answer.content.get("access_token"))
        self.asked.setdefault(str(asked.get("appkey")), []).append(entry)
        return answer


class Stepped:
    """A process that stands before its next call, named by `at`; None once it has ended."""

    def __init__(self, work: Callable[[], int], folder: Path, clock: Clock, **settings: str) -> None:
        """Start `work`, whose result is the exit code, and stop it before its first call in `folder`."""
        self._clock = clock
        self._pipe, theirs = Pipe()
        self._written = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - for the life of this
        self._end: Ran | None = None
        self.failed = ""  # the call that was last made to fail
        self.pid = os.fork()
        if not self.pid:
            _live(work, str(folder), theirs, [file.fileno() for file in self._written], settings)
        theirs.close()
        self.at = self._arrived()

    def go(self, error: int = 0, *, torn: bool = False) -> str | None:
        """Make the call, or let it fail with `error`, or write only half; the next call is where it stops then."""
        assert self.at is not None
        slept = max(NAP, float(self.at.removeprefix("sleep "))) if self.at.startswith("sleep ") else TICK
        self._clock.true += slept
        self.failed = self.at if error else self.failed
        monotonic = self._clock.true - self._clock.slept
        self._pipe.send(Order(self._clock.shown, monotonic, error, torn))
        self.at = self._arrived()
        return self.at

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


def command(*arguments: str, first: Callable[[], None] | None = None) -> Callable[[], int]:
    """The command line with these arguments, as the work of a process; something else may come first."""

    def work() -> int:
        if first:
            first()
        return cli.main(arguments)

    return work


def as_user(number: int, work: Callable[[], int]) -> Callable[[], int]:
    """The same work, without the rights of root."""

    def changed() -> int:
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)
        return work()

    return changed


def settings(folder: Path, kis: Kis, key: str) -> dict[str, str]:
    """The environment of a process that keeps the token of `key` for two markets, whose sessions forbid nothing."""
    nowhere = {f"KIS_MARKETS__{market}__EXCHANGES": "[]" for market in ("US", "KR")}
    return {
        "KIS_TOKEN_DIR": str(folder),
        "KIS_BASE_URL": kis.url,
        "KIS_APP_KEY": key,
        "KIS_APP_SECRET": APP_SECRET,
        **nowhere,
    }


def preload() -> None:
    """Import all that a command may import, once, so that every process starts with it."""
    for room in pkgutil.walk_packages(tokencore.__path__, "tokencore."):
        if not room.name.endswith("__main__"):
            importlib.import_module(room.name)
    for late in ("filelock", "binascii", "_strptime", "encodings.idna"):  # by functions of rooms and of the library
        importlib.import_module(late)


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
        cache._kept.clear()  # noqa: SLF001 - a new process has kept nothing
        lock._gates.clear()  # noqa: SLF001 - nor does it know any lock
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
        self._open_files()
        self._tell_time()

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
                select.select([args[0]], [], [], 10)
            error = self.stop(f"{name} {place}").error
            if error and name != "close":
                raise OSError(error, os.strerror(error))
            result = real(*args, **kwargs)
            if name == "open":
                self._names[result] = place
            if name == "close":
                self._names.pop(args[0] if isinstance(args[0], int) else -1, None)
                if error:  # a failed close has closed all the same
                    raise OSError(error, os.strerror(error))
            return result

        setattr(owner, name, call)

    def _path(self, args: tuple[Any, ...]) -> str | None:
        if args and isinstance(args[0], int):
            return self._descriptor(args)
        path = os.fspath(args[0]) if args else ""
        return os.path.relpath(path, self._folder) if str(path).startswith(self._folder) else None

    def _descriptor(self, args: tuple[Any, ...]) -> str | None:
        return self._names.get(args[0])

    def _open_files(self) -> None:
        """Let file objects on watched files tell of each read, write and close; opening a name is a call as well."""
        real, watch = builtins.open, self

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the built-in
            place = watch._path((file,))
            if place is None:
                return real(file, mode, *args, **kwargs)
            if not isinstance(file, int) and (error := watch.stop(f"open {place}").error):
                raise OSError(error, os.strerror(error))
            raw = _File(file, mode.replace("b", "").replace("t", ""), watch, place)
            buffered = io.BufferedReader if mode.strip("bt") == "r" else io.BufferedWriter
            binary = io.BufferedRandom(raw) if "+" in mode else buffered(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, kwargs.get("encoding"))

        builtins.open = io.open = opened

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


class _File(io.FileIO):
    def __init__(self, file: Any, mode: str, watch: _Watch, place: str) -> None:  # noqa: ANN401 - a path or a descriptor
        super().__init__(file, mode)
        self._watch, self._place = watch, place
        watch._names[self.fileno()] = place  # noqa: SLF001 - two halves of one thing

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - as inherited
        self._ask("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._ask("read")
        return super().readall()

    def write(self, content: Any) -> int:  # noqa: ANN401 - as inherited
        torn = self._ask("write").torn
        return super().write(bytes(content)[: len(content) // 2] if torn else content)

    def close(self) -> None:
        if not self.closed:
            try:
                self._ask("close")
            finally:
                if self.writable():  # the system's own clock is not the test's
                    UTIME(self.fileno(), (self._watch.now, self._watch.now))
                self._watch._names.pop(self.fileno(), None)  # noqa: SLF001 - two halves of one thing
                super().close()

    def _ask(self, what: str) -> Order:
        order = self._watch.stop(f"{what} {self._place}")
        if order.error:
            raise OSError(order.error, os.strerror(order.error))
        return order


class _AsDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


class _Datetime(datetime, metaclass=_AsDatetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # what it gives is a plain datetime
        return datetime.fromtimestamp(time.time(), tz)
