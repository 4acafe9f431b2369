"""What a cloned repository, another user's folder, a strange file or a person's words can do: nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import KEY, SECRET, make_answer
from hypothesis import example, given
from hypothesis import strategies as st
from other_users import STRANGER, by_a_stranger, give_away, needs_root, public
from running import Ran, asked, one_line, outcomes, raised, tokencore
from servers import Wire
from test_settings import dotenv, give, own_environment

from tokencore import ConfigurationError, Key, TokenManager, USTokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tokencore.sandbox import Sandbox

__all__ = ["own_environment", "public"]  # fixtures
PAIR = {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET}
GUARDED = ("config.toml", "environment", "secrets folder")
PLACES = ("KIS_BASE_URL", "KIS_MARKETS__US__BASE_URL", "KIS_SECRETS_DIR", "KIS_MARKETS__US__EXPORTS")
NASTY = "\x1b[2J\x1b]0;x\x07\u202ekcats\u2066\u200f\u2028next\x85\x9b31m\r\nlast\u200b"


@pytest.fixture
def thief() -> Iterator[Wire]:
    """A server that wants the secret: it keeps what it is sent, and answers as KIS does."""
    with Wire() as server:
        server.answer(200, make_answer())
        yield server


def only(source: str, values: Mapping[str, str]) -> None:
    """Have these variables, from the source of that name, be all that is known of keys and addresses."""
    for name in ("KIS_APP_KEY", "KIS_APP_SECRET", "KIS_BASE_URL"):
        os.environ.pop(name, None)  # the fixture of the gateway has set them
    give(source, values)


# --- a cloned repository


@pytest.mark.parametrize("variable", PLACES)
@pytest.mark.parametrize("source", GUARDED)
def test_a_cloned_repository_gets_no_secret_of_another_source(source: str, variable: str, thief: Wire) -> None:
    """A command in a folder whose `.env`, the user's own file, says where a secret goes: refused, nothing is sent."""
    only(source, PAIR)
    trap = Path("trap").absolute()
    trap.mkdir()
    (trap / "KIS_BASE_URL").write_text(thief.url)
    if variable == "KIS_SECRETS_DIR":
        os.environ.pop(variable, None)
    value = {"KIS_SECRETS_DIR": str(trap), "KIS_MARKETS__US__EXPORTS": f"mojito2:{trap}"}.get(variable, thief.url)
    path = dotenv(**{variable: value})
    for line in ("get us", "check", "refresh us --force"):
        ran = tokencore(*line.split())
        assert (line, ran.code) == (line, 2)
        assert one_line(ran).startswith(f"tokencore: {variable} in {path} is refused, because ")
        assert "~/.tokencore/config.toml" in ran.err
        assert not {APP_KEY, APP_SECRET} & set(ran.err.split())
    assert (thief.requests, os.listdir(trap)) == ([], ["KIS_BASE_URL"])
    assert list(Path.home().rglob("*.json*")) == []


@pytest.mark.parametrize("exports", ["mojito2", "kis-auth:{copies}", "python-kis, mojito2:{copies}"])
def test_dotenv_says_where_copies_go_for_its_own_secret_only(exports: str, gateway: Sandbox) -> None:
    """A place for copies, or the secret beside the tokens, is refused beside another source; for its own it counts."""
    copies = Path("copies").absolute()
    copies.mkdir()
    wanted = {"KIS_MARKETS__US__EXPORTS": exports.format(copies=copies), "KIS_HTS_ID": "me"}
    dotenv(**wanted)
    assert tokencore("get", "us").code == 2

    class Vaulted(USTokenManager):
        def get_app_credentials(self) -> tuple[str, str]:
            return KEY, SECRET

    dotenv(KIS_MARKETS__US__EXPORTS="kis-auth,python-kis", KIS_HTS_ID="me")  # as these clients look at home
    assert tokencore("check", "us").code == 3
    only(".env", {**wanted, **PAIR})
    assert "KIS_MARKETS__US__EXPORTS" in str(raised(Vaulted))
    only(".env", {**wanted, **PAIR, "KIS_BASE_URL": gateway.url})
    ran = tokencore("get", "us")
    assert (ran.code, asked(gateway)) == (0, 1)
    assert [*copies.iterdir(), *Path.home().rglob("us_krs_token.dat")] != []


# --- a folder of another user


def assert_ignored(ran: Ran, path: Path, culprit: Path) -> None:
    """One line says that `path` is ignored, and whose fault it is."""
    lines = [line for line in ran.err.splitlines() if "is ignored" in line]
    assert len(lines) == 1
    assert lines[0].removeprefix("tokencore: ").startswith(f"{path} is ignored, because ")
    assert f"{culprit.resolve()}" in lines[0].partition("because")[2]


@needs_root
def test_dotenv_of_another_user_is_ignored(public: Path, thief: Wire, gateway: Sandbox) -> None:
    """In another user's folder, `get` warns once and asks whom the user's own settings say."""
    only("config.toml", {**PAIR, "KIS_BASE_URL": gateway.url})
    trap = public / "trap"
    trap.mkdir()
    give_away(trap)
    lines = f"KIS_APP_KEY=a\\nKIS_APP_SECRET=b\\nKIS_BASE_URL={thief.url}\\n"
    by_a_stranger(f"printf {shlex.quote(lines)} > .env", trap)
    os.chdir(trap)
    ran = tokencore("get", "us")
    assert (ran.code, asked(gateway), thief.requests) == (0, 1, [])
    assert_ignored(ran, trap / ".env", trap)


