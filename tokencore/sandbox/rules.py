"""KIS's gateway as plain state: its rules, codes, tokens and quotes; no socket, and no clock of its own.

Shapes and Korean texts are those of KIS's portal; prices are made up. Times are epoch seconds. Nothing that is
counted here contains a token, key or secret.
"""

from __future__ import annotations

import base64
import hmac
import json
import math
import re
import secrets
import threading
import uuid
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.errors import ConfigurationError
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Mapping

JSON = "application/json; charset=UTF-8"
TOKEN, REVOKE, APPROVAL = "/oauth2/tokenP", "/oauth2/revokeP", "/oauth2/Approval"
TEXTS = {
    "EGW00002": "서버 에러가 발생했습니다.",
    "EGW00101": "유효하지 않은 요청입니다.",
    "EGW00102": "AppKey는 필수입니다.",
    "EGW00103": "유효하지 않은 AppKey입니다.",
    "EGW00104": "AppSecret은 필수입니다.",
    "EGW00105": "유효하지 않은 AppSecret입니다.",
    "EGW00116": "지원하지 않는 권한부여 타입(grant_type)입니다.",
    "EGW00121": "유효하지 않은 token 입니다.",
    "EGW00122": "token을 찾을 수 없음",
    "EGW00123": "기간이 만료된 token 입니다.",
    "EGW00133": "접근토큰 발급 잠시 후 다시 시도하세요(1분당 1회)",
    "EGW00203": "OPS라우팅 중 오류가 발생했습니다.",
}
RULES = {  # KIS's lengths in seconds; short ones play a day in seconds
    "token_life": 86400.0,
    "same_token": 21600.0,  # after an issue, in which the same token is handed out again
    "issue_interval": 60.0,  # in which an app key is granted one request
    "latency": 0.0,  # of tokenP's answers
}
_CODE = re.compile(r"EGW\d{5}")
_LONGEST = 366 * 86400  # seconds; keeps every time of a token a valid date
_SHORT_LIFE = 60  # seconds; below it, rounding a JWT's times down would cost a visible part of the life
_REMEMBERED = 10_000  # tokenP requests that `stats` lists; the counters go on beyond them


class Request(NamedTuple):
    """What a client sent: names of headers in lower case, of parameters in upper case."""

    method: str
    path: str
    body: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}
    params: Mapping[str, str] = {}


class Answer(NamedTuple):
    """What a request gets; `outcome` is the word for counters and logs."""

    status: int
    content: Mapping[str, Any] | str  # a mapping travels as JSON
    outcome: str
    content_type: str = JSON
    delivery: str = "whole"  # or how the connection fails: `drop`, `hang`, `half`, `huge` or `drip`


_REFUSALS = {
    "limit": "EGW00133",
    "bad-key": "EGW00103",
    "bad-secret": "EGW00105",
    "server-error": "EGW00002",
    "down": "EGW00002",  # the same, with HTTP's own 500
}
_HTML = "<html><head><title>403 Forbidden</title></head><body><h1>Forbidden</h1></body></html>"
_BROKEN = {
    "html": Answer(403, _HTML, "html", "text/html; charset=UTF-8"),
    "garbage": Answer(200, "\0<<< this is not JSON >>>", "garbage"),
    "redirect": Answer(302, "", "redirect"),
}
FAILURES = (*_REFUSALS, *_BROKEN, "drop", "hang", "half", "huge", "no-token", "past", "drip")
"""What a request can be made to meet, beside KIS's codes; `drip` delivers the real answer, byte by byte."""
KILL = "dead-token"  # requested like a failure, but it affects the tokens that are out already


class _RefusedError(Exception):
    """KIS refuses with the code that is given."""


