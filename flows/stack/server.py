"""Prefect as members of a crew: the server on loopback, the deployments of prefect.yaml, a worker."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from flows.stack.crew import CrewError
from tokencore import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.stack.crew import Crew

DEFAULT_PORT = "4200"  # Prefect's own
POOL = "tokens"  # as prefect.yaml names it
CHECK = "check-tokens/check_tokens"
ARTIFACTS = ("tokens", "plan")  # what that run publishes; flows.board has the names too, but loads all of Prefect
PATIENCE = 180.0  # seconds for each step: the longest, the first start of the server, takes 14 s on two idle cores
BUSY = Retry(5, connect=0, read=0, status_forcelist=[503], allowed_methods=None, backoff_factor=0.2)
DEPLOY_TRIES = 3  # SQLite under load makes the server answer 503; Prefect's own client asks six times, then gives up
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PREFECT_FILE = Path(__file__).resolve().parents[2] / "prefect.yaml"

DEFAULTS = {
    # Nobody is called but KIS and Slack; the second version of the page makes the browser ask an analytics host.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # In memory, as is Prefect's default, a slot of a concurrency limit stays taken for ever if the server restarts.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Runs are kept for 90 days, not for ever.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
}


class Prefect:
    """A server and a worker with all deployments.

    Attributes:
        url: the address of the server's page.

    """

    def __init__(self, crew: Crew, home: Path, environment: Mapping[str, str]) -> None:
        """Start nothing yet. The worker gets `environment`, with what makes Prefect stay in `home` and on this machine.

        Raises:
            ConfigurationError: PREFECT_SERVER_API_PORT is no port.

        """
        self.url = f"http://127.0.0.1:{port(environment)}"
        self._crew = crew
        self._environment = _settings(home, environment)
        self._http = requests.Session()
        self._http.mount("http://", HTTPAdapter(max_retries=BUSY))
        self._http.trust_env = False  # no proxy stands between this machine and itself
        if password := self._environment.get("PREFECT_API_AUTH_STRING"):
            user, _, secret = password.partition(":")
            self._http.auth = (user, secret)

    def start(self) -> None:
        """Start all; returns when the deployments can be run.

        Raises:
            CrewError: a part of it could not be had.
            EndedError: the crew was asked to end.

        """
        # The server has no use for credentials.
        public = {k: v for k, v in self._environment.items() if not k.upper().startswith(("KIS_", "SLACK_"))}
        server = self._crew.start("server", _command("server", "start"), public)
        self._crew.wait(lambda: self._answers("ready"), "its first answer", PATIENCE, of=server)
        # The worker makes the pool where there is none, and leaves alone what people set in one that there is.
        worker = self._crew.start("worker", _command("worker", "start", "-p", POOL, "-t", "process"), self._environment)
        self._crew.wait(lambda: self._answers(f"work_pools/{POOL}"), "its work pool", PATIENCE, of=worker)
        # Of the settings, the form of refresh_token gets the names of the markets; there are no values in it.
        deploy = _command("--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE))
        self._crew.run("deploy", deploy, self._environment, PATIENCE, tries=DEPLOY_TRIES)

    def run(self, deployment: str, **parameters: object) -> dict[str, Any]:
        """Run a deployment, named `flow/deployment`, to its end; the final state with `type`, `name` and `message`.

        Raises:
            CrewError: it did not end in time, or the server could not be asked.
            EndedError: the crew was asked to end.

        """
        found = self._ask("GET", f"deployments/name/{deployment}")
        made = self._ask("POST", f"deployments/{found['id']}/create_flow_run", {"parameters": parameters})
        state: dict[str, Any] = {}

        def ended() -> bool:
            state.update(self._ask("GET", f"flow_runs/{made['id']}")["state"] or {})
            return state.get("type") in FINAL

        self._crew.wait(ended, f"the end of the run of {deployment}", PATIENCE)
        return state

    def _ask(self, method: str, path: str, content: object = None) -> Any:  # noqa: ANN401 - as JSON is
        try:
            answer = self._http.request(method, f"{self.url}/api/{path}", json=content, timeout=30)
            answer.raise_for_status()
            return answer.json()
        except requests.RequestException as error:
            raise CrewError(f"The server gave no answer to {method} {path}: {error}") from None

    def _answers(self, path: str) -> bool:
        try:
            return self._http.get(f"{self.url}/api/{path}", timeout=5).ok
        except requests.RequestException:
            return False


def addresses(url: str) -> dict[str, str]:
    """Where in the browser to look, by name, for the server at `url`."""
    shown = {name: f"{url}/artifacts/key/{name} (click its newest entry)" for name in ARTIFACTS}
    return {"page": url} | shown


def port(environment: Mapping[str, str]) -> int:
    """The port of the server.

    Raises:
        ConfigurationError: PREFECT_SERVER_API_PORT is no port.

    """
    text = environment.get("PREFECT_SERVER_API_PORT") or DEFAULT_PORT
    if not text.isdecimal() or not 0 < int(text) < 65536:  # noqa: PLR2004 - ports end there
        raise ConfigurationError(f"PREFECT_SERVER_API_PORT={text} is no port; set a number from 1 to 65535.")
    return int(text)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def _settings(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process of this stack, whichever server or profile it has for other purposes."""
    clean = {k: v for k, v in environment.items() if not k.startswith(("PREFECT_API_", "PREFECT_PROFILE"))}
    address = f"http://127.0.0.1:{port(environment)}"
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port(environment)),
        "PREFECT_SERVER_UI_API_URL": "/api",  # else the page asks port 4200, whatever the port is
        "PREFECT_CLI_PROMPT": "false",
        "no_proxy": ",".join(filter(None, [environment.get("no_proxy") or environment.get("NO_PROXY"), "127.0.0.1"])),
    }
    if password := environment.get("PREFECT_SERVER_API_AUTH_STRING"):
        own["PREFECT_API_AUTH_STRING"] = password
    return DEFAULTS | clean | own
