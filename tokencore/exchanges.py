"""The exchanges that KIS trades and their hours, as a checked-in table.

Days and times are those of the exchange's own zone. Closures are not here: they come from the
`holidays` package by way of `tokencore.sessions`, because they change with every year.
"""

from __future__ import annotations

from datetime import date, time, timedelta
from typing import NamedTuple

from tokencore.errors import ConfigurationError

LEAD = timedelta(minutes=30)
"""A token must be valid this long before an open: orders are entered ahead of it."""

CSAT_DAYS = frozenset(
    {
        date(2016, 11, 17),
        date(2017, 11, 16),  # the test was put off the evening before; KRX kept the announced hours
        date(2017, 11, 23),
        date(2018, 11, 15),
        date(2019, 11, 14),
        date(2020, 12, 3),
        date(2021, 11, 18),
        date(2022, 11, 17),
        date(2023, 11, 16),
        date(2024, 11, 14),
        date(2025, 11, 13),
        date(2026, 11, 19),
        date(2027, 11, 18),
    }
)
"""Days on which Korea's markets start an hour late for the college entrance test (수능)."""

EVENING_PAD = timedelta(minutes=10)  # after Korea's evening sessions, for the last answers to come in


class Extended(NamedTuple):
    """Trading around the regular session, which counts only where the settings ask for it.

    Attributes:
        since: the first day of it.
        open: its first minute; one after the regular open leaves the session's open alone.
        close: its last minute.
        half_close: its last minute on a half day, None where there are none.
        pad: how long after the close a token is still needed, instead of the exchange's own.

    """

    since: date
    open: time
    close: time
    half_close: time | None = None
    pad: timedelta = timedelta(0)


class Exchange(NamedTuple):
    """One exchange: its names, zone and hours.

    Attributes:
        code: KIS's order code, the key of settings and overrides.
        name: what people call it.
        quote_code: KIS's code for overseas prices; None in Korea.
        mic: ISO 10383 code; None where KIS users know none.
        zone: IANA name of the zone in which its days and times are written.
        open: regular open.
        close: regular close.
        calendar: the name under which the `holidays` package keeps its closures.
        breaks: pauses inside the session. A session lasts from open to close all the same.
        aliases: further names that users write.
        pad: how long after the close a token must still be valid.
        lead: how long before the open a token must already be valid.
        half_close: close on half days; None where there are none.
        csat: open and close on a CSAT day; None outside Korea.
        first_open: open on the year's first trading day, where that is a late one.
        earlier_close: the first day of the present close, and the close before that day.
        extended: hours around the session that users may switch on.
        since: the first day of trading, where that matters.

    """

    code: str
    name: str
    quote_code: str | None
    mic: str | None
    zone: str
    open: time
    close: time
    calendar: str
    breaks: tuple[tuple[time, time], ...] = ()
    aliases: tuple[str, ...] = ()
    pad: timedelta = timedelta(0)
    lead: timedelta = LEAD
    half_close: time | None = None
    csat: tuple[time, time] | None = None
    first_open: time | None = None
    earlier_close: tuple[date, time] | None = None
    extended: Extended | None = None
    since: date = date.min


def _us(code: str, name: str, quote_code: str, mic: str, *aliases: str) -> Exchange:
    return Exchange(
        code,
        name,
        quote_code,
        mic,
        zone="America/New_York",
        open=time(9, 30),
        close=time(16),
        calendar="XNYS",  # for all three: Nasdaq and NYSE American keep the NYSE's days
        aliases=aliases,
        half_close=time(13),
        extended=Extended(date.min, time(4), time(20), half_close=time(17)),
    )


def _china(code: str, name: str, quote_code: str, mic: str) -> Exchange:
    return Exchange(
        code,
        name,
        quote_code,
        mic,
        zone="Asia/Shanghai",
        open=time(9, 30),
        close=time(15),
        calendar=mic,  # closed on the weekends that China makes working days
        breaks=((time(11, 30), time(13)),),
    )


