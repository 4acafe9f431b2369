"""`tokencore doctor`: check everything that a working set-up needs, and say how to fix what is wrong.

Nothing is issued or posted, and no token is written. Each lock is taken for a moment, and a temporary file is created
where tokens are saved. No single wait for a server or a lock is longer than `PATIENCE`, except the quote call, whose
time-out is KIS_TIMEOUT.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from tokencore.attempts import CREDENTIALS, latest
from tokencore.clients.exports import Exports
from tokencore.config import market as values
from tokencore.config.settings import Settings
from tokencore.config.sources import CONFIG_FILE, DOTENV_FILE, FILE_LIMIT, Found, gather, place_of, trusted_dotenv
from tokencore.errors import ConfigurationError, TokenError
from tokencore.keys import Key
from tokencore.kis import codes
from tokencore.kis.http import NoAnswer, send
from tokencore.redaction import printable, short
from tokencore.stores import check_store, files, permissions
from tokencore.tokens import format_time, jwt_claims, jwts_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import timedelta

    from tokencore.config.market import Market
    from tokencore.keys import KeyState

UNEXPECTED, SETTINGS, NO_TOKEN, REFUSED, UNREACHABLE, STORE = 1, 2, 3, 5, 6, 7  # exit codes, the same as the commands'
PATIENCE = 4.0  # seconds to connect, for each wait for data, and for a lock
PUBLIC = (
    *("ENVIRONMENT", "BASE_URL", "TOKEN_DIR", "EXCHANGES", "EXPORTS", "CLOSED", "EXTENDED", "ISSUE_INTERVAL"),
    *("KEYRING", "BUFFER", "PROACTIVE_WINDOW", "TIMEOUT", "MAX_ISSUES_PER_DAY", "PROVE_TOKENS", "SLACK_CHANNEL"),
)  # settings whose values may be shown; any other value might be secret
CREDENTIAL = ("APP_KEY", "APP_SECRET", "_TOKEN", "HOOK_URL")  # endings of the variables that hold credentials
LENGTHS = {"APP_KEY": codes.KEY_LENGTH, "APP_SECRET": codes.SECRET_LENGTH}
LONGEST, SHOWN = 60, 3  # how many characters of a value, and how many names in a line, are shown
OTHERS = 0o077 if os.name == "posix" else 0  # permission bits of group and others
LITTLE = 100 << 20  # bytes free, below which there is a warning
NOTICEABLE = 5.0  # seconds: the Date header is in whole seconds, and the answer itself takes some time
PROOF = "only a message proves it: make test-alert"
SLACK_API = "https://slack.com/api/"
PASSWORDS = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")  # the variables that may hold `user:password`
POOL = "tokens"  # the work pool of prefect.yaml
CACHES = {  # caches of other clients, each of which would issue tokens for itself
    "token.dat": "mojito2",
    "~/token.dat": "mojito2",
    "~/.pykis/cache/*.json": "python-kis",
    "~/KIS/config/KIS*": "KIS's sample (kis_auth)",
    "~/.cache/kis/token.key": "korea-investment-stock",
}
MANY = 64  # how many files of one pattern are searched
_OF_MARKET = r"(.+)_(?:api_token\.json|token_issued_at\.dat|krs_token\.dat|approval_key\.json)"
LEFTOVERS = {  # recognized by file name; the group in parentheses is the key or market that the file belongs to
    "drafts of killed processes": r".*\.tmp",
    "set aside as no token of this key": r".*\.aside",
    "of a key that is not configured": r".*?key-([0-9a-f]{16})\b.*",
    "of a market that is not configured": _OF_MARKET,
}
NETWORK = "check the address, the network and the firewall"
FOLLOW = "follow this message"


class Finding(NamedTuple):
    """The result of one check: its state, what was checked, the detail, and the fix, which programs know as `cure`.

    The state is `ok`, `warn` (it works, but needs attention), `fail`, or `skipped` (not used, or could not be
    checked). The command's exit code is that of the first `fail`, or 1 if there are only warnings.
    """

    state: str
    name: str
    detail: str
    cure: str = ""
    exit_code: int = UNEXPECTED


_ok, _warn, _fail, _skipped = (partial(Finding, state) for state in ("ok", "warn", "fail", "skipped"))


class Subject(NamedTuple):
    """What the checks work on: the values found, the token directory, the settings and their keys, and any `problem`.

    With a problem, what it makes unusable is empty.
    """

    found: Found
    folder: str
    settings: Settings | None
    keys: list[Key]
    problem: str


def examine() -> list[Finding]:
    """Run all checks and return their findings in the order in which to fix them."""
    found, folder, settings, problem = Found(), "", None, ""
    keys: list[Key] = []
    try:
        found = gather()
        with contextlib.suppress(ValueError, TypeError):  # `Settings.load` says what is wrong with it
            folder = values.folder(found.values.get("KIS_TOKEN_DIR", values.TOKEN_DIR))
        settings = Settings.load()
        keys = Key.load(settings)
    except TokenError as error:
        problem = str(error)
    it, findings = Subject(found, folder, settings, keys, problem), list[Finding]()
    for name, (check, needed) in CHECKS.items():
        able = getattr(it, needed)
        findings += _tried(name, check(it)) if able else [_skipped(name, "the settings must be fixed first")]
    return _without_repetitions(findings)


def _without_repetitions(findings: list[Finding]) -> list[Finding]:
    """Return the findings; where one error stops several checks, the later ones only name the first."""
    first: dict[str, str] = {}
    told = [first.setdefault(one.detail, one.name) if one.cure == FOLLOW else one.name for one in findings]
    return [
        one if name == one.name else _skipped(one.name, f"{name} must be fixed first")
        for one, name in zip(findings, told, strict=True)
    ]


def _tried(name: str, check: Iterable[Finding]) -> Iterator[Finding]:
    """Yield what `check` finds; an exception in it becomes one more finding, so that it hides no other check."""
    try:
        yield from check
    except TokenError as error:
        yield _fail(name, str(error), FOLLOW, error.exit_code)
    except NoAnswer as error:
        yield _fail(name, str(error), NETWORK)
    except Exception as error:  # noqa: BLE001 - its text may hold anything
        yield _fail(name, f"could not be looked at ({type(error).__name__})", "please report this line")


def _judged(name: str, detail: str, fix: str) -> Finding:
    """Return a warning if there is a fix, else `ok`."""
    return _warn(name, detail, fix) if fix else _ok(name, detail)


def _settings(it: Subject) -> Iterator[Finding]:
    """Check that the settings can be used and their files are private; list each one that is set, with its origin."""
    origins, unknown = it.found.origins, it.settings.misspelt() if it.settings else {}
    if it.problem:
        yield _fail("settings", it.problem, "follow this message; what is set, and where, is listed below", SETTINGS)
    else:
        yield _ok("settings", f"{len(origins)} set, all well-formed")
    yield from (_setting(name, it.found.values[name], origins[name]) for name in sorted(origins.keys() - unknown))
    for name, meant in unknown.items():
        fix = f"did you mean {meant}?" if meant else "remove it, unless another program uses it"
        yield (_warn if meant else _skipped)(f"setting {short(name)}", "is not a setting of tokencore", fix)
    for name in sorted(_missing_secrets(it.found.values)):
        yield _warn(f"setting {name}", "not set, so this market's app key is sent with the secret of others", "set it")
    for path in {path for name, path in origins.items() if name.endswith(CREDENTIAL)} & {DOTENV_FILE, CONFIG_FILE}:
        if _is_wide(os.path.expanduser(path)):
            yield _warn("settings file", f"{path} holds credentials, and other users may read it", f"chmod 600 {path}")
    if it.settings:
        kept = it.settings.origins.items() - origins.items()
        yield from (_ok(f"setting {name}", f"kept, in {origin}") for name, origin in sorted(kept))


def _missing_secrets(values: Mapping[str, object]) -> set[str]:
    """Return the variables of secrets that are missing beside a market's own app key; a keyring may have them."""
    own = {name for name in values if name.endswith("__APP_KEY") and values[name] != values.get("KIS_APP_KEY")}
    return {f"{name.removesuffix('KEY')}SECRET" for name in own if "KIS_KEYRING" not in values} - values.keys()


