"""`tokencore doctor`: everything that a working set-up needs, looked at once, with the fix for what is wrong.

Nothing is issued or posted, and no token is written: the lock is taken for a moment, and a temporary file is made where
tokens are saved. Each group of checks has a thread of its own, and none is waited for longer than `DEADLINE`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import requests

from tokencore.attempts import CREDENTIALS, latest
from tokencore.calendars.sessions import exchange
from tokencore.clients.approval import approval_expiry
from tokencore.clients.exports import Exports
from tokencore.config import market as values
from tokencore.config.settings import Settings
from tokencore.config.sources import CONFIG_FILE, DOTENV_FILE, gather, short, trusted_dotenv
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.kis import quotes
from tokencore.kis.codes import KNOWN
from tokencore.kis.gateway import LOOPBACK, Gateway
from tokencore.limits import format_time
from tokencore.outlook import CLOCK_SLACK
from tokencore.reports import status
from tokencore.stores import files
from tokencore.tokens import jwt_claims

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tokencore.calendars.exchanges import Exchange
    from tokencore.keys import Key

UNEXPECTED, SETTINGS, NO_TOKEN, REFUSED, UNREACHABLE, STORE = 1, 2, 3, 5, 6, 7  # exit codes, as of the commands
DEADLINE = 30.0  # seconds for the whole examination
PATIENCE = 4.0  # seconds to connect, for each wait for data, and for a lock
PUBLIC = (
    *("ENVIRONMENT", "BASE_URL", "TOKEN_DIR", "EXCHANGES", "EXPORTS", "CLOSED", "EXTENDED", "ISSUE_INTERVAL"),
    *("KEYRING", "BUFFER", "PROACTIVE_WINDOW", "TIMEOUT", "MAX_ISSUES_PER_DAY", "PROVE_TOKENS", "SLACK_CHANNEL"),
)  # what may be shown; any other value might be secret
LENGTHS = {"APP_KEY": 36, "APP_SECRET": 180}  # characters, as KIS issues them
LONGEST = 60  # characters of a value that are shown
SHOWN = 3  # names in a line
LITTLE, TOO_LITTLE = 100 << 20, 1 << 20  # bytes free: time to look, and no token could be saved
NOTICEABLE = 5.0  # seconds: the Date header knows whole ones, and the answer takes its time
TOO_OFTEN, BREATH = "EGW00201", 1.1  # calls a second say nothing about the token; seconds until the next is welcome
SLACK_API = "https://slack.com/api/"
POOL, CHECK = "tokens", "check_tokens"  # the work pool and the hourly deployment of prefect.yaml
OTHERS = 0o077
OTHER_CLIENTS = {
    "mojito2": ("token.dat", "~/token.dat"),
    "python-kis": ("~/.pykis/cache/*.json",),
    "KIS's sample (kis_auth)": ("~/KIS/config/KIS*",),
    "korea-investment-stock": ("~/.cache/kis/token.key",),
}
MANY, CACHE_LIMIT = 64, 65_536  # files of one pattern that are looked at, and their bytes
_OF_KEY = re.compile(r"key-([0-9a-f]{16})\b", re.ASCII)
_OF_MARKET = re.compile(r"(.+)_(?:api_token\.json|token_issued_at\.dat|krs_token\.dat|approval_key\.json)", re.ASCII)
_BESIDES = ("config.toml", "incidents.", "prefect", "key-", ".gitignore")
_JWT = re.compile(rb"[\w-]++\.[\w-]++\.[\w-]++", re.ASCII)


class State(StrEnum):
    """How a thing is; the command's exit code is the first `fail`'s own, or 1 where there are warnings alone."""

    OK = "ok"
    WARN = "warn"  # it works, but something is to be done
    FAIL = "fail"
    SKIPPED = "skipped"  # it could not be looked at, or is not used


class Finding(NamedTuple):
    """What was looked at, how it is, what that means, and what to do; `exit_code` is a failure's."""

    name: str
    state: State
    detail: str
    cure: str = ""  # the name that programs know
    exit_code: int = UNEXPECTED


