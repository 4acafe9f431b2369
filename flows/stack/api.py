"""A client of Prefect's REST API, for what must be quick or work where Prefect does not: it does not import Prefect."""

from __future__ import annotations

import base64
import time
from datetime import UTC, datetime
from typing import Any

import requests
from requests import codes
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

POOL = "tokens"  # as prefect.yaml names it
CHECK, REFRESH = "check-tokens/check_tokens", "refresh-token/refresh_token"
CHECKED = ("Completed", "AlreadyValid", "Renewed", "Failed")  # the final states of checks that did their work
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PATIENCE = 300.0  # seconds for a start, or a run: two idle cores take 14 for the first start of the server alone
# With SQLite under load, the server answers 503:
BUSY = Retry(5, connect=0, read=0, status_forcelist=[503], allowed_methods=None, backoff_factor=0.2)


class StackError(Exception):
    """Something of the stack failed; the message says what, and what to do. The command ends with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """Take the message and the exit code."""
        super().__init__(message)
        self.exit_code = exit_code


class Api:
    """The API of the server at `url`; all methods but `answers` raise StackError if there is no usable answer."""

    def __init__(self, url: str, password: str | None, timeout: float = 30) -> None:
        """Send nothing yet; `password` is `user:password`, `timeout` the seconds for each answer."""
        self.url = url
        self._timeout = timeout
        self._http = requests.Session()
        self._http.mount("http://", HTTPAdapter(max_retries=BUSY))
        self._http.headers["Connection"] = "close"  # the server hangs up after a 503: a retry needs a new connection
        self._http.trust_env = False  # no proxy stands between this machine and itself
        if password:
            self._http.headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"

    def ask(self, method: str, path: str, content: object = None) -> Any:  # noqa: ANN401 - as JSON is
        """Send a request and return the content of the server's JSON answer.

        Raises:
            StackError: the server refuses the password or the request, or gives no answer in time.
        """
        try:
            answer = self._http.request(method, f"{self.url}/api/{path}", json=content, timeout=self._timeout)
            if answer.status_code == codes.unauthorized:
                raise StackError(
                    "Prefect's server refuses the password; "
                    "set PREFECT_SERVER_API_AUTH_STRING as it was when the server started."
                )
            answer.raise_for_status()
            return answer.json() if answer.content else None
        except requests.RequestException as error:
            raise StackError(
                f"Prefect's server at {self.url} gave no useful answer to {method} {path}: {type(error).__name__}."
            ) from None

    def answers(self, path: str) -> bool:
        """Whether the server answers successfully within a few seconds."""
        try:
            return self._http.get(f"{self.url}/api/{path}", timeout=5).ok
        except requests.RequestException:
            return False

    def wait(self) -> None:
        """Return as soon as the server is ready: supervisord starts all parts at once.

        Raises:
            StackError: it is not ready after `PATIENCE`.
        """
        give_up = time.monotonic() + PATIENCE
        while not self.answers("ready"):
            if time.monotonic() > give_up:
                raise StackError(f"Prefect's server at {self.url} does not answer.")
            time.sleep(0.5)

    def runs(self, **conditions: object) -> list[dict[str, Any]]:
        """Return the runs of our pool that meet these conditions of Prefect's filter, in the order they are due."""
        asked = {"flow_runs": conditions, "work_pools": {"name": {"any_": [POOL]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found: list[dict[str, Any]] = self.ask("POST", "flow_runs/filter", asked)
        return found

    def deployment(self, name: str) -> dict[str, Any]:
        """Return the deployment named `flow/deployment`."""
        found: dict[str, Any] = self.ask("GET", f"deployments/name/{name}")
        return found

    def create_run(self, deployment: str, **parameters: object) -> str:
        """Create a run of the deployment, due now, and return its id."""
        flow, _, _ = deployment.partition("/")
        name = f"{flow} {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"  # until it starts; Prefect would choose a random one
        asked = {"parameters": parameters, "name": name}
        made: str = self.ask("POST", f"deployments/{self.deployment(deployment)['id']}/create_flow_run", asked)["id"]
        return made

    def run_to_end(self, deployment: str, patience: float = PATIENCE, /, **parameters: object) -> dict[str, Any]:
        """Run the deployment `flow/deployment` to its end; return the final state with `type`, `name` and `message`.

        Raises:
            StackError: it has not ended after `patience` seconds, and goes on; or the server gives no useful answer.
        """
        run, give_up = self.create_run(deployment, **parameters), time.monotonic() + patience
        while time.monotonic() < give_up:
            state: dict[str, Any] = self.ask("GET", f"flow_runs/{run}")["state"] or {}
            if state.get("type") in FINAL:
                return state
            time.sleep(0.5)
        raise StackError(f"The run of {deployment} did not end within {patience:.0f} s.")

    def set_state(self, run: str, kind: str, name: str, message: str) -> None:
        """Put a run into a state, even if Prefect's rules would not allow it."""
        state = {"type": kind, "name": name, "message": message}
        self.ask("POST", f"flow_runs/{run}/set_state", {"state": state, "force": True})

    def last_check(self) -> tuple[str, datetime] | None:
        """Return how and when (aware) the newest check that did its work ended; None before there was one."""
        asked = {
            "flows": {"name": {"any_": [CHECK.partition("/")[0]]}},
            "flow_runs": {"state": {"name": {"any_": [*CHECKED]}}},
            "sort": "END_TIME_DESC",
            "limit": 1,
        }
        found = self.ask("POST", "flow_runs/filter", asked)
        return (found[0]["state_name"], datetime.fromisoformat(found[0]["end_time"])) if found else None