@needs_root
@pytest.mark.parametrize("opened", ["file", "folder"])
def test_dotenv_that_a_group_does_write_is_ignored(opened: str, public: Path) -> None:
    """Another user of the group writes the file, or one into the folder: what it says is not believed."""
    path = public / ".env"
    if opened == "file":
        path.touch(0o664)
        path.chmod(0o664)
    else:
        public.chmod(0o775)
    os.chown(path if opened == "file" else public, 0, STRANGER)
    by_a_stranger("echo KIS_TIMEOUT=nonsense > .env", public)
    os.chdir(public)
    for line in ("get us --no-renew", "check us"):
        ran = tokencore(*line.split(), **PAIR)
        assert ran.code == 3
        assert_ignored(ran, path, path if opened == "file" else public)


def test_the_doctor_sends_no_password_where_dotenv_says(thief: Wire) -> None:
    """Neither the environment's password for Prefect, nor the one that `make up` has generated; its own one goes."""
    home = Path.home() / ".tokencore" / "prefect"
    home.mkdir(parents=True, mode=0o700)
    (home / "password").write_text("admin:Canary")
    (home / "password").chmod(0o600)
    dotenv(PREFECT_API_URL=f"{thief.url}/api")
    tokencore("doctor", **PAIR, PREFECT_API_AUTH_STRING="admin:Canary", PREFECT_SERVER_API_PORT="1")
    assert thief.requests == []
    tokencore("doctor", **PAIR)
    assert {b"Authorization" in one for one in thief.requests} == {False}
    dotenv(PREFECT_API_URL=f"{thief.url}/api", PREFECT_API_AUTH_STRING="admin:Canary")
    tokencore("doctor", **PAIR)
    assert b"Authorization: Basic" in thief.requests[-1]


# --- a folder of nobody's


@pytest.mark.parametrize("value", ["relative/dir", "~nosuchuser-here/tokens"])
@pytest.mark.parametrize("source", ["environment", ".env", "config.toml"])
def test_a_token_directory_that_depends_on_the_folder_is_refused(source: str, value: str) -> None:
    """Programs started in two folders would have two caches: the sentence names the variable, and nothing is made."""
    only(source, {"KIS_TOKEN_DIR": value, **PAIR})
    before = sorted(os.listdir())
    for line in ("get us", "check", "refresh us"):
        ran = tokencore(*line.split())
        assert (ran.code, "KIS_TOKEN_DIR cannot be used: set it to an absolute path" in one_line(ran)) == (2, True)
    assert sorted(os.listdir()) == before


# --- what people type


def unclean(text: str) -> list[str]:
    """The characters that a terminal obeys, that turn words round or that end lines."""
    return [sign for sign in text if not sign.isprintable()]


@example(reason="word " * 100, by="word " * 100)
@given(reason=st.text(max_size=300), by=st.text(max_size=300))
def test_a_note_is_one_short_printable_line(reason: str, by: str) -> None:
    """Whatever is typed: cut to its length, or refused where it looks like a key."""
    try:
        kept = Key.note(reason, by)
    except ConfigurationError:
        return
    assert unclean("".join(kept)) == []
    assert (len(kept[0]) <= 80, len(kept[1]) <= 40) == (True, True)
    assert kept == Key.note(*kept)


def test_a_clean_note_stays_as_it_is_and_escape_sequences_go_whole() -> None:
    """Korean and accents, and signs that are no words."""
    assert Key.note("수동 갱신: €5 + café?", "김민지") == ("수동 갱신: €5 + café?", "김민지")
    assert Key.note(NASTY, "") == ("]0;x kcats next last", "")


@pytest.mark.parametrize("before", ["", "\x1b[2J", "x" * 30 + " ", "\u202e", "word " * 100])
def test_a_key_is_found_whatever_stands_before_it(before: str) -> None:
    """Also where only its beginning would be within the length."""
    for words in ((before + KEY, ""), ("", before + KEY)):
        assert isinstance(raised(lambda words=words: Key.note(*words)), ConfigurationError)  # type: ignore[misc]


@pytest.mark.usefixtures("gateway")
def test_a_command_keeps_and_repeats_nothing_raw() -> None:
    """The record has the clean words of `--reason` and `--by`; a wrong argument is repeated clean."""
    ran = tokencore("refresh", "us", "--reason", NASTY, "--by", f"Kim{NASTY}")
    assert ran.code == 0
    attempt = TokenManager("us").history()[-1]
    assert (attempt.reason, attempt.by) == ("]0;x kcats next last", "Kim ]0;x kcats next last")
    assert unclean(tokencore("history").out.replace("\n", "")) == []
    for wrong in (("refresh", "us", NASTY), (NASTY,), ("get", NASTY), ("export", "us", "--to", NASTY, "x")):
        told = tokencore(*wrong)
        assert told.code == 2
        assert unclean(told.err.removesuffix("\n")) == []
    assert outcomes() == ["issued"]
    told = tokencore("get", "us", KIS_TOKEN_DIR="/proc/\x1b[2J\u202ex")
    assert (told.code, "/proc/ x" in told.err, unclean(told.err[:-1])) == (7, True, [])
