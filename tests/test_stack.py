"""One life of the running system: started, looked at, asked by strangers, hurt, started again and stopped.

The tests go in their order: those that hurt it come last.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import rmtree, which
from typing import TYPE_CHECKING, Any

import pytest
import requests
from playwright.sync_api import sync_playwright
from running import asked, until
from servers import SlackEndpoint
from stacks import KEYS, SLOW, Place, Up, always_open, environment_of, in_proc

from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = in_proc
WEBHOOK = "CanaryWebhook"  # in the address of the Slack that the stack alerts
CHECK = "check-tokens/check_tokens"
NAMES = ["A run crashed", "A run is late", "A run shows no life", "No worker", "The hourly check is missing"]
STRANGER = "http://stranger.example"
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
MINUTE = 60.0
WATCH = """
from flows.stack import environment, worker
worker.NAP = 2.0  # seconds that count as a sleep
print("awake", flush=True)
worker.watch_sleep(environment.api())
"""


@pytest.fixture(scope="module")
def gateway() -> Iterator[Sandbox]:
    """KIS, whose minute is short."""
    with Sandbox(issue_interval=1) as running:
        yield running


@pytest.fixture(scope="module")
def slack() -> Iterator[SlackEndpoint]:
    """The Slack that the stack alerts."""
    with SlackEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def up(gateway: Sandbox, slack: SlackEndpoint) -> Iterator[Up]:
    """A stack with credentials and a proxy in `.env` only.

    In its way are an empty password file, another user's `runner_storage`, and settings that open another Prefect to
    all origins.
    """
    root = Path(tempfile.mkdtemp(prefix="tokencore-"))  # pytest's own path leaves no room for a socket's
    for_all = {f"PREFECT_SERVER_{name}CORS_ALLOWED_ORIGINS": "*" for name in ("", "API_")}
    place = Place.made(root / "stack", AWS_SECRET_ACCESS_KEY="CanaryCloud", **for_all)
    for folder in ("tokens", "tokens/prefect"):
        (place.work / folder).mkdir(0o700)
    (place.work / "tokens" / "prefect" / "password").touch(0o600)
    (place.temporary / "runner_storage").touch(0)  # not even root can make a folder of it
    settings = {"KIS_BASE_URL": gateway.url, "KIS_TOKEN_DIR": str(place.work / "tokens"), "KIS_ISSUE_INTERVAL": "1"}
    settings |= {"SLACK_WEBHOOK_URL": f"{slack.url}/services/{WEBHOOK}", "KIS_TIMEOUT": "60"}
    settings |= {"HTTPS_PROXY": "http://CanaryProxy", "KIS_MARKETS__HK__EXCHANGES": "SEHK"}
    place.dotenv(**KEYS, **settings, **always_open("NASD", "KRX"))  # never both are near midnight
    yield place.up()
    place.run("down")
    rmtree(root)


@pytest.fixture
def refreshing(up: Up, gateway: Sandbox) -> Iterator[tuple[str, int]]:
    """A run that waits for KIS, and its process."""
    gateway.set_rules(latency=MINUTE)
    before = asked(gateway)
    for pattern in ("key-*.json*", "*_api_token.json", "*_token_issued_at.dat"):  # no token, and nobody who issued one
        for file in up.folder.parent.glob(pattern):
            file.unlink()
    run = up.create(CHECK)
    until(lambda: asked(gateway) > before and up.look(run)["infrastructure_pid"], SLOW)
    gateway.set_rules(latency=0)
    yield run, int(up.look(run)["infrastructure_pid"])
    time.sleep(1)  # KIS's minute


def lines(output: str) -> dict[str, str]:
    """What `up` and `status` say, by the first words of the line."""
    return dict(re.findall(r"^(last check|server says|\S+) +(.+)$", output, re.MULTILINE))


def automations(up: Up) -> dict[str, dict[str, Any]]:
    """The automations on the server, by name; two of one name are an error."""
    found = up.api("POST", "automations/filter", {}).json()
    assert len({one["name"] for one in found}) == len(found)
    return {one["name"]: one for one in found}


def overdue(up: Up, deployment: str, *hours: int) -> list[str]:
    """Runs that the schedule had made for so long ago; their ids."""
    due = [(datetime.now(UTC) - timedelta(hours=ago)).isoformat() for ago in hours]
    states = [{"type": "SCHEDULED", "state_details": {"scheduled_time": at}} for at in due]
    return [up.create(deployment, state=state, tags=["auto-scheduled"]) for state in states]


def later(up: Up) -> str:
    """A run of the check in the far future; its id."""
    return up.create(CHECK, state={"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}})


def listening(processes: dict[int, str]) -> set[int]:
    """The TCP ports on which these processes listen."""
    table = [line.split() for path in ("tcp", "tcp6") for line in Path(f"/proc/net/{path}").read_text().splitlines()]
    ports = {f"socket:[{row[9]}]": int(row[1].rpartition(":")[2], 16) for row in table if row[3] == "0A"}
    files = [file for process in processes for file in Path(f"/proc/{process}/fd").iterdir()]
    return {ports[link] for link in map(os.readlink, files) if link in ports}


def test_up_starts_all_and_says_where_it_is(up: Up) -> None:
    """All parts run, the first check has renewed with the credentials of `.env`, and links lead past the login."""
    said = lines(up.output)
    assert sorted(up.processes()) == ["server", "supervisor", "worker"]
    assert said["page"] == f"{up.url}/v2"
    assert said["tokens"].startswith(f"{up.url}/v2/artifacts/key/tokens ")
    assert said["refresh"].startswith(f"{up.url}/v2/deployments/deployment/")
    assert re.fullmatch(r"Renewed, \d{4}-\d\d-\d\d \d\d:\d\d UTC", said["last check"])
    assert said["password"] == f"in {up.folder}/password"
    assert all(up.api("GET", f"artifacts/{name}/latest").ok for name in ("tokens", "plan"))


def test_a_second_start_is_refused_and_status_wants_the_right_password(up: Up) -> None:
    """`up` says that it runs, `run` refuses, nothing is touched; `status` is 0, and 3 with another password."""
    before = up.processes()
    code, output = up.place.run("up")
    assert (code, output.splitlines()[0]) == (0, "It runs already.")
    assert up.place.run("run") == (1, "It runs already; `make status` shows how it is.\n")
    assert up.processes() == before
    assert up.place.run("status")[0] == 0
    wrong = up.place.environment | {"PREFECT_SERVER_API_AUTH_STRING": "admin:AnotherPassword"}
    code, output = up.place._replace(environment=wrong).run("status")
    assert (code, "NOT KNOWN. Prefect's server refuses the password" in output) == (3, True)
    assert "AnotherPassword" not in output


def test_strangers_and_foreign_pages_get_nothing_and_our_own_page_asks_nobody_else(up: Up) -> None:
    """Without the password every question but that for its health is refused.

    A foreign page's preflight is refused, no answer is marked for it, the page's own is; a name that points here is
    refused. Prefect's analytics host, which its page asks whatever the settings say, is refused by the page's policy.
    """
    for path in ("flow_runs/filter", "deployments/filter", "block_documents/filter"):
        assert requests.post(f"{up.url}/api/{path}", json={}, timeout=30).status_code == 401
    assert requests.get(f"{up.url}/api/health", timeout=30).ok
    preflight = {"Access-Control-Request-Method": "POST", "Origin": STRANGER}
    assert requests.options(f"{up.url}/api/flow_runs/filter", headers=preflight, timeout=30).status_code == 400
    marked = [
        up.api("POST", "flow_runs/filter", {}, Origin=origin).headers.get("access-control-allow-origin")
        for origin in (STRANGER, up.url)
    ]
    assert marked == [None, up.url]
    called = [up.api("GET", "health", Host=name).status_code for name in ("stranger.example", "localhost")]
    assert called == [400, 200]
    assert "connect-src 'self'" in requests.get(f"{up.url}/v2/", timeout=30).headers["content-security-policy"]


def test_only_the_server_listens(up: Up) -> None:
    """Supervisord has no port; its socket and every other file are the owner's alone."""
    assert listening(up.place.living()) == {int(up.url.rpartition(":")[2])}
    assert stat.S_ISSOCK((up.folder / "sock").stat().st_mode)
    page = up.folder / "page"  # public files, but beside Prefect only its first user could make them
    assert (page / "v2" / "index.html").exists()
    everything = [up.folder.parent, up.folder, *(path for path in up.folder.rglob("*") if page not in path.parents)]
    assert [path.name for path in everything if path.lstat().st_mode & 0o077] == []


