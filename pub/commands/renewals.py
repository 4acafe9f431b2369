"""The commands about renewals, past and to come: `refresh`, `plan`, `history` and `tick`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tokencore.attempts import Outcome, host_name
from tokencore.commands import FOR_PROGRAMS, confirm, key_of, print_json
from tokencore.config.settings import Settings
from tokencore.errors import ConfigurationError, TokenError
from tokencore.keys import Key
from tokencore.manager import TokenManager
from tokencore.outlook import PLAN_DAYS, plan_as_json
from tokencore.tokens import format_time

if TYPE_CHECKING:
    import argparse

    from tokencore.attempts import Attempt
    from tokencore.commands import AddCommand

DAYS = range(1, 32)  # with more days, the picture would be unreadable
HOUR = timedelta(hours=1)


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    what = "renew now; declined with 4 while KIS would return the same token, or over the ceiling"
    force = "also within six hours and past the daily ceiling; asks before a second one in an hour"
    flags = {"--force": force, "--yes": "force without that question; needed for it without a terminal"}
    refresh = command("refresh", _refresh, what, market="one", flags=flags)
    refresh.add_argument("--reason", default="", help="kept in the issuance record")
    refresh.add_argument("--by", help="who asks, for the record (otherwise your login)")
    what = "the sessions ahead, the token's life, the daily anchor, and the next renewals and why"
    planned = command("plan", _plan, what, flags={"--json": FOR_PROGRAMS})
    planned.add_argument("--days", type=int, choices=DAYS, default=PLAN_DAYS, metavar="N", help="1 to 31 (%(default)s)")
    planned.add_argument("--svg", metavar="FILE", help="write the picture there; - for standard output")
    what = "the issuance record: every attempt, and what became of it"
    command("history", _history, what, market="?", flags={"--json": FOR_PROGRAMS})
    what = "one decision of the renewal rule for every key, for cron; the exit code is the first trouble's"
    command("tick", _tick, what)


def _refresh(options: argparse.Namespace) -> int:
    manager = TokenManager(options.market)
    if options.force and not options.yes:
        _confirm_second(manager.history())
    by = _login() if options.by is None else options.by
    renewed = manager.refresh(force=options.force, reason=options.reason, by=by)
    same = "KIS returned the present token (its six-hour rule); nothing has changed."
    print(f"{'Renewed.' if renewed else same}\n{manager.get_token_info()}")
    return 0


def _confirm_second(attempts: list[Attempt]) -> None:
    """Ask before forcing a renewal within an hour of another that a person requested: a scheduler may run amok.

    Renewals that programs made by themselves do not count.
    """
    now = datetime.now(UTC)
    granted = [one for one in attempts if one.by and one.outcome in (Outcome.ISSUED, Outcome.SAME)]
    recent = [one for one in granted if abs(now - one.at) < HOUR]
    if recent:
        last = f"{recent[-1].by} renewed this key at {format_time(recent[-1].at)}"
        question = f"{last}, less than an hour ago; KIS may restrict a key that takes more than one a day. Renew again?"
        confirm("--force within an hour of another refresh", question, "Nothing was asked of KIS.")


def _login() -> str:
    """Return the name of the user who is logged in, or `unknown`."""
    from getpass import getuser  # only this command needs it

    try:
        return getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return "unknown"


def _plan(options: argparse.Namespace) -> int:
    if options.json and options.svg == "-":
        raise ConfigurationError("--json and --svg - both write to standard output; name a file for the picture.")
    now = datetime.now(UTC)
    plans = [key.state(now).plan(options.days) for key in Key.load(Settings.load())]
    if options.svg:
        from tokencore.reports.plan_svg import draw_plans

        _write(options.svg, draw_plans(plans))
    if options.json:
        print_json([plan_as_json(one) for one in plans])
    elif not options.svg:
        from tokencore.reports.tables import print_plan

        for one in plans:
            print_plan(one)
    return 0


def _write(target: str, text: str) -> None:
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be written ({error.strerror}); name a file elsewhere.") from None


def _history(options: argparse.Namespace) -> int:
    settings = Settings.load()
    keys = [key_of(settings, options.market)] if options.market else Key.load(settings)
    named = [([market.name for market in key.markets], key.store.attempts()) for key in keys]
    here = host_name(settings.token_dir) if settings.store else ""
    found = [(names, one._replace(host=one.host or here)) for names, listed in named for one in listed]
    if options.json:
        listed = [{"markets": names} | one._asdict() for names, one in found]
        hidden = {"pid", "credentials"}  # of no use to readers; nor is the host outside a fleet
        print_json([{k: v for k, v in one.items() if k not in hidden and (v or k != "host")} for one in listed])
    else:
        from tokencore.reports.tables import print_history

        print_history(found)
    return 0


def _tick(_options: argparse.Namespace) -> int:
    """Make one decision for every key, whatever happens to the others; the first error gives the exit code."""
    from tokencore.reports.tables import describe_tick

    code = 0
    for key in Key.load(Settings.load()):
        try:
            decision = key.tick(key.state(datetime.now(UTC)))
            trouble = decision.trouble
            print(describe_tick(decision))
        except TokenError as error:
            trouble = error
        if trouble:
            print(f"tokencore: {key.name}: {trouble}", file=sys.stderr)
            code = code or trouble.exit_code
    return code
