"""Metrics and readiness of all markets, for Prometheus and for supervisors; read-only, and nothing in them is secret.

They are computed each time they are asked for. What is not known is absent, never 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from zoneinfo import ZoneInfo

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tokencore.attempts import Outcome
from tokencore.calendars import sessions
from tokencore.clients.approval import approval_expiry
from tokencore.config.settings import Settings
from tokencore.config.sources import gather
from tokencore.errors import ConfigurationError
from tokencore.limits import format_time
from tokencore.outlook import VALID, covers, word
from tokencore.policy import CLOCK_SLACK
from tokencore.reports.status import next_attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric

    from tokencore.calendars.sessions import Override
    from tokencore.config.market import Market
    from tokencore.keys import Key, KeyState

    Load = Callable[[Settings], list[Key]]
    Value = datetime | float | None

PATIENCE = 10  # seconds for a client to send its request and take the answer
PUBLIC_FILE = 0o644  # node_exporter is another user; nothing in the file is secret
ALERT_BEFORE = timedelta(hours=1)  # of an open: from then on a market without a token is not ready
DAY = timedelta(days=1)


# One value a market; absent where it is not known.
GAUGES = {
    "kis_token_expiration_timestamp_seconds": "When the market's token expires.",
    "kis_token_issue_timestamp_seconds": "When the market's token was issued.",
    "kis_token_renewal_timestamp_seconds": "When the next renewal is tried; absent where a person has to act first.",
    "kis_token_valid": "Whether the market has a token that serves now.",
    "kis_token_covers_next_need": "Whether the token lasts to the end of the market's present or next need.",
    "kis_token_need_start_timestamp_seconds": "When the present or next need begins: 30 minutes before an open.",
    "kis_token_need_end_timestamp_seconds": "When the present or next need ends: at the close, or some minutes later.",
    "kis_approval_key_expiration_timestamp_seconds": "When the approval key expires; absent where none was asked for.",
    "kis_issuance_cooldown_end_timestamp_seconds": "Until when no request for a token is allowed; absent outside it.",
    "kis_issuance_last_day_issues": "Tokens issued for the market's key in the last 24 hours.",
    "kis_issuance_last_day_ceiling": "How many may be issued in 24 hours (KIS_MAX_ISSUES_PER_DAY).",
    "kis_issuance_record_readable": "Whether the issuance record of the market's key can be read.",
    "kis_market_readable": "Whether the market's state could be read; where it is 0, its other values are absent.",
}
ATTEMPTS = "kis_issuance_attempts"  # with the suffix that counters have: kis_issuance_attempts_total


class Vitals(NamedTuple):
    """A market at one moment.

    Attributes:
        market: whose they are.
        state: of its key; None where that could not be read.
        values: by the names of `GAUGES`, those that are known.
        unready: why the session that runs or opens soon has no token that lasts through it; empty otherwise.

    """

    market: Market
    state: KeyState | None
    values: dict[str, Value]
    unready: str


class Watch:
    """Looks at all markets; settings that break meanwhile leave it with the last good ones.

    Attributes:
        settings_good: whether the settings could be used when they were last looked at.

    """

    def __init__(self, load: Load) -> None:
        """Read the settings; `load` makes the keys of them.

        Raises:
            ConfigurationError: they are malformed, or no market has credentials.

        """
        self._load = load
        self._values: Mapping[str, Any] | None = None
        self._one_at_a_time = threading.Lock()
        self._read_settings()

    def look(self, now: datetime) -> list[Vitals]:
        """Every market at `now` (aware), in the settings' order; each key's state is read once."""
        with self._one_at_a_time:
            try:
                self._read_settings()
            except ConfigurationError:
                self.settings_good = False
            found = {one.market.name: one for key in self._keys for one in _look_at(key, now)}
            return [found[name] for name in self._names]

    def _read_settings(self) -> None:
        values = gather().values
        if values != self._values:
            settings = Settings.load()
            self._keys = self._load(settings)
            self._names = [market.name for market in settings.able_markets()]
            self._values = values
        self.settings_good = True


class TokenCollector(Collector):
    """Collects from a watch at every scrape."""

    def __init__(self, watch: Watch) -> None:
        """Collect what `watch` sees."""
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        """All metrics at this moment."""
        vitals = self._watch.look(datetime.now(UTC))
        for name, text in GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=("market",))
            for one in vitals:
                known = one.values.get(name)
                if known is not None:
                    at = known.timestamp() if isinstance(known, datetime) else known
                    family.add_metric((one.market.name,), at)
            yield family
        yield _info(vitals)
        yield _attempts(vitals)
        yield GaugeMetricFamily(
            "kis_settings_readable", "Whether the settings could be used; else the last good ones are.",
            value=self._watch.settings_good,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "kis_metrics_collection_timestamp_seconds", "When these values were collected.", value=time.time()
        )


def render(watch: Watch) -> str:
    """All metrics of this moment in Prometheus' text format."""
    return generate_latest(_registry(watch)).decode()


