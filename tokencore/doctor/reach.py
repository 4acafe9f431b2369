"""One HTTP request, and what stood in its way: name, connection, certificate, proxy or silence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, MaxRetryError, NameResolutionError

from tokencore.sources import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE = 4.0  # seconds to connect, and for each wait for data
ANSWER_LIMIT = 1 << 20  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class UnreachedError(Exception):
    """Nobody answered; the text says what failed, `cure` what to do. Neither holds an address with its path."""

    def __init__(self, told: str, cure: str) -> None:
        """Keep both."""
        super().__init__(told)
        self.cure = cure


class Reached:
    """An answer: its status, headers and JSON (None when it is none)."""

    def __init__(self, response: requests.Response) -> None:
        """Read it, up to a limit."""
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        content = next(response.iter_content(ANSWER_LIMIT), b"")
        try:
            self.json: Any = json.loads(content)
        except (ValueError, RecursionError):
            self.json = None


def ask(method: str, url: str, *, timeout: float = PATIENCE, **kwargs: Any) -> Reached:  # noqa: ANN401 - requests' own
    """Send one request; redirects are not followed, and no .netrc is read.

    Raises:
        UnreachedError: no answer came.

    """
    parts = urlsplit(url)
    with requests.Session() as session:
        session.trust_env = parts.hostname not in _LOOPBACK
        session.auth = kwargs.pop("auth", None) or _nobody
        try:
            with session.request(
                method, url, timeout=min(timeout, PATIENCE), allow_redirects=False, stream=True, **kwargs
            ) as response:
                return Reached(response)
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            raise _fault(error, f"{parts.hostname}") from None


def _nobody(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _fault(error: Exception, host: str) -> UnreachedError:
    """What stood in the way, told apart by what a person has to do about it."""
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else cause
    network = "check the network and the firewall"
    known = {
        "proxy": ("the proxy cannot be reached", "check HTTPS_PROXY and NO_PROXY"),
        "certificate": (
            f"the certificate of {host} cannot be verified",
            "a proxy that opens TLS needs its certificate in REQUESTS_CA_BUNDLE; else check this machine's clock",
        ),
        "tls": (f"{host} does not speak TLS there", "check the address and its port, and for a proxy in between"),
        "name": (f"the name {host} cannot be found (DNS)", "check the network, DNS and the address"),
        "unconnected": (f"no connection to {host} within the time-out", network),
        "silence": (f"{host} accepts connections, but does not answer", "wait, or look for maintenance"),
        "refused": (f"{host} refuses the connection", f"start what should listen there, or {network}"),
        "address": ("the address is none", f"correct it in the environment, .env or {CONFIG_FILE}"),
        "bundle": ("the certificates in REQUESTS_CA_BUNDLE cannot be read", "mend or unset it"),
        "": (f"the connection to {host} failed", network),
    }
    return UnreachedError(*known[_kind(error, reason)])


def _kind(error: Exception, reason: object) -> str:
    by_reason = "name" if isinstance(reason, NameResolutionError) else "refused" if "refused" in str(reason) else ""
    by_type = (
        ("proxy", requests.exceptions.ProxyError),
        ("certificate" if "CERTIFICATE" in str(error).upper() else "tls", requests.exceptions.SSLError),
        ("unconnected", requests.ConnectTimeout),
        ("silence", requests.Timeout),
        ("address", ValueError),
    )
    found = next((kind for kind, of in by_type if isinstance(error, of)), by_reason)
    bundle = not found and not isinstance(error, requests.RequestException | HTTPError)
    return "bundle" if bundle else found  # requests' own checks raise a plain OSError before anything is sent
