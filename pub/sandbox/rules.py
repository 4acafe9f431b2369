"""KIS's gateway as plain state: its rules, codes, tokens and quotes, without a socket or a clock of its own.

Shapes and Korean texts are KIS's, prices are made up; times are epoch seconds. The counters hold nothing secret.
"""

from __future__ import annotations

import base64
import json
import math
import re
import secrets
import threading
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.errors import ConfigurationError
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Mapping

    Content = Mapping[str, Any] | str  # a mapping is sent as JSON, text as an HTML page

TOKEN, REVOKE, APPROVAL = "/oauth2/tokenP", "/oauth2/revokeP", "/oauth2/Approval"
TEXTS = {
    "EGW00002": "서버 에러가 발생했습니다.",
    "EGW00103": "유효하지 않은 AppKey입니다.",
    "EGW00105": "유효하지 않은 AppSecret입니다.",
    "EGW00121": "유효하지 않은 token 입니다.",
    "EGW00123": "기간이 만료된 token 입니다.",
    "EGW00133": "접근토큰 발급 잠시 후 다시 시도하세요(1분당 1회)",
}
RULES = {  # KIS's rules, in seconds; with shorter values, a day can be played in seconds
    "token_life": 86400.0,
    "same_token": 21600.0,  # how long after an issue the same token is handed out again
    "issue_interval": 60.0,  # how long an app key waits after a granted request
    "latency": 0.0,  # how long tokenP takes to answer
}
_CODE = re.compile(r"EGW\d{5}")
_STATUSES = range(200, 600)
_YEAR = 366 * 86400  # seconds; keeps every time of a token a valid date


class Request(NamedTuple):
    """A client's request; names of headers are in lower case, those of parameters in upper case."""

    method: str
    path: str
    body: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}
    params: Mapping[str, str] = {}


class Answer(NamedTuple):
    """The answer to a request."""

    status: int
    content: Content
    outcome: str  # the word for counters and logs
    delivery: str = "whole"  # or how the connection fails: `drop`, `hang`, `half` or `drip`


def refused(code: str, path: str, status: int | None = None) -> Answer:
    """Return a refusal with the text of KIS's portal, in the shape that KIS uses at that path."""
    text = TEXTS.get(code, "요청하신 오류입니다.")
    if path.startswith("/oauth2/"):
        return Answer(status or 403, {"error_description": text, "error_code": code}, code)
    return Answer(status or 500, {"rt_cd": "1", "msg_cd": code, "msg1": text}, code)


_HTML = "<html><head><title>403 Forbidden</title></head><body><h1>Forbidden</h1></body></html>"
_NO_TOKEN = {"access_token_token_expired": "2020-01-01 09:00:00", "token_type": "Bearer", "expires_in": 86400}
_PAST = {"access_token": "EXPIRED-" * 43, **_NO_TOKEN}  # as long as KIS's
FAILURES = {
    "limit": refused("EGW00133", TOKEN),
    "bad-key": refused("EGW00103", TOKEN),
    "bad-secret": refused("EGW00105", TOKEN),
    "server-error": refused("EGW00002", TOKEN),
    "down": refused("EGW00002", TOKEN, 500),
    "html": Answer(403, _HTML, "html"),
    "garbage": Answer(200, "\0<<< this is not JSON >>>", "garbage"),
    "no-token": Answer(200, _NO_TOKEN, "no-token"),
    "past": Answer(200, _PAST, "past"),
    "huge": Answer(200, "x" * (1 << 20), "huge"),
    **{way: Answer(200, _PAST, way, delivery=way) for way in ("drop", "hang", "half", "drip")},
}
"""What a request for a token can be made to meet, beside KIS's codes."""
KILL = "dead-token"  # requested like a failure, but it affects the tokens already issued
NO_SUCH_PATH = Answer(404, {"error": "The sandbox has no such path."}, "404")


class _RefusedError(Exception):
    """KIS refuses the request with the given code."""


def _refuse_if(**reasons: bool) -> None:
    for code, applies in reasons.items():
        if applies:
            raise _RefusedError(code)


@dataclass(repr=False)
class _Issued:
    key: str
    issued: float
    expires: int
    content: Mapping[str, Any]  # the answer of tokenP
    dead: bool = False


@dataclass(repr=False)
class _Customer:
    secret: str
    granted: float = -math.inf  # when the last request was granted
    token: _Issued | None = None


