"""One life of the running system: started, looked at, asked by strangers, hurt, started again and stopped.

The tests go in their order: those that hurt it come last.
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import browser
import pytest
import requests
from running import until
from slack_endpoint import SlackEndpoint
from stacks import PARTS, SLOW, Place, Up, always_open, environment_of, free_port, in_proc, is_alive

from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = in_proc
WEBHOOK = "CanaryWebhook"  # in the address of the Slack that the stack alerts
CHECK = "check-tokens/check_tokens"
NAMES = ["A run crashed", "A run is late", "A run shows no life", "No worker", "The hourly check is missing"]
STRANGER = "http://stranger.example"
WATCH = """
from flows.stack import orphans, supervisor
orphans.NAP = 2.0  # seconds that count as a sleep
print("awake", flush=True)
orphans.watch_sleep(supervisor.api())
"""
MINUTE = 60.0


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
    """A stack with credentials in `.env` only and another user's `runner_storage` in the way; stopped in the end.

    Its folders are below one that every user may enter, so that it is its own modes which keep others out.
    """
    root = Path(tempfile.mkdtemp(prefix="tokencore-"))
    root.chmod(0o755)
    port = free_port()
    place = Place.made(root, PREFECT_SERVER_API_PORT=str(port), AWS_SECRET_ACCESS_KEY="CanaryCloud")
    (place.temporary / "runner_storage").touch(0)  # not even root can make a folder of it
    folder = place.work / "tokens"
    settings = {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET, "KIS_BASE_URL": gateway.url}
    settings |= {"KIS_TOKEN_DIR": str(folder), "KIS_MARKETS__HK__EXCHANGES": "SEHK", "KIS_ISSUE_INTERVAL": "1"}
    settings |= {"SLACK_WEBHOOK_URL": f"{slack.url}/services/{WEBHOOK}", "KIS_TIMEOUT": "60"} | always_open()
    (place.work / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    code, output = place.run("up")
    assert code == 0, output
    password = (folder / "prefect" / "password").read_text().strip()
    made = Up(place, output, folder / "prefect", f"http://127.0.0.1:{port}", password)
    yield made
    place.run("down")
    rmtree(root)


@pytest.fixture
def refreshing(up: Up, gateway: Sandbox) -> Iterator[tuple[str, int]]:
    """A run that waits for KIS, and its process."""
    gateway.set_rules(latency=MINUTE)
    before = gateway.stats()["token_requests"]
    for pattern in ("key-*.json*", "*_api_token.json", "*_token_issued_at.dat"):  # no token, and nobody who issued one
        for file in up.folder.parent.glob(pattern):
            file.unlink()
    run = up.create(CHECK)
    until(lambda: gateway.stats()["token_requests"] > before, SLOW)
    gateway.set_rules(latency=0)
    yield run, int(up.look(run)["infrastructure_pid"])
    time.sleep(1)  # KIS's minute


def lines(output: str) -> dict[str, str]:
    """What `up` and `status` say, by the first words of the line."""
    found = re.findall(r"^(last check|server says|\S+) +(.+)$", output, re.MULTILINE)
    return dict(found)


def stored(up: Up) -> dict[str, bytes]:
    """Every file of the stack's folder, by name."""
    return {path.name: path.read_bytes() for path in up.folder.rglob("*") if path.is_file()}


def automations(up: Up) -> dict[str, dict[str, Any]]:
    """The automations on the server, by name; two of one name are an error."""
    found = up.api("POST", "automations/filter", {}).json()
    assert len({one["name"] for one in found}) == len(found)
    return {one["name"]: one for one in found}


def overdue(up: Up, deployment: str, hours: int) -> str:
    """A run that its schedule had made for so long ago; its id."""
    due = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
    return up.create(deployment, state=state, tags=["auto-scheduled"])


def crash(up: Up) -> str:
    """A run of the check in the far future that crashed; its name."""
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    run = up.create(CHECK, state=later)
    up.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    name: str = up.look(run)["name"]
    return name