def examine(load: Callable[[Settings], list[Key]]) -> list[Finding]:
    """Look at everything; the findings in the order in which they are best fixed. `load` makes the settings' keys."""
    settings, keys, problem = None, [], ""
    try:
        settings = Settings.load()
        keys = load(settings)
    except TokenError as error:
        problem = str(error)
    with contextlib.suppress(ConfigurationError):
        gather()
    checks: dict[str, Callable[[], Iterable[Finding]]] = {"settings": partial(_settings, settings, problem)}
    folder = settings.token_dir if settings else values.folder(values.TOKEN_DIR)
    checks["token directory"] = partial(_directory, folder, settings, keys)
    checks["tokens"] = partial(_tokens, keys)
    for url in dict.fromkeys(key.market.base_url for key in keys):
        checks[f"kis {url}"] = partial(_kis, url, [key for key in keys if key.market.base_url == url])
    checks["slack"] = _slack
    checks["prefect"] = partial(_prefect, keys, os.path.join(folder, "prefect"))
    checks["duplicates"] = partial(_duplicates, keys)
    return _all(checks)


def _all(checks: Mapping[str, Callable[[], Iterable[Finding]]]) -> list[Finding]:
    """What the checks find, each in a thread of its own that nobody waits for after the deadline."""
    found: dict[str, list[Finding]] = {}

    def run(name: str, check: Callable[[], Iterable[Finding]]) -> None:
        try:
            found[name] = list(check())
        except TokenError as error:
            found[name] = [Finding(name, State.FAIL, str(error), "see the settings, above", error.exit_code)]
        except Exception as error:  # noqa: BLE001 - one check's fault hides no other; its text may hold anything
            detail = f"could not be looked at ({type(error).__name__})"
            found[name] = [Finding(name, State.FAIL, detail, "please report this line")]

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in checks.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + DEADLINE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {DEADLINE:.0f} s"
    return [
        one
        for name in checks
        for one in found.get(name, [Finding(name, State.FAIL, late, "look for what hangs there")])
    ]


def _settings(settings: Settings | None, problem: str) -> Iterator[Finding]:
    """Whether they can be used, and a line for each that is set, with its origin."""
    if problem:
        yield Finding("settings", State.FAIL, problem, "correct it where it was set, see below", SETTINGS)
    found = gather()
    if not problem:
        yield Finding("settings", State.OK, f"{len(found.origins)} set, all well-formed")
    origins, unknown = found.origins, settings.misspelt() if settings else {}
    try:
        origins = settings.origins if settings else origins
    except ConfigurationError as error:
        yield Finding("keyring", State.FAIL, str(error), "unlock it, or give the secret another source", SETTINGS)
    for name, origin in sorted(origins.items()):
        if name not in unknown:
            yield _setting(name, found.values.get(name), "the environment" if origin == "environment" else origin)
    for name, meant in unknown.items():
        state, fix = State.SKIPPED, "remove it, unless another program uses it"
        if meant:
            state, fix = State.WARN, f"did you mean {meant}?"
        yield Finding(f"setting {short(name)}", state, "is not a setting of tokencore", fix)
    for path in (DOTENV_FILE, CONFIG_FILE) if os.name == "posix" else ():
        holds = {name for name, origin in origins.items() if origin == path}
        secret = any(name.endswith(("APP_KEY", "APP_SECRET", "_TOKEN", "_URL")) for name in holds)
        if secret and os.stat(os.path.expanduser(path)).st_mode & OTHERS:
            detail = f"{path} holds credentials, and other users may read it"
            yield Finding("settings file", State.WARN, detail, f"chmod 600 {path}")


def _setting(name: str, value: object, origin: str) -> Finding:
    if value is None:
        return Finding(f"setting {name}", State.OK, f"kept, in {origin}")
    field = name.rpartition("__")[2].removeprefix("KIS_")
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip()
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[:LONGEST]) + "..." * (len(text) > LONGEST)
    if field not in PUBLIC or "@" in text or "?" in text:
        shown = f"{len(text)} characters"
    usual = LENGTHS.get(field, len(text))
    odd = "" if len(text) == usual else f"; KIS's have {usual}: copy it again if KIS refuses it"
    return Finding(f"setting {short(name)}", State.OK, f"{shown}, from {origin}{odd}")