def test_no_secret_is_stored_or_on_a_command_line(up: Up) -> None:
    """The password is in its file alone, the app key, the secret and the webhook in no file of the stack's."""
    secrets = [up.password.partition(":")[2], APP_SECRET, APP_KEY, WEBHOOK, "CanaryCloud"]
    stored = {path.name: path.read_bytes() for path in up.folder.rglob("*") if path.is_file()}
    assert [name for name, kept in stored.items() if any(one.encode() in kept for one in secrets)] == ["password"]
    assert not any(one in line for line in (up.output, *up.place.living().values()) for one in secrets)


def test_the_settings_decide_what_is_deployed(up: Up) -> None:
    """The exchanges that `.env` trades have their warm-up, on; the form has its markets; runs are scheduled."""
    found = {one["name"]: one for one in up.api("POST", "deployments/filter", {}).json()}
    assert sorted(found) == ["AMEX", "KRX", "NASD", "NYSE", "SEHK", "check_tokens", "refresh_token"]
    assert all(schedule["active"] for one in found.values() for schedule in one["schedules"])
    form = found["refresh_token"]["parameter_openapi_schema"]["properties"]["market"]["enum"]
    assert sorted(form) == ["hk", "kr", "us"]
    by_cron = {"state": {"type": {"any_": ["SCHEDULED"]}}, "tags": {"all_": ["auto-scheduled"]}}
    until(lambda: up.api("POST", "flow_runs/count", {"flow_runs": by_cron}).json() > 0, MINUTE)


