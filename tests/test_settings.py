"""Where settings come from, what they may be, and that the quick and the validated way to read them agree."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import KEY, SECRET, make_market
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tokencore import overrides, sources
from tokencore.errors import ConfigurationError
from tokencore.market import HOSTS, Market, market_names
from tokencore.settings import Settings, unknown_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The environment with these variables more, as hypothesis needs it: for each example anew."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def config(text: str) -> Path:
    """`~/.tokencore/config.toml` with this text."""
    path = Path.home() / ".tokencore" / "config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def secret(name: str, text: str) -> Path:
    """A secrets folder with one file more."""
    folder = Path("secrets").absolute()
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def market(name: str = "us") -> Market:
    """The market as a cached `get` sees it."""
    return Market(name, sources.gather().values)


def refusal() -> str:
    """The one sentence with which the settings are refused."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.load()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_environment_beats_dotenv_beats_secrets_beats_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all four sources present the first one counts, then the next one when it is gone."""
    config('issue_interval = 64\n[markets.hk]\nexchanges = ["SEHK"]\nbase_url = "https://config"\n')
    folder = secret("KIS_ISSUE_INTERVAL", "63\n")
    secret("KIS_MARKETS__HK__BASE_URL", "https://secret\n")
    dotenv = Path(".env")
    dotenv.write_text("KIS_ISSUE_INTERVAL=62\nexport KIS_MARKETS__HK__BASE_URL='https://dotenv'\n", encoding="utf-8")
    monkeypatch.setenv("KIS_SECRETS_DIR", str(folder))
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "61")
    monkeypatch.setenv("KIS_MARKETS__HK__BASE_URL", "https://environment")
    seen = []
    for last in ("environment", "dotenv", "secrets", "config"):
        assert Settings.load().issue_interval == market().issue_interval
        seen.append((market().issue_interval, market("hk").base_url))
        if last == "environment":
            monkeypatch.delenv("KIS_ISSUE_INTERVAL")
            monkeypatch.delenv("KIS_MARKETS__HK__BASE_URL")
        elif last == "dotenv":
            dotenv.unlink()
        else:
            monkeypatch.delenv("KIS_SECRETS_DIR", raising=False)
    assert seen == [
        (61, "https://environment"),
        (62, "https://dotenv"),
        (63, "https://secret"),
        (64, "https://config"),
    ]


def test_empty_values_count_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set to nothing, as container files often do, hides no other source."""
    folder = secret("kis_app_key", KEY)
    Path(".env").write_text(f"KIS_TIMEOUT=7\nKIS_SECRETS_DIR={folder}\n", encoding="utf-8")
    for name in ("KIS_TIMEOUT", "KIS_SECRETS_DIR", "KIS_APP_KEY"):
        monkeypatch.setenv(name, "")
    assert (market().timeout, market().app_key) == (7, KEY)


def test_secrets_folder_as_kubernetes_mounts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files behind symbolic links count, final newlines do not, and other programs' files are not opened."""
    real = Path("..data")
    real.mkdir()
    (real / "KIS_APP_SECRET").write_text(f"{SECRET}\n", encoding="utf-8")
    folder = Path("mount")
    folder.mkdir()
    (folder / "KIS_APP_SECRET").symlink_to(Path("..") / real / "KIS_APP_SECRET")
    (folder / "tls.key").write_bytes(b"\xff\xfe")
    os.mkfifo(folder / "KIS_PIPE")
    monkeypatch.setenv("KIS_SECRETS_DIR", str(folder))
    assert market().app_secret == SECRET


