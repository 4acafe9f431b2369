"""Metrics and readiness of all markets, for Prometheus and for supervisors; read-only, and nothing in them is secret.

They are computed for each request. A value that is not known is absent, never 0.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import make_wsgi_app, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from tokencore.attempts import Outcome
from tokencore.calendars import sessions
from tokencore.config.settings import Settings
from tokencore.config.sources import gather
from tokencore.errors import ConfigurationError
from tokencore.keys import Key
from tokencore.tokens import format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from prometheus_client.core import Metric

    from tokencore.config.market import Market
    from tokencore.keys import KeyState

    Value = datetime | float | None
    Values = dict[tuple[str, ...], Value]

PATIENCE = 10  # seconds for a client to send its request and take the answer
PUBLIC_FILE = 0o644  # node_exporter runs as another user; nothing in the file is secret
ALERT_BEFORE = timedelta(hours=1)  # before an open: from then on a market without a token is not ready


class Vitals(NamedTuple):
    """What is known of a market: its key's state (None if it cannot be read) and its values by the names of `GAUGES`.

    `unready` says why a session that runs or opens within an hour has no token that lasts through it; else it is empty.
    """

    market: str
    state: KeyState | None
    values: dict[str, Value]
    unready: str


READABLE = "kis_market_readable"
# Name: help text, and how to compute the market's value from its key's state; a value of None is left out.
GAUGES: dict[str, tuple[str, Callable[[KeyState, Market], Value]]] = {
    READABLE:
        ("Whether the market's state could be read; where it is 0, its other values are absent.", lambda *_: 1),
    "kis_token_valid":
        ("Whether the market has a token that serves now.", lambda state, _: state.serves_until is not None),
    "kis_token_expiration_timestamp_seconds":
        ("When the market's token expires.", lambda state, _: state.token.expires_at if state.token else None),
    "kis_token_issue_timestamp_seconds":
        ("When the market's token was issued.", lambda state, _: state.token.issued_at if state.token else None),
    "kis_token_renewal_timestamp_seconds":
        ("When the next renewal is tried; absent where a person has to act first.",
         lambda state, _: state.next_attempt),
    "kis_token_covers_next_need":
        ("Whether the token lasts to the end of the market's present or next need.",
         lambda state, market: state.lasts(need[1]) if (need := state.need_of(market)) else None),
    "kis_token_need_start_timestamp_seconds":
        ("When the present or next need begins: 30 minutes before an open.",
         lambda state, market: need[0] if (need := state.need_of(market)) else None),
    "kis_token_need_end_timestamp_seconds":
        ("When the present or next need ends: at the close, or some minutes later.",
         lambda state, market: need[1] if (need := state.need_of(market)) else None),
    "kis_approval_key_expiration_timestamp_seconds":
        ("When the approval key expires; absent where none was asked for.", lambda state, _: state.approval_expires_at),
    "kis_issuance_cooldown_end_timestamp_seconds":
        ("Until when no request for a token is allowed; absent outside it.", lambda state, _: state.cooldown_until),
    "kis_issuance_last_day_issues":
        ("Tokens issued for the market's key in the last 24 hours.", lambda state, _: state.issues_last_24h),
    "kis_issuance_last_day_ceiling":
        ("How many may be issued in 24 hours (KIS_MAX_ISSUES_PER_DAY).",
         lambda _, market: market.settings.max_issues_per_day),
    "kis_issuance_record_readable":  # if not, only the lock file's times show attempts, and no process
        ("Whether the issuance record of the market's key can be read.",
         lambda state, _: not any(one.outcome is Outcome.SENT and not one.pid for one in state.attempts)),
}  # fmt: skip


class Watch(Collector):
    """Collects the metrics of all markets; if the settings become invalid meanwhile, it keeps the last good ones."""

    def __init__(self) -> None:
        """Read the settings.

        Raises:
            ConfigurationError: the settings are malformed, or no market has credentials.
        """
        self._keys, self._given = Key.load(Settings.load()), gather().values
        self._settings_good = True

    def look(self, now: datetime) -> list[Vitals]:
        """Return every market's state at `now` (aware), key by key; each key's state is read once."""
        try:
            if (given := gather().values) != self._given:  # else keep the keys and their computed calendars
                self._keys, self._given = Key.load(Settings.load()), given
            self._settings_good = True
        except ConfigurationError:
            self._settings_good = False
        return [one for key in self._keys for one in _look_at(key, now)]

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics as they are at this moment."""
        now = datetime.now(UTC)
        vitals = self.look(now)
        for name, (text, _) in GAUGES.items():
            yield _gauge(name, text, {(one.market,): one.values.get(name) for one in vitals}, ["market"])
        text = "What a market's token belongs to; markets with the same key share a token and its issues."
        readable = [(one.market, one.state) for one in vitals if one.state]
        info: Values = {(name, state.key.market.environment, state.key.fingerprint): 1 for name, state in readable}
        yield _gauge("kis_market_info", text, info, ["market", "environment", "key"])
        text = "Requests for a token with the market's key, by what became of them; markets of a key show the same."
        attempts = CounterMetricFamily("kis_issuance_attempts", text, labels=("market", "key", "outcome"))
        for name, state in readable:
            counted = Counter(attempt.outcome for attempt in state.attempts)
            for outcome in Outcome:
                attempts.add_metric((name, state.key.fingerprint, outcome), counted[outcome])
        yield attempts
        text = "Whether the settings could be used; else the last good ones are."
        yield _gauge("kis_settings_readable", text, {(): self._settings_good})
        yield _gauge("kis_metrics_collection_timestamp_seconds", "When these values were collected.", {(): now})


