"""A key's token and issuance record on the PostgreSQL server of a fleet, with this machine's files as a copy of them.

A living token is read from the files alone. Who needs another one takes the machine's lock and looks into the fleet's
store: what is newer there goes to the files, what only this machine has is offered. There is no lock over machines: an
attempt that another machine has sent keeps the others away, until its outcome or the time in which it must have come.
"""

from __future__ import annotations

import time
from _thread import get_ident
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
    from tokencore.stores.fleet import Fleet
    from tokencore.stores.follower import Follower
    from tokencore.stores.shared_document import SharedDocument
    from tokencore.tokens import Token

POLL = 0.1  # seconds between two looks at what another machine does
TELL = 5.0  # seconds of waiting for another machine after which people are told
IN_FLIGHT = 2.5  # time-outs in which a request that has left is answered
TRIES = 20  # of a change that others forestall
FOLLOW = 2.0  # seconds after which a process that goes on asking follows, and between two looks whether it does
SLACK = timedelta(seconds=2)  # by which two times of one attempt may differ
REMEMBERED = 8  # tokens that a person took away
SHARED = ("approval",)  # documents; what exports have written where is each machine's own


class Fence:
    """The attempt that this process has begun: its number in the store, how the clocks differ, the machine's record."""

    __slots__ = ("ahead", "local", "number")

    def __init__(self, number: int, ahead: timedelta, local: Attempt) -> None:
        """Keep them."""
        self.number, self.ahead, self.local = number, ahead, local


class _Held:
    """What the thread that has the machine's lock knows of the row."""

    def __init__(self, connect: Callable[[], Database]) -> None:
        self.owner, self._connect = get_ident(), connect
        self.session: Database | None = None
        self.state: State | None = None
        self.trouble: TokenError | None = None

    def connected(self) -> Database:
        if self.trouble:
            raise self.trouble
        self.session = self.session or self._connect()
        return self.session


