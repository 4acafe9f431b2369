"""KIS's codes: what each means for the record, for people and for `except`, and where an answer has one."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.attempts import CREDENTIALS, Outcome
from tokencore.errors import CredentialsError, IssuanceLimitError, IssuerUnavailableError, TokenError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEAD_TOKEN = frozenset({"EGW00121", "EGW00123"})  # rejected or expired, on a business call
DEAD_START = b"EGW0012"  # of both: most answers need not be parsed for them
ANSWER_LIMIT = 65_536  # bytes; KIS's refusals have about 100, its tokens 700
OK, SERVER_FAULT = 200, 500
KEY_LENGTH, SECRET_LENGTH = 36, 180  # characters of what KIS gives out
AGAIN = "the next call or check tries again"
WAIT_LONGER = "wait: the request may have counted, so the next attempt comes after the cool-down"
THEN = "then run `tokencore refresh`"
PORTAL = "on the KIS Developers portal"


class Refusal(NamedTuple):
    """Why KIS gave nothing: for the record (`outcome`, `code`) and for people (`what`, `fix`)."""

    outcome: Outcome
    code: str | None
    what: str
    fix: str

    @property
    def error(self) -> type[TokenError]:
        """The error class for `except`."""
        if self.outcome is Outcome.LIMIT:
            return IssuanceLimitError
        return CredentialsError if self.outcome in CREDENTIALS else IssuerUnavailableError


KNOWN = {  # KIS's codes on /oauth2, as its portal lists them; a new one is a line here
    "EGW00133": (
        Outcome.LIMIT,
        "KIS refused to issue: one request a minute per app key",
        (
            "another program issues with this key: let it use tokencore too, and wait a minute; KIS's 24-hour limit of "
            "one token a day counts what it issues as well"
        ),
    ),
    "EGW00102": (Outcome.BAD_KEY, "KIS found no app key in the request", f"set KIS_APP_KEY; {THEN}"),
    "EGW00103": (
        Outcome.BAD_KEY,
        "KIS does not know the app key",
        f"check KIS_APP_KEY and that KIS_ENVIRONMENT (real or paper) is the key's; {THEN}",
    ),
    "EGW00104": (Outcome.BAD_SECRET, "KIS found no app secret in the request", f"set KIS_APP_SECRET; {THEN}"),
    "EGW00105": (
        Outcome.BAD_SECRET,
        "KIS refused the app secret",
        f"copy KIS_APP_SECRET again, all {SECRET_LENGTH} characters of it; {THEN}",
    ),
    "EGW00003": (
        Outcome.DENIED,
        "KIS denied access to this key",
        f"see {PORTAL} whether the key is registered and not restricted; {THEN}",
    ),
    "EGW00004": (
        Outcome.DENIED,
        "KIS says that this customer has no permission",
        f"apply for the Open API {PORTAL}; {THEN}",
    ),
    "EGW00206": (
        Outcome.DENIED,
        "KIS says this key has no right to the API",
        f"apply for the service {PORTAL}; {THEN}",
    ),
    "EGW00207": (
        Outcome.DENIED,
        "KIS does not allow this IP address",
        f"register the address {PORTAL}; {THEN}",
    ),
    "EGW00210": (
        Outcome.DENIED,
        "KIS offers no paper trading to corporate customers",
        f"set KIS_ENVIRONMENT=real and the real account's key and secret; {THEN}",
    ),
    "EGW00001": (Outcome.SERVER_ERROR, "KIS reported a temporary fault of its own", f"wait: {AGAIN}"),
    "EGW00002": (Outcome.SERVER_ERROR, "KIS reported a fault of its own", f"wait: {AGAIN}"),
}


def refused(status: int, code: str, detail: str) -> Refusal:
    """What an answer without a token means, by its code, and by its HTTP `status` where the code is unknown.

    `detail` is the answer for people, without anything secret.
    """
    if code in KNOWN:
        outcome, what, fix = KNOWN[code]
        return Refusal(outcome, code, f"{what} ({code})", fix)
    shown = code if re.fullmatch(r"\w{1,12}", code, re.ASCII) else f"HTTP {status}"
    if status >= SERVER_FAULT:
        return Refusal(Outcome.SERVER_ERROR, shown, f"KIS reported a fault of its own ({detail})", f"wait: {AGAIN}")
    return Refusal(
        Outcome.REFUSED,
        shown,
        f"KIS, or a proxy on the way, refused the request without a known reason ({detail})",
        "look for a proxy between here and KIS and at KIS's notices of maintenance; without either, KIS may have "
        "restricted the key after too many issues (the 24-hour limit): `tokencore history` lists ours, and no other "
        "program should issue with it",
    )


def unreachable(why: str) -> Refusal:
    """The request cannot have reached KIS, and is no attempt."""
    fix = f"check the network and KIS_BASE_URL; {AGAIN}"
    return Refusal(Outcome.UNREACHABLE, None, f"KIS cannot be reached: {why}", fix)


def not_sent() -> Refusal:
    """Whoever keeps the record did not let the request leave."""
    what = "Nothing was sent to KIS: another process is asking with this key, or the attempt could not be recorded"
    return Refusal(Outcome.UNREACHABLE, None, what, AGAIN)


def no_answer(why: str) -> Refusal:
    """The request may have reached KIS, but no whole answer came back."""
    return Refusal(Outcome.NO_ANSWER, None, f"KIS gave no whole answer: {why}", WAIT_LONGER)


def bad_answer(why: str) -> Refusal:
    """KIS answered success, but without anything that could be used."""
    return Refusal(Outcome.BAD_ANSWER, None, f"KIS answered, but {why}", WAIT_LONGER)


def with_lengths(refusal: Refusal, app_key: str, app_secret: str) -> Refusal:
    """The refusal of a key or secret with what its length alone says: the two swapped, or one cut off."""
    found = len(app_key), len(app_secret)
    if refusal.outcome not in (Outcome.BAD_KEY, Outcome.BAD_SECRET) or found == (KEY_LENGTH, SECRET_LENGTH):
        return refusal
    swapped = " (they look swapped)" if found[0] == SECRET_LENGTH or found[1] == KEY_LENGTH else ""
    hint = f"KIS's keys have {KEY_LENGTH} characters and its secrets {SECRET_LENGTH}, these {found[0]} and {found[1]}"
    return refusal._replace(fix=f"{hint}{swapped}; {refusal.fix}")


def code_of(body: Mapping[str, Any]) -> str:
    """KIS's code in an answer, in whichever of its two shapes; empty where there is none."""
    code = body.get("error_code") or body.get("msg_cd")
    return code if isinstance(code, str) else ""


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object in an answer, whatever it calls itself; empty where there is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def is_dead(content: bytes) -> bool:
    """Whether this answer says that KIS takes the token no longer; its HTTP status and content type do not matter."""
    return DEAD_START in content and len(content) <= ANSWER_LIMIT and code_of(parse(content)) in DEAD_TOKEN
