"""The commands that hand a token over: `export` to other clients, `import` from another machine."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import imports
from tokencore.clients import CLIENTS
from tokencore.commands.shared import add_market
from tokencore.errors import ConfigurationError, IssuerUnavailableError, TokenUnavailableError
from tokencore.limits import tell
from tokencore.manager import TokenManager

if TYPE_CHECKING:
    import argparse

    from tokencore.commands.shared import AddCommand

INPUT_LIMIT = 65_536  # bytes of standard input; a token has about 350


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
    take = command("import", _import, "take a token from standard input, without an issue request")
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
    if sys.stdin.isatty():
        print("Give the token, or what `tokencore get --json` printed; then Ctrl-D.", file=sys.stderr)
    token = imports.read(_standard_input(), manager.market, datetime.now(UTC))
    if options.offline and not imports.names_its_key(token):
        raise ConfigurationError("This token does not tell whose it is, so KIS has to be asked: leave out --offline.")
    if not options.offline:
        _prove(manager, token.access_token)
    taken = manager.take(token, force=options.force, proven=not options.offline)
    markets = "+".join(manager.sharing()) or manager.market.name
    print(f"{'Saved' if taken else 'Known already'}: the token of {markets} expires at {tell(token.expires_at)}.")
    return 0


def _standard_input() -> str:
    try:
        text = sys.stdin.read(INPUT_LIMIT + 1)
    except UnicodeDecodeError:
        text = ""
    if not text.strip() or len(text) > INPUT_LIMIT:
        raise ConfigurationError("Standard input holds no token: give it alone, or what `tokencore get --json` prints.")
    return text


def _prove(manager: TokenManager, access_token: str) -> None:
    accepted, told = manager.probe(access_token)
    if accepted is False:
        raise TokenUnavailableError(f"KIS refuses the token ({told}). Nothing was saved.")
    if accepted is None:
        raise IssuerUnavailableError(
            f"Whether KIS accepts the token is unknown: {told}. Nothing was saved; try again later, or save it "
            "unproven with --offline."
        )
