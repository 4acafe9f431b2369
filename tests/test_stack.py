"""The running system for real: the demo from start to end, the stack in the background started, hurt and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from running import until
from scenarios import long
from stacks import MARK, SLOW, WEBHOOK, Place, Up, free_port, in_proc

from flows import board
from flows.stack.crew import Crew, CrewError, birth, crew_file, told
from flows.stack.deploy import AT_ONCE, QUEUE
from flows.stack.leftovers import POOL
from tokencore.sandbox import APP_KEY, APP_SECRET

pytestmark = in_proc


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, int, str]:
    """One demo to its end, on a machine where every setting is a trap; where it ran, its exit code, what it printed."""
    place = Place.made(
        tmp_path_factory.mktemp("demo"),
        KIS_APP_KEY="CanaryKey",
        KIS_ENVIRONMENT="nonsense",
        SLACK_WEBHOOK_URL="http://127.0.0.1:9/",
        PREFECT_API_URL="http://127.0.0.1:9/api",
        PREFECT_PROFILE="missing",
    )
    (place.work / ".env").write_text("KIS_TIMEOUT=nonsense\nPREFECT_API_KEY=CanaryKey\n")
    (place.home / ".tokencore").mkdir()
    (place.home / ".tokencore" / "config.toml").write_text("this is no TOML")
    return place, *place.run("demo", "--once")


def test_the_demo_comes_to_a_completed_warm_up_and_a_token(demo: tuple[Place, int, str]) -> None:
    """With no setting of its own it warms up, renews, and shows where the page is and that every token is valid."""
    _, code, output = demo
    assert code == 0, output
    assert re.search(r"^warm-up +Completed: (Renewed|MarketClosed|SkippedLate)\.", output, re.MULTILINE)
    assert output.count("Completed: Renewed.") == 1
    assert re.search(r"^The page: http://127\.0\.0\.1:\d+$", output, re.MULTILINE)
    assert re.findall(r"^(us|kr) +VALID ", output, re.MULTILINE) == ["us", "kr"]


def test_the_demo_publishes_the_table_and_the_plan(demo: tuple[Place, int, str]) -> None:
    """The check that makes both artifacts runs at once, not at the next full hour, and their addresses are shown."""
    _, _, output = demo
    assert re.search(r"^check-tokens +Completed: AlreadyValid\.", output, re.MULTILINE)
    for name in (board.TOKENS, board.PLAN):
        assert re.search(rf"^  The {name}: http://127\.0\.0\.1:\d+/artifacts/key/{name} ", output, re.MULTILINE)


def test_the_demo_leaves_nothing(demo: tuple[Place, int, str]) -> None:
    """No process, no file in the home, the working or the temporary folder, and no real credential in its output."""
    place, _, output = demo
    assert place.living() == []
    assert sorted(path.name for path in place.home.rglob("*")) == [".tokencore", "config.toml"]
    assert [path.name for path in place.work.iterdir()] == [".env"]
    assert list(place.temporary.iterdir()) == []
    assert "Canary" not in output


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle, with server and worker up and the deployments under way, ends all of it, exit 130."""
    place = Place.made(tmp_path)
    running = place.start("demo")

    def deploying() -> bool:
        return any("deploy" in told(folder).get("processes", {}) for folder in place.temporary.glob("tokencore-demo-*"))

    until(lambda: deploying() or running.poll() is not None, SLOW)
    assert len(place.living()) >= 5
    running.send_signal(signal.SIGINT)
    output = running.communicate(timeout=SLOW)[0]
    assert (running.returncode, output.splitlines()[-1]) == (130, "Interrupted.")
    assert place.living() == []
    assert list(place.temporary.iterdir()) == []


def test_up_starts_all_and_says_so(up: Up) -> None:
    """All three processes run when `up` returns, the first check is done, and the table of tokens is shown."""
    assert sorted(up.processes()) == ["server", "supervisor", "worker"]
    assert re.search(r"^page +http://127\.0\.0\.1:\d+$", up.output, re.MULTILINE)
    assert re.search(r"^first check +(Renewed|AlreadyValid|Completed): ", up.output, re.MULTILINE)
    assert re.findall(r"^(us|kr) ", up.output, re.MULTILINE) == ["us", "kr"]


