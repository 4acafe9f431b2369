"""The demo from start to end, and starts that fail: one sentence each, and nothing is left."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from running import until
from stacks import SLOW, Place, free_port, in_proc

from flows.stack import demo as play
from flows.stack import environment
from tokencore import sessions
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = in_proc
KEYS = {"KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET}
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's, as pytest's own does not."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def demo(short: Path) -> tuple[Place, int, str]:
    """One demo to its end, on a machine where every setting is a trap; where it ran, its exit code, what it printed."""
    place = Place.made(
        short / "demo",
        KIS_APP_KEY="CanaryKey",
        KIS_ENVIRONMENT="nonsense",
        SLACK_WEBHOOK_URL="http://127.0.0.1:9/",
        PREFECT_API_URL="http://127.0.0.1:9/api",
        PREFECT_PROFILE="missing",
    )
    (place.work / ".env").write_text("KIS_TIMEOUT=nonsense\nPREFECT_API_KEY=CanaryKey\nPREFECT_SERVER_API_PORT=9\n")
    (place.home / ".tokencore").mkdir()
    (place.home / ".tokencore" / "config.toml").write_text("this is no TOML")
    return place, *place.run("demo", "--once")


def test_the_demo_comes_to_a_warm_up_a_check_and_a_token(demo: tuple[Place, int, str]) -> None:
    """With no setting of its own it warms up, renews once, checks, and shows that every token is valid."""
    _, code, output = demo
    assert code == 0, output
    assert re.search(r"^warm-up +Completed: (Renewed|MarketClosed)\.", output, re.MULTILINE)
    assert output.count("Completed: Renewed.") == 1
    assert re.search(r"^check-tokens +Completed: AlreadyValid\.", output, re.MULTILINE)
    assert re.findall(r"^(us|kr) +VALID ", output, re.MULTILINE) == ["us", "kr"]


def test_the_demo_leaves_nothing(demo: tuple[Place, int, str]) -> None:
    """No process, no file, no address that is dead by now, and no real credential in its output."""
    place, _, output = demo
    assert place.living() == {}
    assert sorted(path.name for path in place.home.rglob("*")) == [".tokencore", "config.toml"]
    assert [path.name for path in place.work.iterdir()] == [".env"]
    assert list(place.temporary.iterdir()) == []
    assert "Canary" not in output
    assert "http://" not in output


def test_a_demo_that_stays_says_how_to_sign_in_and_ends_with_ctrl_c(short: Path) -> None:
    """The page's address and, beside it, what the login asks for; after Ctrl-C nothing is left."""
    place = Place.made(short / uuid.uuid4().hex[:8])
    running = place.start("demo")
    assert running.stdout
    output = ""
    for line in running.stdout:
        output += line
        if line.startswith("Ctrl-C"):
            break
    assert re.search(r"^The page: http://127\.0\.0\.1:\d+/v2\n  Sign in with: admin:\S{20,}$", output, re.MULTILINE)
    running.send_signal(signal.SIGINT)
    assert (running.communicate(timeout=SLOW)[0], running.returncode) == ("Stopped.\n", 0)
    assert place.living() == {}
    assert list(place.temporary.iterdir()) == []


