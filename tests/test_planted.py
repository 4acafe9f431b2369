"""Bugs to plant, each with the test that finds it, and what plants every one and sees that test fail.

As a pytest plugin (`PLANTED=no_lock pytest -p test_planted ...`) it plants the bug before a test is imported, so that
the processes that the tests fork have it too. The first ten are those of version 0.1, each of which broke its model; of
the others there is one for each kind of test. The names of bugs and tests together are the table of what is found.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from stepping import FULL

from tokencore import attempts, limits, policy, renewer, sealing, tokens
from tokencore.clients import exports
from tokencore.config import sources
from tokencore.errors import TokenStoreError
from tokencore.kis import codes
from tokencore.stores import database, encryption, file_store, files, record, shared_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parent
# ruff: noqa: ANN401, SLF001 - a bug is planted inside, in whatever is there
Store: Any = file_store.FileStore
Record: Any = record.Record
Renewer: Any = renewer.Renewer
Shared: Any = shared_store.SharedStore


class Bug(NamedTuple):
    """How to plant it, and the test that finds it; `make test` too plants the `quick` ones."""

    plant: Callable[[], None]
    found_by: str
    quick: bool


BUGS: dict[str, Bug] = {}


def found_by(file: str, test: str, *, quick: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add the function, which plants a bug, to the list."""

    def add(plant: Callable[[], None]) -> Callable[[], None]:
        BUGS[plant.__name__] = Bug(plant, f"test_{file}.py::test_{test}", quick)
        return plant

    return add


def pytest_configure() -> None:
    """Plant what the environment names."""
    if name := os.environ.get("PLANTED"):
        BUGS[name].plant()


@found_by("faults", "whatever_happens_before_any_call[first token-side_by_side]", quick=True)
def no_lock() -> None:
    """Everyone believes to hold the lock."""

    @contextlib.contextmanager
    def hold(*_: object) -> Iterator[bool]:
        yield True

    file_store.hold = hold  # type: ignore[assignment]


@found_by("model", "the_protocol_holds")
def lock_deleted() -> None:
    """Whoever has the lock deletes its file."""
    hold = file_store.hold

    @contextlib.contextmanager
    def deleting(path: str, *how: Any) -> Iterator[bool]:
        with hold(path, *how) as held:
            with contextlib.suppress(OSError):
                os.unlink(path)
            yield held

    file_store.hold = deleting  # type: ignore[assignment]


@found_by("faults", "a_renewal_of_version_0_1_is_the_keys_token[23.6]")
def no_second_look() -> None:
    """Under the lock nobody looks whether another process was quicker."""
    Renewer._serving = lambda *_: None


@found_by("faults", "whatever_happens_before_any_call[first token-late and killed]", quick=True)
def recorded_afterwards() -> None:
    """The attempt is written when its outcome is known."""
    Store.begin = lambda _, attempt: attempt
    Store.depart = lambda *_: True


@found_by("faults", "an_attempt_of_another_version_starts_the_minute[sent]")
def no_cool_down() -> None:
    """Nobody minds when the last request was."""
    limits.cooldown_until = lambda *_: None


@found_by("faults", "an_attempt_of_another_version_starts_the_minute[limit]")
def no_waiting() -> None:
    """The cool-down is not sat out before the second try."""
    Renewer._await = lambda *_: None


@found_by("faults", "whatever_happens_before_any_call[damaged file-torn]")
def written_in_place() -> None:
    """Files are overwritten where they stand."""

    def write(path: str, content: bytes, **_: object) -> None:
        with open(path, "wb") as file:
            file.write(content)

    files.write_bytes = write


@found_by("faults", "whatever_happens_before_any_call[about to expire-disk full]")
def old_deleted_first() -> None:
    """The old token goes before its successor is there."""
    save = Store.save

    def saved(self: Any, token: tokens.Token) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._key_path)
        save(self, token)

    Store.save = saved


@found_by("faults", "whatever_happens_before_any_call[first token-disk full]")
def thrown_away() -> None:
    """A token that cannot be saved is no token."""

    def finish(self: Any, *what: Any) -> None:
        try:
            self._store.finish(*what)
        except OSError:
            raise TokenStoreError("The token could not be saved.") from None

    Renewer._finish = finish


@found_by("faults", "without_a_token_each_fault_is_one_error_and_one_next_attempt")
def never_expired() -> None:
    """A token serves for as long as nobody rejects it."""
    tokens.Token.serves = lambda self, *_: self.rejected_at is None  # type: ignore[method-assign]


@found_by("file_store", "a_view_never_beats_a_living_token_of_the_key")
def view_first() -> None:
    """A market's file beats the key's own one."""
    Store.read = lambda self: (self.newest(), "")


@found_by("file_store", "a_view_of_another_key_or_environment_is_a_miss[paper]")
def paper_as_real() -> None:
    """A file's environment is not looked at."""
    from_text = tokens.from_text

    def blind(text: str) -> tuple[tokens.Token, dict[str, Any]]:
        token, content = from_text(text)
        content.pop("environment", None)
        return token, content

    tokens.from_text = blind


@found_by("file_store", "files_have_the_contracts_names_and_modes")
def readable_by_all() -> None:
    """Files are made for everybody to read."""
    vars(files)["PRIVATE_FILE"] = 0o644


@found_by("file_store", "a_dead_token_does_not_come_back_from_a_view", quick=True)
def resurrected() -> None:
    """A copy of a rejected token counts as a living one."""
    Store._longest = lambda self, token: tokens.longest([token, *(self._on_file(path)[0] for path in self._views())])


@found_by("file_store", "a_damaged_file_is_a_miss_and_set_aside_with_a_word[half-view]")
def not_set_aside() -> None:
    """What is no token file is not kept."""
    files.set_aside = os.unlink


