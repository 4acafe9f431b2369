"""`tokencore doctor`: what it finds, healthy and broken, and that it changes, issues and tells nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import CANARIES, KEY, SECRET, make_jwt
from running import Ran, asked, cached, folder, on_disk, snapshot, start, tokencore
from servers import Answers

from tokencore import TokenManager
from tokencore.reports import doctor
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.sandbox import Sandbox

    Command = Callable[..., Ran]
    Move = Callable[[str], None]

ACCEPTED = "token accepted us+kr"


@pytest.fixture
def answers() -> Iterator[Answers]:
    """The server."""
    with Answers() as running:
        yield running


@pytest.fixture
def warm(gateway: Sandbox) -> Sandbox:
    """KIS, which has issued a valid token for us and kr."""
    TokenManager("us").get_valid_token()
    return gateway


@pytest.fixture
def kis_at(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Move:  # noqa: ARG001 - for its settings
    """Look for KIS at another address, with a token of there in the cache."""

    def move(url: str) -> None:
        monkeypatch.setenv("KIS_BASE_URL", url)
        cached(20_000)

    return move


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Prefect server of this machine answers a test."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", "1")


def found(command: Command, code: int, **settings: str) -> dict[str, dict[str, str]]:
    """What a look finds that ends with `code`, by name."""
    ran = command("doctor", "--json", **settings)
    assert (ran.code, ran.err) == (code, ""), ran.out
    listed = json.loads(ran.out)
    assert all(one["cure"] or one["state"] in ("ok", "skipped") for one in listed)
    return {one["name"]: one for one in listed}


def test_a_healthy_set_up_is_exit_0_with_evidence(warm: Sandbox, command: Command) -> None:
    """No failure, a line for everything that a set-up needs, and the token is proven by a quote call."""
    seen = found(command, 0)
    assert {one["state"] for one in seen.values()} <= {"ok", "skipped"}
    needed = ("settings", "token directory", "file modes", "disk", "lock", "clock", "kis", "slack", "prefect", ACCEPTED)
    assert {*needed, "leftover files", "store", "token us", "issuing us+kr", "duplicates"} <= seen.keys()
    assert ("1 of 2 issues" in seen["issuing us+kr"]["detail"], warm.stats()["quotes"]) == (True, 1)


def test_looking_issues_and_writes_nothing_and_tells_no_secret(gateway: Sandbox, command: Command) -> None:
    """With and without a token, as JSON and as text of 79 columns: no request, no file touched, nothing secret."""
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
    first, *lines = text.out.splitlines()
    assert first.startswith("fail: ")  # in order of their fixes, but what is wrong is named before
    assert (max(map(len, lines)) < 80, "\x1b" in text.out) == (True, False)


def test_settings_are_told_with_their_origin(command: Command) -> None:
    """Each is shown, or masked to its length, with where it came from; odd lengths are told, misspelt names too."""
    Path(".env").write_text("KIS_APP_KEY=PSshort\nKIS_BUFER=5\nKIS_OTHERS=1\n")
    Path(".env").chmod(0o644)
    own = {"KIS_MARKETS__HK__EXCHANGES": "SEHK", "KIS_APP_SECRET": SECRET, "KIS_BASE_URL": "http://127.0.0.1:1"}
    seen = found(command, 3, **own)
    key = seen["setting KIS_APP_KEY"]["detail"]
    assert key == f"7 characters, from {Path('.env').resolve()}; KIS's have 36: copy it again if KIS refuses it"
    assert seen["setting KIS_MARKETS__HK__EXCHANGES"]["detail"] == "SEHK, from the environment"
    assert seen["setting KIS_BUFER"]["cure"] == "did you mean KIS_BUFFER?"
    assert seen["setting KIS_OTHERS"]["state"] == "skipped"
    assert seen["settings file"]["cure"] == "chmod 600 .env"


@pytest.mark.usefixtures("warm")
def test_a_secret_in_the_keyring_is_told_without_its_text(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the keyring has it, its line says so; one that is locked is a failure, and the token still serves."""
    monkeypatch.delenv("KIS_APP_SECRET")
    own = {"KIS_KEYRING": "kis", "PYTHON_KEYRING_BACKEND": "servers.Keyring"}
    own["PYTHONPATH"] = f"{os.environ['PYTHONPATH']}{os.pathsep}{Path(__file__).parent}"
    states = {one["name"]: one["state"] for one in json.loads(tokencore("doctor", "--json", **own).out)}
    assert (states["keyring"], states["token us"] == "fail") == ("fail", False), "what is cached serves"
    (isolated / "keyring.json").write_text(json.dumps({"kis": {"KIS_APP_SECRET": APP_SECRET}}))
    ran = tokencore("doctor", "--json", **own)
    line = {"state": "ok", "name": "setting KIS_APP_SECRET", "detail": "kept, in keyring kis", "cure": ""}
    assert (ran.code, line in json.loads(ran.out)) == (0, True)


