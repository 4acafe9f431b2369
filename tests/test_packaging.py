"""What is installed: the wheel, the pins, the reasons beside the bounds, the example settings, the way of imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tokencore import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tokencore", "flows")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads(PYPROJECT)["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
UNBOUNDED = {"tzdata"}  # the zones of the world: the newest is the right one


def copied(to: Path) -> Path:
    """What builds and checks read of the tree, in a folder where they may write."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def ran(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command, run to its end."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def imports_checked(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contract on imports in pyproject.toml, checked on a tree."""
    return ran([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], folder)


def test_the_wheel_has_every_module_and_the_marker_of_types(tmp_path: Path) -> None:
    """Each module of both packages is in the wheel, so is `py.typed`, and nothing else of the tree."""
    built = ran([sys.executable, "-c", BUILD], copied(tmp_path))
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next((tmp_path / "dist").glob("tokencore-*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert inside == {*modules, "tokencore/py.typed", "flows/stack/automations.yaml"}


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """`python -m tokencore --help` works in any folder and names the commands."""
    helped = ran([sys.executable, "-m", "tokencore", "--help"], tmp_path)
    assert helped.returncode == 0
    assert "check" in helped.stdout


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_dependency_has_a_bound_and_a_reason(requirement: str) -> None:
    """Nothing is taken in whatever version comes, and nothing without a word why."""
    asked = Requirement(requirement)
    assert asked.name in UNBOUNDED or any(clause.operator in ("<", "==") for clause in asked.specifier)
    assert re.search(rf'^    "{re.escape(requirement)}",\s+# \w', PYPROJECT, re.MULTILINE)


def test_every_pin_is_a_name_and_a_version() -> None:
    """The pins hold no address, marker or range: the index is the machine's affair."""
    assert [pin for pin in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)] == []


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_the_pins_are_what_pyproject_asks_for(requirement: str) -> None:
    """Every dependency is pinned, to a version within its bounds: bounds are not moved without `make pins`."""
    asked = Requirement(requirement)
    pinned = dict(pin.split("==") for pin in PINS)
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    assert asked.specifier.contains(versions[canonicalize_name(asked.name)])


def needed(name: str, extras: Iterable[str]) -> set[str]:
    """The names of all packages that this one needs here, directly or not."""
    found, waiting = set[str](), [(name, frozenset(extras))]
    seen = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for line in metadata.requires(one[0]) or []:
            asked = Requirement(line)
            if any(not asked.marker or asked.marker.evaluate({"extra": extra}) for extra in {"", *one[1]}):
                found.add(canonicalize_name(asked.name))
                waiting.append((asked.name, frozenset(asked.extras)))
    return found


def test_everything_that_is_needed_is_installed_as_pinned() -> None:
    """What a dependency brings is pinned like the dependency, so that the pins are the list to audit."""
    pinned = {str(canonicalize_name(name)): version for name, version in (pin.split("==") for pin in PINS)}
    brought = {name for requirement in REQUIREMENTS for name in needed_by(Requirement(requirement))}
    assert {name: metadata.version(name) for name in brought} == {name: pinned.get(name) for name in brought}
    assert len(brought) > len(PINS) / 2


def needed_by(requirement: Requirement) -> set[str]:
    """The package and all that it needs, where it is for this system."""
    if requirement.marker and not requirement.marker.evaluate():
        return set()
    return {canonicalize_name(requirement.name)} | needed(requirement.name, requirement.extras)


@pytest.mark.parametrize("python", ["3.11.2", "3.12.0", "3.13.0"])
def test_every_python_finds_its_pins(python: str) -> None:
    """What only another Python needs is pinned as well, as far as the packages here tell: Debian 12 has 3.11.2."""
    names = {canonicalize_name(pin.partition("==")[0]) for pin in PINS}
    here = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    lines = [
        line for one in metadata.distributions() if canonicalize_name(one.name) in names for line in one.requires or []
    ]
    asked = {
        one.name for one in map(Requirement, lines) if not one.marker or one.marker.evaluate({"extra": "", **here})
    }
    assert {canonicalize_name(name) for name in asked} - names == set()


def test_no_registry_is_named() -> None:
    """No file of the tree says where packages come from."""
    hosts = re.compile(r"py[p]i|python[h]osted|index[-]url|find[-]links")
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".env"]
    below = [path for name in (*PACKAGES, "tests", "docs", "benchmarks", ".ci") for path in (ROOT / name).rglob("*.*")]
    read = [path for path in [*top, *below, ROOT / ".ci" / "run"] if path.is_file() and path.suffix != ".pyc"]
    assert [path for path in read if hosts.search(path.read_text(encoding="utf-8", errors="replace"))] == []


def test_the_example_has_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting is in .env.example, and with everything switched on it loads: no name there is misspelt."""
    lines = re.findall(r"^#?((?:KIS|SLACK)_\w[\w-]*)=(.*)$", EXAMPLE, re.MULTILINE)
    text = "\n".join(f"{name}={value or 'https://example.com'}" for name, value in lines)
    (tmp_path / ".env").write_text(text.replace("/run/secrets", str(tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    loaded = Settings.load()
    assert loaded.model_fields_set == set(Settings.model_fields)
    assert all(market.exchanges for market in loaded.markets.values())
    assert loaded.exchanges["krx"].hours


def test_imports_go_one_way() -> None:
    """Nothing of tokencore imports Prefect, Slack or flows, its rooms have an order, and flows use the front door."""
    checked = imports_checked(ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("room", "line"),
    [
        pytest.param("tokencore/tokens.py", "import prefect", id="tokencore may not import Prefect"),
        pytest.param("tokencore/view.py", "import slack_sdk.webhook", id="tokencore may not import Slack"),
        pytest.param("tokencore/errors.py", "from tokencore import store", id="a low room may not import a higher one"),
        pytest.param("tokencore/keeper.py", "from tokencore import status", id="nor one of its own height"),
        pytest.param("tokencore/corner.py", "", id="a new room needs a place in the order"),
        pytest.param("flows/runs.py", "from tokencore.store import KeyLock", id="flows may not open a room"),
    ],
)
def test_a_wrong_import_is_found(room: str, line: str, tmp_path: Path) -> None:
    """The contract on imports fails as soon as one goes the wrong way."""
    with (copied(tmp_path) / room).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    checked = imports_checked(tmp_path)
    assert checked.returncode == 1
    assert "1 broken" in checked.stdout


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    """An interpreter that is too old, or none, gives a sentence instead of an installation that fails half-way."""
    made = ran(["make", "demo", "PYTHON=false"], copied(tmp_path))
    assert made.returncode == 2
    assert "Python 3.11 or newer is needed" in made.stderr
    assert not (tmp_path / ".venv").exists()
