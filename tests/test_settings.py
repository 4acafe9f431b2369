"""Where settings come from, which sources and values count, and that the fast reader and `Settings` agree on them."""

import contextlib
import json
import operator
import os
import re
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from datetime import time as clock
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import keyring
import pytest
from builders import KEY, SECRET, ended, in_child, make_token
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from keyring.errors import KeyringLocked
from running import Command
from servers import Wire
from test_secrets import leaking

from tokencore.calendars.sessions import Override
from tokencore.config import market_of_program, read_market
from tokencore.config.market import HOSTS
from tokencore.config.settings import MarketSettings, Settings
from tokencore.config.sources import FILE_LIMIT, gather, trusted_dotenv
from tokencore.errors import ConfigurationError
from tokencore.keys import Key
from tokencore.manager import TokenManager

PAIR = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
EVIL = "http://127.0.0.1:1"
TRUSTED = ("environment", "config.toml")
SPARSE = 48 * 1024 * 1024  # bytes
NAMELESS = 54_321  # a user id without a name on any system
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
us = partial(read_market, "us")  # the market `us` as a cached `get` reads it


def config(text: str = "", **values: str) -> Path:
    """Write `~/.tokencore/config.toml` with this text or these variables, and return its path."""
    path = Path.home() / ".tokencore" / "config.toml"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    lines = [f"{name.lower().removeprefix('kis_').replace('__', '.')} = {json.dumps(values[name])}" for name in values]
    path.write_text("\n".join([text, *lines]))
    return path


def dotenv(text: str = "", **values: str) -> Path:
    """Write `.env` in the working directory with this text or these variables, and return its path."""
    path = Path(".env").absolute()
    path.write_text(text + "".join(f"{name}={value}\n" for name, value in values.items()))
    return path


def secrets(**values: str) -> str:
    """Write a secrets folder with a file for each variable, and return its path."""
    folder = Path("secrets").absolute()
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")
    return str(folder)


def give(source: str, values: Mapping[str, str]) -> None:
    """Put the variables into the source of this name."""
    if source == "secrets folder":
        os.environ["KIS_SECRETS_DIR"] = secrets(**values)
    elif source != "environment":
        {".env": dotenv, "config.toml": config}[source](**values)
    else:
        os.environ.update(values)


def refusal(work: Callable[[], object] = Settings.load) -> str:
    """Return the one sentence of the refusal, after checking that no frame of ours on its way holds a credential."""
    with pytest.raises(ConfigurationError) as caught:
        work()
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    assert len(message) < 1000
    assert leaking(caught.value) == []
    return message


# --- where settings come from


def test_environment_beats_dotenv_beats_secrets_beats_config_file() -> None:
    """Of four sources the first with a value counts; code that passes `.env` on gets what it adds, in upper case."""
    folder = secrets(kis_buffer="63")
    config(f"buffer = 64\nsecrets_dir = '{folder}'\n[markets.hk]\nenvironment = 'paper'\n")
    path = dotenv("export KIS_BUFFER='62'\nkis_timeout=9\nPREFECT_SERVER_API_PORT=4201\n")
    os.environ |= {"KIS_BUFFER": "61", "KIS_SECRETS_DIR": "", "KIS_TIMEOUT": "7"}
    seen, drops = [], (lambda: os.environ.update(KIS_BUFFER=""), path.unlink, Path(folder, "kis_buffer").unlink, dict)
    for drop in drops:
        seen.append((us().buffer, Settings.load().buffer, set(trusted_dotenv())))
        drop()
    added = {"PREFECT_SERVER_API_PORT"}
    assert seen == [(61, 61, added), (62, 62, added | {"KIS_BUFFER"}), (63, 63, set()), (64, 64, set())]
    assert read_market("HK").environment == "paper"


def test_what_files_of_settings_may_look_like(caplog: pytest.LogCaptureFixture) -> None:
    """A byte order mark or a wrong line spoils no other; secrets are read through links, as Kubernetes mounts them."""
    os.environ["KIS_SECRETS_DIR"] = mount = secrets(**{"tls.key": "Canary"})
    Path("secret").write_text(f"{SECRET}\n")
    Path(mount, "KIS_APP_SECRET").symlink_to(Path("secret").absolute())
    os.mkfifo(Path(mount, "pipe"))
    Path(mount, "kis_certificates").mkdir()
    config("\ufeffbuffer = 9\n")
    text = f"\ufeffKIS_APP_KEY={KEY}\nexport the secret Canary\n#"
    path = dotenv(text.ljust(FILE_LIMIT - 2, "x"))  # the mark has three bytes
    assert path.stat().st_size == FILE_LIMIT
    assert [(us().credentials(), us().buffer) for _ in range(2)] == [((KEY, SECRET), 9)] * 2
    assert caplog.messages == [f"{path}, line 2, is not NAME=value, so it is ignored; fix or remove it."]
    path.unlink()
    path.mkdir()
    assert us().app_key is None, "a folder of this name is a virtualenv"


