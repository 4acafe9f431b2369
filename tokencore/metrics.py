"""The vitals of all markets as Prometheus metrics, collected while they are asked for; unknown values are absent."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tokencore.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.core import Metric

    from tokencore.vitals import Vitals, Watch

# One value a market; None where it has none.
GAUGES: dict[str, tuple[str, Callable[[Vitals], datetime | float | None]]] = {
    "kis_token_expiration_timestamp_seconds": (
        "When the market's token expires.",
        lambda one: one.expires_at,
    ),
    "kis_token_issue_timestamp_seconds": (
        "When the market's token was issued.",
        lambda one: one.issued_at,
    ),
    "kis_token_renewal_timestamp_seconds": (
        "When the next renewal will be tried; absent where none is planned, or only a person can bring it about.",
        lambda one: one.renewal_at,
    ),
    "kis_token_valid": (
        "Whether the market has a token that serves now.",
        lambda one: None if one.trouble else one.valid,
    ),
    "kis_token_covers_next_need": (
        "Whether the token lasts to the end of the present or next need of the market's exchanges.",
        lambda one: one.covered,
    ),
    "kis_token_need_start_timestamp_seconds": (
        "When the present or next need began or begins: 30 minutes before an open.",
        lambda one: one.need and one.need[0],
    ),
    "kis_token_need_end_timestamp_seconds": (
        "When the present or next need ends: at the close, or some minutes later.",
        lambda one: one.need and one.need[1],
    ),
    "kis_issuance_cooldown_end_timestamp_seconds": (
        "Until when no request for a token is allowed for the market's key; absent outside a cool-down.",
        lambda one: one.cooldown_until,
    ),
    "kis_issuance_last_day_issues": (
        "Tokens issued for the market's key in the last 24 hours.",
        lambda one: None if one.attempts is None else one.issues,
    ),
    "kis_issuance_last_day_ceiling": (
        "How many tokens may be issued for the market's key in 24 hours (KIS_MAX_ISSUES_PER_DAY).",
        lambda one: None if one.trouble else one.ceiling,
    ),
    "kis_issuance_record_readable": (
        "Whether the issuance record of the market's key can be read.",
        lambda one: None if one.trouble else one.attempts is not None,
    ),
    "kis_market_readable": (
        "Whether the market's state could be read; where it is 0, its other values are absent.",
        lambda one: not one.trouble,
    ),
}
ATTEMPTS = "kis_issuance_attempts"  # with the suffix that counters have: kis_issuance_attempts_total


class TokenCollector(Collector):
    """Collects from a watch at every scrape; keeps nothing between two of them."""

    def __init__(self, watch: Watch) -> None:
        """Collect what `watch` sees."""
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        """All metrics at this moment."""
        vitals = self._watch.look(datetime.now(UTC))
        for name, (text, value) in GAUGES.items():
            yield _gauge(name, text, vitals, value)
        yield _info(vitals)
        yield _attempts(vitals)
        yield GaugeMetricFamily(
            "kis_settings_readable", "Whether the settings could be used; else the last good ones are.",
            value=self._watch.settings_good,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "kis_metrics_collection_timestamp_seconds", "When these values were collected.", value=time.time()
        )


def _gauge(
    name: str, text: str, vitals: Iterable[Vitals], value: Callable[[Vitals], datetime | float | None]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("market",))
    for one in vitals:
        known = value(one)
        if known is not None:
            family.add_metric((one.market,), known.timestamp() if isinstance(known, datetime) else known)
    return family


def _info(vitals: Iterable[Vitals]) -> GaugeMetricFamily:
    text = "What a market's token belongs to; markets with the same key share a token and its issues."
    family = GaugeMetricFamily("kis_market_info", text, labels=("market", "environment", "key"))
    for one in vitals:
        if one.key:
            family.add_metric((one.market, one.environment, one.key), 1)
    return family


def _attempts(vitals: Iterable[Vitals]) -> CounterMetricFamily:
    text = "Requests for a token with the market's key, by what became of them; markets of a key show the same."
    family = CounterMetricFamily(ATTEMPTS, text, labels=("market", "key", "outcome"))
    for one in vitals:
        if one.attempts is not None:
            for outcome in Outcome:
                family.add_metric((one.market, one.key, outcome.value), one.attempts[outcome])
    return family
