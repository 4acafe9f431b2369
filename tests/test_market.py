"""What settings may be, what a market makes of them, and that the fast reader and `Settings` agree."""

from __future__ import annotations

import json
import operator
import os
import pickle
import sys
from collections.abc import Callable
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING

import keyring
import pytest
from builders import KEY, SECRET
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from keyring_in_file import Keyring
from test_settings import PAIR, SOURCES, config, dotenv, give, own_environment, refusal, restored  # noqa: F401 - a fixture

from tokencore.calendars.sessions import Override
from tokencore.config import read_market
from tokencore.config.market import HOSTS
from tokencore.config.settings import Settings
from tokencore.config.sources import gather
from tokencore.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

REAL, PAPER = HOSTS["real"], HOSTS["paper"]
LONG = "Canary" * 20_000  # 120 KB
MALFORMED = {
    "KIS_ENVIRONMENT": ("'real' or 'paper'", "Canary", "real "),
    "KIS_MARKETS__KR__ENVIRONMENT": ("'real' or 'paper'", "Paper"),
    "KIS_APP_KEY": ("must ", "Canary Canary", '"Canary"', "Canary\udcff"),
    "KIS_APP_SECRET": ("must be one word", "Canary\nCanary", "Canary열쇠", LONG),
    "KIS_MARKETS__HK__APP_SECRET": ("must not have quotes", "'Canary", 'Canary"'),
    "KIS_BASE_URL": (
        "https://",
        *("http://openapi.koreainvestment.com:9443", "https://someone:Canary@host", "https://h/?q=Canary", "https://"),
        *("https://host:99999", "https://host:0", "https://host\t:9443", "https://127.0.0.1\\@Canary", "https://host:"),
        *("https://[::1", "http://[::1]80", "https://[::2]", "https://host:port", f"https://{LONG}"),
    ),
    "KIS_MARKETS__HK__BASE_URL": ("https://", "ftp://127.0.0.1"),
    "KIS_BUFFER": ("number from 0 to 86400", "five", "nan"),
    "KIS_PROACTIVE_WINDOW": ("number from 0 to 86400", "-1"),
    "KIS_ISSUE_INTERVAL": ("number from 0 to 86400", "inf"),
    "KIS_TIMEOUT": ("number from 0.001 to 300", "0"),
    "KIS_MAX_ISSUES_PER_DAY": ("whole number from 1 to 24", "0", "1.5"),
    "KIS_TOKEN_DIR": ("path", "relative/folder", "~nobody-here/tokens", f"/{LONG}"),
    "KIS_PROVE_TOKENS": ("boolean", "perhaps"),
    "SLACK_MENTION": ("such as <!channel>, <@U024BE7LH> or <!subteam^S024BE7>", "@channel"),
    "SLACK_LANGUAGE": ("'en' or 'ko'", "de"),
    "KIS_MARKETS": ("lists the settings", "us,kr"),
    "KIS_MARKETS__US": ("lists the settings", "Canary"),
    "KIS_MARKETS__US__APPKEY": ("did you mean KIS_MARKETS__US__APP_KEY?", "Canary"),
    "KIS_MARKETS__US__APP_KEY__MORE": ("did you mean KIS_MARKETS__US__APP_KEY?", "Canary"),
    "KIS_MARKETS__HK__EXCHANGES": ("unknown exchange", "LSE"),
    "KIS_MARKETS__HK__EXPORTS": ("mojito2, python-kis, kis-auth", "mojito"),
    "KIS_MARKETS__US__EXPORTS": ("absolute path", "mojito2, python-kis:here"),
    "KIS_MARKETS__H.K__EXCHANGES": ("not a market's name", "SEHK"),
    "KIS_EXCHANGES__LSE__CLOSED": ("unknown exchange", "2026-12-31"),
    "KIS_EXCHANGES__KRX__CLOSED": ("date", "31.12.2026"),
    "KIS_EXCHANGES__KRX__HOURS__2026-12-30": ("open before it closes", "15:00-09:00"),
}
ROWS = [(variable, value, why) for variable, (why, *wrong) in MALFORMED.items() for value in wrong]


