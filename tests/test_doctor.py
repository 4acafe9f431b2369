"""`tokencore doctor`: what it finds, healthy and broken, and that it changes, issues and tells nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import CANARIES, KEY, SECRET, make_jwt
from running import Ran, asked, cached, folder, on_disk, snapshot, start, tokencore

from tokencore import TokenManager
from tokencore.reports import doctor
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.sandbox import Sandbox

    Command = Callable[..., Ran]


class Answers:
    """A server on loopback that answers each path with a status, JSON and headers of the test's choice."""

    def __init__(self) -> None:
        """Answer 404 to everything."""
        self.by_path: dict[str, tuple[int, object]] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []


@pytest.fixture
def answers() -> Iterator[tuple[Answers, str]]:
    """The server and its address."""
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            answers.asked.append((self.path, self.headers.get("Authorization", "")))
            status, content = answers.by_path.get(self.path, (404, {}))
            body = json.dumps(content).encode()
            self.send_response_only(status)
            for name, value in {"Content-Length": str(len(body)), **answers.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name http.server looks for

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield answers, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def warm(gateway: Sandbox) -> None:  # noqa: ARG001 - KIS issues it
    """A valid token for us and kr."""
    TokenManager("us").get_valid_token()


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Prefect server of this machine answers a test."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", "1")


def found(command: Command, code: int) -> dict[str, list[dict[str, str]]]:
    """The findings by name, after a look that ended with `code`."""
    ran = command("doctor", "--json")
    assert ran.err == ""
    assert ran.code == code, ran.out
    lines: dict[str, list[dict[str, str]]] = {}
    for one in json.loads(ran.out):
        assert set(one) == {"name", "state", "detail", "cure"}
        assert one["cure"] or one["state"] in ("ok", "skipped")
        lines.setdefault(one["name"], []).append(one)
    return lines


def only(lines: dict[str, list[dict[str, str]]], name: str) -> dict[str, str]:
    """The one finding of that name."""
    (one,) = lines[name]
    return one


def test_a_healthy_set_up_is_exit_0_with_evidence(gateway: Sandbox, command: Command) -> None:
    """No failure, and for the token a line per quote call; the order code's empty answer is explained, not blamed."""
    TokenManager("us").get_valid_token()
    lines = found(command, 0)
    assert {one["state"] for every in lines.values() for one in every} <= {"ok", "skipped"}
    price, abroad, daily, order = [one["detail"] for one in lines["token accepted us+kr"]]
    assert price == "domestic price: FHKST01010100 J 005930 -> HTTP 200 rt_cd=0 msg_cd=MCA00000, rows=1"
    assert abroad == "overseas price: HHDFS00000300 NAS AAPL -> HTTP 200 rt_cd=0 msg_cd=MCA00000, rows=1"
    assert daily.startswith("overseas daily price: HHDFS76240000 NAS AAPL -> HTTP 200 rt_cd=0")
    assert not daily.endswith("rows=0")
    assert order.endswith("rows=0 - as it must be: NASD is for orders; quotes want NAS")
    assert gateway.stats()["quotes"] == 4


