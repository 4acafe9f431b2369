"""What the `holidays` package knows about the days on which exchanges stay closed.

It is loaded on the first question (0.05 s) and asked once per calendar and year. Calendars go by
the package's own names: a market such as `XKRX`, or a country where it has no market.
"""

from __future__ import annotations

import sys
import threading
from datetime import date, timedelta
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holidays import HolidayBase

SATURDAY = 5
"""The first day of the weekend, which all exchanges keep, even where a Saturday is made up for."""

_COUNTRIES = frozenset({"VN"})
_WITH_HALF_DAYS = frozenset({"XNYS", "XHKG"})
_LANGUAGES = {"XHKG": "en_HK"}  # Chung Yeung, as Hong Kong says; elsewhere en_US
_BY_NOTICE = frozenset({"XSHG", "XSHE"})  # each year is a guess until the State Council's notice
_turn = threading.RLock()  # for imports: what a package runs may ask it for names


@cache
def closures(calendar: str, year: int) -> dict[date, str]:
    """The holidays of that year with their English names; none after the last certain year."""
    if year > last_certain_year(calendar):
        return {}
    return dict(_holidays(calendar, year, "public").items())


@cache
def half_days(calendar: str, year: int) -> frozenset[date]:
    """The days of that year on which trading ends early."""
    if calendar not in _WITH_HALF_DAYS or year > last_certain_year(calendar):
        return frozenset()
    return frozenset(_holidays(calendar, year, "half_day"))


@cache
def first_trading_day(calendar: str, year: int) -> date:
    """The first weekday of that year that is no holiday."""
    day = date(year, 1, 1)
    while day.weekday() >= SATURDAY or day in closures(calendar, year):
        day += timedelta(days=1)
    return day


@cache
def last_certain_year(calendar: str) -> int:
    """The last year for which the installed package knows the closures."""
    known = _holidays(calendar, None, "public")
    if calendar not in _BY_NOTICE:
        return known.end_year
    # Each notice brings days off that no rule gives: a year without any has had no notice.
    return max(getattr(known, "special_public_holidays", ()), default=known.start_year - 1)


def _holidays(calendar: str, year: int | None, category: str) -> HolidayBase:
    from holidays import country_holidays, financial_holidays  # loaded when asked

    for package in ("countries", "financial"):
        _open_on_demand(package)
    load = country_holidays if calendar in _COUNTRIES else financial_holidays
    language = _LANGUAGES.get(calendar, "en_US")
    return load(calendar, years=year, categories=(category,), language=language)


class _OnDemand(ModuleType):
    """A package whose own code runs when it is asked for a name, as if it had been imported then."""

    _open = False

    def __getattr__(self, name: str) -> object:
        self._load()
        return super().__getattribute__(name)

    def __dir__(self) -> list[str]:
        self._load()
        return [*super().__dir__()]

    def _load(self) -> None:
        with _turn:
            if not self._open and self.__spec__ and self.__spec__.loader:
                self._open = True
                self.__spec__.loader.exec_module(self)


def _open_on_demand(package: str) -> None:
    """Let the modules of the package load without it.

    It imports all that it has, so every country there is for the one that is wanted: a sixth of the time that
    `tokencore check` takes for a thousand markets.
    """
    from importlib.util import find_spec, module_from_spec

    name = f"holidays.{package}"
    if name not in sys.modules and (spec := find_spec(name)):
        module = module_from_spec(spec)
        module.__class__ = _OnDemand
        # Of two threads the first one's, without a lock that a fork would leave held in the child.
        setattr(sys.modules["holidays"], package, sys.modules.setdefault(name, module))
