"""The PostgreSQL server that a fleet shares: every call has a deadline, every change is one compare-and-set.

A row of `tokencore_key` is a key's token or a document, encrypted, with a version that each change increments; a row of
`tokencore_attempt` is an issue request, identified by its fence. A change that may conflict with another names the
version or fence that its caller has read. The times in the rows are the server's.
"""

from __future__ import annotations

import random
import re
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tokencore import attempts as record
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.sealing import Sensitive
from tokencore.stores.encryption import INSTALL

try:
    import psycopg
except ImportError:  # it is an optional extra, and so is the libpq that it needs
    raise ConfigurationError(f"KIS_STORE needs the package psycopg; {INSTALL}.") from None

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencore.attempts import Attempt

CONNECT, PATIENCE, ANSWER = 3, 5.0, 3.0  # seconds for one try to connect, for all tries, and for each answer
PAUSE = 0.1  # seconds between two tries, on average
KEEP = 1024  # attempts kept for each key, as in the files
LAYOUT = "1"  # the version of the tables, kept in the row `layout`
LEASE = 60  # seconds for which a document is locked at most
AHEAD = timedelta(seconds=0.25)  # clocks that differ by less count as equal
TABLES = f"""
create table if not exists tokencore_key (
  key text primary key, version bigint not null, fence bigint not null default 0, sealed text not null,
  leased_until timestamptz, changed_at timestamptz not null default clock_timestamp());
create table if not exists tokencore_attempt (
  key text, slot integer, fence bigint not null, at timestamptz not null, host text not null, what text not null,
  primary key (key, slot));
create index if not exists tokencore_attempt_fence on tokencore_attempt (key, fence);
insert into tokencore_key (key, version, sealed) values ('layout', 1, '{LAYOUT}') on conflict do nothing"""  # noqa: S608 - a constant of our own
_READ = """
select k.key, k.version, k.sealed, extract(epoch from clock_timestamp())::float8, coalesce((
  select json_agg(json_build_array(a.fence, extract(epoch from a.at), a.host, a.what) order by a.fence)
  from tokencore_attempt a where a.key = k.key and a.fence > k.fence - %(depth)s
  and a.at between '2000-01-01' and clock_timestamp() + interval '1 day'), '[]')
from tokencore_key k where k.key = any(%(keys)s)"""
_BEGIN = f"""
with mine as (update tokencore_key set version = version + 1, fence = fence + 1, changed_at = clock_timestamp()
  where key = %(key)s and version = coalesce(%(version)s::bigint, version) returning key, fence)
insert into tokencore_attempt (key, slot, fence, at, host, what)
select key, fence %% {KEEP}, fence, %(at)s, %(host)s, %(what)s from mine
on conflict (key, slot) do update
set fence = excluded.fence, at = excluded.at, host = excluded.host, what = excluded.what
returning fence, pg_notify('tokencore', key)"""  # noqa: S608 - a number of our own
_DEPART = """
with mine as (update tokencore_key set version = version + 1 where key = %(key)s and fence = %(fence)s returning key)
update tokencore_attempt a set at = clock_timestamp() from mine where a.key = mine.key and a.fence = %(fence)s
returning a.fence"""
_FINISH = """
with mine as (update tokencore_key set version = version + 1, changed_at = clock_timestamp() where key = %(key)s)
update tokencore_attempt set at = %(at)s, what = %(what)s where key = %(key)s and fence = %(fence)s
returning pg_notify('tokencore', key)"""
_PUT = """
insert into tokencore_key (key, version, sealed) values (%(key)s, 1, %(sealed)s)
on conflict (key) do update
set version = tokencore_key.version + 1, sealed = excluded.sealed, changed_at = clock_timestamp()
where tokencore_key.version = %(version)s returning version, pg_notify('tokencore', key)"""
_LEASE = """
update tokencore_key set version = version + 1, leased_until = clock_timestamp() + %(lease)s * interval '1 second'
where key = %(key)s
and coalesce(leased_until not between clock_timestamp() and clock_timestamp() + %(lease)s * interval '1 second', true)
returning version, sealed"""
_LAYOUT = "select sealed from tokencore_key where key = 'layout'"
_NAMES = "select key from tokencore_key where key <> 'layout' and sealed <> ''"
_RELEASE = "update tokencore_key set leased_until = null where key = %(key)s and version = %(version)s"
FAULTS = {  # by a pattern in `_signs`: what failed, what to do, and whether another try may help
    "password": ("it refuses the role or its password", "correct KIS_STORE or the password file", False),
    "certificate": ("its certificate cannot be verified", "correct sslrootcert or the host in KIS_STORE", False),
    r"pg_hba\.conf": ("it does not admit this role from this machine", "add it to the server's pg_hba.conf", False),
    "closed|shutdown|syscall|eof": ("it has closed the connection", "check its log", True),
    "ssl": ("it and this machine do not agree on encryption", "correct sslmode in KIS_STORE, or the server", False),
    "undefinedtable": ("it has no tables of tokencore", "run `tokencore fleet init` as the tables' owner", False),
    "undefinedcolumn": ("its tables are of another version", "run the same tokencore on all machines", False),
    "insufficientprivilege": ("its role may not use the tables", "run the SQL of `tokencore fleet init`", False),
    "permission denied|not permitted": (
        "its role may not connect",
        "grant it LOGIN, and CONNECT to the database",
        False,
    ),
    "does not exist": ("there is no such database or role", "correct KIS_STORE", False),
    "too ?many|connection slots": ("it has no connection left", "raise max_connections, or use PgBouncer", True),
    "read-?only": ("it is read-only", "name the primary in KIS_STORE, or make it writable", True),
    "timeout|canceled": ("it does not answer", "check that its host is up, and what blocks it", True),
    "resolve": ("its host's name cannot be resolved", "correct KIS_STORE, or the DNS", True),
    "refused": ("it refuses connections", "start it, or correct KIS_STORE", True),
    "": ("the connection failed", "check its log", True),
}


