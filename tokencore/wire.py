"""The wire to KIS: one HTTP request, and its answer within bounds of size and time.

Nothing here retries, follows a redirect or reads without bound; what fails is told without the address and
headers that the libraries' own texts repeat.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from urllib3.connection import HTTPConnection

ANSWER_LIMIT = 65_536  # bytes; KIS's answers have about 700
TOO_SLOWLY = "the answer came too slowly"


class Answer(NamedTuple):
    """An HTTP answer of KIS: status, JSON body (empty when it is none), and its text, cut."""

    status: int
    body: Mapping[str, Any]
    text: str

    @property
    def code(self) -> str:
        """KIS's code, in whichever of its two shapes; empty where there is none."""
        code = self.body.get("error_code") or self.body.get("msg_cd")
        return code if isinstance(code, str) else ""


class NotAskedError(Exception):
    """The request cannot have reached KIS (name lookup, refused connection, certificate)."""


class NoAnswerError(Exception):
    """The request may have reached KIS, but no whole answer came back."""


def send(
    base_url: str,
    method: str,
    path: str,
    *,
    timeout: float,
    connected: Callable[[], None] = lambda: None,
    **kwargs: Any,  # noqa: ANN401 - requests' own keywords
) -> Answer:
    """One request to KIS's gateway at `base_url`; `timeout` in seconds, to connect and for each wait for data.

    The whole answer has twice that time. `connected` is called when the request is about to leave.

    Raises:
        NotAskedError: it cannot have reached KIS.
        NoAnswerError: it may have, but no whole answer came back.

    """
    with requests.Session() as session:
        # A developer's HTTP_PROXY is not for the sandbox, and no .netrc may add a header to a request to KIS.
        session.trust_env = urlsplit(base_url).hostname not in (
            "127.0.0.1",
            "localhost",
            "::1",
        )
        session.auth = _no_netrc
        session.headers["Content-Type"] = "application/json; charset=UTF-8"
        whole = _InTime(2 * timeout, connected)
        session.mount(f"{urlsplit(base_url).scheme}://", whole)
        try:
            with session.request(
                method,
                base_url + path,
                timeout=timeout,
                allow_redirects=False,
                stream=True,
                **kwargs,
            ) as response:
                return _answer(response, whole)
        except (requests.RequestException, HTTPError) as error:
            if whole.late:
                raise NoAnswerError(TOO_SLOWLY) from None
            raise (NotAskedError if _never_sent(error) else NoAnswerError)(_fault(error)) from None
        except OSError:  # requests' own checks, before anything is sent
            raise NotAskedError("its certificates cannot be checked (REQUESTS_CA_BUNDLE)") from None


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _InTime(HTTPAdapter):
    """Cuts its connection `seconds` after it stands, by the monotonic clock, and is then `late`.

    A time-out is for each wait: an answer that comes byte by byte, its header too, would never meet it.
    """

    def __init__(self, seconds: float, connected: Callable[[], None]) -> None:
        super().__init__()
        self.late = False
        self._connected = connected
        self._seconds = seconds
        self._timers: list[threading.Timer] = []

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as inherited
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)

        def connect(connection: HTTPConnection, plain: type[HTTPConnection] = pool.ConnectionCls) -> None:
            plain.connect(connection)
            self._watch(connection.sock)
            self._connected()

        pool.ConnectionCls = type("Watched", (pool.ConnectionCls,), {"connect": connect})
        return pool

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        super().close()

    def _watch(self, connected: socket.socket) -> None:
        timer = threading.Timer(self._seconds, self._cut, (connected,))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _cut(self, connected: socket.socket) -> None:
        self.late = True
        with contextlib.suppress(OSError):  # it has ended by itself
            connected.shutdown(socket.SHUT_RDWR)


def _answer(response: requests.Response, whole: _InTime) -> Answer:
    """Read at most `ANSWER_LIMIT` bytes, and parse what is there; a whole answer is as good where it is read late."""
    content = response.raw.read(ANSWER_LIMIT + 1, decode_content=True)
    if len(content) > ANSWER_LIMIT:
        raise NoAnswerError(f"the answer is larger than {ANSWER_LIMIT} bytes")
    text = content.decode("utf-8", errors="replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = {}
    if whole.late and not body:  # a process that was stopped meanwhile finds a body, which was there in time
        raise NoAnswerError(TOO_SLOWLY)
    return Answer(response.status_code, body if isinstance(body, dict) else {}, re.sub(r"<[^<>]*>", " ", text))


def _never_sent(error: Exception) -> bool:
    """Whether the request cannot have left: no connection, a certificate refused, or an address that is none."""
    if isinstance(error, ValueError | requests.ConnectTimeout | requests.exceptions.ProxyError):
        return True
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else None
    # Other faults of TLS can come after the request: only a certificate is always judged before it.
    refused = isinstance(reason, SSLError) and any(isinstance(arg, SSLCertVerificationError) for arg in reason.args)
    return refused or isinstance(reason, NewConnectionError)


def _fault(error: Exception) -> str:
    """What failed, without the address and headers that the libraries' own texts repeat."""
    names = {
        "ConnectTimeout": "no connection within the time-out (KIS_TIMEOUT)",
        "ReadTimeout": "no answer within the time-out (KIS_TIMEOUT)",
        "SSLError": "the encrypted connection failed; look at the certificate",
        "ProxyError": "the proxy could not be reached",
    }
    if type(error).__name__ in names:
        return names[type(error).__name__]
    if isinstance(error, ValueError):
        return "KIS_BASE_URL is no address"
    return "the connection was refused or the name not found" if _never_sent(error) else "the connection broke off"