def test_up_shows_where_the_artifacts_are(up: Up) -> None:
    """The table and the plan are published when `up` returns, under the names in the addresses that it prints."""
    for name in (board.TOKENS, board.PLAN):
        assert f"{told(up.folder)['url']}/artifacts/key/{name} " in up.output
        assert up.api("GET", f"artifacts/{name}/latest").ok


def test_the_form_lists_the_markets_of_the_settings(up: Up) -> None:
    """A market that only `.env` names is in refresh_token's drop-down."""
    deployment = up.api("GET", "deployments/name/refresh-token/refresh_token").json()
    assert sorted(deployment["parameter_openapi_schema"]["properties"]["market"]["enum"]) == ["hk", "kr", "us"]


def test_refreshes_have_a_queue_with_a_limit(up: Up) -> None:
    """The queue that prefect.yaml names for refresh_token is its deployment's, and has its limit, when `up` returns."""
    assert up.api("GET", "deployments/name/refresh-token/refresh_token").json()["work_queue_name"] == QUEUE
    assert up.api("GET", f"work_pools/{POOL}/queues/{QUEUE}").json()["concurrency_limit"] == AT_ONCE


def test_runs_are_scheduled(up: Up) -> None:
    """Soon after the start the server has runs of the coming days: some versions of its libraries break just that."""
    by_cron = {"all_": ["auto-scheduled"]}  # Prefect's tag; a planned renewal is a scheduled run too, but ours
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}, "tags": by_cron}}
    until(lambda: up.api("POST", "flow_runs/count", scheduled).json() > 0, 60)


def test_a_run_uses_the_folder_of_the_settings(up: Up) -> None:
    """A refresh by hand issues with the key of `.env` and writes into the folder that it names, relative as it is."""
    deployment = up.api("GET", "deployments/name/refresh-token/refresh_token").json()["id"]
    asked = {"parameters": {"market": "kr", "operator": "Kim", "force": True, "reason": "test"}}
    assert up.api("POST", f"deployments/{deployment}/create_flow_run", asked).ok
    until((up.folder.parent / "kr_api_token.json").exists, SLOW)


def test_the_server_gets_no_credentials_and_the_folder_is_private(up: Up) -> None:
    """Only the worker's environment holds them, `.env` was enough, and nobody else can look into the folder."""
    environments = {name: Path(f"/proc/{pid}/environ").read_bytes() for name, pid in up.processes().items()}
    assert APP_SECRET.encode() not in environments["server"]
    assert APP_SECRET.encode() in environments["worker"]
    assert [oct(folder.stat().st_mode & 0o777) for folder in (up.folder.parent, up.folder)] == ["0o700", "0o700"]


def test_no_credential_is_stored(up: Up) -> None:
    """After deployments, checks and a refresh none is in the database, a log, or anything else of the stack's."""
    stored = {path: path.read_bytes() for path in up.folder.rglob("*") if path.is_file()}
    assert "prefect.db" in {path.name for path in stored}
    credentials = (APP_KEY.encode(), APP_SECRET.encode(), WEBHOOK.encode())
    assert [path for path, content in stored.items() if any(one in content for one in credentials)] == []


def test_the_password_is_asked_for_and_told_nowhere(up: Up) -> None:
    """With a password set, all of the above went on; without it the server gives nothing away but that it is there."""
    naked = up._replace(auth=None)
    assert naked.api("POST", "flow_runs/filter", {}).status_code == 401
    assert naked.api("GET", "health").ok
    stored = [path for path in up.folder.rglob("*") if path.is_file()]
    assert [path for path in stored if b"CanaryPassword" in path.read_bytes()] == []
    assert not any("CanaryPassword" in line for line in up.place.living())


def test_status_tells_what_is_on_the_server(up: Up) -> None:
    """Deployments and automations are counted."""
    output = up.place.run("status")[1]
    assert re.search(r"^deployments +13$", output, re.MULTILINE)
    assert re.search(r"^automations +5$", output, re.MULTILINE)


def test_status_says_that_the_password_is_another(up: Up) -> None:
    """What cannot be asked of the server is not left out: a sentence says why, and what to do."""
    elsewhere = up.place._replace(
        environment=up.place.environment | {"PREFECT_SERVER_API_AUTH_STRING": "admin:AnotherPassword"}
    )
    output = elsewhere.run("status")[1]
    assert "NOT KNOWN. The server refuses the password; set PREFECT_SERVER_API_AUTH_STRING" in output
    assert "AnotherPassword" not in output


