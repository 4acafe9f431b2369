"""What the flows share: which errors may leave a run, when Prefect retries, one step per key, and times."""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from prefect.exceptions import FailedRun, MissingContextError
from prefect.logging import get_run_logger

from tokencore import CredentialsError, IssuanceLimitError, IssuerUnavailableError, Key, TokenError, sessions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import date, timedelta

    from prefect import Flow, State, Task
    from prefect.client.schemas.objects import TaskRun
    from prefect.logging.loggers import LoggingAdapter

    from tokencore import KeyState

KST = ZoneInfo("Asia/Seoul")  # the time of KIS's own notices
MARGIN = 5.0  # seconds after a cool-down before Prefect tries again
REFUSED_IN_QUOTES = {"EGW00103": "app key", "EGW00105": "app secret"}
TRIES = 20  # Prefect's retries in one run; enough for 45 minutes while KIS is down
AnyFlow = TypeVar("AnyFlow", bound="Flow[..., Any]")


class UnforeseenError(Exception):
    """An unexpected error, reported by its type and place only, because its own text may contain anything."""


SAFE = (TokenError, UnforeseenError)  # what `safe_errors` raises


class Done(NamedTuple):
    """The result of a step for one key."""

    state: KeyState  # the key's state after the step
    renewed: bool = False  # whether the step issued a token
    remark: str = ""  # what else there is to say
    trouble: TokenError | None = None  # why a renewal failed, or will fail, if the token still serves

    @property
    def said(self) -> str:
        """What there is to say, the token first, without the final full stop."""
        parts = self.state.served, str(self.trouble or ""), self.remark
        return "; ".join(part.rstrip(".") for part in parts if part)


class View(NamedTuple):
    """A key as a run leaves it: its state (None if it cannot be read), and the error that the run met."""

    key: Key
    state: KeyState | None
    trouble: Exception | None = None

    @property
    def status(self) -> str:
        """The status that `check` shows."""
        return self.state.status if self.state else "UNREADABLE"


@contextlib.contextmanager
def safe_errors() -> Iterator[None]:
    """Let errors leave the block only with texts that Prefect may store in clear, and without the errors behind them.

    Raises:
        TokenError: as it was raised in the block.
        UnforeseenError: there was any other error.
    """
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
    """Catch errors that would change how a run ends; log `what` and the error's type, never its text."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
        logger().warning("%s: %s.", what, type(error).__name__)


def described(made: AnyFlow) -> AnyFlow:
    """Return the flow with its docstring as Markdown for the UI, a line per paragraph; the form shows the arguments."""
    text, _, _ = (made.description or "").partition("\n\nArgs:")
    made.description = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return made


def local_date(exchange: str, at: datetime) -> date:
    """Return the date in the exchange's zone."""
    return at.astimezone(ZoneInfo(sessions.exchange(exchange).zone)).date()


def logger() -> logging.Logger | LoggingAdapter:
    """Return the run's logger, whose lines appear in the UI, or a plain one outside of a run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("flows")


def clock(at: datetime) -> str:
    """Format a time for people, in KST."""
    return at.astimezone(KST).strftime("%Y-%m-%d %H:%M KST")


def retry_delays(interval: float, span: timedelta) -> list[float]:
    """Return the pauses between Prefect's attempts in seconds, as many as fit into `span`.

    They follow the renewal rule (65 s three times, then 5 min) with `MARGIN` added, stretch with the issue `interval`
    (KIS's is 60 seconds), and never end inside the cool-down of the previous attempt.
    """
    delays: list[float] = []
    for failures in range(1, TRIES + 1):
        delay = Key.retry_delay(failures, interval).total_seconds() + MARGIN
        if sum(delays) + delay > span.total_seconds():
            break
        delays.append(delay)
    return delays


def kis_is_down(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether Prefect retries: only if KIS gave no token, never after a limit or a refusal."""
    return isinstance(state.data, IssuerUnavailableError)


def identity(key: Key) -> str:
    """Return what identifies the key on a server or in a store that installations with other keys use as well."""
    paper = " (paper)" * (key.market.environment == "paper")  # the fingerprint may be that of a real key
    return f"key {key.fingerprint}{paper}"


def borne(state: KeyState, error: Exception) -> bool:
    """Whether the plan can bear the error: KIS gave no token, but the present one serves, and no renewal is due."""
    planned = state.outlook.next
    is_due = planned is not None and planned.at <= state.now
    return isinstance(error, IssuanceLimitError | IssuerUnavailableError) and bool(state.serves_until) and not is_due


def each_key(step: Task[..., Any], keys: Sequence[Key], span: timedelta, *more: object) -> dict[Key, Any]:
    """Run a task for all keys at once, so that none waits for another; return each key's result, or its error.

    Prefect retries for `span`; the task gets the key, `more`, and the seconds until the first retry, None without one.
    """
    futures = {}
    for key in keys:
        delays = retry_delays(key.market.settings.issue_interval, span)
        again = step.with_options(
            retries=len(delays), retry_delay_seconds=delays, task_run_name=f"token of {key.label}"
        )
        futures[key] = again.submit(key, *more, delays[0] if delays else None)
    return {key: future.result(raise_on_failure=False) for key, future in futures.items()}


def failures(results: Mapping[Key, object]) -> str:
    """Return the sentences of the keys that failed, with the key's label if there are several; empty if none failed."""
    failed = {key.label: result for key, result in results.items() if isinstance(result, Exception)}
    return " ".join(f"{label}: {error}" if len(results) > 1 else str(error) for label, error in failed.items())


def views(keys: Sequence[Key], results: Mapping[Key, Done | Exception]) -> list[View]:
    """Return every key as a run leaves it; keys without a step's result are read now."""
    found, done = [], {key.label: result for key, result in results.items()}
    for key in keys:
        result = done.get(key.label)
        if isinstance(result, Done):
            found.append(View(key, result.state, result.trouble))
            continue
        try:
            found.append(View(key, key.state(datetime.now(UTC)), result))
        except TokenError as error:
            found.append(View(key, None, error))
    return found


def proven(state: KeyState) -> Done:
    """Prove the token of `state` by a quote call (KIS_PROVE_TOKENS).

    A token that KIS rejects is marked dead for all processes. The remark says that KIS did not tell whether it accepts
    the token; the trouble, that it refuses the key or its secret, so the next renewal will fail. Without a valid token,
    KIS is not asked.
    """
    if not state.key.market.settings.prove_tokens or state.token is None or state.serves_until is None:
        return Done(state)
    evidence = state.key.prove(state.token)
    if evidence.accepted is False:
        state.key.reject(state.token, state.now)
        return Done(state.key.state(state.now))
    if what := REFUSED_IN_QUOTES.get(evidence.msg_cd):
        message = f"KIS refuses the {what} in a quote call ({evidence.msg_cd}). {state.served}; no renewal can succeed."
        refused = CredentialsError(f"{message} To do: correct the {what}, then run refresh_token.")
        return Done(state, trouble=refused)
    remark = "" if evidence.accepted else f"KIS did not say whether it accepts the token ({evidence.detail})"
    return Done(state, remark=remark)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log only the sentence with which a step or run failed, not the traceback through Prefect and this code."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (*SAFE, FailedRun)):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True


for name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(name).addFilter(_without_traceback)
