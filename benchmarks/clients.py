"""The clients that are compared, each as its users use it: a function that returns a token and asks KIS if it must.

Libraries made for other issuers (botocore, google-auth, msal, azure-identity) get tokenP's answer through the hook
that each of them has for that; their own caches, locks and expiry checks are at work. Files go into the working
directory. The libraries are imported when they are chosen: tokencore needs none of them to run.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    from collections.abc import Callable

    Ask = Callable[[], str]

TENANT = "https://login.microsoftonline.com/benchmark"  # never contacted: msal's requests go to the gateway


def tokencore() -> Ask:
    """Use tokencore."""
    from tokencore import USTokenManager

    return USTokenManager().get_valid_token


def botocore() -> Ask:
    """Use botocore's SSO token provider, in memory."""
    tokens = import_module("botocore.tokens")

    def refresh() -> object:
        answer = issued()
        return tokens.FrozenAuthToken(answer["access_token"], _expiry(answer))

    provider = tokens.DeferredRefreshableToken("kis", refresh)
    return lambda: str(provider.get_frozen_token().token)


def google_auth() -> Ask:
    """Use a credentials class of our own, in memory, as google-auth's documentation says to write one."""
    base = import_module("google.auth.credentials").Credentials

    class Credentials(base):  # type: ignore[misc, valid-type]  # its base is imported at run time
        def refresh(self, _request: object) -> None:
            answer = issued()
            self.token, self.expiry = answer["access_token"], _expiry(answer).replace(tzinfo=None)

    credentials = Credentials()

    def get() -> str:
        if not credentials.valid:
            credentials.refresh(None)
        return str(credentials.token)

    return get


def msal(cache: object = None) -> Ask:
    """Use msal's confidential client, in memory."""
    application = import_module("msal").ConfidentialClientApplication(
        "client",
        client_credential="secret",
        authority=TENANT,
        instance_discovery=False,
        http_client=_MicrosoftHere(),
        token_cache=cache,
    )
    return lambda: str(application.acquire_token_for_client(["kis/.default"])["access_token"])


def msal_extensions() -> Ask:
    """Use msal's client with the file of msal-extensions and the lock around its writes."""
    extensions = import_module("msal_extensions")
    return msal(extensions.PersistedTokenCache(extensions.FilePersistence("msal.json")))


def azure_identity() -> Ask:
    """Use azure-identity's client secret credential, in memory."""
    identity, transport = import_module("azure.identity"), import_module("azure.core.pipeline.transport")

    class Transport(transport.RequestsTransport):  # type: ignore[misc, name-defined]  # as above
        def send(self, request: Any, **_: object) -> Any:  # noqa: ANN401 - its own types
            answer = _MicrosoftHere().get(request.url) if request.method == "GET" else _MicrosoftHere().post("")
            heard = requests.Response()
            heard.status_code, heard._content = 200, answer.text.encode()  # noqa: SLF001 - there is no other way in
            heard.headers["Content-Type"] = "application/json"
            return transport.RequestsTransportResponse(request, heard)

    credential = identity.ClientSecretCredential(
        "benchmark", "client", "secret", transport=Transport(), disable_instance_discovery=True
    )
    return lambda: str(credential.get_token("kis/.default").token)


def python_kis() -> Ask:
    """Use python-kis with the token kept in a file."""
    pykis = import_module("pykis")
    vars(import_module("pykis.kis"))["REAL_DOMAIN"] = os.environ["KIS_BASE_URL"]
    client = pykis.PyKis(
        id="benchmark",
        account="00000000-01",
        appkey=os.environ["KIS_APP_KEY"],
        secretkey=os.environ["KIS_APP_SECRET"],
        keep_token=os.getcwd(),
    )
    return lambda: str(client.token.token)


def mojito2() -> Ask:
    """Use mojito2's broker; its token is checked before each use, as in its examples."""
    base = import_module("mojito").KoreaInvestment

    class Broker(base):  # type: ignore[misc, valid-type]  # as above
        def set_base_url(self, mock: bool = True) -> None:  # noqa: ARG002, FBT001, FBT002 - as inherited
            self.base_url = os.environ["KIS_BASE_URL"]

    made: list[Any] = []

    def get() -> str:
        if not made:  # the constructor asks KIS
            made.append(Broker(os.environ["KIS_APP_KEY"], os.environ["KIS_APP_SECRET"], "00000000-01"))
        elif not made[0].check_access_token():
            made[0].issue_access_token()
        return str(made[0].access_token).removeprefix("Bearer ")

    return get


CLIENTS: dict[str, Callable[[], Ask]] = {
    "tokencore": tokencore,
    "botocore": botocore,
    "google-auth": google_auth,
    "msal": msal,
    "msal + msal-extensions": msal_extensions,
    "azure-identity": azure_identity,
    "python-kis": python_kis,
    "mojito2": mojito2,
}


def issued() -> dict[str, Any]:
    """Send one request to tokenP and return its answer."""
    body = {
        "grant_type": "client_credentials",
        "appkey": os.environ["KIS_APP_KEY"],
        "appsecret": os.environ["KIS_APP_SECRET"],
    }
    answer = requests.post(os.environ["KIS_BASE_URL"] + "/oauth2/tokenP", json=body, timeout=60)
    answer.raise_for_status()
    content: dict[str, Any] = answer.json()
    return content


def _expiry(answer: dict[str, Any]) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=answer["expires_in"])


class _Answer:
    def __init__(self, content: dict[str, Any]) -> None:
        self.status_code = 200
        self.headers: dict[str, str] = {}
        self.text = json.dumps(content)

    def raise_for_status(self) -> None:
        """Do nothing: the answer is always a success."""


class _MicrosoftHere:
    """The HTTP client that msal needs: serves the discovery document, and tokens that the gateway issues."""

    def get(self, _url: str, **_: object) -> _Answer:
        return _Answer({"issuer": TENANT, "authorization_endpoint": TENANT, "token_endpoint": f"{TENANT}/token"})

    def post(self, _url: str, **_: object) -> _Answer:
        answer = issued()
        return _Answer({name: answer[name] for name in ("access_token", "token_type", "expires_in")})

    def close(self) -> None:
        """Do nothing: nothing is open."""
