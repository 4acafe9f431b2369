"""The quote calls that prove a token: what is asked, and what the answer says about the token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.calendars.exchanges import exchange
from tokencore.kis.codes import DEAD_TOKEN, OK, code_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Quote(NamedTuple):
    """One quote call; `code` is the exchange's and `symbol` the security's, as the call has them."""

    path: str
    tr_id: str
    code: str
    symbol: str
    params: Mapping[str, str]


class Evidence(NamedTuple):
    """What a quote call said about a token; without an answer neither status nor rows."""

    accepted: bool | None  # whether KIS accepts the token; None when the call says nothing about it
    detail: str  # KIS's words, or the fault, without anything secret
    status: int | None = None  # of HTTP
    rt_cd: str = ""  # KIS's codes, empty where it gave none
    msg_cd: str = ""
    rows: int | None = None  # how many with values


def domestic() -> Quote:
    """The price of Samsung Electronics."""
    params = {"FID_COND_MRKT_DIV_CODE": "J", "FID_INPUT_ISCD": "005930"}
    return Quote("/uapi/domestic-stock/v1/quotations/inquire-price", "FHKST01010100", "J", "005930", params)


def overseas(code: str, symbol: str) -> Quote:
    """The price of `symbol` on the exchange with this quote code."""
    params = {"AUTH": "", "EXCD": code, "SYMB": symbol}
    return Quote("/uapi/overseas-price/v1/quotations/price", "HHDFS00000300", code, symbol, params)


def daily(code: str, symbol: str) -> Quote:
    """The daily prices of `symbol`; KIS answers a quote code with rows, and an order code with none."""
    params = {"AUTH": "", "EXCD": code, "SYMB": symbol, "GUBN": "0", "BYMD": "", "MODP": "1"}
    return Quote("/uapi/overseas-price/v1/quotations/dailyprice", "HHDFS76240000", code, symbol, params)


def for_exchanges(codes: Sequence[str]) -> Quote:
    """The call that proves a token for these exchanges: of Korea where one is Korean or none is named."""
    there = [exchange(code) for code in codes]
    abroad = there and all(each.quote_code for each in there)
    return overseas(there[0].quote_code or "", there[0].symbol) if abroad else domestic()


def judge(status: int, body: Mapping[str, Any], detail: str) -> Evidence:
    """What an answer proves: judged on the status and KIS's codes, never on rows."""
    code, rt_cd, found = code_of(body), str(body.get("rt_cd", ""))[:4], body.get("output2", body.get("output"))
    accepted = False if code in DEAD_TOKEN else True if status == OK and rt_cd == "0" else None
    if isinstance(found, dict):  # an unknown exchange code gets one row, of the symbol and empty values
        found = [value for name, value in found.items() if name != "rsym" and value][:1]
    rows = len(found) if isinstance(found, list) else 0
    return Evidence(accepted, "rt_cd 0" if accepted else detail, status, rt_cd, code[:12], rows)
