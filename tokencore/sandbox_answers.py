"""What the sandbox's KIS gateway answers: KIS's codes and texts, tokens, and the rows of its quote calls.

Shapes and Korean texts are those of the portal; prices are made up.
"""

from __future__ import annotations

import base64
import hmac
import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Mapping

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
REFUSALS = {
    "limit": ("EGW00133", 403),
    "bad-key": ("EGW00103", 403),
    "bad-secret": ("EGW00105", 403),
    "server-error": ("EGW00002", 403),
    "down": ("EGW00002", 500),
}
REVOKED = {"code": 200, "message": "접근토큰 폐기에 성공하였습니다"}
SUCCESS = {"rt_cd": "0", "msg_cd": "MCA00000", "msg1": "정상처리 되었습니다."}
_QUOTE_CODES = {"NAS", "NYS", "AMS", "HKS", "SHS", "SZS", "TSE", "HNX", "HSX"}
_SATURDAY = 6


class Answer(NamedTuple):
    """What a request gets: status, JSON, the word for counters and logs, and how it is delivered.

    `delivery` is `whole`, or the name of the failure that HTTP has to play.
    """

    status: int
    content: Mapping[str, Any]
    outcome: str
    delivery: str = "whole"


@dataclass
class Issued:
    """An issued token; times are epoch seconds."""

    text: str = field(repr=False)
    key: str = field(repr=False)
    issued: float
    expires: int
    life: int
    dead: bool = False


def jwt(claims: Mapping[str, Any], secret: bytes) -> str:
    """A three-part JWT with these claims, signed as KIS signs: HS512."""
    parts = [_base64url(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "HS512"}, claims)]
    signature = hmac.digest(secret, ".".join(parts).encode(), "sha512")
    return ".".join([*parts, _base64url(signature)])


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def handed_out(token: Issued) -> dict[str, Any]:
    """What tokenP answers; for a token handed out again `expires_in` overstates its life, as at KIS."""
    return {
        "access_token": token.text,
        "access_token_token_expired": f"{datetime.fromtimestamp(token.expires, KST):%Y-%m-%d %H:%M:%S}",
        "token_type": "Bearer",
        "expires_in": token.life,
    }


def refused(code: str, status: int = 403) -> Answer:
    """A refusal of `/oauth2/*` with the portal's text."""
    return Answer(status, {"error_description": TEXTS[code], "error_code": code}, code)


def _domestic_price(params: Mapping[str, str], _: float) -> dict[str, Any]:
    row = {"stck_prpr": "71500", "prdy_vrss": "500", "prdy_vrss_sign": "2", "prdy_ctrt": "0.70"}
    row |= {"stck_oprc": "71100", "stck_hgpr": "71900", "stck_lwpr": "70900", "stck_sdpr": "71000"}
    row |= {"acml_vol": "12345678", "acml_tr_pbmn": "882715977000", "prdy_vrss_vol_rate": "3.10"}
    row |= {"bstp_kor_isnm": "전기·전자", "hts_avls": "4268386", "stck_mxpr": "92300", "stck_llam": "49700"}
    row |= {"aspr_unit": "100", "eps": "4950.00", "bps": "57930.00", "per": "14.44", "pbr": "1.23"}
    row |= {"w52_hgpr": "79400", "w52_hgpr_date": "20260916", "w52_lwpr": "51800", "w52_lwpr_date": "20260408"}
    row |= {"mrkt_warn_cls_code": "00", "temp_stop_yn": "N", "short_over_yn": "N"}
    return {"output": {**row, "stck_shrn_iscd": params.get("FID_INPUT_ISCD", "")}}


def _overseas_price(params: Mapping[str, str], _: float) -> dict[str, Any]:
    row = {"base": "229.3500", "last": "231.1000", "sign": "2", "diff": "1.7500", "rate": "+0.76"}
    row |= {"zdiv": "4", "pvol": "51216482", "tvol": "48123456", "tamt": "11121330682"}
    known = params.get("EXCD") in _QUOTE_CODES
    return {"output": {"rsym": _symbol(params), **(row if known else dict.fromkeys(row, ""))}}


def _overseas_detail(params: Mapping[str, str], _: float) -> dict[str, Any]:
    row = {"zdiv": "4", "curr": "USD", "vnit": "1", "open": "229.8000", "high": "232.0000", "low": "229.1000"}
    row |= {"last": "231.1000", "base": "229.3500", "pvol": "51216482", "tvol": "48123456", "tamt": "11121330682"}
    row |= {"uplp": "0.0000", "dnlp": "0.0000", "h52p": "260.1000", "h52d": "20260716", "l52p": "169.2100"}
    row |= {"l52d": "20260408", "perx": "35.12", "pbrx": "52.01", "epsx": "6.58", "bpsx": "4.44", "tomv": "3429612"}
    row |= {"t_rate": "1391.50", "t_xsgn": "2", "e_hogau": "0.0100", "e_ordyn": "매매 가능", "e_icod": "컴퓨터"}
    known = params.get("EXCD") in _QUOTE_CODES
    return {"output": {"rsym": _symbol(params), **(row if known else dict.fromkeys(row, ""))}}


def _product(params: Mapping[str, str], _: float) -> dict[str, Any]:
    code = params.get("PDNO", "")
    row = {"pdno": code, "shtn_pdno": code, "std_pdno": f"KR7{code}003", "prdt_type_cd": params.get("PRDT_TYPE_CD", "")}
    row |= {"prdt_name": "모의 종목", "prdt_name120": "모의 종목", "prdt_abrv_name": "모의 종목"}
    row |= {"prdt_eng_name": "Made Up", "prdt_eng_name120": "Made Up", "prdt_eng_abrv_name": "Made Up"}
    return {"output": row}


def _daily_prices(params: Mapping[str, str], now: float) -> dict[str, Any]:
    """Order codes such as NASD get no rows and no error, which is KIS's best-known riddle."""
    bar = {
        "open": "229.8000",
        "high": "232.0000",
        "low": "229.1000",
        "clos": "231.1000",
        "tvol": "481234",
    }
    past = [datetime.fromtimestamp(now, KST) - timedelta(days=n) for n in range(1, 8)]
    days = [f"{day:%Y%m%d}" for day in past if day.isoweekday() < _SATURDAY]
    rows = [{"xymd": day, **bar} for day in days] if params.get("EXCD") in _QUOTE_CODES else []
    return {"output1": {"rsym": _symbol(params), "zdiv": "4", "nrec": str(len(rows))}, "output2": rows}


def _symbol(params: Mapping[str, str]) -> str:
    return f"D{params.get('EXCD', '')}{params.get('SYMB', '')}"


# The business calls: their tr_id, and what makes up their rows.
QUOTES = {
    "/uapi/domestic-stock/v1/quotations/inquire-price": ("FHKST01010100", _domestic_price),
    "/uapi/overseas-price/v1/quotations/price": ("HHDFS00000300", _overseas_price),
    "/uapi/domestic-stock/v1/quotations/search-info": ("CTPF1604R", _product),
    "/uapi/overseas-price/v1/quotations/price-detail": ("HHDFS76200200", _overseas_detail),
    "/uapi/overseas-price/v1/quotations/dailyprice": ("HHDFS76240000", _daily_prices),
}