def test_the_demo_warms_an_exchange_that_is_not_over() -> None:
    """At each hour of two years the session runs or is ahead on that day; otherwise there is none on it."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    for hour in range(2 * 365 * 24):
        now = begin + timedelta(hours=hour, minutes=hour % 60)
        code = play.exchange(now)
        session = sessions.session(code, now.astimezone(ZoneInfo(sessions.exchange(code).zone)).date())
        assert session is None or session.close > now


@pytest.mark.parametrize("command", ["up", "demo"])
def test_an_interrupted_start_leaves_nothing(command: str, short: Path) -> None:
    """Ctrl-C while it starts ends supervisord and its processes before the command says so, exit 130."""
    place = Place.made(short / uuid.uuid4().hex[:8], **KEYS, PREFECT_SERVER_API_PORT=str(free_port()))
    running = place.start(command)
    until(lambda: any("flows.stack.server" in line for line in place.living().values()), SLOW)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    output = running.communicate(timeout=SLOW)[0]
    assert (running.returncode, output.splitlines()[-1]) == (130, "Interrupted.")
    assert place.living() == {}
    assert list(place.temporary.iterdir()) == []


def test_a_server_that_cannot_start_is_shown_with_its_log(short: Path) -> None:
    """Exit 1 with the end of the server's own words, without the database's password, and nothing is left running."""
    url = f"postgresql+asyncpg://prefect:CanaryPassword@127.0.0.1:{free_port()}/prefect"
    place = Place.made(
        short / uuid.uuid4().hex[:8],
        **KEYS,
        PREFECT_SERVER_API_PORT=str(free_port()),
        PREFECT_SERVER_DATABASE_CONNECTION_URL=url,
    )
    code, output = place.run("up")
    assert code == 1
    assert "server: exited with code" in output
    assert place.living() == {}
    kept = [path.read_bytes() for path in place.home.rglob("*") if path.is_file()]
    assert not any(b"CanaryPassword" in one for one in (output.encode(), *kept))


@pytest.mark.parametrize(
    ("settings", "code", "sentence"),
    [
        ({}, 2, "KIS_APP_KEY is not set"),
        ({"KIS_APP_KEY": APP_KEY}, 2, "KIS_APP_SECRET is not set"),
        (KEYS | {"PREFECT_SERVER_API_PORT": "taken"}, 2, r"Port \d+ is taken by another program; set PREFECT_"),
        (KEYS | {"PREFECT_SERVER_API_PORT": "70000"}, 2, "PREFECT_SERVER_API_PORT=70000 is no port"),
        (KEYS | {"PREFECT_SERVER_API_HOST": "192.0.2.7"}, 2, "Cannot listen on PREFECT_SERVER_API_HOST=192.0.2.7"),
        (KEYS | {"PREFECT_SERVER_API_AUTH_STRING": "a:비밀"}, 2, "PREFECT_SERVER_API_AUTH_STRING holds characters"),
        (KEYS | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "x://비밀"}, 2, "PREFECT_SERVER_DATABASE_"),
        (KEYS | {"KIS_TOKEN_DIR": "/proc/tokens"}, 7, "The token directory cannot be used: /proc/tokens"),
        (KEYS | {"KIS_TOKEN_DIR": f"/var/{'d' * 90}"}, 2, "/var/d+/prefect is too long"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) and value else None,
)
@pytest.mark.parametrize("command", ["up", "run"])
def test_a_start_that_cannot_be_is_one_sentence(
    command: str, settings: dict[str, str], code: int, sentence: str, short: Path
) -> None:
    """It names the setting, repeats no secret, has its documented exit code, and nothing runs."""
    if command == "run" and "KIS_APP_SECRET" not in settings:
        pytest.skip("only `up` asks for credentials: a service starts before a person has given them")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken, own = str(other.getsockname()[1]), {"PREFECT_SERVER_API_PORT": str(free_port())} | settings
        own = {name: taken if value == "taken" else value for name, value in own.items()}
        place = Place.made(short / uuid.uuid4().hex[:8], **own)
        ended, output = place.run(command)
    assert (ended, output.count("\n")) == (code, 1), output
    assert re.match(sentence, output)
    assert "비밀" not in output
    assert place.living() == {}


def test_a_full_disk_is_said(short: Path) -> None:
    """Where nothing more can be written, `up` says so instead of a log that could not be."""
    place = Place.made(short / uuid.uuid4().hex[:8], **KEYS, PREFECT_SERVER_API_PORT=str(free_port()))
    done = subprocess.run(
        [sys.executable, "-m", "flows.stack", "up"],
        env=place.environment,
        cwd=place.work,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE)),
    )
    assert done.returncode == 7
    assert done.stderr.startswith("The token directory cannot be used: ")
    assert place.living() == {}


def test_a_process_with_a_recycled_number_is_spared(tmp_path: Path) -> None:
    """`down` stops nobody whose number once belonged to the stack."""
    place = Place.made(tmp_path, KIS_TOKEN_DIR=str(tmp_path / "tokens"))
    folder = tmp_path / "tokens" / "prefect"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        for part in ("supervisor", "worker"):
            (folder / f"{part}.pid").write_text(str(bystander.pid))
        assert place.run("down") == (0, "Nothing was running.\n")
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize("fault", ["mode", "folder", "large"])
def test_a_dotenv_that_others_could_have_written_sets_nothing(fault: str, short: Path) -> None:
    """Its port is not taken over; a regular one's is."""
    place = Place.made(short / uuid.uuid4().hex[:8])
    dotenv = place.work / ".env"
    dotenv.write_text("PREFECT_SERVER_API_PORT=70000\n")
    refused = "PREFECT_SERVER_API_PORT=70000 is no port"
    assert refused in place.run("run")[1]
    if fault == "mode":
        dotenv.chmod(0o666)
    elif fault == "folder":
        place.work.chmod(0o777)
    else:
        dotenv.write_text("PREFECT_SERVER_API_PORT=70000\n" + "#" * 70_000)
    place.environment["PREFECT_SERVER_API_HOST"] = "192.0.2.7"  # whatever the port is, it ends here
    assert refused not in place.run("run")[1]


def test_a_dotenv_that_is_no_file_is_not_waited_for() -> None:
    """A FIFO that nobody writes to sets nothing, at once."""
    os.mkfifo(".env", 0o600)
    assert environment.with_dotenv({"NAME": "value"}) == {"NAME": "value"}