@found_by("store_contract", "a_request_that_left_late_is_dated_anew")
def dated_once() -> None:
    """An attempt keeps its first time, however late its request leaves."""
    Store.depart = lambda *_: True


@found_by("store_contract", "an_attempt_is_recorded_before_its_outcome_and_completed_by_it")
def outcome_lost() -> None:
    """With its token saved, an attempt is complete."""
    complete = Record.complete
    Record.complete = lambda self, begun, one: one.outcome == "issued" or complete(self, begun, one)


@found_by("secrets", "an_interrupt_amid_a_request_carries_no_secret", quick=True)
def frames_kept() -> None:
    """An error leaves with the variables of every frame it passed."""
    sealing._emptied = lambda error: error


@found_by("settings", "a_cloned_repository_gets_no_secret_of_another_source")
def dotenv_trusted() -> None:
    """A `.env` may say where any secret is sent."""
    sources.TRUSTED = (*sources.TRUSTED, sources.DOTENV_FILE)  # type: ignore[assignment]


@found_by("clients", "newer_token_of_another_client_is_adopted_instead_of_written_over")
def overwritten() -> None:
    """Another client's own token, which lasts longer, is written over."""
    exports._longer = lambda *_: None


@found_by("clients", "file_that_holds_no_token_of_the_key_is_never_touched")
def foreign_touched() -> None:
    """An export takes the place of any file."""
    exports._refuse_foreign = lambda *_: None


@found_by("faults", "without_a_token_each_fault_is_one_error_and_one_next_attempt")
def asked_again() -> None:
    """A request that may have reached KIS is sent again."""
    silent = codes.silent
    codes.silent = lambda outcome, why: silent(attempts.Outcome.UNREACHABLE, why)  # noqa: ARG005 - whatever it was


@found_by("limits", "kis_is_not_asked_while_it_would_hand_back_the_same_token")
def six_hours_ignored() -> None:
    """KIS is asked although it would hand back the same token."""
    limits.same_token_until = lambda *_: None


@found_by("limits", "the_ceiling_holds_for_any_24_hours")
def same_counted() -> None:
    """A token that KIS returned counts as issued."""

    def within(known: Any, now: Any, span: Any = attempts.DAY) -> list[Any]:
        return [one for one in known if one.outcome in attempts.GRANTED and abs(now - one.at) < span]

    attempts.issued_within = within  # type: ignore[assignment]


@found_by("faults", "the_ceiling_holds_or_the_refusal_says_why[full disk]")
def marks_ignored() -> None:
    """What only the lock file's times know of an attempt is not looked at."""
    Record._unrecorded = lambda _: []


@found_by("trust", "a_note_is_one_short_printable_line")
def controls_kept() -> None:
    """Text from elsewhere keeps what a terminal acts on."""
    vars(attempts)["clean"] = lambda text: text


@found_by("settings", "the_fast_reader_and_the_validated_settings_agree")
def fast_reader_differs() -> None:
    """A market's own address does not reach the reader of a cached `get`."""
    sources.Found.address_variable = lambda *_: "KIS_BASE_URL"  # type: ignore[method-assign]


@found_by("policy", "decisions")
def anchor_ignored() -> None:
    """A renewal is due as soon as a day has passed since the last one."""
    moment: Any = policy._moment
    inside: Any = policy
    inside._moment = lambda past, window, needs, _: moment(past, window, needs, None)


@found_by("fleet", "of_two_that_have_looked_one_begins_and_the_last_that_began_may_send", quick=True)
def no_version_check() -> None:
    """A machine begins although the row has changed since it looked."""
    begin = database.Database.begin
    inside: Any = database.Database
    inside.begin = lambda self, key, _, *line: begin(self, key, None, *line)


@found_by("fleet", "whatever_befalls_the_machine_that_renews_the_others_get_the_same_token")
def no_depart() -> None:
    """Who was stopped sends without another look."""
    Shared.depart = lambda *_: True


@found_by("fleet", "eight_cold_machines_make_one_request[0]")
def begun_afterwards() -> None:
    """The fleet hears of an attempt with its outcome."""
    Shared.begin = lambda self, attempt: (0, timedelta(0), self._local.begin(attempt))
    Shared.depart = lambda *_: True


@found_by("fleet", "the_limits_go_by_the_servers_clock[1]")
def clients_clock() -> None:
    """Each machine takes its own time for the fleet's."""
    database.AHEAD = timedelta(days=9)


@found_by("fleet", "eight_cold_machines_make_one_request[0]")
def one_retry() -> None:
    """Who was forestalled looks once more, and gives up."""
    Shared._meet = lambda self, *_: setattr(self, "_state", self._exchange(self._connected()))
    renewer.ROUNDS = 1


@found_by("fleet", "what_only_one_machine_has_is_offered_and_the_later_expiry_wins")
def never_offered() -> None:
    """A token that the store has not got stays where it is."""
    inside: Any = shared_store
    inside._beats = lambda *_: False


@found_by("fleet", "a_mistake_in_the_set_up_is_one_sentence_and_nothing_is_lost[exchanged]")
def seal_unbound() -> None:
    """Whatever the key opens is taken for what the row is about."""
    opened = encryption.Seal.open
    inside: Any = encryption.Seal
    inside.open = lambda self, sealed, _: opened(self, sealed, {})


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if FULL or bug.quick])
def test_a_planted_bug_is_found(name: str) -> None:
    """The named test fails, by an assertion of its own and not because it cannot be run."""
    options = ["-p", "test_planted", "--numprocesses=0", "--override-ini=addopts=", "--quiet", "--exitfirst"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS / BUGS[name].found_by)],
        env={**os.environ, "PLANTED": name, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
