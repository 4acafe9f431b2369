"""A Prefect server of one's own, with everything that runs on it: deployments, automations, a worker."""

from __future__ import annotations

import contextlib
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows.stack import leftovers, surroundings
from flows.stack.api import Api
from flows.stack.crew import CrewError
from flows.stack.leftovers import POOL, WORKER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flows.stack.crew import Crew

CHECK = "check-tokens/check_tokens"
REFRESH = "refresh-token/refresh_token"
CHECKED = ("Completed", "AlreadyValid", "Renewed", "Failed")  # the names of its states where it did its work
ARTIFACTS = ("tokens", "plan")  # what that run publishes; flows.board has the names too, but loads all of Prefect
PATIENCE = 300.0  # seconds for each step: two idle cores take 14 for the longest, the first start of the server
GRACE = 10.0  # seconds that runs in flight get to end by themselves
DEPLOY_TRIES = 3  # SQLite under load makes the server answer 503; Prefect's own client asks six times, then gives up
WORKER_START = ("worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER)
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Prefect:
    """A server and a worker with all deployments and automations.

    Attributes:
        url: the address of the server's page.

    """

    def __init__(self, crew: Crew, home: Path, environment: Mapping[str, str]) -> None:
        """Start nothing yet. The worker gets `environment`, with what makes Prefect stay in `home` and on this machine.

        Raises:
            ConfigurationError: the port or the database's address cannot be.

        """
        self.url = surroundings.address(environment)
        self._crew = crew
        self._server = surroundings.for_server(home, environment)
        self._worker = surroundings.for_worker(home, environment)
        self._api = Api(self.url, surroundings.password(home, environment))

    def start(self) -> None:
        """Start all; returns when the deployments can be run.

        Raises:
            CrewError: a part of it could not be had.
            EndedError: the crew was asked to end.

        """
        server = self._crew.start("server", _prefect("server", "start"), self._server)
        self._crew.wait(lambda: self._api.answers("ready"), "its first answer", PATIENCE, of=server)
        self.bury()
        self.skip_overdue()
        # The worker makes the pool where there is none, and leaves alone what people set in one that there is.
        worker = self._crew.start("worker", _prefect(*WORKER_START), self._worker)
        self._crew.wait(lambda: self._api.answers(f"work_pools/{POOL}"), "its work pool", PATIENCE, of=worker)
        # Of the settings, the form of refresh_token gets the names of the markets; there are no values in it.
        deploy = [sys.executable, "-m", "flows.stack", "deploy"]
        self._crew.run("deploy", deploy, self._worker, PATIENCE, tries=DEPLOY_TRIES)

    def bury(self) -> None:
        """End the runs whose process died; only while no worker is starting one.

        Raises:
            CrewError: the server could not be asked.

        """
        leftovers.bury(self._api)

    def skip_overdue(self) -> None:
        """Skip what was missed during a pause of this machine, and which a later run does as well.

        Raises:
            CrewError: the server could not be asked.

        """
        leftovers.skip_overdue(self._api, CHECK)

    def form(self) -> str:
        """Where in the browser a person renews a token.

        Raises:
            CrewError: the server could not be asked.

        """
        return form(self._api)

    def check(self) -> None:
        """Let the check run, without waiting for its end.

        Raises:
            CrewError: the server could not be asked.

        """
        self._create(CHECK, {})

    def stop(self) -> None:
        """Let runs in flight end, then the worker; cancel what still runs then, so that nothing stays `Running`."""
        leftovers.drain(self._api, GRACE)
        self._crew.stop("worker")
        leftovers.cancel(self._api)

    def run(self, deployment: str, **parameters: object) -> dict[str, Any]:
        """Run a deployment, named `flow/deployment`, to its end; the final state with `type`, `name` and `message`.

        Raises:
            CrewError: it did not end in time, or could not be created.
            EndedError: the crew was asked to end.

        """
        made = self._create(deployment, parameters)
        state: dict[str, Any] = {}

        def ended() -> bool:
            with contextlib.suppress(CrewError):  # a busy server may miss a question; the next one is soon
                state.update(self._api.ask("GET", f"flow_runs/{made['id']}")["state"] or {})
            return state.get("type") in FINAL

        self._crew.wait(ended, f"the end of the run of {deployment}", PATIENCE)
        return state

    def _create(self, deployment: str, parameters: Mapping[str, object]) -> Any:  # noqa: ANN401 - as JSON is
        found = self._api.ask("GET", f"deployments/name/{deployment}")
        flow, _, _ = deployment.partition("/")
        name = f"{flow} {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"  # until it starts; else Prefect makes up a random one
        asked = {"parameters": parameters, "name": name}
        return self._api.ask("POST", f"deployments/{found['id']}/create_flow_run", asked)


def addresses(url: str) -> dict[str, str]:
    """Where in the browser to look, by name, for the server at `url`."""
    shown = {name: f"{url}/artifacts/key/{name} (click its newest entry)" for name in ARTIFACTS}
    return {"page": url} | shown


def form(api: Api) -> str:
    """Where in the browser a person renews a token: the list of deployments has it on its second page.

    Raises:
        CrewError: the server could not be asked.

    """
    return f"{api.url}/deployments/deployment/{api.ask('GET', f'deployments/name/{REFRESH}')['id']}/run"


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]