class Gateway:
    """What KIS knows: customers, their tokens, the rules in force and the scripted answers.

    Every key is a customer, and the first secret seen with it is the right one. Methods may be called from any thread.
    """

    def __init__(self, **lengths: float) -> None:
        """Start without tokens; `lengths` are those of `set_rules`."""
        self.rules = RULES
        self._customers: dict[str, _Customer] = {}
        self._tokens: dict[str, _Issued] = {}
        self._scripts: dict[str, repeat[Answer]] = {}
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._requests: list[dict[str, float | str]] = []
        self._lock = threading.Lock()
        self.set_rules(**lengths)

    def set_rules(self, /, **lengths: float) -> None:
        """Change lengths in RULES (seconds) from now on; issued tokens keep their expiry.

        Raises:
            ConfigurationError: a name or length is impossible; the rules have not changed.
        """
        for name, value in lengths.items():
            if name not in RULES or not (name == "token_life") <= value <= _YEAR:
                known = ", ".join(RULES)
                raise ConfigurationError(f"The rules are {known}, in seconds up to a year; a token lives one or more.")
        self.rules = {**self.rules, **lengths}

    def fail(self, mode: str, count: int | None = None) -> None:
        """Let the next `count` requests for a token fail, or all until `clear`; they do not count towards KIS's limits.

        `mode` is one of FAILURES, a code such as `EGW00210`, or `dead-token`, which is `kill_tokens`.

        Raises:
            ConfigurationError: there is no such failure; nothing has changed.
        """
        if mode == KILL:
            self.kill_tokens()
        elif mode in FAILURES or _CODE.fullmatch(mode):
            self._script(TOKEN, FAILURES.get(mode) or refused(mode, TOKEN), count)
        else:
            raise ConfigurationError(f"The failures are {', '.join((*FAILURES, KILL))} and codes such as EGW00210.")

    def answer(self, path: str, content: Content, status: int = 200, count: int | None = None) -> None:
        """Give exactly this answer to the next `count` requests, or to all until `clear`.

        `path` is an endpoint or a prefix: `/uapi/` matches every business call; the longest match counts.

        Raises:
            ConfigurationError: the path or status makes no sense; nothing has changed.
        """
        if not str(path).startswith("/") or status not in _STATUSES:
            raise ConfigurationError("path begins with a slash, and status is from 200 to 599.")
        code = "" if isinstance(content, str) else str(content.get("error_code") or content.get("msg_cd"))
        self._script(path, Answer(status, content, code if _CODE.fullmatch(code) else str(status)), count)

    def clear(self) -> None:
        """Remove all scripted answers and failures. Dead tokens stay dead, as at KIS."""
        with self._lock:
            self._scripts.clear()

    def kill_tokens(self) -> None:
        """Let business calls refuse every token issued so far, whatever its expiry, as KIS may do after maintenance."""
        with self._lock:
            for token in self._tokens.values():
                token.dead = True

    def stats(self) -> dict[str, Any]:
        """Count requests and answers since the start; `requests` lists those to tokenP, with times in epoch seconds."""
        with self._lock:
            issues, quotes = self._counts[TOKEN], self._counts["quote"]
            return {
                "token_requests": issues.total(),
                "granted_new": issues["new"],
                "granted_same": issues["same"],
                "refused": {word: issues[word] for word in issues if _CODE.fullmatch(word)},
                "quotes": quotes["ok"],
                "quotes_refused": {word: quotes[word] for word in quotes if _CODE.fullmatch(word)},
                "revokes": self._counts[REVOKE]["ok"],
                "approvals": self._counts[APPROVAL]["ok"],
                "rules": self.rules,
                "requests": self._requests[:],
            }

    def respond(self, request: Request, now: float) -> Answer:
        """Return the scripted answer, or else what KIS would answer at `now`, in epoch seconds."""
        with self._lock:
            answer = self._scripted(request.path) or self._judged(request, now)
            self._counts[request.path if request.path.startswith("/oauth2/") else "quote"][answer.outcome] += 1
            if request.path == TOKEN:
                self._requests.append({"at": now, "outcome": answer.outcome})
            return answer

    def _script(self, path: str, answer: Answer, count: int | None) -> None:
        with self._lock:
            self._scripts[path] = repeat(answer) if count is None else repeat(answer, count)

    def _scripted(self, asked: str) -> Answer | None:
        for path in sorted(self._scripts, key=len, reverse=True):
            if asked.startswith(path) and (answer := next(self._scripts[path], None)):
                return answer
        return None

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
        return NO_SUCH_PATH

    def _issue(self, asked: Mapping[str, Any], now: float) -> Answer:
        customer = self._customer(asked)
        _refuse_if(EGW00133=now - customer.granted < self.rules["issue_interval"])
        customer.granted = now
        token = customer.token
        if token and now < min(token.issued + self.rules["same_token"], token.expires):
            return Answer(200, token.content, "same")
        customer.token = self._mint(str(asked["appkey"]), now)
        return Answer(200, customer.token.content, "new")

    def _mint(self, key: str, now: float) -> _Issued:
        life, issued = math.ceil(self.rules["token_life"]), math.floor(now)  # a JWT has whole seconds
        claims = {"sub": "token", "aud": str(uuid.uuid4()), "prdt_cd": "", "iss": "unogw", "jti": key}
        parts = {"typ": "JWT", "alg": "HS512"}, {**claims, "iat": issued, "exp": issued + life}
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
        text = ".".join([*encoded, secrets.token_urlsafe(64)])  # the signature may be anything: only KIS checks it
        content = {
            "access_token": text,
            "access_token_token_expired": f"{datetime.fromtimestamp(issued + life, KST):%Y-%m-%d %H:%M:%S}",
            "token_type": "Bearer",
            "expires_in": life,  # overstated for a token handed out again, as at KIS
        }
        token = self._tokens[text] = _Issued(key, now, issued + life, content)
        return token

    def _revoke(self, asked: Mapping[str, Any]) -> Answer:
        self._customer({"grant_type": "client_credentials", **asked})
        token = self._alive(asked.get("token"))
        _refuse_if(EGW00121=token.key != str(asked["appkey"]))
        token.dead = True
        return Answer(200, {"code": 200, "message": "접근토큰 폐기에 성공하였습니다"}, "ok")

    def _alive(self, text: object) -> _Issued:
        if (token := self._tokens.get(str(text))) and not token.dead:
            return token
        raise _RefusedError("EGW00121")

    def _customer(self, asked: Mapping[str, Any]) -> _Customer:
        key, secret = str(asked.get("appkey") or ""), str(asked.get("appsecret") or "")
        another = asked.get("grant_type") != "client_credentials"
        _refuse_if(EGW00101=not asked, EGW00116=another, EGW00102=not key, EGW00104=not secret)
        customer = self._customers.setdefault(key, _Customer(secret))
        _refuse_if(EGW00105=customer.secret != secret)
        return customer

    def _check_headers(self, request: Request, now: float) -> None:
        headers = request.headers
        scheme, _, text = headers.get("authorization", "").partition(" ")
        _refuse_if(EGW00122=scheme.lower() != "bearer" or not text)
        token = self._alive(text)
        _refuse_if(
            EGW00123=token.expires <= now,
            EGW00103=headers.get("appkey") != token.key,
            EGW00105=headers.get("appsecret") != self._customers[token.key].secret,
            EGW00203=headers.get("tr_id") != QUOTES[request.path],
        )


