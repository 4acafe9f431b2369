"""Where settings come from, whom they trust, what they may be, and what is said where one is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import KEY, SECRET, ended, in_child
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from servers import Wire
from test_secrets import leaking

from tokencore.config import market_of_program, read_market, sources
from tokencore.config.settings import Settings
from tokencore.config.sources import FILE_LIMIT, trusted_dotenv
from tokencore.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from running import Ran

    from tokencore.config.market import Market

PAIR = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET}
EVIL = "http://127.0.0.1:1"
TRUSTED = ("environment", "config.toml")
SPARSE = 48 * 1024 * 1024  # bytes
PROMPT = 20.0  # seconds in which a busy machine has started Python; a reader that blocks never ends
NAMELESS = 54_321  # a user id that no system gives a name
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """For a while, changes of the environment that are taken back."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def own_environment(isolated: Path) -> Iterator[Path]:
    """Each test may set what it wants, and hears each warning once."""
    sources._warned.clear()  # noqa: SLF001 - by an earlier test
    with restored():
        yield isolated


def config(text: str = "", **values: str) -> Path:
    """`~/.tokencore/config.toml` with this text, or these variables."""
    path = Path.home() / ".tokencore" / "config.toml"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    lines = [f"{name.lower().removeprefix('kis_').replace('__', '.')} = {json.dumps(values[name])}" for name in values]
    path.write_text("\n".join([text, *lines]))
    return path


def dotenv(text: str = "", **values: str) -> Path:
    """`.env` in the working directory with this text, or these variables."""
    path = Path(".env").absolute()
    path.write_text(text + "".join(f"{name}={value}\n" for name, value in values.items()))
    return path


def secrets(**values: str) -> str:
    """The secrets folder with a file for each variable."""
    folder = Path("secrets").absolute()
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")
    return str(folder)


def give(source: str, values: Mapping[str, str]) -> None:
    """Have the variables come from the source of that name."""
    if source == "environment":
        os.environ.update(values)
    elif source == "secrets folder":
        os.environ["KIS_SECRETS_DIR"] = secrets(**values)
    else:
        {".env": dotenv, "config.toml": config}[source](**values)


def refusal(work: Callable[[], object] = Settings.load) -> str:
    """The one sentence of the refusal; no frame of ours on its way has a credential."""
    with pytest.raises(ConfigurationError) as caught:
        work()
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    assert len(message) < 1000
    assert leaking(caught.value) == []
    return message


def us() -> Market:
    """The market `us` as a cached `get` reads it."""
    return read_market("us")


# --- where settings come from


def test_environment_beats_dotenv_beats_secrets_beats_config_file() -> None:
    """With all four sources present the first one counts, then the next one when it is gone or says nothing."""
    folder = secrets(kis_buffer="63")
    config(f"buffer = 64\nsecrets_dir = '{folder}'\n[markets.hk]\nenvironment = 'paper'\n")
    path = dotenv("export KIS_BUFFER='62'\n")
    os.environ |= {"KIS_BUFFER": "61", "KIS_SECRETS_DIR": ""}
    seen, drops = [], (lambda: os.environ.update(KIS_BUFFER=""), path.unlink, Path(folder, "kis_buffer").unlink, dict)
    for drop in drops:
        seen.append((us().buffer, Settings.load().buffer))
        drop()
    assert seen == [(61, 61), (62, 62), (63, 63), (64, 64)]
    assert read_market("HK").environment == "paper"


def test_secrets_folder_as_kubernetes_mounts_it() -> None:
    """Files behind links count, final newlines do not; folders and other programs' files are not opened."""
    secrets(**PAIR)
    mount = Path("mount")
    mount.mkdir()
    for name in PAIR:
        (mount / name).symlink_to(Path("../secrets") / name)
    (mount / "tls.key").write_bytes(b"\xff\xfe")
    os.mkfifo(mount / "pipe")
    (mount / "kis_certificates").mkdir()
    os.environ["KIS_SECRETS_DIR"] = str(mount)
    assert us().credentials() == (KEY, SECRET)