def _directory(folder: str, settings: Settings | None, keys: list[Key]) -> Iterator[Finding]:
    """The folder by its modes and by trying it; what lies in it, the locks, the other clients' copies, and the disk."""
    there = os.path.isdir(folder)
    yield _usable(folder)
    if there and os.access(folder, os.R_OK | os.X_OK):
        names = sorted(os.listdir(folder))
        yield _modes(folder, names)
        markets = {market.name for market in settings.all_markets()} if settings else set()
        yield _leftovers(names, markets, {key.fingerprint for key in keys})
        yield from (_lock(key, several=len(keys) > 1) for key in keys)
    for key in keys:
        for place, why in Exports(key.markets, key.store).failures().items():
            fix = (
                f"make the folder and its file this key's, then `tokencore refresh {key.name}` or the next check copies"
            )
            yield Finding("exports", State.WARN, f"{place} is not up to date: {why}", fix, STORE)
    yield _disk(folder)


def _usable(folder: str) -> Finding:
    name, fix = "token directory", "give your user the right to read and write it, or point KIS_TOKEN_DIR elsewhere"
    if not os.path.lexists(folder):
        above = _existing(folder)
        if os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK):
            return Finding(name, State.OK, f"{folder} does not exist yet; the first issue makes it")
        return Finding(name, State.FAIL, f"{folder} cannot be made: {above} is not writable", fix, STORE)
    if not os.path.isdir(folder):
        fix = "move it away, or point KIS_TOKEN_DIR elsewhere"
        return Finding(name, State.FAIL, f"{folder} is no directory", fix, STORE)
    try:
        files.refuse_strangers(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", suffix=".tmp") as trial:
            trial.write(b"\n")
            trial.flush()
            os.fsync(trial.fileno())
    except TokenStoreError as error:
        return Finding(name, State.FAIL, str(error), "see there", STORE)
    except OSError as error:
        return Finding(name, State.FAIL, f"{folder} cannot be written ({error.strerror})", fix, STORE)
    mode = stat.S_IMODE(os.stat(folder).st_mode)
    if os.name == "posix" and mode & OTHERS:
        detail = f"{folder} is open to other users (mode {mode:04o})"
        return Finding(name, State.WARN, detail, f"chmod 700 {folder}")
    return Finding(name, State.OK, f"{folder}, mode {mode:04o}, can be written")


def _modes(folder: str, names: list[str]) -> Finding:
    wide = []
    for name in names if os.name == "posix" else ():
        with contextlib.suppress(OSError):
            found = os.lstat(os.path.join(folder, name))
            if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) & OTHERS:
                wide.append(name)
    if wide:
        return Finding(
            "file modes", State.WARN, f"open to more than their owner: {_some(wide)}", f"chmod go= {folder}/*"
        )
    return Finding("file modes", State.OK, "no file is open to other users")


def _leftovers(names: list[str], markets: set[str], keys: set[str]) -> Finding:
    """What nobody needs any more, and what is not ours: named, never removed.

    While the settings give no key at all, nothing is called another's: a record that is deleted is missed.
    """
    found = {
        "drafts of killed processes": [n for n in names if n.endswith(".tmp")],
        "set aside as no token of this key": [n for n in names if n.endswith(".aside")],
        "not tokencore's": [n for n in names if not _known(n)],
    }
    if keys:
        alien = [n for n in names if (of := _OF_KEY.search(n)) and of[1] not in keys]
        old = [n for n in names if (of := _OF_MARKET.fullmatch(n)) and of[1] not in markets]
        found |= {"of a key that is not configured": alien, "of a market that is not configured": old}
    detail = "; ".join(f"{what}: {_some(which)}" for what, which in found.items() if which)
    fix = "look at them, and delete those that you do not need"
    return Finding("leftover files", State.WARN, detail, fix) if detail else Finding("leftover files", State.OK, "none")


def _known(name: str) -> bool:
    return name.endswith((".tmp", ".aside")) or name.startswith(_BESIDES) or bool(_OF_MARKET.fullmatch(name))


