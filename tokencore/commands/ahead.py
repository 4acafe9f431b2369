"""The commands around renewals, to come and past: `plan`, `history` and `tick`."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import picture, plan, view
from tokencore.commands.shared import add_json, add_market, print_json
from tokencore.errors import ConfigurationError, TokenError
from tokencore.fleet import managers
from tokencore.manager import TokenManager
from tokencore.rule import tick

if TYPE_CHECKING:
    from tokencore.commands.shared import AddCommand

LONGEST_PLAN = 31  # days: beyond it, the picture is a smear


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    planned = command(
        "plan", _plan, "the sessions ahead, the token's life, the daily anchor, and the next renewals and why"
    )
    planned.add_argument("--days", type=_days, default=plan.DAYS, metavar="N", help="1 to 31 (%(default)s)")
    planned.add_argument("--svg", metavar="FILE", help="write the picture there; - for standard output")
    add_json(planned)
    history = command("history", _history, "the issuance record: every attempt, and what became of it")
    add_market(history, many="?")
    add_json(history)
    command("tick", _tick, "one decision of the renewal rule for every key, for cron")


def _plan(options: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    plans = [plan.make_plan(manager, now, options.days) for manager in managers(one_per_key=True)]
    if options.svg:
        _write(options.svg, picture.draw_plans(plans))
    if options.json:
        print_json([plan.as_json(one) for one in plans])
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
        print_json([{k: v for k, v in line.items() if k not in ("pid", "credentials")} for line in lines])
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
            refused = manager.renewal_allowed_from(datetime.now(UTC)) is None
            view.print_decision("+".join(manager.sharing()), decision, refused=refused)
        if trouble:
            print(f"tokencore: {manager.market.name}: {trouble}", file=sys.stderr)
            code = code or trouble.exit_code
    return code
