"""The commands that hand over a token: `export` to other clients, `import` from another machine."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.clients.exports import CLIENTS
from tokencore.commands import key_of, read_input
from tokencore.errors import ConfigurationError, IssuerUnavailableError, TokenUnavailableError
from tokencore.manager import TokenManager
from tokencore.tokens import format_time, from_text, jwt_claims

if TYPE_CHECKING:
    import argparse

    from tokencore.commands import AddCommand
    from tokencore.config.market import Market
    from tokencore.keys import Key
    from tokencore.tokens import Token


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    what = "write the token in another client's format; renews if it must"
    export = command("export", _export, what, market="one")
    clients = "%(choices)s: the client (mojito2's file, token.dat, holds the app secret)"
    export.add_argument("--to", required=True, choices=CLIENTS, metavar="CLIENT", help=clients)
    export.add_argument("folder", metavar="DIR", help="where that client looks for its file; made if need be")
    what = "take a token from standard input, in any known form, without an issue request"
    offline, force = "save it without a quote call that proves it", "also where the present token lasts longer"
    command("import", _import, what, market="one", flags={"--offline": offline, "--force": force})


def _export(options: argparse.Namespace) -> int:
    """Print the paths on standard output, one per line, for programs; notes for people go to standard error."""
    if not options.folder:
        raise ConfigurationError("DIR is empty: name the folder where that client looks. Nothing was written.")
    manager = TokenManager(options.market)
    paths = manager.export(options.to, options.folder)
    print("\n".join(paths))
    if CLIENTS[options.to].holds_secret:
        print("tokencore: that file holds the app secret too, as this client asks for it.", file=sys.stderr)
    return 0


def _import(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    token = _token_for(manager.market, read_input(), datetime.now(UTC))
    key = key_of(manager.market.settings, manager.market.name)
    if not options.offline:
        _prove(key, token)
    elif "jti" not in jwt_claims(token.access_token):
        raise ConfigurationError("This token does not say whose it is, so KIS has to be asked: leave out --offline.")
    saved = manager.adopt(token, force=options.force, proven=not options.offline)
    done = "Saved" if saved else "Known already"
    print(f"{done}: the token of {key.label} expires at {format_time(token.expires_at)}.")
    return 0


def _token_for(market: Market, text: str, now: datetime) -> Token:
    """Return the token in `text`, in any known form, if it belongs to this market and serves at `now`."""
    try:
        token, content = from_text(text)
    except ValueError:
        raise ConfigurationError(
            "Standard input holds no token that gives its expiry: give the token alone, or what `tokencore get MARKET "
            "--json` prints. Nothing was saved."
        ) from None
    key, name, done = market.identified(), repr(market.name), "Nothing was saved."
    if jwt_claims(token.access_token).get("jti", key) != key:
        whose = f"The token belongs to another app key than that of {name}"
        raise ConfigurationError(f"{whose}. {done[:-1]}; import it to the market with its key.")
    if content.get("environment", market.environment) != market.environment:
        raise ConfigurationError(f"The token is of another environment than {name} ({market.environment}). {done}")
    if token.rejected_at is not None:
        raise TokenUnavailableError(f"KIS rejected the token at {format_time(token.rejected_at)}. {done}")
    if not token.serves(now, market.buffer):
        use = f"it expires at {format_time(token.expires_at)}, and KIS_BUFFER is {market.buffer:.0f} s"
        raise TokenUnavailableError(f"The token no longer serves: {use}. {done}")
    return token


def _prove(key: Key, token: Token) -> None:
    found = key.prove(token)
    if found.accepted is False:
        raise TokenUnavailableError(f"KIS refuses the token ({found.detail}). Nothing was saved.")
    if found.accepted is None:
        raise IssuerUnavailableError(
            f"Whether KIS accepts the token is unknown: {found.detail}. Nothing was saved; try again later, or save it "
            "unproven with --offline."
        )