def test_malformed_settings_are_exit_2_and_the_rest_is_still_looked_at(warm: Sandbox, command: Command) -> None:
    """The sentence names the variable; what depends on it is skipped, and nobody is told to delete the key's record."""
    for name, value in (("KIS_TIMEOUT", "soon"), ("KIS_SECRETS_DIR", "/nowhere/at/all")):
        seen = found(command, 2, **{name: value})
        assert (name in seen["settings"]["detail"], seen["leftover files"]["detail"]) == (True, "none")
        assert [seen[one]["state"] for one in ("tokens", "kis", "slack", "duplicates")] == ["skipped"] * 4
        assert {"token directory", "disk", "prefect"} <= set(seen)
    assert asked(warm) == 1


def a_file_as_folder(*_: object) -> None:
    """Where the token directory should be."""
    shutil.rmtree(folder())
    folder().write_text("")


def a_folder_as_lock(*_: object) -> None:
    """Where the lock file should be."""
    lock = next(folder().glob("key-*.lock"))
    lock.unlink()
    lock.mkdir()


def refused(gateway: Sandbox, _: Move) -> None:
    """KIS does not take the secret when a person asks for a renewal."""
    gateway.set_rules(issue_interval=0)
    gateway.fail("bad-secret")
    tokencore("refresh", "us", "--force", "--yes", KIS_ISSUE_INTERVAL="0")


def at(url: str) -> Callable[[Sandbox, Move], None]:
    """KIS is looked for at `url`, where OPEN is the gateway's port."""
    return lambda gateway, move: move(url.replace("OPEN", gateway.url.rpartition(":")[2]))


NETWORK = "check the address, the network and the firewall"
# What is wrong, the exit code, the finding that says it, and words of its detail and fix.
TROUBLES: dict[str, tuple[Callable[[Sandbox, Move], object], int, str, str, str]] = {
    "directory is a file": (a_file_as_folder, 7, "token directory", "Not a directory", "KIS_TOKEN_DIR"),
    "lock is a folder": (a_folder_as_lock, 7, "lock", "", "do what it says"),
    "rejected token": (lambda kis, _: kis.kill_tokens(), 3, ACCEPTED, "EGW00121", "tokencore reject"),
    "refused credentials": (refused, 5, "issuing us+kr", "bad_secret", "KIS_APP_SECRET"),
    "KIS refuses": (at("http://127.0.0.1:1"), 6, "kis", "127.0.0.1 refuses the connection", NETWORK),
    "KIS without TLS": (at("https://127.0.0.1:OPEN"), 6, "kis", "127.0.0.1 does not speak TLS there", NETWORK),
    "no such name": (at("https://kis.invalid:9443"), 6, "kis", "the name kis.invalid cannot be found (DNS)", NETWORK),
}  # fmt: skip