def listening(processes: Iterator[int]) -> set[int]:
    """The TCP ports on which these processes listen."""
    table = [line.split() for path in ("tcp", "tcp6") for line in Path(f"/proc/net/{path}").read_text().splitlines()]
    ports = {row[9]: int(row[1].rpartition(":")[2], 16) for row in table if row[3] == "0A"}
    found = set()
    for process in processes:
        for file in Path(f"/proc/{process}/fd").iterdir():
            found.add(ports.get(re.sub(r"socket:\[(\d+)\]", r"\1", os.readlink(file))))
    return {port for port in found if port}


def test_up_starts_all_and_says_where_it_is(up: Up) -> None:
    """All parts run, the first check has renewed with the credentials of `.env`, and links lead past the login."""
    said = lines(up.output)
    assert sorted(up.processes()) == sorted(PARTS)
    assert said["page"] == f"{up.url}/v2"
    assert said["tokens"].startswith(f"{up.url}/v2/artifacts/key/tokens ")
    assert said["refresh"].startswith(f"{up.url}/v2/deployments/deployment/")
    assert re.fullmatch(r"Renewed, \d{4}-\d\d-\d\d \d\d:\d\d UTC", said["last check"])
    assert said["password"] == f"in {up.folder}/password"
    for name in ("tokens", "plan"):
        assert up.api("GET", f"artifacts/{name}/latest").ok


def test_status_is_0_only_with_the_right_password(up: Up) -> None:
    """All is well: 0. With another password it says that it knows nothing, and is 3."""
    code, output = up.place.run("status")
    assert code == 0, output
    other = up.place._replace(
        environment=up.place.environment | {"PREFECT_SERVER_API_AUTH_STRING": "admin:AnotherPassword"}
    )
    code, output = other.run("status")
    assert code == 3
    assert "NOT KNOWN. Prefect's server refuses the password" in output
    assert "AnotherPassword" not in output


def test_a_second_start_is_refused(up: Up) -> None:
    """`up` says that it runs, `run` refuses, and neither touches the first one's processes."""
    before = up.processes()
    code, output = up.place.run("up")
    assert (code, output.splitlines()[0]) == (0, "It runs already.")
    assert up.place.run("run") == (1, "It runs already; `make status` shows how it is.\n")
    assert up.processes() == before


@pytest.mark.parametrize("path", ["flow_runs/filter", "deployments/filter", "block_documents/filter"])
def test_without_the_password_nothing_is_given_away(path: str, up: Up) -> None:
    """Every question but that for its health is refused."""
    assert requests.post(f"{up.url}/api/{path}", json={}, timeout=30).status_code == 401
    assert requests.get(f"{up.url}/api/health", timeout=30).ok


def test_a_foreign_page_gets_nothing_from_a_browser(up: Up) -> None:
    """Its preflight is refused, no answer is marked for it, the page's own is; a name that points here is refused."""
    asked = {"Access-Control-Request-Method": "POST", "Origin": STRANGER}
    assert requests.options(f"{up.url}/api/flow_runs/filter", headers=asked, timeout=30).status_code == 400
    foreign = up.api("POST", "flow_runs/filter", {}, Origin=STRANGER)
    assert "access-control-allow-origin" not in foreign.headers
    own = up.api("POST", "flow_runs/filter", {}, Origin=up.url)
    assert own.headers["access-control-allow-origin"] == up.url
    assert up.api("GET", "health", Host="stranger.example").status_code == 400
    assert up.api("GET", "health", Host="localhost").ok


def test_the_page_may_ask_nobody_else(up: Up) -> None:
    """Prefect's analytics host, which its page asks whatever the settings say, is refused by the page's policy."""
    assert "connect-src 'self'" in requests.get(f"{up.url}/v2/", timeout=30).headers["content-security-policy"]


def test_only_the_server_listens(up: Up) -> None:
    """Supervisord has no port; its socket and every other file are the owner's alone."""
    assert listening(iter(up.place.living())) == {int(up.url.rpartition(":")[2])}
    assert stat.S_ISSOCK((up.folder / "sock").stat().st_mode)
    everything = [up.folder.parent, up.folder, *up.folder.rglob("*")]
    assert [path.name for path in everything if path.lstat().st_mode & 0o077] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_at_nothing(up: Up) -> None:
    """Neither at the password nor the database nor the socket; what is left open beside them, it can read."""
    other = pwd.getpwnam("nobody")
    (up.place.work / "open").write_text("readable")

    def reads(path: Path) -> bool:
        look = ["/bin/sh", "-c", 'cat "$0" || test -w "$0"', str(path)]
        return not subprocess.run(
            look, user=other.pw_uid, group=other.pw_gid, extra_groups=[], capture_output=True, check=False
        ).returncode

    assert reads(up.place.work / "open")
    kept = ("password", "prefect.db", "sock", "supervisord.conf", "server.log", "encryption.key")
    assert [name for name in kept if reads(up.folder / name)] == []


