"""Helpers for the real command, real processes and real token files: run them and read what they leave behind."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders import make_token

from tokencore import IssuanceLimitError, Key, Settings, TokenError, TokenManager
from tokencore.attempts import Attempt
from tokencore.sandbox import Sandbox
from tokencore.tokens import Token

DAY = 86_400.0  # seconds


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Ran]  # the fixture `command`
Opens = Callable[[timedelta], str]  # the fixture `opens`


def tokencore(*arguments: str, **settings: str) -> Ran:
    """Run `python -m tokencore` to its end, with `settings` added to the environment."""
    command = [sys.executable, "-m", "tokencore", *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def start(program: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Start a Python program, given as text, with pipes to its standard input, output and error."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, env=os.environ | settings, **pipes)


def forked(count: int, work: Callable[[int], object]) -> list[Any]:
    """Run `work` at once in `count` forked processes, and return what each returned, or its error as text."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.SimpleQueue()

    def run(number: int) -> None:
        barrier.wait()
        try:
            results.put(work(number))
        except Exception as error:  # noqa: BLE001 - the test compares it
            results.put(repr(error))

    processes = [context.Process(target=run, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def until(happened: Callable[[], bool], within: float = 30) -> float:
    """Wait for something to happen, and return how many seconds it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - began


def asked(gateway: Sandbox) -> int:
    """Return how many requests have reached tokenP."""
    count: int = gateway.stats()["token_requests"]
    return count


def on_disk(market: str = "us") -> Token:
    """Return the market's token as it is on disk."""
    token = TokenManager(market).load_token()
    assert token is not None
    return token


def cached(left: float = DAY) -> Token:
    """Save a token for us and kr that has `left` seconds of its day to live; return it."""
    TokenManager("us").save_token(make_token(DAY, age=DAY - left))
    return on_disk()


def one_line(ran: Ran) -> str:
    """Return the sentence on standard error, which must be one line without a traceback, with no other output."""
    assert ran.out == ""
    assert re.fullmatch(r"tokencore: [^\n]+[.!]\n", ran.err), ran.err
    return ran.err


def issue_of(token: Token) -> datetime:
    """Return when the token was issued."""
    assert token.issued_at is not None
    return token.issued_at


def outcomes() -> list[str]:
    """Return the outcomes of all attempts in the issuance record of us."""
    return [attempt.outcome.value for attempt in TokenManager("us").history()]


def folder() -> Path:
    """Return the path of the token directory."""
    return Path.home() / ".tokencore"


def raised(work: Callable[[], object]) -> TokenError:
    """Return the `TokenError` that `work` must raise."""
    with pytest.raises(TokenError) as caught:
        work()
    return caught.value


def limited(work: Callable[[], object]) -> tuple[str | None, datetime | None]:
    """Return which limit `work` runs into, and when it ends."""
    error = raised(work)
    assert isinstance(error, IssuanceLimitError), error
    return error.cause, error.retry_at


def record(*attempts: Attempt) -> None:
    """Add attempts to the first key's record."""
    store = Key.load(Settings.load())[0].store
    with store.lock(wait=5):
        for attempt in attempts:
            store.note(attempt)


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return everything about a folder and its contents that a write would change."""
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode) for path, s in found.items()}
