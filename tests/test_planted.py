"""Bugs to plant, each with the test that finds it, and what plants every one and sees that test fail.

As a pytest plugin (`PLANTED=no_lock pytest -p test_planted ...`) it plants the bug before a test is imported, so that
the processes that the tests fork have it too. The first ten are those of version 0.1, each of which broke its model; of
the others there is one for each kind of test. The names of bugs and tests together are the table of what is found.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from stepping import FULL

from tokencore import attempts, keys, limits, policy, renewer, sealing, tokens
from tokencore.clients import exports
from tokencore.config import sources
from tokencore.errors import TokenStoreError
from tokencore.kis import codes
from tokencore.stores import database, encryption, file_store, files, lock, record, shared_store

TESTS = Path(__file__).parent
# ruff: noqa: ANN401, SLF001 - a bug is planted inside, in whatever is there
Store, Record, Seal = file_store.FileStore, record.Record, encryption.Seal
Renewer, Shared, Outcome = renewer.Renewer, shared_store.SharedStore, attempts.Outcome
begin: Any = database.Database.begin


@contextlib.contextmanager
def _free(*_: object) -> Iterator[bool]:
    yield True


@contextlib.contextmanager
def _deleting(path: str, *how: Any, hold: Any = lock.hold) -> Iterator[bool]:
    with hold(path, *how) as held:
        with contextlib.suppress(OSError):
            os.unlink(path)
        yield held


def _save_over(self: Any, token: tokens.Token, save: Any = Store.save) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(self._key_path)
    save(self, token)


def _finish_or_fail(self: Any, *what: Any) -> None:
    try:
        self._store.finish(*what)
    except OSError:
        raise TokenStoreError("The token could not be saved.") from None


def _anywhere(text: str, read: Any = tokens.from_text) -> tuple[tokens.Token, dict[str, Any]]:
    token, content = read(text)
    return token, {name: value for name, value in content.items() if name != "environment"}


def _complete_unless_issued(self: Any, begun: Any, one: Any, complete: Any = Record.complete) -> bool:
    return one.outcome == "issued" or bool(complete(self, begun, one))


def _granted_within(known: Any, now: Any) -> list[Any]:
    return [one for one in known if one.outcome in attempts.GRANTED and abs(now - one.at) < attempts.DAY]


def _from_any(self: Any, token: Any) -> Any:
    return tokens.longest([token, *(one for _, one in self._views())])


def _look_once(self: Any, *_: Any) -> None:
    self._state = self._exchange(self._connected())


_FALSE, _NONE, _TRUE = lambda *_: False, lambda *_: None, lambda *_: True
BEFORE, VIEW = "whatever_happens_before_any_call", "a_view_serves_where_the_key_has_no_living_token"
ONE_ERROR = "without_a_token_each_fault_is_one_error_and_one_next_attempt"
Replaced = tuple[Any, str, Any]  # what stands at a name of a class or module instead
QUICK = {"no_lock", "recorded_afterwards", "resurrected", "frames_kept", "no_version_check"}  # `make test` plants them
BUGS: dict[str, tuple[str, str, *tuple[Replaced, ...]]] = {  # the file and the test that find it
    "no_lock": ("faults", f"{BEFORE}[first token-side_by_side]", (file_store, "hold", _free)),
    "lock_deleted": ("model", "the_protocol_holds", (file_store, "hold", _deleting)),
    "no_second_look": ("faults", "a_renewal_of_version_0_1_is_the_keys_token[23.6]", (Renewer, "_serving", _NONE)),
    "recorded_afterwards": ("faults", f"{BEFORE}[first token-late and killed]",
        (Store, "begin", lambda _, attempt, **__: attempt), (Store, "depart", _TRUE)),
    "no_cool_down": ("faults", ONE_ERROR, (limits, "cooldown_until", _NONE)),
    "no_waiting": ("faults", ONE_ERROR, (Renewer, "_await", _NONE)),
    "written_in_place": ("faults", f"{BEFORE}[damaged file-torn]",
        (files, "write_bytes", lambda path, content, **_: Path(path).write_bytes(content))),
    "old_deleted_first": ("faults", f"{BEFORE}[about to expire-disk full]", (Store, "save", _save_over)),
    "thrown_away": ("faults", f"{BEFORE}[first token-disk full]", (Renewer, "_finish", _finish_or_fail)),
    "never_expired": ("faults", ONE_ERROR, (tokens.Token, "serves", lambda self, *_: self.rejected_at is None)),
    "view_first": ("file_store", f"{VIEW}[beside a living one that ends earlier]",
        (Store, "read", lambda self: (self.newest(), ""))),
    "paper_as_real": ("file_store", f"{VIEW}[of paper]", (tokens, "from_text", _anywhere)),
    "readable_by_all": ("file_store", "files_have_the_contracts_names_and_modes", (files, "PRIVATE_FILE", 0o644)),
    "resurrected": ("file_store", f"{VIEW}[of a token that is known to be dead]",
        (Store, "_longest", _from_any)),
    "not_set_aside": ("file_store", "a_damaged_file_is_a_miss_and_set_aside_with_a_word[half-view]",
        (files, "set_aside", os.unlink)),
    "dated_once": ("store_contract", "a_request_that_left_late_is_dated_anew", (Store, "depart", _TRUE)),
    "outcome_lost": ("store_contract", "an_attempt_is_recorded_before_its_outcome_and_completed_by_it",
        (Record, "complete", _complete_unless_issued)),
    "frames_kept": ("secrets", "an_interrupt_amid_a_request_carries_no_secret",
        (sealing, "_emptied", lambda error: error)),
    "dotenv_trusted": ("settings", "a_cloned_repository_gets_no_secret_of_another_source",
        (sources, "TRUSTED", (*sources.TRUSTED, sources.DOTENV_FILE))),
    "overwritten": ("clients", "newer_token_of_another_client_is_adopted_instead_of_written_over",
        (exports, "_longer", _NONE)),
    "foreign_touched": ("clients", "file_that_holds_no_token_of_the_key_is_never_touched",
        (exports, "_refuse_foreign", _NONE)),
    "asked_again": ("faults", ONE_ERROR,  # a request that may have reached KIS
        (codes, "silent", lambda _, why, silent=codes.silent: silent(Outcome.UNREACHABLE, why))),
    "six_hours_ignored": ("limits", "verdicts", (limits, "same_token_until", _NONE)),
    "same_counted": ("limits", "verdicts", (attempts, "issued_within", _granted_within)),
    "marks_ignored": ("faults", "the_ceiling_holds_on_a_full_disk_and_the_refusal_says_why",
        (Record, "_unrecorded", lambda _: [])),
    "controls_kept": ("trust", "a_note_is_one_short_printable_line", (keys, "clean", lambda text: text)),
    "fast_reader_differs": ("settings", "the_fast_reader_and_the_validated_settings_agree",
        (sources.Found, "address_variable", lambda *_: "KIS_BASE_URL")),
    "anchor_ignored": ("policy", "decisions",
        (policy, "_moment", lambda past, window, needs, _, at=policy._moment: at(past, window, needs, None))),
    "no_version_check": ("fleet", "of_two_that_have_looked_one_begins_and_the_last_that_began_may_send",
        (database.Database, "begin", lambda self, key, _, *line: begin(self, key, None, *line))),
    "no_depart": ("fleet", "whatever_befalls_the_machine_that_renews_the_others_get_the_same_token",
        (Shared, "depart", _TRUE)),
    "begun_afterwards": ("fleet", "eight_cold_machines_make_one_request[0]", (Shared, "depart", _TRUE),
        (Shared, "begin", lambda self, attempt, **_: (0, timedelta(0), self._local.begin(attempt)))),
    "clients_clock": ("fleet", "the_limits_go_by_the_servers_clock[1]", (database, "AHEAD", timedelta(days=9))),
    "one_retry": ("fleet", "eight_cold_machines_make_one_request[0]",
        (Shared, "_meet", _look_once), (renewer, "ROUNDS", 1)),
    "never_offered": ("fleet", "what_only_one_machine_has_is_offered_and_the_later_expiry_wins",
        (shared_store, "_beats", _FALSE)),
    "seal_unbound": ("fleet", "a_mistake_in_the_set_up_is_one_sentence_and_nothing_is_lost[exchanged]",
        (Seal, "open", lambda self, sealed, _, opened=Seal.open: opened(self, sealed, {}))),
}  # fmt: skip


def pytest_configure() -> None:
    """Plant what the environment names."""
    for place, name, instead in BUGS.get(os.environ.get("PLANTED", ""), ())[2:]:
        setattr(place, name, instead)


@pytest.mark.parametrize("name", BUGS if FULL else sorted(QUICK))
def test_a_planted_bug_is_found(name: str) -> None:
    """The named test fails, by an assertion of its own and not because it cannot be run."""
    file, test = BUGS[name][:2]
    options = ["-p", "test_planted", "--numprocesses=0", "--override-ini=addopts=", "--quiet", "--exitfirst"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS / f"test_{file}.py::test_{test}")],
        env={**os.environ, "PLANTED": name, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