def refused(code: str, path: str = TOKEN, status: int | None = None) -> Answer:
    """A refusal with the portal's text, in the shape that KIS uses at that path."""
    text = TEXTS.get(code, "요청하신 오류입니다.")
    if path.startswith("/oauth2/"):
        return Answer(status or 403, {"error_description": text, "error_code": code}, code)
    return Answer(status or 500, {"rt_cd": "1", "msg_cd": code, "msg1": text}, code)


@dataclass
class _Issued:
    """An issued token; times are epoch seconds."""

    text: str = field(repr=False)
    key: str = field(repr=False)
    issued: float
    expires: int
    life: int
    dead: bool = False

    def content(self) -> dict[str, Any]:
        """What tokenP answers; for a token handed out again `expires_in` overstates its life, as at KIS."""
        return {
            "access_token": self.text,
            "access_token_token_expired": f"{datetime.fromtimestamp(self.expires, KST):%Y-%m-%d %H:%M:%S}",
            "token_type": "Bearer",
            "expires_in": self.life,
        }


@dataclass
class _Customer:
    """An app key's right secret, its last grant (epoch seconds) and its present token."""

    secret: str = field(repr=False)
    granted: float = -math.inf
    token: _Issued | None = None


class Gateway:
    """What KIS knows: customers, their tokens, the rules in force and the answers that were scripted.

    Without `app_key` every key is a customer; without `app_secret` the first secret seen with a key is
    the right one. Every method may be called from any thread.
    """

    def __init__(self, *, app_key: str = "", app_secret: str = "", **lengths: float) -> None:
        """Start without tokens, signing with a secret of its own; `lengths` as in `set_rules`."""
        self.rules = RULES
        self._app_key, self._app_secret = app_key, app_secret
        self._signing_secret = secrets.token_bytes(64)
        self._customers: dict[str, _Customer] = {}
        self._tokens: dict[str, _Issued] = {}
        self._scripts: dict[str, tuple[str, Answer | None, int | None]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._requests: deque[dict[str, float | str]] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()
        self.set_rules(**lengths)

    def set_rules(self, /, **lengths: float) -> None:
        """Change lengths of RULES (seconds) from now on; issued tokens keep their expiry.

        Raises:
            ConfigurationError: a name or length is impossible; the rules are as they were.

        """
        for name, value in lengths.items():
            if name not in RULES:
                raise ConfigurationError(f"The rules that can be set are {', '.join(RULES)}.")
            if type(value) not in (int, float) or not 0 <= value <= _LONGEST or (name == "token_life" and not value):
                raise ConfigurationError(f"{name} must be a number of seconds from 0 (a life above it) to {_LONGEST}.")
        self.rules = {**self.rules, **lengths}

    def fail(self, mode: str, count: int | None = None, *, path: str = TOKEN) -> None:
        """Let the next `count` requests fail, or all of them until `clear`: at `path`, and all that begin like it.

        `mode` is one of FAILURES, a code of KIS such as `EGW00210`, or `dead-token`, which does at once what
        `kill_tokens` does. A failing request is granted nothing and moves neither the minute nor the six hours;
        only `drip` delivers what the rules say.

        Raises:
            ConfigurationError: no such failure, no path, or a count below 1; nothing has changed.

        """
        if mode == KILL:
            self.kill_tokens()
        elif mode in FAILURES or _CODE.fullmatch(mode):
            self._script(path, mode, None, count)
        else:
            raise ConfigurationError(f"The failures are {', '.join((*FAILURES, KILL))} and codes such as EGW00210.")

    def answer(
        self,
        path: str,
        content: Mapping[str, Any] | str,
        status: int = 200,
        content_type: str = JSON,
        count: int | None = None,
    ) -> None:
        """Answer just this to the next `count` requests, or to all of them until `clear`.

        `path` is an endpoint or how several begin: `/uapi/` is every business call. A mapping is sent as JSON,
        whatever `content_type` says.

        Raises:
            ConfigurationError: the path, status or count makes no sense; nothing has changed.

        """
        if type(status) is not int or not 200 <= status <= 599:  # noqa: PLR2004 - what HTTP knows
            raise ConfigurationError("status must be a whole number from 200 to 599.")
        code = "" if isinstance(content, str) else str(content.get("error_code") or content.get("msg_cd"))
        outcome = code if _CODE.fullmatch(code) else str(status)
        self._script(path, outcome, Answer(status, content, outcome, content_type), count)

    def clear(self) -> None:
        """End all that was scripted. Dead tokens stay dead, as at KIS."""
        with self._lock:
            self._scripts.clear()

    def kill_tokens(self) -> None:
        """Let business calls refuse every token issued so far, as after maintenance, whatever its expiry says."""
        with self._lock:
            for token in self._tokens.values():
                token.dead = True

    def stats(self) -> dict[str, Any]:
        """What was asked and answered since the start; `requests` lists tokenP's, in epoch seconds."""
        with self._lock:
            issues, quotes = self._tally(TOKEN), self._tally("quote")
            scripted = self._scripts.get(TOKEN)
            return {
                "token_requests": issues.total(),
                "granted_new": issues.pop("new", 0),
                "granted_same": issues.pop("same", 0),
                "refused": {word: count for word, count in issues.items() if _CODE.fullmatch(word)},
                "failed": {word: count for word, count in issues.items() if not _CODE.fullmatch(word)},
                "quotes": quotes["ok"],
                "quotes_refused": {word: count for word, count in quotes.items() if _CODE.fullmatch(word)},
                "revokes": self._tally(REVOKE)["ok"],
                "approvals": self._tally(APPROVAL)["ok"],
                "rules": self.rules,
                "failure": scripted and scripted[0],
                "requests": list(self._requests),
            }

    def respond(self, request: Request, now: float) -> Answer:
        """What KIS answers, or what was scripted instead."""
        with self._lock:
            answer = self._scripted(request, now) or self._judged(request, now)
            self._counts[request.path if request.path.startswith("/oauth2/") else "quote", answer.outcome] += 1
            if request.path == TOKEN:
                self._requests.append({"at": now, "outcome": answer.outcome})
            return answer

    def _tally(self, place: str) -> Counter[str]:
        return Counter({word: n for (where, word), n in self._counts.items() if where == place})

    def _script(self, path: str, word: str, answer: Answer | None, count: int | None) -> None:
        if count is not None and (type(count) is not int or count < 1):
            raise ConfigurationError("count must be a whole number from 1, or null for every request.")
        if not path.startswith("/"):
            raise ConfigurationError("path must begin with a slash.")
        with self._lock:
            self._scripts[path] = word, answer, count

    def _scripted(self, request: Request, now: float) -> Answer | None:
        path = max((path for path in self._scripts if request.path.startswith(path)), key=len, default=None)
        if path is None:
            return None
        word, answer, count = self._scripts.pop(path)
        if count != 1:
            self._scripts[path] = word, answer, count and count - 1
        return answer or self._failed(word, request, now)

    def _failed(self, mode: str, request: Request, now: float) -> Answer:
        if mode in _BROKEN:
            return _BROKEN[mode]
        if mode == "drip":
            return self._judged(request, now)._replace(delivery=mode)
        if mode in _REFUSALS or mode not in FAILURES:
            return refused(_REFUSALS.get(mode, mode), request.path, 500 if mode == "down" else None)
        # Whatever a broken answer lets through, its token expired long ago.
        long_ago = now - self.rules["token_life"] - 2 * _SHORT_LIFE
        content = self._mint(str(request.body.get("appkey", "")), long_ago).content()
        if mode == "no-token":
            del content["access_token"]
        return Answer(200, content, mode, delivery=mode)

    def _judged(self, request: Request, now: float) -> Answer:
        try:
            match request.method, request.path:
                case "POST", "/oauth2/tokenP":
                    return self._issue(request.body, now)
                case "POST", "/oauth2/revokeP":
                    return self._revoke(request.body)
                case "POST", "/oauth2/Approval":
                    self._customer({**request.body, "appsecret": request.body.get("secretkey")})
                    return Answer(200, {"approval_key": str(uuid.uuid4())}, "ok")
                case "GET", path if path in QUOTES:
                    self._check_headers(request, now)
                    success = {"rt_cd": "0", "msg_cd": "MCA00000", "msg1": "정상처리 되었습니다."}
                    return Answer(200, {**_rows(request, now), **success}, "ok")
        except _RefusedError as refusal:
            return refused(str(refusal), request.path)
        return Answer(404, {"error": "The sandbox has no such path."}, "404")

    def _issue(self, asked: Mapping[str, Any], now: float) -> Answer:
        customer = self._customer(asked)
        if now - customer.granted < self.rules["issue_interval"]:
            raise _RefusedError("EGW00133")
        customer.granted = now
        token = customer.token
        if token and now < min(token.issued + self.rules["same_token"], token.expires):
            return Answer(200, token.content(), "same")
        customer.token = self._mint(asked["appkey"], now)
        return Answer(200, customer.token.content(), "new")

    def _revoke(self, asked: Mapping[str, Any]) -> Answer:
        self._customer({"grant_type": "client_credentials", **asked})
        token = self._tokens.get(str(asked.get("token")))
        if token is None or token.dead or token.key != asked["appkey"]:
            raise _RefusedError("EGW00121")
        token.dead = True
        return Answer(200, {"code": 200, "message": "접근토큰 폐기에 성공하였습니다"}, "ok")

    def _customer(self, asked: Mapping[str, Any]) -> _Customer:
        key, secret = asked.get("appkey"), asked.get("appsecret")
        if not asked:
            raise _RefusedError("EGW00101")
        if asked.get("grant_type") != "client_credentials":
            raise _RefusedError("EGW00116")
        if not (key and isinstance(key, str)):
            raise _RefusedError("EGW00102")
        if not (secret and isinstance(secret, str)):
            raise _RefusedError("EGW00104")
        if self._app_key not in ("", key):
            raise _RefusedError("EGW00103")
        customer = self._customers.setdefault(key, _Customer(self._app_secret or secret))
        if customer.secret != secret:
            raise _RefusedError("EGW00105")
        return customer

    def _check_headers(self, request: Request, now: float) -> None:
        headers = request.headers
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise _RefusedError("EGW00122")
        token = self._tokens.get(text)
        if token is None or token.dead:
            raise _RefusedError("EGW00121")
        if token.expires <= now:
            raise _RefusedError("EGW00123")
        if headers.get("appkey") != token.key:
            raise _RefusedError("EGW00103")
        if headers.get("appsecret") != self._customers[token.key].secret:
            raise _RefusedError("EGW00105")
        if headers.get("tr_id") != QUOTES[request.path]:
            raise _RefusedError("EGW00203")

    def _mint(self, key: str, now: float) -> _Issued:
        life = self.rules["token_life"]
        # A JWT knows whole seconds: a day may lose a fraction of one, as at KIS, two seconds may not.
        expires = math.ceil((math.floor(now) if life >= _SHORT_LIFE else now) + life)
        claims = {"sub": "token", "aud": str(uuid.uuid4()), "prdt_cd": "", "iss": "unogw"}
        text = _jwt({**claims, "exp": expires, "iat": math.floor(now), "jti": key}, self._signing_secret)
        token = self._tokens[text] = _Issued(text, key, now, expires, math.ceil(life))
        return token


def _jwt(claims: Mapping[str, Any], secret: bytes) -> str:
    """A three-part JWT with these claims, signed as KIS signs: HS512."""
    parts = [_base64url(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "HS512"}, claims)]
    return ".".join([*parts, _base64url(hmac.digest(secret, ".".join(parts).encode(), "sha512"))])


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


