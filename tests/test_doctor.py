"""`tokencore doctor`: what it finds in healthy and broken set-ups, without a change, an issue or a shown secret."""

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from builders import CANARIES, KEY, SECRET, make_jwt, make_token
from filelock import FileLock
from running import Command, asked, cached, folder, on_disk, record, snapshot
from servers import Wire, parsed

from tokencore import TokenManager
from tokencore.attempts import Attempt, Outcome
from tokencore.reports import doctor
from tokencore.sandbox import APP_KEY, Sandbox

ACCEPTED = "token accepted us+kr"


@pytest.fixture
def warm(gateway: Sandbox) -> Sandbox:
    """The gateway after it has issued a valid token for us and kr."""
    TokenManager("us").get_valid_token()
    return gateway


def move(url: str) -> None:
    """Set KIS's address, with OPEN for the gateway's port, and cache a token for it."""
    os.environ["KIS_BASE_URL"] = url.replace("OPEN", os.environ["KIS_BASE_URL"].rpartition(":")[2])
    cached(20_000)


@pytest.fixture(autouse=True)
def no_prefect() -> None:
    """Keep tests from asking a Prefect server of this machine."""
    os.environ |= {"PREFECT_API_URL": "", "PREFECT_SERVER_API_PORT": "1"}


def found(command: Command, code: int, **settings: str) -> dict[str, dict[str, str]]:
    """Run the doctor, which must exit with `code`, and return its findings by name."""
    ran = command("doctor", "--json", **settings)
    assert (ran.code, ran.err) == (code, ""), ran.out
    listed = json.loads(ran.out)
    assert all(one["cure"] or one["state"] in ("ok", "skipped") for one in listed)
    return {one["name"]: one for one in listed}


def test_a_healthy_set_up_is_exit_0_with_evidence(warm: Sandbox, command: Command) -> None:
    """A healthy set-up has no failure and a line for everything it needs, and a quote call proves its token."""
    seen = found(command, 0)
    assert {one["state"] for one in seen.values()} <= {"ok", "skipped"}
    needed = ("settings", "token directory", "file modes", "disk", "lock", "clock", "kis", "slack", "prefect", ACCEPTED)
    assert {*needed, "leftover files", "store", "token us", "issuing us+kr", "duplicates"} <= seen.keys()
    assert ("1 of 2 issues" in seen["issuing us+kr"]["detail"], warm.stats()["quotes"]) == (True, 1)