def test_no_secret_is_stored_or_on_a_command_line(up: Up) -> None:
    """The password is in its file alone, the app key, the secret and the webhook in no file of the stack's."""
    secrets = [up.password.partition(":")[2], APP_SECRET, APP_KEY, WEBHOOK, "CanaryCloud"]
    assert [name for name, content in stored(up).items() if any(one.encode() in content for one in secrets)] == [
        "password"
    ]
    assert not any(one in line for line in up.place.living().values() for one in secrets)
    assert not any(one in up.output for one in secrets)


def test_the_settings_decide_what_is_deployed(up: Up) -> None:
    """The exchanges that `.env` trades have their warm-up, on; the form has its markets; runs are scheduled."""
    found = {one["name"]: one for one in up.api("POST", "deployments/filter", {}).json()}
    assert sorted(found) == ["AMEX", "KRX", "NASD", "NYSE", "SEHK", "check_tokens", "refresh_token"]
    assert all(schedule["active"] for one in found.values() for schedule in one["schedules"])
    form = found["refresh_token"]["parameter_openapi_schema"]["properties"]["market"]["enum"]
    assert sorted(form) == ["hk", "kr", "us"]
    by_cron = {"state": {"type": {"any_": ["SCHEDULED"]}}, "tags": {"all_": ["auto-scheduled"]}}
    until(lambda: up.api("POST", "flow_runs/count", {"flow_runs": by_cron}).json() > 0, MINUTE)


def test_a_crash_is_reported_with_a_link_and_a_refusal_leaves_no_address(up: Up, slack: SlackEndpoint) -> None:
    """Slack has whose crash it is and its page; where Slack refuses, the log has the kind of the error alone."""
    assert sorted(automations(up)) == NAMES
    slack.answers.append(403)
    log = up.folder / "server.log"

    def heard() -> bool:
        name = crash(up)  # Prefect keeps an event back that overtakes its forerunner: then another one
        return any(name in message["text"] for message in wait_for_message(slack))

    until(lambda: heard() and "HTTPStatusError" in log.read_text(), MINUTE)
    text = slack.told[-1]["text"]
    assert re.match(r"\*:rotating_light: A run crashed: ", text)
    assert f"{up.url}/v2/runs/flow-run/" in text
    assert "*To do:* " in text
    assert WEBHOOK not in log.read_text()


def wait_for_message(slack: SlackEndpoint) -> list[dict[str, Any]]:
    """What the server's automations said, once they have said more or five seconds are over."""
    before, give_up = len(slack.told), time.monotonic() + 5
    while len(slack.told) == before and time.monotonic() < give_up:
        time.sleep(0.1)
    return [message for message in slack.told if "blocks" not in message]


