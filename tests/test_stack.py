"""One life of the running system, in the order of the tests: started, asked by strangers, hurt and stopped."""

import contextlib
import os
import re
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import which
from typing import Any, NoReturn

import pytest
import requests
import time_machine
from playwright.sync_api import sync_playwright
from running import asked, until
from servers import SlackEndpoint
from stacks import KEYS, SLOW, Place, Up, always_open, environment_of, free_port, in_proc

from flows.stack import worker
from flows.stack.api import CHECK, CHECKED, Api
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

pytestmark = in_proc
WEBHOOK = "CanaryWebhook"  # a secret in the webhook's address
NAMES = ["A run crashed", "A run is late", "A run shows no life", "No worker", "The hourly check is missing"]
STRANGER = "http://stranger.example"
SKIPPED = ("COMPLETED", "SkippedLate")
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
MINUTE = 60.0


@pytest.fixture(scope="module")
def outside() -> Iterator[tuple[Sandbox, SlackEndpoint]]:
    """KIS, with a short minute, and the Slack that the stack alerts."""
    with Sandbox(issue_interval=1) as gateway, SlackEndpoint() as slack:
        yield gateway, slack


@pytest.fixture(scope="module")
def up(outside: tuple[Sandbox, SlackEndpoint], prefect_database: Path) -> Iterator[Up]:
    """A running stack with credentials and a proxy only in `.env`, a % in its path, and foreign files in its way."""
    for_all = {f"PREFECT_SERVER_{name}CORS_ALLOWED_ORIGINS": "*" for name in ("", "API_")}
    settings = {"KIS_TIMEOUT": "60", "KIS_ISSUE_INTERVAL": "1", "KIS_MARKETS__HK__EXCHANGES": "SEHK", **KEYS}
    settings |= {"KIS_BASE_URL": outside[0].url, "SLACK_WEBHOOK_URL": f"{outside[1].url}/services/{WEBHOOK}"}
    with tempfile.TemporaryDirectory(prefix="tokencore-") as root:  # pytest's own path is too long for a socket's
        place = Place.made(Path(root) / "100%", AWS_SECRET_ACCESS_KEY="CanaryCloud", **for_all)
        folder = place.with_tables(prefect_database, "work/tokens")
        (folder / "password").touch(0o600)
        (place.temporary / "runner_storage").touch(0)  # not even root can make a folder of it
        settings |= {"HTTPS_PROXY": "http://CanaryProxy", "KIS_TOKEN_DIR": str(folder.parent)}
        place.dotenv(**settings, **always_open("NASD", "KRX"))  # at most one of them is near midnight
        with place.start("up") as other:
            made = place.up()
            said = other.communicate()[0]
        yield made._replace(output=made.output + said)
        place.run("down")


class Once(Api):
    """An API that ends the watch when it asks for a check."""

    def create_run(self, deployment: str, **_: object) -> NoReturn:
        """Stop, naming the deployment."""
        raise EOFError(deployment)


@pytest.fixture
def refreshing(up: Up, outside: tuple[Sandbox, SlackEndpoint]) -> Iterator[tuple[str, int]]:
    """A run that waits for KIS, and the id of its process."""
    gateway = outside[0]
    gateway.set_rules(latency=MINUTE)
    before = asked(gateway)
    for pattern in ("key-*.json*", "*_api_token.json", "*_token_issued_at.dat"):  # no token, and no trace of an issue
        for file in up.folder.parent.glob(pattern):
            file.unlink()
    run = up.create(CHECK)
    until(lambda: asked(gateway) > before and up.look(run)["infrastructure_pid"], SLOW)
    gateway.set_rules(latency=0)
    yield run, int(up.look(run)["infrastructure_pid"])
    time.sleep(1)  # KIS's minute


def lines(output: str) -> dict[str, str]:
    """What `up` and `status` print, by the first words of each line."""
    return dict(re.findall(r"^(last check|server says|\S+) +(.+)$", output, re.MULTILINE))


def automations(up: Up) -> dict[str, dict[str, Any]]:
    """The automations on the server, by name, with their `id` but without the times that the server sets."""
    found = up.api("POST", "automations/filter", {}).json()
    return {one["name"]: {k: v for k, v in one.items() if k not in ("created", "updated")} for one in found}


def overdue(up: Up, deployment: str, *hours: int) -> list[str]:
    """Create runs as if the schedule had planned them this many hours ago, and return their ids."""
    due = [(datetime.now(UTC) - timedelta(hours=ago)).isoformat() for ago in hours]
    states = [{"type": "SCHEDULED", "state_details": {"scheduled_time": at}} for at in due]
    return [up.create(deployment, state=state, tags=["auto-scheduled"]) for state in states]


