"""A key's token and issuance record on the PostgreSQL server of a fleet, with this machine's files as a copy of them.

A living token is read from the files alone. A process that needs another one takes the machine's lock and reads the
fleet's store: what is newer there is copied to the files, and what only this machine has is copied to the store. No
lock spans the machines: an attempt that one machine has sent keeps the others from sending, until its outcome is known
or the time for an answer is over.
"""

from __future__ import annotations

import time
from _thread import get_ident  # a cached token does not need all of threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

from tokencore import tokens
from tokencore.config import sources
from tokencore.errors import TokenError, TokenStoreError
from tokencore.redaction import is_followed, log
from tokencore.sealing import Sensitive, digest, sealed_class
from tokencore.stores.file_store import FileStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from threading import Thread
    from typing import Any

    from tokencore.attempts import Attempt
    from tokencore.clients.exports import Exports
    from tokencore.config.market import Market
    from tokencore.config.settings import Settings
    from tokencore.stores.database import Database, State
    from tokencore.stores.file_store import FileDocument
    from tokencore.stores.fleet import Fleet
    from tokencore.stores.follower import Follower
    from tokencore.tokens import Token

    # Of the attempt that this process has begun: its fence in the store, how far this machine's clock is ahead of the
    # server's, and the fence in the machine's files.
    Fence = tuple[int, timedelta, Attempt]

POLL = 0.1  # seconds between two looks at what another machine does
TELL = 5.0  # seconds of waiting for another machine after which a warning says so
IN_FLIGHT = 2.5  # time-outs (KIS_TIMEOUT) within which a request that was sent is answered
TRIES = 20  # for a change, when other machines change the row first
FOLLOW = 2.0  # seconds after which a process that keeps asking follows, and between two checks that it does
SLACK = timedelta(seconds=2)  # by which two recorded times of the same attempt may differ
REMEMBERED = 8  # removed tokens that a row lists, so that no machine restores them
BEFORE = "before"  # in a document's copy that was changed without the store: the copy as it was before
CONTENDED = "Other machines change the fleet's store too often. Nothing was issued; try again."
PROMPT = 1.5  # seconds to connect for a document: an alert must not wait, and can use the machine's copy