@browser.needs_chromium
def test_a_link_leads_a_person_through_the_login_to_the_run(up: Up) -> None:
    """Who is not signed in answers one question, with what the password file holds, and is where the link led."""
    run = up.create(CHECK)
    with browser.page() as page:
        page.goto(f"{up.url}/v2/runs/flow-run/{run}")
        page.wait_for_url("**/v2/login?redirectTo=*")
        browser.sign_in(page, up.password)
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
    """`status` is 3 until another worker is there, and its first act is to end what died with the one before."""
    run, process = refreshing
    canaries = {one for one in environment_of(process) if "Canary" in one or "ENCRYPTION_KEY" in one}
    assert canaries == set()
    worker = up.processes()["worker"]
    os.kill(up.processes()["supervisor"], signal.SIGSTOP)  # it would be quicker than `status`
    try:
        os.kill(worker, signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        code, output = up.place.run("status")
    finally:
        os.kill(up.processes()["supervisor"], signal.SIGCONT)
    assert (code, lines(output)["worker"]) == (3, "NOT RUNNING")
    until(lambda: up.processes().get("worker", worker) != worker, SLOW)
    until(lambda: up.state(run) == ("CRASHED", "Crashed"), SLOW)


def test_after_a_sleep_one_check_stands_for_what_was_missed(up: Up) -> None:
    """All checks that were missed end without a process: another watch, which slept long enough for it, ends them."""
    watch = [sys.executable, "-c", WATCH]
    with paused(up), subprocess.Popen(watch, env=up.place.environment, cwd=up.place.work, text=True, stdout=-1) as one:
        assert one.stdout
        assert one.stdout.readline() == "awake\n"
        checks = [overdue(up, CHECK, hours) for hours in (3, 2, 1)]
        one.send_signal(signal.SIGSTOP)
        time.sleep(3)
        assert "COMPLETED" not in {up.state(run)[0] for run in checks}
        one.send_signal(signal.SIGCONT)
        until(lambda: {up.state(run) for run in checks} == {("COMPLETED", "SkippedLate")}, 30)
        assert one.stdout.readline().startswith("Nothing ran here for")
        one.kill()
    assert {up.look(run)["infrastructure_pid"] for run in checks} == {None}


@contextmanager
def paused(up: Up) -> Iterator[None]:
    """The worker starts nothing."""
    up.api("PATCH", "work_pools/tokens", {"is_paused": True})
    yield
    up.api("PATCH", "work_pools/tokens", {"is_paused": False})


def test_up_after_a_kill_of_all_marks_catches_up_and_changes_nothing_twice(up: Up, refreshing: tuple[str, int]) -> None:
    """The dead run is Crashed, of what was missed the last warm-up runs; automations keep what a person did."""
    run, process = refreshing
    processes, before = up.processes(), automations(up)
    up.api("PATCH", f"automations/{before[NAMES[0]]['id']}", {"enabled": False})
    content = {key: value for key, value in before[NAMES[1]].items() if key not in ("id", "created", "updated")}
    up.api("POST", "automations/", content | {"name": "A person's", "tags": []})
    up.api("POST", "automations/", content | {"name": "Ours of old"})
    for part in ("supervisor", "worker"):
        os.kill(processes[part], signal.SIGKILL)
    checks = [overdue(up, CHECK, hours) for hours in (3, 2, 1)]
    warm_ups = [overdue(up, "warm-up/KRX", hours) for hours in (72, 48, 24)]
    for number in (processes["server"], process):
        os.kill(number, signal.SIGKILL)
    until(lambda: not up.place.run("status")[1].startswith("worker"), 30)
    code, output = up.place.run("up")
    assert code == 0, output
    assert up.state(run) == ("CRASHED", "Crashed")
    assert {up.state(one) for one in (*checks, *warm_ups[:2])} == {("COMPLETED", "SkippedLate")}
    until(lambda: up.state(warm_ups[2])[0] == "COMPLETED", SLOW)
    after = automations(up)
    assert sorted(after) == sorted([*NAMES, "A person's"])
    assert {name: after[name]["id"] for name in NAMES} == {name: before[name]["id"] for name in NAMES}
    assert [name for name in after if not after[name]["enabled"]] == [NAMES[0]]


def test_down_leaves_no_process_and_no_run(up: Up, refreshing: tuple[str, int]) -> None:
    """A run that does not end by itself is Cancelled, with a sentence why; then nothing runs: 3."""
    run, process = refreshing
    assert up.place.run("down") == (0, "Stopped.\n")
    assert (up.place.living(), is_alive(process)) == ({}, False)
    assert up.place.run("down") == (0, "Nothing was running.\n")
    code, output = up.place.run("status")
    assert (code, output.splitlines()[0]) == (3, "Nothing is running; `make up` starts it.")
    with closing(sqlite3.connect(up.folder / "prefect.db")) as tables:  # there is no server to ask
        query = "SELECT s.type, s.message FROM flow_run r JOIN flow_run_state s ON r.state_id = s.id WHERE r.id LIKE ?"
        kind, message = tables.execute(query, (run.replace("-", "%"),)).fetchone()
    assert (kind, message.startswith("Stopped with its worker")) == ("CANCELLED", True)