def test_looking_issues_and_writes_nothing_and_tells_no_secret(gateway: Sandbox, command: Command) -> None:
    """With or without a token, as JSON or as text of 79 columns, the doctor issues, writes and reveals nothing."""
    own = {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_BASE_URL_": "https://user:Canary@host"}
    own |= {"SLACK_WEBHOOK_URL": "http://127.0.0.1:1/services/Canary", "KIS_HTS_ID": "CanaryId"}
    os.environ |= {**own, "PREFECT_API_URL": "http://user:Canary@127.0.0.1:1/api"}
    said = [command("doctor"), command("doctor", "--json")]
    assert not folder().exists()
    cached(20_000)
    before = snapshot(folder())
    said += [text := command("doctor"), command("doctor", "--json")]
    after = snapshot(folder())
    assert [path for path in before | after if after.get(path) != before.get(path)] == [str(folder())], "its time alone"
    assert asked(gateway) == 0
    assert [canary for canary in CANARIES if any(canary in ran.out + ran.err for ran in said)] == []
    assert text.out.startswith("fail: ")  # findings are in the order to fix them, but a summary of failures is first
    assert (max(map(len, text.out.splitlines()[1:])) < 80, "\x1b" in text.out) == (True, False)


def test_settings_are_told_with_their_origin(command: Command) -> None:
    """Each setting is shown with its origin, a secret as its length; odd lengths and misspelt names are reported."""
    Path(".env").write_text("KIS_APP_KEY=PSshort\nKIS_BUFER=5\nKIS_OTHERS=1\n")
    Path(".env").chmod(0o644)
    own = {"KIS_MARKETS__HK__EXCHANGES": "SEHK", "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": "http://127.0.0.1:1"}
    seen = found(command, 3, **own)
    key = f"7 characters, from {Path('.env').resolve()}; KIS's have 36: copy it again if KIS refuses it"
    assert seen["setting KIS_APP_KEY"]["detail"] == key
    assert seen["setting KIS_MARKETS__HK__EXCHANGES"]["detail"] == "SEHK, from the environment"
    fixes = [seen[f"setting{name}"]["cure"] for name in (" KIS_BUFER", " KIS_OTHERS", "s file")]
    assert fixes == ["did you mean KIS_BUFFER?", "remove it, unless another program uses it", "chmod 600 .env"]


@pytest.mark.usefixtures("gateway")
def test_an_app_key_of_a_market_without_its_secret_is_warned_of(command: Command) -> None:
    """KIS refuses one account's key with another's secret; the common key again is no reason to warn."""
    name = "setting KIS_MARKETS__KR__APP_SECRET"
    assert found(command, 3, KIS_MARKETS__KR__APP_KEY=KEY)[name]["state"] == "warn"
    for harmless in ({"KIS_MARKETS__KR__APP_SECRET": "its"}, {"KIS_APP_KEY": KEY}):
        assert found(command, 3, KIS_MARKETS__KR__APP_KEY=KEY, **harmless).get(name, {}).get("state") != "warn"


def test_malformed_settings_are_exit_2_and_the_rest_is_still_looked_at(warm: Sandbox, command: Command) -> None:
    """A sentence names the variable, checks that need it are skipped, and the key's record is not called a leftover."""
    seen = found(command, 2, KIS_TIMEOUT="soon")
    assert ("KIS_TIMEOUT" in seen["settings"]["detail"], seen["leftover files"]["detail"]) == (True, "none")
    assert [seen[one]["state"] for one in ("tokens", "kis", "slack", "duplicates")] == ["skipped"] * 4
    assert ({"token directory", "disk", "prefect"} <= set(seen), asked(warm)) == (True, 1)


def test_another_folder_than_the_settings_name_is_not_called_the_token_directory(
    command: Command, tmp_path: Path
) -> None:
    """A refused KIS_TOKEN_DIR leaves no directory to check; a good one is checked even if other settings are not."""
    mine = str(tmp_path / "mine")
    seen = found(command, 2, KIS_TOKEN_DIR=mine, KIS_BASE_URL="x")["token directory"]
    assert (seen["state"], mine in seen["detail"]) == ("ok", True)
    assert found(command, 2, KIS_TOKEN_DIR="relative")["token directory"]["state"] == "skipped"


def unmount(_: Sandbox) -> None:
    """Leave of the token directory a link to a place that is not there."""
    folder().rename("aside")
    folder().symlink_to("nowhere")


REFUSED = Attempt(datetime(2026, 11, 27, tzinfo=UTC), Outcome.BAD_SECRET, code="EGW00105")
NETWORK = "check the address, the network and the firewall"
TROUBLES: dict[str, tuple[Callable[[Sandbox], object], int, str, str, str]] = {
    "directory is a file": (
        lambda _: (folder().rename("aside"), folder().write_text("")),
        *(7, "token directory", "Not a directory", "KIS_TOKEN_DIR"),
    ),
    "its drive is not mounted": (unmount, 7, "token us", "No such file or directory", "follow this message"),
    "rejected token": (lambda kis: kis.kill_tokens(), 3, ACCEPTED, "EGW00121", "tokencore reject"),
    "token known as rejected": (
        lambda _: TokenManager("us").save_token(make_token(age=60, rejected=True)),
        *(3, "token us", "REJECTED: no program can", "A new one can be issued from"),
    ),
    "expired token": (lambda _: cached(-100), 3, "token us", "EXPIRED: no program can", "tokencore get us"),
    "refused credentials": (lambda _: record(REFUSED), 5, "issuing us+kr", "bad_secret", "KIS_APP_SECRET"),
    "KIS refuses": (lambda _: move("http://127.0.0.1:1"), 6, "kis", "127.0.0.1 refuses the connection", NETWORK),
    "KIS without TLS": (lambda _: move("https://127.0.0.1:OPEN"), 6, "kis", "encrypted connection to 127", NETWORK),
    "no such name": (lambda _: move("https://kis.invalid"), 6, "kis", "name kis.invalid cannot be found", NETWORK),
}
"""What is wrong, the exit code, the finding that says it, and words of its detail and fix."""


@pytest.mark.parametrize("case", TROUBLES)
def test_each_trouble_has_its_exit_code_its_words_and_its_fix(warm: Sandbox, command: Command, case: str) -> None:
    """Each trouble is a failure that says what is wrong and what to do; without KIS, checks that ask it are skipped."""
    arrange, code, name, detail, fix = TROUBLES[case]
    arrange(warm)
    seen = found(command, code)
    one = seen[name]
    assert (one["state"], detail in one["detail"], fix in one["cure"]) == ("fail", True, True), one
    assert code != 6 or seen["clock"]["state"] == seen[ACCEPTED]["state"] == "skipped"


@pytest.mark.usefixtures("warm")
def test_a_full_disk_is_found_by_writing_and_its_fix_is_to_free_space(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes no more is a failure of the token directory, whose fix begins with freeing space."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    seen = found(command, 7)["token directory"]
    assert ("(No space left on device)" in seen["detail"], seen["cure"].startswith("free space, ")) == (True, True)


@pytest.mark.usefixtures("gateway")
def test_wide_modes_and_leftovers_are_warned_of(command: Command) -> None:
    """Wide modes, drafts, files set aside and other keys' files are warnings; a failure still sets the exit code."""
    cached()
    folder().chmod(0o755)
    names = [".us_api_token.json.x.tmp", "us_api_token.json.aside", "key-0123456789abcdef.jsonl", "old_api_token.json"]
    for name in names:
        (folder() / name).touch(0o644)
    seen = found(command, 3)  # the sandbox does not know the token
    assert re.search(r"key-0123456789abcdef\.jsonl, .* and 1 more$", seen["file modes"]["detail"])
    fixes = f"chmod 700 {folder()}", f"chmod go= {folder()}/*"  # 600 would make Prefect's folder there unusable
    assert (seen["token directory"]["cure"], seen["file modes"]["cure"]) == fixes
    assert [one.rpartition(": ")[2] for one in seen["leftover files"]["detail"].split("; ")] == names


@pytest.mark.usefixtures("warm")
def test_one_error_that_stops_several_checks_is_said_once(command: Command) -> None:
    """A token directory that others can write fails its own check; the checks that need it only name that one."""
    folder().chmod(0o777)
    seen = found(command, 7)
    assert "can be written by other users" in seen["token directory"]["detail"]
    others = {seen[name]["detail"] for name in ("lock", "token us", ACCEPTED, "duplicates")}
    assert others == {"token directory must be fixed first"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who holds a lock")
@pytest.mark.usefixtures("warm")
def test_who_holds_the_lock_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor names the process that holds the key's lock without disturbing it, or says that the lock is free."""
    assert found(command, 0)["lock"]["detail"] == "free"
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    with FileLock(next(folder().glob("key-*.lock")), preserve_lock_file=True):
        assert f"held by process {os.getpid()} for" in found(command, 1)["lock"]["detail"]


@pytest.mark.usefixtures("gateway")
def test_the_clock_is_compared_with_kis(command: Command, wire: Wire) -> None:
    """A clock that is off by more than seconds is a warning; so is an answer that says nothing about the token."""
    move(wire.url)
    for ahead, state, said in ((0, "ok", "agrees"), (12, "warn", "ahead of"), (-300, "warn", "behind")):
        wire.answer(404, {}, Date=format_datetime(datetime.now(UTC) - timedelta(seconds=ahead), usegmt=True))
        seen = found(command, 1)
        assert (seen["clock"]["state"], said in seen["clock"]["detail"]) == (state, True)
    assert seen[ACCEPTED]["state"] == "warn"


BOT = {"SLACK_BOT_TOKEN": "xoxb-Canary", "SLACK_CHANNEL": "#tokens"}
PREFECT = {"PREFECT_API_URL": "URL/api", "PREFECT_API_AUTH_STRING": "admin:Canary"}
POOL, AUTH, BEARER = "/api/work_pools/tokens", "/api/auth.test", "Bearer xoxb-Canary"
BASIC = "Basic YWRtaW46Q2FuYXJ5"
SERVERS: dict[str, tuple[dict[str, str], tuple[str, str], tuple[int, object], int, str]] = {
    "slack takes the bot": (BOT, (AUTH, BEARER), (200, {"ok": True}), 0, "make test-alert"),
    "slack refuses the bot": (BOT, (AUTH, BEARER), (200, {"ok": False, "error": "invalid_auth"}), 1, "invalid_auth"),
    "slack by both": ({"SLACK_WEBHOOK_URL": "URL/w", **BOT}, (AUTH, BEARER), (200, {"ok": True}), 0, "accepts the bot"),
    "slack by webhook": ({"SLACK_WEBHOOK_URL": "URL/services/Canary"}, ("/", ""), (404, {}), 0, "make test-alert"),
    "prefect": (PREFECT, (POOL, BASIC), (200, {"status": "READY"}), 0, "has a worker"),
    "prefect with one word": (
        {**PREFECT, "PREFECT_API_AUTH_STRING": "Canary"},
        *((POOL, "Basic Q2FuYXJ5"), (200, {"status": "READY"}), 0, "has a worker"),
    ),
    "prefect without a worker": (PREFECT, (POOL, BASIC), (200, {"status": "NOT_READY"}), 1, "is NOT_READY"),
    "prefect with another password": (PREFECT, (POOL, BASIC), (401, {}), 1, "HTTP 401"),
}
"""What is set, the one request with its authorization, what the server answers, the exit code, and what is said."""


@pytest.mark.parametrize("case", SERVERS)
@pytest.mark.usefixtures("warm")
def test_slack_and_prefect_are_asked_without_posting(
    command: Command, wire: Wire, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Only a webhook's host is asked, as its path is secret and would post; bot and Prefect need their passwords."""
    settings, asked, answer, code, said = SERVERS[case]
    monkeypatch.setattr(doctor, "SLACK_API", f"{wire.url}/api/")
    wire.answer(*answer)
    seen = found(command, code, **{name: text.replace("URL", wire.url) for name, text in settings.items()})
    assert said in seen[case.partition(" ")[0]]["detail"]
    assert [(path, headers.get("authorization", "")) for path, headers, _ in map(parsed, wire.requests)] == [asked]


@pytest.mark.usefixtures("warm")
def test_half_a_bot_is_an_error_that_names_the_other_half(command: Command) -> None:
    """A bot without a channel, and a channel without a bot, send nothing; a webhook beside either one still does."""
    for name, other in (("SLACK_BOT_TOKEN", "SLACK_CHANNEL"), ("SLACK_CHANNEL", "SLACK_BOT_TOKEN")):
        half = {name: BOT[name]}
        slack = found(command, 1, **half)["slack"]
        assert (slack["state"], slack["detail"].startswith(f"{other} is not set")) == ("fail", True)
        assert found(command, 1, SLACK_WEBHOOK_URL="none", **half)["slack"]["detail"].startswith("SLACK_WEBHOOK_URL")


@pytest.mark.usefixtures("warm")
def test_caches_of_other_clients_are_found_without_unpickling(isolated: Path, command: Command) -> None:
    """A cache with the app key, in clear or as a token's `jti`, is reported unless it holds our token."""
    pickled, sample = Path("token.dat").resolve(), isolated / "KIS" / "config" / "KIS20261121"
    sample.parent.mkdir(parents=True)
    pickled.write_text(f"cos\nsystem\n(S'touch exploded'\ntR.{APP_KEY}")  # unpickling would run this
    for token, warned in ((make_jwt(APP_KEY), True), (on_disk().access_token, False), (make_jwt("PSother"), False)):
        sample.write_text(f"token: {token}\n")
        detail = found(command, 1)["duplicates"]["detail"]
        assert (str(pickled) in detail, str(sample) in detail, Path("exploded").exists()) == (True, warned, False)
    pickled.unlink()
    assert found(command, 0)["duplicates"]["state"] == "ok"