def write_textfile(watch: Watch, path: str) -> None:
    """Replace `path` by the present metrics in one step, readable by all users.

    Raises:
        ConfigurationError: the file cannot be written; a previous file is still there, unchanged.
    """
    try:
        place = os.path.realpath(path)  # a link stays, /dev/stdout too
        why = "not a regular file" if os.path.exists(place) and not os.path.isfile(place) else ""
        if not why:  # else root would replace a device
            write_to_textfile(place, watch)
            os.chmod(place, PUBLIC_FILE)
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise ConfigurationError(f"--textfile={path} cannot be written ({why}); name a file elsewhere.")


@contextlib.contextmanager
def listening(watch: Watch, host: str, port: int) -> Iterator[str]:
    """Serve in a background thread for the length of the block, and yield the URL; port 0 takes a free one.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    try:
        server = make_server(host, port, _app(watch), _Server6 if ":" in host else _Server, _Handler)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "no such port"
        raise ConfigurationError(
            f"Cannot listen on {host}:{port} ({why}); choose another address with --listen HOST:PORT."
        ) from None
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _app(watch: Watch) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI app that serves `/metrics` with Prometheus' own one and answers the requests of supervisors."""
    metrics = make_wsgi_app(watch)

    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            body: Iterable[bytes] = metrics({**environ, "QUERY_STRING": ""}, start_response)
            return body
        status, text = _answer(watch, environ["PATH_INFO"])
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return app


def _answer(watch: Watch, path: str) -> tuple[str, str]:
    if path == "/livez":
        return "200 OK", "alive\n"
    place, _, name = path[1:].lower().partition("/")
    vitals = watch.look(datetime.now(UTC)) if place == "readyz" else []
    asked = [one for one in vitals if name in ("", one.market)]
    if not asked:
        return "404 Not Found", "There are /metrics, /livez, /readyz and /readyz/MARKET.\n"
    lines = [f"{one.market}: {f'not ready: {one.unready}' if one.unready else 'ready'}\n" for one in asked]
    return "503 Service Unavailable" if any(one.unready for one in asked) else "200 OK", "".join(lines)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, *_: object) -> None:
        """Log nothing: a line for every scrape helps nobody."""


class _Server(ThreadingWSGIServer):
    def handle_error(self, *_: object) -> None:
        """Log nothing: a client that gives up is not an error."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _look_at(key: Key, now: datetime) -> list[Vitals]:
    closes: dict[str, datetime | None] = {}
    try:
        closes |= {market.name: _close(market, key, now) for market in key.markets}
        state, found = key.state(now), []
        for market in key.markets:
            values = {name: value(state, market) for name, (_, value) in GAUGES.items()}
            found.append(Vitals(market.name, state, values, _unready(state, closes[market.name])))
    except Exception as error:  # noqa: BLE001 - one key's error must not hide the others; its text may hold anything
        trouble = f"it cannot be read ({type(error).__name__})"
        names = [market.name for market in key.markets]
        return [Vitals(name, None, {READABLE: 0}, trouble if closes.get(name, now) else "") for name in names]
    return found


def _close(market: Market, key: Key, now: datetime) -> datetime | None:
    """Return the last close of the market's sessions that run, or open within an hour; None without one."""
    days = (sessions.days(code, now, now + ALERT_BEFORE, key.overrides) for code in market.exchanges)
    near = [one.session for every in days for one in every]
    return max((one.close for one in near if one.open - ALERT_BEFORE <= now < one.close), default=None)


def _unready(state: KeyState, close: datetime | None) -> str:
    """Say why the session with this `close` has no token that lasts through it; empty if it has one, or if none is."""
    if not close or state.lasts(close):
        return ""
    until = state.serves_until
    lack = f"the token serves until {format_time(until)}" if until else f"no token serves now ({state.status})"
    hope = f"next renewal at {format_time(at)}" if (at := state.next_attempt) else "no renewal is planned"
    return f"{lack}; the session ends at {format_time(close)}; {hope}"


def _gauge(name: str, text: str, values: Values, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    """Make a gauge with a sample for each set of labels whose value is known; times become epoch seconds."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for own, value in values.items():
        if value is not None:
            family.add_metric(own, value.timestamp() if isinstance(value, datetime) else value)
    return family
