"""The rules of the sandbox's KIS gateway as plain state: no socket, and no clock of its own.

`now` is passed in as epoch seconds. Every answer is an `Answer`; how it travels is `sandbox`'s business.
Nothing that is counted here contains a token, key or secret.
"""

from __future__ import annotations

import math
import secrets
import threading
import uuid
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

from tokencore.errors import ConfigurationError
from tokencore.sandbox_answers import (
    QUOTES,
    REFUSALS,
    REVOKED,
    SUCCESS,
    TEXTS,
    Answer,
    Issued,
    handed_out,
    jwt,
    refused,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

# What a tokenP request can be made to meet. `drip` delivers a real answer, byte by byte.
FAILURES = (
    *("limit", "bad-key", "bad-secret", "server-error", "down", "drop", "hang", "html"),
    *("garbage", "half", "no-token", "past", "huge", "redirect", "drip"),
)
KILL = "dead-token"  # asked for like a failure, but it befalls the tokens that are out already

_LONGEST = 366 * 86400  # seconds; keeps every time of a token a valid date
_SHORT_LIFE = 60  # seconds; below it, rounding a JWT's times down would cost a visible part of the life
_REMEMBERED = 10_000  # tokenP requests that `stats` lists; the counters go on beyond them


@dataclass(frozen=True)
class Rules:
    """The lengths of KIS's rules in seconds; short ones play a day in seconds.

    Attributes:
        token_life: how long a token lives.
        same_token: how long after its issue the same token is handed out again.
        issue_interval: the time in which an app key is granted one request.
        latency: how long tokenP takes to answer.

    Raises:
        ConfigurationError: a length is not a number from 0 to a year, or the life is 0.

    """

    token_life: float = 86400.0
    same_token: float = 21600.0
    issue_interval: float = 60.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value <= _LONGEST):
                raise ConfigurationError(f"{name} must be a number of seconds from 0 to {_LONGEST}.")
        if not self.token_life:
            raise ConfigurationError("token_life must be longer than 0 seconds.")


class Lengths(TypedDict, total=False):
    """Some of the fields of `Rules`, as keywords."""

    token_life: float
    same_token: float
    issue_interval: float
    latency: float


@dataclass
class _Customer:
    """An app key's right secret, its last grant (epoch seconds) and its present token."""

    secret: str = field(repr=False)
    granted: float = -math.inf
    token: Issued | None = None