def test_runs_that_crash_together_are_one_message_with_a_link(up: Up, slack: SlackEndpoint) -> None:
    """Slack has whose crash it is and its page, once; where Slack refuses, the log has the kind of the error alone."""
    known, log = automations(up), up.folder / "server.log"
    assert sorted(known) == NAMES

    def crash() -> bool:
        up.api("POST", f"flow_runs/{later(up)}/set_state", {"state": {"type": "CRASHED"}, "force": True})
        time.sleep(1)
        return False

    def heard() -> list[str]:
        return [one["text"] for one in slack.messages if "A run crashed" in one.get("text", "")]

    for _ in range(4):
        crash()
    until(lambda: bool(heard()) or crash(), MINUTE)  # Prefect keeps an event back that overtakes its forerunner
    time.sleep(3)
    (text,) = heard()
    assert re.match(r"\*:warning: A run crashed: ", text)
    assert f"{up.url}/v2/runs/flow-run/" in text
    assert "*To do:* " in text
    one = {key: value for key, value in known["A run crashed"].items() if key not in ("id", "created", "updated")}
    one["trigger"]["within"] = 0  # the next one is reported too
    up.api("PUT", f"automations/{known['A run crashed']['id']}", one)
    slack.answers.append(403)
    until(lambda: "HTTPStatusError" in log.read_text() or crash(), MINUTE)
    assert WEBHOOK not in log.read_text()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome is installed here")
def test_a_link_leads_a_person_through_the_login_to_the_run(up: Up) -> None:
    """Who is not signed in answers one question, with what the password file holds, and is where the link led."""
    run = later(up)
    with sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
        page = browser.new_page(reduced_motion="reduce")
        page.set_default_timeout(MINUTE * 1000)
        page.goto(f"{up.url}/v2/runs/flow-run/{run}")
        page.wait_for_url("**/v2/login?redirectTo=*")
        page.get_by_placeholder("admin:pass").fill(up.password)
        page.get_by_role("button", name="Login").click()
        page.wait_for_url(f"**/v2/runs/flow-run/{run}*")
        page.get_by_text("check-tokens").first.wait_for()


def test_status_does_not_wait_for_a_server_that_hangs(up: Up) -> None:
    """It says what it does not know, and is 3."""
    server = up.processes()["server"]
    os.kill(server, signal.SIGSTOP)
    try:
        code, output = up.place.run("status")
    finally:
        os.kill(server, signal.SIGCONT)
    assert (code, lines(output)["server says"][:9]) == (3, "NOT KNOWN")


def test_a_killed_worker_comes_back_and_its_run_is_crashed(up: Up, refreshing: tuple[str, int]) -> None:
    """Supervisord starts another worker, whose first act is to end what died with the one before.

    The run knew nothing that it has no use for: no cloud key, no key of the server's blocks, no proxy of a `.env`.
    """
    run, process = refreshing
    worker = up.processes()["worker"]
    known = environment_of(process) | environment_of(worker)
    assert {one for one in known if "Canary" in one or "ENCRYPTION_KEY" in one} == set()
    for number in (worker, process):
        os.kill(number, signal.SIGKILL)
    until(lambda: up.processes().get("worker", worker) != worker, SLOW)
    until(lambda: up.state(run) == ("CRASHED", "Crashed"), SLOW)