def secrets(up: Up) -> list[str]:
    """What no file but the password's may hold."""
    return [up.password.partition(":")[2], APP_SECRET, APP_KEY, WEBHOOK, "CanaryCloud"]


def files_with_secrets(up: Up) -> list[str]:
    """The names of the stack's files that hold a secret."""
    found = []
    for path in up.folder.rglob("*"):
        with contextlib.suppress(OSError):  # a folder, or a temporary file that is gone just now
            kept = path.read_bytes()
            found += [path.name] if any(one.encode() in kept for one in secrets(up)) else []
    return found


def test_up_starts_what_the_settings_want_and_says_where_it_is(up: Up) -> None:
    """All parts run, a check has renewed, and the printed links, the warm-ups and the form follow the settings."""
    said = lines(up.output)
    assert [up.output.count(words) for words in ("Starting ", "It runs already.")] == [1, 1]  # of two at once
    assert sorted(up.processes()) == ["server", "supervisor", "worker"]
    assert said["tokens"].startswith(f"{up.url}/v2/artifacts/key/tokens ")
    assert said["refresh"].startswith(f"{up.url}/v2/deployments/deployment/")
    assert re.fullmatch(r"Renewed, \d{4}-\d\d-\d\d \d\d:\d\d UTC", said["last check"])
    assert (said["page"], said["password"]) == (f"{up.url}/v2", f"in {up.folder}/password")
    assert all(up.api("GET", f"artifacts/{name}/latest").ok for name in ("tokens", "plan"))
    found = {one["name"]: one for one in up.api("POST", "deployments/filter", {}).json()}
    assert sorted(found) == ["AMEX", "KRX", "NASD", "NYSE", "SEHK", "check_tokens", "refresh_token"]
    assert all(schedule["active"] for one in found.values() for schedule in one["schedules"])
    form = found["refresh_token"]["parameter_openapi_schema"]["properties"]["market"]["enum"]
    assert sorted(form) == ["hk", "kr", "us"]
    by_cron = {"state": {"type": {"any_": ["SCHEDULED"]}}, "tags": {"all_": ["auto-scheduled"]}}
    until(lambda: up.api("POST", "flow_runs/count", {"flow_runs": by_cron}).json() > 0, MINUTE)


def test_a_second_start_is_refused_and_status_says_what_it_cannot_know(up: Up) -> None:
    """`up` says that it runs and `run` refuses; `status` is 3 if the server is silent or refuses the password."""
    before = up.processes()
    code, output = up.place.run("up")
    assert (code, output.splitlines()[0]) == (0, "It runs already.")
    assert up.place.run("run") == (1, "It runs already; `make status` shows its status.\n")
    assert (up.processes(), up.place.run("status")[0]) == (before, 0)
    moved = up.place.environment | {"PREFECT_SERVER_API_PORT": str(free_port())}
    code, output = up.place._replace(environment=moved).run("status")
    assert (code, lines(output)["page"]) == (0, f"{up.url}/v2"), "a new port counts from the next start"
    wrong = up.place.environment | {"PREFECT_SERVER_API_AUTH_STRING": "admin:AnotherPassword"}
    code, output = up.place._replace(environment=wrong).run("status")
    assert (code, "refuses the password" in lines(output)["server says"], "Another" in output) == (3, True, False)
    os.kill(before["server"], signal.SIGSTOP)
    code, output = up.place.run("status")
    os.kill(before["server"], signal.SIGCONT)
    assert (code, lines(output)["server says"][:9]) == (3, "NOT KNOWN")


def test_while_the_server_restarts_nobody_else_gets_its_port_or_what_is_sent_there(up: Up) -> None:
    """After its death no program can listen on the port, and a request is answered by the server that comes back."""
    dead = up.processes()["server"]
    os.kill(dead, signal.SIGKILL)
    until(lambda: up.processes().get("server", dead) != dead, MINUTE)
    with pytest.raises(OSError, match="Address already in use"):
        socket.create_server(("127.0.0.1", int(up.url.rpartition(":")[2])))
    assert up.api("POST", "flow_runs/count", {}).ok