def _setting(name: str, value: object, origin: str) -> Finding:
    field = name.rpartition("__")[2].removeprefix("KIS_")
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip()
    shown = printable(text[:LONGEST]) + "..." * (len(text) > LONGEST)
    if field not in PUBLIC or "@" in text or "?" in text:
        shown = f"{len(text)} characters"
    usual = LENGTHS.get(field, len(text))
    odd = "" if len(text) == usual else f"; KIS's have {usual}: copy it again if KIS refuses it"
    return _ok(f"setting {short(name)}", f"{shown}, from {place_of(origin)}{odd}")


def _directory(it: Subject) -> Iterator[Finding]:
    """Try out the folder and the locks; check the files in it and the disk."""
    folder = above = it.folder
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    yield from _tried("token directory", _usable(folder, above))
    if os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK):
        names = sorted(os.listdir(folder))
        wide = [name for name in names if _is_wide(os.path.join(folder, name))]
        detail = f"open to more than their owner: {_some(wide)}" if wide else "no file is open to other users"
        yield _judged("file modes", detail, f"chmod go= {folder}/*" if wide else "")
        yield _leftovers(names, it)
        for key in it.keys:
            name = f"lock {key.fingerprint}" if len(it.keys) > 1 else "lock"
            yield from _tried(name, _lock(key, name))
    if os.path.exists(above):  # else it is a link that leads nowhere
        free = shutil.disk_usage(above).free
        yield _judged("disk", f"{free >> 20:,} MB free", "free space before it runs out" if free < LITTLE else "")