class SharedStore(Sensitive):
    """The `Store` of one key in a fleet, as one market sees it on this machine."""

    __slots__ = ("__dict__", "_held", "_market")  # what `vars` shows has no secret

    def __init__(self, market: Market, siblings: Callable[[], Sequence[str]]) -> None:
        """Name the key; nothing is opened yet. `siblings` tells the names of all markets of the key, when asked."""
        self.fingerprint, self.name = market.fingerprint, _row_of(market)
        self._market, self._local = market, FileStore(market, siblings)
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
                from tokencore.stores import follower

                follower.start(lambda: make_follower(self._market.settings, self._market))
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
            _warn(f"{_cause(error)} The other machines get this token when the store is reached again.")

    def delete(self) -> bool:
        """Remove this market's token here, and with the last one the fleet's.

        Raises:
            TokenStoreError: the store is not reached; nothing was removed.

        """
        with self._session() as session:
            session.read([self.name], 0)
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
        self._asked = True
        if held := self._mine():
            with suppress(TokenError):
                self._reread(held)
            state = held.state
        else:
            self._settle()
            state = self._seen()
        return list(state.attempts.values()) if state else self._local.attempts()

    def begin(self, attempt: Attempt) -> Fence | None:
        """Record it in the store, unless the row has changed since the lock was taken; then in the machine's record.

        Raises:
            TokenStoreError: the store is not reached, or what lies there cannot be used.

        """
        held = self._holding()
        state = self._reread(held)
        number = None if self._in_flight(state) else held.connected().begin(self.name, state, attempt)
        self._changed()
        if number is None:
            self._meet(held, time.monotonic() + self._patience())
            return None
        return Fence(number, state.ahead, self._local.begin(attempt))

    def depart(self, fence: Fence) -> bool:
        """Date it anew by the server's clock; False where another machine has begun since, or the answer came late.

        Raises:
            TokenStoreError: no answer came; nothing may be sent.

        """
        began, held = time.monotonic(), self._holding()
        if not held.connected().depart(self.name, fence.number):
            self._meet(held, 0)
            return False
        return time.monotonic() - began < self._patience() / 2 and self._local.depart(fence.local)

    def finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """Save the token and the outcome here, and publish both behind the caller's back, whom a token is waiting for.

        Raises:
            OSError: the machine's files could not be written; the fleet gets it anyway.

        """
        from threading import Thread

        self._changed()
        held = self._mine()
        session = held.session if held else None
        try:
            self._local.finish(fence.local, attempt, token)
        finally:
            if held:
                held.session = None  # it is the publisher's now
            # No daemon: a command that ends waits for it, for some seconds at most.
            thread = Thread(target=self._publish, args=(session, fence, attempt, token), name="tokencore publishing")
            try:
                thread.start()
                self._publishing = thread
            except RuntimeError:  # the system gives no thread
                self._publish(session, fence, attempt, token)
            if token is None:
                self._settle()

    def note(self, attempt: Attempt) -> None:
        """Record what needed no request, here and in the store."""
        self._local.note(attempt)
        try:
            with self._session() as session:
                session.note(self.name, session.read([self.name], 0)[self.name], attempt)
        except TokenError as error:
            _warn(f"{_cause(error)} What was imported is recorded on this machine only.")
        self._changed()

    # The lock and other documents

    @contextmanager
    def lock(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the machine's lock inside the block, with what the fleet has, once no other machine is asking KIS."""
        end = time.monotonic() + wait
        with self._local.lock(wait=wait, give_up=give_up) as locked:
            if not locked or give_up():  # the token came meanwhile: no need to ask the store
                yield locked
                return
            held = self._held = _Held(self._connect)
            self._asked = True
            try:
                self._fleet.forget()
                self._meet(held, end, give_up)
            except TokenError as error:
                held.trouble = error
            try:
                yield True
            finally:
                self._held = None
                if held.session:
                    held.session.close()

    def document(self, name: str) -> SharedDocument | FileDocument:
        """The key's document of that name."""
        local = self._local.document(name)
        if name not in SHARED:
            return local
        from tokencore.stores.shared_document import SharedDocument

        return SharedDocument(local, lambda: self._market.settings, f"{self.name}:{name}", copied=True)

    # For a follower

    def behind(self, state: State) -> bool:
        """Whether the machine's files have another token than the row; what cannot be decrypted is left alone."""
        try:
            return _name_of(self._opened(state)[0]) != _name_of(self._local.read()[0])
        except TokenError as error:
            self._fleet.warn(error)
            return False

    def mirror(self, session: Database) -> bool:
        """Bring files and row to what is newer; False where the machine's lock is not free."""
        from tokencore.stores.encryption import SealError

        with self._local.lock(wait=0) as held:
            try:
                if held:
                    self._exchange(session)
            except SealError as error:  # of this key alone
                self._fleet.warn(error)
            return held

    # Inside

    @property
    def _fleet(self) -> Fleet:
        from tokencore.stores.fleet import Fleet  # not on the path of a cached token

        return Fleet.of(self._market.settings)

    def _connect(self) -> Database:
        return self._fleet.connect()

    def _mine(self) -> _Held | None:
        """What this thread holds: another one of the process may look meanwhile."""
        return self._held if self._held and self._held.owner == get_ident() else None

    def _holding(self) -> _Held:
        if held := self._mine():
            return held
        raise RuntimeError("an attempt is made under the lock only")

    def _session(self) -> AbstractContextManager[Database]:
        """The lock's connection, or one for this block alone."""
        held = self._mine()
        return nullcontext(held.session) if held and held.session else self._connect()

    def _reread(self, held: _Held) -> State:
        """The row as it was read under this lock; anew where this thread has changed it."""
        session = held.connected()
        if held.state is None:
            self._settle()
            held.state = session.read([self.name])[self.name]
        return held.state

    def _settle(self) -> None:
        """Who waits for no token may wait for the outcome of the last request."""
        if self._publishing:
            self._publishing.join()

    def _changed(self) -> None:
        """What was read before is not the present."""
        self._fleet.forget()
        if held := self._mine():
            held.state = None

    def _seen(self) -> State | None:
        try:
            return self._fleet.look(
                self.name, lambda: [_row_of(one) for one in self._market.settings.all_markets() if one.app_key]
            )
        except TokenError as error:  # the settings of the store are wrong
            _warn(str(error))
            return None

    def _or_fleets(self, token: Token | None) -> Token | None:
        if token and token.rejected_at is None and token.expires_at.timestamp() > time.time():
            return token
        held = self._mine()
        state = held.state if held else self._seen() if self._asked else None
        try:
            return tokens.longest([token, self._opened(state)[0] if state else None])
        except TokenError as error:
            self._fleet.warn(error)
            return token

    def _opened(self, state: State) -> tuple[Token | None, list[str]]:
        """The row's token, and the names of those that a person took away, which no machine brings back.

        Raises:
            TokenStoreError: it cannot be decrypted, or is another key's.

        """
        content = self._fleet.seal.open(state.sealed, self._about) if state.sealed else {}
        text, removed = content.get("token"), content.get("removed", [])
        return tokens.from_text(str(text))[0] if text else None, [str(one) for one in removed]

    def _sealed(self, token: Token | None, removed: list[str]) -> str:
        """A row with these."""
        at, (fingerprint, environment) = (token and token.cached_at) or datetime.now(UTC), self._about.values()
        text = token and tokens.to_cache(token, now=at, environment=environment, key_fingerprint=fingerprint)
        gone = [one for one in removed if one and one != _name_of(token)]
        return self._fleet.seal.close({**self._about, "token": text, "removed": gone[:REMEMBERED]})

    def _meet(self, held: _Held, end: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Exchange with the store; again while another machine is asking KIS, until `end` of the monotonic clock."""
        tell_at = time.monotonic() + TELL
        while True:
            held.state = self._exchange(held.connected())
            if not self._in_flight(held.state) or give_up() or time.monotonic() >= end:
                return
            if time.monotonic() >= tell_at:
                tell_at = end
                _warn(f"Another machine is asking KIS: waiting for its answer, {self._patience():.0f} s at most.")
            time.sleep(POLL)

    def _in_flight(self, state: State) -> bool:
        """Whether another machine's request may still be answered."""
        last = next((one for one in reversed(state.attempts.values()) if one.counts), None)
        if last is None or last.outcome != "sent" or not last.host:
            return False
        return (datetime.now(UTC) - last.at).total_seconds() < self._patience()

    def _patience(self) -> float:
        from tokencore.policy import retry_delay

        settings = self._market.settings
        return float(max(retry_delay(1, settings.issue_interval).total_seconds(), IN_FLIGHT * settings.timeout))

    def _exchange(self, session: Database) -> State:
        """Offer what only this machine has, take over what the fleet has; the row as it is then.

        Raises:
            TokenStoreError: the store does not answer, or what lies there cannot be used.

        """
        for _ in range(TRIES):
            state = session.read([self.name])[self.name]
            ours, (theirs, removed) = self._local.read()[0], self._opened(state)
            offered = ours if _beats(ours, theirs) and _name_of(ours) not in removed else None
            if offered or not state.version:
                session.put(self.name, state.version, self._sealed(offered, removed))
            elif not self._restored(session, state):
                self._copy(ours, theirs, list(state.attempts.values()), gone=_name_of(ours) in removed)
                return state
        raise TokenStoreError("The fleet's store changes too fast. Nothing was issued; try again.")

    def _restored(self, session: Database, state: State) -> bool:
        """Whether the store had to get what the machine's record has and it has not.

        That is an outcome that could not be told before; the record of the first machine; and the last attempts of a
        server that crashed, where its successor is behind.
        """
        mine, (fence, last) = self._local.attempts(), next(reversed(state.attempts.items()), (0, None))
        if last and last.outcome == "sent" and not last.host:
            done = bool(mine) and mine[-1].pid == last.pid and mine[-1].outcome != "sent"
            if done := done and mine[-1].at > last.at - SLACK:
                session.finish(self.name, fence, mine[-1], state.ahead)
            return done
        known = {one[1:] for one in state.attempts.values()}
        lost = [one for one in mine if one[1:] not in known and (last is None or one.at > last.at + SLACK)]
        for attempt in lost:
            session.note(self.name, state, attempt)
        return bool(lost)

    def _copy(self, ours: Token | None, theirs: Token | None, attempts: list[Attempt], *, gone: bool) -> None:
        """Make the files a copy of the row; where they cannot be written, the token is served anyway."""
        from tokencore.stores import record

        try:
            if theirs and _name_of(theirs) != _name_of(ours):
                self._local.save(theirs)
            elif ours and not theirs and gone:
                self._local.clear()
            if attempts and record.render(attempts) != record.render(self._local.attempts()):
                self._local.replace_record(attempts)
        except OSError as error:
            _warn(f"What the fleet has could not be copied to {self.place} ({error.strerror}).")

    def _put(self, token: Token | None) -> bool:
        """Replace what the fleet has as a person wants it, the later of two at once; whether there was anything."""
        with self._session() as session:
            for _ in range(TRIES):
                state, before = session.read([self.name], 0)[self.name], "what no key opens"
                try:
                    theirs, removed = self._opened(state)
                    before = _name_of(theirs)
                    sealed = self._sealed(token, [before, *removed])
                except TokenError:
                    if token:
                        raise
                    sealed = ""  # a damaged row is removed as well
                if session.put(self.name, state.version, sealed):
                    break
        self._changed()
        return bool(before)

    def _publish(self, session: Database | None, fence: Fence, attempt: Attempt, token: Token | None) -> None:
        """Offer the token, and tell the outcome; where the store is not reached, the next look does both."""
        try:
            with session or self._connect() as reached:
                for _ in range(TRIES if token else 0):
                    state = reached.read([self.name], 0)[self.name]
                    theirs, removed = self._opened(state)
                    if not _beats(token, theirs) or reached.put(self.name, state.version, self._sealed(token, removed)):
                        break
                reached.finish(self.name, fence.number, attempt, fence.ahead)
        except TokenError as error:
            _warn(f"{_cause(error)} The other machines get what KIS answered when the store is reached again.")
        self._fleet.forget()


def make_follower(settings: Settings, *own: Market) -> Follower:
    """What keeps the files of all keys of the settings, and of a program's own, as the fleet has them."""
    from tokencore.stores.fleet import Fleet
    from tokencore.stores.follower import Follower

    names: dict[str, list[str]] = {}
    stores: dict[str, SharedStore] = {}
    for market in (*settings.all_markets(), *own):
        if market.app_key:
            found = names.setdefault(_row_of(market), [])
            found.append(market.name)
            stores.setdefault(_row_of(market), SharedStore(market, lambda found=found: found))  # type: ignore[misc]
    return Follower(Fleet.of(settings), stores)


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


def _cause(error: TokenError) -> str:
    """What is wrong, without "Nothing was issued": here something was, or was saved."""
    return str(error).partition(" Nothing was")[0]


def _warn(message: str) -> None:
    import logging  # only for trouble

    logging.getLogger("tokencore").warning(message)
