"""The commands that hand a token over: `export` to other clients, `import` from another machine."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.clients.exports import CLIENTS
from tokencore.commands import add_market, key_of, read_input
from tokencore.config.market import HOSTS
from tokencore.errors import ConfigurationError, IssuerUnavailableError, TokenUnavailableError
from tokencore.limits import format_time
from tokencore.manager import TokenManager
from tokencore.tokens import from_text, jwt_claims

if TYPE_CHECKING:
    import argparse

    from tokencore.commands import AddCommand
    from tokencore.config.market import Market
    from tokencore.tokens import Token


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    export = command("export", _export, "write the token in another client's format; renews if it must")
    add_market(export)
    export.add_argument(
        "--to",
        required=True,
        choices=CLIENTS,
        metavar="CLIENT",
        help="%(choices)s: the client (mojito2's file, token.dat, holds the app secret)",
    )
    export.add_argument("folder", metavar="DIR", help="where that client looks for its file; made if need be")
    take = command("import", _import, "take a token from standard input, in any known form, without an issue request")
    add_market(take)
    take.add_argument("--offline", action="store_true", help="save it without a quote call that proves it")
    take.add_argument("--force", action="store_true", help="also where the present token lasts longer")


def _export(options: argparse.Namespace) -> int:
    """The paths go to standard output, one a line, for programs; what people should know goes elsewhere."""
    if not options.folder:
        raise ConfigurationError("DIR is empty: name the folder where that client looks. Nothing was written.")
    manager = TokenManager(options.market)
    paths = manager.export(options.to, os.path.abspath(os.path.expanduser(options.folder)))
    print("\n".join(paths))
    if CLIENTS[options.to].holds_secret:
        print("tokencore: that file holds the app secret too, as this client asks for it.", file=sys.stderr)
    return 0


def _import(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    token = read_token(read_input(), manager.market, datetime.now(UTC))
    if not options.offline:
        _prove(manager, token.access_token)
    elif "jti" not in jwt_claims(token.access_token):
        raise ConfigurationError("This token does not say whose it is, so KIS has to be asked: leave out --offline.")
    saved = manager.adopt(token, force=options.force, proven=not options.offline)
    label, done = key_of(manager.market.settings, manager.market.name).label, "Saved" if saved else "Known already"
    print(f"{done}: the token of {label} expires at {format_time(token.expires_at)}.")
    return 0


def read_token(text: str, market: Market, now: datetime) -> Token:
    """The token in `text`, in any known form, if it is this market's and alive at `now`.

    Raises:
        ConfigurationError: there is no token, its expiry is unknown, or it is another key's or environment's.
        TokenUnavailableError: it has expired, is about to, or KIS has rejected it.

    """
    try:
        token, content = from_text(text)
    except (ValueError, RecursionError):
        raise ConfigurationError(
            "Standard input holds no token that gives its expiry: give the token alone, or what `tokencore get MARKET "
            "--json` prints. Nothing was saved."
        ) from None
    _refuse_unfit(token, content.get("environment", market.environment), market, now)
    return token


def _refuse_unfit(token: Token, environment: object, market: Market, now: datetime) -> None:
    key, name, done = market.identified(), repr(market.name), "Nothing was saved."
    if jwt_claims(token.access_token).get("jti", key) != key:
        whose = f"The token belongs to another app key than that of {name}"
        raise ConfigurationError(f"{whose}. {done[:-1]}; import it to the market with its key.")
    if environment != market.environment:
        shown = environment if environment in tuple(HOSTS) else "unknown"  # it may hold anything
        raise ConfigurationError(
            f"The environment of the token is {shown}, and that of {name} {market.environment}. {done}"
        )
    if token.rejected_at is not None:
        raise TokenUnavailableError(f"KIS rejected the token at {format_time(token.rejected_at)}. {done}")
    if not token.serves(now, market.buffer):
        use = f"it expires at {format_time(token.expires_at)}, and KIS_BUFFER is {market.buffer:.0f} s"
        raise TokenUnavailableError(f"The token is of no use any more: {use}. {done}")


def _prove(manager: TokenManager, access_token: str) -> None:
    accepted, detail = manager.probe(access_token)
    if accepted is False:
        raise TokenUnavailableError(f"KIS refuses the token ({detail}). Nothing was saved.")
    if accepted is None:
        raise IssuerUnavailableError(
            f"Whether KIS accepts the token is unknown: {detail}. Nothing was saved; try again later, or save it "
            "unproven with --offline."
        )
