"""`KISAuth`, for requests: signs calls of KIS's business API, with the token renewed behind the caller's back.

`Signer` is what it shares with `KISHttpxAuth`: the four headers, for KIS's own address only, and what to do when an
answer says that the token is dead. KIS's call rate (EGW00201) is the caller's affair.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from requests.auth import AuthBase
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body

from tokencore.errors import ConfigurationError, TokenError
from tokencore.kis.codes import ANSWER_LIMIT, is_dead
from tokencore.manager import TokenManager
from tokencore.sealing import Sensitive, sealed, sealed_class

if TYPE_CHECKING:
    from typing import Any

    from requests import PreparedRequest, Response

_log = logging.getLogger("tokencore")
SECRET_HEADERS = ("authorization", "appkey", "appsecret")
PORTS = {"https": ":443", "http": ":80"}  # which libraries write or leave out
CLIENT_ERROR = 400


class Signature(Sensitive):
    """The headers of one token, which no repr shows: the secret ones as text, and all four as bytes."""

    __slots__ = ("headers", "raw", "token")

    def __init__(self, token: str, credentials: tuple[str, str], custtype: str) -> None:
        """Spell them once: a token serves many thousand requests."""
        self.token = token
        self.headers = dict(zip(SECRET_HEADERS, (f"Bearer {token}", *credentials), strict=True))
        self.raw = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        self.raw.append((b"custtype", custtype.encode()))


class Signer(Sensitive):
    """Signs for one market, from any thread."""

    __slots__ = ("_address", "_custtype", "_manager", "_present", "_with_port", "market")

    def __init__(self, market: str, custtype: str) -> None:
        """Sign for the configured `market`; credentials and token are asked for with the first request."""
        self._manager = TokenManager(market)
        self._custtype = custtype
        self._present: Signature | None = None
        self.market = self._manager.market.name
        self._point()

    def _point(self) -> None:
        scheme, _, rest = self._manager.get_api_url().lower().partition("://")
        host = rest.partition("/")[0].removesuffix(PORTS[scheme])
        self._address = f"{scheme}://{host}/"
        self._with_port = f"{scheme}://{host}{PORTS[scheme]}/"

    def _check(self, url: str) -> None:
        """Return where a request to `url`, as requests and httpx spell it, goes to KIS's own address."""
        if url.startswith((self._address, self._with_port)):
            return
        where = url.replace("\\", "/").partition("?")[0].rpartition("@")[2]
        raise ConfigurationError(
            f"The credentials of {self.market!r} are for {self._address} only, and this request goes to {where}: "
            "nothing was sent. Correct the address, or KIS_BASE_URL and KIS_ENVIRONMENT.",
        )

    def signature(self, url: str) -> Signature:
        """The headers with a valid token, which is renewed if it must be, for a request to `url`.

        Raises:
            ConfigurationError: that is not KIS's own address; nothing was sent.
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        if not url.startswith(self._address):  # a call less than `_check`
            self._check(url)
        present = self._present
        return present if present and present.token == self._manager.get_valid_token() else self._signed(url)

    @sealed
    def signature_at_hand(self, url: str) -> Signature | None:
        """The same where credentials and token are there and no renewal is due; None where `signature` may wait."""
        self._check(url)
        token, present = self._manager.token_at_hand(), self._present
        if token and present:
            return present if present.token == token else self._signed(url)
        return None

    def successor(self, rejected: Signature, url: str) -> Signature | None:
        """Report that KIS rejected a token; a signature with its successor, None where there is none for `url` yet."""
        try:
            self._manager.report_rejected(rejected.token)
            return self._signed(url)
        except TokenError as error:
            _log.warning("KIS rejected the token of %r, and there is no other yet: %s", self.market, error)
            return None

    @sealed
    def _signed(self, url: str) -> Signature:
        """With a new token the credentials are read again, after it: its key, and the address, may be other ones."""
        ask = self._manager  # neither answer becomes a variable, which an error's traceback would show
        self._present = signature = Signature(ask.get_valid_token(), ask.get_app_credentials(), self._custtype)
        self._point()
        self._check(url)
        return signature


@sealed_class()
class KISAuth(Sensitive, AuthBase):
    """`requests` authentication for a market: `requests.get(url, auth=KISAuth("us"))`.

    A token that KIS rejects is reported, and the request is sent once more with its successor. Where there is none
    yet, or the body was a stream that cannot be sent again, the caller gets KIS's own answer. A session whose retries
    name a status (`Retry(status_forcelist=[500])`) hides KIS's answer, so a rejected token goes unnoticed there. One
    object serves any number of threads and sessions.
    """

    def __init__(self, market: str, *, custtype: str = "P") -> None:
        """Sign for the configured `market`; `custtype` is `P` for a person, `B` for a firm.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._signer = Signer(market, custtype)
        self._custtype = custtype

    def __repr__(self) -> str:
        return f"KISAuth({self._signer.market!r})"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Put the headers on `request`.

        Raises:
            ConfigurationError: the request does not go to the market's base URL; nothing was sent.
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        headers, signature = request.headers, self._signer.signature(request.url or "")
        for name, value in signature.headers.items():  # `update` takes a tenth longer
            headers[name] = value
        headers.setdefault("custtype", self._custtype)
        request.hooks["response"].append(partial(self._answered, signature))
        return request

    @sealed
    def _answered(self, used: Signature, response: Response, **sending: Any) -> Response:  # noqa: ANN401 - requests' own keywords
        request = response.request
        _hide_from_redirect(response, request)
        elsewhere = "appsecret" not in request.headers  # a redirect led there, without the secret
        unread = sending.get("stream") and not may_refuse(response.status_code, response.headers)
        if elsewhere or unread or not is_dead(response.content):
            return response
        successor, again = self._signer.successor(used, request.url or ""), request.copy()
        if successor is None or not _replayable(again):
            return response
        again.headers.update(successor.headers)
        response.close()
        retried: Response = response.connection.send(again, **sending)
        retried.history.append(response)
        retried.request = again
        _hide_from_redirect(retried, request)
        return retried


def may_refuse(status: int, headers: Any) -> bool:  # noqa: ANN401 - a mapping of either library
    """Whether a streamed answer can be a refusal of KIS: short, and JSON, text or an error. Others stay unread."""
    kind, length = headers.get("content-type", "").lower(), headers.get("content-length", "")
    short = not length.isdecimal() or int(length) <= ANSWER_LIMIT
    return short and (status >= CLIENT_ERROR or not kind or "json" in kind or kind.startswith("text/"))


def _hide_from_redirect(response: Response, request: PreparedRequest) -> None:
    """KIS never redirects: whoever does shall not see the secret as well. requests copies the first request for it."""
    for name in SECRET_HEADERS if response.is_redirect else ():
        request.headers.pop(name, None)


def _replayable(request: PreparedRequest) -> bool:
    """Whether its body can be sent again; a stream is wound back to its start for that."""
    try:
        if request.body is not None and not isinstance(request.body, str | bytes):
            rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True