@pytest.mark.parametrize(("variable", "value", "why"), ROWS, ids=lambda value: ascii(value[:30]))
def test_a_malformed_setting_gets_one_sentence_that_names_it(variable: str, value: str, why: str) -> None:
    """Every mistake names its variable, says what would be right, and repeats no value that may be secret."""
    os.environ[variable] = value
    message = refusal()
    if variable in ("KIS_APP_KEY", "KIS_APP_SECRET", "KIS_BASE_URL"):
        assert refusal(lambda: read_market("us")) == message
    named = message.removeprefix("Unknown setting ").split()[0].rstrip(";")
    assert f"{variable}__".startswith(f"{named}__")  # of a group, its name is enough
    assert why in message


WRONG_TYPES = ["app_key = 12345", "base_url = 5", "environment = ['real']", "token_dir = 7", 'token_dir = "/a\\u0000"']
WRONG_TYPES += ["buffer = true", f"buffer = 1{'0' * 400}"]


@pytest.mark.parametrize("line", WRONG_TYPES, ids=lambda line: ascii(line[:30]))
def test_values_of_the_wrong_type_in_the_config_file_are_named(line: str) -> None:
    """TOML's types are judged like text: both readers end in the same sentence."""
    config(line)
    assert (message := refusal()) == refusal(lambda: read_market("us"))
    assert message.startswith(f"KIS_{line.split(maxsplit=1)[0].upper()} cannot be used: ")


def test_unknown_names_are_refused_only_where_they_can_be_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt name in our own file is an error, in the environment one warning; other programs' names are left."""
    names = ("KIS_TIMOUT", "KIS_SECRET_DIR", "KIS_MARKET__HK__APP_KEY", "KIS_ACCOUNT_NO", "KIS_ACCESS_TOKEN")
    os.environ |= dict.fromkeys(names, "Canary")
    meant = ("KIS_TIMEOUT", "KIS_SECRETS_DIR", "KIS_MARKETS__HK__APP_KEY", "")
    unknown = dict(zip(names, meant, strict=False))
    assert Settings.load().misspelt() == unknown
    assert caplog.messages == [f"Unknown setting {name}; did you mean {unknown[name]}?" for name in names[:3]]
    for line, hint in (("app_kee = 1", "did you mean KIS_APP_KEY?"), ("[slack]\nurl = 'x'", "lists the settings.")):
        config(line)
        assert refusal().endswith(hint)


# --- a market


def test_the_defaults_are_the_contracts(isolated: Path) -> None:
    """Without any setting, the values of the contract's table."""
    loaded = Settings.load()
    us, kr = loaded.all_markets()
    assert (us.exchanges, kr.exchanges, us.exports) == (("NASD", "NYSE", "AMEX"), ("KRX",), ())
    assert (loaded.issue_interval, us.buffer, us.proactive_window, loaded.timeout, loaded.max_issues_per_day) == (
        60, 300, 1800, 10, 2,
    )  # fmt: skip
    assert (us.environment, us.base_url, us.token_dir) == ("real", REAL, str(isolated / ".tokencore"))
    assert (loaded.prove_tokens, loaded.slack_language, loaded.hts_id, us.app_key) == (True, "en", None, None)
    assert "set KIS_APP_KEY and KIS_APP_SECRET" in refusal(loaded.able_markets)


def test_a_market_has_values_of_its_own() -> None:
    """What a market sets for itself holds for it alone; lists may be text or TOML's, and names in any case."""
    config('[markets.hk]\napp_key = " OwnKey "\nexchanges = ["sehk", "SHAA"]\nexports = ["mojito2:~/bot"]\n')
    os.environ |= {**PAIR, "KIS_MARKETS__US__EXCHANGES": ' nas, "nys" ', "KIS_MARKETS__HK__BASE_URL": "http://[::1]:80"}
    os.environ |= {
        "KIS_MARKETS__US__BASE_URL": "HTTPS://own/kis/",
        "kis_markets__AB__exports": "kis-auth, python-kis:/tmp",
    }
    loaded = Settings.load()
    assert [one.name for one in loaded.able_markets()] == ["us", "kr", "ab", "hk"]
    hk = loaded.market("HK")
    assert (hk is loaded.market("hk"), hk.credentials(), hk.exchanges) == (True, ("OwnKey", SECRET), ("SEHK", "SHAA"))
    assert (hk.exports, loaded.market("ab").exports) == (("mojito2:~/bot",), ("kis-auth", "python-kis:/tmp"))
    assert (loaded.market("us").exchanges, read_market("us").exchanges) == (("NAS", "NYS"),) * 2
    assert [read_market(name).base_url for name in ("us", "hk", "kr")] == ["HTTPS://own/kis", "http://[::1]:80", REAL]
    assert read_market("aB").fingerprint == loaded.market("kr").fingerprint != hk.fingerprint