def test_what_files_of_settings_may_look_like(caplog: pytest.LogCaptureFixture) -> None:
    """A byte order mark and a wrong line, which is reported but not repeated, harm no other; 64 KiB are read."""
    filling = f"# {'x' * 61}\n" * 1024
    config("\ufeffbuffer = 9\n")
    path = dotenv(
        f"\ufeffKIS_APP_KEY={KEY}\nexport the secret Canary\n{filling}"[: FILE_LIMIT - 18] + "\nKIS_TIMEOUT=7\n"
    )
    os.truncate(path, FILE_LIMIT)
    assert [(us().app_key, us().buffer, Settings.load().timeout) for _ in range(2)] == [(KEY, 9, 7)] * 2
    assert caplog.messages == [f"{path}, line 2, is not NAME=value, so it is ignored; fix or remove it."]
    path.unlink()
    path.mkdir()
    assert us().app_key is None, "a folder of this name is a virtualenv"


CONFIG, SECRET_FILE = "~/.tokencore/config.toml", "secrets/KIS_APP_KEY"
UNREADABLE: dict[str, tuple[str, bytes | str]] = {
    "config without a value": (CONFIG, b"buffer = \n"),
    "config without an end": (CONFIG, b'app_secret = "Canary\n'),
    "config not UTF-8": (CONFIG, b'app_secret = "Canary\xff"'),
    "config nested too deep": (CONFIG, b"a = " + b"[" * 20_000),
    "config a folder": (CONFIG, "folder"),
    "dotenv not UTF-8": (".env", b"KIS_APP_SECRET=Canary\xff\n"),
    "secret not UTF-8": (SECRET_FILE, b"Canary\xff"),
    "secrets no folder": ("secrets", b"Canary"),
}
KINDS = {"pipe": "not a regular file", "device": "not a regular file", "socket": "not a regular file"}
KINDS |= {"48 MB": "65536 bytes", "one byte too many": "65536 bytes"}
UNREADABLE |= {f"{name} a {kind}": (name, kind) for name in (".env", CONFIG, SECRET_FILE) for kind in KINDS}


def make_strange(path: Path, what: bytes | str) -> None:
    """Put something, or these bytes, in place of a file of settings."""
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(path.parent):  # a socket's address is short
            one.bind(path.name)
    else:
        path.write_bytes(what if isinstance(what, bytes) else b"")
        if what in KINDS:
            os.truncate(path, SPARSE if what == "48 MB" else FILE_LIMIT + 1)


