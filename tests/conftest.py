"""What every test stands on: a home and a folder of its own, no settings from outside, and KIS's gateway."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from running import Ran

from tokencore.cli import main
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("KIS_", "SLACK_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE")
ISSUE_INTERVAL = 0.5  # seconds: KIS's minute, on the gateway and in the settings
LATENCY = 0.3  # seconds that a slow gateway takes to issue
QUICK = 0.1  # seconds: a shorter one, where a test has to sit out several

set_hypothesis_home_dir(ROOT / ".hypothesis")  # its tables, as every test works in a folder of its own
# A busy machine is no failure, and a commit is as green for everybody: `make torture` looks for new examples.
hypothesis.settings.register_profile("house", deadline=None, derandomize="TORTURE" not in os.environ)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stands on a running system takes longest, and begins."""
    items.sort(key=lambda item: not item.path.stem.startswith(("test_stack", "test_flows")))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home and working directory, an environment without settings; child processes find the package."""
    for name in [name for name in os.environ if name.upper().startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(folder)
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A token directory."""
    made = tmp_path / "tokens"
    made.mkdir(0o700)
    return made


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """KIS's gateway with a minute of half a second; the settings of this process and its children point there."""
    with Sandbox(issue_interval=ISSUE_INTERVAL) as running:
        monkeypatch.setenv("KIS_BASE_URL", running.url)
        monkeypatch.setenv("KIS_APP_KEY", APP_KEY)
        monkeypatch.setenv("KIS_APP_SECRET", APP_SECRET)
        monkeypatch.setenv("KIS_ISSUE_INTERVAL", str(ISSUE_INTERVAL))
        yield running


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Prefect server of a module's own; the folder with its database."""
    from prefect import settings  # most tests need no Prefect
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    own = {settings.PREFECT_HOME: home, settings.PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with (
        settings.temporary_settings(own),
        prefect_test_harness(server_startup_timeout=120),
        settings.temporary_settings({settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield home


@pytest.fixture
def quick(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The gateway with a minute of a tenth of a second, and little patience for one that hangs."""
    gateway.set_rules(issue_interval=QUICK)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", str(QUICK))
    monkeypatch.setenv("KIS_TIMEOUT", "0.3")
    return gateway


@pytest.fixture
def nowhere(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The gateway for a user without exchanges, whose renewals no session forbids, whatever the time of the test is."""
    for market in ("US", "KR"):
        monkeypatch.setenv(f"KIS_MARKETS__{market}__EXCHANGES", "[]")
    return gateway


@pytest.fixture
def slow(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The gateway with KIS's own minute, which takes its time to issue; the settings say the same."""
    gateway.set_rules(issue_interval=60, latency=LATENCY)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "60")
    return gateway


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run one command line in this process: its exit code and what it wrote."""

    def run(*arguments: str) -> Ran:
        capfd.readouterr()
        code = main(arguments)
        return Ran(code, *capfd.readouterr())

    return run
