"""KIS as the issuer: one request to tokenP, its answer as a token, its refusals told apart by code.

Nothing here retries a refusal. Texts of KIS are kept for people with everything that looks like a token or
equals a credential removed.
"""

from __future__ import annotations

import random
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tokencore import quotes
from tokencore.errors import IssuerRefusedError, IssuerUnavailableError
from tokencore.quotes import Evidence
from tokencore.refusals import DEAD_TOKEN, KNOWN, Refusal, bad_answer, no_answer, refused, unreachable
from tokencore.tokens import Token, from_answer
from tokencore.wire import Answer, NoAnswerError, NotAskedError, send

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from tokencore.quotes import Quote

CONNECT_TRIES = 4  # the first and three more, only while the request cannot have reached KIS
FIRST_PAUSE = 0.25  # seconds before the second try; doubled each time, give or take a half
TEXT_LIMIT = 160  # characters of KIS's own words in a message
OK = 200
_APPROVAL_KEY = re.compile(r"[!-~]{1,512}")  # one word of visible ASCII; KIS's is a UUID
_SECRETIVE = re.compile(r"[\w+/=.%&#;-]{20,}", re.ASCII)  # no word of KIS is so long, but every token and key


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

    def issue(self, connected: Callable[[], None] = lambda: None) -> Token | Refusal:
        """One request to tokenP; only a request that cannot have reached KIS is repeated, three times at most.

        `connected` is called when it is about to leave, which can be a minute after the first try to connect.
        """
        answer = self._granted("/oauth2/tokenP", "appsecret", connected)
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

    def _granted(self, path: str, secrets_field: str, connected: Callable[[], None] = lambda: None) -> Answer | Refusal:
        body = {"grant_type": "client_credentials", "appkey": self._app_key, secrets_field: self._app_secret}
        try:
            answer = self._asked_once(path, json=body, connected=connected)
        except NotAskedError as error:
            return unreachable(str(error))
        except NoAnswerError as error:
            return no_answer(str(error))
        if answer.status != OK or answer.body.get("error_code") or answer.code in KNOWN:
            return refused(answer.status, answer.code, self._told(answer))
        return answer

    def _asked_once(self, path: str, **kwargs: Any) -> Answer:  # noqa: ANN401 - as `send` takes them
        for attempt in range(1, CONNECT_TRIES + 1):
            try:
                return self._send("POST", path, **kwargs)
            except NotAskedError:
                if attempt == CONNECT_TRIES:
                    raise
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, **kwargs: Any) -> Answer:  # noqa: ANN401 - requests' own keywords
        return send(self._base_url, method, path, timeout=self._timeout, **kwargs)

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
