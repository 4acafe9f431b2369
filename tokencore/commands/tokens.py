"""The commands around a token: `get`, `check`, `refresh` and `delete`."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.commands.shared import add_json, add_market, print_json
from tokencore.errors import ConfigurationError, TokenUnavailableError
from tokencore.fleet import managers, statuses
from tokencore.limits import tell
from tokencore.manager import TokenManager

if TYPE_CHECKING:
    import argparse

    from tokencore.commands.shared import AddCommand
    from tokencore.tokens import Token

NOT_VALID, UNREACHABLE = 3, 6


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    get = command("get", _get, "print the token, and nothing else; renews if it must")
    add_market(get)
    get.add_argument("--no-renew", action="store_true", help="only what is cached: ask KIS for nothing")
    output = get.add_mutually_exclusive_group()
    add_json(output)
    output.add_argument(
        "--format",
        choices=_FORMATS,
        help="process: JSON with version, token and expiration; env: for a shell's eval; header: for an HTTP request",
    )
    output.add_argument("--approval-key", action="store_true", help="the websocket's key instead of the token")
    check = command("check", _check, "status of the markets; read-only, asks KIS for nothing without --probe")
    add_market(check, many="*")
    check.add_argument("--probe", action="store_true", help="prove each valid token with one quote call")
    add_json(check)
    refresh = command("refresh", _refresh, "renew now")
    add_market(refresh)
    refresh.add_argument("--force", action="store_true", help="also within six hours and past the daily ceiling")
    refresh.add_argument("--reason", type=_text, default="", help="kept in the issuance record")
    refresh.add_argument("--by", type=_text, help="who asks, for the record (otherwise your login)")
    delete = command("delete", _delete, "remove the market's token file; the issuance record stays")
    add_market(delete)
    delete.add_argument(
        "--revoke",
        action="store_true",
        help="also make KIS forget the token, for all who use it; a new one can be had six hours after its issue",
    )


def _get(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    if options.approval_key:
        print(_approval_key(manager, options))
    elif options.json:
        print_json(_as_json(manager, _served(manager, options)))
    elif options.format:
        print(_FORMATS[options.format](_served(manager, options)))
    else:
        print(_served(manager, options).access_token)
    return 0


def _approval_key(manager: TokenManager, options: argparse.Namespace) -> str:
    if options.no_renew:
        raise ConfigurationError("--no-renew is for tokens, not for the --approval-key; leave one of them out.")
    return manager.get_approval_key()


def _served(manager: TokenManager, options: argparse.Namespace) -> Token:
    """The token as a whole, so that its text and its expiry are of one renewal."""
    if not options.no_renew:
        manager.get_valid_token()
    token = manager.load_token()
    if token is None or not token.serves(datetime.now(UTC), manager.market.buffer):
        raise TokenUnavailableError(
            f"There is no valid token for {manager.market.name!r} in the cache "
            f"({manager.get_token_status()['status']}), and "
            f"{'--no-renew forbids to ask for one' if options.no_renew else 'another process has just removed it'}.",
        )
    return token


def _as_json(manager: TokenManager, token: Token) -> dict[str, object]:
    told = {"market", "environment", "expires_at", "issued_at", "remaining_seconds"}
    fields = {name: value for name, value in manager.get_token_status().items() if name in told}
    return {"access_token": token.access_token, "token_type": "Bearer"} | fields


def _as_process(token: Token) -> str:
    """The shape of AWS's `credential_process`, which many launchers of processes can read."""
    return json.dumps({"Version": 1, "token": token.access_token, "Expiration": _expiry(token)})


def _as_env(token: Token) -> str:
    names = {"KIS_ACCESS_TOKEN": token.access_token, "KIS_TOKEN_EXPIRES_AT": _expiry(token)}
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in names.items())


def _as_header(token: Token) -> str:
    return f"Authorization: Bearer {token.access_token}"


def _expiry(token: Token) -> str:
    return token.expires_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_FORMATS = {"process": _as_process, "env": _as_env, "header": _as_header}


def _check(options: argparse.Namespace) -> int:
    asked = [TokenManager(name) for name in options.market] or managers()
    found = statuses(asked)
    code = 0 if all(status["valid"] for status in found) else NOT_VALID
    proofs: dict[str, tuple[bool | None, str]] = {}
    if options.probe:
        proofs = {manager.market.name: manager.probe() for manager in asked if not manager.is_token_expired()}
        if any(accepted is False for accepted, _ in proofs.values()):
            code = NOT_VALID
        elif any(accepted is None for accepted, _ in proofs.values()):
            code = code or UNREACHABLE
    if options.json:
        print_json([{**status, **_proof(proofs, status["market"])} for status in found])
    else:
        from tokencore import view  # tables for people, which programs need not wait for

        view.print_statuses(found, proofs, datetime.now(UTC))
    return code


def _proof(proofs: dict[str, tuple[bool | None, str]], market: str) -> dict[str, object]:
    return {"probe": {"accepted": proofs[market][0], "told": proofs[market][1]}} if market in proofs else {}


def _refresh(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    renewed = manager.refresh(
        force=options.force, reason=options.reason, by=_login() if options.by is None else options.by
    )
    told = "Renewed." if renewed else "KIS handed back the present token (its six-hour rule); nothing has changed."
    print(f"{told}\n{manager.get_token_info()}")
    return 0


def _login() -> str:
    """The name of whoever is logged in, where the system knows one."""
    from getpass import getuser  # asks the password database

    try:
        return getuser()
    except (KeyError, OSError, ImportError):  # a container's user need not have a name
        return ""


def _text(argument: str) -> str:
    """What a terminal of another encoding sent may not be text at all."""
    return argument.encode(errors="replace").decode()


def _delete(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    if options.revoke:
        print(_revoked(manager))
    print("Deleted." if manager.delete_token() else f"There was no token file for {options.market!r}.")
    return 0


def _revoked(manager: TokenManager) -> str:
    token = manager.newest_token()
    if token is None or not manager.revoke():
        return "There is no token to revoke."
    until = token.same_until()
    later = f" KIS issues a new one from {tell(until)}." if until and until > datetime.now(UTC) else ""
    return f"Revoked at KIS, for every market of the key.{later}"