_CALLS = """
/uapi/domestic-stock/v1/quotations/inquire-price FHKST01010100
stck_prpr=71500 prdy_vrss=500 prdy_vrss_sign=2 prdy_ctrt=0.70 stck_oprc=71100 stck_hgpr=71900 stck_lwpr=70900
stck_sdpr=71000 acml_vol=12345678 acml_tr_pbmn=882715977000 prdy_vrss_vol_rate=3.10 bstp_kor_isnm=전기·전자
hts_avls=4268386 stck_mxpr=92300 stck_llam=49700 aspr_unit=100 eps=4950.00 bps=57930.00 per=14.44 pbr=1.23
w52_hgpr=79400 w52_hgpr_date=20260916 w52_lwpr=51800 w52_lwpr_date=20260408 mrkt_warn_cls_code=00 temp_stop_yn=N
short_over_yn=N

/uapi/domestic-stock/v1/quotations/search-info CTPF1604R
prdt_name=모의 prdt_name120=모의 prdt_abrv_name=모의 prdt_eng_name=Made-Up prdt_eng_name120=Made-Up
prdt_eng_abrv_name=Made-Up

/uapi/overseas-price/v1/quotations/price HHDFS00000300
base=229.3500 last=231.1000 sign=2 diff=1.7500 rate=+0.76 zdiv=4 pvol=51216482 tvol=48123456 tamt=11121330682

/uapi/overseas-price/v1/quotations/price-detail HHDFS76200200
zdiv=4 curr=USD vnit=1 open=229.8000 high=232.0000 low=229.1000 last=231.1000 base=229.3500 pvol=51216482
tvol=48123456 tamt=11121330682 uplp=0.0000 dnlp=0.0000 h52p=260.1000 h52d=20260716 l52p=169.2100 l52d=20260408
perx=35.12 pbrx=52.01 epsx=6.58 bpsx=4.44 tomv=3429612 t_rate=1391.50 t_xsgn=2 e_hogau=0.0100 e_ordyn=매매가능
e_icod=컴퓨터

/uapi/overseas-price/v1/quotations/dailyprice HHDFS76240000
open=229.8000 high=232.0000 low=229.1000 clos=231.1000 tvol=481234
"""  # path, tr_id and the fields that client libraries read
_PARTS = [call.split() for call in _CALLS.split("\n\n")]
QUOTES = {path: tr_id for path, tr_id, *_ in _PARTS}
_ROWS = {path: dict(pair.split("=") for pair in pairs) for path, _, *pairs in _PARTS}
_QUOTE_CODES = {"NAS", "NYS", "AMS", "HKS", "SHS", "SZS", "TSE", "HNX", "HSX"}


