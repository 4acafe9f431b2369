"""The checks of a fleet's store for `tokencore doctor`; they write nothing to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokencore.stores.fleet import Fleet
from tokencore.stores.lock import hold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.config.settings import Settings
    from tokencore.stores.database import Database

    Found = tuple[str, object, str, str, str]  # what was checked, whether it is bad, the detail if not, if so, the fix

WRITES = """
with one as (update tokencore_key set version = version where false),
  two as (update tokencore_attempt set fence = fence where false),
  three as (insert into tokencore_key select * from tokencore_key where false)
insert into tokencore_attempt select * from tokencore_attempt where false"""  # changes nothing, but needs the rights
DESTROYS = "has_table_privilege('tokencore_key', 'DELETE') or has_table_privilege('tokencore_key', 'TRUNCATE')"


def checks(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Check the connection, its encryption, the role, the clock, the keys, and whether this machine has a follower.

    Return a line for each: `ok` or `warn`, what was checked, the detail, and the fix.

    Raises:
        TokenError: the store cannot be used; the message says why, and what to do.
    """
    fleet = Fleet.of(settings)
    with fleet.connect() as session:
        found = [*_connection(session), *_rows(fleet, session)]
    fix = "run `tokencore follow` where programs use commands only"
    wrong = "no process of this machine follows the fleet"
    found.append(("store follower", not _followed(fleet), "a process of this machine follows the fleet", wrong, fix))
    return [("warn", name, bad, fix) if wrong else ("ok", name, good, "") for name, wrong, good, bad, fix in found]


def _followed(fleet: Fleet) -> bool:
    place = fleet.follower_lock(fleet.rows())
    if not os.path.exists(place):  # a look makes neither it nor the token directory
        return False
    with hold(place, 0, lambda: True) as free:
        return not free


def _connection(session: Database) -> Iterator[Found]:
    session.execute(WRITES)
    yield "store", False, "reachable; its tables match this version", "", ""
    fix = "set sslmode=verify-full and sslrootcert in KIS_STORE, unless the server runs on this host"
    wrong = "the connection is not encrypted"
    yield "store encryption", not session.encrypted, "the connection is encrypted", wrong, fix
    fix = "use the role that `tokencore fleet init` prints"
    mighty = session.execute(f"select {DESTROYS}")[0][0]
    yield "store role", mighty, "it cannot delete rows", "it can delete rows", fix


def _rows(fleet: Fleet, session: Database) -> Iterator[Found]:
    states = session.read(["layout", *session.names()], 0)
    ahead = states.pop("layout").ahead.total_seconds()
    wrong = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    yield "store clock", ahead, "this machine's clock agrees with the server's", wrong, "synchronize both by NTP"
    opened = [fleet.seal.opened_by(state.sealed) for state in states.values()]
    foreign, old = opened.count(None), len([one for one in opened if one])
    fix = "add the key that sealed them to KIS_STORE_KEYS" if foreign else "run `tokencore fleet rotate`"
    detail = f"{foreign} of {len(opened)} entries cannot be decrypted, {old} are sealed with an older key"
    yield "store keys", foreign or old, f"{len(opened)} entries, all sealed with the newest key", detail, fix