def write_textfile(watch: Watch, path: str) -> None:
    """Replace `path` by the metrics of this moment, whole and readable by all.

    Raises:
        ConfigurationError: the file cannot be written; what was there before still is.

    """
    try:
        write_to_textfile(path, _registry(watch))
        os.chmod(path, PUBLIC_FILE)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}); name a file elsewhere.") from None


def serve(watch: Watch, host: str, port: int) -> None:
    """Answer at `host:port` until SIGINT or SIGTERM; for the main thread.

    Raises:
        ConfigurationError: the address cannot be listened on.

    """
    # A shell's background jobs start with SIGINT ignored, and SIGTERM would end without closing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with listening(watch, host, port) as url:
            print(f"{url}/metrics, /livez and /readyz; Ctrl-C ends it.", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return


@contextlib.contextmanager
def listening(watch: Watch, host: str, port: int) -> Iterator[str]:
    """Answer in a thread inside the block, at the URL that it yields; port 0 takes a free one.

    Raises:
        ConfigurationError: the address cannot be listened on.

    """
    watch.look(datetime.now(UTC))  # the calendars: no scrape waits for them
    kind = _Server6 if ":" in host else _Server
    try:
        server = make_server(host, port, _app(watch), kind, _Handler)
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


def _registry(watch: Watch) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(TokenCollector(watch))
    return registry


def _app(watch: Watch) -> Callable[..., Iterable[bytes]]:
    """`/metrics` by Prometheus' own application, and beside it what supervisors ask."""
    metrics = make_wsgi_app(_registry(watch))

    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        head = environ["REQUEST_METHOD"] == "HEAD"
        if environ["PATH_INFO"] == "/metrics":
            body: Iterable[bytes] = metrics({**environ, "REQUEST_METHOD": "GET"}, start_response)
        else:
            status, text = _answer(watch, environ["PATH_INFO"])
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            body = [text.encode()]
        return [b""] if head else body

    return app


def _answer(watch: Watch, path: str) -> tuple[str, str]:
    if path == "/livez":
        return "200 OK", "alive\n"
    _, place, name = f"{path}/".split("/")[:3]
    vitals = watch.look(datetime.now(UTC)) if place == "readyz" and path.count("/") < 3 else []  # noqa: PLR2004
    asked = [one for one in vitals if name.lower() in ("", one.market.name)]
    if not asked:
        return "404 Not Found", "There are /metrics, /livez, /readyz and /readyz/MARKET.\n"
    lines = [f"{one.market.name}: {f'not ready: {one.unready}' if one.unready else 'ready'}\n" for one in asked]
    return "503 Service Unavailable" if any(one.unready for one in asked) else "200 OK", "".join(lines)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, *_: object) -> None:
        """Silent: a line a scrape helps nobody."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as inherited
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that gives up is no fault
            print(f"tokencore: a request met {type(error).__name__}.", file=sys.stderr)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _look_at(key: Key, now: datetime) -> list[Vitals]:
    try:
        state = key.state(now)
        of_key = _values_of_key(state)
        return [_vitals(market, state, of_key) for market in key.markets]
    except Exception as error:  # noqa: BLE001 - one key's trouble must not hide the others; its text may hold anything
        trouble = f"it cannot be read ({type(error).__name__})"
        return [Vitals(market, None, {"kis_market_readable": False}, trouble) for market in key.markets]


def _values_of_key(state: KeyState) -> dict[str, Value]:
    token = state.token
    lost = any(one.outcome is Outcome.SENT and not one.pid for one in state.attempts)  # only known by the file's time
    return {
        "kis_token_expiration_timestamp_seconds": token.expires_at if token else None,
        "kis_token_issue_timestamp_seconds": token.issued_at if token else None,
        "kis_token_renewal_timestamp_seconds": next_attempt(state),
        "kis_approval_key_expiration_timestamp_seconds": approval_expiry(state.key.store),
        "kis_issuance_cooldown_end_timestamp_seconds": state.cooldown_until,
        "kis_issuance_last_day_issues": state.issues_last_24h,
        "kis_issuance_last_day_ceiling": state.key.market.settings.max_issues_per_day,
        "kis_issuance_record_readable": not lost,
        "kis_market_readable": True,
    }


def _vitals(market: Market, state: KeyState, of_key: dict[str, Value]) -> Vitals:
    ahead = state.key.horizon(market.exchanges, state.now)  # kept by the key for some minutes
    need = next((need for need in ahead.needs if need[1] > state.now), None) if ahead else None
    values = of_key | {
        "kis_token_valid": word(state.token, state.problem, market, state.now) in VALID,
        "kis_token_covers_next_need": covers(state.token, need, market) if need else None,
        "kis_token_need_start_timestamp_seconds": need and need[0],
        "kis_token_need_end_timestamp_seconds": need and need[1],
    }
    return Vitals(market, state, values, _unready(market, state))


def _unready(market: Market, state: KeyState) -> str:
    token, close = state.token, _session_close(market.exchanges, state.now, state.key.overrides)
    if close is None or (token and token.serves(close - CLOCK_SLACK, market.buffer)):
        return ""
    if token is None:
        lack = "the token file cannot be used" if state.problem else "there is no token"
    elif token.rejected_at is not None:
        lack = "KIS has rejected the token"
    else:
        lack = f"the token serves until {format_time(token.expires_at - timedelta(seconds=market.buffer))}"
    hope = f"next renewal at {format_time(at)}" if (at := next_attempt(state)) else "no renewal is planned"
    return f"{lack}; the session ends at {format_time(close)}; {hope}"


def _session_close(codes: Iterable[str], now: datetime, known: Mapping[str, Override]) -> datetime | None:
    """The last close of the sessions that run, or open within an hour; None without one."""
    found = []
    for code in codes:
        today = now.astimezone(ZoneInfo(sessions.exchange(code).zone)).date()
        for day in (today, today + DAY):  # an exchange's day ends after its session
            one = sessions.session(code, day, known)
            if one and one.open - ALERT_BEFORE <= now < one.close:
                found.append(one.close)
    return max(found, default=None)


def _info(vitals: Iterable[Vitals]) -> GaugeMetricFamily:
    text = "What a market's token belongs to; markets with the same key share a token and its issues."
    family = GaugeMetricFamily("kis_market_info", text, labels=("market", "environment", "key"))
    for one in vitals:
        if one.state:
            family.add_metric((one.market.name, one.market.environment, one.state.key.fingerprint), 1)
    return family


def _attempts(vitals: Iterable[Vitals]) -> CounterMetricFamily:
    text = "Requests for a token with the market's key, by what became of them; markets of a key show the same."
    family = CounterMetricFamily(ATTEMPTS, text, labels=("market", "key", "outcome"))
    for one in vitals:
        if one.state:
            counted = Counter(attempt.outcome for attempt in one.state.attempts)
            for outcome in Outcome:
                family.add_metric((one.market.name, one.state.key.fingerprint, outcome.value), counted[outcome])
    return family
