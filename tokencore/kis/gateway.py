"""KIS's gateway over HTTP: issue, approve, revoke and quote, each one request within bounds of size and time.

Nothing here follows a redirect or repeats a request that may have reached KIS. KIS's words are kept for people, masked.
"""

from __future__ import annotations

import io
import json
import random
import re
import ssl
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from tokencore.attempts import Outcome
from tokencore.calendars.exchanges import exchange
from tokencore.errors import IssuerUnavailableError
from tokencore.kis import codes
from tokencore.kis.codes import ANSWER_LIMIT, OK, Refusal
from tokencore.redaction import redact
from tokencore.sealing import Sensitive
from tokencore.tokens import Token, from_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TRIES = 4  # the first and three more, only while the request cannot have reached KIS
FIRST_PAUSE = 0.25  # seconds before the second try; doubled each time, give or take a half
TEXT_LIMIT = 160  # characters of KIS's own words in a message
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {"Content-Type": "application/json; charset=UTF-8"}
_SAMSUNG = {"FID_COND_MRKT_DIV_CODE": "J", "FID_INPUT_ISCD": "005930"}
_APPROVAL_KEY = re.compile(r"[!-~]{1,512}")  # one word of visible ASCII; KIS's is a UUID


class Evidence(NamedTuple):
    """What a quote call said about a token."""

    accepted: bool | None  # whether KIS accepts the token; None when the call says nothing about it
    detail: str  # KIS's words, or the fault, without anything secret
    status: int | None = None  # of HTTP; None without an answer
    msg_cd: str = ""  # KIS's code, empty where it gave none