class State(NamedTuple):
    """A row as it was read.

    Attributes:
        version: 0 if there is no row.
        sealed: the encrypted content.
        attempts: the record by fence, oldest first, dated by this machine's clock; `host` is empty for this one.
        ahead: how far this machine's clock is ahead of the server's.
    """

    version: int
    sealed: str
    attempts: dict[int, Attempt]
    ahead: timedelta


class _Connection(psycopg.Connection[Any]):
    """Waits at most `ANSWER` seconds for an answer; psycopg itself would wait forever."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:  # noqa: ANN401 - as psycopg
        return super().wait(gen, interval, ANSWER if timeout is None else timeout)


class Database(Sensitive):
    """A connection, closed by its `with` block; an answer that does not come in time is an error, and means "no"."""

    __slots__ = ("_connection", "_host")

    def __init__(self, address: str, host: str, patience: float = PATIENCE) -> None:
        """Connect, retrying for `patience` seconds while that may help; `host` names this machine in the attempts.

        Raises:
            TokenError: there is no connection, or there are no tables of this version; the message says why.
        """
        self._host, end, trouble = host, time.monotonic() + patience, None
        while True:
            try:
                self._connection = _within(address, end - time.monotonic())
                self._check_layout()
            except psycopg.Error as error:
                found, again = _explained(error)
                if not again:
                    raise found from None
                trouble = trouble or found  # the first error: the last try is cut short, so its error says less
            else:
                return
            pause = PAUSE * random.uniform(0.5, 1.5)  # noqa: S311 - spreads the tries
            if time.monotonic() + pause >= end:
                raise trouble
            time.sleep(pause)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def execute(self, statement: str, **values: object) -> list[tuple[Any, ...]]:
        """Execute the statement and return its rows.

        Raises:
            TokenStoreError: the statement was refused, or no answer came in time.
        """
        try:
            found = self._connection.execute(statement, values or None)
            return found.fetchall() if found.description else []
        except psycopg.Error as error:
            raise _explained(error)[0] from None

    @property
    def encrypted(self) -> bool:
        """Whether the connection is encrypted."""
        return self._connection.pgconn.ssl_in_use

    def heard(self, timeout: float) -> set[str]:
        """Wait up to `timeout` seconds for notifications, and return the names of the rows that changed.

        Raises:
            TokenStoreError: the connection is lost.
        """
        try:
            return {one.payload for one in self._connection.notifies(timeout=timeout, stop_after=1)}
        except psycopg.Error as error:
            raise _explained(error)[0] from None

    def read(self, keys: Sequence[str], depth: int = KEEP) -> dict[str, State]:
        """Return the rows of these names, each with at most `depth` of its last attempts."""
        asked, found = datetime.now(UTC), dict.fromkeys(keys, State(0, "", {}, timedelta(0)))
        rows = self.execute(_READ, keys=list(keys), depth=depth)
        taken = datetime.now(UTC) - asked
        for key, version, sealed, now, attempts in rows:
            ahead = asked + taken / 2 - _time(now)
            ahead = ahead if abs(ahead) > max(AHEAD, taken) else timedelta(0)
            made = {
                fence: line[0]._replace(at=_time(at) + ahead, host="" if host == self._host else host)
                for fence, at, host, what in attempts
                if (line := record.parse(what))
            }
            found[key] = State(version, sealed, made, ahead)
        return found

    def names(self) -> set[str]:
        """Return the names of all rows that have content, except `layout`."""
        return {key for (key,) in self.execute(_NAMES)}

    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the versions of the rows of these names."""
        return dict(self.execute("select key, version from tokencore_key where key = any(%(keys)s)", keys=list(keys)))

    def put(self, key: str, version: int, sealed: str) -> bool:
        """Replace the row's content, or create the row; False if it has another version by now."""
        return bool(self.execute(_PUT, key=key, version=version, sealed=sealed))

    def begin(self, key: str, version: int | None, attempt: Attempt, ahead: timedelta) -> int | None:
        """Record an attempt and return its new fence; None if a `version` is given and the row has another one.

        This machine's clock, by which the attempt is dated, is `ahead` of the server's.
        """
        found = self.execute(_BEGIN, key=key, version=version, host=self._host, **_line(attempt, ahead))
        return found[0][0] if found else None

    def depart(self, key: str, fence: int) -> bool:
        """Set the attempt's time to the server's present one; False if another attempt has begun since."""
        return bool(self.execute(_DEPART, key=key, fence=fence))

    def finish(self, key: str, fence: int, attempt: Attempt, ahead: timedelta) -> None:
        """Replace the attempt with its outcome, even if another attempt has begun since; see `begin`."""
        self.execute(_FINISH, key=key, fence=fence, **_line(attempt, ahead))

    def lease(self, key: str) -> tuple[int, str] | None:
        """Lock a document's row for `LEASE` seconds; return its version and content, or None while another holds it."""
        found = self.execute(_LEASE, key=key, lease=LEASE)
        return found[0] if found else None

    def release(self, key: str, version: int) -> None:
        """Unlock the row, unless the lease is over and another process holds it."""
        self.execute(_RELEASE, key=key, version=version)

    def _check_layout(self) -> None:
        try:
            if self._connection.execute(_LAYOUT).fetchall() != [(LAYOUT,)]:
                raise psycopg.errors.UndefinedColumn
        except psycopg.Error:
            self.close()
            raise