def test_strangers_and_foreign_pages_get_nothing_and_our_own_page_asks_nobody_else(up: Up) -> None:
    """No request without the password, from another origin or by another name is served; our page may ask only us."""
    assert requests.post(f"{up.url}/api/block_documents/filter", json={}, timeout=30).status_code == 401
    assert requests.get(f"{up.url}/api/health", timeout=30).ok
    preflight = {"Access-Control-Request-Method": "POST", "Origin": STRANGER}
    assert requests.options(f"{up.url}/api/flow_runs/filter", headers=preflight, timeout=30).status_code == 400
    answers = [up.api("POST", "flow_runs/filter", {}, Origin=origin) for origin in (STRANGER, up.url)]
    assert [one.headers.get("access-control-allow-origin") for one in answers] == [None, up.url]
    called = [up.api("GET", "health", Host=name).status_code for name in ("stranger.example", "localhost")]
    assert called == [400, 200]
    assert "connect-src 'self'" in requests.get(f"{up.url}/v2/", timeout=30).headers["content-security-policy"]


def test_no_secret_is_stored_or_on_a_command_line(up: Up) -> None:
    """All files and the socket are the owner's alone, and the password, in its file, is the only secret in any."""
    assert stat.S_ISSOCK((up.folder / "sock").stat().st_mode)
    page = up.folder / "page"  # public files, which in Prefect's own folder only its first user could make
    assert (page / "v2" / "index.html").exists()
    everything = [up.folder.parent, up.folder, *(path for path in up.folder.rglob("*") if page not in path.parents)]
    assert [path.name for path in everything if path.lstat().st_mode & 0o077] == []
    assert files_with_secrets(up) == ["password"]
    assert not any(one in line for line in (up.output, *up.place.living().values()) for one in secrets(up))


def test_runs_that_crash_together_are_one_message_with_a_link(up: Up, outside: tuple[Sandbox, SlackEndpoint]) -> None:
    """Slack gets one message with a link to the run; if Slack refuses it, the log has only the kind of the error."""
    known, log, slack = automations(up), up.folder / "server.log", outside[1]
    assert sorted(known) == NAMES

    def crash() -> bool:
        (run,) = overdue(up, CHECK, -99)
        up.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CRASHED"}, "force": True})
        time.sleep(1)
        return False

    def heard() -> list[str]:
        return [one["text"] for one in slack.messages if ":warning: A run crashed: " in one.get("text", "")]

    until(lambda: bool(heard()) or crash(), MINUTE)  # Prefect holds back an event that overtakes the one before it
    for _ in range(3):
        crash()
    assert [f"{up.url}/v2/runs/flow-run/" in text for text in heard()] == [True]
    one = known["A run crashed"]
    one["trigger"]["within"] = 0  # so that the next crash is reported too
    up.api("PUT", f"automations/{one.pop('id')}", one)
    slack.answers.append(403)
    until(lambda: "HTTPStatusError" in log.read_text() or crash(), MINUTE)
    assert WEBHOOK not in log.read_text()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome is installed here")
def test_a_link_leads_a_person_through_the_login_to_the_run(up: Up) -> None:
    """A person who is not signed in enters what the password file holds, once, and arrives where the link led."""
    (run,) = overdue(up, CHECK, -99)
    with sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
        page = browser.new_page(reduced_motion="reduce")
        page.set_default_timeout(MINUTE * 1000)
        page.goto(f"{up.url}/v2/runs/flow-run/{run}")
        page.wait_for_url("**/v2/login?redirectTo=*")
        page.get_by_placeholder("admin:pass").fill(up.password)
        page.get_by_role("button", name="Login").click()
        page.wait_for_url(f"**/v2/runs/flow-run/{run}*")
        page.get_by_text("check-tokens").first.wait_for()


def test_a_killed_worker_comes_back_and_ends_what_died_or_was_missed(up: Up, refreshing: tuple[str, int]) -> None:
    """Its run, which knew no cloud key, is Crashed, and one whose id is another's; of missed warm-ups one runs."""
    run, process = refreshing
    assert files_with_secrets(up) == ["password"]  # nor has a run's own environment been written anywhere
    worker = up.processes()["worker"]
    known = environment_of(process) | environment_of(worker)
    assert {one for one in known if "Canary" in one or "ENCRYPTION_KEY" in one} == set()
    up.api("PATCH", "work_pools/tokens", {"is_paused": True})  # so that none of them starts before the kill
    checks, warm_ups = overdue(up, CHECK, 2, 1), overdue(up, "warm-up/KRX", 48, 24)
    other = up.api("POST", "flow_runs/", {"flow_id": up.look(run)["flow_id"], "state": {"type": "RUNNING"}}).json()[
        "id"
    ]
    reused = up.create(CHECK, state={"type": "RUNNING"})  # the machine restarted, and gave the id to another process
    up.api("PATCH", f"flow_runs/{reused}", {"infrastructure_pid": str(os.getpid())})
    for number in (worker, process):
        os.kill(number, signal.SIGKILL)
    until(lambda: up.processes().get("worker", worker) != worker, SLOW)
    until(lambda: up.state(run) == up.state(reused) == ("CRASHED", "Crashed"), SLOW)
    until(lambda: {up.state(one) for one in (*checks, warm_ups[0])} == {SKIPPED}, SLOW)
    assert up.state(other)[0] == "RUNNING"  # another program's run, in no work pool
    up.api("PATCH", "work_pools/tokens", {"is_paused": False})
    until(lambda: up.state(warm_ups[1])[0] == "COMPLETED", SLOW)
    assert [bool(up.look(one)["infrastructure_pid"]) for one in (*checks, *warm_ups)] == [False] * 3 + [True]