def _rows(request: Request, now: float) -> dict[str, Any]:
    """The rows of a business call; order codes such as NASD get empty ones and no error, as at KIS."""
    params, row = request.params, _ROWS[request.path]
    if request.path.startswith("/uapi/domestic-stock/"):
        code = params.get("PDNO", "")
        product = {"pdno": code, "shtn_pdno": code, "std_pdno": f"KR7{code}003"}
        asked = {"prdt_type_cd": params.get("PRDT_TYPE_CD", ""), "stck_shrn_iscd": params.get("FID_INPUT_ISCD", "")}
        return {"output": {**row, **product, **asked}}
    known = params.get("EXCD") in _QUOTE_CODES
    symbol = {"rsym": f"D{params.get('EXCD', '')}{params.get('SYMB', '')}"}
    if not request.path.endswith("/dailyprice"):
        return {"output": {**symbol, **(row if known else dict.fromkeys(row, ""))}}
    past = [datetime.fromtimestamp(now, KST) - timedelta(days=n) for n in range(1, 8)]
    rows = [{"xymd": f"{day:%Y%m%d}", **row} for day in past if known and day.weekday() < 5]  # noqa: PLR2004 - Saturday
    return {"output1": {**symbol, "zdiv": "4", "nrec": str(len(rows))}, "output2": rows}