def _usable(folder: str, above: str) -> Iterator[Finding]:
    """Check that tokens can be saved in `folder`; `above` is `folder`, or its nearest parent that exists."""
    name = "token directory"
    if above == folder and os.path.isdir(folder):  # checked before anything is written into it
        permissions.refuse_strangers(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=above, prefix=".doctor-", suffix=".tmp", buffering=0) as trial:
            trial.write(b"\n")
            os.fsync(trial.fileno())
    except OSError as error:
        fix = "free space, give your user the right to read and write there, or point KIS_TOKEN_DIR elsewhere"
        yield _fail(name, f"{above} cannot be read and written ({error.strerror})", fix, STORE)
        return
    if above == folder:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        yield _judged(name, f"{folder}, mode {mode:04o}", f"chmod 700 {folder}" if mode & OTHERS else "")
    else:
        yield _ok(name, f"{folder} does not exist yet; the first issue makes it")


def _is_wide(path: str) -> bool:
    """Whether it is a file that users other than its owner can access; False if it has just disappeared."""
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        return stat.S_ISREG(mode) and bool(mode & OTHERS)
    return False


def _leftovers(names: list[str], it: Subject) -> Finding:
    """Name the files that nobody needs any more, or that belong to other keys or markets; nothing is removed.

    If the settings give no key at all, no file counts as another's: nobody should delete a record that is still needed.
    """
    owners = {key.fingerprint for key in it.keys}
    if it.settings and it.keys:
        owners |= {market.name for market in it.settings.all_markets()}
    found: dict[str, list[str]] = {}
    for what, pattern in LEFTOVERS.items():
        for name in names:
            fits = re.fullmatch(pattern, name, re.ASCII | re.DOTALL)
            if fits and (not fits.groups() or (owners and fits[1] not in owners)):
                found.setdefault(what, []).append(name)
    detail = "; ".join(f"{what}: {_some(which)}" for what, which in found.items())
    return _judged("leftover files", detail or "none", detail and "look at them, and delete those that you do not need")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name)[1:-1] for name in names[:SHOWN]) + more


def _lock(key: Key, name: str) -> Iterator[Finding]:
    with key.store.lock(wait=PATIENCE) as free:
        who = "" if free else _holders(os.path.join(key.market.token_dir, f"key-{key.fingerprint}.lock"))
    detail = f"held by {who} for {PATIENCE:g} s: normal while that waits for KIS" if who else "free"
    yield _judged(name, detail, "if it lasts for minutes, end that process" if who else "")