def _vietnam(code: str, name: str, quote_code: str, mic: str, *aliases: str) -> Exchange:
    return Exchange(
        code,
        name,
        quote_code,
        mic,
        zone="Asia/Ho_Chi_Minh",
        open=time(9),
        close=time(15),
        calendar="VN",  # the country's: nobody keeps one for its exchanges
        breaks=((time(11, 30), time(13)),),
        aliases=aliases,
    )


_TABLE = (
    Exchange(
        code="KRX",
        name="Korea Exchange",
        quote_code=None,
        mic="XKRX",
        zone="Asia/Seoul",
        open=time(9),
        close=time(15, 30),
        calendar="XKRX",
        pad=timedelta(minutes=60),
        csat=(time(10), time(16, 30)),
        first_open=time(10),
        earlier_close=(date(2016, 8, 1), time(15)),
        extended=Extended(date(2026, 9, 14), time(16), time(20), pad=EVENING_PAD),
    ),
    Exchange(
        code="NXT",
        name="Nextrade",
        quote_code=None,
        mic=None,
        zone="Asia/Seoul",
        open=time(8),
        close=time(20),
        calendar="XKRX",
        breaks=((time(8, 50), time(9, 0, 30)), (time(15, 20), time(15, 30))),
        csat=(time(10), time(20)),  # no pre-market on late days; the after-market ends as always
        first_open=time(10),
        pad=EVENING_PAD,
        since=date(2025, 3, 4),
    ),
    _us("NASD", "Nasdaq", "NAS", "XNAS", "NASDAQ"),
    _us("NYSE", "New York Stock Exchange", "NYS", "XNYS"),
    _us("AMEX", "NYSE American", "AMS", "XASE"),
    Exchange(
        code="SEHK",
        name="Hong Kong Stock Exchange",
        quote_code="HKS",
        mic="XHKG",
        zone="Asia/Hong_Kong",
        open=time(9, 30),
        close=time(16),
        calendar="XHKG",
        breaks=((time(12), time(13)),),
        aliases=("HKEX",),
        pad=timedelta(minutes=10),  # the closing auction
        half_close=time(12),
    ),
    _china("SHAA", "Shanghai Stock Exchange", "SHS", "XSHG"),
    _china("SZAA", "Shenzhen Stock Exchange", "SZS", "XSHE"),
    Exchange(
        code="TKSE",
        name="Tokyo Stock Exchange",
        quote_code="TSE",
        mic="XTKS",
        zone="Asia/Tokyo",
        open=time(9),
        close=time(15, 30),
        calendar="XJPX",
        breaks=((time(11, 30), time(12, 30)),),
        aliases=("XJPX",),
        earlier_close=(date(2024, 11, 5), time(15)),
    ),
    _vietnam("VNSE", "Ho Chi Minh Stock Exchange", "HSX", "XSTC", "HOSE"),
    # Equities move from here to Ho Chi Minh by the end of 2026; the exchange itself stays.
    _vietnam("HASE", "Hanoi Stock Exchange", "HNX", "XHNX"),
)

EXCHANGES = {entry.code: entry for entry in _TABLE}
"""All exchanges by KIS order code, in the order in which KIS lists them."""

_BY_NAME = {
    name: entry for entry in _TABLE for name in (entry.code, entry.quote_code, entry.mic, *entry.aliases) if name
}


def exchange(name: str) -> Exchange:
    """The exchange of an order code, quote code, MIC or alias, in any case of letters.

    Raises:
        ConfigurationError: no exchange has that name; the sentence lists the codes.

    """
    found = _BY_NAME.get(name) or _BY_NAME.get(name.strip().upper())
    if found is None:
        raise ConfigurationError(
            f"Unknown exchange {name!r}: use one of {', '.join(EXCHANGES)}, "
            "a quote code such as NAS or a MIC such as XNAS."
        )
    return found