class Gateway:
    """What KIS knows: customers, their tokens, the rules in force and the failure asked for.

    Without `app_key` every key is a customer; without `app_secret` the first secret seen with a key is
    the right one. Every method may be called from any thread.
    """

    def __init__(self, rules: Rules, *, app_key: str | None = None, app_secret: str | None = None) -> None:
        """Start without tokens, signing with a secret of its own."""
        self.rules = rules
        self._app_key, self._app_secret = app_key, app_secret
        self._signing_secret = secrets.token_bytes(64)
        self._customers: dict[str, _Customer] = {}
        self._tokens: dict[str, Issued] = {}
        self._failure: tuple[str, int | None] | None = None
        self._counts: Counter[tuple[str, str]] = Counter()
        self._requests: deque[dict[str, float | str]] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    def set_rules(self, /, **lengths: Unpack[Lengths]) -> None:
        """Change lengths (seconds) from now on; issued tokens keep their expiry.

        Raises:
            ConfigurationError: a name or length is impossible; the rules are as they were.

        """
        with self._lock:
            known = asdict(self.rules)
            if not lengths.keys() <= known.keys():
                raise ConfigurationError(f"The rules that can be set are {', '.join(known)}.")
            self.rules = replace(self.rules, **lengths)

    def fail(self, mode: str, count: int | None = None) -> None:
        """Let the next `count` tokenP requests fail like this, or all of them until `clear`.

        A failing request is granted nothing and moves neither the minute nor the six hours; only `drip`
        delivers what the rules say. `dead-token` does at once what `kill_tokens` does.

        Raises:
            ConfigurationError: no such failure, or a count below 1; nothing has changed.

        """
        if mode not in (*FAILURES, KILL):
            raise ConfigurationError(f"The failures are {', '.join((*FAILURES, KILL))}.")
        if count is not None and (type(count) is not int or count < 1):
            raise ConfigurationError("count must be a whole number from 1, or null for every request.")
        if mode == KILL:
            self.kill_tokens()
        else:
            with self._lock:
                self._failure = (mode, count)

    def clear(self) -> None:
        """End the failure asked for. Dead tokens stay dead, as at KIS."""
        with self._lock:
            self._failure = None

    def kill_tokens(self) -> None:
        """Let business calls refuse every token issued so far, whatever its expiry says."""
        with self._lock:
            for token in self._tokens.values():
                token.dead = True

    def stats(self) -> dict[str, Any]:
        """What was asked and answered since the start; `requests` lists tokenP's, in epoch seconds."""
        with self._lock:
            issues, quotes = self._tally("tokenP"), self._tally("quote")
            return {
                "token_requests": issues.total(),
                "granted_new": issues["new"],
                "granted_same": issues["same"],
                "refused": {code: issues[code] for code in TEXTS if issues[code]},
                "failed": {mode: issues[mode] for mode in FAILURES if issues[mode]},
                "quotes": quotes["ok"],
                "quotes_refused": {code: quotes[code] for code in TEXTS if quotes[code]},
                "revokes": self._tally("revokeP")["ok"],
                "approvals": self._tally("Approval")["ok"],
                "rules": asdict(self.rules),
                "failure": self._failure and self._failure[0],
                "requests": list(self._requests),
            }

    def issue(self, asked: Mapping[str, Any], now: float) -> Answer:
        """tokenP: a new token, the same one again, a refusal, or the failure asked for."""
        with self._lock:
            mode = self._next_failure()
            answer = self._failed(mode, asked, now) if mode else self._judged(asked, now)
            self._requests.append({"at": now, "outcome": answer.outcome})
            return self._count("tokenP", answer)

    def revoke(self, asked: Mapping[str, Any]) -> Answer:
        """revokeP: business calls refuse the token from now on."""
        with self._lock:
            code = self._credentials_fault(asked)
            token = self._tokens.get(str(asked.get("token")))
            if code or token is None or token.dead or token.key != asked["appkey"]:
                return self._count("revokeP", refused(code or "EGW00121"))
            token.dead = True
            return self._count("revokeP", Answer(200, REVOKED, "ok"))

    def approve(self, asked: Mapping[str, Any]) -> Answer:
        """Approval: a key for the websocket; the secret's field is called `secretkey` here."""
        with self._lock:
            code = self._grant_fault({**asked, "appsecret": asked.get("secretkey")})
            answer = refused(code) if code else Answer(200, {"approval_key": str(uuid.uuid4())}, "ok")
            return self._count("Approval", answer)

    def quote(self, path: str, headers: Mapping[str, str], params: Mapping[str, str], now: float) -> Answer:
        """One of QUOTES: made-up prices if the headers (lower case) are right; params in upper."""
        tr_id, rows = QUOTES[path]
        with self._lock:
            code = self._headers_fault(headers, now)
            if code is None and headers.get("tr_id") != tr_id:
                code = "EGW00203"
            if code:
                refusal = {"rt_cd": "1", "msg_cd": code, "msg1": TEXTS[code]}
                return self._count("quote", Answer(500, refusal, code))
            return self._count("quote", Answer(200, {**rows(params, now), **SUCCESS}, "ok"))

    def _tally(self, endpoint: str) -> Counter[str]:
        return Counter({word: n for (place, word), n in self._counts.items() if place == endpoint})

    def _count(self, endpoint: str, answer: Answer) -> Answer:
        self._counts[endpoint, answer.outcome] += 1
        return answer

    def _next_failure(self) -> str | None:
        if self._failure is None:
            return None
        mode, count = self._failure
        if count is not None:
            self._failure = (mode, count - 1) if count > 1 else None
        return mode

    def _failed(self, mode: str, asked: Mapping[str, Any], now: float) -> Answer:
        if mode in REFUSALS:
            return refused(*REFUSALS[mode])
        if mode == "drip":
            return self._judged(asked, now)._replace(delivery=mode)
        # Whatever a broken answer lets through, its token is long expired.
        long_ago = now - self.rules.token_life - 2 * _SHORT_LIFE
        content = handed_out(self._mint(str(asked.get("appkey", "")), long_ago))
        if mode == "no-token":
            del content["access_token"]
        return Answer(200, content, mode, delivery=mode)

    def _judged(self, asked: Mapping[str, Any], now: float) -> Answer:
        code = self._grant_fault(asked)
        if code:
            return refused(code)
        customer = self._customers[asked["appkey"]]
        if now - customer.granted < self.rules.issue_interval:
            return refused("EGW00133")
        customer.granted = now
        token = customer.token
        if token and now < min(token.issued + self.rules.same_token, token.expires):
            return Answer(200, handed_out(token), "same")
        customer.token = self._mint(asked["appkey"], now)
        return Answer(200, handed_out(customer.token), "new")

    def _grant_fault(self, asked: Mapping[str, Any]) -> str | None:
        if not asked:
            return "EGW00101"
        if asked.get("grant_type") != "client_credentials":
            return "EGW00116"
        return self._credentials_fault(asked)

    def _credentials_fault(self, asked: Mapping[str, Any]) -> str | None:
        key, secret = asked.get("appkey"), asked.get("appsecret")
        if not (key and isinstance(key, str)):
            return "EGW00102"
        if not (secret and isinstance(secret, str)):
            return "EGW00104"
        if self._app_key not in (None, key):
            return "EGW00103"
        customer = self._customers.setdefault(key, _Customer(self._app_secret or secret))
        return None if customer.secret == secret else "EGW00105"

    def _headers_fault(self, headers: Mapping[str, str], now: float) -> str | None:
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text:
            return "EGW00122"
        token = self._tokens.get(text)
        if token is None or token.dead:
            return "EGW00121"
        if token.expires <= now:
            return "EGW00123"
        if headers.get("appkey") != token.key:
            return "EGW00103"
        return None if headers.get("appsecret") == self._customers[token.key].secret else "EGW00105"

    def _mint(self, key: str, now: float) -> Issued:
        life = self.rules.token_life
        # A JWT knows whole seconds: a day may lose a fraction of one, as at KIS, two seconds may not.
        expires = math.ceil((math.floor(now) if life >= _SHORT_LIFE else now) + life)
        claims: dict[str, Any] = {
            "sub": "token",
            "aud": str(uuid.uuid4()),
            "prdt_cd": "",
            "iss": "unogw",
        }
        claims |= {"exp": expires, "iat": math.floor(now), "jti": key}
        token = Issued(jwt(claims, self._signing_secret), key, now, expires, math.ceil(life))
        self._tokens[token.text] = token
        return token
