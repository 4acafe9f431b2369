"""KIS's codes: the outcome, the message and the exception each stands for, and how to find one in an answer."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.attempts import CREDENTIALS, Outcome
from tokencore.errors import CredentialsError, IssuanceLimitError, IssuerUnavailableError, TokenError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

DEAD_TOKEN = frozenset({"EGW00121", "EGW00123"})  # the token was rejected or has expired, on a business call
DEAD_START = b"EGW0012"  # how both begin: answers without it, most of them, need not be parsed
ANSWER_LIMIT = 65_536  # bytes; KIS's refusals take about 100, its answers with a token 700
OK, SERVER_FAULT = 200, 500
SUCCESS = range(200, 300)
KEY_LENGTH, SECRET_LENGTH = 36, 180  # characters of the keys and secrets that KIS gives out
AGAIN = "the next call or check tries again"
WAIT_LONGER = "wait: the request may have counted, so the next attempt comes after the cool-down"
THEN = "then run `tokencore refresh MARKET`"
PORTAL = "on the KIS Developers portal"
WHICH = "check KIS_APP_KEY and that KIS_ENVIRONMENT (real or paper) is the key's"
REAL = "set KIS_ENVIRONMENT=real and the real account's key and secret"


class Refusal(NamedTuple):
    """Why KIS gave nothing: for the record (`outcome`, `code`) and for people (`what`, `fix`)."""

    outcome: Outcome
    code: str | None
    what: str
    fix: str

    def as_error(self, serves: str, retry_at: datetime) -> TokenError:
        """Return the error to raise; `serves` says what still works, `retry_at` when the minute limit ends."""
        text = f"{self.what}. {serves} To do: {self.fix}."
        if self.outcome is Outcome.LIMIT:
            return IssuanceLimitError(text, retry_at=retry_at, cause="minute")
        return CredentialsError(text) if self.outcome in CREDENTIALS else IssuerUnavailableError(text)


FOREIGN = (
    "another program issues with this key: let it use tokencore too, and wait a minute; KIS's 24-hour limit of one "
    "token a day counts what it issues as well"
)
KNOWN = {  # KIS's codes on /oauth2 as listed on its portal, and what to do; to add one, add a line
    "EGW00133": (Outcome.LIMIT, "KIS refused to issue: one request a minute per app key", FOREIGN),
    "EGW00102": (Outcome.BAD_KEY, "KIS found no app key in the request", f"set KIS_APP_KEY; {THEN}"),
    "EGW00103": (Outcome.BAD_KEY, "KIS does not know the app key", f"{WHICH}; {THEN}"),
    "EGW00104": (Outcome.BAD_SECRET, "KIS found no app secret in the request", f"set KIS_APP_SECRET; {THEN}"),
    "EGW00105": (Outcome.BAD_SECRET, "KIS refused the app secret", f"copy KIS_APP_SECRET again, all of it; {THEN}"),
    "EGW00003": (Outcome.DENIED, "KIS denied access to this key", f"see {PORTAL} whether it is restricted; {THEN}"),
    "EGW00004": (Outcome.DENIED, "KIS gives this customer no permission", f"apply for the Open API {PORTAL}; {THEN}"),
    "EGW00206": (Outcome.DENIED, "KIS says this key has no right to the API", f"apply for it {PORTAL}; {THEN}"),
    "EGW00207": (Outcome.DENIED, "KIS does not allow this IP address", f"register the address {PORTAL}; {THEN}"),
    "EGW00210": (Outcome.DENIED, "KIS offers no paper trading to corporate customers", f"{REAL}; {THEN}"),
    "EGW00001": (Outcome.SERVER_ERROR, "KIS reported a temporary fault of its own", f"wait: {AGAIN}"),
    "EGW00002": (Outcome.SERVER_ERROR, "KIS reported a fault of its own", f"wait: {AGAIN}"),
}
SILENT = {  # outcomes without any words of KIS's own
    Outcome.UNREACHABLE: ("KIS cannot be reached", f"check the network and KIS_BASE_URL; {AGAIN}"),
    Outcome.NO_ANSWER: ("KIS sent no complete answer", WAIT_LONGER),
    Outcome.BAD_ANSWER: ("KIS gave no usable answer", WAIT_LONGER),
}


def silent(outcome: Outcome, why: str) -> Refusal:
    """Return the refusal for no answer, or for a success with nothing usable: one of the outcomes in `SILENT`."""
    what, fix = SILENT[outcome]
    return Refusal(outcome, None, f"{what}: {why}", fix)


def refused(status: int, code: str, detail: str, lengths: tuple[int, int]) -> Refusal:
    """Return what an answer without a token means, judged by its code or, if that is unknown, its HTTP `status`.

    `detail` is the answer for people, without secrets. `lengths` of the key and the secret show if they were swapped
    or cut off.
    """
    if code in KNOWN:
        outcome, what, fix = KNOWN[code]
        hint = _hint(*lengths) if outcome in (Outcome.BAD_KEY, Outcome.BAD_SECRET) else ""
        return Refusal(outcome, code, f"{what} ({code})", hint + fix)
    shown = code if re.fullmatch(r"\w{1,12}", code, re.ASCII) else f"HTTP {status}"
    if status >= SERVER_FAULT:
        return Refusal(Outcome.SERVER_ERROR, shown, f"KIS reported a fault of its own ({detail})", f"wait: {AGAIN}")
    what = f"KIS, or a proxy on the way, refused the request without a known reason ({detail})"
    fix = (
        "look for a proxy between here and KIS and at KIS's notices of maintenance; without either, KIS may have "
        "restricted the key after too many issues (the 24-hour limit): `tokencore history` lists ours, and no other "
        "program should issue with it"
    )
    return Refusal(Outcome.REFUSED, shown, what, fix)


def _hint(key: int, secret: int) -> str:
    if (key, secret) == (KEY_LENGTH, SECRET_LENGTH):
        return ""
    these = f"yours have {key} and {secret}" + " (they look swapped)" * (key == SECRET_LENGTH or secret == KEY_LENGTH)
    return f"KIS's keys have {KEY_LENGTH} characters and its secrets {SECRET_LENGTH}, {these}; "


def code_of(body: Mapping[str, Any]) -> str:
    """Return KIS's code from an answer of either of its two shapes; empty if it has none."""
    code = body.get("error_code") or body.get("msg_cd")
    return code if isinstance(code, str) else ""


def parse(content: bytes) -> dict[str, Any]:
    """Return the JSON object in an answer, whatever its content type; empty if it is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def is_dead(content: bytes) -> bool:
    """Whether this answer says that KIS no longer accepts the token, whatever its HTTP status and content type."""
    return DEAD_START in content and len(content) <= ANSWER_LIMIT and code_of(parse(content)) in DEAD_TOKEN