@pytest.mark.parametrize(("name", "what"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_source_that_cannot_be_read_is_named_in_one_sentence_at_once(name: str, what: bytes | str) -> None:
    """Neither reader waits, takes memory or repeats the content, whatever stands in place of the file."""
    os.environ |= PAIR
    path = Path(name).expanduser().absolute()
    path.parent.mkdir(exist_ok=True)
    make_strange(path, what)
    if "secrets" in name:
        os.environ["KIS_SECRETS_DIR"] = "secrets"
    began = time.monotonic()
    tracemalloc.start()
    for work in (us, Settings.load):
        message = refusal(work)
        assert path.name in message
        assert KINDS.get(str(what), "") in message
    assert (time.monotonic() - began < PROMPT, tracemalloc.get_traced_memory()[1] < SPARSE / 4) == (True, True)
    tracemalloc.stop()


def test_each_setting_has_an_origin() -> None:
    """By variable name: the environment, `.env`, the secrets folder, config.toml; the first one that gave it."""
    folder = secrets(KIS_APP_SECRET=SECRET)
    dotenv(KIS_APP_KEY=KEY, KIS_TIMEOUT="7")
    config(f"secrets_dir = '{folder}'\nbuffer = 200\n[markets.hk]\nexchanges = ['SEHK']\n")
    os.environ |= {"KIS_TIMEOUT": "5", "PREFECT_UI_URL": "https://prefect"}
    toml = dict.fromkeys(("KIS_SECRETS_DIR", "KIS_BUFFER", "KIS_MARKETS__HK__EXCHANGES"), "~/.tokencore/config.toml")
    environment = dict.fromkeys(("KIS_TIMEOUT", "PREFECT_UI_URL"), "environment")
    assert Settings.load().origins == {"KIS_APP_KEY": ".env", "KIS_APP_SECRET": folder, **toml, **environment}


# --- whom they trust


@pytest.mark.parametrize(
    "variable",
    ["KIS_BASE_URL", "KIS_MARKETS__US__BASE_URL", "KIS_SECRETS_DIR", "KIS_STORE", "KIS_MARKETS__US__EXPORTS"],
)
@pytest.mark.parametrize("source", ["config.toml", "environment", "secrets folder"])
def test_a_cloned_repository_gets_no_secret_of_another_source(
    source: str, variable: str, command: Callable[..., Ran]
) -> None:
    """A command in a folder whose `.env`, the user's own file, says where a secret goes: refused, nothing is sent."""
    give(source, {**PAIR, "KIS_STORE_KEYS": SECRET})
    trap = Path("trap").absolute()
    trap.mkdir()
    if variable == "KIS_SECRETS_DIR":
        os.environ.pop(variable, None)
    with Wire() as thief:
        (trap / "KIS_BASE_URL").write_text(thief.url)
        value = {"KIS_SECRETS_DIR": str(trap), "KIS_MARKETS__US__EXPORTS": f"mojito2:{trap}"}.get(variable, thief.url)
        path = dotenv(**{variable: value})
        messages = {refusal(work) for work in (us, Settings.load, Settings, trusted_dotenv)}
        assert len(messages) == 1
        assert (message := messages.pop()).startswith(f"{variable} in {path} is refused, because ")
        assert "~/.tokencore/config.toml" in message
        for line in ("get us", "check", "refresh us --force"):
            assert command(*line.split()) == (2, "", f"tokencore: {message}\n")
    assert (thief.requests, os.listdir(trap), list(Path.home().rglob("*.json*"))) == ([], ["KIS_BASE_URL"], [])


def test_an_address_of_dotenv_takes_no_credential_of_a_program_with_it() -> None:
    """A subclass that gives the credentials itself is as safe as a secret in config.toml."""
    dotenv(KIS_APP_KEY="bait", KIS_APP_SECRET="bait", KIS_BASE_URL=EVIL)
    assert "KIS_BASE_URL in " in refusal(lambda: market_of_program("us", lambda: (KEY, SECRET), us().base_url))
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
    """Wherever each variable comes from, both readers refuse an address where the rule says so, and else take it."""
    with restored():
        shutil.rmtree("secrets", ignore_errors=True)
        for source in SOURCES:
            names = [name for name, place in places.items() if place == source]
            give(source, {name: VALUES.get(name.rpartition("_")[2], "word") for name in names})
        os.environ |= {"KIS_MARKETS__HK__EXCHANGES": "SEHK", "KIS_MARKETS__HK__ENVIRONMENT": hk}
        store = places.get("KIS_STORE", "environment")
        expected = store not in (*TRUSTED, places.get("KIS_STORE_KEYS")) or any(
            is_foreign(s, places, hk) for s in MARKETS
        )
        assert [refuses(work) for work in (us, lambda: read_market("hk"), Settings.load)] == [expected] * 3
        assert expected or (us().base_url == EVIL) == ("KIS_BASE_URL" in places)


def refuses(work: Callable[[], object]) -> bool:
    """Whether it refuses an address."""
    try:
        work()
    except ConfigurationError as error:
        return "is refused, because" in str(error)
    return False


def is_foreign(stem: str, places: Mapping[str, str], hk: str) -> bool:
    """The rule in other words than the product's: for all markets (`KIS_`) or for hk."""
    own_key = "KIS_MARKETS__HK__APP_KEY" in places and stem != "KIS_"
    secret = places.get("KIS_APP_SECRET")
    if f"{stem}APP_SECRET" in places:
        secret = places[f"{stem}APP_SECRET"]
    elif "KIS_KEYRING" in places and (own_key or "KIS_APP_SECRET" not in places):
        secret = "keyring"
    key = places.get(f"{stem}APP_KEY") or places.get("KIS_APP_KEY")
    address = places.get(f"{stem}BASE_URL") or (places.get("KIS_BASE_URL") if hk != "paper" else None)
    asked = {address, places.get(f"{stem}EXPORTS")} - {None, *TRUSTED}
    return any(secret not in (None, place) or (place == ".env" and key not in (None, place)) for place in asked)


def linked_into_an_open_folder() -> None:
    """Have `.env` be a link to a file that others can exchange."""
    shared = Path("shared").absolute()
    shared.mkdir()
    Path(".env").rename(shared / "env")
    Path(".env").symlink_to(shared / "env")
    shared.chmod(0o777)


def give_away(path: Path) -> None:
    """Have it belong to another user."""
    os.chown(path, NAMELESS, NAMELESS)


OPEN = {
    "another user's file": lambda: give_away(Path(".env")),
    "another user's folder": lambda: give_away(Path.cwd()),
    "file for all": lambda: Path(".env").chmod(0o666),
    "file for the group": lambda: Path(".env").chmod(0o660),
    "folder for the group": lambda: Path.cwd().chmod(0o770),
    "folder for all": lambda: Path.cwd().chmod(0o777),
    "folder like /tmp": lambda: Path.cwd().chmod(0o1777),
    "link into a folder for all": linked_into_an_open_folder,
}


@as_root
@pytest.mark.parametrize("opened", OPEN.values(), ids=OPEN)
def test_dotenv_that_others_can_have_written_is_ignored(
    opened: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """One warning names the file and why; nothing in it counts, not even for who hands it on."""
    config(**PAIR)
    path = dotenv(KIS_APP_KEY="a", KIS_APP_SECRET="b", KIS_BASE_URL=EVIL)
    assert us().base_url == EVIL
    opened()
    assert [us().app_key, Settings.load().base_url, trusted_dotenv()] == [KEY, None, {}]
    assert [message.startswith(f"{path} is ignored, because ") for message in caplog.messages] == [True]


@as_root
def test_dotenv_of_root_counts_for_a_user_without_a_home() -> None:
    """A service's user reads what root wrote and no config.toml of a folder named `~`; its token folder must be set."""

    def as_nameless() -> None:
        os.setgroups([])
        os.setgid(NAMELESS)
        os.setuid(NAMELESS)
        del os.environ["HOME"]
        assert (us().buffer, us().proactive_window, Settings.load().buffer) == (7, 1800, 7)
        os.chdir("/")  # where no .env is
        for work in (us, Settings.load):
            assert "KIS_TOKEN_DIR cannot be used: set it to an absolute path" in refusal(work)
        os.environ.update(KIS_TOKEN_DIR="/nowhere", KIS_MARKETS__US__EXPORTS="kis-auth")
        assert "KIS_MARKETS__US__EXPORTS cannot be used: set it to an absolute path" in refusal()

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(folder).chmod(0o755)
        trap = Path("~/.tokencore")
        trap.mkdir(parents=True)
        (trap / "config.toml").write_text("proactive_window = 8\n")
        dotenv(KIS_BUFFER="7", KIS_TOKEN_DIR="/nowhere")
        assert us().buffer == Settings.load().buffer == 7  # what is imported late is known before the user changes
        assert ended(in_child(as_nameless)) == 0


def test_dotenv_adds_to_the_environment_only_what_counts() -> None:
    """For who hands it on: names in upper case, the environment's own not among them."""
    os.environ |= {"KIS_TIMEOUT": "7", "KIS_BUFFER": ""}
    dotenv(kis_timeout="9", KIS_BUFFER="9", PREFECT_SERVER_API_PORT="4201")
    assert trusted_dotenv() == {"KIS_BUFFER": "9", "PREFECT_SERVER_API_PORT": "4201"}
