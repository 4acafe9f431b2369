"""One line of the doctor's report."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

UNEXPECTED, SETTINGS, NO_TOKEN, CREDENTIALS, UNREACHABLE, STORE = 1, 2, 3, 5, 6, 7  # exit codes, as of the commands


class State(StrEnum):
    """How a thing is; the command's exit code is the first `fail`'s own, or 1 where there are warnings alone."""

    OK = "ok"
    WARN = "warn"  # it works, but something is to be done
    FAIL = "fail"
    SKIPPED = "skipped"  # it could not be looked at, or is not used


class Finding(NamedTuple):
    """What was looked at, how it is, what that means, and the cure; `exit_code` is a failure's."""

    name: str
    state: State
    detail: str
    cure: str = ""
    exit_code: int = 0


def ok(name: str, detail: str) -> Finding:
    """All is well."""
    return Finding(name, State.OK, detail)


def warn(name: str, detail: str, cure: str) -> Finding:
    """It works, but a person should do something."""
    return Finding(name, State.WARN, detail, cure)


def fail(name: str, detail: str, cure: str, exit_code: int = UNEXPECTED) -> Finding:
    """It does not work."""
    return Finding(name, State.FAIL, detail, cure, exit_code)


def skipped(name: str, detail: str, cure: str = "") -> Finding:
    """It was not looked at, and why."""
    return Finding(name, State.SKIPPED, detail, cure)
