"""KIS's gateway over HTTP: issue, approve, revoke and quote, each one request with bounded size and time.

Nothing here follows a redirect or repeats a request that may have reached KIS. KIS's own words are kept for people,
with secrets masked.
"""

from __future__ import annotations

import json
import random
import re
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.attempts import Outcome
from tokencore.calendars.exchanges import exchange
from tokencore.errors import IssuerUnavailableError
from tokencore.kis import codes
from tokencore.kis.codes import OK, Refusal
from tokencore.kis.http import Answer, NoAnswer, send
from tokencore.policy import CLOCK_SLACK
from tokencore.redaction import redact
from tokencore.sealing import Sensitive
from tokencore.tokens import Token, from_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MINUTE = timedelta(minutes=1)
TRIES = 4  # the first and three more, as long as the request cannot have reached KIS
FIRST_PAUSE = 0.25  # seconds before the second try; doubled each time, plus or minus half of it
TEXT_LIMIT = 160  # characters of KIS's own words in a message
_HEADERS = {"Content-Type": "application/json; charset=UTF-8"}
_SAMSUNG = {"FID_COND_MRKT_DIV_CODE": "J", "FID_INPUT_ISCD": "005930"}
_APPROVAL_KEY = re.compile(r"[!-~]{1,512}")  # one word of visible ASCII; KIS's is a UUID


class Evidence(NamedTuple):
    """What a quote call showed about a token."""

    accepted: bool | None  # whether KIS accepts the token; None if the call does not tell
    detail: str  # KIS's words, or the fault, without secrets
    status: int | None = None  # the HTTP status; None without an answer
    msg_cd: str = ""  # KIS's code; empty if it gave none


class Gateway(Sensitive):
    """KIS's gateway at `base_url` for one pair of credentials."""

    __slots__ = ("_app_key", "_app_secret", "_base_url", "_timeout")

    def __init__(self, base_url: str, credentials: tuple[str, str], *, timeout: float) -> None:
        """Take what requests need; `timeout` (seconds) bounds connecting and each wait, and twice that the answer."""
        self._base_url = base_url
        self._app_key, self._app_secret = credentials
        self._timeout = timeout

    def issue(self, depart: Callable[[], bool] = lambda: True) -> Token | Refusal:
        """Request a token from tokenP; resend, three times at most, only if the request cannot have reached KIS.

        `depart` is called right before each try, which can be a minute after the first; if it returns False, nothing
        is sent.
        """
        answer = self._granted("/oauth2/tokenP", "appsecret", depart)
        if isinstance(answer, Refusal):
            return answer
        received_at, ahead = datetime.now(UTC), answer.clock_ahead() or timedelta(0)
        try:
            token = from_answer(answer.body, received_at)
        except ValueError as error:
            return codes.silent(Outcome.BAD_ANSWER, str(error))
        if token.expires_at <= received_at:
            fast = f", as this machine's clock is {ahead // MINUTE} min ahead of KIS's" if ahead > CLOCK_SLACK else ""
            return codes.silent(Outcome.BAD_ANSWER, f"its token has already expired{fast}")
        if ahead > CLOCK_SLACK and token.issued_at:  # by our clock, as a new token would look like an old one
            token.issued_at = min(token.issued_at + ahead, received_at)
        return token

    def approve(self) -> str | Refusal:
        """Request the websocket's approval key, resending under the same condition as `issue`."""
        answer = self._granted("/oauth2/Approval", "secretkey")
        if isinstance(answer, Refusal):
            return answer
        key = str(answer.body.get("approval_key", ""))
        return key if _APPROVAL_KEY.fullmatch(key) else codes.silent(Outcome.BAD_ANSWER, "it holds no approval_key")

    def revoke(self, access_token: str) -> None:
        """Revoke the token at KIS; every program that uses it is then without one.

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
        """Make the quote call that fits these exchanges and return what it shows about the token; never raises.

        The domestic call is used if any exchange is Korean or none is given. The answer is judged by its status and
        KIS's codes, never by the quotes in it.
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

    def _granted(self, path: str, secret_name: str, depart: Callable[[], bool] = lambda: True) -> Answer | Refusal:
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
        granted = answer.status in codes.SUCCESS and not answer.body.get("error_code")
        if granted and code not in codes.KNOWN:
            return answer
        return codes.refused(answer.status, code, self._detail(answer), (len(self._app_key), len(self._app_secret)))

    def _post(self, path: str, fields: Mapping[str, str]) -> Answer | Refusal:
        return self._send("POST", path, json.dumps({"appkey": self._app_key, **fields}).encode())

    def _send(self, method: str, path: str, content: bytes | None = None, **fields: Any) -> Answer | Refusal:  # noqa: ANN401 - requests' own keywords
        """Send one request; return its whole answer, or why there is none: `UNREACHABLE` if it cannot have left."""
        headers = _HEADERS | fields.pop("headers", {})
        try:
            answer = send(method, self._base_url + path, content, timeout=self._timeout, headers=headers, **fields)
        except NoAnswer as error:
            return codes.silent(Outcome.NO_ANSWER if error.left else Outcome.UNREACHABLE, str(error))
        return codes.silent(Outcome.NO_ANSWER, answer.trouble) if answer.trouble else answer

    def _detail(self, answer: Answer) -> str:
        """Return the status and KIS's own words on one line, without secrets."""
        words = [answer.body.get(key) for key in ("error_code", "msg_cd", "error_description", "msg1")]
        said = redact(" ".join(str(word) for word in words if word) or answer.text, self._app_secret, self._app_key)
        return f"HTTP {answer.status}: {said[:TEXT_LIMIT]}" if said else f"HTTP {answer.status}"