def _lock(key: Key, *, several: bool) -> Finding:
    name = f"lock {key.fingerprint}" if several else "lock"
    try:
        with key.store.lock(wait=PATIENCE) as held:
            if held:
                return Finding(name, State.OK, "free")
    except TokenError as error:
        return Finding(name, State.FAIL, str(error), "see there", error.exit_code)
    detail = f"another process has held it for {PATIENCE:.0f} s: normal while it waits for KIS"
    return Finding(name, State.WARN, detail, "if it lasts for minutes, find that process (lslocks) and end it")


def _disk(folder: str) -> Finding:
    try:
        free = shutil.disk_usage(_existing(folder)).free
    except OSError as error:
        return Finding("disk", State.SKIPPED, f"unknown: {error.strerror}")
    detail = f"{free >> 20:,} MB free"
    if free < TOO_LITTLE:
        return Finding("disk", State.FAIL, detail, "free space: an issued token could not be saved", STORE)
    return Finding("disk", State.OK, detail) if free >= LITTLE else Finding(
        "disk", State.WARN, detail, "free space before it runs out"
    )  # fmt: skip


def _tokens(keys: list[Key]) -> Iterator[Finding]:
    """Each market's token, each key's issuance record, and the approval key where one was asked for."""
    if not keys:
        yield Finding("tokens", State.SKIPPED, "the settings must be fixed first")
    now = datetime.now(UTC)
    for key in keys:
        state = key.state(now)
        hope = f"the next renewal is planned for {format_time(at)}" if (at := state.next_attempt) else ""
        for one in status.look(key.markets, now):
            yield _token(one.status, state.serves_until, hope)
        last = latest(state.attempts)
        detail, name = "no request is on record", f"issuing {key.label}"
        if last:
            counted = f"{state.issues_last_24h} of {key.market.max_issues_per_day} issues in 24 hours"
            detail = f"last request {format_time(last.at)}: {last.outcome}; {counted}"
        if last and last.outcome in CREDENTIALS:
            fix = KNOWN[last.code][2] if last.code in KNOWN else "check the credentials; then run `tokencore refresh`"
            yield Finding(name, State.FAIL, f"{detail}; nothing tries again automatically", fix, REFUSED)
        elif state.issues_last_24h >= key.market.max_issues_per_day:
            yield Finding(name, State.WARN, detail, "wait, or find out what renews so often: tokencore history")
        else:
            yield Finding(name, State.OK, detail)
        if expires_at := approval_expiry(key.store):
            ended = "expired" if expires_at < now else "lives until"
            yield Finding(f"approval key {key.label}", State.OK, f"{ended} {format_time(expires_at)}")


def _token(one: status.MarketStatus, until: datetime | None, hope: str) -> Finding:
    name = f"token {one['market']}"
    if not one["valid"] or until is None:
        fix = f"tokencore get {one['market']}" + (f", or wait: {hope}" if hope else "")
        return Finding(name, State.FAIL, f"{one['status']}: no program can use it", fix, NO_TOKEN)
    serves = f"serves until {format_time(until)}"
    if one["next_need"] is None:
        return Finding(name, State.OK, f"{serves}; no exchange is configured")
    need = f"the need from {format_time(datetime.fromisoformat(one['next_need']['start']))}"
    if one["covers_next_need"]:
        return Finding(name, State.OK, f"{serves}; covers {need}")
    if hope:
        return Finding(name, State.OK, f"{serves}; {hope}, ahead of {need}")
    detail = f"{serves}, not through {need}, and no renewal is planned"
    return Finding(name, State.WARN, detail, "see the line on issuing")