@pytest.mark.parametrize("name", ["jp", "", "../us", "us/", "u s", "us\n", "서울", "x" * 200])
def test_an_unknown_market_is_refused(name: str) -> None:
    """A name that is not configured, or that no file should have, is an error with what is known or allowed."""
    for read in (read_market, Settings.load().market):
        with pytest.raises(ConfigurationError, match=r"not configured \(known: us, kr\)|not a market's name"):
            read(name)


@pytest.mark.parametrize(("address", "environment"), [(PAPER, "real"), (f"{REAL}/", "paper"), (PAPER[:-6], "real")])
def test_the_other_environments_address_is_refused(address: str, environment: str) -> None:
    """A key would be sent where it is not known: both readers say which of the two to set."""
    os.environ |= {"KIS_BASE_URL": address, "KIS_ENVIRONMENT": environment}
    assert (message := refusal(lambda: read_market("us"))) == refusal()
    assert f"set KIS_ENVIRONMENT={'paper' if environment == 'real' else 'real'}" in message


@pytest.mark.parametrize(
    ("variable", "value", "explicit", "hint"),
    [
        *(("KIS_ENVIRONMENT", word, "", "") for word in ("virtual", "demo", "VPS", "mock", "모의")),
        ("KIS_MARKETS__US__ENVIRONMENT", "demo", "", ""),
        *(("KIS_MODE", word, "", "real or KIS_ENVIRONMENT=") for word in ("모의", "fast")),
        *((f"KIS_{name}", "Virtual", "", "real or KIS_ENVIRONMENT=") for name in ("ENV", "IS_PAPER", "ACCOUNT_TYPE")),
        ("KIS_IS_PAPER", "False", "", None),
        ("KIS_MODE", "fast", "paper", None),
    ],
)
def test_other_tools_words_for_the_environment_draw_one_warning(
    variable: str, value: str, explicit: str, hint: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """With the right setting; a word for paper in our own setting counts, another tool's variable does not."""
    os.environ |= {"KIS_ENVIRONMENT": explicit, variable: value}
    expected = "paper" if explicit or variable.endswith("ENVIRONMENT") else "real"
    assert [Settings.load().market("us").environment for _ in range(2)] == [expected] * 2
    name = variable if variable.endswith("ENVIRONMENT") else "KIS_ENVIRONMENT"
    known = [] if hint is None else [f"set {name}={hint}paper."]
    assert [message.partition("; ")[2] for message in caplog.messages] == known


def test_white_space_around_keys_is_removed_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A pasted newline costs no issuance: both readers strip it, and one warning names the variable only."""
    give("environment", {"KIS_APP_KEY": f" {KEY}\t", "KIS_MARKETS__KR__APP_SECRET": f"{SECRET}\r\n"})
    assert [Settings.load().market("kr").credentials() for _ in range(2)] == [(KEY, SECRET)] * 2
    assert read_market("kr").credentials() == (KEY, SECRET)
    assert [message.split()[0] for message in caplog.messages] == ["KIS_APP_KEY", "KIS_MARKETS__KR__APP_SECRET"]
    assert "Canary" not in caplog.text


def test_what_the_user_knows_of_exchanges() -> None:
    """Closed days and hours are read from text and from TOML, under any alias of the exchange."""
    os.environ["KIS_EXCHANGES__XKRX__CLOSED"] = "2026-12-31, 2027-01-04"
    os.environ["KIS_EXCHANGES__KRX__HOURS__2026-12-30"] = "10:00-15:30"
    config('[exchanges.SEHK]\nextended = true\n[exchanges.SEHK.hours]\n2026-12-24 = "09:30 - 12:00"\n')
    closed = frozenset({date(2026, 12, 31), date(2027, 1, 4)})
    assert Settings.load().overrides == {
        "KRX": Override(closed, {date(2026, 12, 30): (time(10), time(15, 30))}),
        "SEHK": Override(frozenset(), {date(2026, 12, 24): (time(9, 30), time(12))}, extended=True),
    }


def test_no_secret_is_shown_or_pickled() -> None:
    """No repr, text or pickle of settings contains a credential."""
    os.environ |= {**PAIR, "KIS_MARKETS__US__APP_SECRET": SECRET, "KIS_STORE": f"postgresql://u:{SECRET}@h"}
    os.environ |= {"KIS_STORE_KEYS": f"{SECRET},{KEY}", "SLACK_WEBHOOK_URL": SECRET, "SLACK_BOT_TOKEN": SECRET}
    for shown in (Settings.load(), read_market("us"), gather()):
        with pytest.raises(TypeError) as caught:
            pickle.dumps(shown)
        assert "Canary" not in f"{shown!r} {shown} {caught.value}"
    assert "Canary" not in Settings.load().model_dump_json()


# --- the two readers

NUMBERS = st.one_of(
    st.sampled_from(["0", "60", "1e2", "1_0", "2.0", "-0", "0x10", "٣", " 5 ", "nan", "-inf", "1e400", "true"]),
    st.floats(-10, 90_000).map(repr),
)
CREDENTIALS = st.one_of(
    st.sampled_from(["", " ", "key", " key\n", "two words", "tab\there", "키", "\x7f", "'quoted'", 'half"']),
    st.text(st.characters(codec="ascii", min_codepoint=32), max_size=12),
)
ENVIRONMENTS = st.sampled_from(["real", "paper", "Real", " paper", "demo", "모의", ""])
URLS = st.sampled_from([REAL, PAPER, "https://host:1/kis/", "http://localhost:1", "http://host", "https://a b", ""])
FOLDERS = st.sampled_from(["", "~/tokens", "relative", "/absolute/../folder", "~nobody-here", "~"])
PLAUSIBLE = {
    **dict.fromkeys(("KIS_BUFFER", "KIS_PROACTIVE_WINDOW"), NUMBERS),
    **dict.fromkeys(("KIS_APP_KEY", "KIS_APP_SECRET", "KIS_MARKETS__HK__APP_KEY", "kis_app_key"), CREDENTIALS),
    **dict.fromkeys(("KIS_ENVIRONMENT", "KIS_MARKETS__US__ENVIRONMENT", "KIS_MARKETS__HK__ENVIRONMENT"), ENVIRONMENTS),
    **dict.fromkeys(("KIS_BASE_URL", "KIS_MARKETS__KR__BASE_URL", "KIS_MARKETS__HK__BASE_URL"), URLS),
    "KIS_TOKEN_DIR": FOLDERS,
}
SIX = operator.attrgetter("app_key", "environment", "base_url", "token_dir", "buffer", "proactive_window")
PLACED = st.fixed_dictionaries({}, optional={k: st.tuples(st.sampled_from(SOURCES), v) for k, v in PLAUSIBLE.items()})


@given(PLACED)
@hypothesis_settings(max_examples=400)
def test_the_fast_reader_and_the_validated_settings_agree(placed: dict[str, tuple[str, str]]) -> None:
    """For any settings in any sources both accept the same ones and read the same values from them."""
    with restored():
        for source in SOURCES:
            give(source, {})
            for old in Path("secrets").glob("*") if source == "secrets folder" else ():
                old.unlink()
            give(source, {name: value for name, (place, value) in placed.items() if place == source})
        try:
            fast = [read_market(name) for name in ("us", "kr", *(gather().markets & {"hk"}))]
        except ConfigurationError:
            assert refusal()
            return
        loaded = Settings.load()
    for market in fast:
        own = loaded.markets.get(market.name)
        keys = [part.app_key.get_secret_value() for part in (own, loaded) if part and part.app_key]
        environment = (own and own.environment) or loaded.environment
        common = loaded.base_url if environment == loaded.environment else None
        url = (own and own.base_url) or common or HOSTS[environment]
        expected = (next(iter(keys), None), environment, url, loaded.token_dir, loaded.buffer, loaded.proactive_window)
        assert SIX(market) == SIX(loaded.market(market.name)) == expected


@given(
    st.sampled_from([dotenv, config]),
    st.binary(max_size=60)
    | st.text(st.sampled_from("KIS_APP_KEY=\"'[]{}.#\n \0markets=5ü"), max_size=60).map(str.encode),
)
@hypothesis_settings(max_examples=300)
def test_any_bytes_are_settings_or_one_sentence(write: Callable[[], Path], content: bytes) -> None:
    """Whatever stands in a file, the answer is settings or a refusal without a traceback of a parser."""
    write().write_bytes((f"KIS_APP_SECRET={SECRET}\n".encode() if write is dotenv else b"") + content)
    try:
        Settings.load()
    except ConfigurationError:
        assert refusal()
    write().unlink()


# --- the keyring


Keeper = Callable[[object], list[str]]


@pytest.fixture
def keeper(isolated: Path) -> Iterator[Keeper]:
    """Switched on by KIS_KEYRING, where only the key is set: give the keyring its content; what it has been asked."""
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_KEYRING": "kis"}
    before = keyring.get_keyring()
    keyring.set_keyring(Keyring())  # type: ignore[no-untyped-call] # keyring ships no types

    def keep(content: object) -> list[str]:
        log = isolated / "keyring.log"
        asked = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        (isolated / "keyring.json").write_text(json.dumps(content))
        return asked

    yield keep
    keyring.set_keyring(before)


KEPT = {"kis": {"KIS_APP_SECRET": SECRET, "KIS_MARKETS__KR__APP_SECRET": "of-kr"}}


def test_a_secret_that_no_other_source_gives_comes_from_the_keyring_once(keeper: Keeper) -> None:
    """Asked for when a request needs it, by the variable's name; a market with a key of its own has its own there."""
    keeper(KEPT)
    us = read_market("us")
    assert (us.identified(), keeper(KEPT)) == (KEY, [])
    assert [us.credentials() for _ in range(2)] == [(KEY, SECRET)] * 2
    assert keeper(KEPT) == ["kis KIS_APP_SECRET"]
    assert Settings.load().origins["KIS_APP_SECRET"] == "keyring kis"
    os.environ["KIS_MARKETS__KR__APP_KEY"] = KEY
    assert [read_market(name).credentials()[1] for name in ("us", "kr")] == [SECRET, "of-kr"]
    keeper(KEPT)
    os.environ |= {"KIS_APP_SECRET": "given", "KIS_MARKETS__KR__APP_SECRET": "too"}
    assert [read_market(name).credentials()[1] for name in ("us", "kr")] == ["given", "too"]
    assert keeper(KEPT) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("KeyringLocked", "it is locked"),
        ("NoKeyringError", "this machine has none"),
        ("another", "it failed (RuntimeError)"),
        ({}, "`keyring set kis KIS_APP_SECRET`"),
        ({"kis": {"KIS_APP_SECRET": "Canary Canary"}}, "not a secret as KIS shows it"),
    ],
)
def test_a_keyring_that_does_not_serve_is_one_sentence(content: object, why: str, keeper: Keeper) -> None:
    """It says what is wrong and what to do; the backend's own words are not repeated."""
    keeper(content)
    assert why in refusal(read_market("us").credentials)


def test_missing_credentials_are_named_with_both_ways_to_set_them(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is not looked for in the keyring, whose package may be missing; without the switch none is asked."""
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert "pip install 'keyring>=25'" in refusal(read_market("us").credentials)
    os.environ["KIS_APP_KEY"] = ""
    assert "keyring keeps its secret only" in refusal(read_market("us").identified)
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_KEYRING": ""}
    assert "set KIS_APP_SECRET (or KIS_MARKETS__KR__APP_SECRET)" in refusal(read_market("kr").credentials)
    assert keeper({}) == []
