"""The demo from start to end, starts that fail with one sentence and leave nothing, and the outside watchdog."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from running import folder, until
from servers import SlackEndpoint, Wire
from stacks import KEYS, SLOW, Place, free_port, in_proc
from test_settings import dotenv

from flows import alerts
from flows.stack import demo as play
from flows.stack import supervisor, watchdog
from flows.stack.api import Api
from tokencore import ConfigurationError, sessions

pytestmark = in_proc
MakePlace = Callable[..., Place]
TITLE = "Prefect: Prefect does not look after the tokens"


@pytest.fixture
def make_place() -> Iterator[MakePlace]:
    """Make places with given settings and paths short enough for a socket; no process or file may remain at the end."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        made: list[Place] = []

        def make(**settings: str) -> Place:
            made.append(Place.made(Path(folder) / str(len(made)), **KEYS | settings))
            return made[-1]

        yield make
        assert [(place.living(), [*place.temporary.iterdir()]) for place in made] == [({}, [])] * len(made)


def test_the_demo_comes_to_a_token_whatever_the_settings_and_leaves_nothing(make_place: MakePlace) -> None:
    """Although every setting is a trap, the demo renews once, says how to sign in, and leaves nothing after Ctrl-C."""
    traps = {"KIS_APP_KEY": "CanaryKey", "KIS_ENVIRONMENT": "nonsense", "SLACK_WEBHOOK_URL": "http://127.0.0.1:9/"}
    place = make_place(**traps, PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_PROFILE="missing")
    place.dotenv(KIS_TIMEOUT="nonsense", PREFECT_API_KEY="CanaryKey", PREFECT_SERVER_API_PORT="9")
    (place.home / ".tokencore").mkdir()
    (place.home / ".tokencore" / "config.toml").write_text("this is no TOML")
    running, output = place.start("demo"), ""
    assert running.stdout
    while not output.endswith("leaves nothing behind.\n"):
        output += running.stdout.readline() or pytest.fail(output)
    running.send_signal(signal.SIGINT)
    assert (running.communicate(timeout=SLOW)[0].strip(), running.returncode) == ("Stopped.", 0)
    assert re.search(r"^warm-up +Completed: (Warm|Renewed|MarketClosed)\.", output, re.MULTILINE)
    assert len(re.findall(r"^\S+ +(?:Completed: )?Renewed", output, re.MULTILINE)) == 1
    assert output.index("check-tokens ") < output.index("warm-up ")
    assert re.findall(r"^(us|kr) +VALID ", output, re.MULTILINE) == ["us", "kr"]
    assert re.search(r"^The page: http://127\.0\.0\.1:\d+/v2\n  Sign in with: admin:\S{20,}$", output, re.MULTILINE)
    assert "Canary" not in output
    left = [path.name for folder in (place.home, place.work) for path in folder.rglob("*")]
    assert sorted(left) == [".env", ".tokencore", "config.toml"]


def test_the_demo_warms_an_exchange_that_is_not_over() -> None:
    """At each hour of two years, the chosen exchange's session that day runs or is still ahead, if there is one."""
    for hour in range(2 * 365 * 24):
        now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour, minutes=hour % 60)
        code = play.exchange(now)
        session = sessions.session(code, now.astimezone(ZoneInfo(sessions.exchange(code).zone)).date())
        assert session is None or session.close > now


EARLY = {
    "Ctrl-C": ("up", signal.SIGINT, "health"),
    "down": ("supervisord", signal.SIGTERM, "health"),
    "kill": ("supervisord", signal.SIGKILL, "health"),
    "kill before the parts look around": ("supervisord", signal.SIGKILL, None),
}


@pytest.mark.parametrize(("victim", "number", "answered"), EARLY.values(), ids=list(EARLY))
def test_a_start_that_ends_early_leaves_nothing(
    victim: str, number: signal.Signals, answered: str | None, make_place: MakePlace, prefect_database: Path
) -> None:
    """Ctrl-C ends all processes before the command ends with 130; with supervisord they end too, and `up` with 1."""
    place = make_place()
    place.with_tables(prefect_database)
    running = place.start("up")
    server = Api(f"http://127.0.0.1:{place.environment['PREFECT_SERVER_API_PORT']}", None)
    until(lambda: any(line.endswith(" worker ") for line in place.living().values()), SLOW)  # the last one to start
    until(lambda: answered is None or server.answers(answered), SLOW)
    # The first one: a part that supervisord has just forked has its command line until it becomes another program.
    process = min(one for one, line in place.living().items() if re.search(rf"{victim}( -c .*)? $", line))
    os.kill(process, number)
    output = running.communicate(timeout=SLOW)[0]
    if victim == "up":
        assert (running.returncode, output.splitlines()[-1]) == (130, "Interrupted.")
    else:
        assert (running.returncode, output.splitlines()[-1][:40]) == (1, "It was stopped before it was ready; its ")
        until(lambda: not place.living(), SLOW)


