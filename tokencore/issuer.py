"""KIS over HTTP: one request to tokenP, its answer as a token, its refusals told apart by code.

Nothing here retries a refusal, follows a redirect or reads without bound. Texts of KIS are kept for
people with everything that looks like a token or equals a credential removed.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import threading
import time
from datetime import UTC, datetime
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError

from tokencore import quotes
from tokencore.errors import IssuerRefusedError, IssuerUnavailableError
from tokencore.quotes import Evidence
from tokencore.refusals import DEAD_TOKEN, KNOWN, Refusal, bad_answer, no_answer, refused, unreachable
from tokencore.tokens import Token, from_answer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from urllib3.connection import HTTPConnection

    from tokencore.quotes import Quote

ANSWER_LIMIT = 65_536  # bytes; KIS's answers have about 700
TOO_SLOWLY = "the answer came too slowly"
CONNECT_TRIES = 4  # the first and three more, only while the request cannot have reached KIS
FIRST_PAUSE = 0.25  # seconds before the second try; doubled each time, give or take a half
TEXT_LIMIT = 160  # characters of KIS's own words in a message
OK = 200
_APPROVAL_KEY = re.compile(r"[!-~]{1,512}")  # one word of visible ASCII; KIS's is a UUID
_SECRETIVE = re.compile(r"[\w+/=.%&#;-]{20,}", re.ASCII)  # no word of KIS is so long, but every token and key


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


class Issuer:
    """KIS's gateway at `base_url` for one pair of credentials."""

    __slots__ = ("_app_key", "_app_secret", "_base_url", "_timeout")

    def __init__(self, base_url: str, app_key: str, app_secret: str, *, timeout: float) -> None:
        """Keep what a request needs; `timeout` in seconds, to connect and for each wait for data."""
        self._base_url = base_url
        self._app_key = app_key
        self._app_secret = app_secret
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"Issuer({self._base_url!r})"

    def __reduce__(self) -> str:
        raise TypeError("an Issuer holds credentials and is not pickled; make it anew where it is needed")

    @classmethod
    def checked(cls, base_url: str, credentials: tuple[str, str], *, timeout: float) -> Self:
        """The gateway at `base_url`, once the settings and this address have been validated.

        Raises:
            ConfigurationError: one of them cannot be used; nothing was sent.

        """
        from tokencore.settings import Settings, checked_url

        Settings.load()
        return cls(checked_url(base_url), *credentials, timeout=timeout)

    def issue(self) -> Token | Refusal:
        """One request to tokenP; only a request that cannot have reached KIS is repeated, three times at most."""
        answer = self._granted("/oauth2/tokenP", "appsecret")
        if isinstance(answer, Refusal):
            return answer
        received_at = datetime.now(UTC)
        try:
            token = from_answer(answer.body, received_at)
        except ValueError as error:
            return bad_answer(str(error))
        if token.expires_at <= received_at:
            return bad_answer("its token has already expired")
        return token

    def approve(self) -> str | Refusal:
        """One request for the websocket's approval key, with the same care."""
        answer = self._granted("/oauth2/Approval", "secretkey")
        if isinstance(answer, Refusal):
            return answer
        key = answer.body.get("approval_key")
        if not isinstance(key, str) or not _APPROVAL_KEY.fullmatch(key):
            return bad_answer("the answer holds no approval_key")
        return key

    def revoke(self, access_token: str) -> None:
        """Make KIS forget the token; every program that uses it is then without one.

        Raises:
            IssuerUnavailableError: KIS could not be asked or declined; the token stays valid.

        """
        body = {"appkey": self._app_key, "appsecret": self._app_secret, "token": access_token}
        try:
            answer = self._send("POST", "/oauth2/revokeP", json=body)
        except (NotAskedError, NoAnswerError) as error:
            raise IssuerUnavailableError(f"KIS could not be asked to revoke the token: {error}.") from None
        done = answer.status == OK and answer.body.get("code") in (OK, str(OK))
        if not done and answer.code not in DEAD_TOKEN:
            raise IssuerRefusedError(f"KIS did not revoke the token ({self._told(answer)}); it stays valid.")

    def probe(self, access_token: str, *, domestic: bool) -> tuple[bool | None, str]:
        """Whether KIS accepts the token on a quote call: True, False, or None when the call tells nothing; and why.

        Judged on the status and `msg_cd`, never on rows: an empty answer with `rt_cd` 0 means it works.
        """
        evidence = self.quote(access_token, quotes.domestic() if domestic else quotes.overseas())
        return evidence.accepted, evidence.told

    def quote(self, access_token: str, asked: Quote) -> Evidence:
        """What one quote call with the token told; never raises."""
        headers = {
            "authorization": f"Bearer {access_token}",
            "appkey": self._app_key,
            "appsecret": self._app_secret,
            "custtype": "P",
            "tr_id": asked.tr_id,
        }
        try:
            answer = self._send("GET", asked.path, headers=headers, params=asked.params)
        except (NotAskedError, NoAnswerError) as error:
            return Evidence(None, f"KIS could not be asked: {error}")
        return quotes.judge(answer.status, answer.code, answer.body, self._told(answer))

    def _granted(self, path: str, secrets_field: str) -> Answer | Refusal:
        body = {"grant_type": "client_credentials", "appkey": self._app_key, secrets_field: self._app_secret}
        try:
            answer = self._asked_once(path, body)
        except NotAskedError as error:
            return unreachable(str(error))
        except NoAnswerError as error:
            return no_answer(str(error))
        if answer.status != OK or answer.body.get("error_code") or answer.code in KNOWN:
            return refused(answer.status, answer.code, self._told(answer))
        return answer

    def _asked_once(self, path: str, body: Mapping[str, str]) -> Answer:
        for attempt in range(1, CONNECT_TRIES + 1):
            try:
                return self._send("POST", path, json=body)
            except NotAskedError:
                if attempt == CONNECT_TRIES:
                    raise
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, **kwargs: Any) -> Answer:  # noqa: ANN401 - requests' own keywords
        with requests.Session() as session:
            # A developer's HTTP_PROXY is not for the sandbox, and no .netrc may add a header to a request to KIS.
            session.trust_env = urlsplit(self._base_url).hostname not in (
                "127.0.0.1",
                "localhost",
                "::1",
            )
            session.auth = _no_netrc
            session.headers["Content-Type"] = "application/json; charset=UTF-8"
            whole = _InTime(2 * self._timeout)
            session.mount(f"{urlsplit(self._base_url).scheme}://", whole)
            try:
                with session.request(
                    method,
                    self._base_url + path,
                    timeout=self._timeout,
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

    def _told(self, answer: Answer) -> str:
        """The status and KIS's own words, on one line, without anything secret."""
        body = answer.body
        words = [body.get(key) for key in ("error_code", "msg_cd", "error_description", "msg1")]
        said = " ".join(str(word) for word in words if word) or answer.text
        for secret in (self._app_secret, self._app_key):
            said = said.replace(secret, "***")
        said = _SECRETIVE.sub("***", "".join(sign if sign.isprintable() else " " for sign in said))
        said = " ".join(said.split())
        return f"HTTP {answer.status}: {said[:TEXT_LIMIT]}" if said else f"HTTP {answer.status}"


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _InTime(HTTPAdapter):
    """Cuts its connection `seconds` after it stands, by the monotonic clock, and is then `late`.

    A time-out is for each wait: an answer that comes byte by byte, its header too, would never meet it.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.late = False
        self._seconds = seconds
        self._timers: list[threading.Timer] = []

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as inherited
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)

        def connect(connection: HTTPConnection, plain: type[HTTPConnection] = pool.ConnectionCls) -> None:
            plain.connect(connection)
            self._watch(connection.sock)

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
    """Read at most `ANSWER_LIMIT` bytes, and parse what is there."""
    content = response.raw.read(ANSWER_LIMIT + 1, decode_content=True)
    if len(content) > ANSWER_LIMIT:
        raise NoAnswerError(f"the answer is larger than {ANSWER_LIMIT} bytes")
    if whole.late:
        raise NoAnswerError(TOO_SLOWLY)
    text = content.decode("utf-8", errors="replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = {}
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
