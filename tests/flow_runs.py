"""Key states at a given moment, and flow runs on a real Prefect server, run to their end in this process."""

import contextlib
import contextvars
import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast
from uuid import UUID

from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from flows import upcoming
from flows.refresh_token import refresh_token
from tokencore import Key, KeyState, Settings
from tokencore.attempts import Attempt, Outcome
from tokencore.tokens import Token


def run(
    flow: Flow[..., State],
    name: str | None = None,
    tags: Sequence[str] = (),
    ago: timedelta = timedelta(0),
    **parameters: object,
) -> State:
    """Run the flow, which was due some time `ago`, and return the run's final state."""
    due: State[Any] = Scheduled(scheduled_time=datetime.now(UTC) - ago)
    with get_client(sync_client=True) as client:
        made = client.create_flow_run(flow, name=name, tags=tags, parameters=parameters, state=due)
    return cast("State", run_flow(flow, flow_run=made, parameters=parameters, return_type="state"))


def only_key() -> Key:
    """Return the key that all markets share."""
    (key,) = Key.load(Settings.load())
    return key


def attempted(text: str, now: datetime) -> list[Attempt]:
    """Parse attempts such as `issued 60, limit 0`: each outcome, and its minutes before `now`."""
    words = [one.split() for one in text.split(", ") if one]
    return [Attempt(now - timedelta(minutes=float(ago)), Outcome(outcome), "EGW0") for outcome, ago in words]


def state_of(now: datetime, token: Token | None = None, past: str | Sequence[Attempt] = ()) -> KeyState:
    """Return the state of the only key with this token and this record of attempts."""
    key = only_key()
    key.market.settings.issue_interval = 60  # whatever the gateway of this process has
    known = attempted(past, now) if isinstance(past, str) else past
    own = [one._replace(credentials=key.market.credentials_digest) for one in known]
    return KeyState(key, now, token, "", own)


def end_of(state: State) -> tuple[str, str]:
    """Return the state's type and name."""
    return state.type.value, str(state.name)


def refreshed(market: str = "us", **given: Any) -> State:  # noqa: ANN401 - the form's fields
    """Run a refresh that nobody has to confirm, and return its final state."""
    return run(refresh_token, market=market, **given)


class Waiting(NamedTuple):
    """A refresh that waits for a person: the run, the question on its page, and its end as a future."""

    run: UUID
    question: str
    end: Future[State]

    def answer(self, decision: str) -> State:
        """Resume the run with a person's decision, as the page does, and return its final state."""
        with get_client(sync_client=True) as client:
            client.resume_flow_run(self.run, run_input={"decision": decision})
        return self.end.result()


@contextlib.contextmanager
def paused(**given: Any) -> Iterator[Waiting]:  # noqa: ANN401 - the form's fields
    """Start a refresh, and yield it once it has paused to ask a person."""
    with ThreadPoolExecutor(1) as pool, get_client(sync_client=True) as client:
        end = pool.submit(contextvars.copy_context().run, functools.partial(refreshed, **given))
        found: list[tuple[UUID, str]] = []
        while not found:
            assert not end.done(), f"no run waits for a person: {end.result()}"
            time.sleep(0.1)
            with contextlib.suppress(PrefectHTTPStatusError):  # the question is stored a moment after the pause
                found = [
                    (one.id, client.request("GET", f"/flow_runs/{one.id}/input/{keys['description']}").json())  # type: ignore[arg-type]
                    for one in client.read_flow_runs()
                    if (keys := one.state and one.state.is_paused() and one.state.state_details.run_input_keyset)
                ]
        yield Waiting(*found[0], end)


def planned_runs() -> dict[str, list[datetime | None]]:
    """Return the times of the scheduled renewals by the key's label."""
    found: dict[str, list[datetime | None]] = {}
    with get_client(sync_client=True) as client:
        for one in client.read_flow_runs():
            if upcoming.TAG in one.tags and one.state and one.state.is_scheduled():
                (label,) = (tag for tag in one.tags if tag not in (upcoming.TAG, "check") and "key " not in tag)
                found.setdefault(label, []).append(one.expected_start_time)
    return found