@pytest.mark.parametrize("case", TROUBLES)
def test_each_trouble_has_its_exit_code_its_words_and_its_fix(
    warm: Sandbox, kis_at: Move, command: Command, case: str
) -> None:
    """The finding is a failure that says what is wrong and what to do; without KIS nothing else is blamed on it."""
    arrange, code, name, detail, fix = TROUBLES[case]
    arrange(warm, kis_at)
    seen = found(command, code)
    one = seen[name]
    assert (one["state"], detail in one["detail"], fix in one["cure"]) == ("fail", True, True), one
    if code == 6:
        assert (seen["clock"]["state"], seen[ACCEPTED]["state"]) == ("skipped", "skipped")


@pytest.mark.skipif(os.name != "posix", reason="modes apply where the system has them")
@pytest.mark.usefixtures("warm")
def test_one_broken_key_hides_no_other(command: Command) -> None:
    """A token file that others can write is a failure of its own key; the other one is still looked at."""
    next(folder().glob("key-*.json")).chmod(0o666)
    seen = found(command, 7, KIS_MARKETS__KR__APP_KEY=KEY, KIS_MARKETS__KR__APP_SECRET=SECRET)
    assert (seen["token us"]["state"], seen["token kr"]["state"], "issuing kr" in seen) == ("fail", "fail", True)


@pytest.mark.skipif(os.name != "posix", reason="modes apply where the system has them")
@pytest.mark.usefixtures("gateway")
def test_wide_modes_and_leftovers_are_warned_of(command: Command) -> None:
    """Drafts, files set aside and those of other keys and markets are named; a failure's exit code comes first."""
    cached()
    folder().chmod(0o755)
    leftovers = {
        "drafts of killed processes": ".us_api_token.json.x.tmp",
        "set aside as no token of this key": "us_api_token.json.aside",
        "of a key that is not configured": "key-0123456789abcdef.jsonl",
        "of a market that is not configured": "old_api_token.json",
    }
    for name in leftovers.values():
        (folder() / name).touch(0o644)
    seen = found(command, 3)  # the sandbox does not know the token
    assert seen["token directory"]["cure"] == f"chmod 700 {folder()}"
    assert re.search(r"key-0123456789abcdef\.jsonl, .* and 1 more$", seen["file modes"]["detail"])
    assert seen["file modes"]["cure"] == f"chmod go= {folder()}/*", (
        "600 would lock the folder that Prefect has in there"
    )
    assert seen["leftover files"]["detail"] == "; ".join(f"{what}: {name}" for what, name in leftovers.items())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who holds a lock")
@pytest.mark.usefixtures("warm")
def test_who_holds_the_lock_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that holds the key's lock is named, and not disturbed; without one it is free."""
    assert found(command, 0)["lock"]["detail"] == "free"
    program = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1], preserve_lock_file=True): print('held', flush=True); input()"
    )
    with start(program, str(next(folder().glob("key-*.lock")))) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(doctor, "PATIENCE", 0.2)
        one = found(command, 1)["lock"]
        assert (one["state"], f"held by process {holder.pid} for" in one["detail"]) == ("warn", True)
        holder.communicate("\n")


@pytest.mark.usefixtures("quick")
def test_a_copy_that_cannot_be_written_is_named_until_it_can(command: Command) -> None:
    """The last failure of each export is kept with the key; the next copy that succeeds ends it."""
    bot, own = Path("~/bot").expanduser(), {"KIS_MARKETS__US__EXPORTS": "mojito2:~/bot"}
    bot.write_text("no folder")
    command("get", "us", **own)
    assert re.match(r"mojito2:.*/bot is not up to date: ", found(command, 1, **own)["exports"]["detail"])
    bot.unlink()
    bot.mkdir(0o700)
    command("refresh", "us", "--force", "--yes", **own)
    assert "exports" not in found(command, 0, **own)