def test_up_again_changes_nothing(up: Up) -> None:
    """A second `up` finds the first one's processes and leaves them alone."""
    before = up.processes()
    code, output = up.place.run("up")
    assert (code, output.splitlines()[0]) == (0, "It runs already.")
    assert up.processes() == before


def test_a_second_supervisor_is_refused(up: Up) -> None:
    """`run` beside `up`, as by a service and by hand, ends with a sentence and takes nothing from the first."""
    before = up.processes()
    code, output = up.place.run("run")
    assert (code, output) == (1, "It runs already; `make status` tells how it is.\n")
    assert up.processes() == before


def test_a_worker_that_dies_is_started_again(up: Up) -> None:
    """After a SIGKILL a new worker is there soon; `status` shows either."""
    before = up.processes()
    os.kill(before["supervisor"], signal.SIGSTOP)  # it would be quicker than `status` on a busy machine
    try:
        os.kill(before["worker"], signal.SIGKILL)
        assert re.search(r"^worker +NOT RUNNING$", up.place.run("status")[1], re.MULTILINE)
    finally:
        os.kill(before["supervisor"], signal.SIGCONT)
    until(lambda: up.processes().get("worker", before["worker"]) != before["worker"], SLOW)
    assert re.search(r"^worker +process \d+$", up.place.run("status")[1], re.MULTILINE)
    assert up.processes()["server"] == before["server"]


@pytest.mark.parametrize("member", ["server", pytest.param("deploy", marks=long)])
def test_an_interrupted_up_leaves_nothing(member: str, tmp_path: Path) -> None:
    """Ctrl-C while it starts ends the supervisor and its processes before `up` says so, exit 130."""
    folder = tmp_path / "tokens"
    place = Place.made(
        tmp_path,
        KIS_APP_KEY=APP_KEY,
        KIS_APP_SECRET=APP_SECRET,
        KIS_TOKEN_DIR=str(folder),
        PREFECT_SERVER_API_PORT=str(free_port()),
    )
    running = place.start("up")
    until(lambda: member in told(folder / "prefect").get("processes", {}) or running.poll() is not None, SLOW)
    assert len(place.living()) >= 3
    running.send_signal(signal.SIGINT)
    output = running.communicate(timeout=SLOW)[0]
    assert (running.returncode, output.splitlines()[-1]) == (130, "Interrupted.")
    assert place.living() == []
    assert told(folder / "prefect") == {}


@pytest.mark.parametrize("kind", ["a file", "not to be made", "a file in it"])
def test_an_unusable_token_folder_is_said(kind: str, tmp_path: Path) -> None:
    """One sentence that names the path, exit 7, from what has to write there."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "prefect").touch()
    folders = {"a file": tmp_path / "file", "not to be made": Path("/proc/tokens"), "a file in it": tmp_path / "folder"}
    folder = folders[kind]
    place = Place.made(tmp_path, KIS_APP_KEY=APP_KEY, KIS_APP_SECRET=APP_SECRET, KIS_TOKEN_DIR=str(folder))
    for command in ("up", "run"):
        code, output = place.run(command)
        assert (code, output.count("\n")) == (7, 1), output
        assert output.startswith(f"The token directory cannot be used: {folder}")


@pytest.mark.parametrize(("given", "missing"), [({}, "KIS_APP_KEY"), ({"KIS_APP_KEY": APP_KEY}, "KIS_APP_SECRET")])
def test_without_credentials_nothing_starts(given: dict[str, str], missing: str, tmp_path: Path) -> None:
    """A missing key or secret is one sentence that names it, exit 2; nothing is made."""
    place = Place.made(tmp_path, **given)
    code, output = place.run("up")
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith(f"{missing} is not set")
    assert list(place.home.iterdir()) == []


@pytest.mark.parametrize("port", ["taken", "70000"])
def test_a_port_that_cannot_be_had_is_said(port: str, tmp_path: Path) -> None:
    """Another program's port, or none at all, is one sentence that names the setting, exit 2; nothing runs."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        chosen = str(other.getsockname()[1]) if port == "taken" else port
        place = Place.made(tmp_path, KIS_APP_KEY=APP_KEY, KIS_APP_SECRET=APP_SECRET, PREFECT_SERVER_API_PORT=chosen)
        code, output = place.run("up")
    assert (code, output.count("\n")) == (2, 1)
    assert "PREFECT_SERVER_API_PORT" in output
    assert place.living() == []


