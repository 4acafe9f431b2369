"""Every parser that reads what this package did not write, as a function of bytes that raises where it fails.

What is promised: any bytes are read as something or as nothing, or are refused by a documented error, whose message
is one line and holds no credential; and what was read can be written and read again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import requests
from builders import KEY, NOW, SECRET, make_answer, make_jwt, make_market, make_url
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from tokencore import cache, clients, errors, exports, flatjson, imports, ownership, settings, sources
from tokencore.configured import Configured
from tokencore.issuer import Issuer
from tokencore.record import IssuanceRecord
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Callable

STATUSES = (200, 200, 403, 500, 302)  # of an answer, by its first byte
WINDOW = 20  # signs of a credential in a row are a part that tells too much
OTHER_KEY = "PSOtherKey" + "o" * 26
_QUIET = ("KIS_", "SLACK_")
_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a disk's own fsync proves nothing here
_place = tempfile.TemporaryDirectory(dir=_memory)
FOLDER = Path(_place.name)


def told(text: str) -> None:
    """What holds of every sentence for people."""
    assert "\n" not in text, "more than one line"
    assert len(text) < 2_000, "endless"
    for secret in (KEY, SECRET):
        pieces = {secret[at : at + WINDOW] for at in range(len(secret) - WINDOW)}
        assert not any(piece in text for piece in pieces), "a credential in a message"


def token_file(content: bytes) -> None:
    """A token or a reason; what is a token can be saved and is the same token then."""
    own = cache.Cache(str(FOLDER), make_url(), "real", KEY, ["us_"])
    Path(own.path).write_bytes(content)
    token, problem = own.read()
    assert token is None or not problem
    told(problem)
    if token:
        _same_again(token)


def json_text(content: bytes) -> None:
    """The light reader and `json` make the same of a text."""
    with contextlib.suppress(UnicodeDecodeError):
        text = content.decode()
        assert _outcome(flatjson.loads, text) == _outcome(json.loads, text)


def record_lines(content: bytes) -> None:
    """Whatever could be read of a record can be written again, as a cut of the record does."""
    record, again = (IssuanceRecord(str(FOLDER), name * 16) for name in "01")
    Path(record.path).write_bytes(content)
    record.attempts()
    history = record.read()
    history.totals()
    Path(again.path).unlink(missing_ok=True)
    for attempt in history.attempts[:4]:
        again.begin(attempt)
    assert len(again.attempts()) == len(history.attempts[:4]), "a line that was read is lost when it is written again"


def mark(content: bytes) -> None:
    """A time that can be counted with, or none."""
    own = cache.Cache(str(FOLDER), make_url(), "real", KEY, ["mark_"])
    (FOLDER / "mark_token_issued_at.dat").write_bytes(content)
    found = own.issued_mark()
    assert found is None or found.tzinfo is UTC


def answer(content: bytes) -> None:
    """A token, a key, a proof, or a refusal in words without anything secret; the first byte says with which status."""
    status, body = STATUSES[content[0] % len(STATUSES)] if content else 200, content[1:]

    def send(_: HTTPAdapter, request: requests.PreparedRequest, **__: object) -> requests.Response:
        response = requests.Response()
        response.status_code, response.request, response.url = status, request, str(request.url)
        response.raw = HTTPResponse(io.BytesIO(body), preload_content=False, status=status)
        return response

    issuer = Issuer("https://kis.invalid", KEY, SECRET, timeout=1)
    with patch.object(HTTPAdapter, "send", send):
        issued, approved = issuer.issue(), issuer.approve()
        told(issuer.probe("opaque", domestic=True)[1])
        try:
            issuer.revoke("opaque")
        except (errors.IssuerUnavailableError, errors.IssuerRefusedError) as error:
            told(str(error))
    for refusal in (issued, approved):
        if not isinstance(refusal, Token | str):
            told(f"{refusal.what} {refusal.cure} {refusal.code}")
    if isinstance(issued, Token):
        _same_again(issued)


def dotenv(content: bytes) -> None:
    """Settings, or one sentence that says which line or name is wrong."""
    _load(FOLDER / ".env", content)


def config(content: bytes) -> None:
    """The same of the file in the home."""
    _load(FOLDER / ".tokencore" / "config.toml", content)


def standard_input(content: bytes) -> None:
    """A token of the key that can be saved, or a sentence."""
    try:
        token = imports.read(content.decode(errors="surrogateescape"), make_market(), datetime.now(UTC))
    except (errors.ConfigurationError, errors.TokenUnavailableError) as error:
        told(str(error))
    else:
        imports.names_its_key(token)
        _same_again(token)


def foreign_file(content: bytes) -> None:
    """A file is overwritten or removed only where it is empty or names this key; else it stays as it was."""
    folder = FOLDER / "kis-auth"
    folder.mkdir(exist_ok=True)
    holder = clients.Holder("0" * 16, (KEY, SECRET), "real", None)
    owned = ownership.Ownership(str(FOLDER), holder, sole=True)
    to, token = clients.Target("kis-auth", str(folder)), Token("opaque", NOW)
    (name, *_) = clients.CLIENTS["kis-auth"].files(to, holder, token, datetime.now(UTC))
    (folder / name).write_bytes(content)
    exports.current(to, holder, token)
    try:
        exports.write(to, holder, token, owned)
    except errors.ConfigurationError as error:
        told(str(error))
        exports.withdraw(to, holder, owned)
        assert (folder / name).read_bytes() == content, "another's file was touched"
    else:
        named = KEY.encode() in content or b"eyJ" in content or b"opaque" in content or b"." in content
        assert named or not content.strip(), "a file that names nobody was overwritten"


def _same_again(token: Token) -> None:
    own = cache.Cache(str(FOLDER), make_url(), "real", KEY, ["again_"])
    own.save(token, datetime.now(UTC))
    found, problem = own.read()
    assert problem in ("", cache.FOREIGN), problem
    assert found is None or found.access_token == token.access_token
    assert found is None or found.expires_at <= token.expires_at, "a token lives longer by being saved"


def _outcome(read: Callable[[str], Any], text: str) -> str:
    try:
        return repr(read(text))
    except RecursionError:
        return "RecursionError"
    except ValueError:
        return "ValueError"


def _load(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    surroundings = {name: value for name, value in os.environ.items() if not name.upper().startswith(_QUIET)}
    before = Path.cwd()
    os.chdir(FOLDER)
    try:
        with patch.dict(os.environ, {**surroundings, "HOME": str(FOLDER)}, clear=True):
            settings.Settings.load()
            sources.gather()
            configured = Configured()
            for name in ("us", "kr"):
                configured.market(name)
            settings.unknown_names()
    except errors.ConfigurationError as error:
        told(str(error))
    finally:
        os.chdir(before)
        path.unlink()


def _jwt(life: float = 86_400) -> str:
    return make_jwt(life=life, issued=NOW)


_TOKEN = json.dumps(
    {
        "access_token": _jwt(),
        "expires_at": "2099-01-01T00:00:00+00:00",
        "cached_at": "2026-11-23T08:15:00+00:00",
        "issued_at": "2026-11-23T08:15:00+00:00",
        "token_type": "Bearer",
        "environment": "real",
    }
).encode()
_OLD = json.dumps({"access_token": "opaque", "expires_at": 4070908800, "created_at": "2026-11-23T08:15:00"}).encode()
_LINE = json.dumps(
    {
        "at": "2026-11-23T08:15:00.000+00:00",
        "outcome": "issued",
        "code": "EGW00133",
        "expires_at": "2026-11-24T08:15:00+00:00",
        "reason": "get us",
        "by": "",
        "credentials": "0123abcd",
        "pid": 77,
    }
).encode()
_JSON = (b"{}", b"[]", b"null", b"NaN", b'{"a": 1e400}', b'{"a": "b", "a": 1}', b"\xef\xbb\xbf{}", b'{"a":' * 9)
_REFUSED = json.dumps({"error_code": "EGW00103", "error_description": f"bad {KEY} {SECRET}", "rt_cd": "1"}).encode()
_ENV = f"KIS_APP_KEY={KEY}\nKIS_APP_SECRET='{SECRET}'\nKIS_MARKETS__US__EXCHANGES=NASD,NYSE\n".encode()
_TOML = f"""app_key = "{KEY}"
timeout = 5
[markets.us]
app_secret = "{SECRET}"
exchanges = ["NASD"]
[exchanges.KRX]
closed = [2026-12-31]
hours = {{ 2026-12-30 = "10:00-15:30" }}
""".encode()

PARSERS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "token file": (token_file, (_TOKEN, _OLD, *_JSON)),
    "light JSON": (json_text, (_TOKEN, _OLD, _LINE, *_JSON)),
    "record": (
        record_lines,
        (
            _LINE + b" " * (511 - len(_LINE)) + b"\n",
            _LINE.replace(b"EGW00133", b"E" * 600),
            _LINE.replace(b"0123abcd", b"E" * 600),
            _LINE.replace(b"77", b"7" * 600),
            _LINE.replace(b'"EGW00133"', b'{"a": []}'),
            _LINE.replace(b"get us", b"\\ud800" * 90),
            b'{"cut": {"issued": 7}}\n' + _LINE,
            *_JSON,
        ),
    ),
    "mark": (mark, (b"1795421700\n", b"1795421700.25", b"nan", b"-1e300", b"9" * 400)),
    "KIS": (
        answer,
        (
            b"\0" + json.dumps(make_answer(now=NOW.replace(year=2098))).encode(),
            b"\2" + _REFUSED,
            b"\3<html>" + KEY.encode() + b"</html>",
            b'\0{"rt_cd": "0", "msg_cd": ["EGW00123"], "output": [], "approval_key": "a"}',
            b'\0{"access_token": "a", "expires_in": "86400", "access_token_token_expired": "2098-01-01 00:00:60"}',
            *(b"\0" + text for text in _JSON),
        ),
    ),
    ".env": (
        dotenv,
        (
            _ENV,
            b'export "KIS_APP_KEY"="a\\nb"\n# \xff',
            b"KIS_SECRETS_DIR='a\0b'\n",
            b"KIS_TOKEN_DIR='a\0b'\n",
            b"KIS_" + b"A__" * 3000 + b"A=1",
            b"KIS_TIMEOUT=" + b"9" * 400,
            b"'KIS_MARKETS__a\nb__X'=1\nKIS_MARKETS=1",
        ),
    ),
    "config.toml": (
        config,
        (
            _TOML,
            b"a = " + b"[" * 5000,
            b"a" + b".a" * 3000 + b" = 1",
            b"timeout = 1" + b"0" * 400,
            b"max_issues_per_day = inf",
            b"'a\nb' = 1",
            f"ex{SECRET[20:42]}.x = 1\nmarkets.us.{SECRET[20:42]} = 1".encode(),
            b'"a\\nb" = 1',
            b'[markets."a\\nb"]\nx = 1',
            b'exchanges."a\\nb" = 1\nexchanges.b.hours.x = 1',
            b"markets = []",
            b"app_key = [1]\ntoken_dir = 7\nexchanges.KRX = []",
        ),
    ),
    "standard input": (
        standard_input,
        (
            _TOKEN,
            b"Bearer " + _jwt(life=9e9).encode(),
            json.dumps({**json.loads(_OLD), "environment": f"{KEY}\n{SECRET}"}).encode(),
            json.dumps({**json.loads(_OLD), "environment": ["x" * 9000]}).encode(),
            _OLD,
            *_JSON,
        ),
    ),
    "foreign file": (
        foreign_file,
        (
            b"token: " + _jwt().encode() + b"\nvalid-date: 2026-11-24 08:15:00\n",
            b"token: " + make_jwt(OTHER_KEY).encode(),
            b"token: " + make_jwt(jti=[KEY]).encode(),
            b"token: " + make_jwt(jti={}).encode(),
            KEY.encode(),
            b"x\n",
        ),
    ),
}
