"""Causes: what an error, the issuance record and the present token say together."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

import pytest
from builders import NOW, make_token

from flows import causes
from flows.causes import Cause, as_met, cause_of, is_foreign
from tokencore import (
    ConfigurationError,
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenStoreError,
    TokenUnavailableError,
)

MINUTE = timedelta(minutes=1)


class Attempt(NamedTuple):
    """A line of the record, as far as causes are read from it."""

    outcome: str
    at: datetime = NOW
    expires_at: datetime | None = None


def limit(cause: str) -> IssuanceLimitError:
    """The error of that rule."""
    return IssuanceLimitError("A limit forbids it.", retry_at=None, cause=cause)


def record(*outcomes: tuple[str, float]) -> list[Attempt]:
    """Attempts by outcome and minute."""
    return [Attempt(outcome, NOW + minute * MINUTE) for outcome, minute in outcomes]


CAUSES: list[tuple[str, Exception, list[Attempt], Cause]] = [
    (
        "KIS's refusal a minute after our own request",
        limit("minute"),
        record(("issued", 0), ("limit", 1)),
        causes.LIMIT,
    ),
    ("KIS's refusal out of the blue", limit("minute"), record(("issued", 0), ("limit", 90)), causes.FOREIGN_LIMIT),
    ("KIS's refusal of the first request ever", limit("minute"), record(("limit", 0)), causes.FOREIGN_LIMIT),
    (
        "one refusal after the other, the first out of the blue",
        limit("minute"),
        record(("issued", 0), ("limit", 90), ("limit", 91), ("limit", 92)),
        causes.FOREIGN_LIMIT,
    ),
    (
        "KIS's refusal after a request that cannot have reached it",
        limit("minute"),
        record(("issued", 0), ("unreachable", 90), ("limit", 91)),
        causes.FOREIGN_LIMIT,
    ),
    ("our own minute after a renewal", limit("minute"), record(("issued", 0)), causes.WAITING),
    ("the minute after KIS was down", limit("minute"), record(("server_error", 0)), causes.DOWN),
    ("the pause after a dropped connection", limit("backoff"), record(("no_answer", 0)), causes.DOWN),
    ("the pause after a wrong secret", limit("backoff"), record(("bad_secret", 0)), causes.CREDENTIALS),
    ("the ceiling", limit("ceiling"), record(("issued", 0), ("issued", 60)), causes.CEILING),
    ("the six hours, without a token", limit("same_token"), record(("issued", 0)), causes.DEAD),
    ("a wrong key", CredentialsError("x"), record(("bad_key", 0)), causes.CREDENTIALS),
    ("KIS being down", IssuerUnavailableError("x"), record(("unreachable", 0)), causes.DOWN),
    ("a full disk", TokenStoreError("x"), [], causes.STORE),
    ("a missing setting", ConfigurationError("x"), [], causes.SETTINGS),
    ("a need that is too long", TokenUnavailableError("x"), [], causes.UNSERVED),
    ("anything else", RuntimeError("x"), [], causes.UNFORESEEN),
]


@pytest.mark.parametrize(("error", "attempts", "expected"), [row[1:] for row in CAUSES], ids=[row[0] for row in CAUSES])
def test_the_cause_is_what_the_error_comes_from(error: Exception, attempts: list[Attempt], expected: Cause) -> None:
    """A pause after a failure is no cause of its own, and only KIS being down is worth another try by Prefect."""
    assert cause_of(error, attempts) is expected
    assert isinstance(as_met(error, attempts), IssuerUnavailableError) == (expected is causes.DOWN)


def test_a_dead_token_is_told_from_one_that_kis_handed_back() -> None:
    """Within the six hours nobody asks; who asked and got the dead one again knows more."""
    dead = make_token(age=3600, now=NOW, rejected=True)
    assert cause_of(limit("same_token"), [Attempt("issued", NOW)], dead) is causes.DEAD
    handed_back = [Attempt("issued", NOW), Attempt("same", NOW, dead.expires_at)]
    assert cause_of(limit("same_token"), handed_back, dead) is causes.SAME_DEAD
    assert cause_of(TokenUnavailableError("x"), handed_back, dead) is causes.SAME_DEAD


def test_a_token_of_unknown_issue_is_someone_elses() -> None:
    """KIS answered with a token from a time at which this record has no request; our own, handed back, is ours."""
    token = make_token(age=3600, now=NOW)
    answered = Attempt("same", NOW, token.expires_at)
    ours = Attempt("issued", NOW - timedelta(hours=1), token.expires_at)
    assert is_foreign(token, [Attempt("issued", NOW - timedelta(days=1)), answered])
    assert not is_foreign(token, [ours, answered])
    assert cause_of(limit("same_token"), [answered], token) is causes.UNSERVED  # whoever issued it, it is too short


def test_a_request_that_died_on_its_way_explains_a_token() -> None:
    """A process that was killed between KIS's answer and the record issued it; clocks may differ by minutes."""
    token = make_token(age=3600, now=NOW)
    killed = Attempt("sent", NOW - timedelta(minutes=65))
    assert not is_foreign(token, [killed, Attempt("same", NOW, token.expires_at)])


def test_a_token_that_nobody_here_asked_for_accuses_nobody() -> None:
    """One that was put in by hand, or issued here, is not in the record as an answer that brought nothing new."""
    token = make_token(age=3600, now=NOW)
    assert not is_foreign(token, [])
    assert not is_foreign(None, [])
    assert not is_foreign(token, [Attempt("issued", NOW - timedelta(minutes=3), token.expires_at)])


def test_an_imported_token_is_nobodys_fault_and_no_request_of_ours() -> None:
    """A token that a person brought here is no foreign one; a refusal after it is due to someone else all the same."""
    token = make_token()
    assert not is_foreign(token, [Attempt("imported", NOW, token.expires_at), Attempt("same", NOW, token.expires_at)])
    refused = [Attempt("imported", NOW - timedelta(seconds=30)), Attempt("limit", NOW)]
    assert cause_of(limit("minute"), refused).name == "foreign-limit"
