"""Prefect's API over plain HTTP, for what must be quick or must go on where Prefect does not: no import of Prefect."""

from __future__ import annotations

import base64
from typing import Any

import requests
from requests import codes
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from flows.stack.crew import CrewError

TIMEOUT = 30  # seconds for an answer
BUSY = Retry(
    5, connect=0, read=0, status_forcelist=[503], allowed_methods=None, backoff_factor=0.2
)  # SQLite under load


class Api:
    """The API of one server.

    Attributes:
        url: the address of the server's page.

    """

    def __init__(self, url: str, password: str | None) -> None:
        """Ask nothing yet; `password` is `user:secret`, None for a server without one."""
        self.url = url
        self._http = requests.Session()
        self._http.mount("http://", HTTPAdapter(max_retries=BUSY))
        self._http.headers["Connection"] = "close"  # the server hangs up after a 503; the next try must not meet that
        self._http.trust_env = False  # no proxy stands between this machine and itself
        if password:
            self._http.headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"

    def ask(self, method: str, path: str, content: object = None) -> Any:  # noqa: ANN401 - as JSON is
        """What the server answers.

        Raises:
            CrewError: nothing that is of use.

        """
        try:
            answer = self._http.request(method, f"{self.url}/api/{path}", json=content, timeout=TIMEOUT)
            if answer.status_code == codes.unauthorized:
                raise CrewError(
                    "The server refuses the password; set PREFECT_SERVER_API_AUTH_STRING as it was when it started."
                )
            answer.raise_for_status()
            return answer.json() if answer.content else None
        except requests.RequestException as error:
            raise CrewError(f"The server gave no answer to {method} {path}: {error}") from None

    def answers(self, path: str) -> bool:
        """Whether the server says yes, within a few seconds."""
        try:
            return self._http.get(f"{self.url}/api/{path}", timeout=5).ok
        except requests.RequestException:
            return False