class SharedStore(Sensitive):
    """The `Store` of one key in a fleet, as one market sees it on this machine."""

    __slots__ = ("__dict__", "_market", "_session")  # so that `vars` shows no secret

    def __init__(self, market: Market, siblings: Callable[[], Sequence[str]]) -> None:
        """Set the names and paths; nothing is opened yet. `siblings` returns the names of all markets of the key."""
        self.fingerprint, self.name = market.fingerprint, market.key_name
        self._market, self._local = market, FileStore(market, siblings)
        self.place = self._local.place
        self._about = {"key_fingerprint": self.fingerprint, "environment": market.environment}
        self.copies: Exports | None = None  # the files of other clients, which a follower keeps up to date too
        self._asked = False  # whether this process has had to ask the store: then it keeps asking
        # Under the lock: the connection, the row as it was read, and what is wrong with the store.
        self._locked = 0  # the thread that holds the lock: others read as if nobody did
        self._session: Database | None = None
        self._state: State | None = None
        self._trouble: TokenError | None = None
        self._publishing: Thread | None = None
        self._follow_at = 0.0

    def __repr__(self) -> str:
        return f"SharedStore({self._local.folder!r}, {self.fingerprint!r})"

    def read(self) -> tuple[Token | None, str]:
        """Return the machine's token; if it has no living one, the fleet's, once this process has asked the store."""
        token, problem = self._local.read()
        return self._or_fleets(token), problem

    def unchanged(self, token: Token) -> bool:
        """Whether the machine's file still holds `token`; a process that keeps asking this starts a follower."""
        if time.monotonic() >= self._follow_at:
            if self._follow_at:
                from tokencore.stores import follower

                follower.start(lambda: make_follower(self._market.settings, self._market))
            self._follow_at = time.monotonic() + FOLLOW
        return self._local.unchanged(token)

    def newest(self, *, shared: bool = False) -> Token | None:
        """Return the machine's token that lasts longest; with `shared` or under the lock, also consider the fleet's."""
        # A living token in the key's own file is enough: looking at every view takes long with a thousand keys.
        token = self._local.newest(shared=True) if shared else self._local.read()[0]
        return self._or_fleets(token) if shared or self._holds() else token

    def saved(self, token: Token) -> bool:
        """Whether the machine's files have this token."""
        return self._local.saved(token)

    def save(self, token: Token) -> None:
        """Write the token to the files and to the store; if the store cannot be reached, the fleet gets it later."""
        self._local.save(token)
        try:
            if token.rejected_at is None:
                self._put(token)
            else:  # by now another machine may have a new one
                self._offered(self._connected(), token)
                self._changed()
        except TokenError as error:
            what = "get this token" if token.rejected_at is None else "learn of it"
            _warn(error, f"The other machines {what} when the store can be reached again.")

    def delete(self) -> bool:
        """Remove this market's token on this machine, and the fleet's with that of its last market.

        Raises:
            TokenStoreError: the store cannot be reached; nothing was removed.
        """
        self._reread()
        found = self._local.delete()
        if self._local.newest(shared=True) is None:
            found = self._put(None) or found
        return found

    def clear(self) -> None:
        """Remove the key's token for all markets and machines; the record stays.

        Raises:
            TokenStoreError: the store cannot be reached; the token is marked rejected here, and later for all machines.
        """
        try:
            self._put(None)
        except TokenError:
            if token := self._local.read()[0]:
                token.rejected_at = token.rejected_at or datetime.now(UTC)
                self._local.save(token)
            raise
        self._local.clear()

    def details(self) -> dict[str, Any]:
        """Return the details of the machine's file."""
        return self._local.details()

    def attempts(self) -> list[Attempt]:
        """Return the fleet's record, by this machine's clock, or the machine's own if the store cannot be reached."""
        self._asked, state = True, None
        if self._holds():
            with suppress(TokenError):
                state = self._reread()
        else:
            self._settle()
            state = self._seen()
        return list(state.attempts.values()) if state else self._local.attempts()

    def begin(self, attempt: Attempt, *, strict: bool = False) -> Fence | None:  # noqa: ARG002 - the fleet has the token
        """Record the attempt in the store, then on this machine; None if another machine changed the row first.

        Raises:
            TokenStoreError: the store cannot be reached, or the key's row in it cannot be used.
        """
        if self._trouble:
            raise self._trouble
        state, number = self._reread(), None
        if not self._in_flight(state):
            number = self._connected().begin(self.name, state.version, attempt, state.ahead)
        self._changed()
        if number is None:
            self._meet(time.monotonic() + self._patience())
            return None
        return number, state.ahead, self._local.begin(attempt)

    def depart(self, fence: Fence) -> bool:
        """Set the attempt's time by the server's clock; False if another machine began since, or the answer was late.

        Raises:
            TokenStoreError: no answer came; nothing may be sent.
        """
        began = time.monotonic()
        if not self._connected().depart(self.name, fence[0]):
            self._meet(0)
            return False
        return time.monotonic() - began < self._patience() / 2 and self._local.depart(fence[2])

    def finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """Save the token and the outcome here, and publish both in a thread: a caller that gets a token does not wait.

        Raises:
            OSError: the machine's files could not be written; the fleet gets it anyway.
        """
        from threading import Thread

        self._changed()
        # Not a daemon thread: a command that ends waits for it, a few seconds at most.
        publisher = Thread(
            target=self._publish, args=(self._session, fence, attempt, token), name="tokencore publishing"
        )
        self._session = None  # it belongs to the publisher now
        try:
            self._local.finish(fence[2], attempt, token)
        finally:
            with suppress(RuntimeError):  # the system has no thread left: the next exchange publishes both
                publisher.start()
                self._publishing = publisher
            if token is None:
                self._settle()

    def note(self, attempt: Attempt) -> None:
        """Record an attempt that needed no request, here and in the store."""
        self._local.note(attempt)
        try:
            state = self._reread()
            self._connected().begin(self.name, None, attempt, state.ahead)
        except TokenError as error:
            _warn(error, "What was imported or revoked is recorded on this machine only.")
        self._changed()

    @contextmanager
    def lock(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the machine's lock inside the block; first exchange with the fleet, and wait while another asks KIS."""
        end = time.monotonic() + wait
        with self._local.lock(wait=wait, give_up=give_up) as locked:
            if not locked:
                yield False
                return
            self._asked, self._locked = True, get_ident()
            try:
                if not give_up():  # otherwise the token has come, and there is no need to ask the store
                    self._fleet.forget()
                    self._meet(end, give_up)
            except TokenError as error:
                self._trouble = error
            try:
                yield True
            finally:
                if self._session:
                    self._session.close()
                self._locked, self._session, self._state, self._trouble = 0, None, None, None

    def document(self, name: str) -> FileDocument:
        """Return the machine's document of that name; none is shared, because approval keys are paced, not limited."""
        return self._local.document(name)

    def mirror(self, session: Database) -> bool:
        """Bring the files, the row and other clients' files up to date; False if the machine's lock is not free."""
        from tokencore.stores.encryption import SealError

        with self._local.lock(wait=0) as locked:
            try:
                if locked:
                    self._exchange(session)
                    if self.copies:
                        self.copies.sync(self._local.read()[0])  # `newest` would look at every view
            except SealError as error:  # it concerns this key alone
                alone(error)
            return locked

    @property
    def _fleet(self) -> Fleet:
        from tokencore.stores.fleet import Fleet  # not on the path of a cached token

        return Fleet.of(self._market.settings)

    def _holds(self) -> bool:
        """Whether this thread holds the lock."""
        return self._locked == get_ident()

    def _connected(self) -> Database:
        """Return the connection of this lock, opened when first needed."""
        if self._session is None:
            if self._trouble:
                raise self._trouble
            self._session = self._fleet.connect()
        return self._session

    def _reread(self) -> State:
        """Return the row as read under this lock, re-reading it if this process has changed it."""
        if self._state is None:
            session = self._connected()
            self._settle()
            self._state = session.read([self.name])[self.name]
        return self._state

    def _settle(self) -> None:
        """Wait until the last outcome is published; callers here do not wait for a token."""
        if self._publishing:
            self._publishing.join()

    def _changed(self) -> None:
        """Forget the row that was read before: it is out of date."""
        self._fleet.forget()
        self._state = None

    def _seen(self) -> State | None:
        try:
            return self._fleet.look(self.name)
        except TokenError as error:
            alone(error)
            return None

    def _or_fleets(self, token: Token | None) -> Token | None:
        if token and token.rejected_at is None and token.expires_at.timestamp() > time.time():
            return token
        state = self._state if self._holds() else self._seen() if self._asked else None
        if self._trouble:  # it is reported by whoever needs more than is here
            return token
        try:
            return tokens.longest([token, self._opened(state)[0] if state else None])
        except TokenError as error:
            alone(error)
            return token

    def _opened(self, state: State) -> tuple[Token | None, list[str]]:
        """Return the row's token, and the digests of those that a person has removed, which no machine restores."""
        content = self._fleet.seal.open(state.sealed, self._about) if state.sealed else {}
        text, removed = content.get("token"), content.get("removed", [])
        return tokens.from_text(str(text))[0] if text else None, [str(one) for one in removed]

    def _sealed(self, token: Token | None, removed: list[str]) -> str:
        """Return a row's encrypted content with this token and the digests of removed ones."""
        text = token and tokens.to_cache(token, now=token.cached_at or datetime.now(UTC), **self._about)
        gone = [one for one in removed if one and one != _name_of(token)]
        return self._fleet.seal.close({**self._about, "token": text, "removed": gone[:REMEMBERED]})

    def _meet(self, end: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Exchange with the store; repeat while another machine is asking KIS, until `end` on the monotonic clock."""
        tell_at = time.monotonic() + TELL
        while True:
            self._state = self._exchange(self._connected())
            if not self._in_flight(self._state) or give_up() or time.monotonic() >= end:
                return
            if time.monotonic() >= tell_at and is_followed():
                tell_at = end
                _warn("Another machine is asking KIS:", f"waiting for its answer, {self._patience():.0f} s at most.")
            time.sleep(POLL)

    def _in_flight(self, state: State) -> bool:
        """Whether another machine's request may still be answered."""
        from tokencore.attempts import latest

        last = latest(list(state.attempts.values()))
        if last is None or last.outcome != "sent" or not last.host:
            return False
        return (datetime.now(UTC) - last.at).total_seconds() < self._patience()

    def _patience(self) -> float:
        from tokencore.attempts import retry_delay

        pause = retry_delay(1, self._market.settings.issue_interval).total_seconds()
        return max(pause, IN_FLIGHT * self._market.timeout)

    def _exchange(self, session: Database) -> State:
        """Push what only this machine has, pull what the fleet has, and return the resulting row."""
        from tokencore.attempts import render

        ours = self._local.read()[0]
        state = self._offered(session, ours)
        if self._restored(session, state):
            state = self._offered(session, ours)
        (theirs, removed), attempts = self._opened(state), list(state.attempts.values())
        try:
            if theirs and _name_of(theirs) != _name_of(ours):
                self._local.save(theirs)
                if theirs.issued_at:
                    self._local.mark(theirs.issued_at)
            elif ours and not theirs and _name_of(ours) in removed:
                self._local.clear()
            if attempts and render(attempts) != render(self._local.attempts()):
                self._local.record.write(attempts)
        except OSError as error:  # the token is served anyway
            _warn(f"What the fleet has could not be copied to {self.place}", f"({error.strerror}).")
        return state

    def _offered(self, session: Database, token: Token | None, *, issued: bool = False) -> State:
        """Push the token if it beats the row's and is just `issued` or not listed as removed, and return the row."""
        for _ in range(TRIES):
            state = session.read([self.name])[self.name]
            theirs, removed = self._opened(state)
            better = token if _beats(token, theirs) and (issued or _name_of(token) not in removed) else None
            if state.version and not better:
                return state
            session.put(self.name, state.version, self._sealed(better, removed))
        raise TokenStoreError(CONTENDED)

    def _restored(self, session: Database, state: State) -> bool:
        """Push what only the machine's record has; return whether there was anything.

        That is an outcome that could not be published before; the record of the fleet's first machine; and the last
        attempts before a crash of the server, if its successor lacks them.
        """
        theirs, wait = state.attempts, timedelta(seconds=self._patience())
        known = {one[1:] for one in theirs.values()}
        mine = [one for one in self._local.attempts() if one[1:] not in known]
        answers = [
            (fence, one)
            for fence, sent in theirs.items()
            if sent.outcome == "sent" and not sent.host
            for one in mine
            if one.outcome != "sent" and one.pid == sent.pid and -SLACK < one.at - sent.at < wait
        ]
        for fence, attempt in answers:
            session.finish(self.name, fence, attempt, state.ahead)
        last = next(reversed(theirs.values()), None)
        lost = [one for one in mine if last is None or one.at > last.at + SLACK]
        for attempt in () if answers else lost:
            session.begin(self.name, None, attempt, state.ahead)
        return bool(answers or lost)

    def _put(self, token: Token | None) -> bool:
        """Replace the fleet's token on a person's request, whatever it is by now; return whether there was anything."""
        session = self._connected()
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
                self._changed()
                return bool(before)
        raise TokenStoreError(CONTENDED)

    def _publish(self, session: Database | None, fence: Fence, attempt: Attempt, token: Token | None) -> None:
        """Publish the token and the outcome; if the store cannot be reached, the next exchange does both."""
        number, ahead, _ = fence
        try:
            with session or self._fleet.connect() as reached:
                try:
                    if token:
                        self._offered(reached, token, issued=True)
                finally:
                    reached.finish(self.name, number, attempt, ahead)
        except TokenError as error:
            _warn(error, "The other machines get what KIS answered when the store can be reached again.")
        self._fleet.forget()


@sealed_class(but=("lock",))
class SharedDocument(Sensitive):
    """A small JSON object in a row of the store, copied to this machine's file when its lock is taken.

    The lock is a lease of a minute, in which nobody else can change the row. If the store cannot be reached, the
    machine's copy is used instead; what is changed there is taken over once the store can be reached again.
    """

    __slots__ = ("_about", "_content", "_local", "_row", "_session", "_settings", "_version", "place")

    def __init__(self, local: FileDocument, settings: Settings, name: str) -> None:
        """Set the name of the document's row; nothing is opened yet."""
        self.place, self._local, self._settings = local.place, local, settings
        self._row = f"document:{name}"
        self._about = {"document": self._row}
        self._session: Database | None = None
        self._version = 0
        self._content: dict[str, Any] | None = None  # under the lock

    def read(self) -> dict[str, Any]:
        """Return the object; empty if there is none or it cannot be read."""
        if self._content is not None:
            return self._content
        try:
            with self._fleet.connect(PROMPT) as session:
                theirs = self._opened(session.read([self._row], 0)[self._row].sealed)
                return _joined(theirs, *self._copied())
        except TokenError as error:
            alone(error)
            return self._copied()[0]

    def write(self, content: dict[str, Any]) -> None:
        """Replace the object, under the lock.

        Raises:
            OSError: the lease is over, or the store did not answer, and the machine's copy is unchanged; or that copy
                could not be written.
        """
        if self._session:
            try:
                if not self._session.put(self._row, self._version, self._sealed(content)):
                    raise TimeoutError(None, "the lock on it is over")
            except TokenError:
                raise TimeoutError(None, "the fleet's store does not answer") from None
            self._version += 1
            self._local.write(content)
        else:
            copy, before = self._copied()
            self._local.write({**content, BEFORE: copy if before is None else before})
        self._content = content

    @contextmanager
    def lock(self, *, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the document's lock inside the block, for all machines; yield False if it was not acquired in time."""
        end = time.monotonic() + wait
        with self._local.lock(wait=wait, give_up=give_up) as held:
            try:
                yield held and self._leased(end, give_up)
            finally:
                self._end()

    @property
    def _fleet(self) -> Fleet:
        from tokencore.stores.fleet import Fleet

        return Fleet.of(self._settings)

    def _leased(self, end: float, give_up: Callable[[], bool]) -> bool:
        try:
            self._session = session = self._fleet.connect(PROMPT)
            while not (found := session.lease(self._row)):
                if not session.read([self._row], 0)[self._row].version:
                    session.put(self._row, 0, self._sealed(self._copied()[0]))
                elif give_up() or time.monotonic() >= end:
                    return False
                else:
                    time.sleep(POLL)
            self._version = found[0]
            theirs = self._opened(found[1])
            self._content = _joined(theirs, *self._copied())
        except TokenError as error:
            self._end()
            alone(error)
            self._content = self._copied()[0]
        else:
            with suppress(OSError):  # the copy is for when the store cannot be reached
                (self._local if self._content == theirs else self).write(self._content)
        return True

    def _copied(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the machine's copy and, if it was changed without the store, what it was before."""
        copy = self._local.read()
        before = copy.pop(BEFORE, None)
        return copy, before if isinstance(before, dict) else None

    def _sealed(self, content: dict[str, Any]) -> str:
        return self._fleet.seal.close({**self._about, "content": content})

    def _opened(self, sealed: str) -> dict[str, Any]:
        content = self._fleet.seal.open(sealed, self._about).get("content") if sealed else {}
        return content if isinstance(content, dict) else {}

    def _end(self) -> None:
        if self._session:
            with suppress(TokenError):  # the lease ends by itself
                if self._version:
                    self._session.release(self._row, self._version)
            self._session.close()
        self._session, self._version, self._content = None, 0, None


def make_follower(settings: Settings, *own: Market) -> Follower:
    """Return a follower for all keys in the settings and for a program's own."""
    from tokencore.stores.fleet import Fleet
    from tokencore.stores.follower import Follower

    markets: dict[str, list[Market]] = {}
    for market in (*settings.all_markets(), *own):
        if market.app_key:
            markets.setdefault(market.key_name, []).append(market)
    return Follower(Fleet.of(settings), {row: _store_of(*sharing) for row, sharing in markets.items()})


def _store_of(*markets: Market) -> SharedStore:
    from tokencore.clients.exports import Exports

    store = SharedStore(markets[0], lambda: [market.name for market in markets])
    store.copies = Exports(markets, store)
    return store


def _joined(theirs: dict[str, Any], ours: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the store's object with the items that this machine added to its lists, or removed, since `before`.

    What it added comes first: where it is a newer state of an item of the store's, that is what readers meet.
    """
    if before is None:
        return theirs
    joined = dict(theirs)
    for name in ours:
        there, mine, known = (
            found if isinstance(found := one.get(name), list) else [] for one in (theirs, ours, before)
        )
        kept = [one for one in there if one in mine or one not in known]
        joined[name] = [one for one in mine if one not in known and one not in there] + kept
    return joined


def _name_of(token: Token | None) -> str:
    return digest(token.access_token, str(token.rejected_at is None), length=16) if token else ""


def _beats(ours: Token | None, theirs: Token | None) -> bool:
    """Whether our token should replace the fleet's: it lives longer, or it is the same one, now known to be dead."""
    if ours is None:
        return False
    if theirs is None:
        return ours.rejected_at is None and ours.expires_at > datetime.now(UTC)
    if ours.access_token == theirs.access_token:
        return ours.rejected_at is not None and theirs.rejected_at is None
    return tokens.longest([theirs, ours]) is ours


def alone(error: TokenError) -> None:
    """Warn, once per process, that this machine uses its own files."""
    sources.warn(f"{error} Meanwhile this machine uses its own files.")


def _warn(trouble: object, rest: str) -> None:
    # Leave out "Nothing was issued": here that is no news, or untrue, because something was issued or saved.
    log().warning("%s %s", str(trouble).partition(" Nothing was")[0], rest)