def test_another_deploy_follows_the_settings_and_keeps_what_a_person_did(up: Up) -> None:
    """An automation that is switched off or a person's own stays; an obsolete one and an untraded exchange go."""
    before = automations(up)
    up.api("PATCH", f"automations/{before[NAMES[0]]['id']}", {"enabled": False})
    content = {key: value for key, value in before[NAMES[1]].items() if key != "id"}
    for more in ({"name": "A person's", "tags": []}, {"name": "Ours of old"}):
        up.api("POST", "automations/", content | more)
    dotenv = up.place.work / ".env"
    dotenv.write_text(dotenv.read_text().replace("SEHK", "KRX"))
    assert up.control("start", "deploy") == "deploy: started"
    # It deploys, which Prefect may refuse twice while the server is busy, and runs a check, which may wait for KIS.
    until(lambda: "deploy" not in up.processes(), 3 * SLOW)
    assert (up.folder / "deploy.log").read_text().splitlines()[-1].partition(": ")[0] in CHECKED
    after = automations(up)
    assert sorted(after) == sorted([*NAMES, "A person's"])
    assert {name: after[name]["id"] for name in NAMES} == {name: before[name]["id"] for name in NAMES}
    assert [name for name in after if not after[name]["enabled"]] == [NAMES[0]]
    assert "SEHK" not in {one["name"] for one in up.api("POST", "deployments/filter", {}).json()}


def test_a_worker_that_is_stopped_cancels_its_run_and_is_missed(up: Up, refreshing: tuple[str, int]) -> None:
    """The stopped worker's run has no process any more, its state says why, and `status` ends with 3."""
    run, process = refreshing
    assert up.control("stop", "worker") == "worker: stopped"
    assert (up.state(run), environment_of(process)) == (("CANCELLED", "Cancelled"), set())
    assert up.look(run)["state"]["message"].startswith("Stopped with its worker")
    code, output = up.place.run("status")
    assert (code, lines(output)["worker"]) == (3, "NOT RUNNING")


def test_after_a_sleep_one_check_stands_for_what_was_missed(up: Up) -> None:
    """The missed checks end without a process, and one new check is asked for, although the worker is still stopped."""
    checks = overdue(up, CHECK, 3, 2)
    with time_machine.travel(datetime.now(UTC)) as clock:
        threading.Timer(2, clock.shift, [worker.NAP + 9]).start()
        with pytest.raises(EOFError, match=CHECK):
            worker.watch_sleep(Once(up.url, up.password))
    assert {up.state(run) for run in checks} == {SKIPPED}
    assert up.control("start", "worker") == "worker: started"


def test_down_leaves_no_process(up: Up) -> None:
    """It needs no good settings if something runs; then no process is left, and `status` asks no other program."""
    malformed = {"KIS_TIMEOUT": "soon", "PREFECT_SERVER_API_PORT": "none", "KIS_BASE_URL": "http://stranger.example"}
    place = up.place._replace(environment=up.place.environment | malformed)
    assert place.run("down") == (0, "Stopped.\n")
    assert up.place.living() == {}
    code, output = place.run("down")
    assert (code, output.count("\n"), " cannot be used: " in output) == (2, 1, True), output
    assert up.place.run("down") == (0, "Nothing was running.\n")
    with socket.create_server(("127.0.0.1", int(up.url.rpartition(":")[2]))) as neighbour:
        code, output = up.place.run("status")
        neighbour.setblocking(False)  # noqa: FBT003 - its only parameter
        with pytest.raises(BlockingIOError):
            neighbour.accept()
    assert (code, output.splitlines()[0]) == (3, "Nothing is running; `make up` starts it.")