def test_a_gateway_that_stays_silent_is_waited_for_a_little(
    command: Command, kis_at: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts the connection and answers nothing: said as such, and nobody waits long."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kis_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(doctor, "PATIENCE", 0.2)
        assert "does not answer within" in found(command, 6)["kis"]["detail"]


@pytest.mark.parametrize(
    ("ahead", "state", "word"), [(0, "ok", "agrees"), (12, "warn", "ahead"), (-300, "warn", "behind")]
)
def test_the_clock_is_compared_with_kis(
    command: Command, kis_at: Move, answers: Answers, ahead: int, state: str, word: str
) -> None:
    """Seconds are nothing, and more is a warning."""
    answers.headers["Date"] = format_datetime(datetime.now(UTC) - timedelta(seconds=ahead), usegmt=True)
    kis_at(answers.url)
    seen = found(command, 1)  # these answers say nothing about the token
    assert (seen["clock"]["state"], word in seen["clock"]["detail"], seen[ACCEPTED]["state"]) == (state, True, "warn")


@pytest.mark.usefixtures("warm")
def test_slack_is_asked_without_posting(command: Command, monkeypatch: pytest.MonkeyPatch, answers: Answers) -> None:
    """A bot by auth.test with its token, a webhook by its host alone: its path is a secret and would post."""
    monkeypatch.setattr(doctor, "SLACK_API", f"{answers.url}/api/")
    own = {"SLACK_BOT_TOKEN": "xoxb-Canary", "SLACK_CHANNEL": "#tokens"}
    answers.by_path["/api/auth.test"] = 200, {"ok": True}
    assert found(command, 0, **own)["slack"]["state"] == "ok"
    assert answers.asked == [("/api/auth.test", "Bearer xoxb-Canary")]
    answers.by_path["/api/auth.test"] = 200, {"ok": False, "error": "invalid_auth"}
    assert "invalid_auth" in found(command, 1, **own)["slack"]["detail"]
    assert found(command, 1, SLACK_BOT_TOKEN="xoxb-Canary")["slack"]["detail"].startswith("SLACK_CHANNEL")
    answers.asked.clear()
    own["SLACK_WEBHOOK_URL"] = f"{answers.url}/services/Canary"
    assert "make test-alert" in found(command, 0, **own)["slack"]["detail"]
    assert answers.asked == [("/", "")]


@pytest.mark.usefixtures("warm")
def test_prefect_is_asked_for_its_worker(command: Command, answers: Answers) -> None:
    """With the password; a pool without a worker, another password and another server are failures."""
    own = {"PREFECT_API_URL": f"{answers.url}/api", "PREFECT_API_AUTH_STRING": "admin:Canary"}
    pool = "/api/work_pools/tokens"
    answers.by_path[pool] = 200, {"status": "READY"}
    assert found(command, 0, **own)["prefect"]["state"] == "ok"
    assert answers.asked == [(pool, "Basic YWRtaW46Q2FuYXJ5")]
    for answer, fix in (((200, {"status": "NOT_READY"}), "make up"), ((401, {}), "AUTH_STRING"), ((200, []), "port")):
        answers.by_path[pool] = answer
        one = found(command, 1, **own)["prefect"]
        assert (one["state"], fix in one["cure"]) == ("fail", True)


class Bomb:
    """What unpickling would execute."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (Path("exploded"), "")


@pytest.mark.usefixtures("warm")
def test_caches_of_other_clients_are_found_without_unpickling(isolated: Path, command: Command) -> None:
    """By the key in clear or by the token's `jti`; one with the same token is fed by us, another key's is no matter."""
    pickled, sample = Path("token.dat").resolve(), isolated / "KIS" / "config" / "KIS20261121"
    alien = isolated / ".pykis" / "cache" / "token_real_x.json"
    for path in (sample, alien):
        path.parent.mkdir(parents=True)
    pickled.write_bytes(pickle.dumps({"api_key": APP_KEY, "bomb": Bomb()}))
    alien.write_text(json.dumps({"access_token": make_jwt("PSsomeoneelse")}))
    for token, warned in ((make_jwt(APP_KEY), [str(pickled), str(sample)]), (on_disk().access_token, [str(pickled)])):
        sample.write_text(f"token: {token}\n")
        detail = found(command, 1)["duplicates"]["detail"]
        assert [str(path) for path in (pickled, sample, alien) if str(path) in detail] == warned
    pickled.unlink()
    assert found(command, 0)["duplicates"]["state"] == "ok"
    assert not Path("exploded").exists()