def sparse(path: Path) -> None:
    """Make a file of 48 MB that takes no space on disk."""
    path.touch()
    os.truncate(path, SPARSE)


def no_current_folder(path: Path) -> None:
    """Go to a folder of this name and remove it."""
    path.mkdir()
    os.chdir(path)
    path.rmdir()


PLACES = (".env", "~/.tokencore/config.toml", "secrets/KIS_APP_KEY")
BAD: dict[str, tuple[Callable[[Path], object], str]] = {  # what replaces a file; words of the message
    "pipe": (os.mkfifo, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "48 MB": (sparse, "65536 bytes"),
    "a byte too many": (lambda path: path.write_bytes(b"#" * FILE_LIMIT + b"\n"), "65536 bytes"),
    "no UTF-8": (lambda path: path.write_bytes(b'app_secret = "Canary\xff"'), "utf-8"),
}
BAD_TOML: dict[str, tuple[Callable[[Path], object], str]] = {
    "without an end": (lambda path: path.write_text('app_secret = "Canary\n'), "Illegal"),
    "nested too deep": (lambda path: path.write_text("a = " + "[" * 20_000), ""),
    "a folder": (Path.mkdir, "not a regular file"),
}
UNREADABLE = {f"{place} {kind}": (place, *BAD[kind]) for place in PLACES for kind in BAD}
UNREADABLE |= {f"config.toml {kind}": (PLACES[1], *BAD_TOML[kind]) for kind in BAD_TOML}
UNREADABLE["secrets no folder"] = ("secrets", Path.touch, "Not a directory")
UNREADABLE["no current folder"] = ("secrets", no_current_folder, "directory); point KIS_SECRETS_DIR")


@pytest.mark.parametrize(("name", "make", "why"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_source_that_cannot_be_read_is_named_in_one_sentence_at_once(
    name: str, make: Callable[[Path], object], why: str
) -> None:
    """Whatever is in the file's place, neither reader waits, fills the memory or repeats the content."""
    os.environ |= {**PAIR, "KIS_SECRETS_DIR": "secrets" if "secrets" in name else ""}
    path = Path(name).expanduser().absolute()
    path.parent.mkdir(exist_ok=True)
    make(path)
    tracemalloc.start()
    for work in (us, Settings.load):
        message = refusal(work)
        assert (path.name in message, why in message) == (True, True)
    assert tracemalloc.get_traced_memory()[1] < SPARSE / 4
    tracemalloc.stop()


# --- whom they trust


GIVEN_AWAY = ("KIS_BASE_URL", "KIS_MARKETS__US__BASE_URL", "KIS_SECRETS_DIR", "KIS_STORE", "KIS_MARKETS__US__EXPORTS")


@pytest.mark.parametrize("variable", GIVEN_AWAY)
@pytest.mark.parametrize("source", ["config.toml", "environment", "secrets folder"])
def test_a_cloned_repository_gets_no_secret_of_another_source(source: str, variable: str, command: Command) -> None:
    """Where a `.env`, though the user's own file, says where a secret goes, commands are refused and send nothing."""
    give(source, PAIR)
    (trap := Path("trap").absolute()).mkdir()
    if variable == "KIS_SECRETS_DIR":
        os.environ.pop(variable, None)
    with Wire() as thief:
        (trap / "KIS_BASE_URL").write_text(thief.url)
        value = {"KIS_SECRETS_DIR": str(trap), "KIS_MARKETS__US__EXPORTS": f"mojito2:{trap}"}.get(variable, thief.url)
        keys = {"KIS_STORE_KEYS": SECRET} if variable == "KIS_STORE" else {}  # keys of its own get no token either
        path = dotenv(**{variable: value, **keys})
        (message,) = {refusal(work) for work in (us, Settings.load, Settings, trusted_dotenv)}
        assert message.startswith(f"{variable} in {path} is refused, because ")
        for line in ("get us", "check", "refresh us --force"):
            assert command(*line.split()) == (2, "", f"tokencore: {message}\n")
    assert (thief.requests, os.listdir(trap), list(Path.home().rglob("*.json*"))) == ([], ["KIS_BASE_URL"], [])


def test_an_address_of_dotenv_takes_no_credential_of_a_program_with_it() -> None:
    """Credentials that a subclass gives itself are as safe as a secret in config.toml."""
    bait = {"KIS_APP_KEY": "bait", "KIS_APP_SECRET": "bait"}
    for variable, value in (("KIS_MARKETS__US__EXPORTS", "mojito2"), ("KIS_STORE", EVIL), ("KIS_BASE_URL", EVIL)):
        dotenv(**bait, **{variable: value})
        assert f"{variable} in " in refusal(lambda: market_of_program("us", lambda: (KEY, SECRET), us().base_url))
    assert market_of_program("us", lambda: (KEY, SECRET), "https://own").credentials() == (KEY, SECRET)
    assert "quotes" in refusal(lambda: market_of_program("own", lambda: (KEY, f"'{SECRET}'"), "https://own"))


SOURCES = ("environment", ".env", "secrets folder", "config.toml")
MARKETS = ("KIS_", "KIS_MARKETS__HK__")
ASKED = [f"{stem}{field}" for stem in MARKETS for field in ("APP_KEY", "APP_SECRET", "BASE_URL")]
ASKED += ["KIS_KEYRING", "KIS_STORE", "KIS_STORE_KEYS", "KIS_MARKETS__HK__EXPORTS"]
KEYRING_FIRST = dict.fromkeys(("KIS_MARKETS__HK__APP_KEY", "KIS_MARKETS__HK__BASE_URL", "KIS_APP_SECRET"), ".env")
VALUES = {"URL": EVIL, "EXPORTS": "mojito2"}
FROM_FOLDER = {"KIS_BASE_URL": "secrets folder", "KIS_APP_SECRET": "config.toml"}


@example({**KEYRING_FIRST, "KIS_KEYRING": "environment"}, "")
@example(FROM_FOLDER, "")
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(ASKED, st.sampled_from(SOURCES))),
    st.sampled_from(["", "real", "paper"]),
)
@hypothesis_settings(max_examples=300)
def test_every_reader_keeps_the_rule_of_addresses(places: dict[str, str], hk: str) -> None:
    """Wherever each variable comes from, both readers refuse an address if the rule says so, and otherwise use it."""
    placed = {name: (place, VALUES.get(name.rpartition("_")[2], "word")) for name, place in places.items()}
    with settings_in(placed):
        os.environ |= {"KIS_MARKETS__HK__EXCHANGES": "SEHK", "KIS_MARKETS__HK__ENVIRONMENT": hk}
        store = places.get("KIS_STORE", "environment") not in (*TRUSTED, places.get("KIS_STORE_KEYS"))
        expected = store or any(is_foreign(stem, places, hk) for stem in MARKETS)
        assert [refuses(work) for work in (us, lambda: read_market("hk"), Settings.load)] == [expected] * 3
        assert expected or (us().base_url == EVIL) == ("KIS_BASE_URL" in places)


@contextlib.contextmanager
def settings_in(placed: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """Inside the block each variable has its value in its source, and nothing else is set."""
    before = dict(os.environ)
    shutil.rmtree("secrets", ignore_errors=True)
    for source in SOURCES:
        give(source, {name: value for name, (place, value) in placed.items() if place == source})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def refuses(work: Callable[[], object]) -> bool:
    """Whether a reader refuses an address."""
    try:
        work()
    except ConfigurationError as error:
        return "is refused, because" in str(error)
    return False


def is_foreign(stem: str, places: Mapping[str, str], hk: str) -> bool:
    """The rule of addresses, written independently of the product: for all markets (`KIS_`) or for hk."""
    own_key = "KIS_MARKETS__HK__APP_KEY" in places and stem != "KIS_"
    secret = places.get("KIS_APP_SECRET")
    if f"{stem}APP_SECRET" in places:
        secret = places[f"{stem}APP_SECRET"]
    elif "KIS_KEYRING" in places and (own_key or "KIS_APP_SECRET" not in places):
        secret = "keyring"
    key = places.get(f"{stem}APP_KEY") or places.get("KIS_APP_KEY")
    address = places.get(f"{stem}BASE_URL") or (places.get("KIS_BASE_URL") if hk != "paper" else None)
    asked = {address, places.get(f"{stem}EXPORTS"), places.get("KIS_STORE")} - {None, *TRUSTED}
    return any(secret not in (None, place) or (place == ".env" and key not in (None, place)) for place in asked)


def give_away(path: Path) -> None:
    """Give a file or folder to another user."""
    os.chown(path, NAMELESS, NAMELESS)


def linked_into_an_open_folder() -> None:
    """Make `.env` a link to a file that others can replace."""
    (shared := Path("shared").absolute()).mkdir()
    Path(".env").rename(shared / "env")
    Path(".env").symlink_to(shared / "env")
    shared.chmod(0o777)


OPEN = {
    "another user's file": lambda: give_away(Path(".env")),
    "another user's folder": lambda: give_away(Path.cwd()),
    "file for the group": lambda: Path(".env").chmod(0o660),
    "folder for the group": lambda: Path.cwd().chmod(0o770),
    "folder like /tmp": lambda: Path.cwd().chmod(0o1777),
    "link into a folder for all": linked_into_an_open_folder,
}


@as_root
@pytest.mark.parametrize("opened", OPEN.values(), ids=OPEN)
def test_dotenv_that_others_can_have_written_is_ignored(
    opened: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """One warning names the file and says why; nothing in it counts, not even for code that passes it on."""
    config(**PAIR)
    path = dotenv(KIS_APP_KEY="a", KIS_APP_SECRET="b", KIS_BASE_URL=EVIL)
    assert us().base_url == EVIL
    opened()
    assert [us().app_key, Settings.load().base_url, trusted_dotenv()] == [KEY, None, {}]
    assert [message.startswith(f"{path} is ignored, because ") for message in caplog.messages] == [True]


def test_config_file_that_others_can_write_is_refused() -> None:
    """It may say where any secret goes, so only its owner and, as usual umasks leave it, their own group may write."""
    path = config(**PAIR)
    for opened, wide, usual in ((path, 0o666, 0o664), (path.parent, 0o777, 0o775)):
        opened.chmod(wide)
        assert refusal(us) == refusal()
        assert refusal().startswith("~/.tokencore/config.toml is refused, because other users can write it")
        opened.chmod(usual)
        assert us().app_key == KEY


@as_root
@pytest.mark.parametrize("planted", ["config.toml", ".tokencore", "folder of the link", "folder of the file"])
def test_config_file_of_another_user_is_refused(planted: str, tmp_path: Path) -> None:
    """Where the home is a folder that everybody shares, such as /tmp, anybody may have put it there."""
    path = config(**PAIR, KIS_BASE_URL=EVIL)
    between, there = (tmp_path / "between", tmp_path / "there")
    for folder in (between, there):
        folder.mkdir()
    target = path.rename(there / "config.toml")
    (between / "link").symlink_to(target)
    path.symlink_to(between / "link")
    places = {".tokencore": path.parent, "folder of the link": between, "folder of the file": there}
    foreign = places.get(planted, target)
    os.chown(foreign, NAMELESS, NAMELESS)
    assert refusal(us) == refusal()
    assert refusal().endswith(f"look whether it is still yours, then run `chown 0 {foreign}`.")
    os.chown(foreign, 0, 0)
    assert us().app_key == KEY


@as_root
def test_dotenv_of_root_counts_for_a_user_without_a_home() -> None:
    """A service's user reads root's file and no config.toml in a folder named `~`, and has to set its token folder."""

    def as_nameless() -> None:
        os.setgid(NAMELESS)
        os.setuid(NAMELESS)
        del os.environ["HOME"]
        assert (us().buffer, us().proactive_window) == (7, 1800)
        os.environ["KIS_TOKEN_DIR"] = "~/tokens"
        assert "KIS_TOKEN_DIR cannot be used: must be an absolute path" in refusal(us)

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(folder).chmod(0o755)
        Path("~/.tokencore").mkdir(parents=True)
        Path("~/.tokencore/config.toml").write_text("proactive_window = 8\n")
        dotenv(KIS_BUFFER="7", KIS_TOKEN_DIR="/nowhere")
        assert Settings.load().buffer == 7  # imports what is needed before the user changes
        assert ended(in_child(as_nameless)) == 0


@as_root
def test_a_config_file_in_a_folder_that_root_made_is_not_passed_over_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a first start with sudo, the user is told why the file does not count, and not only what is not set."""

    def as_nameless() -> None:
        os.setgid(NAMELESS)
        os.setuid(NAMELESS)
        assert "KIS_APP_KEY is not set" in refusal(us().identified)
        assert ["its folder is closed to this user" in message for message in caplog.messages] == [True]

    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        os.environ["HOME"] = home
        config(**PAIR).parent.chmod(0o700)
        assert us().identified() == KEY
        assert ended(in_child(as_nameless)) == 0


def test_program_that_changes_its_folder_keeps_its_dotenv() -> None:
    """A program that goes to another folder, as services do, keeps its `.env` as long as that can be trusted."""
    path = dotenv(KIS_BUFFER="7", KIS_BASE_URL=EVIL)
    assert us().buffer == 7
    with contextlib.chdir("/"):
        assert (us().buffer, Settings.load().buffer, Settings.load().origins["KIS_BUFFER"]) == (7, 7, ".env")
        config(**PAIR)
        assert refusal(us).startswith(f"KIS_BASE_URL in {path} is refused")
        path.chmod(0o666)
        assert us().buffer == 300


# --- what they may be

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
    "KIS_BUFFER": ("number from 0 to 86400", "five", "nan", "-1", "inf", f"1{'0' * 400}"),
    "KIS_TIMEOUT": ("number from 0.001 to 300", "0"),
    "KIS_MAX_ISSUES_PER_DAY": ("whole number from 1 to 24", "0", "1.5", "25"),
    "KIS_TOKEN_DIR": ("path", "relative/folder", "~nobody-here/tokens", f"/{LONG}"),
    "KIS_PROVE_TOKENS": ("must be true or false", "perhaps"),
    "KIS_STORE": ("must begin with postgresql://", "mysql://h/x"),
    "SLACK_MENTION": ("such as <!channel>, <@U024BE7LH> or <!subteam^S024BE7>", "@channel"),
    "SLACK_LANGUAGE": ("'en' or 'ko'", "de"),
    "KIS_MARKETS": ("lists the settings", "us,kr"),
    "KIS_MARKETS__US": ("lists the settings", "Canary"),
    "KIS_MARKETS__US__APP_KEY__MORE": ("did you mean KIS_MARKETS__US__APP_KEY?", "Canary"),
    "KIS_MARKETS__HK__EXCHANGES": ("unknown exchange", "LSE"),
    "KIS_MARKETS__HK__EXPORTS": ("mojito2, python-kis, kis-auth", "mojito"),
    "KIS_MARKETS__US__EXPORTS": ("absolute path", "mojito2, python-kis:here"),
    "KIS_MARKETS__H.K__EXCHANGES": ("not a market's name", "SEHK"),
    "KIS_EXCHANGES__LSE__CLOSED": ("unknown exchange", "2026-12-31"),
    "KIS_EXCHANGES__KRX__CLOSED": ("must be written as in 2026-12-24", "31.12.2026", "2026-12-24, Canary"),
    "KIS_EXCHANGES__KRX__HOURS__2026-12-30": ("open before it closes", "15:00-09:00", "09:00-09:00"),
    "KIS_EXCHANGES__KRX__HOURS__2026-12-31": ("must be written as in 10:00-15:30", "10-15:30", "10:00", "Canary"),
    "KIS_EXCHANGES__KRX__HOURS__31.12.2026": ("must be written as in 2026-12-24", "10:00-15:30"),
}
ROWS = [(variable, value, why) for variable, (why, *wrong) in MALFORMED.items() for value in wrong]


@pytest.mark.parametrize(("variable", "value", "why"), ROWS, ids=lambda value: ascii(value[:30]))
def test_a_malformed_setting_gets_one_sentence_that_names_it(variable: str, value: str, why: str) -> None:
    """The sentence names the variable, says what would be right, and repeats no value that may be secret."""
    os.environ[variable] = value
    message = refusal()
    if variable in ("KIS_APP_KEY", "KIS_APP_SECRET", "KIS_BASE_URL"):
        assert refusal(us) == message
    named = message.removeprefix("Unknown setting ").split()[0].rstrip(";")
    assert f"{variable}__".startswith(f"{named}__")  # the name of a setting's group is enough
    assert why in message


@pytest.mark.parametrize("line", ["app_key = 12345", "base_url = 5", "environment = ['real']", "token_dir = 7"])
def test_values_of_the_wrong_type_in_the_config_file_are_named(line: str) -> None:
    """TOML's types are judged like text, and both readers refuse them with the same sentence."""
    config(f"{line}\nbuffer = true")
    assert (message := refusal()) == refusal(us)
    assert message.startswith(f"KIS_{line.split(maxsplit=1)[0].upper()} cannot be used: ")


def test_unknown_names_are_refused_only_where_they_can_be_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt name is an error in our own file and a warning in the environment; other programs' are neither."""
    names = ("KIS_TIMOUT", "KIS_SECRET_DIR", "KIS_MARKET__HK__APP_KEY", "KIS_ACCOUNT_NO", "KIS_ACCESS_TOKEN")
    os.environ |= dict.fromkeys(names, "Canary")
    meant = ("KIS_TIMEOUT", "KIS_SECRETS_DIR", "KIS_MARKETS__HK__APP_KEY", "")
    unknown = dict(zip(names, meant, strict=False))
    assert Settings.load().misspelt() == unknown
    assert caplog.messages == [f"Unknown setting {name}; did you mean {unknown[name]}?" for name in names[:3]]
    prefect = "prefect_server_api_port = 1", "read from the environment and .env only."
    for line, hint in (
        ("app_kee = 1", "did you mean KIS_APP_KEY?"),
        ("[slack]\nurl = 'x'", "lists the settings."),
        prefect,
    ):
        config(line)
        assert refusal().endswith(hint)


# --- a market


def test_the_defaults_are_the_contracts(isolated: Path) -> None:
    """Without any setting, the values are those of the contract's table."""
    loaded = Settings.load()
    us, kr = loaded.all_markets()
    assert (us.exchanges, kr.exchanges, us.exports) == (("NASD", "NYSE", "AMEX"), ("KRX",), ())
    assert (loaded.issue_interval, loaded.timeout, loaded.max_issues_per_day) == (60, 10, 2)
    assert (us.buffer, us.proactive_window) == (300, 1800)
    assert (us.environment, us.base_url, us.token_dir) == ("real", REAL, str(isolated / ".tokencore"))
    assert (loaded.prove_tokens, loaded.slack_language, loaded.hts_id, us.app_key) == (True, "en", None, None)
    assert "set KIS_APP_KEY and KIS_APP_SECRET" in refusal(loaded.able_markets)


def test_a_market_has_values_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """What a market sets holds for it alone, whatever the form of lists and names; spaces around keys are removed."""
    config('[markets.hk]\napp_key = " OwnCanary "\nexchanges = ["sehk", "SHAA"]\nexports = ["mojito2:~/bot"]\n')
    os.environ |= {**PAIR, "KIS_MARKETS__US__EXCHANGES": ' nas, "nys" ', "KIS_MARKETS__HK__BASE_URL": "http://[::1]:80"}
    os.environ |= {"KIS_MARKETS__US__BASE_URL": "HTTPS://own/kis/", "KIS_MARKETS__KR__APP_SECRET": f"{SECRET}\r\n"}
    os.environ |= {"kis_markets__AB__exports": "kis-auth, python-kis:/tmp", "SLACK_WEBHOOK_URL": f" {SECRET}\r\n"}
    os.environ |= {"SLACK_CHANNEL": " C1 ", "SLACK_LANGUAGE": "ko\n", "SLACK_BOT_TOKEN": f"{SECRET} "}
    os.environ |= {"KIS_STORE": f" postgresql://u:{SECRET}@h\n", "KIS_STORE_KEYS": f"{SECRET},{KEY}"}
    loaded, _ = Settings.load(), Settings.load()
    assert [one.name for one in loaded.able_markets()] == ["us", "kr", "ab", "hk"]
    hk = loaded.market("HK")
    assert (hk is loaded.market("hk"), hk.credentials()) == (True, ("OwnCanary", SECRET))
    assert (loaded.market("kr").credentials(), read_market("kr").credentials()) == ((KEY, SECRET),) * 2
    assert (hk.exchanges, loaded.market("us").exchanges, us().exchanges) == (("SEHK", "SHAA"), *[("NASD", "NYSE")] * 2)
    assert loaded.store
    assert loaded.store.get_secret_value().endswith("@h")
    assert loaded.slack_webhook_url == loaded.slack_bot_token == loaded.markets["kr"].app_secret
    assert (loaded.slack_channel, loaded.slack_language) == ("C1", "ko")
    assert (hk.exports, loaded.market("ab").exports) == (("mojito2:~/bot",), ("kis-auth", "python-kis:/tmp"))
    assert [read_market(name).base_url for name in ("us", "hk", "kr")] == ["HTTPS://own/kis", "http://[::1]:80", REAL]
    assert read_market("aB").fingerprint == loaded.market("kr").fingerprint != hk.fingerprint
    assert {line.split()[0] for line in caplog.messages} == {"KIS_MARKETS__KR__APP_SECRET", "KIS_MARKETS__HK__APP_KEY"}
    shown = f"{caplog.text} {loaded!r} {loaded.model_dump_json()} {hk!r} {vars(loaded)['found']!r}"
    assert (len(caplog.messages), "Canary" in shown) == (2, False)


@pytest.mark.parametrize("name", ["jp", "", "../us", "us/", "u s", "us\n", "서울", KEY, "x" * 200])
def test_an_unknown_market_is_refused(name: str) -> None:
    """A name that is not configured or cannot name a file is an error, which repeats no key given in its place."""
    for read in (read_market, Settings.load().market):
        message = refusal(partial(read, name))
        assert re.search(r"not configured \(known: us, kr\)|not a market's name", message)
        assert name != KEY or name.lower() not in message.lower()


@pytest.mark.parametrize(
    ("address", "environment"),
    [(PAPER, "real"), (f"{REAL}/", "paper"), (PAPER[:-6], "real"), (f"{PAPER[:-6]}.:29443/", "real")],
)
def test_the_other_environments_address_is_refused(address: str, environment: str) -> None:
    """As the key would be sent to where it is unknown, both readers refuse, and say which environment to set."""
    os.environ |= {"KIS_BASE_URL": address, "KIS_ENVIRONMENT": environment}
    assert (message := refusal(us)) == refusal()
    assert f"set KIS_ENVIRONMENT={'paper' if environment == 'real' else 'real'}" in message


OURS = ("virtual", "demo", "VPS", "mock", "모의")
THEIRS = ("KIS_ENV=Virtual", "KIS_IS_PAPER=true", "KIS_ACCOUNT_TYPE=Virtual", "KIS_MODE=모의", "KIS_MODE=fast")
WORDS = {  # what is set: the resulting environment, and the setting that the warning names
    **{f"KIS_ENVIRONMENT={word}": ("paper", "KIS_ENVIRONMENT=paper") for word in OURS},
    "KIS_MARKETS__US__ENVIRONMENT=demo": ("paper", "KIS_MARKETS__US__ENVIRONMENT=paper"),
    **dict.fromkeys(THEIRS, ("real", "KIS_ENVIRONMENT=real or KIS_ENVIRONMENT=paper")),
    "KIS_IS_PAPER=False": ("real", None),
    "KIS_MODE=fast KIS_ENVIRONMENT=paper": ("paper", None),
}


@pytest.mark.parametrize("given", WORDS)
def test_other_tools_words_for_the_environment_draw_one_warning(given: str, caplog: pytest.LogCaptureFixture) -> None:
    """The warning names the right setting; a word for paper counts in our setting, not in another tool's variable."""
    os.environ |= dict(one.split("=") for one in given.split())
    expected, right = WORDS[given]
    assert [Settings.load().market("us").environment for _ in range(2)] == [expected] * 2
    assert [message.partition("; ")[2] for message in caplog.messages] == ([f"set {right}."] if right else [])


def test_what_the_user_knows_of_exchanges() -> None:
    """Closed days and hours are read from text and TOML, under any alias of the exchange."""
    os.environ["KIS_EXCHANGES__KRX__CLOSED"] = "2026-12-31, 2027-01-04"
    os.environ["KIS_EXCHANGES__KRX__HOURS__2026-12-30"] = "10:00-15:30"
    config('[exchanges.xhkg]\nextended = true\n[exchanges.XHKG.hours]\n2026-12-24 = "09:30 - 12:00"\n')
    closed = frozenset({date(2026, 12, 31), date(2027, 1, 4)})
    assert Settings.load().overrides == {
        "KRX": Override(closed, {date(2026, 12, 30): (clock(10), clock(15, 30))}),
        "SEHK": Override(frozenset(), {date(2026, 12, 24): (clock(9, 30), clock(12))}, extended=True),
    }


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
    """For any settings in any sources, both accept the same ones and read the same values from them."""
    with settings_in(placed):
        try:
            fast = [read_market(name) for name in ("us", "kr", *(gather().markets & {"hk"}))]
        except ConfigurationError:
            assert refusal()
            return
        loaded = Settings.load()
    for market in fast:
        own = loaded.markets.get(market.name) or MarketSettings()
        key = own.app_key or loaded.app_key
        environment = own.environment or loaded.environment
        url = own.base_url or (loaded.base_url if environment == loaded.environment else None) or HOSTS[environment]
        expected = (key and key.get_secret_value(), environment, url, loaded.token_dir, loaded.buffer)
        assert SIX(market) == SIX(loaded.market(market.name)) == (*expected, loaded.proactive_window)


# --- the keyring


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What is asked of an empty keyring, which KIS_KEYRING switches on, while only the app key is set."""
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_KEYRING": "kis"}
    asked = Mock(return_value=None)
    monkeypatch.setattr(keyring, "get_password", asked)
    return asked


def test_a_secret_that_no_other_source_gives_comes_from_the_keyring_once(kept: Mock) -> None:
    """The secret is asked for by its variable's name when a request needs it; a market with its own key has another."""
    content = {"KIS_APP_SECRET": SECRET, "KIS_MARKETS__KR__APP_SECRET": "of-kr"}
    kept.side_effect = lambda _, name: content.get(name)
    us = read_market("us")
    assert (us.identified(), kept.mock_calls) == (KEY, [])
    assert [us.credentials() for _ in range(2)] == [(KEY, SECRET)] * 2
    assert kept.mock_calls == [call("kis", "KIS_APP_SECRET")]
    assert Settings.load().origins["KIS_APP_SECRET"] == "keyring kis"
    given = {"KIS_APP_SECRET": "given", "KIS_MARKETS__KR__APP_SECRET": "too"}
    for own, secrets in (({"KIS_MARKETS__KR__APP_KEY": KEY}, [SECRET, "of-kr"]), (given, ["given", "too"])):
        kept.reset_mock()
        os.environ |= own
        assert [read_market(name).credentials()[1] for name in ("us", "kr")] == secrets
    assert kept.mock_calls == []


@pytest.mark.usefixtures("gateway")
def test_the_keyring_is_asked_for_nothing_but_requests(kept: Mock, command: Command) -> None:
    """While it is locked, or would prompt a person, the present token and all that needs no request work as ever."""
    del os.environ["KIS_APP_SECRET"]
    with (store := Key.load(Settings.load())[0].store).lock(wait=5):
        store.save(make_token(life=86_000))
    for line in ("get us", "check", "plan", "history", "metrics", "tick", "export us --to kis-auth there"):
        assert command(*line.split()).code == 0
    assert command("refresh", "us").code == 4
    Key.load(Settings.load())[0].sync_exports()
    assert command("delete", "us").out == "Deleted.\n"
    assert kept.mock_calls == []


def test_whoever_unlocks_the_keyring_keeps_nobody_from_the_key(kept: Mock) -> None:
    """The secret is asked for before the key's lock is taken, as a person may think about it for long."""
    free: list[bool] = []

    def prompt(*_: str) -> None:
        with Key.load(Settings.load())[0].store.lock(wait=0) as held:
            free.append(held)

    kept.side_effect = prompt
    assert "keyring set" in refusal(TokenManager("us").get_valid_token)
    assert set(free) == {True}


FAILING: dict[str, tuple[object, str]] = {
    "locked": (KeyringLocked("Canary"), "it failed (KeyringLocked): unlock it"),
    "empty": (None, "`keyring set kis KIS_APP_SECRET`"),
    "malformed": ("Canary Canary", "it failed (ValueError)"),
    "not installed": (ModuleNotFoundError("Canary"), "pip install 'keyring>=25'"),
}


@pytest.mark.parametrize(("content", "why"), FAILING.values(), ids=FAILING)
def test_a_keyring_that_does_not_serve_is_one_sentence(kept: Mock, content: object, why: str) -> None:
    """The sentence says what is wrong and what to do, and does not repeat the backend's own words."""
    kept.side_effect = [content]
    assert why in refusal(us().credentials)


def test_missing_credentials_are_named_with_both_ways_to_set_them(kept: Mock) -> None:
    """An app key is not looked for in the keyring, and without KIS_KEYRING neither is a secret."""
    os.environ["KIS_APP_KEY"] = ""
    assert "keyring holds only its secret" in refusal(us().identified)
    os.environ |= {"KIS_APP_KEY": KEY, "KIS_KEYRING": ""}
    assert "set KIS_APP_SECRET (or KIS_MARKETS__KR__APP_SECRET)" in refusal(read_market("kr").credentials)
    assert kept.mock_calls == []
    os.environ |= {"KIS_KEYRING": "kis", "KIS_APP_SECRET": SECRET, "KIS_MARKETS__KR__APP_KEY": KEY}
    assert read_market("kr").credentials() == (KEY, SECRET), "the keyring has none of its own"