def _kis(url: str, keys: list[Key]) -> Iterator[Finding]:
    """The gateway at `url`, its clock, and each key's token there."""
    began = time.monotonic()
    try:  # neither key nor tr_id: it counts as no call, and any answer proves name, connection and certificate
        answer = _ask("GET", f"{url}/")
    except OSError as error:
        yield Finding(
            "kis", State.FAIL, f"{url}: {error}", "check the address, the network and the firewall", UNREACHABLE
        )
        for name in ("clock", *(f"token accepted {key.label}" for key in keys)):
            yield Finding(name, State.SKIPPED, "KIS cannot be reached")
        return
    took = time.monotonic() - began
    how = f"{url} answers in {took * 1e3:.0f} ms (HTTP {answer.status_code} to GET /, which issues nothing)"
    yield Finding("kis", State.OK, how)
    yield _clock(answer.headers.get("Date", ""), took)
    for key in keys:
        yield from _accepted(key)


def _clock(date: str, took: float) -> Finding:
    try:
        ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() - took / 2 - 0.5
    except (ValueError, TypeError):
        return Finding("clock", State.SKIPPED, "KIS's answer has no Date header to compare with")
    detail = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} KIS's"
    fix = "let the system keep it by NTP (timedatectl set-ntp true)"
    if abs(ahead) > CLOCK_SLACK.total_seconds():
        return Finding("clock", State.FAIL, f"{detail}: renewals come at wrong moments", fix)
    if abs(ahead) > NOTICEABLE:
        return Finding("clock", State.WARN, detail, fix)
    return Finding("clock", State.OK, "agrees with KIS's to within seconds")


def _accepted(key: Key) -> Iterator[Finding]:
    """Quote calls with the key's token, one after the other, until one shows that KIS rejects it."""
    name, token, market = f"token accepted {key.label}", key.store.read()[0], key.market
    if token is None or not token.serves(datetime.now(UTC), market.buffer):
        yield Finding(name, State.SKIPPED, "there is no valid token to try")
        return
    gateway = Gateway(market.base_url, market.credentials(), timeout=min(market.timeout, PATIENCE))
    for what, asked, meaning in _calls([exchange(code) for code in key.exchanges]):
        said = gateway.quote(token.access_token, asked)
        if said.msg_cd == TOO_OFTEN:
            time.sleep(BREATH)
            said = gateway.quote(token.access_token, asked)
        proof = "no answer" if said.status is None else (
            f"HTTP {said.status} rt_cd={said.rt_cd or '-'} msg_cd={said.msg_cd or '-'}, rows={said.rows}"
        )  # fmt: skip
        line = f"{what}: {asked.tr_id} {asked.code} {asked.symbol} -> {proof}"
        if said.accepted is False:
            fix = (
                f"tokencore reject {key.name}, with the token on standard input, marks it dead and renews it if KIS may"
            )
            yield Finding(name, State.FAIL, f"{line}; KIS rejects the token", fix, NO_TOKEN)
            return
        if said.accepted:
            yield Finding(name, State.OK, line + meaning * (said.rows == 0))
        else:
            line = f"{line}; {said.detail}: says nothing about the token"
            yield Finding(name, State.WARN, line, "try again later; look at KIS's notices")


def _calls(places: list[Exchange]) -> Iterator[tuple[str, quotes.Quote, str]]:
    """What to ask for a key that trades on these exchanges, and what it means if no rows come."""
    abroad = next((place for place in places if place.quote_code), None)
    if abroad is None or any(place.quote_code is None for place in places):
        yield "domestic price", quotes.domestic(), ""
    if abroad and abroad.quote_code:
        symbol = quotes.SYMBOLS[abroad.quote_code]
        yield "overseas price", quotes.overseas(abroad.quote_code), ""
        yield "overseas daily price", quotes.daily(abroad.quote_code, symbol), ""
        meaning = f" - as it must be: {abroad.code} is for orders; quotes want {abroad.quote_code}"
        yield "order code", quotes.daily(abroad.code, symbol), meaning


