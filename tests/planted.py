"""Bugs to plant, each with the test that finds it; `test_planted.py` plants every one and sees that test fail.

As a pytest plugin (`PLANTED="no lock" pytest -p planted ...`) it plants the bug before a test is imported, so that the
processes that the tests fork have it too. The first ten are those of version 0.1, each of which broke its model; of
the others there is one for each kind of test. `BUGS` at the end is the table.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore import attempts, limits, policy, renewer, sealing, tokens
from tokencore.clients import exports
from tokencore.config import market, sources
from tokencore.errors import TokenStoreError
from tokencore.kis import codes, gateway
from tokencore.stores import file_store, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Store: Any = file_store.FileStore
Renewer: Any = renewer.Renewer
Exports: Any = exports.Exports


def no_lock() -> None:
    """Everyone believes to hold the lock."""

    @contextlib.contextmanager
    def hold(*_: object) -> Iterator[bool]:
        yield True

    file_store.hold = hold  # type: ignore[assignment]


def lock_deleted() -> None:
    """Whoever has the lock deletes its file."""
    hold = file_store.hold

    @contextlib.contextmanager
    def deleting(path: str, *how: Any) -> Iterator[bool]:  # noqa: ANN401 - passed on
        with hold(path, *how) as held:
            with contextlib.suppress(OSError):
                os.unlink(path)
            yield held

    file_store.hold = deleting  # type: ignore[assignment]


def no_second_look() -> None:
    """Under the lock nobody looks whether another process was quicker."""
    Renewer._serving = lambda *_: None  # noqa: SLF001


def recorded_afterwards() -> None:
    """The attempt is written when its outcome is known."""
    Store.begin = lambda _, attempt: file_store.Fence(attempt)
    Store.depart = lambda *_: True


def no_cool_down() -> None:
    """Nobody minds when the last request was."""
    limits.cooldown_until = lambda *_: None


def no_waiting() -> None:
    """The cool-down is not sat out before the second try."""
    Renewer._await = lambda *_: None  # noqa: SLF001


def written_in_place() -> None:
    """Files are overwritten where they stand."""

    def write(path: str, content: bytes, **_: object) -> None:
        with open(path, "wb") as file:
            file.write(content)

    files.write_bytes = write


def old_deleted_first() -> None:
    """The old token goes before its successor is there."""
    save = Store.save

    def saved(self: Any, token: tokens.Token) -> None:  # noqa: ANN401 - the class, patched
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._key_path)
        save(self, token)

    Store.save = saved


def thrown_away() -> None:
    """A token that cannot be saved is no token."""

    def finish(self: Any, *what: Any) -> None:  # noqa: ANN401 - the class, patched
        try:
            self._store.finish(*what)
        except OSError:
            raise TokenStoreError("The token could not be saved.") from None

    Renewer._finish = finish  # noqa: SLF001


def never_expired() -> None:
    """A token serves for as long as nobody rejects it."""
    tokens.Token.serves = lambda self, *_: self.rejected_at is None  # type: ignore[method-assign]


def view_first() -> None:
    """A market's file beats the key's own one."""
    Store.read = lambda self: (self.newest(), "")


def paper_as_real() -> None:
    """A file's environment is not looked at."""
    from_text = tokens.from_text

    def blind(text: str) -> tuple[tokens.Token, dict[str, Any]]:
        token, content = from_text(text)
        content.pop("environment", None)
        return token, content

    tokens.from_text = blind


def readable_by_all() -> None:
    """Files are made for everybody to read."""
    files.PRIVATE_FILE = 0o644


def resurrected() -> None:
    """A copy of a rejected token counts as a living one."""
    Store._longest = lambda self, token: tokens.longest(  # noqa: SLF001
        [token, *(self._on_file(path)[0] for path in self._views())]
    )


def removed() -> None:
    """What is no token file is not kept."""
    files.set_aside = os.unlink


def dated_once() -> None:
    """An attempt keeps its first time, however late its request leaves."""
    Store.depart = lambda *_: True


def outcome_lost() -> None:
    """With its token saved, an attempt is complete."""
    replace = Store._replace  # noqa: SLF001
    Store._replace = lambda self, fence, attempt: attempt.outcome == "issued" or replace(self, fence, attempt)  # noqa: SLF001


def frames_kept() -> None:
    """An error leaves with the variables of every frame it passed."""
    sealing._emptied = lambda error: error  # noqa: SLF001


def dotenv_trusted() -> None:
    """A `.env` may say where any secret is sent."""
    sources.TRUSTED = (*sources.TRUSTED, sources.DOTENV_FILE)  # type: ignore[assignment]


def overwritten() -> None:
    """Another client's own token, which lasts longer, is written over."""
    Exports._outlasting = lambda *_: None  # noqa: SLF001


def foreign_touched() -> None:
    """An export takes the place of any file."""
    Exports._refuse_foreign = lambda *_: None  # noqa: SLF001


def asked_again() -> None:
    """A request that may have reached KIS is sent again."""
    codes.no_answer = codes.unreachable


def six_hours_ignored() -> None:
    """KIS is asked although it would hand back the same token."""
    limits.same_token_until = lambda *_: None


def same_counted() -> None:
    """A token that KIS returned counts as issued."""

    def within(known: Any, now: Any, span: Any = attempts.DAY) -> list[Any]:  # noqa: ANN401 - as the original
        return [one for one in known if one.outcome in attempts.GRANTED and abs(now - one.at) < span]

    attempts.issued_within = within


