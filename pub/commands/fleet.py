"""The commands of a fleet, whose machines share app keys: `fleet init`, `fleet rotate` and `follow`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from tokencore.commands import until_stopped
from tokencore.config.settings import Settings
from tokencore.errors import ConfigurationError, TokenStoreError

if TYPE_CHECKING:
    import argparse

    from tokencore.commands import AddCommand

ROLE = r"[a-z_][a-z0-9_]{0,62}"
GRANTS = """\
-- As the tables' owner, who may create roles, or a superuser: the machines' role. Its password: \\password {role}
CREATE ROLE {role} LOGIN;
GRANT SELECT, INSERT, UPDATE ON tokencore_key, tokencore_attempt TO {role};"""


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    fleet = command("fleet", _fleet, "the store that machines share: make its tables, or seal it with the newest key")
    fleet.add_argument("what", choices=("init", "rotate"), metavar="init|rotate", help="what to do with KIS_STORE")
    fleet.add_argument("--role", default="tokencore", help="whom the printed SQL lets use the tables (%(default)s)")
    command("follow", _follow, "keep this machine's files as its fleet's store has them, until it is stopped")


def _fleet(options: argparse.Namespace) -> int:
    settings = _shared()
    return _rotate(settings) if options.what == "rotate" else _init(settings, options.role)


def _init(settings: Settings, role: str) -> int:
    if not re.fullmatch(ROLE, role):
        raise ConfigurationError("--role must be a name of small letters, digits and _; nothing was changed.")
    from tokencore.stores.database import make_tables  # needs the extra `fleet`

    quoted, used = make_tables(settings.store.get_secret_value() if settings.store else "", role)
    print("-- The tables are there.")
    print(GRANTS.format(role=quoted))
    if used:
        print("-- They are in use: KIS_STORE_KEYS stays what the other machines have.")
    elif not settings.store_keys:
        from cryptography.fernet import Fernet

        key = Fernet.generate_key().decode()
        print(f"-- A new key, the same for all machines; if you have one already, keep that: KIS_STORE_KEYS={key}")
    return 0


def _rotate(settings: Settings) -> int:
    from tokencore.stores.fleet import rotate

    if kept := rotate(settings):
        raise TokenStoreError(
            f"{len(kept)} entries cannot be decrypted with KIS_STORE_KEYS ({', '.join(kept[:3])}); they are as they "
            "were, and all others are sealed with the newest key. Add the key that sealed them, and run this again."
        )
    print("Everything is sealed with the newest key of KIS_STORE_KEYS.")
    return 0


def _follow(_: argparse.Namespace) -> int:
    settings = _shared()
    from tokencore.stores.shared_store import make_follower

    follower = make_follower(settings)
    print(f"Following the fleet for {len(settings.able_markets())} markets.", file=sys.stderr)
    with until_stopped():
        follower.run()
    return 0


def _shared() -> Settings:
    settings = Settings.load()
    if not settings.store:
        raise ConfigurationError("KIS_STORE is not set: this machine keeps its tokens for itself; see docs/fleet.md.")
    return settings