def _slack() -> Iterator[Finding]:
    """Whether Slack would take an alert; a webhook's path is a secret and would post, so only its host is asked."""
    given = gather().values
    webhook, bot, channel = (
        str(given.get(f"SLACK_{name}") or "").strip() for name in ("WEBHOOK_URL", "BOT_TOKEN", "CHANNEL")
    )
    fix, parts = "copy it again from Slack", urlsplit(webhook)
    if not webhook and not bot:
        fix = "set SLACK_WEBHOOK_URL to hear of trouble"
        yield Finding("slack", State.SKIPPED, "not set up: alerts are logged only", fix)
    elif webhook and (not parts.hostname or parts.scheme not in ("https", "http")):
        yield Finding("slack", State.FAIL, "SLACK_WEBHOOK_URL is no address", fix)
    elif bot and not webhook and not channel:
        fix = "set it to a channel's name or ID"
        yield Finding("slack", State.FAIL, "SLACK_CHANNEL is not set, so the bot posts nowhere", fix)
    else:
        try:
            yield _webhook(parts.scheme, parts.netloc) if webhook else _bot(bot, channel)
        except OSError as error:
            yield Finding("slack", State.FAIL, str(error), "check the network and the firewall")


def _webhook(scheme: str, place: str) -> Finding:
    host = place.rpartition("@")[2]
    _ask("GET", f"{scheme}://{host}/")
    return Finding("slack", State.OK, f"{host} answers; only a message proves the webhook: make test-alert")


def _bot(token: str, channel: str) -> Finding:
    said = _json(_ask("POST", f"{SLACK_API}auth.test", headers={"Authorization": f"Bearer {token}"}))
    if not isinstance(said, dict) or not said.get("ok"):
        why = short(str(said.get("error", "no JSON") if isinstance(said, dict) else "no JSON"))
        fix = "copy SLACK_BOT_TOKEN again (xoxb-...)"
        return Finding("slack", State.FAIL, f"Slack refuses the bot: {why}", fix)
    detail = f"accepts the bot (auth.test); only a message proves {short(channel)}: make test-alert"
    return Finding("slack", State.OK, detail)


def _prefect(keys: list[Key], home: str) -> Iterator[Finding]:
    """The server, its deployments for the keys' exchanges, and its worker; `home` is where `make up` keeps them."""
    given = {**os.environ}
    with contextlib.suppress(ConfigurationError):  # the line on the settings says it
        given |= trusted_dotenv()
    api = given.get("PREFECT_API_URL", "").rstrip("/")
    url = api or f"http://127.0.0.1:{given.get('PREFECT_SERVER_API_PORT') or 4200}/api"
    parts = urlsplit(url)  # of which a password may be part
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    try:
        auth = _password(given, home)
        answer = _ask("POST", f"{url}/deployments/filter", auth=auth, json={})
        pool = _ask("GET", f"{url}/work_pools/{POOL}", auth=auth)
    except OSError as error:
        if api or os.path.isdir(home):
            fix = "make up; or name the right server in PREFECT_API_URL"
            yield Finding("prefect", State.FAIL, f"{shown}: {error}", fix)
        else:
            fix = "without one, let cron run `tokencore tick` every minute"
            yield Finding("prefect", State.SKIPPED, f"no server at {shown}", fix)
        return
    found = _json(answer)
    if answer.status_code != requests.codes.ok or not isinstance(found, list):
        fix = "set PREFECT_API_AUTH_STRING (user:password) as the server has it, or check the port"
        yield Finding("prefect", State.FAIL, f"{shown} answers HTTP {answer.status_code}", fix)
        return
    yield Finding("prefect", State.OK, f"{shown} answers")
    active = {one["name"] for one in found if isinstance(one, dict) and _scheduled(one)}
    wanted = dict.fromkeys([CHECK, *(exchange(code).code for key in keys for code in key.exchanges)])
    lacking = [name for name in wanted if name not in active]
    if lacking:
        fix = "make down, then make up: schedules follow the settings; or unpause them in the page"
        detail = f"no active schedule: {', '.join(lacking)}"
        yield Finding("prefect deployments", State.WARN, detail, fix)
    else:
        detail = f"{len(active)} with an active schedule, all that the markets need"
        yield Finding("prefect deployments", State.OK, detail)
    state = pool_state.get("status") if isinstance(pool_state := _json(pool), dict) else None
    if state == "READY":
        yield Finding("prefect worker", State.OK, f"the work pool {POOL!r} has a worker")
    else:
        why = short(str(state)) if state else f"HTTP {pool.status_code}"
        yield Finding("prefect worker", State.FAIL, f"the work pool {POOL!r} is {why}: no run starts", "make up")