def test_an_address_of_another_machine_is_said(tmp_path: Path) -> None:
    """The sentence names the setting of the address, and does not blame another program for a free port."""
    own = {"PREFECT_SERVER_API_HOST": "192.0.2.7", "PREFECT_SERVER_API_PORT": str(free_port())}
    place = Place.made(tmp_path, KIS_APP_KEY=APP_KEY, KIS_APP_SECRET=APP_SECRET, **own)
    code, output = place.run("up")
    assert code == 2
    assert output.startswith("PREFECT_SERVER_API_HOST=192.0.2.7 cannot be listened on")
    assert place.living() == []


def started_with_database(folder: Path, url: str) -> tuple[Place, int, str]:
    """`up` with another database: where, its exit code and what it printed."""
    place = Place.made(
        folder,
        KIS_APP_KEY=APP_KEY,
        KIS_APP_SECRET=APP_SECRET,
        PREFECT_SERVER_API_PORT=str(free_port()),
        PREFECT_SERVER_DATABASE_CONNECTION_URL=url,
    )
    return place, *place.run("up")


def test_a_server_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    """Exit 1 with the end of the server's own words, without the database's password, and nothing is left running."""
    url = f"postgresql+asyncpg://prefect:CanaryPassword@127.0.0.1:{free_port()}/prefect"
    place, code, output = started_with_database(tmp_path, url)
    assert code == 1
    assert "server: exited with code" in output
    assert "CanaryPassword" not in output
    assert place.living() == []
    assert [path for path in place.home.rglob("*") if path.is_file() and b"CanaryPassword" in path.read_bytes()] == []


@pytest.mark.parametrize("url", ["postgres://u:CanaryPassword@h/d", "nonsense://CanaryPassword"])
def test_a_database_that_prefect_cannot_use_is_said(url: str, tmp_path: Path) -> None:
    """One sentence that names the setting and shows a right one, exit 2, without the address and its password."""
    place, code, output = started_with_database(tmp_path, url)
    assert (code, output.count("\n")) == (2, 1)
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" in output
    assert "Canary" not in output
    assert place.living() == []


def test_a_process_with_a_recycled_number_is_spared(tmp_path: Path) -> None:
    """`down` stops nobody whose number once belonged to the stack but who was born at another time."""
    place = Place.made(tmp_path, KIS_TOKEN_DIR=str(tmp_path / "tokens"))
    folder = tmp_path / "tokens" / "prefect"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        processes = {"supervisor": [bystander.pid, "1"], "worker": [bystander.pid, "2"]}
        crew_file(folder).write_text(json.dumps({"processes": processes}))
        assert place.run("down") == (0, "Nothing was running.\n")
        assert bystander.poll() is None
        bystander.kill()
    assert birth(bystander.pid) == ""


def test_what_fails_is_tried_again(tmp_path: Path) -> None:
    """A command that succeeds at the third try fails with two, told with the end of its log, and not with three."""
    flaky = ["sh", "-c", "echo x >> runs; echo try $(wc -l < runs); test $(wc -l < runs) -eq 3"]
    with Crew(tmp_path) as crew:
        with pytest.raises(CrewError, match=r"failed with code 1(.|\n)*try 2$"):
            crew.run("flaky", flaky, os.environ, 10, tries=2)
        (tmp_path / "runs").unlink()
        crew.run("flaky", flaky, os.environ, 10, tries=3)
    assert (tmp_path / "runs").read_text().count("x") == 3


def test_a_member_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ignores SIGTERM ends by force, with its own children."""
    monkeypatch.setattr("flows.stack.crew.PATIENCE", 0.2)
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    place = Place(tmp_path, tmp_path, tmp_path, dict(os.environ))
    with Crew(tmp_path) as crew:
        deaf = crew.start("deaf", ["sh", "-c", "trap '' TERM; echo ready; sleep 60; sleep 60"], os.environ)
        until(lambda: "ready" in deaf.log.read_text())
        until(lambda: len(place.living()) == 2)
    until(lambda: place.living() == [])
