"""The exchanges on which KIS trades and their hours in their own zones: a table with one row per exchange.

Closures change every year, so they are not in the table: `sessions` takes them from the `holidays` package.
"""

from __future__ import annotations

from datetime import date, time, timedelta
from typing import NamedTuple

from tokencore.errors import ConfigurationError

LEAD = timedelta(minutes=30)
"""A token must be valid this long before an open: orders are entered ahead of it."""

_CSAT = """
2016-11-17 2017-11-16 2017-11-23 2018-11-15 2019-11-14 2020-12-03 2021-11-18 2022-11-17 2023-11-16 2024-11-14
2025-11-13 2026-11-19 2027-11-18
"""  # the test of 2017 was postponed by a week the evening before; KRX kept the announced hours on both days
CSAT_DAYS = frozenset(map(date.fromisoformat, _CSAT.split()))
"""Days on which Korea's markets start an hour late for the college entrance test (수능)."""

_EVENING_PAD = timedelta(minutes=10)  # after Korea's evening sessions, for the last answers to come in


class Extended(NamedTuple):
    """Trading around the regular session, which counts only if the settings ask for it."""

    since: date  # its first day
    open: time  # its first minute; if that is after the regular open, the session's open stays the same
    close: time
    half_close: time | None = None  # its close on a half day; None if there are no half days
    pad: timedelta = timedelta(0)  # used instead of the exchange's own


class Exchange(NamedTuple):
    """One exchange: its names, zone and hours. A session lasts from open to close, lunch breaks included."""

    code: str  # KIS's order code, the key of settings and overrides
    quote_code: str | None  # KIS's code for overseas prices; None in Korea
    mic: str | None  # ISO 10383 code; None if KIS users know none
    zone: str  # IANA name of the zone of its days and times
    open: time
    close: time
    calendar: str  # the `holidays` package's name for its closures: a market, or a country of two letters
    by_notice: bool = False  # a year's closures are guesses until the government announces them
    aliases: tuple[str, ...] = ()  # other names that users write
    symbol: str = ""  # a security sure to stay listed, whose price proves a token; empty in Korea
    pad: timedelta = timedelta(0)  # how long after the close a token must still be valid
    half_close: time | None = None  # close on half days; None if there are none
    csat: tuple[time, time] | None = None  # open and close on a CSAT day; None outside Korea
    first_open: time | None = None  # open on the year's first trading day, if later than usual
    earlier_close: tuple[date, time] | None = None  # the first day of the present close, and the close before that day
    extended: Extended | None = None  # hours around the session that users may switch on
    since: date = date.min  # the first day of trading, where that matters


_NYSE = Exchange(  # Nasdaq and NYSE American keep the days of XNYS too
    *("NYSE", "NYS", "XNYS", "America/New_York", time(9, 30), time(16), "XNYS"),
    symbol="IBM",
    half_close=time(13),
    extended=Extended(date.min, time(4), time(20), half_close=time(17)),
)
_SHAA = Exchange(  # closed on the weekends that China makes working days
    *("SHAA", "SHS", "XSHG", "Asia/Shanghai", time(9, 30), time(15), "XSHG"), symbol="600519", by_notice=True
)
_VNSE = Exchange(  # Ho Chi Minh City; it uses the country's calendar because nobody keeps one for its exchanges
    *("VNSE", "HSX", "XSTC", "Asia/Ho_Chi_Minh", time(9), time(15), "VN"), aliases=("HOSE",), symbol="VNM"
)
_ROWS = (
    Exchange(
        *("KRX", None, "XKRX", "Asia/Seoul", time(9), time(15, 30), "XKRX"),
        pad=timedelta(minutes=60),
        csat=(time(10), time(16, 30)),
        first_open=time(10),
        earlier_close=(date(2016, 8, 1), time(15)),
        extended=Extended(date(2026, 9, 14), time(16), time(20), pad=_EVENING_PAD),
    ),
    Exchange(  # Nextrade
        *("NXT", None, None, "Asia/Seoul", time(8), time(20), "XKRX"),
        pad=_EVENING_PAD,
        csat=(time(10), time(20)),  # no pre-market on late days; the after-market ends as always
        first_open=time(10),
        since=date(2025, 3, 4),
    ),
    _NYSE._replace(code="NASD", quote_code="NAS", mic="XNAS", aliases=("NASDAQ",), symbol="AAPL"),
    _NYSE,
    _NYSE._replace(code="AMEX", quote_code="AMS", mic="XASE", symbol="SPY"),
    Exchange(
        *("SEHK", "HKS", "XHKG", "Asia/Hong_Kong", time(9, 30), time(16), "XHKG"),
        aliases=("HKEX",),
        symbol="00700",
        pad=timedelta(minutes=10),  # the closing auction
        half_close=time(12),
    ),
    _SHAA,
    _SHAA._replace(code="SZAA", quote_code="SZS", mic="XSHE", calendar="XSHE", symbol="000001"),  # Shenzhen
    Exchange(
        *("TKSE", "TSE", "XTKS", "Asia/Tokyo", time(9), time(15, 30), "XJPX"),
        aliases=("XJPX",),
        symbol="7203",
        earlier_close=(date(2024, 11, 5), time(15)),
    ),
    _VNSE,
    # Equities move from Hanoi to Ho Chi Minh by the end of 2026; the exchange itself stays.
    _VNSE._replace(code="HASE", quote_code="HNX", mic="XHNX", aliases=(), symbol="SHS"),
)
EXCHANGES = {row.code: row for row in _ROWS}
"""All exchanges by KIS order code, in the order in which KIS lists them."""

_BY_NAME = {name: row for row in _ROWS for name in (row.code, row.quote_code, row.mic, *row.aliases) if name}


def exchange(name: str) -> Exchange:
    """Return the exchange of an order code, quote code, MIC or alias, in upper or lower case.

    Raises:
        ConfigurationError: no exchange has that name; the message lists the codes.
    """
    found = _BY_NAME.get(name) or _BY_NAME.get(name.strip().upper())
    if found is None:
        raise ConfigurationError(
            f"Unknown exchange {name[:40]!r}: use one of {', '.join(EXCHANGES)}, "
            "a quote code such as NAS or a MIC such as XNAS."
        )
    return found
