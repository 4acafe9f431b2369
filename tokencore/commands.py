"""The commands: what is asked, of which market, and how the answer is printed."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

from tokencore import __doc__ as about
from tokencore import picture, plan, sandbox, view
from tokencore.errors import ConfigurationError, TokenError, TokenUnavailableError
from tokencore.fleet import managers
from tokencore.limits import tell
from tokencore.manager import TokenManager
from tokencore.rule import tick

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_VALID, UNREACHABLE = 3, 6
LONGEST_PLAN = 31  # days: beyond it, the picture is a smear
EXIT_CODES = (
    "exit codes: 0 done (check: every asked market valid), 1 unexpected, 2 usage or settings, 3 no valid token, "
    "4 issuance limit, 5 credentials refused, 6 KIS unreachable, 7 store unusable"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see `{self.prog} --help`.")


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command line; the exit code.

    Raises:
        TokenError: what the command met; its class has the exit code.

    """
    logging.basicConfig(level=logging.WARNING, format="tokencore: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Korean or block characters shows question marks
    options = parser().parse_args(arguments)
    code: int = options.run(options)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(prog="tokencore", description=(about or "").partition("\n")[0], epilog=EXIT_CODES)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        added.set_defaults(run=function)
        return added

    def market(to: argparse.ArgumentParser, *, many: str | None = None) -> None:
        to.add_argument("market", nargs=many, metavar="MARKET", help="us, kr, or a market of your settings")

    get = command("get", _get, "print the token, and nothing else; renews if it must")
    market(get)
    get.add_argument("--no-renew", action="store_true", help="only what is cached: ask KIS for nothing")
    check = command("check", _check, "status of the markets; read-only, asks KIS for nothing without --probe")
    market(check, many="*")
    check.add_argument("--probe", action="store_true", help="prove each valid token with one quote call")
    refresh = command("refresh", _refresh, "renew now")
    market(refresh)
    refresh.add_argument("--force", action="store_true", help="also within six hours and past the daily ceiling")
    refresh.add_argument("--reason", type=_text, default="", help="kept in the issuance record")
    delete = command("delete", _delete, "remove the market's token file; the issuance record stays")
    market(delete)
    delete.add_argument(
        "--revoke",
        action="store_true",
        help="also make KIS forget the token, for all who use it; a new one can be had six hours after its issue",
    )
    planned = command(
        "plan", _plan, "the sessions ahead, the token's life, the daily anchor, and the next renewals and why"
    )
    planned.add_argument("--days", type=_days, default=plan.DAYS, metavar="N", help="1 to 31 (%(default)s)")
    planned.add_argument("--svg", metavar="FILE", help="write the picture there; - for standard output")
    history = command("history", _history, "the issuance record: every attempt, and what became of it")
    market(history, many="?")
    command("tick", _tick, "one decision of the renewal rule for every key, for cron")
    for with_json in (get, check, planned, history):
        with_json.add_argument("--json", action="store_true", help="for programs")
    gateway = command("sandbox", sandbox.run, "a KIS gateway on loopback, to try things out")
    sandbox.add_arguments(gateway)
    return top


def _get(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    text = _cached(manager) if options.no_renew else manager.get_valid_token()
    if not options.json:
        print(text)
        return 0
    status = manager.get_token_status()
    told = {"market", "environment", "expires_at", "issued_at", "remaining_seconds"}
    fields = {name: value for name, value in status.items() if name in told}
    _print_json({"access_token": text, "token_type": "Bearer"} | fields)
    return 0


def _cached(manager: TokenManager) -> str:
    token = manager.load_token()
    if token is None or not token.serves(datetime.now(UTC), manager.market.buffer):
        raise TokenUnavailableError(
            f"There is no valid token for {manager.market.name!r} in the cache "
            f"({manager.get_token_status()['status']}), and --no-renew forbids to ask for one.",
        )
    return token.access_token


def _check(options: argparse.Namespace) -> int:
    asked = [TokenManager(name) for name in options.market] or managers()
    statuses = [manager.get_token_status() for manager in asked]
    code = 0 if all(status["valid"] for status in statuses) else NOT_VALID
    proofs: dict[str, tuple[bool | None, str]] = {}
    if options.probe:
        proofs = {manager.market.name: manager.probe() for manager in asked if not manager.is_token_expired()}
        if any(accepted is False for accepted, _ in proofs.values()):
            code = NOT_VALID
        elif any(accepted is None for accepted, _ in proofs.values()):
            code = code or UNREACHABLE
    if options.json:
        _print_json([{**status, **_proof(proofs, status["market"])} for status in statuses])
    else:
        view.print_statuses(statuses, proofs, datetime.now(UTC))
    return code


def _proof(proofs: dict[str, tuple[bool | None, str]], market: str) -> dict[str, object]:
    return {"probe": {"accepted": proofs[market][0], "told": proofs[market][1]}} if market in proofs else {}


def _refresh(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    renewed = manager.refresh(force=options.force, reason=options.reason)
    told = "Renewed." if renewed else "KIS handed back the present token (its six-hour rule); nothing has changed."
    print(f"{told}\n{manager.get_token_info()}")
    return 0


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


def _plan(options: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    plans = [plan.make_plan(manager, now, options.days) for manager in managers(one_per_key=True)]
    if options.svg:
        _write(options.svg, picture.draw_plans(plans))
    if options.json:
        _print_json([plan.as_json(one) for one in plans])
    elif not options.svg:
        for one in plans:
            view.print_plan(one)
    return 0


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LONGEST_PLAN:
        raise argparse.ArgumentTypeError(f"must be a number of days from 1 to {LONGEST_PLAN}")
    return int(text)


def _write(target: str, text: str) -> None:
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be written: {error.strerror}.") from None


def _history(options: argparse.Namespace) -> int:
    asked = [TokenManager(options.market)] if options.market else managers(one_per_key=True)
    lines = [{"markets": manager.sharing(), **attempt._asdict()} for manager in asked for attempt in manager.history()]
    if options.json:
        _print_json([{k: v for k, v in line.items() if k not in ("pid", "credentials")} for line in lines])
    else:
        view.print_history(lines)
    return 0


def _tick(_options: argparse.Namespace) -> int:
    """Every key gets its turn, whatever another one met; the first trouble is the exit code."""
    code = 0
    for manager in managers(one_per_key=True):
        try:
            decision = tick(manager, datetime.now(UTC))
            trouble = decision.trouble
        except TokenError as error:
            trouble = error
        else:
            view.print_decision("+".join(manager.sharing()), decision)
        if trouble:
            print(f"tokencore: {manager.market.name}: {trouble}", file=sys.stderr)
            code = code or trouble.exit_code
    return code


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, default=_iso))  # ASCII: it passes through every pipe unharmed


def _iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
