"""Signs requests to KIS's business API: bearer token, app key and app secret, renewed behind the caller's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from requests.auth import AuthBase

from tokencore.errors import TokenError
from tokencore.issuer import DEAD_TOKEN  # EGW00201, the call rate, is the caller's affair
from tokencore.manager import TokenManager

if TYPE_CHECKING:
    from typing import Any

    from requests import PreparedRequest, Response


class KISAuth(AuthBase):
    """`requests` authentication for a market: `requests.get(url, auth=KISAuth("us"))`.

    A token that KIS rejects is reported, and the request is sent once more with its successor. Where there is none
    yet, the caller gets KIS's own answer. One object serves any number of threads and sessions.
    """

    def __init__(self, market: str, *, custtype: str = "P") -> None:
        """Sign for the configured `market`; `custtype` is `P` for a person, `B` for a firm.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._manager = TokenManager(market)
        self._custtype = custtype

    def __repr__(self) -> str:
        return f"KISAuth({self._manager.market.name!r})"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Put the headers on `request`.

        Raises:
            TokenError: there is no valid token and none can be had; nothing was sent.

        """
        app_key, app_secret = self._manager.get_app_credentials()
        token = self._manager.get_valid_token()
        request.headers.update(
            {
                "authorization": f"Bearer {token}",
                "appkey": app_key,
                "appsecret": app_secret,
                "custtype": request.headers.get("custtype", self._custtype),
            },
        )
        request.hooks["response"].append(self._retry_rejected)
        return request

    def _retry_rejected(self, response: Response, **sending: Any) -> Response:  # noqa: ANN401 - requests' own keywords
        if response.is_redirect:  # KIS never redirects: whoever does shall not see the secret as well
            for name in ("authorization", "appkey", "appsecret"):
                response.request.headers.pop(name, None)
        used = response.request.headers.get("authorization", "").removeprefix("Bearer ")
        if not used or _code(response) not in DEAD_TOKEN:
            return response
        try:
            token = self._manager.report_rejected(used)
        except TokenError:
            return response
        again = response.request.copy()
        again.headers["authorization"] = f"Bearer {token}"
        response.close()
        retried = response.connection.send(again, **sending)
        retried.history.append(response)
        retried.request = again
        return retried


def _code(response: Response) -> object:
    if "json" not in response.headers.get("content-type", ""):
        return None
    try:
        body = response.json()
    except ValueError:
        return None
    return body.get("msg_cd") if isinstance(body, dict) else None