def test_dotenv_survives_a_byte_order_mark() -> None:
    """A `.env` that Windows' editor saved names its first variable rightly."""
    Path(".env").write_text(f"\ufeffKIS_APP_KEY={KEY}\n", encoding="utf-8")
    assert market().app_key == KEY


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("~/.tokencore/config.toml", b"issue_interval = \n", "config.toml"),
        ("~/.tokencore/config.toml", b'app_secret = "Canary\n', "config.toml"),
        ("~/.tokencore/config.toml", b'app_secret = "Canary\xff"', "config.toml"),
        ("~/.tokencore/config.toml", None, "config.toml"),
        (".env", b"KIS_APP_SECRET=Canary\xff\n", ".env"),
        ("secrets/KIS_APP_KEY", b"Canary\xff", "KIS_SECRETS_DIR"),
        ("secrets", b"Canary", "KIS_SECRETS_DIR"),
    ],
    ids=["no value", "no end", "not UTF-8", "a folder", "dotenv not UTF-8", "secret not UTF-8", "secrets no folder"],
)
def test_an_unreadable_source_is_named_in_one_sentence(
    path: str,
    content: bytes | None,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What exists but cannot be read is an error that names it and repeats none of its content."""
    place = Path(path).expanduser()
    place.parent.mkdir(exist_ok=True)
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    if "secrets" in path:
        monkeypatch.setenv("KIS_SECRETS_DIR", "secrets")
    told = refusal()
    assert named in told
    assert "Canary" not in told


def test_a_key_in_place_of_the_secrets_folder_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there is named in one line, but for a name in it that may be a credential."""
    monkeypatch.setenv("KIS_SECRETS_DIR", f"/run/secrets/{KEY}")
    assert "KIS_SECRETS_DIR=/run/secrets/*** cannot be read" in refusal()
    monkeypatch.setenv("KIS_SECRETS_DIR", "a\n.b")
    assert "KIS_SECRETS_DIR=a?.b cannot be read" in refusal()


MALFORMED = [
    ("KIS_ENVIRONMENT", "demo", "'real' or 'paper'"),
    ("KIS_ENVIRONMENT", "real ", "'real' or 'paper'"),
    ("KIS_MARKETS__KR__ENVIRONMENT", "Paper", "'real' or 'paper'"),
    ("KIS_APP_KEY", "Canary Canary", "one word"),
    ("KIS_APP_SECRET", "Canary\nCanary", "one word"),
    ("KIS_APP_SECRET", "Canary열쇠", "one word"),
    ("KIS_APP_KEY", "Canary\udcff", "one word"),
    ("KIS_BASE_URL", "http://openapi.koreainvestment.com:9443", "https://"),
    ("KIS_BASE_URL", "https://someone:Canary@host", "plain address"),
    ("KIS_BASE_URL", "https://host/?q=Canary", "plain address"),
    ("KIS_BASE_URL", "https://", "https://"),
    ("KIS_BASE_URL", "https://host:99999", "port"),
    ("KIS_BASE_URL", "https://host\t:9443", "spaces"),
    ("KIS_BASE_URL", " https://host", "spaces"),
    ("KIS_BASE_URL", "https://[::1", "invalid"),
    ("KIS_MARKETS__HK__BASE_URL", "ftp://127.0.0.1", "https://"),
    ("KIS_BUFFER", "five", "number from 0 to 86400"),
    ("KIS_BUFFER", "nan", "number from 0 to 86400"),
    ("KIS_PROACTIVE_WINDOW", "-1", "number from 0 to 86400"),
    ("KIS_ISSUE_INTERVAL", "inf", "number from 0 to 86400"),
    ("KIS_TIMEOUT", "0", "number from 0.001 to 300"),
    ("KIS_MAX_ISSUES_PER_DAY", "0", "whole number from 1 to 24"),
    ("KIS_MAX_ISSUES_PER_DAY", "1.5", "whole number from 1 to 24"),
    ("SLACK_MENTION", "@channel", "such as <!channel>, <@U024BE7LH> or <!subteam^S024BE7>. "),
    ("KIS_MARKETS", "us,kr", "KIS_MARKETS__<NAME>__<FIELD>"),
    ("KIS_MARKETS__US", "Canary", "valid dictionary"),
    ("KIS_MARKETS__US__APPKEY", "Canary", "no setting"),
    ("KIS_MARKETS__HK__EXCHANGES", "LSE", "unknown exchange"),
    ("KIS_MARKETS__H.K__EXCHANGES", "SEHK", "no market's name"),
    ("KIS_EXCHANGES__LSE__CLOSED", "2026-12-31", "unknown exchange"),
    ("KIS_EXCHANGES__KRX__CLOSED", "31.12.2026", "date"),
    ("KIS_EXCHANGES__KRX__HOURS__2026-12-30", "15:00-09:00", "open before it closes"),
]


@pytest.mark.parametrize(("variable", "value", "why"), MALFORMED, ids=ascii)
def test_a_malformed_setting_gets_one_sentence_that_names_it(
    variable: str,
    value: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every mistake names its variable, says what would be right, and repeats no value that may be secret."""
    monkeypatch.setenv(variable, value)
    told = refusal()
    assert f"{variable}__".startswith(f"{told.split()[0]}__")  # of a group, its name is enough
    assert why in told
    assert "Canary" not in told


@pytest.mark.parametrize(
    ("line", "variable"),
    [
        ("app_key = 12345", "KIS_APP_KEY"),
        ("base_url = 5", "KIS_BASE_URL"),
        ("environment = true", "KIS_ENVIRONMENT"),
        ("environment = ['real']", "KIS_ENVIRONMENT"),
        ("token_dir = 7", "KIS_TOKEN_DIR"),
        ("buffer = true", "KIS_BUFFER"),
        ("buffer = [300]", "KIS_BUFFER"),
        (f"timeout = 1{'0' * 400}", "KIS_TIMEOUT"),
        ("markets = 5", "KIS_MARKETS"),
        ("markets = ['us']", "KIS_MARKETS"),
        ("[markets.us]\nexchanges = 5", "KIS_MARKETS__US__EXCHANGES"),
    ],
)
def test_values_of_the_wrong_type_in_the_config_file_are_named(line: str, variable: str) -> None:
    """TOML's types are judged like text: both ways to read the settings end in the same sentence."""
    config(line)
    told = refusal()
    assert told.startswith(variable)
    with pytest.raises((ConfigurationError, ValueError)):
        market()


def test_the_command_tells_a_bad_setting_on_one_line_with_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """`get` shows no traceback and no secret, whether the mistake is met on the quick way or the validated one."""
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    for bad in ({"KIS_BUFFER": "nan"}, {"KIS_MARKETS": "us"}, {"KIS_APP_KEY": f"{KEY}\udcff"}, {"KIS_APP_KEY": ""}):
        told = subprocess.run(
            [sys.executable, "-m", "tokencore", "get", "us"],
            env={**os.environ, **bad},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (told.returncode, told.stdout) == (2, "")
        assert told.stderr.count("\n") == 1
        assert next(iter(bad)) in told.stderr
        assert "Canary" not in told.stderr


@pytest.mark.parametrize("field", ["app_key", "app_secret"])
def test_a_missing_credential_is_named_with_both_ways_to_set_it(field: str) -> None:
    """Without one of the credentials the sentence names the common and the market's own variable."""
    with pytest.raises(ConfigurationError) as caught:
        make_market("hk", **{field: None}).credentials()
    assert f"set KIS_{field.upper()} (or KIS_MARKETS__HK__{field.upper()})" in str(caught.value)
    assert "Canary" not in str(caught.value)


def test_white_space_around_keys_is_removed_and_told_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pasted newline costs no issuance: both ways to read strip it, and one warning names the variable only."""
    monkeypatch.setenv("KIS_APP_KEY", f" {KEY}\t")
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", f"{SECRET}\r\n")
    Settings.load()
    loaded = Settings.load()
    own = loaded.markets["kr"].app_secret
    assert loaded.app_key
    assert own
    assert (loaded.app_key.get_secret_value(), own.get_secret_value()) == (KEY, SECRET)
    assert (market("kr").app_key, market("kr").app_secret) == (KEY, SECRET)
    assert [record.message.split()[0] for record in caplog.records] == ["KIS_APP_KEY", "KIS_MARKETS__KR__APP_SECRET"]
    assert "Canary" not in caplog.text


def test_unknown_names_are_refused_only_where_they_can_be_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """`KIS_` variables of other programs are left alone; a misspelt name in our own file is an error."""
    monkeypatch.setenv("KIS_ACCOUNT_NO", "12345678-01")
    Path(".env").write_text("KIS_ANYTHING=1\nOTHER=2\n", encoding="utf-8")
    assert Settings.load().environment == "real"
    config('app_kee = "Canary"\n')
    assert "'app_kee'" in refusal()
    config('[slack]\nwebhook_url = "https://Canary"\n')
    assert "'slack'" in refusal()


@pytest.mark.parametrize("first", ["KIS_MARKETS__US__BASE_URL", "KIS_MARKETS__US__BASE_URL__MORE"])
def test_a_name_that_goes_on_where_another_ends_is_refused(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of two contradicting names silently removes the other, whichever comes first."""
    names = {"KIS_MARKETS__US__BASE_URL", "KIS_MARKETS__US__BASE_URL__MORE"}
    for name in (first, *(names - {first})):
        monkeypatch.setenv(name, "https://host")
    assert "contradicts" in refusal()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9480", "http://localhost:1/", "http://[::1]:80", "HTTPS://host/kis/"]
)
def test_plain_http_is_for_loopback_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback may be asked in the clear, everything else over https; both ways drop the final slash."""
    monkeypatch.setenv("KIS_BASE_URL", url)
    assert Settings.load().base_url == market().base_url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1.evil.com", "http://127.0.0.1@evil.com", "http://127.0.0.1\\@evil.com", "http://128.0.0.1"],
)
def test_what_only_looks_like_loopback_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spelling of a foreign host passes for loopback."""
    monkeypatch.setenv("KIS_BASE_URL", url)
    assert "KIS_BASE_URL" in refusal()


REAL, PAPER = HOSTS["real"], HOSTS["paper"]


@pytest.mark.parametrize(
    ("common", "own", "expected"),
    [
        ({}, {}, ("real", REAL)),
        ({"environment": "paper"}, {}, ("paper", PAPER)),
        ({}, {"environment": "paper"}, ("paper", PAPER)),
        ({"base_url": "https://proxy"}, {}, ("real", "https://proxy")),
        ({"base_url": "https://proxy"}, {"environment": "paper"}, ("paper", PAPER)),
        ({"base_url": "https://proxy"}, {"environment": "real"}, ("real", "https://proxy")),
        ({"base_url": "https://proxy"}, {"base_url": "https://own/"}, ("real", "https://own")),
        ({"base_url": "https://proxy", "environment": "paper"}, {}, ("paper", "https://proxy")),
    ],
)
def test_a_market_asks_where_its_own_settings_say(
    common: dict[str, str],
    own: dict[str, str],
    expected: tuple[str, str],
) -> None:
    """A market's own URL comes first, then the one for all of its environment, then its environment's host."""
    found = make_market("hk", **common, markets={"hk": own})
    assert (found.environment, found.base_url) == expected


def test_a_market_has_its_own_credentials_and_exchanges() -> None:
    """What a market sets for itself holds for it alone; exchanges may be text or a list."""
    both = {"hk": {"app_key": " OwnKey ", "exchanges": ' sehk, "SHAA" '}, "us": {"exchanges": ["NAS"]}}
    assert make_market("hk", markets=both).credentials() == ("OwnKey", SECRET)
    assert make_market("us", markets=both).credentials() == (KEY, SECRET)
    assert [make_market(name, markets=both).exchanges for name in ("hk", "us", "kr")] == [
        ("SEHK", "SHAA"),
        ("NAS",),
        ("KRX",),
    ]
    assert market_names({"markets": both}) == ["us", "kr", "hk"]


@pytest.mark.parametrize("name", ["jp", "", "US", "../us", "us/", "u s", "us\n", "서울"])
def test_an_unknown_market_is_refused(name: str) -> None:
    """A name that is not configured, or that no file should bear, is an error with what is known or allowed."""
    with pytest.raises(ConfigurationError, match=r"not configured \(known: us, kr\)|no market's name"):
        Market(name, {})


def test_the_defaults_are_the_contracts(isolated: Path) -> None:
    """Without any setting both ways to read have the values of the contract's table."""
    loaded, plain = Settings.load(), market("kr")
    for found in (loaded, plain):
        numbers = (found.issue_interval, found.buffer, found.proactive_window, found.timeout, found.max_issues_per_day)
        assert numbers == (60, 300, 1800, 10, 2)
        assert (found.environment, str(found.token_dir)) == ("real", str(isolated / ".tokencore"))
    assert (plain.base_url, plain.exchanges) == (REAL, ("KRX",))
    assert market("us").exchanges == ("NASD", "NYSE", "AMEX")


def test_what_the_user_knows_of_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed days and hours are read from text and from TOML, under any alias of the exchange."""
    monkeypatch.setenv("KIS_EXCHANGES__XKRX__CLOSED", "2026-12-31, 2027-01-04")
    config('[exchanges.SEHK]\nextended = true\n[exchanges.SEHK.hours]\n2026-12-24 = "09:30 - 12:00"\n')
    found = overrides()
    assert sorted(map(str, found["KRX"].closed)) == ["2026-12-31", "2027-01-04"]
    assert [(str(day), str(hours[0]), str(hours[1])) for day, hours in found["SEHK"].hours.items()] == [
        ("2026-12-24", "09:30:00", "12:00:00"),
    ]
    assert found["SEHK"].extended


def test_no_secret_is_shown_or_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No repr, text or pickle of settings contains a credential."""
    values = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_MARKETS__US__APP_SECRET": SECRET}
    values |= {"SLACK_WEBHOOK_URL": f"https://hooks/{SECRET}", "SLACK_BOT_TOKEN": f"xoxb-{SECRET}"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for shown in (Settings.load(), market(), sources.gather()):
        assert "Canary" not in repr(shown) + str(shown)
        with pytest.raises(TypeError) as caught:
            pickle.dumps(shown)
        assert "Canary" not in str(caught.value)
    assert "Canary" not in Settings.load().model_dump_json()


NUMBERS = st.one_of(
    st.sampled_from(["0", "60", "1e2", "1_0", "2.0", "2.5", "-0", "0x10", "٣", " 5 ", "nan", "-inf", "1e400", "true"]),
    st.floats(-10, 90_000).map(repr),
    st.integers(-2, 30).map(str),
)
CREDENTIALS = st.one_of(
    st.sampled_from(["", " ", "key", " key\n", "two words", "tab\there", "키", "\udcff", "\x7f"]),
    st.text(st.characters(codec="ascii", min_codepoint=32), max_size=12),
)
ENVIRONMENTS = st.sampled_from(["real", "paper", "Real", " paper", "demo", ""])
PLAUSIBLE = {
    **dict.fromkeys(("KIS_ISSUE_INTERVAL", "KIS_BUFFER", "KIS_PROACTIVE_WINDOW", "KIS_TIMEOUT"), NUMBERS),
    "KIS_MAX_ISSUES_PER_DAY": NUMBERS,
    **dict.fromkeys(("KIS_APP_KEY", "KIS_APP_SECRET", "KIS_MARKETS__HK__APP_KEY"), CREDENTIALS),
    **dict.fromkeys(("KIS_ENVIRONMENT", "KIS_MARKETS__US__ENVIRONMENT"), ENVIRONMENTS),
    "KIS_TOKEN_DIR": st.sampled_from(["", "~/tokens", "relative", "/absolute/../folder", "~nobody-here"]),
}


@given(st.fixed_dictionaries({}, optional=PLAUSIBLE))
@hypothesis_settings(max_examples=300)
def test_the_quick_and_the_validated_way_agree(variables: dict[str, str]) -> None:
    """For any settings, `Market` and `Settings.load` accept the same ones and read the same values from them."""
    with environment(variables):
        values = sources.gather().values
        try:
            markets = [Market(name, values) for name in market_names(values)]
        except ValueError:
            assert refusal().startswith(tuple(variables))
            return
        loaded = Settings.load()
    for found in markets:
        own = loaded.markets.get(found.name)
        for field in ("issue_interval", "buffer", "proactive_window", "timeout", "max_issues_per_day"):
            assert getattr(found, field) == getattr(loaded, field)
        keys = [part.app_key for part in (own, loaded) if part and part.app_key]
        assert found.app_key == (keys[0].get_secret_value() if keys else None)
        assert found.environment == ((own and own.environment) or loaded.environment)
        assert found.token_dir == str(loaded.token_dir)


def test_settings_read_the_environment_however_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Settings()` and `Settings.load()` see the same sources."""
    monkeypatch.setenv("KIS_BUFFER", "123")
    assert Settings().buffer == Settings.load().buffer == 123


def test_each_setting_tells_which_source_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """By variable name: the environment, `.env`, the secrets folder, `config.toml`; the first that gave it is told."""
    secrets = secret("KIS_APP_SECRET", SECRET)
    Path(".env").write_text(f"KIS_APP_KEY={KEY}\nKIS_TIMEOUT=7\nKIS_SECRETS_DIR={secrets}\n")
    config("buffer = 200\n[markets.hk]\nexchanges = ['SEHK']\n")
    monkeypatch.setenv("KIS_TIMEOUT", "5")
    assert sources.origins() == {
        "KIS_TIMEOUT": "environment",
        "KIS_APP_KEY": ".env",
        "KIS_APP_SECRET": str(secrets),
        "KIS_BUFFER": "~/.tokencore/config.toml",
        "KIS_MARKETS__HK__EXCHANGES": "~/.tokencore/config.toml",
    }


def test_names_that_are_no_settings_are_told_with_what_they_resemble(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name gets the right one, another program's none; what `get --format env` sets is no mistake."""
    for name in ("KIS_TIMOUT", "KIS_SECRET_DIR", "KIS_MARKET__HK__APP_KEY", "KIS_ACCOUNT_NO", "KIS_ACCESS_TOKEN"):
        monkeypatch.setenv(name, "x")
    assert unknown_names() == {
        "KIS_TIMOUT": "KIS_TIMEOUT",
        "KIS_SECRET_DIR": "KIS_SECRETS_DIR",
        "KIS_MARKET__HK__APP_KEY": "KIS_MARKETS__HK__APP_KEY",
        "KIS_ACCOUNT_NO": "",
    }


def test_line_of_dotenv_that_is_none_is_told_with_file_and_line(caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the path and the line; what it says is not repeated, and the lines around it count."""
    Path(".env").write_text("KIS_TIMEOUT=7\nexport the secret Canary\nKIS_BUFFER=9\n")
    values = [sources.gather().values for _ in range(2)]
    assert values == [{"timeout": "7", "buffer": "9"}] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{Path('.env').absolute()}, line 2, is no NAME=value, so it is ignored; mend or remove it.",
    ]
