"""A key's token and issuance record on the PostgreSQL server of a fleet, with this machine's files as a copy of them.

A living token is read from the files alone. Who needs another one takes the machine's lock and looks into the fleet's
store: what is newer there goes to the files, what only this machine has is offered. There is no lock over machines: an
attempt that another machine has sent keeps the others away, until its outcome or the time in which it must have come.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta

from tokencore import tokens
from tokencore.config.market import digest
from tokencore.errors import TokenError, TokenStoreError
from tokencore.sealing import Sensitive
from tokencore.stores.file_store import FileDocument, FileStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from threading import Thread
    from typing import Any

    from tokencore.attempts import Attempt
    from tokencore.config.market import Market
    from tokencore.config.settings import Settings
    from tokencore.stores.database import Database, State
    from tokencore.stores.encryption import Seal
    from tokencore.stores.follower import Follower
    from tokencore.tokens import Token

POLL = 0.1  # seconds between two looks at what another machine does
FRESH = 1.0  # seconds for which a row that was read without the lock counts as the present one
REST = 3.0  # seconds for which no process of the machine tries a store again that one could not reach
IN_FLIGHT = 2.5  # time-outs in which a request that has left is answered
TRIES = 20  # of a change that others forestall
FOLLOW = 2.0  # seconds after which a process that goes on asking follows, and between two looks whether it does
SLACK = timedelta(seconds=2)  # by which two times of one attempt may differ
REMEMBERED = 8  # tokens that a person took away
SHARED = ("approval",)  # documents; what exports have written where is each machine's own
_fleets: dict[str, Fleet] = {}


def never() -> bool:
    """Whoever waits does so to the end."""
    return False


class Fleet(Sensitive):
    """The store of the settings, as this machine reaches it."""

    __slots__ = ("_address", "_read_at", "_rows", "_warned", "down", "folder", "host", "seal")

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened yet.

        Raises:
            ConfigurationError: KIS_STORE_KEYS cannot be used, or the extra is not installed.

        """
        import socket

        from tokencore.stores.encryption import Seal

        self._address = settings.store.get_secret_value() if settings.store else ""
        self.seal: Seal = Seal(key.get_secret_value() for key in settings.store_keys)
        self.folder = settings.token_dir
        self.host = f"{socket.gethostname()[:50]}:{digest(self.folder, length=6)}"  # process numbers collide
        self.down = FileDocument(os.path.join(self.folder, "key-store.json"))
        self._rows: dict[str, State] = {}
        self._read_at, self._warned = -FRESH, False

    @classmethod
    def of(cls, settings: Settings) -> Fleet:
        """The same one for the same settings, so that what was read of one key serves for the next."""
        own = [settings.token_dir, *(one.get_secret_value() for one in (settings.store, *settings.store_keys) if one)]
        name = digest(*own, length=16)
        if name not in _fleets:
            _fleets[name] = cls(settings)
        return _fleets[name]

    def connect(self) -> Database:
        """An open connection, to be closed by `with`.

        Raises:
            TokenStoreError: there is none within a few seconds, or another process has just found that out.

        """
        from tokencore.stores.database import Database

        known = self.down.read()
        if 0 <= time.time() - float(known.get("at", 0)) < REST:
            raise TokenStoreError(str(known.get("why")))
        try:
            return Database(self._address, self.host).open()
        except TokenStoreError as error:
            with suppress(OSError):  # the next process tries by itself then
                self.down.write({"at": time.time(), "why": str(error)})
            raise

    def look(self, names: Callable[[], Sequence[str]], name: str) -> State | None:
        """The row of that name, at most a second old, read with all `names`; None where the store is not reached."""
        if time.monotonic() - self._read_at >= FRESH or (self._rows and name not in self._rows):
            every = list(dict.fromkeys([name, *names()]))
            try:
                with self.connect() as session:
                    self._rows = session.read(every, max(32, 1024 // len(every)))
            except TokenError as error:
                self._rows = {}
                self.warn(error)
            self._read_at = time.monotonic() + (0 if self._rows else REST)
        return self._rows.get(name)

    def forget(self) -> None:
        """Let the next look read anew."""
        self._read_at = min(self._read_at, time.monotonic() - FRESH)

    def warn(self, error: TokenError) -> None:
        """Once a process."""
        if not self._warned:
            self._warned = True
            _warn(f"{error} Meanwhile this machine goes by its own files.")


class _Held:
    """What is known while this thread has the machine's lock."""

    __slots__ = ("owner", "session", "state", "trouble")

    def __init__(self) -> None:
        from threading import get_ident

        self.owner = get_ident()
        self.session: Database | None = None
        self.state: State | None = None
        self.trouble: TokenError | None = None

    def connected(self) -> Database:
        """The open connection.

        Raises:
            TokenError: there is none, or what lies in the store cannot be used.

        """
        if self.session is None or self.trouble:
            raise self.trouble or TokenStoreError("The fleet's store is not reached. Nothing was changed.")
        return self.session


class Fence:
    """The attempt that this process has begun: its number in the store, and as the machine's record has it."""

    __slots__ = ("ahead", "local", "number")

    def __init__(self, number: int, state: State, local: Attempt) -> None:
        """Keep both."""
        self.number, self.ahead, self.local = number, state.ahead, local


class SharedStore(Sensitive):
    """The `Store` of one key in a fleet, as the market `own` sees it on this machine."""

    __slots__ = ("__dict__", "_held", "_market")  # what `vars` shows has no secret

    def __init__(self, market: Market, siblings: Callable[[], Sequence[str]]) -> None:
        """Name the key; nothing is opened yet. `siblings` tells the names of all markets of the key, when asked."""
        self.fingerprint = market.fingerprint
        self.name = _row_of(market)
        self._market = market
        self._local = FileStore(market, siblings)
        self.place = self._local.place
        self._about = {"key_fingerprint": self.fingerprint, "environment": market.environment}
        self._held: _Held | None = None
        self._asked = False  # whether this process has had to ask the store: then it goes on asking
        self._publishing: Thread | None = None
        self._follow_at = 0.0

    def __repr__(self) -> str:
        return f"SharedStore({self._local.folder!r}, {self.fingerprint!r})"

    # The token

    def read(self) -> tuple[Token | None, str]:
        """The machine's token; where that is none that lives, the fleet's, if this process had to ask it before."""
        token, problem = self._local.read()
        return self._or_fleets(token), problem

    def unchanged(self, token: Token) -> bool:
        """Whether `token` is still what the machine's file has; who asks that again and again sees to a follower."""
        if time.monotonic() >= self._follow_at:
            if self._follow_at:
                follow(self._market)
            self._follow_at = time.monotonic() + FOLLOW
        return self._local.unchanged(token)

    def newest(self, *, shared: bool = False) -> Token | None:
        """The machine's token that lasts longest; with `shared` also the fleet's, as in `read`."""
        token = self._local.newest(shared=shared)
        return self._or_fleets(token) if shared or self._mine() else token

    def saved(self, token: Token) -> bool:
        """Whether the machine's files have it."""
        return self._local.saved(token)

    def save(self, token: Token) -> None:
        """Write it to the files and to the store; the fleet gets it later where the store is not reached."""
        self._local.save(token)
        try:
            self._put(token)
        except TokenError as error:
            _warn(f"{error} The other machines get this token when the store is reached again.")

    def delete(self) -> bool:
        """Remove this market's token here, and with the last one the fleet's.

        Raises:
            TokenStoreError: the store is not reached; nothing was removed.

        """
        self._row()
        found = self._local.delete()
        if self._local.newest(shared=True) is None:
            found = self._put(None) or found
        return found

    def clear(self) -> None:
        """Remove the key's token for all markets and machines; the record stays.

        Raises:
            TokenStoreError: the store is not reached; nothing was removed.

        """
        self._put(None)
        self._local.clear()

    def details(self) -> dict[str, Any]:
        """Of the machine's file."""
        return self._local.details()

    # The record

    def attempts(self) -> list[Attempt]:
        """The fleet's record, by this machine's clock; the machine's own where the store is not reached."""
        if held := self._mine():
            state = held.state if held.session is None or held.state else self._reread(held)
        else:
            if self._publishing:  # who waits for no token may wait for the outcome of the last request
                self._publishing.join()
            self._asked = True
            state = self._seen()
        return list(state.attempts.values()) if state else self._local.attempts()

    def begin(self, attempt: Attempt) -> Fence | None:
        """Record it in the store, unless the row has changed since the lock was taken; then in the machine's record.

        Raises:
            TokenStoreError: the store is not reached, or what lies there cannot be used.

        """
        held = self._holding()
        session, state = held.connected(), held.state or self._reread(held)
        number = None if self._in_flight(state) else session.begin(self.name, state, attempt)
        self._changed()
        if number is None:
            self._meet(held, time.monotonic() + self._patience(), never)
            return None
        return Fence(number, state, self._local.begin(attempt))

    def depart(self, fence: Fence) -> bool:
        """Date it anew by the server's clock; False where another machine has begun since, or the answer came late.

        Raises:
            TokenStoreError: no answer came; nothing may be sent.

        """
        began, held = time.monotonic(), self._holding()
        if not held.connected().depart(self.name, fence.number):
            self._meet(held, 0, never)
            return False
        return time.monotonic() - began < self._patience() / 2 and self._local.depart(fence.local)

    def finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """Save the token and the outcome here, and publish both behind the caller's back, whom a token is waiting for.

        Raises:
            OSError: the machine's files could not be written; the fleet gets it anyway.

        """
        from threading import Thread

        self._changed()
        try:
            self._local.finish(fence.local, attempt, token)
        finally:
            # No daemon: a command that ends waits for it, for some seconds at most.
            self._publishing = Thread(target=self._publish, args=(fence, attempt, token), name="tokencore publishing")
            try:
                self._publishing.start()
            except RuntimeError:  # the system gives no thread
                self._publishing = None
                self._publish(fence, attempt, token)
            if token is None and self._publishing:
                self._publishing.join()

    def note(self, attempt: Attempt) -> None:
        """Record what needed no request, here and in the store."""
        self._local.note(attempt)
        try:
            with self._session() as session:
                session.note(self.name, self._row(), attempt)
        except TokenError as error:
            _warn(f"{error} What was imported is recorded on this machine only.")
        self._changed()

    # The lock and other documents

    def lock(self, *, wait: float, give_up: Callable[[], bool] = never) -> AbstractContextManager[bool]:
        """Hold the machine's lock inside the block, with what the fleet has, once no other machine is asking KIS."""
        return contextmanager(self._hold)(wait, give_up)

    def document(self, name: str) -> SharedDocument | FileDocument:
        """The key's document of that name."""
        local = self._local.document(name)
        if name not in SHARED:
            return local
        return SharedDocument(local, self._market, f"{self.name}:{name}", local_first=True)

    def behind(self, state: State) -> bool:
        """Whether the machine's files have another token than the row; what cannot be decrypted is left alone."""
        try:
            return _name_of(self._in(state)) != _name_of(self._local.newest(shared=True))
        except TokenError as error:
            self._fleet.warn(error)
            return False

    def mirror(self, session: Database) -> bool:
        """Bring files and row to what is newer, if the machine's lock is free; for a follower."""
        with self._local.lock(wait=0) as held:
            if held:
                self._exchange(session)
            return held

    @property
    def _fleet(self) -> Fleet:
        return Fleet.of(self._market.settings)

    def _mine(self) -> _Held | None:
        """What this thread holds: another one of the process may look meanwhile."""
        from threading import get_ident

        return self._held if self._held and self._held.owner == get_ident() else None

    def _holding(self) -> _Held:
        if held := self._mine():
            return held
        raise RuntimeError("an attempt is made under the lock only")

    def _hold(self, wait: float, give_up: Callable[[], bool]) -> Iterator[bool]:
        end = time.monotonic() + wait
        with self._local.lock(wait=wait, give_up=give_up) as locked:
            if not locked or give_up():  # the token came meanwhile: no need to ask the store
                yield locked
                return
            held = self._held = _Held()
            self._asked = True
            try:
                self._fleet.forget()
                held.session = self._fleet.connect()
                self._meet(held, end, give_up)
            except TokenError as error:
                held.trouble = error
            try:
                yield True
            finally:
                self._held = None
                if held.session:
                    held.session.close()

    def _session(self) -> AbstractContextManager[Database]:
        """The lock's connection, or one for this block alone."""
        held = self._mine()
        return nullcontext(held.session) if held and held.session else self._fleet.connect()

    def _row(self) -> State:
        with self._session() as session:
            return session.read([self.name])[self.name]

    def _reread(self, held: _Held) -> State:
        held.state = held.connected().read([self.name])[self.name]
        return held.state

    def _seen(self) -> State | None:
        def names() -> list[str]:
            known = [one for one in self._market.settings.all_markets() if one.app_key]
            return [_row_of(one) for one in known]

        try:
            return self._fleet.look(names, self.name)
        except TokenError as error:  # the settings say how, but not well
            _warn(str(error))
            return None

    def _or_fleets(self, token: Token | None) -> Token | None:
        if token and token.rejected_at is None and token.expires_at.timestamp() > time.time():
            return token
        held = self._mine()
        state = held.state if held else self._seen() if self._asked else None
        try:
            return tokens.longest([token, self._in(state) if state else None])
        except TokenError as error:
            self._fleet.warn(error)
            return token

    def _content(self, state: State) -> dict[str, Any]:
        """What a row has; empty where there is none.

        Raises:
            TokenStoreError: it cannot be decrypted, or is another key's.

        """
        return self._fleet.seal.open(state.sealed, self._about) if state.sealed else {}

    def _in(self, state: State) -> Token | None:
        text = self._content(state).get("token")
        return tokens.from_text(str(text))[0] if text else None

    def _sealed(self, token: Token | None, removed: list[str]) -> str:
        """The content with this token; `removed` names those that a person took away, which no machine brings back."""
        at, (fingerprint, environment) = (token and token.cached_at) or datetime.now(UTC), self._about.values()
        text = token and tokens.to_cache(token, now=at, environment=environment, key_fingerprint=fingerprint)
        gone = [one for one in removed if one and one != _name_of(token)]
        return self._fleet.seal.close({**self._about, "token": text, "removed": gone[:REMEMBERED]})

    def _meet(self, held: _Held, end: float, give_up: Callable[[], bool]) -> None:
        """Exchange with the store; again while another machine is asking KIS, until `end` of the monotonic clock."""
        while True:
            held.state = self._exchange(held.connected())
            if not self._in_flight(held.state) or give_up() or time.monotonic() >= end:
                return
            time.sleep(POLL)

    def _in_flight(self, state: State) -> bool:
        """Whether another machine's request may still be answered."""
        last = next((one for one in reversed(state.attempts.values()) if one.counts), None)
        if last is None or last.outcome != "sent" or not last.host:
            return False
        return (datetime.now(UTC) - last.at).total_seconds() < self._patience()

    def _patience(self) -> float:
        from tokencore.limits import retry_delay

        settings = self._market.settings
        return float(max(retry_delay(1, settings.issue_interval).total_seconds(), IN_FLIGHT * settings.timeout))

    def _exchange(self, session: Database) -> State:
        """Offer what only this machine has, take over what the fleet has; the row as it is then.

        Raises:
            TokenStoreError: the store does not answer, or what lies there cannot be used.

        """
        for _ in range(TRIES):
            state = session.read([self.name])[self.name]
            ours, theirs, removed = self._local.newest(shared=True), self._in(state), self._removed(state)
            offered = ours if _beats(ours, theirs) and _name_of(ours) not in removed else None
            if not offered and state.version:
                if not self._restored(session, state):
                    self._copy(ours, theirs, state, gone=_name_of(ours) in removed)
                    return state
            else:
                session.put(self.name, state.version, self._sealed(offered, removed))
        raise TokenStoreError("The fleet's store changes too fast. Nothing was issued; try again.")

    def _removed(self, state: State) -> list[str]:
        return [str(one) for one in self._content(state).get("removed", [])]

    def _restored(self, session: Database, state: State) -> bool:
        """Whether the store had to get what the machine's record has and it has not.

        That is an outcome that could not be told before; the record of the first machine; and the last attempts of a
        server that crashed, where its successor is behind.
        """
        mine, (fence, last) = self._local.attempts(), next(reversed(state.attempts.items()), (0, None))
        if last and last.outcome == "sent" and not last.host:
            told = (
                bool(mine) and mine[-1].pid == last.pid and mine[-1].outcome != "sent" and mine[-1].at > last.at - SLACK
            )
            if told:
                session.finish(self.name, fence, mine[-1], state.ahead)
            return told
        known = {one[1:] for one in state.attempts.values()}
        lost = [one for one in mine if one[1:] not in known and (last is None or one.at > last.at + SLACK)]
        for attempt in lost:
            session.note(self.name, state, attempt)
        return bool(lost)

    def _copy(self, ours: Token | None, theirs: Token | None, state: State, *, gone: bool) -> None:
        """Make the files a copy of the row; where they cannot be written, the token is served anyway."""
        from tokencore.stores import record

        try:
            if theirs and _name_of(theirs) != _name_of(ours):
                self._local.save(theirs)
            elif ours and not theirs and gone:
                self._local.clear()
            attempts = list(state.attempts.values())
            if attempts and record.render(attempts) != record.render(self._local.attempts()):
                self._local.replace_record(attempts)
        except OSError as error:
            _warn(f"What the fleet has could not be copied to {self.place} ({error.strerror}).")

    def _put(self, token: Token | None) -> bool:
        """Replace what the fleet has as a person wants it, the later of two at once; whether there was anything."""
        with self._session() as session:
            for _ in range(TRIES):
                state = session.read([self.name], 1)[self.name]
                before: str | None = None
                try:
                    before = _name_of(self._in(state))
                    sealed = self._sealed(token, [before, *self._removed(state)])
                except TokenError:
                    if token:
                        raise
                    sealed = ""  # a damaged row is removed as well
                if session.put(self.name, state.version, sealed):
                    break
        self._changed()
        return before != ""

    def _changed(self) -> None:
        """What was read before is none of the present."""
        self._fleet.forget()
        if held := self._mine():
            held.state = None

    def _publish(self, fence: Fence, attempt: Attempt, token: Token | None) -> None:
        """Offer the token, and tell the outcome; where the store is not reached, the next look does it."""
        try:
            with self._fleet.connect() as session:
                for _ in range(TRIES if token else 0):
                    state = session.read([self.name], 1)[self.name]
                    if not _beats(token, self._in(state)) or session.put(
                        self.name, state.version, self._sealed(token, self._removed(state))
                    ):
                        break
                session.finish(self.name, fence.number, attempt, fence.ahead)
            self._fleet.forget()
        except TokenError as error:
            _warn(f"{error} The other machines get what KIS answered when the store is reached again.")


class SharedDocument(Sensitive):
    """A small JSON object of the fleet, with a copy in this machine's file; its lock is a lease of a minute.

    Where the store is not reached, the machine's copy stands in.
    """

    __slots__ = ("_about", "_local", "_local_first", "_locked", "_market", "_row", "_session", "_version", "place")

    def __init__(self, local: FileDocument, market: Market | Settings, row: str, *, local_first: bool) -> None:
        """The row of that name; with `local_first`, reading goes by the copy that the last lock has made."""
        self.place = local.place
        self._local, self._market, self._row, self._local_first = local, market, f"document:{row}", local_first
        self._about = {"document": self._row}
        self._session: Database | None = None
        self._version, self._locked = 0, False

    @property
    def _fleet(self) -> Fleet:
        return Fleet.of(getattr(self._market, "settings", self._market))  # type: ignore[arg-type] # a market has them

    def read(self) -> dict[str, Any]:
        """The object; empty where there is none that could be read."""
        if not self._locked and not self._local_first:
            try:
                with self._fleet.connect() as session:
                    return self._opened(session.read([self._row], 1)[self._row].sealed)
            except TokenError as error:
                self._fleet.warn(error)
        return self._local.read()

    def write(self, content: dict[str, Any]) -> None:
        """Replace it.

        Raises:
            OSError: the lease is over, or the store did not answer; what was there before still is.

        """
        if self._session:
            sealed = self._fleet.seal.close({**self._about, "content": content})
            try:
                if not self._session.put(self._row, self._version, sealed):
                    raise TimeoutError(None, "the lock on it is over")
            except TokenError:
                raise TimeoutError(None, "the fleet's store does not answer") from None
            self._version += 1
        self._local.write(content)

    def lock(self, *, wait: float, give_up: Callable[[], bool] = never) -> AbstractContextManager[bool]:
        """Hold its lock inside the block, over all machines; yields False where it was not acquired in time."""
        return contextmanager(self._hold)(wait, give_up)

    def _hold(self, wait: float, give_up: Callable[[], bool]) -> Iterator[bool]:
        end = time.monotonic() + wait
        with self._local.lock(wait=wait, give_up=give_up) as locked:
            held = locked
            try:
                self._session = self._fleet.connect() if locked else None
                held = self._leased(self._session, end, give_up) if self._session else locked
            except TokenError as error:
                self._close()
                self._fleet.warn(error)
            try:
                self._locked = held
                yield held
            finally:
                self._locked = False
                with suppress(TokenError):  # the lease ends by itself
                    if self._session and held:
                        self._session.release(self._row, self._version)
                self._close()

    def _leased(self, session: Database, end: float, give_up: Callable[[], bool]) -> bool:
        while not (found := session.lease(self._row)):
            if not session.read([self._row], 1)[self._row].version:
                session.put(self._row, 0, self._fleet.seal.close({**self._about, "content": self._local.read()}))
            elif give_up() or time.monotonic() >= end:
                return False
            else:
                time.sleep(POLL)
        self._version = found[0]
        self._local.write(self._opened(found[1]))
        return True

    def _opened(self, sealed: str) -> dict[str, Any]:
        content = self._fleet.seal.open(sealed, self._about).get("content") if sealed else {}
        return content if isinstance(content, dict) else {}

    def _close(self) -> None:
        if self._session:
            self._session.close()
            self._session = None


def follow(market: Market) -> None:
    """See to it that a process of this machine follows the fleet; returns at once."""
    from tokencore.stores import follower

    follower.start(lambda: make_follower(market.settings, market))


def follow_here(settings: Settings) -> None:
    """Follow the fleet in this thread, as soon as no other process of the machine does; never returns.

    Raises:
        ConfigurationError: the settings name no store.

    """
    make_follower(settings).run()


def rotate(settings: Settings) -> list[str]:
    """Seal every row with the newest key, whatever it is about; the names of those that no key opens.

    Raises:
        TokenError: the store is not reached, or takes no changes.

    """
    fleet, failed = Fleet.of(settings), []
    with fleet.connect() as session:
        left = {
            key for (key,) in session.execute("select key from tokencore_key where key <> 'layout' and sealed <> ''")
        }
        while left:
            for key, state in session.read(sorted(left), 0).items():
                try:
                    done = session.put(key, state.version, fleet.seal.renewed(state.sealed))
                except ValueError:
                    failed.append(key)
                    done = True
                left -= {key} if done else set()
    return failed


def make_follower(settings: Settings, *own: Market) -> Follower:
    """What keeps the files of all keys of the settings, and of a program's own, as the fleet has them."""
    from tokencore.stores.follower import Follower

    groups: dict[tuple[str, str], list[Market]] = {}
    for market in (*settings.all_markets(), *own):
        if market.app_key:
            groups.setdefault((market.fingerprint, market.environment), []).append(market)
    stores = [SharedStore(found[0], lambda found=found: [one.name for one in found]) for found in groups.values()]  # type: ignore[misc]
    return Follower(Fleet.of(settings), {store.name: store for store in stores})


def _row_of(market: Market) -> str:
    return market.fingerprint + ("-paper" if market.environment == "paper" else "")


def _name_of(token: Token | None) -> str:
    return digest(token.access_token, str(token.rejected_at is None), length=16) if token else ""


def _beats(ours: Token | None, theirs: Token | None) -> bool:
    """Whether the fleet should have our token instead of its own: it lives, and longer, or is known to be dead."""
    if ours is None:
        return False
    if theirs is None:
        return ours.rejected_at is None and ours.expires_at > datetime.now(UTC)
    if ours.access_token == theirs.access_token:
        return ours.rejected_at is not None and theirs.rejected_at is None
    return tokens.longest([theirs, ours]) is ours


def _warn(message: str) -> None:
    import logging  # only for trouble

    logging.getLogger("tokencore").warning(message)
