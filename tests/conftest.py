"""Fixtures for all tests: a home and a working directory of their own, no outside settings, and KIS's gateway."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from zoneinfo import ZoneInfo

import hypothesis
import pytest
import time_machine
from filelock import FileLock
from hypothesis.configuration import set_hypothesis_home_dir
from running import Command, Opens, Ran
from servers import HOOK, SlackEndpoint, Wire
from xdist.scheduler import LoadFileScheduling

from tokencore import sessions
from tokencore.config import sources
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from fleets import Fleet
    from postgres import Postgres

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("KIS_", "SLACK_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE")
ISSUE_INTERVAL = 0.5  # seconds that stand for KIS's minute, on the gateway and in the settings
LATENCY = 0.3  # seconds that a slow gateway takes to issue
MAKE_TABLES = "import asyncio, prefect.server.database as db; asyncio.run(db.provide_database_interface().create_db())"

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of a thousand processes compiles every module anew
os.umask(0o022)  # whatever this machine's umask is: a `.env` that its group may write would be ignored
set_hypothesis_home_dir(ROOT / ".hypothesis")  # one place for its tables, as each test has its own working directory
# A busy machine must not fail a test, and everybody gets the same examples; `make torture` looks for new ones.
hypothesis.settings.register_profile("house", deadline=None, derandomize="TORTURE" not in os.environ)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--at 2026-11-24T02:00Z`, which moves the clock of the tests' own process; see `make hours`."""
    parser.addoption("--at", type=datetime.fromisoformat, help="a moment, ISO 8601, at which the tests are run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the tests that need a running system, as they take longest; with `--at`, leave them out."""
    if config.getoption("--at"):
        running = {"prefect_home", "pythons"}
        items[:] = [
            item
            for item in items
            if not item.path.stem.startswith(("test_stack", "test_fleet"))
            and running.isdisjoint(getattr(item, "fixturenames", ()))
        ]
    items.sort(key=lambda item: _place(item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:  # noqa: ANN401 - xdist's
    """Give each process a file at a time; files that share a running system all go to one process."""
    scheduling = LoadFileScheduling(config, log)
    scheduling._split_scope = _place  # noqa: SLF001 - xdist 3.8 cannot rename the tests of pytest 9.2 for --dist=loadgroup
    return scheduling


def _place(nodeid: str) -> str:
    """Return the group of a test, usually its file; groups start in the order of these names."""
    name = Path(nodeid.partition("::")[0]).stem
    if name.startswith("test_stack"):
        return f"0 {name}"
    return "1 flows" if name.startswith(("test_flows", "test_refresh")) else f"9 {name}"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a fresh home and working directory, and an environment without settings, until it ends."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.upper().startswith(FOREIGN)]:
        del os.environ[name]
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    os.environ |= {"HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": str(ROOT)}
    monkeypatch.chdir(folder)
    for kept in (sources._left, sources._warned):  # noqa: SLF001 - by an earlier test
        kept.clear()
    yield home
    os.environ.clear()
    os.environ.update(before)
    time.tzset()


@pytest.fixture(autouse=True)
def moved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test at the moment of `--at`, and skip it if it starts a process, which has the machine's clock."""
    at = request.config.getoption("--at")
    if at is None:
        yield
        return

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.skip("a process of its own has the machine's clock")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    with time_machine.travel(at):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A token directory."""
    made = tmp_path / "tokens"
    made.mkdir(0o700)
    return made


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server shared by all tests of this process that need one."""
    from postgres import Postgres  # most tests need none

    with Postgres() as server:
        yield server


@pytest.fixture
def fleet(postgres: Postgres) -> Fleet:
    """A fleet whose store is empty."""
    from fleets import Fleet  # most tests need none

    return Fleet.made(postgres)


@pytest.fixture
def gateway() -> Iterator[Sandbox]:
    """KIS's gateway with a half-second cool-down; the settings of this process and its children point to it."""
    with Sandbox(issue_interval=ISSUE_INTERVAL) as running:
        os.environ |= {"KIS_BASE_URL": running.url, "KIS_APP_KEY": APP_KEY, "KIS_APP_SECRET": APP_SECRET}
        os.environ["KIS_ISSUE_INTERVAL"] = str(ISSUE_INTERVAL)
        yield running


@pytest.fixture(scope="session")
def prefect_database(request: pytest.FixtureRequest) -> Path:
    """A database with Prefect's tables, to copy: Prefect takes eight seconds to create them, so it does so once."""
    made: Path = request.config.cache.mkdir(f"prefect-{version('prefect')}") / "prefect.db"
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            known = os.environ | {"PREFECT_HOME": str(made.parent)}
            subprocess.run([sys.executable, "-c", MAKE_TABLES], env=known, check=True)
    return made


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Path]:
    """A Prefect server shared by all tests of this process that need one; yields the folder with its database."""
    from prefect import settings  # most tests need no Prefect
    from prefect.server.api.server import SubprocessASGIServer

    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home)
    own = {settings.PREFECT_HOME: home, settings.PREFECT_SERVER_ANALYTICS_ENABLED: False}
    own |= {
        settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        settings.PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,
    }
    with (
        settings.temporary_settings(own),
        SubprocessASGIServer() as server,
        settings.temporary_settings({settings.PREFECT_API_URL: server.api_url}),
    ):
        yield home


@pytest.fixture
def opens(gateway: Sandbox) -> Opens:  # noqa: ARG001 - for its settings
    """Return a function that lets the only traded exchange open `ahead` from now for an hour; it returns its code."""

    def arrange(ahead: timedelta) -> str:
        now = datetime.now(UTC)
        for code in ("KRX", "NASD"):  # at most one of them is near midnight
            zone = ZoneInfo(sessions.exchange(code).zone)
            first, last = (now + ahead).astimezone(zone), (now + ahead + timedelta(hours=1)).astimezone(zone)
            if first.date() == last.date() == (now - timedelta(hours=2)).astimezone(zone).date():  # a late run, too
                break
        os.environ |= {"KIS_MARKETS__US__EXCHANGES": code, "KIS_MARKETS__KR__EXCHANGES": code}
        os.environ[f"KIS_EXCHANGES__{code}__HOURS__{first:%Y-%m-%d}"] = f"{first:%H:%M:%S}-{last:%H:%M:%S}"
        return code

    return arrange


@pytest.fixture
def slack() -> Iterator[SlackEndpoint]:
    """A stand-in for Slack, whose webhook the settings name."""
    with SlackEndpoint() as running:
        os.environ["SLACK_WEBHOOK_URL"] = running.url + HOOK
        yield running


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A server that gives the answers that a test sets."""
    with Wire() as running:
        yield running


@pytest.fixture
def quick(gateway: Sandbox) -> Sandbox:
    """The gateway with a cool-down of a tenth of a second, and a short time-out for when it hangs."""
    gateway.set_rules(issue_interval=0.1)
    os.environ |= {"KIS_ISSUE_INTERVAL": "0.1", "KIS_TIMEOUT": "0.3"}
    return gateway


@pytest.fixture
def nowhere(gateway: Sandbox) -> Sandbox:
    """The gateway for a user who trades no exchange, so that no session forbids a renewal at any time of day."""
    os.environ |= {"KIS_MARKETS__US__EXCHANGES": "[]", "KIS_MARKETS__KR__EXCHANGES": "[]"}
    return gateway


@pytest.fixture
def slow(gateway: Sandbox) -> Sandbox:
    """The gateway with KIS's own minute, in the settings too, and a delay before each issue."""
    gateway.set_rules(issue_interval=60, latency=LATENCY)
    os.environ["KIS_ISSUE_INTERVAL"] = "60"
    return gateway


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs a command line in this process, with more settings, and returns what it left."""
    from tokencore.cli import main

    def run(*arguments: str, **settings: str) -> Ran:
        capfd.readouterr()
        with monkeypatch.context() as own:
            for name, value in settings.items():
                own.setenv(name, value)
            code = main(arguments)
        return Ran(code, *capfd.readouterr())

    return run