def _holders(path: str) -> str:
    """Name who holds a lock on the file; Linux lists locks as `1: FLOCK ADVISORY WRITE 71 08:01:913 0 EOF`."""
    with contextlib.suppress(OSError, ValueError):
        place, listed = f":{os.stat(path).st_ino} ", files.read_bytes("/proc/locks", trusted=False) or b""
        if holders := [one.split()[4] for one in listed.decode().splitlines() if place in one and " -> " not in one]:
            return f"process {', '.join(holders)}"
    return "another process"


def _tokens(it: Subject) -> Iterator[Finding]:
    """Check each market's token, its copies and the key's record; report the approval key if one was requested."""
    yield from (one for key in it.keys for one in _tried(f"token {key.name}", _key(key)))


def _key(key: Key) -> Iterator[Finding]:
    state = key.state(datetime.now(UTC))
    yield from (_token(state, market) for market in key.markets)
    for place, why in Exports(key.markets, key.store).failures().items():
        fix = "fix or remove what is there; the next renewal or hourly check copies again"
        yield _warn("exports", f"{place} is not up to date: {why}", fix)
    name, last, allowed = f"issuing {key.label}", latest(state.attempts), key.market.settings.max_issues_per_day
    counted = f"{state.issues_last_24h} of {allowed} issues in 24 hours"
    asked = f"last request {format_time(last.at)}: {last.outcome}; {counted}" if last else "no request is on record"
    if last and last.outcome in CREDENTIALS:
        known = codes.KNOWN.get(last.code or "")
        fix = known[2] if known else "check the credentials; then run `tokencore refresh MARKET`"
        yield _fail(name, f"{asked}; nothing tries again automatically", fix, REFUSED)
    else:
        over = state.issues_last_24h >= allowed
        yield _judged(name, asked, "wait, or find out what renews so often: tokencore history" if over else "")
    if expires_at := state.approval_expires_at:
        lives = "expired at" if expires_at < state.now else "lives until"
        yield _ok(f"approval key {key.label}", f"{lives} {format_time(expires_at)}")


def _token(state: KeyState, market: Market) -> Finding:
    name, need, at = f"token {market.name}", state.need_of(market), state.next_attempt
    hope = f"the next renewal is planned for {format_time(at)}" if at else "no renewal is planned"
    if not state.serves_until:
        fix = state.forbidden or f"tokencore get {market.name}" + (f", or wait: {hope}" if at else "")
        return _fail(name, f"{state.status}: no program can use it", str(fix), NO_TOKEN)
    detail, covered = f"serves until {format_time(state.serves_until)}", not need or state.lasts(need[1])
    if need:
        detail += f"; {'covers' if covered else f'{hope}, ahead of'} the need from {format_time(need[0])}"
    return _judged(name, detail, "" if covered or at else "see the line on issuing")


def _kis(it: Subject) -> Iterator[Finding]:
    """Check that each gateway answers, that its clock agrees with ours, and that it accepts the tokens."""
    for url in dict.fromkeys(key.market.base_url for key in it.keys):
        keys, began = [key for key in it.keys if key.market.base_url == url], time.monotonic()
        try:  # without key and tr_id it is not an API call, and any answer proves DNS, connection and certificate
            answer = send("GET", f"{url}/", timeout=PATIENCE)
        except NoAnswer as error:
            yield _fail("kis", f"{url}: {error}", NETWORK, UNREACHABLE)
            names = ("clock", *(f"token accepted {key.label}" for key in keys))
            yield from (_skipped(name, "KIS cannot be reached") for name in names)
            continue
        took = f"{(time.monotonic() - began) * 1e3:.0f} ms"
        yield _ok("kis", f"{url} answers in {took} (HTTP {answer.status} to GET /, which issues nothing)")
        yield _clock(answer.clock_ahead())
        yield from (one for key in keys for one in _tried(f"token accepted {key.label}", _accepted(key)))