def _time(epoch: float) -> datetime:
    return datetime.fromtimestamp(epoch, UTC)


def _line(attempt: Attempt, ahead: timedelta) -> dict[str, object]:
    return {"at": attempt.at - ahead, "what": record.as_line(attempt)}


def make_tables(address: str, role: str = "tokencore") -> tuple[str, bool]:
    """Create the missing tables, owned by the role in the address.

    Return the name of another `role` as SQL needs it, and whether the tables have encrypted content.

    Raises:
        TokenError: they cannot be created.
    """
    try:
        with _within(address, PATIENCE) as connection:
            connection.execute(TABLES)
            quoted = connection.execute("select quote_ident(%s)", [role]).fetchall()[0][0]
            return quoted, bool(connection.execute(_NAMES).fetchall())
    except psycopg.errors.InsufficientPrivilege:
        raise TokenStoreError(
            "The fleet's tables cannot be created: the role in KIS_STORE lacks the right. Nothing was changed. To do: "
            "run this as the owner of the database and of the tables; the machines use the role whose SQL it prints."
        ) from None
    except psycopg.Error as error:
        raise _explained(error)[0] from None


def _within(address: str, limit: float) -> _Connection:
    """Connect within `limit` seconds, in a separate thread, because the lookup of a host name has no time-out."""
    made: list[_Connection | psycopg.Error] = []
    late = threading.Event()

    def connect() -> None:
        try:
            options: dict[str, Any] = {"connect_timeout": CONNECT, "tcp_user_timeout": int(ANSWER * 1000)}
            made.append(_Connection.connect(address, autocommit=True, prepare_threshold=None, **options))
        except psycopg.Error as error:
            made.append(error)
        if late.is_set() and isinstance(made[0], _Connection):
            made[0].close()

    thread = threading.Thread(target=connect, name="tokencore connection", daemon=True)
    with suppress(RuntimeError):  # the system has no thread left
        thread.start()
        thread.join(max(0.0, limit))
    late.set()
    if not made or isinstance(made[0], psycopg.Error):
        raise made[0] if made else psycopg.errors.ConnectionTimeout()  # type: ignore[misc] # no connection
    return made[0]


def _signs(error: psycopg.Error) -> str:
    """Return what tells an error's kind: its class, and the text where no SQLSTATE chose that, as while connecting.

    The names in the text, of hosts, roles and databases, are quoted, and are left out: they may resemble a fault.
    """
    text = "" if error.sqlstate else re.sub(r"\"[^\"]*\"|'[^']*'", "", str(error))
    return f"{type(error).__name__} {text}".lower()


def _explained(error: psycopg.Error) -> tuple[TokenError, bool]:
    """Return the error for people, without the libraries' own words, and whether another try may help."""
    said = _signs(error)
    if type(error) is psycopg.ProgrammingError or "invalid " in said:
        text = "KIS_STORE is not an address of PostgreSQL, such as postgresql://ROLE@HOST/DATABASE?sslmode=verify-full"
        return ConfigurationError(f"{text}; nothing was issued. Correct or remove it."), False
    why, fix, again = next(FAULTS[sign] for sign in FAULTS if re.search(sign, said))
    return TokenStoreError(
        f"The fleet's store (KIS_STORE) cannot be used: {why}. Nothing was issued; valid tokens on this machine are "
        f"served anyway. To do: {fix}."
    ), again
