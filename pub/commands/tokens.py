"""The commands that use a token: `get`, `exec`, `reject` and `delete`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore.commands import FOR_PROGRAMS, confirm, print_json, read_input
from tokencore.errors import ConfigurationError, TokenUnavailableError
from tokencore.manager import TokenManager
from tokencore.tokens import as_answer, format_time, from_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from tokencore.commands import AddCommand
    from tokencore.tokens import Token

SAID = ("market", "environment", "expires_at", "issued_at", "remaining_seconds")  # status fields shown with the token


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    flags = {"--no-renew": "only what is cached: ask KIS for nothing"}
    get = command("get", _get, "print the token, and nothing else; renews if it must", market="one", flags=flags)
    output = get.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help=FOR_PROGRAMS)
    output.add_argument(
        "--format",
        choices=[*filter(None, _FORMATS)],
        help="process: JSON with version, token and expiration; env: for a shell's eval; dotenv: for docker's "
        "--env-file; header: for an HTTP request; answer: JSON as tokenP answers",
    )
    output.add_argument("--approval-key", action="store_true", help="the websocket's key instead of the token")
    what = "run a program with KIS_ACCESS_TOKEN and KIS_TOKEN_EXPIRES_AT set; its exit code"
    command("exec", _exec, what, market="one").usage = "%(prog)s [-h] MARKET -- COMMAND [ARGUMENT ...]"
    what = "report a token that KIS has rejected, given on standard input; prints nothing"
    command("reject", _reject, what, market="one", flags={"--approval-key": "it is the websocket's key"})
    revoke = (
        "also make KIS forget the token, for all who use it; a new one is possible six hours after its issue. Asks "
        "first: any answer but yes ends it with 2, and nothing is done"
    )
    flags = {"--revoke": revoke, "--yes": "revoke without the question; needed without a terminal"}
    command("delete", _delete, "remove the market's token file; the issuance record stays", market="one", flags=flags)


def _get(options: argparse.Namespace) -> int:
    manager, renew = TokenManager(options.market), not options.no_renew
    if options.approval_key:
        if not renew:
            raise ConfigurationError("--no-renew is for tokens, not for the --approval-key; leave one of them out.")
        print(manager.get_approval_key())
    elif options.json:
        token, facts = _served(manager, renew=renew), manager.get_token_status().items()
        said = {"access_token": token.access_token, "token_type": "Bearer"}
        print_json(said | {name: value for name, value in facts if name in SAID})
    else:
        print(_FORMATS[options.format](_served(manager, renew=renew)))
    return 0


def _served(manager: TokenManager, *, renew: bool) -> Token:
    """Return the whole token, so that its text and its expiry belong to the same renewal."""
    if renew:
        manager.get_valid_token()
    if token := _present(manager):
        return token
    status = manager.get_token_status()["status"]  # this asks a fleet's store too
    if token := _present(manager):
        return token
    why = "another process has just removed it" if renew else "--no-renew forbids asking for one"
    raise TokenUnavailableError(
        f"There is no valid token for {manager.market.name!r} in the cache ({status}), and {why}."
    )


def _present(manager: TokenManager) -> Token | None:
    token = manager.load_token()
    return token if token and token.serves(datetime.now(UTC), manager.market.buffer) else None


def _variables(token: Token) -> dict[str, str]:
    return {"KIS_ACCESS_TOKEN": token.access_token, "KIS_TOKEN_EXPIRES_AT": _expiry(token)}


def _expiry(token: Token) -> str:
    return token.expires_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_FORMATS: dict[str | None, Callable[[Token], str]] = {
    None: lambda token: token.access_token,
    # The format of AWS's `credential_process`, which many process launchers can read.
    "process": lambda token: json.dumps({"Version": 1, "token": token.access_token, "Expiration": _expiry(token)}),
    "env": lambda token: "\n".join(f"export {name}={shlex.quote(value)}" for name, value in _variables(token).items()),
    # Without quotes: docker would take them as part of the value.
    "dotenv": lambda token: "\n".join(f"{name}={value}" for name, value in _variables(token).items()),
    "header": lambda token: f"Authorization: Bearer {token.access_token}",
    "answer": lambda token: json.dumps(as_answer(token, datetime.now(UTC))),
}


def _exec(options: argparse.Namespace) -> int:
    if not any(options.program[:1]):  # an empty name is what a shell makes of an unset variable
        raise ConfigurationError("No program was given; name it after --: `tokencore exec MARKET -- COMMAND`.")
    token = _served(TokenManager(options.market), renew=True)
    environment = {**os.environ, **_variables(token)}
    try:
        return _run(options.program, environment)
    except (OSError, ValueError) as error:  # ValueError: no system takes such a name, as an empty one
        why = getattr(error, "strerror", "no such name is possible")
    raise ConfigurationError(f"{options.program[0]!r} cannot be run ({why}); the token is there, correct the command.")


def _run(program: list[str], environment: dict[str, str]) -> int:
    """Let the program replace this process, or wait for it on Windows; OSError if it cannot be run."""
    if sys.platform == "win32":
        return subprocess.run(program, env=environment, check=False).returncode  # noqa: S603 - the user's own, without a shell
    # Python ignores these signals, and the program would inherit that.
    ignored = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        os.execvpe(program[0], program, environment)  # noqa: S606 # nosec B606 - the same
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)


def _reject(options: argparse.Namespace) -> int:
    manager, text = TokenManager(options.market), read_input()
    if options.approval_key:
        manager.get_approval_key(rejected=text)
    else:
        with contextlib.suppress(ValueError):  # an opaque token by itself, without an expiry
            text = from_text(text)[0].access_token  # in any form that `get` prints
        manager.report_rejected(text)
    return 0


def _delete(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    revoked = options.revoke and _revoke(manager, asking=not options.yes)
    if manager.delete_token() or revoked:
        print("Deleted.")
        return 0
    kept = "Other markets' files keep its key's token; the doctor lists those of markets that are not configured."
    print(f"There was no token file for {manager.market.name!r}. {kept if manager.load_token() else ''}".rstrip())
    return 0


def _revoke(manager: TokenManager, *, asking: bool) -> bool:
    token = manager.load_token()
    until = token.same_until() if token else None
    again = f"KIS issues a new one only from {format_time(until)}." if until and until > datetime.now(UTC) else ""
    if token and asking:
        markets = ", ".join(one.name for one in manager.market.settings.sharing(manager.market))
        later = again or "KIS issues a new one at the next request."
        question = f"Every program that uses the token of {markets} loses it. {later} Revoke it?"
        confirm("--revoke", question, "Nothing was revoked or deleted.")
    if token is None or not manager.revoke():
        print("There is no token to revoke.")
        return False
    print(f"Revoked at KIS, for every market of the key. {again}".rstrip())
    return True
