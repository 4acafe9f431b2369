"""A token that comes from elsewhere: another machine, or a person in an emergency. Is it this key's, and of use?"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from tokencore import tokens
from tokencore.errors import ConfigurationError, TokenUnavailableError
from tokencore.limits import tell
from tokencore.market import HOSTS

if TYPE_CHECKING:
    from datetime import datetime

    from tokencore.market import Market
    from tokencore.tokens import Token

_BARE = re.compile(r"[\w.+/=-]+", re.ASCII)  # else a quote that was copied along would go to KIS as a part of it
_BYTE_ORDER_MARK = "\ufeff"  # which PowerShell puts before what it pipes


def read(text: str, market: Market, now: datetime) -> Token:
    """The token in `text`, bare or in the JSON of `tokencore get --json`, if it is this market's and alive at `now`.

    Whose it is and when it expires is told by the token itself; an opaque one needs the JSON, for its expiry.

    Raises:
        ConfigurationError: there is no token, its expiry is unknown, or it is another key's or environment's.
        TokenUnavailableError: it has expired, or is about to.

    """
    content = _content(text.removeprefix(_BYTE_ORDER_MARK).strip())
    try:
        token = tokens.from_cache(content)
    except ValueError:
        raise ConfigurationError(
            "Standard input holds no token that tells its expiry: give the token alone, or what `tokencore get MARKET "
            "--json` prints. Nothing was saved."
        ) from None
    key = market.credentials()[0]
    if tokens.jwt_claims(token.access_token).get("jti", key) != key:
        raise ConfigurationError(
            f"The token belongs to another app key than that of {market.name!r}. Nothing was saved; import it to the "
            "market with its key."
        )
    environment = content.get("environment", market.environment)
    if environment != market.environment:
        told = environment if environment in tuple(HOSTS) else "unknown"  # it may hold anything
        raise ConfigurationError(
            f"The environment of the token is {told}, and that of {market.name!r} {market.environment}. "
            "Nothing was saved."
        )
    if not token.serves(now, market.buffer):
        raise TokenUnavailableError(
            f"The token is of no use any more: it expires at {tell(token.expires_at)}, and KIS_BUFFER is "
            f"{market.buffer:.0f} s. Nothing was saved."
            if token.rejected_at is None
            else f"KIS has rejected the token at {tell(token.rejected_at)}. Nothing was saved."
        )
    return token


def names_its_key(token: Token) -> bool:
    """Whether the token itself tells whose it is."""
    return "jti" in tokens.jwt_claims(token.access_token)


def check_better(token: Token, present: Token | None, now: datetime, *, force: bool, proven: bool) -> None:
    """Return where `token` may take the place of the `present` one.

    Raises:
        ConfigurationError: the present one lasts as long or longer, and `force` is not given.
        TokenUnavailableError: it is the present one, which KIS has rejected, and is not `proven` to work again.

    """
    if present is None or force:
        return
    if present.access_token == token.access_token:
        if present.rejected_at is not None and not proven:
            raise TokenUnavailableError(
                f"KIS has rejected this very token at {tell(present.rejected_at)}. Nothing was saved; without "
                "--offline KIS is asked whether it works again."
            )
    elif present.rejected_at is None and present.expires_at > now and present.expires_at >= token.expires_at:
        raise ConfigurationError(
            f"The present token lasts longer, until {tell(present.expires_at)}; this one until "
            f"{tell(token.expires_at)}. Nothing was saved; --force takes it all the same."
        )


def _content(text: str) -> dict[str, object]:
    """The JSON object, or a bare token with the expiry that it tells."""
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}
    token = text.removeprefix("Bearer ").strip()
    if not _BARE.fullmatch(token):
        return {}
    return {"access_token": token, "expires_at": tokens.jwt_claims(token).get("exp")}
