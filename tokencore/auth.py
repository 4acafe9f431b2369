"""`KISAuth`, for requests: signs calls of KIS's business API, with the token renewed behind the caller's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from requests.auth import AuthBase
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body

from tokencore.signing import SECRET_HEADERS, Signer, is_json, says_dead

if TYPE_CHECKING:
    from typing import Any

    from requests import PreparedRequest, Response

    from tokencore.signing import Signature


class KISAuth(AuthBase):
    """`requests` authentication for a market: `requests.get(url, auth=KISAuth("us"))`.

    A token that KIS rejects is reported, and the request is sent once more with its successor. Where there is none
    yet, or the body was a stream that cannot be sent again, the caller gets KIS's own answer. One object serves any
    number of threads and sessions.
    """

    def __init__(self, market: str, *, custtype: str = "P") -> None:
        """Sign for the configured `market`; `custtype` is `P` for a person, `B` for a firm.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._signer = Signer(market, custtype)
        self._custtype = custtype

    def __repr__(self) -> str:
        return f"KISAuth({self._signer!r})"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Put the headers on `request`.

        Raises:
            ConfigurationError: the request does not go to the market's base URL; nothing was sent.
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        signature = self._signer.signature_for(request.url or "")
        headers = request.headers
        # `in` raises and catches an error inside, which costs as much as all the rest; the dictionary within does not.
        if "custtype" not in getattr(headers, "_store", headers):
            headers["custtype"] = self._custtype
        _sign(request, signature)
        request.hooks["response"].append(self._answered)
        return request

    def _answered(self, response: Response, **sending: Any) -> Response:  # noqa: ANN401 - requests' own keywords
        used = response.request.headers.get("authorization", "").removeprefix("Bearer ")
        _hide_from_redirect(response)
        if not is_json(response.headers.get("content-type")) or not says_dead(response.content):
            return response
        signature = self._signer.successor(used)
        again = response.request.copy()
        if signature is None or not _replayable(again):
            return response
        _sign(again, signature)
        response.close()
        retried: Response = response.connection.send(again, **sending)
        retried.history.append(response)
        retried.request = again
        _hide_from_redirect(retried, response.request)
        return retried


def _sign(request: PreparedRequest, signature: Signature) -> None:
    headers = request.headers
    for name, value in signature.headers.items():
        headers[name] = value


def _hide_from_redirect(response: Response, *requests: PreparedRequest) -> None:
    """KIS never redirects: whoever does shall not see the secret as well. requests copies the first request for it."""
    if response.is_redirect:
        for request in (response.request, *requests):
            for name in SECRET_HEADERS:
                request.headers.pop(name, None)


def _replayable(request: PreparedRequest) -> bool:
    """Whether its body can be sent again; a stream is wound back to its start for that."""
    if request.body is None or isinstance(request.body, str | bytes):
        return True
    try:
        rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True