def _password(given: Mapping[str, str], home: str) -> tuple[str, str] | None:
    """The server's user and password: the one that is set, else the one that `make up` has generated."""
    found = given.get("PREFECT_API_AUTH_STRING") or given.get("PREFECT_SERVER_API_AUTH_STRING") or ""
    with contextlib.suppress(ValueError):
        found = found or (files.read_text(os.path.join(home, "password")) or "").strip()
    user, _, password = found.partition(":")
    return (user, password) if user else None


def _scheduled(deployment: Mapping[str, Any]) -> bool:
    return not deployment.get("paused") and any(one.get("active") for one in deployment.get("schedules") or [])


def _duplicates(keys: list[Key]) -> Iterator[Finding]:
    """Caches of other clients that name one of the app keys; they are searched as bytes, and nothing is unpickled."""
    if not keys:
        yield Finding("duplicates", State.SKIPPED, "the settings must be fixed first")
        return
    present: dict[str, list[str]] = {}
    for key in keys:  # one app key may serve real and paper
        token = key.store.newest()
        present.setdefault(str(key.market.app_key), []).extend([token.access_token] if token else [])
    quiet = True
    for path, client in _caches().items():
        content = b""
        with contextlib.suppress(ValueError):
            content = files.read_bytes(path, CACHE_LIMIT, trusted=False) or b""
        named = [app_key for app_key in present if _names(content, app_key)]
        if not named:
            continue
        quiet = False
        if any(token.encode() in content for app_key in named for token in present[app_key]):
            yield Finding("duplicates", State.OK, f"{path} ({client}) has the same token")
        else:
            detail = f"{path} ({client}) has another token of the same key: that client issues for itself"
            fix = "delete the file; if that client is used, let tokencore feed it (tokencore export)"
            yield Finding("duplicates", State.WARN, detail, fix)
    if quiet:
        yield Finding("duplicates", State.OK, "no other client's cache holds a token of your keys")


def _caches() -> dict[str, str]:
    found = {}
    for client, patterns in OTHER_CLIENTS.items():
        for pattern in patterns:
            paths = sorted(glob.glob(os.path.expanduser(pattern)))[-MANY:]
            found |= dict.fromkeys(map(os.path.abspath, paths), client)
    return found


def _names(content: bytes, app_key: str) -> bool:
    claims = [jwt_claims(text.decode()) for text in _JWT.findall(content)]
    return app_key.encode() in content or any(one.get("jti") == app_key for one in claims)


def _ask(method: str, url: str, **fields: Any) -> requests.Response:  # noqa: ANN401 - requests' own keywords
    """Send one request; redirects are not followed, and no .netrc is read.

    Raises:
        OSError: nobody answered; the text says what failed, without the address's path.

    """
    host = urlsplit(url).hostname
    with requests.Session() as session:
        session.trust_env = host not in LOOPBACK
        session.auth = fields.pop("auth", None) or (lambda request: request)
        try:
            return session.request(method, url, timeout=PATIENCE, allow_redirects=False, **fields)
        except (requests.RequestException, OSError, ValueError) as error:
            why = _fault(error, str(host))
    raise OSError(why)


def _fault(error: Exception, host: str) -> str:
    said = str(error)
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached (HTTPS_PROXY, NO_PROXY)"
    if isinstance(error, requests.exceptions.SSLError):
        wrong = "CERTIFICATE" in said.upper()
        return f"the certificate of {host} cannot be verified" if wrong else f"{host} does not speak TLS there"
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection to {host} within {PATIENCE:.0f} s"
    if isinstance(error, requests.Timeout):
        return f"{host} accepts connections, but does not answer"
    if "NameResolution" in said:
        return f"the name {host} cannot be found (DNS)"
    return f"{host} refuses the connection" if "refused" in said else f"the connection to {host} failed"


def _json(answer: requests.Response) -> Any:  # noqa: ANN401 - any JSON
    try:
        return answer.json()
    except (ValueError, RecursionError):
        return None


def _existing(path: str) -> str:
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name)[1:-1] for name in names[:SHOWN]) + more