QUOTES = {  # path: tr_id
    "/uapi/domestic-stock/v1/quotations/inquire-price": "FHKST01010100",
    "/uapi/domestic-stock/v1/quotations/search-info": "CTPF1604R",
    "/uapi/overseas-price/v1/quotations/price": "HHDFS00000300",
    "/uapi/overseas-price/v1/quotations/price-detail": "HHDFS76200200",
    "/uapi/overseas-price/v1/quotations/dailyprice": "HHDFS76240000",
}
_FIELDS = """
stck_prpr=71500 prdy_vrss=500 prdy_vrss_sign=2 prdy_ctrt=0.70 stck_oprc=71100 stck_hgpr=71900 stck_lwpr=70900
stck_sdpr=71000 acml_vol=12345678 acml_tr_pbmn=882715977000 prdy_vrss_vol_rate=3.10 bstp_kor_isnm=전기·전자
hts_avls=4268386 stck_mxpr=92300 stck_llam=49700 aspr_unit=100 eps=4950.00 bps=57930.00 per=14.44 pbr=1.23
w52_hgpr=79400 w52_hgpr_date=20260916 w52_lwpr=51800 w52_lwpr_date=20260408 mrkt_warn_cls_code=00 temp_stop_yn=N
short_over_yn=N prdt_name=모의 prdt_name120=모의 prdt_abrv_name=모의 prdt_eng_name=Made-Up prdt_eng_name120=Made-Up
prdt_eng_abrv_name=Made-Up base=229.3500 last=231.1000 clos=231.1000 sign=2 diff=1.7500 rate=+0.76 zdiv=4 curr=USD
vnit=1 open=229.8000 high=232.0000 low=229.1000 pvol=51216482 tvol=48123456 tamt=11121330682 uplp=0.0000 dnlp=0.0000
h52p=260.1000 h52d=20260716 l52p=169.2100 l52d=20260408 perx=35.12 pbrx=52.01 epsx=6.58 bpsx=4.44 tomv=3429612
t_rate=1391.50 t_xsgn=2 e_hogau=0.0100 e_ordyn=매매가능 e_icod=컴퓨터
"""  # the fields that client libraries read, of all calls together
_ROW = dict(pair.split("=") for pair in _FIELDS.split())
_QUOTE_CODE = 3  # letters of an exchange's quote code; an order code has four, and a domestic call has no code


def _rows(request: Request, now: float) -> dict[str, Any]:
    """Return the rows of a business call; order codes such as NASD get empty values and no error, as at KIS."""
    place, symbol, code, stock, kind = (
        request.params.get(name, "") for name in ("EXCD", "SYMB", "PDNO", "FID_INPUT_ISCD", "PRDT_TYPE_CD")
    )
    asked = {"rsym": f"D{place}{symbol}", "stck_shrn_iscd": stock, "prdt_type_cd": kind}
    asked |= {"pdno": code, "shtn_pdno": code, "std_pdno": f"KR7{code}003"}
    row = {**(_ROW if len(place) <= _QUOTE_CODE else dict.fromkeys(_ROW, "")), **asked}
    if not request.path.endswith("/dailyprice"):
        return {"output": row}
    past = [datetime.fromtimestamp(now, KST) - timedelta(days=n) for n in range(1, 8) if row["last"]]
    rows = [{"xymd": f"{day:%Y%m%d}", **row} for day in past if day.weekday() < 5]  # noqa: PLR2004 - Saturday
    return {"output1": {"nrec": str(len(rows)), **row}, "output2": rows}