def test_no_question_to_supervisord_is_closed_by_a_destructor(tmp_path: Path) -> None:
    """Each connection is closed before that, because a Ctrl-C during a destructor is lost and the start would go on."""
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always", ResourceWarning)
        assert supervisor.running(tmp_path) == {}
    assert left == []


def test_a_server_that_cannot_start_is_shown_with_its_log(make_place: MakePlace) -> None:
    """`up` ends with 1 and the end of the server's log, without the database's password, and nothing keeps running."""
    url = f"postgresql+asyncpg://prefect:CanaryPassword@127.0.0.1:{free_port()}/prefect"
    place = make_place(PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
    code, output = place.run("up")
    assert code == 1
    assert re.search(r"^server: exited( with code \d)?\. The end of its log:", output, re.MULTILINE), output
    kept = [path.read_bytes() for path in place.home.rglob("*") if path.is_file()]
    assert not any(b"CanaryPassword" in one for one in (output.encode(), *kept))


def test_a_start_waits_until_a_killed_stack_has_left_the_port(make_place: MakePlace) -> None:
    """The parts of a supervisord that was killed hold the port for up to half a minute, which is no other program."""
    place = make_place()
    home = place.home / ".tokencore" / "prefect"
    home.mkdir(parents=True)
    (home / "supervisord.pid").touch(0o600)  # it removes this file where it ends by itself
    with socket.create_server(("127.0.0.1", int(place.environment["PREFECT_SERVER_API_PORT"]))):
        running = place.start("run")
        time.sleep(3)
    until(lambda: running.poll() is not None or bool(supervisor.running(home)), SLOW)
    running.terminate()
    output = running.communicate(timeout=SLOW)[0]
    assert running.returncode == 0, output


REFUSED = {
    "no app key": ({"KIS_APP_KEY": ""}, 2, "No market has an app key; set KIS_APP_KEY"),
    "no app secret": ({"KIS_APP_SECRET": ""}, 2, "KIS_APP_SECRET is not set"),
    "a port that is taken": (
        {"PREFECT_SERVER_API_PORT": "TAKEN"},
        2,
        r"Cannot listen on 127.0.0.1, port \d+: \D+\. Set",
    ),
    "a port that is none": ({"PREFECT_SERVER_API_PORT": "70000"}, 2, "PREFECT_SERVER_API_PORT=70000 is not a port"),
    "another's address": ({"PREFECT_SERVER_API_HOST": "192.0.2.7"}, 2, "Cannot listen on 192.0.2.7, port "),
    "a password that is not ASCII": ({"PREFECT_SERVER_API_AUTH_STRING": "a:비밀"}, 2, "PREFECT_SERVER_API_AUTH_STRI"),
    "no database's address": ({"PREFECT_SERVER_DATABASE_CONNECTION_URL": "x://비밀"}, 2, "PREFECT_SERVER_DATABASE_"),
    "no token directory": ({"KIS_TOKEN_DIR": "/proc/tokens"}, 7, "The token directory cannot be used: /proc/tokens"),
    "a long path": ({"KIS_TOKEN_DIR": f"/var/{'d' * 90}"}, 2, "/var/d{90}/prefect is too long"),
    "a .env that sends a secret elsewhere": ({".env": "KIS_BASE_URL=http://127.0.0.1:9"}, 2, "KIS_BASE_URL in "),
}


@pytest.mark.parametrize(("settings", "code", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_a_start_that_cannot_be_is_one_sentence(
    settings: dict[str, str], code: int, sentence: str, make_place: MakePlace
) -> None:
    """The sentence names the setting and no secret, the exit code is the documented one, and nothing keeps running."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        given = {name: value.replace("TAKEN", str(other.getsockname()[1])) for name, value in settings.items()}
        text = given.pop(".env", "")
        place = make_place(**given)
        (place.work / ".env").write_text(text)
        for command in ("up",) if "APP_" in sentence else ("up", "run"):  # the service starts without keys
            ended, output = place.run(command)
            said = output.partition("(half a minute) ...\n")[2] or output
            assert (ended, said.count("\n")) == (code, 1), output
            assert re.match(sentence, said)
            assert "비밀" not in output


@pytest.mark.parametrize("output", [">/dev/full", ">&-"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_an_output_that_takes_nothing_is_one_line_and_1(output: str, buffered: str, make_place: MakePlace) -> None:
    """A full or closed standard output is not blamed on the token directory, nor is it 120 or a success."""
    place = make_place(PYTHONUNBUFFERED=buffered)
    for command in ("down", "status"):
        line = ["sh", "-c", f'exec "$0" -m flows.stack {command} {output}', sys.executable]
        done = subprocess.run(line, env=place.environment, cwd=place.work, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done.stderr
        assert done.stderr.startswith(b"Standard output cannot be written (")


def test_a_stack_that_version_0_1_started_is_found_and_stopped(make_place: MakePlace) -> None:
    """After an upgrade without `make down`, `up` says what to do and `down` does it; other processes are left alone."""
    place = make_place()
    home = place.home / ".tokencore" / "prefect"
    home.mkdir(mode=0o700, parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as old:
        started = Path(f"/proc/{old.pid}/stat").read_text().split()[21]
        for born in ("1", started):
            (home / "crew.json").write_text(json.dumps({"processes": {"supervisor": [old.pid, born]}}))
            if born == started:
                assert place.run("up") == (1, f"{supervisor.OUTDATED}\n")
            ended = place.run("down")
            assert ended == (0, "Stopped.\n" if born == started else "Nothing was running.\n")
        assert old.wait(SLOW) == -signal.SIGTERM


def test_make_down_needs_no_installation(tmp_path: Path) -> None:
    """After a `git pull` without a network, what runs is stopped with what is installed, and its exit code counts."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(Path(__file__).parents[1] / name, tmp_path)
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\n[ "$*" = "-m flows.stack down" ] && echo "Stopped."\n')
    program.chmod(0o700)
    command = ["make", "--silent", "PYTHON=false", "down"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Stopped."), done.stderr


def test_once_is_for_the_demo_only(make_place: MakePlace) -> None:
    """`up --once` is a mistake in usage, and starts neither the stack nor the demo."""
    code, output = make_place().run("up", "--once")
    assert (code, "--once is for the demo only" in output) == (2, True)


def test_a_start_on_a_full_disk_is_one_sentence(make_place: MakePlace) -> None:
    """`up` ends with 7 and a sentence even if the reason cannot be written to disk, not with an empty line and 120."""
    place = make_place()
    command = ["sh", "-c", 'ulimit -f 0; exec "$0" -m flows.stack up', sys.executable]
    done = subprocess.run(
        command, env=place.environment, cwd=place.work, capture_output=True, text=True, timeout=SLOW, check=False
    )
    assert (done.returncode, done.stderr.count("\n"), "Free space" in done.stderr) == (7, 1, True), done.stderr


def test_what_another_user_can_have_planted_starts_and_stops_nothing(make_place: MakePlace) -> None:
    """Whoever planted the password could know it or choose what runs, so commands end with 7 and how to fix it."""
    place = make_place()
    folder = place.home / ".tokencore" / "prefect"
    folder.mkdir(parents=True)
    (folder / "password").touch()
    (folder / "password").chmod(0o666)
    for command in ("up", "run", "status", "down"):
        code, output = place.run(command)
        assert (code, output.count("\n"), " run `ch" in output) == (7, 1, True), output
    assert (folder / "password").read_text() == ""


@pytest.fixture
def prefect(wire: Wire) -> Wire:
    """A server in place of Prefect's, to which the settings lead; a test chooses whether and what it answers."""
    dotenv(**KEYS, PREFECT_SERVER_API_PORT=wire.url.rpartition(":")[2])
    return wire


def checked(ago: timedelta) -> tuple[int, list[dict[str, str]]]:
    """The server's answer about the newest check, if that ended this long ago."""
    return 200, [{"state_name": "AlreadyValid", "end_time": (datetime.now(UTC) - ago).isoformat()}]


NOT_WELL = {
    "unhealthy": (500, True),
    "another password": (401, True),
    "no check for long": checked(watchdog.SILENCE + timedelta(minutes=1)),
}


@pytest.mark.parametrize("answer", [None, *NOT_WELL.values()], ids=["no answer", *NOT_WELL])
def test_a_server_that_looks_after_nothing_is_told_once_and_its_return_too(
    answer: tuple[int, object] | None, prefect: Wire, slack: SlackEndpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each look ends with 1 and a line for cron; Slack gets one message, and later one that it is over."""
    if answer:
        prefect.answer(*answer)
    for _ in range(2):
        assert (watchdog.watch(patience=0), capfd.readouterr().err.count("\n")) == (1, 1)
        assert slack.headlines == [TITLE]
    prefect.answer(*checked(timedelta(minutes=5)))
    assert [watchdog.watch(patience=0) for _ in range(2)] == [0, 0]
    assert slack.headlines == [TITLE, TITLE.replace(": ", ": solved: ", 1)]


def test_a_start_goes_on_although_its_check_keeps_trying(prefect: Wire) -> None:
    """While KIS is down as a session nears, the first check goes on for most of an hour, and the stack stays up."""
    prefect.answer(200, {"id": "f00d", "state": {"type": "RUNNING"}})
    assert "did not end within" in supervisor.first_check(Api(prefect.url, None), patience=0.6)
    prefect.answer(200, {"id": "f00d", "state": {"type": "FAILED", "name": "Failed", "message": "KIS is down."}})
    assert supervisor.first_check(Api(prefect.url, None)) == "Failed: KIS is down."


def test_who_listens_in_place_of_our_dead_server_is_sent_nothing(prefect: Wire, slack: SlackEndpoint) -> None:
    """Where a stack was started, only the server that supervisord runs is asked, as the question has its password."""
    prefect.answer(*checked(timedelta(minutes=5)))
    home = folder() / "prefect"
    home.mkdir(mode=0o700, parents=True)
    for name in ("supervisord.conf", "password"):
        (home / name).touch(0o600)
    assert (watchdog.watch(patience=0), slack.headlines, prefect.requests) == (1, [TITLE], [])


def test_a_dead_server_is_told_although_what_was_reported_cannot_be_read(prefect: Wire, slack: SlackEndpoint) -> None:
    """A file of incidents that is refused, because others may write it, does not hold up the alert."""
    prefect.answer(500, None)
    incidents = folder() / "incidents.json"
    incidents.parent.mkdir(mode=0o700, exist_ok=True)
    incidents.touch()
    incidents.chmod(0o666)
    assert (watchdog.watch(patience=0), slack.headlines) == (1, [TITLE])


def test_a_restart_is_no_death(prefect: Wire, slack: SlackEndpoint) -> None:
    """A server that is well again within the watchdog's patience is not reported."""
    threading.Timer(0.2, prefect.answer, checked(timedelta(minutes=5))).start()
    assert watchdog.watch(patience=60) == 0
    assert (len(prefect.requests) > 1, slack.asked) == (True, [])


def test_settings_that_cannot_be_used_are_told_by_the_watchdog_too(prefect: Wire, slack: SlackEndpoint) -> None:
    """As after a restart of the machine nothing else may run; a check that meets the same adds no message."""
    dotenv(**KEYS, KIS_TIMEOUT="soon", PREFECT_SERVER_API_PORT=prefect.url.rpartition(":")[2])
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="KIS_TIMEOUT"):
            watchdog.watch(patience=0)
    assert alerts.guarded(alerts.ALL_KEYS, lambda *_: pytest.fail("The settings were used.")).name == "Failed"
    assert slack.headlines == ["check_tokens: A setting is missing or wrong"]


def test_a_broken_profile_of_the_users_own_prefect_holds_up_no_alert(
    make_place: MakePlace, slack: SlackEndpoint
) -> None:
    """Alerts outside of the stack read nothing in the user's ~/.prefect, nor do they make it."""
    place = make_place(SLACK_WEBHOOK_URL=f"{slack.url}/services/T", PREFECT_PROFILE="missing")
    assert place.run("test-alert") == (0, "Slack accepted the test message, by the webhook: look at its channel.\n")
    assert not (place.home / ".prefect").exists()
    (place.home / ".prefect").mkdir()
    (place.home / ".prefect" / "profiles.toml").write_text("active = ")
    look = [sys.executable, "-c", "from flows.stack import watchdog; raise SystemExit(watchdog.watch(patience=0))"]
    assert subprocess.run(look, env=place.environment, cwd=place.work, timeout=SLOW, check=False).returncode == 1
    assert slack.headlines[1:] == [TITLE]


def test_damaged_incidents_stop_no_watchdog(prefect: Wire, slack: SlackEndpoint) -> None:
    """While all is well, a document of incidents that holds something else is nothing to report."""
    prefect.answer(*checked(timedelta(minutes=5)))
    folder().mkdir(mode=0o700, exist_ok=True)
    (folder() / "incidents.json").write_text('{"incidents": 3}')
    assert (watchdog.watch(patience=0), slack.asked) == (0, [])
