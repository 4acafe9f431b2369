"""Why KIS gave no token: its codes and our own findings, each with its error class and what to do about it."""

from __future__ import annotations

import re
from typing import NamedTuple

from tokencore.errors import (
    AccessDeniedError,
    AppKeyError,
    AppSecretError,
    IssuanceLimitError,
    IssuerAnswerError,
    IssuerRefusedError,
    IssuerServerError,
    IssuerUnavailableError,
    TokenError,
)
from tokencore.record import Outcome

DEAD_TOKEN = frozenset({"EGW00121", "EGW00123"})  # rejected or expired, on a business call
SERVER_FAULT = 500
AGAIN = "the next call or check tries again"
WAIT = f"wait: {AGAIN}"
WAIT_LONGER = "wait: the request may have counted, so the next attempt comes after the cool-down"


class Refusal(NamedTuple):
    """Why there is no token: for the record (`outcome`, `code`), people (`what`, `cure`) and `except` (`error`)."""

    outcome: Outcome
    code: str | None
    what: str
    cure: str
    error: type[TokenError]


# KIS's codes on tokenP, as its portal lists them.
KNOWN = {
    refusal.code: refusal
    for refusal in (
        Refusal(
            Outcome.LIMIT,
            "EGW00133",
            "KIS refused to issue: one request a minute per app key (EGW00133)",
            "another program issues with this key: let it use tokencore too, and wait a minute",
            IssuanceLimitError,
        ),
        Refusal(
            Outcome.BAD_KEY,
            "EGW00103",
            "KIS does not know the app key (EGW00103)",
            "check KIS_APP_KEY and that KIS_ENVIRONMENT (real or paper) is the key's; then run `tokencore refresh`",
            AppKeyError,
        ),
        Refusal(
            Outcome.BAD_SECRET,
            "EGW00105",
            "KIS refused the app secret (EGW00105)",
            "copy KIS_APP_SECRET again, all 180 characters of it; then run `tokencore refresh`",
            AppSecretError,
        ),
        Refusal(
            Outcome.DENIED,
            "EGW00206",
            "KIS says this key has no right to the API (EGW00206)",
            "apply for the service on the KIS Developers portal; then run `tokencore refresh`",
            AccessDeniedError,
        ),
        Refusal(
            Outcome.DENIED,
            "EGW00207",
            "KIS does not allow this IP address (EGW00207)",
            "register the address on the KIS Developers portal; then run `tokencore refresh`",
            AccessDeniedError,
        ),
        Refusal(
            Outcome.SERVER_ERROR,
            "EGW00002",
            "KIS reported a fault of its own (EGW00002)",
            WAIT,
            IssuerServerError,
        ),
    )
}


def refused(status: int, code: str, told: str) -> Refusal:
    """What an answer without a token means, by its code, and by its HTTP `status` where the code is unknown.

    `told` is the answer for people, without anything secret.
    """
    if code in KNOWN:
        return KNOWN[code]
    known = code if re.fullmatch(r"\w{1,12}", code, re.ASCII) else f"HTTP {status}"
    if status >= SERVER_FAULT:
        what = f"KIS reported a fault of its own ({told})"
        return Refusal(Outcome.SERVER_ERROR, known, what, WAIT, IssuerServerError)
    return Refusal(
        Outcome.REFUSED,
        known,
        f"The request for a token was refused without a known reason ({told})",
        "look for a proxy between here and KIS, and at KIS's notices of maintenance",
        IssuerRefusedError,
    )


def unreachable(why: str) -> Refusal:
    """The request cannot have reached KIS."""
    return Refusal(
        Outcome.UNREACHABLE,
        None,
        f"KIS cannot be reached: {why}",
        f"check the network and KIS_BASE_URL; {AGAIN}",
        IssuerUnavailableError,
    )


def no_answer(why: str) -> Refusal:
    """The request may have reached KIS, but no whole answer came back."""
    return Refusal(Outcome.NO_ANSWER, None, f"KIS gave no whole answer: {why}", WAIT_LONGER, IssuerUnavailableError)


def bad_answer(why: str) -> Refusal:
    """KIS answered success, but without a token that could be used."""
    return Refusal(Outcome.BAD_ANSWER, None, f"KIS answered, but {why}", WAIT_LONGER, IssuerAnswerError)