class Gateway(Sensitive):
    """KIS's gateway at `base_url` for one pair of credentials."""

    __slots__ = ("_app_key", "_app_secret", "_base_url", "_timeout")

    def __init__(self, base_url: str, credentials: tuple[str, str], *, timeout: float) -> None:
        """Keep what a request needs; `timeout` in seconds, to connect and for each wait, twice that for an answer."""
        self._base_url = base_url
        self._app_key, self._app_secret = credentials
        self._timeout = timeout

    def issue(self, depart: Callable[[], bool] = lambda: True) -> Token | Refusal:
        """One request to tokenP; only what cannot have reached KIS is sent again, three times at most.

        `depart` is asked right before each try, which can be a minute after the first; no: nothing is sent.
        """
        answer = self._granted("/oauth2/tokenP", "appsecret", depart)
        if isinstance(answer, Refusal):
            return answer
        received_at = datetime.now(UTC)
        try:
            token = from_answer(answer.body, received_at)
        except ValueError as error:
            return codes.silent(Outcome.BAD_ANSWER, str(error))
        if token.expires_at <= received_at:
            return codes.silent(Outcome.BAD_ANSWER, "its token has already expired")
        return token

    def approve(self) -> str | Refusal:
        """One request for the websocket's approval key, with the same care."""
        answer = self._granted("/oauth2/Approval", "secretkey")
        if isinstance(answer, Refusal):
            return answer
        key = str(answer.body.get("approval_key", ""))
        return key if _APPROVAL_KEY.fullmatch(key) else codes.silent(Outcome.BAD_ANSWER, "it holds no approval_key")

    def revoke(self, access_token: str) -> None:
        """Make KIS forget the token; every program that uses it is then without one.

        Raises:
            IssuerUnavailableError: KIS could not be asked or declined; the token stays valid.

        """
        answer = self._post("/oauth2/revokeP", {"appsecret": self._app_secret, "token": access_token})
        if isinstance(answer, Refusal):
            raise IssuerUnavailableError(f"The token was not revoked and stays valid. {answer.what}; {answer.fix}.")
        done = answer.status == OK and answer.body.get("code") in (OK, str(OK))
        if not done and codes.code_of(answer.body) not in codes.DEAD_TOKEN:
            raise IssuerUnavailableError(f"KIS did not revoke the token ({self._detail(answer)}); it stays valid.")

    def quote(self, access_token: str, exchanges: Sequence[str]) -> Evidence:
        """What the quote call that fits these exchanges says about the token; never raises.

        Judged on the status and KIS's codes, never on rows: Korea's where one is Korean or none is named.
        """
        there = [exchange(code) for code in exchanges]
        path, tr_id, params = "/uapi/domestic-stock/v1/quotations/inquire-price", "FHKST01010100", _SAMSUNG
        if there and all(each.quote_code for each in there):
            path, tr_id = "/uapi/overseas-price/v1/quotations/price", "HHDFS00000300"
            params = {"AUTH": "", "EXCD": str(there[0].quote_code), "SYMB": there[0].symbol}
        headers = {"authorization": f"Bearer {access_token}", "appkey": self._app_key, "appsecret": self._app_secret}
        headers |= {"custtype": "P", "tr_id": tr_id}
        answer = self._send("GET", path, headers=headers, params=params)
        if isinstance(answer, Refusal):
            return Evidence(None, answer.what)
        code, succeeded = codes.code_of(answer.body), answer.status == OK and answer.body.get("rt_cd") == "0"
        accepted = False if code in codes.DEAD_TOKEN else True if succeeded else None
        return Evidence(accepted, "rt_cd 0" if accepted else self._detail(answer), answer.status, code[:12])

    def _granted(self, path: str, secret_name: str, depart: Callable[[], bool] = lambda: True) -> _Answer | Refusal:
        fields = {"grant_type": "client_credentials", secret_name: self._app_secret}
        for turn in range(TRIES):
            if turn:
                time.sleep(FIRST_PAUSE * 2 ** (turn - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            if not depart():
                what = "Nothing was sent: another process is asking with this key, or the attempt could not be recorded"
                return Refusal(Outcome.UNREACHABLE, None, what, codes.AGAIN)
            answer = self._post(path, fields)
            if not isinstance(answer, Refusal) or answer.outcome is not Outcome.UNREACHABLE:
                break
        if isinstance(answer, Refusal):
            return answer
        code = codes.code_of(answer.body)
        if answer.status == OK and not answer.body.get("error_code") and code not in codes.KNOWN:
            return answer
        return codes.refused(answer.status, code, self._detail(answer), (len(self._app_key), len(self._app_secret)))

    def _post(self, path: str, fields: Mapping[str, str]) -> _Answer | Refusal:
        return self._send("POST", path, _Body(json.dumps({"appkey": self._app_key, **fields}).encode()))

    def _send(self, method: str, path: str, body: _Body | None = None, **fields: Any) -> _Answer | Refusal:  # noqa: ANN401 - requests' own keywords
        """One request and its whole answer, or why there is none: `UNREACHABLE` while it cannot have left."""
        deadline, url = time.monotonic() + 2 * self._timeout, self._base_url + path
        fields |= {"headers": _HEADERS | fields.get("headers", {}), "data": body, "timeout": self._timeout}
        fields["auth"] = lambda request: request  # else requests looks into `.netrc`
        try:
            with requests.Session() as session:
                session.trust_env = urlsplit(url).hostname not in LOOPBACK  # no proxy stands before the sandbox
                session.hooks["response"].append(_go_nowhere)
                with session.request(method, url, stream=True, allow_redirects=False, **fields) as response:
                    return _read(response, deadline)
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            if body is None or body.left:
                return codes.silent(Outcome.NO_ANSWER, _fault(error, "the connection failed or broke off"))
            return codes.silent(Outcome.UNREACHABLE, _fault(error, "the connection was refused or the name not found"))

    def _detail(self, answer: _Answer) -> str:
        """The status and KIS's own words, on one line, without anything secret."""
        words = [answer.body.get(key) for key in ("error_code", "msg_cd", "error_description", "msg1")]
        said = redact(" ".join(str(word) for word in words if word) or answer.text, self._app_secret, self._app_key)
        return f"HTTP {answer.status}: {said[:TEXT_LIMIT]}" if said else f"HTTP {answer.status}"


def _go_nowhere(response: requests.Response, **_: object) -> None:
    """Requests would read a redirect's body whole, without bounds of size or time, before it is asked for it."""
    response.headers.pop("location", None)


class _Answer(NamedTuple):
    """An answer of KIS: HTTP's status, the JSON body (empty when it is none), and its text without tags."""

    status: int
    body: Mapping[str, Any]
    text: str


class _Body(io.BytesIO):
    """A request's body that knows whether it `left`: it is read when the connection stands and the header is sent."""

    left = False

    def read(self, size: int | None = -1) -> bytes:
        self.left = True
        return super().read(size)


def _read(response: requests.Response, deadline: float) -> _Answer | Refusal:
    """Read at most `ANSWER_LIMIT` bytes until `deadline` of the monotonic clock."""
    content, late = b"", False
    while not late and (piece := response.raw.read1(ANSWER_LIMIT, decode_content=True)):
        content += piece
        if len(content) > ANSWER_LIMIT:
            return codes.silent(Outcome.NO_ANSWER, f"the answer is larger than {ANSWER_LIMIT} bytes")
        late = time.monotonic() > deadline
    body = codes.parse(content)
    if late and not body:  # a process that was stopped meanwhile finds a whole body, which was there in time
        return codes.silent(Outcome.NO_ANSWER, "the answer came too slowly")
    return _Answer(response.status_code, body, re.sub(r"<[^<>]*>", " ", content.decode("utf-8", errors="replace")))


_FAULTS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (  # the first that fits
    (requests.ConnectTimeout, "no connection within the time-out (KIS_TIMEOUT)"),
    ((requests.ReadTimeout, ReadTimeoutError), "no answer within the time-out (KIS_TIMEOUT)"),
    (requests.exceptions.ProxyError, "the proxy could not be reached"),
    (requests.RequestException, ""),
    (OSError, "its certificates cannot be checked (REQUESTS_CA_BUNDLE)"),  # requests' own check
)


def _fault(error: Exception, otherwise: str) -> str:
    """What failed, without the address and headers that the libraries' own texts repeat; OpenSSL's reason first."""
    inner: BaseException | None = error
    while inner and not isinstance(inner, ssl.SSLError):
        inner = inner.__context__
    if inner:
        certificate = getattr(inner, "verify_message", "")
        why = f"certificate: {certificate}" if certificate else str(getattr(inner, "reason", "")).replace("_", " ")
        return f"the encrypted connection failed ({why})"
    return next((words for kind, words in _FAULTS if isinstance(error, kind)), "") or otherwise
