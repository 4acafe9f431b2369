"""What the flows have in common: when a run was due, which errors may leave it, when Prefect tries again."""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zoneinfo import ZoneInfo

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from tokencore import IssuerUnavailableError, TokenError, sessions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import date, datetime, timedelta

    from prefect import Flow, State, Task
    from prefect.client.schemas.objects import TaskRun
    from prefect.logging.loggers import LoggingAdapter

    from tokencore import TokenManager

KST = ZoneInfo("Asia/Seoul")  # the time of KIS's own notices
MARGIN = 5.0  # seconds after a cool-down before Prefect tries again
QUICK, SLOW = 65 / 60, 5.0  # issue intervals between attempts: the first three, and those after
TRIES = 20  # of Prefect in one run; enough for 45 minutes of KIS being down
AnyFlow = TypeVar("AnyFlow", bound="Flow[..., Any]")


class UnforeseenError(Exception):
    """An error that nobody planned for. Only its kind and place are told: its own text may hold anything."""


SAFE = (TokenError, UnforeseenError)  # what `safe_errors` lets out


@contextlib.contextmanager
def safe_errors() -> Iterator[None]:
    """Let errors out only with texts that Prefect may store in clear, and without the errors behind them."""
    try:
        yield
    except TokenError as error:
        raise error from None
    except Exception as error:  # noqa: BLE001 - whatever it is, its text must not reach Prefect's database
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        raise UnforeseenError(f"Unexpected {type(error).__name__} at {place}; its text is withheld.") from None


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Let nothing out that would change how a run ends; the log gets `what` and the error's kind, never its text."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
        logger().warning("%s: %s.", what, type(error).__name__)


def due() -> datetime:
    """When this run was scheduled to start, aware; for a run that somebody started, that moment."""
    scheduled: datetime = flow_run.scheduled_start_time
    return scheduled


def described(made: AnyFlow) -> AnyFlow:
    """The flow, its docstring as the page wants it: Markdown with a line a paragraph; the form shows the arguments."""
    text, _, _ = (made.description or "").partition("\n\nArgs:")
    made.description = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return made


def check_name(at: datetime) -> str:
    """What the check that is due then (aware) is called, before it starts and after."""
    return f"check-tokens {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def warm_up_name(exchange: str, at: datetime) -> str:
    """What the warm-up of an exchange that is due then (aware) is called, before it starts and after."""
    return f"warm-up {exchange} {local_date(exchange, at)}"


def local_date(exchange: str, at: datetime) -> date:
    """The date in the exchange's zone."""
    return at.astimezone(ZoneInfo(sessions.exchange(exchange).zone)).date()


def parameters() -> dict[str, Any]:
    """The parameters of this run."""
    given: dict[str, Any] = flow_run.parameters
    return given


def logger() -> logging.Logger | LoggingAdapter:
    """The run's logger, whose lines show in the UI; outside of a run a plain one."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("flows")


def retry_delays(interval: float, span: timedelta) -> list[float]:
    """The pauses between Prefect's attempts, in seconds, as many as end within `span`.

    They follow the renewal rule, 65 s three times and then 5 min, stretch with the issue `interval`
    (seconds, KIS's is 60), and never end inside the cool-down of the attempt before.
    """
    quick, slow = QUICK * interval + MARGIN, SLOW * interval + MARGIN
    delays: list[float] = []
    for delay in [quick] * 3 + [slow] * (TRIES - 3):
        if sum(delays) + delay > span.total_seconds():
            break
        delays.append(delay)
    return delays


def kis_is_down(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether Prefect shall try again: only where KIS gave no token, never after a limit or a refusal."""
    return isinstance(state.data, IssuerUnavailableError)


def each_key(step: Task[..., Any], keys: list[TokenManager], span: timedelta, *more: object) -> dict[str, Any]:
    """What a task made of each key, or the error it met, by the key's markets.

    The keys go side by side: one that waits for KIS keeps no other waiting. `span` is how long Prefect tries again;
    the task gets the market, `more`, and after how many seconds that is.
    """
    futures = {}
    for manager in keys:
        delays = retry_delays(manager.market.issue_interval, span)
        again = step.with_options(retries=len(delays), retry_delay_seconds=delays)
        futures["+".join(manager.sharing())] = again.submit(manager.market.name, *more, delays[0] if delays else None)
    return {markets: future.result(raise_on_failure=False) for markets, future in futures.items()}


def failures(results: Mapping[str, object]) -> str:
    """The sentences of the keys that failed; empty when none did."""
    failed = {markets: str(result) for markets, result in results.items() if isinstance(result, Exception)}
    return " ".join(
        failed.values() if len(results) == 1 else (f"{markets}: {told}" for markets, told in failed.items())
    )


def clock(at: datetime) -> str:
    """A time for people, in KST."""
    return at.astimezone(KST).strftime("%Y-%m-%d %H:%M KST")