def _clock(difference: timedelta | None) -> Finding:
    if difference is None:
        return _skipped("clock", "KIS's answer has no Date header to compare with")
    ahead = difference.total_seconds() - 0.5
    if abs(ahead) <= NOTICEABLE:
        return _ok("clock", "agrees with KIS's within seconds")
    detail = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} KIS's, so renewals come too early or too late"
    return _warn("clock", detail, "let the system keep it by NTP (timedatectl set-ntp true)")


def _accepted(key: Key) -> Iterator[Finding]:
    """Check that KIS accepts the key's token on a quote call."""
    name, token = f"token accepted {key.label}", key.store.read()[0]
    if token is None or not token.serves(datetime.now(UTC), key.market.buffer):
        yield _skipped(name, "there is no valid token to try")
        return
    said = key.prove(token)
    if said.accepted:
        yield _ok(name, f"KIS answers a quote call with it (HTTP {said.status}, {said.detail})")
    elif said.accepted is None:
        yield _warn(name, f"{said.detail}: says nothing about the token", "try again later; look at KIS's notices")
    else:
        fix = (
            f"tokencore get {key.name} | tokencore reject {key.name}: marked dead, and renewed once KIS issues another"
        )
        yield _fail(name, f"KIS rejects the token ({said.detail})", fix, NO_TOKEN)


def _slack(it: Subject) -> Iterator[Finding]:
    """Check that Slack would accept an alert: by the bot if it has a channel, else by the webhook, as they are sent."""
    names = ("SLACK_WEBHOOK_URL", "SLACK_BOT_TOKEN", "SLACK_CHANNEL")
    webhook, bot, channel = (str(it.found.values.get(name, "")).strip() for name in names)
    if bot and channel:
        headers = {"Authorization": f"Bearer {bot}"}
        said = send("POST", f"{SLACK_API}auth.test", timeout=PATIENCE, headers=headers).body
        if said.get("ok"):
            yield _ok("slack", f"accepts the bot for {short(channel)}; {PROOF}")
        else:
            why = short(str(said.get("error", "no answer from Slack")))
            yield _fail("slack", f"Slack refuses the bot: {why}", "copy SLACK_BOT_TOKEN again (xoxb-...)")
    elif webhook:
        yield _webhook(webhook)
    elif bot:
        yield _fail("slack", "SLACK_CHANNEL is not set, so the bot posts nowhere", "set it to a name or ID")
    elif channel:
        yield _fail("slack", "SLACK_BOT_TOKEN is not set, so nothing posts to SLACK_CHANNEL", "set it (xoxb-...)")
    else:
        yield _skipped("slack", "not set up: alerts are logged only", "set SLACK_WEBHOOK_URL to hear of trouble")