def test_looking_issues_and_writes_nothing_and_tells_no_secret(
    gateway: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a token, as text and as JSON: no request, no file touched, no credential, token or webhook."""
    for name, value in {"KIS_APP_KEY": KEY, "KIS_APP_SECRET": SECRET, "KIS_HTS_ID": "CanaryId"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "http://127.0.0.1:1/services/Canary")
    monkeypatch.setenv("KIS_BASE_URL_", "https://user:Canary@host")
    monkeypatch.setenv("PREFECT_API_URL", "http://user:Canary@127.0.0.1:1/api")
    said = [command("doctor"), command("doctor", "--json")]
    assert not folder().exists()
    cached(20_000)
    before = snapshot(folder())
    said += [command("doctor"), command("doctor", "--json")]
    after = snapshot(folder())
    assert [path for path in before | after if after.get(path) != before.get(path)] == [str(folder())], "its time alone"
    assert asked(gateway) == 0
    assert [canary for canary in CANARIES if any(canary in ran.out + ran.err for ran in said)] == []


@pytest.mark.usefixtures("gateway")
def test_text_fits_80_columns_without_colours(command: Command) -> None:
    """Each line is at most 79 characters, a state begins each finding, and no escape sequence is in it."""
    ran = command("doctor")
    assert max(map(len, ran.out.splitlines())) < 80
    assert "\x1b" not in ran.out
    first = {line.split()[0] for line in ran.out.splitlines() if not line.startswith(" ")}
    assert first <= {"ok", "warn", "fail", "skipped"}


def test_settings_are_told_with_their_origin(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is shown, or masked to its length, with where it came from; odd lengths are told, misspelt names too."""
    Path(".env").write_text("KIS_APP_KEY=PSshort\nKIS_BUFER=5\nKIS_OTHERS=1\n")
    Path(".env").chmod(0o644)
    monkeypatch.setenv("KIS_MARKETS__HK__EXCHANGES", "SEHK")
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    monkeypatch.setenv("KIS_BASE_URL", "http://127.0.0.1:1")
    lines = found(command, 3)
    key = only(lines, "setting KIS_APP_KEY")
    assert (key["state"], key["detail"].partition(";")[0]) == ("ok", f"7 characters, from {Path('.env').resolve()}")
    assert "KIS's have 36" in key["detail"]
    assert only(lines, "setting KIS_MARKETS__HK__EXCHANGES")["detail"] == "SEHK, from the environment"
    assert only(lines, "setting KIS_BUFER")["cure"] == "did you mean KIS_BUFFER?"
    assert only(lines, "setting KIS_OTHERS")["state"] == "skipped"
    assert only(lines, "settings file")["cure"] == "chmod 600 .env"


@pytest.mark.usefixtures("gateway")
def test_a_secret_in_the_keyring_is_told_without_its_text(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the keyring has it, its line says so; one that is locked is a failure, and the token still serves."""
    TokenManager("us").get_valid_token()
    monkeypatch.delenv("KIS_APP_SECRET")
    own = {"KIS_KEYRING": "kis", "PYTHON_KEYRING_BACKEND": "keyring_in_file.Keyring"}
    own["PYTHONPATH"] = f"{os.environ['PYTHONPATH']}{os.pathsep}{Path(__file__).parent}"
    locked = json.loads(tokencore("doctor", "--json", **own).out)
    states = {one["name"]: one["state"] for one in locked}
    assert (states["keyring"], states["token us"] == "fail") == ("fail", False), "what is cached serves"
    (isolated / "keyring.json").write_text(json.dumps({"kis": {"KIS_APP_SECRET": APP_SECRET}}))
    ran = tokencore("doctor", "--json", **own)
    assert ran.code == 0
    assert {
        "name": "setting KIS_APP_SECRET",
        "state": "ok",
        "detail": "kept, in keyring kis",
        "cure": "",
    } in json.loads(ran.out)


@pytest.mark.parametrize(
    ("name", "value"), [("KIS_TIMEOUT", "soon"), ("KIS_MARKETS", "us"), ("KIS_SECRETS_DIR", "/nowhere/at/all")]
)
def test_malformed_settings_are_exit_2_and_the_rest_is_still_looked_at(
    gateway: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The sentence names the variable; what depends on it is skipped, and nobody is told to delete the key's record."""
    TokenManager("us").get_valid_token()
    monkeypatch.setenv(name, value)
    lines = found(command, 2)
    assert only(lines, "leftover files")["detail"] == "none"
    assert name in only(lines, "settings")["detail"]
    assert only(lines, "tokens")["state"] == "skipped"
    assert {"token directory", "disk", "slack", "prefect"} <= set(lines)
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_a_file_as_token_directory_is_exit_7_or_earlier(command: Command) -> None:
    """It says so with the path."""
    folder().write_text("")
    one = only(found(command, 7), "token directory")
    assert one["detail"] == f"{folder()} is no directory"


@pytest.mark.skipif(os.name != "posix", reason="modes apply where the system has them")
@pytest.mark.usefixtures("gateway")
def test_wide_modes_and_leftovers_are_warned_of(command: Command) -> None:
    """Drafts, files set aside and those of other keys and markets are named; a failure's exit code comes first."""
    cached()
    folder().chmod(0o755)
    for name in (
        ".us_api_token.json.x.tmp",
        "us_api_token.json.aside",
        "key-0123456789abcdef.jsonl",
        "old_api_token.json",
    ):
        (folder() / name).write_text("")
    (folder() / "old_api_token.json").chmod(0o644)
    lines = found(command, 3)  # the sandbox does not know the token
    assert only(lines, "token directory")["cure"] == f"chmod 700 {folder()}"
    wide = only(lines, "file modes")
    assert "old_api_token.json" in wide["detail"]
    assert wide["cure"] == f"chmod go= {folder()}/*", "600 would lock the folder that Prefect has in there"
    told = only(lines, "leftover files")["detail"]
    assert "drafts of killed processes: .us_api_token.json.x.tmp" in told
    assert "set aside as no token of this key: us_api_token.json.aside" in told
    assert "of a key that is not configured: key-0123456789abcdef.jsonl" in told
    assert "of a market that is not configured: old_api_token.json" in told


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who holds a lock")
@pytest.mark.usefixtures("gateway")
def test_who_holds_the_lock_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that holds the key's lock is named, and not disturbed; without one it is free."""
    TokenManager("us").get_valid_token()
    assert only(found(command, 0), "lock")["detail"] == "free"
    path = next(folder().glob("key-*.lock"))
    program = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1], preserve_lock_file=True): print('held', flush=True); input()"
    )
    with start(program, str(path)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(doctor, "LOCK_WAIT", 0.2)
        one = only(found(command, 1), "lock")
        assert (one["state"], f"held by process {holder.pid} for" in one["detail"]) == ("warn", True)
        holder.communicate("\n")


@pytest.mark.usefixtures("quick")
def test_a_copy_that_cannot_be_written_is_named_until_it_can(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last failure of each export is kept with the key; the next copy that succeeds ends it."""
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", "mojito2:~/bot")
    Path("~/bot").expanduser().write_text("no folder")
    TokenManager("us").get_valid_token()
    one = only(found(command, 1), "exports")
    assert re.match(r"mojito2:.*/bot is not up to date: ", one["detail"])
    Path("~/bot").expanduser().unlink()
    Path("~/bot").expanduser().mkdir(0o700)
    command("tick")
    TokenManager("us").save_token(on_disk())
    assert "exports" not in found(command, 0)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives a file away")
@pytest.mark.usefixtures("gateway")
def test_what_cannot_be_used_is_found_by_trying(command: Command) -> None:
    """A lock that is a folder and a directory of another user are failures with what to do, though they look fine."""
    TokenManager("us").get_valid_token()
    lock = next(folder().glob("key-*.lock"))
    lock.unlink()
    lock.mkdir()
    assert only(found(command, 7), "lock")["state"] == "fail"
    lock.rmdir()
    os.chown(folder(), 12_345, -1)
    one = only(found(command, 7), "token directory")
    assert "belongs to another user (uid 12345)" in one["detail"]


def test_a_rejected_token_is_exit_3_and_asked_for_once(gateway: Sandbox, command: Command) -> None:
    """One refusal is proof enough: KIS's code is told, and no further call is made."""
    TokenManager("us").get_valid_token()
    gateway.fail("dead-token")
    one = only(found(command, 3), "token accepted us+kr")
    assert "msg_cd=EGW00121" in one["detail"]
    assert gateway.stats()["quotes_refused"] == {"EGW00121": 1}


def test_refused_credentials_are_exit_5(quick: Sandbox, command: Command) -> None:
    """Nothing renews any more: the code's own cure is told."""
    cached(20_000)
    quick.fail("bad-secret")
    TokenManager("us")
    command("refresh", "us", "--force")
    lines = found(command, 5)
    assert "bad_secret" in only(lines, "issuing us+kr")["detail"]
    assert "KIS_APP_SECRET" in only(lines, "issuing us+kr")["cure"]


def closed() -> int:
    """A port of loopback where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:{closed}", "127.0.0.1 refuses the connection"),
        ("https://127.0.0.1:{open}", "127.0.0.1 does not speak TLS there"),
        ("https://kis.invalid:9443", "the name kis.invalid cannot be found (DNS)"),
    ],
)
def test_what_stands_between_here_and_kis_is_told_apart(
    gateway: Sandbox, command: Command, monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    """Refused, no TLS, no such name: each with its cure, and exit 6 once a token is there."""
    monkeypatch.setenv("KIS_BASE_URL", url.format(closed=closed(), open=gateway.url.rpartition(":")[2]))
    cached(20_000)
    lines = found(command, 6)
    assert told in only(lines, "kis")["detail"]
    assert only(lines, "clock")["state"] == only(lines, "token accepted us+kr")["state"] == "skipped"


@pytest.mark.usefixtures("gateway")
def test_the_whole_examination_is_bounded(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that accepts and stays silent is told as such, or cut off at the deadline: nobody waits longer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("KIS_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        cached(20_000)
        monkeypatch.setenv("KIS_TIMEOUT", "0.2")
        monkeypatch.setattr("tokencore.reports.doctor.PATIENCE", 0.2)
        assert "does not answer" in only(found(command, 6), "kis")["detail"]
        monkeypatch.setattr("tokencore.reports.doctor.PATIENCE", 3)
        monkeypatch.setattr(doctor, "DEADLINE", 0.3)
        began = time.monotonic()
        lines = found(command, 1)
        assert time.monotonic() - began < 2
    assert "no answer within" in next(one for name, (one, *_) in lines.items() if name.startswith("kis "))["detail"]


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize(("ahead", "state"), [(0, "ok"), (12, "warn"), (-300, "fail")])
def test_the_clock_is_compared_with_kis(
    command: Command, monkeypatch: pytest.MonkeyPatch, answers: tuple[Answers, str], ahead: int, state: str
) -> None:
    """Seconds are nothing, more is a warning, and more than the rule allows for is a failure; no header, no line."""
    told, url = answers
    monkeypatch.setenv("KIS_BASE_URL", url)
    told.headers["Date"] = format_datetime(datetime.now(UTC) - timedelta(seconds=ahead), usegmt=True)
    cached(20_000)
    lines = found(command, 1)  # these answers say nothing about the token
    assert only(lines, "clock")["state"] == state
    if state != "ok":
        assert ("ahead of" if ahead > 0 else "behind") in only(lines, "clock")["detail"]
    del told.headers["Date"]
    assert only(found(command, 1), "clock")["state"] == "skipped"


@pytest.mark.usefixtures("warm")
def test_slack_is_asked_without_posting(
    command: Command, monkeypatch: pytest.MonkeyPatch, answers: tuple[Answers, str]
) -> None:
    """A bot by auth.test with its token, a webhook by its host alone: its path is a secret and would post."""
    told, url = answers
    monkeypatch.setattr(doctor, "SLACK_API", f"{url}/api/")
    monkeypatch.setenv("SLACK_BOT_TOKEN", "xoxb-Canary")
    monkeypatch.setenv("SLACK_CHANNEL", "#tokens")
    told.by_path["/api/auth.test"] = 200, {"ok": True}
    assert only(found(command, 0), "slack")["state"] == "ok"
    assert told.asked == [("/api/auth.test", "Bearer xoxb-Canary")]
    told.by_path["/api/auth.test"] = 200, {"ok": False, "error": "invalid_auth"}
    assert "invalid_auth" in only(found(command, 1), "slack")["detail"]
    told.asked.clear()
    monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{url}/services/Canary")
    assert "make test-alert" in only(found(command, 0), "slack")["detail"]
    assert told.asked == [("/", "")]


def deployment(name: str, **more: object) -> dict[str, Any]:
    """A deployment with one active schedule, as the Prefect server answers it."""
    return {"name": name, "paused": False, "schedules": [{"active": True}], **more}


@pytest.mark.usefixtures("warm")
def test_prefect_is_asked_for_its_deployments_and_worker(
    command: Command, monkeypatch: pytest.MonkeyPatch, answers: tuple[Answers, str]
) -> None:
    """Lacking or paused deployments are a warning, a pool without a worker and other credentials a failure."""
    told, url = answers
    monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:Canary")
    names = ["check_tokens", "KRX", "NASD", "NYSE", "AMEX"]
    told.by_path["/api/deployments/filter"] = 200, [deployment(name) for name in names]
    told.by_path["/api/work_pools/tokens"] = 200, {"status": "READY"}
    lines = found(command, 0)
    assert [only(lines, f"prefect{what}")["state"] for what in ("", " deployments", " worker")] == ["ok"] * 3
    assert {auth for _, auth in told.asked} == {"Basic YWRtaW46Q2FuYXJ5"}
    paused = [deployment("KRX", paused=True), *(deployment(name) for name in names if name != "KRX")]
    told.by_path["/api/deployments/filter"] = 200, paused
    told.by_path["/api/work_pools/tokens"] = 200, {"status": "NOT_READY"}
    lines = found(command, 1)
    assert only(lines, "prefect deployments")["detail"] == "no active schedule: KRX"
    assert "NOT_READY" in only(lines, "prefect worker")["detail"]
    told.by_path["/api/deployments/filter"] = 401, {}
    assert "PREFECT_API_AUTH_STRING" in only(found(command, 1), "prefect")["cure"]


class Bomb:
    """What unpickling would execute."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (Path("exploded"), "")


@pytest.mark.usefixtures("gateway")
def test_caches_of_other_clients_are_found_without_unpickling(isolated: Path, command: Command) -> None:
    """By the key in clear or by the token's `jti`; one with the same token is fed by us, another key's is no matter.

    A warning alone ends the command with 1.
    """
    token = make_jwt(APP_KEY)
    Path("token.dat").write_bytes(pickle.dumps({"api_key": APP_KEY, "bomb": Bomb()}))
    sample = isolated / "KIS" / "config" / "KIS20261121"
    sample.parent.mkdir(parents=True)
    sample.write_text(f"token: {token}\n")
    alien = isolated / ".pykis" / "cache" / "token_real_x.json"
    alien.parent.mkdir(parents=True)
    alien.write_text(json.dumps({"access_token": make_jwt("PSsomeoneelse")}))
    TokenManager("us").get_valid_token()
    states = {one["detail"].split()[0]: one["state"] for one in found(command, 1)["duplicates"]}
    assert states == {str(Path("token.dat").resolve()): "warn", str(sample): "warn"}
    assert not Path("exploded").exists()
    sample.write_text(f"token: {on_disk().access_token}\n")
    states = {one["detail"].split()[0]: one["state"] for one in found(command, 1)["duplicates"]}
    assert states[str(sample)] == "ok"