def marks_ignored() -> None:
    """What only the lock file's times know of an attempt is not looked at."""
    Store._unrecorded = lambda _: []  # noqa: SLF001


def controls_kept() -> None:
    """Text from elsewhere keeps what a terminal acts on."""
    attempts.clean = lambda text, *_: text


def fast_reader_differs() -> None:
    """A market's own address does not reach the reader of a cached `get`."""
    sources.Found.address_variable = lambda *_: "KIS_BASE_URL"  # type: ignore[method-assign]


def anchor_ignored() -> None:
    """A renewal is due as soon as a day has passed since the last one."""
    moment = policy._moment  # noqa: SLF001
    policy._moment = lambda past, window, needs, _: moment(past, window, needs, None)  # noqa: SLF001


def endless_answer() -> None:
    """An answer is read to its end, however long it is."""
    gateway.ANSWER_LIMIT = 1 << 40


class Bug(NamedTuple):
    """How to plant it, and the test that finds it; `also_quick` ones are planted by `make test` too."""

    plant: Callable[[], None]
    found_by: str
    also_quick: bool = False


_FAULTS, _FILES, _EXPORTS = "test_faults.py::test_", "test_file_store.py::test_", "test_exports.py::test_"
BUGS = {
    "no lock": Bug(no_lock, _FAULTS + "two_that_meet_at_any_call_make_one_request[first token-side_by_side]", True),
    "lock file deleted": Bug(lock_deleted, "test_model.py::test_the_protocol_holds"),
    "no second look": Bug(no_second_look, "test_model.py::test_the_protocol_holds"),
    "recorded afterwards": Bug(recorded_afterwards, _FAULTS + "a_request_that_leaves_late_starts_the_minute_then"),
    "no cool-down": Bug(no_cool_down, _FAULTS + "an_attempt_of_another_version_starts_the_minute"),
    "no waiting": Bug(no_waiting, _FAULTS + "an_attempt_of_another_version_starts_the_minute"),
    "written in place": Bug(written_in_place, _FAULTS + "a_kill_amid_a_write_loses_nothing[damaged file]"),
    "old one deleted first": Bug(old_deleted_first, _FAULTS + "a_disk_that_fills_up_costs_no_token[about to expire]"),
    "unsaved is thrown away": Bug(thrown_away, _FAULTS + "a_disk_that_fills_up_costs_no_token[first token]"),
    "never expired": Bug(never_expired, _FAULTS + "a_kill_before_any_call_loses_nothing[expired]"),
    "a view beats the key's file": Bug(view_first, _FILES + "a_view_never_beats_a_living_token_of_the_key"),
    "paper served as real": Bug(paper_as_real, _FILES + "a_view_of_another_key_or_environment_is_a_miss"),
    "0600 lost": Bug(readable_by_all, _FILES + "files_have_the_contracts_names_and_modes"),
    "a view resurrects a rejected token": Bug(resurrected, _FILES + "a_dead_token_does_not_come_back_from_a_view", True),
    "set aside is thrown away": Bug(removed, _FILES + "a_damaged_view_is_a_miss_and_set_aside_with_a_word"),
    "departure not dated": Bug(dated_once, "test_store_contract.py::test_a_request_that_left_late_is_dated_anew"),
    "outcome lost with the token saved": Bug(
        outcome_lost, "test_store_contract.py::test_an_attempt_is_recorded_before_its_outcome_and_completed_by_it"
    ),
    "frames keep their variables": Bug(
        frames_kept, "test_secrets.py::test_a_traceback_with_all_local_variables_has_no_secret", True
    ),
    "address of .env trusted": Bug(
        dotenv_trusted, "test_settings.py::test_a_cloned_repository_gets_no_secret_of_another_source"
    ),
    "longer-lived token overwritten": Bug(
        overwritten, _EXPORTS + "newer_token_of_another_client_is_adopted_instead_of_written_over"
    ),
    "foreign file touched": Bug(foreign_touched, _EXPORTS + "file_that_holds_no_token_of_the_key_is_never_touched"),
    "asked again after a refusal": Bug(
        asked_again, "test_renewer.py::test_failing_first_issuance_raises_its_own_error_after_one_request"
    ),
    "six hours ignored": Bug(six_hours_ignored, "test_limits.py::test_kis_is_not_asked_while_it_would_hand_back_the_same_token"),
    "ceiling counts the same token": Bug(same_counted, "test_limits.py::test_the_ceiling_holds_for_any_24_hours"),
    "marks of the lock file ignored": Bug(marks_ignored, _FAULTS + "the_ceiling_holds_or_the_refusal_says_why"),
    "control characters kept": Bug(controls_kept, "test_trust.py::test_a_note_is_one_short_printable_line"),
    "fast reader differs": Bug(
        fast_reader_differs, "test_market.py::test_the_fast_reader_and_the_validated_settings_agree", True
    ),
    "anchor ignored": Bug(anchor_ignored, "test_policy.py::test_decisions"),
    "endless answer": Bug(endless_answer, _FAULTS + "an_answer_of_64_mb_takes_no_memory"),
}


def pytest_configure() -> None:
    """Plant what the environment names."""
    if name := os.environ.get("PLANTED"):
        BUGS[name].plant()