def _webhook(address: str) -> Finding:
    """Check the webhook's host only: the path is a secret, and would post."""
    parts = urlsplit(address)
    if not (parts.hostname and parts.scheme in ("https", "http")):
        return _fail("slack", "SLACK_WEBHOOK_URL is not an address", "copy it again from Slack")
    send("GET", f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/", timeout=PATIENCE)
    return _ok("slack", f"{parts.hostname} answers; {PROOF}")


def _prefect(it: Subject) -> Iterator[Finding]:
    """Check the Prefect server and its worker; `make status` reports on the deployments."""
    home = os.path.join(it.folder, "prefect")  # where `make up` keeps them
    named, url, auth = _server(home)
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # a password may be part of it
    try:
        answer = send("GET", f"{url}/work_pools/{POOL}", timeout=PATIENCE, auth=auth)
    except NoAnswer as error:
        if named or os.path.isdir(home):
            yield _fail("prefect", f"{shown}: {error}", "make up; or name the right server in PREFECT_API_URL")
        else:
            yield _skipped(
                "prefect", f"no server at {shown}", "without one, let cron run `tokencore tick` every minute"
            )
        return
    status = short(str(answer.body.get("status", "")))
    if not status:
        fix = "make up; set PREFECT_API_AUTH_STRING (user:password) to the server's, or check the port"
        yield _fail("prefect", f"{shown} does not answer as our server does (HTTP {answer.status})", fix)
    elif status != "READY":
        yield _fail("prefect", f"{shown} has no worker (the work pool {POOL!r} is {status}): no run starts", "make up")
    else:
        yield _ok("prefect", f"{shown} answers and has a worker; make status says more")


def _server(home: str) -> tuple[bool, str, tuple[str, str] | None]:
    """Return whether PREFECT_API_URL is set, the address, and the user and password, set or generated by `make up`.

    `.env` may not give the address to which a password from the environment or from `make up` is sent.
    """
    given: Mapping[str, str] = os.environ
    if not any(map(given.get, PASSWORDS)):
        with contextlib.suppress(ConfigurationError):  # the finding on the settings reports it
            given = {**os.environ, **trusted_dotenv()}
    api, login = given.get("PREFECT_API_URL", ""), next(filter(None, map(given.get, PASSWORDS)), "")
    if not login and api == os.environ.get("PREFECT_API_URL", ""):
        with contextlib.suppress(ValueError):
            login = (files.read_text(os.path.join(home, "password")) or "").strip()
    user, _, password = login.partition(":")
    url = api.rstrip("/") or f"http://127.0.0.1:{given.get('PREFECT_SERVER_API_PORT') or 4200}/api"
    return bool(api), url, (user, password) if user and (api or not _is_stopped(home)) else None


def _is_stopped(home: str) -> bool:
    """Whether `make up` has run here and its supervisord does not: whoever listens on the server's port is another."""
    if sys.platform == "win32" or not os.path.exists(os.path.join(home, "supervisord.conf")):
        return False
    with socket.socket(socket.AF_UNIX) as asked:
        return asked.connect_ex(os.path.join(home, "sock")) != 0


def _duplicates(it: Subject) -> Iterator[Finding]:
    """Look for other clients' caches that hold another token of one of our app keys."""
    present: dict[str, list[bytes]] = {}
    for key in it.keys:  # the same app key may be used in both environments, real and paper
        token = key.store.newest()
        present.setdefault(str(key.market.app_key), []).extend([token.access_token.encode()] if token else [])
    found = [
        f"{os.path.abspath(path)} ({client})"
        for pattern, client in CACHES.items()
        for path in sorted(glob.glob(os.path.expanduser(pattern)))[-MANY:]
        if _has_another(path, present)
    ]
    detail = f"caches that hold another token of the same key: {', '.join(found)}" if found else ""
    fix = "if that client is used, let tokencore feed it (tokencore export); otherwise delete the file"
    yield _judged("duplicates", detail or "no other client's cache holds another token of your keys", detail and fix)


def _has_another(path: str, present: Mapping[str, list[bytes]]) -> bool:
    """Whether a file holds an app key, in clear or in a JWT, but none of its tokens; its bytes are never unpickled."""
    content = b""
    with contextlib.suppress(ValueError):
        content = files.read_bytes(path, FILE_LIMIT, trusted=False) or b""
    owners = [jwt_claims(text).get("jti") for text in jwts_in(content)]
    named = [app_key for app_key in present if app_key in owners or app_key.encode() in content]
    return bool(named) and not any(token in content for app_key in named for token in present[app_key])


def _store(it: Subject) -> Iterator[Finding]:
    """Check the store that machines share."""
    found = [Finding(*one) for one in check_store(it.settings)] if it.settings else []
    yield from found or [_skipped("store", "KIS_STORE is not set: this machine keeps its tokens for itself")]


CHECKS: dict[str, tuple[Callable[[Subject], Iterator[Finding]], str]] = {
    "settings": (_settings, "found"),
    "token directory": (_directory, "folder"),
    "store": (_store, "keys"),
    "tokens": (_tokens, "keys"),
    "kis": (_kis, "keys"),
    "slack": (_slack, "keys"),
    "prefect": (_prefect, "folder"),
    "duplicates": (_duplicates, "keys"),
}
"""The checks in the order in which to fix what they find, and the field of `Subject` without which each is skipped."""
