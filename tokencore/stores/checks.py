"""The checks of a fleet's store for `tokencore doctor`; they write nothing to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokencore.stores.fleet import Fleet
from tokencore.stores.lock import hold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.config.settings import Settings
    from tokencore.stores.database import Database

    Check = tuple[str, str, str, str]  # `ok` or `warn`, what was checked, the detail, and the fix

DESTROYS = "has_table_privilege('tokencore_key', 'DELETE') or has_table_privilege('tokencore_key', 'TRUNCATE')"


def checks(settings: Settings) -> list[Check]:
    """Check the connection, its encryption, the role, the clock, the keys, and whether this machine has a follower.

    Raises:
        TokenError: the store cannot be used; the message says why, and what to do.

    """
    fleet = Fleet.of(settings)
    with fleet.connect() as session:
        lines = [
            ("store", "reachable; its tables match this version", ""),
            ("store encryption", *_either(not session.encrypted, "the connection is encrypted", *OPEN)),
            ("store role", *_either(session.execute(f"select {DESTROYS}")[0][0], "it cannot delete rows", *MIGHTY)),
            *_rows(fleet, session),
        ]
    with hold(fleet.follower_lock(fleet.rows()), 0, lambda: True) as alone:
        lines.append(("store follower", *_either(alone, "a process of this machine follows the fleet", *ALONE)))
    return [("warn" if fix else "ok", name, detail, fix) for name, detail, fix in lines]


OPEN = (
    "the connection is not encrypted",
    "set sslmode=verify-full and sslrootcert in KIS_STORE, unless the server runs on this host",
)
MIGHTY = "it can delete rows", "use the role that `tokencore fleet init` prints"
ALONE = "no process of this machine follows the fleet", "run `tokencore follow` where programs use commands only"


def _either(bad: object, well: str, trouble: str, fix: str) -> tuple[str, str]:
    return (trouble, fix) if bad else (well, "")


def _rows(fleet: Fleet, session: Database) -> Iterator[tuple[str, str, str]]:
    states = session.read(["layout", *session.names()], 0)
    ahead = states.pop("layout").ahead.total_seconds()
    wrong = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    yield (
        "store clock",
        *_either(ahead, "this machine's clock agrees with the server's", wrong, "synchronize both by NTP"),
    )
    opened = [fleet.seal.opened_by(state.sealed) for state in states.values()]
    foreign, old = opened.count(None), len([one for one in opened if one])
    fix = "add the key that sealed them to KIS_STORE_KEYS" if foreign else "run `tokencore fleet rotate`"
    detail = f"{foreign} of {len(opened)} entries cannot be decrypted, {old} are sealed with an older key"
    yield "store keys", *_either(foreign or old, f"{len(opened)} entries, all sealed with the newest key", detail, fix)