def test_a_worker_that_is_stopped_cancels_its_run_and_is_missed(up: Up, refreshing: tuple[str, int]) -> None:
    """The run's process is gone, its state says why, and `status` is 3 until supervisord starts a worker again."""
    run, process = refreshing
    assert up.control("stop", "worker") == "worker: stopped"
    assert (up.state(run), environment_of(process)) == (("CANCELLED", "Cancelled"), set())
    assert up.look(run)["state"]["message"].startswith("Stopped with its worker")
    code, output = up.place.run("status")
    assert (code, lines(output)["worker"]) == (3, "NOT RUNNING")
    assert up.control("start", "worker") == "worker: started"
    assert lines(up.place.run("status")[1])["worker"].startswith("process ")


def test_after_a_sleep_one_check_stands_for_what_was_missed(up: Up) -> None:
    """All checks that were missed end without a process: another watch, which slept long enough for it, ends them."""
    up.api("PATCH", "work_pools/tokens", {"is_paused": True})  # the worker starts nothing
    watch = [sys.executable, "-c", WATCH]
    with subprocess.Popen(watch, env=up.place.environment, cwd=up.place.work, text=True, stdout=-1) as one:
        assert one.stdout
        assert one.stdout.readline() == "awake\n"
        checks = overdue(up, CHECK, 3, 2, 1)
        one.send_signal(signal.SIGSTOP)
        time.sleep(3)
        assert "COMPLETED" not in {up.state(run)[0] for run in checks}
        one.send_signal(signal.SIGCONT)
        until(lambda: {up.state(run) for run in checks} == {("COMPLETED", "SkippedLate")}, 30)
        assert one.stdout.readline().startswith("Nothing ran here for")
        one.kill()
    up.api("PATCH", "work_pools/tokens", {"is_paused": False})
    assert {up.look(run)["infrastructure_pid"] for run in checks} == {None}


def test_up_after_a_kill_of_all_marks_catches_up_and_changes_nothing_twice(up: Up, refreshing: tuple[str, int]) -> None:
    """The dead run is Crashed, of what was missed the last warm-up runs; automations keep what a person did.

    A server whose supervisord was killed ends by itself. An exchange that is traded no more has no warm-up.
    """
    run, _ = refreshing
    processes, before = up.processes(), automations(up)
    up.api("PATCH", f"automations/{before[NAMES[0]]['id']}", {"enabled": False})
    content = {key: value for key, value in before[NAMES[1]].items() if key not in ("id", "created", "updated")}
    for more in ({"name": "A person's", "tags": []}, {"name": "Ours of old"}):
        up.api("POST", "automations/", content | more)
    os.kill(processes["supervisor"], signal.SIGSTOP)  # it starts no other worker
    os.kill(processes["worker"], signal.SIGKILL)
    # A check beside the run would try to reach the dead server for minutes.
    for number in up.place.living().keys() - {processes["supervisor"], processes["server"], processes["worker"]}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    checks, warm_ups = overdue(up, CHECK, 3, 2, 1), overdue(up, "warm-up/KRX", 72, 48, 24)
    os.kill(processes["supervisor"], signal.SIGKILL)
    until(lambda: not up.place.living(), SLOW)
    dotenv = up.place.work / ".env"
    dotenv.write_text(dotenv.read_text().replace("SEHK", "KRX"))
    code, output = up.place.run("up")
    assert code == 0, output
    assert up.state(run) == ("CRASHED", "Crashed")
    assert {up.state(one) for one in (*checks, *warm_ups[:2])} == {("COMPLETED", "SkippedLate")}
    until(lambda: up.state(warm_ups[2])[0] == "COMPLETED", SLOW)
    assert "SEHK" not in {one["name"] for one in up.api("POST", "deployments/filter", {}).json()}
    after = automations(up)
    assert sorted(after) == sorted([*NAMES, "A person's"])
    assert {name: after[name]["id"] for name in NAMES} == {name: before[name]["id"] for name in NAMES}
    assert [name for name in after if not after[name]["enabled"]] == [NAMES[0]]


def test_down_leaves_no_process(up: Up) -> None:
    """Then there is nothing to stop, and `status` says so: 3."""
    assert up.place.run("down") == (0, "Stopped.\n")
    assert up.place.living() == {}
    assert up.place.run("down") == (0, "Nothing was running.\n")
    code, output = up.place.run("status")
    assert (code, output.splitlines()[0]) == (3, "Nothing is running; `make up` starts it.")
