"""What is installed: the wheel's files, the pins, the bounds with their reasons, and the example settings."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tokencore import Settings

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
PINNED = {str(canonicalize_name(name)): version for name, _, version in (pin.partition("==") for pin in PINS)}
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
UNBOUNDED = {"tzdata"}  # the world's time zones: the newest version is the right one


def test_the_wheel_has_the_library_and_nothing_else(tmp_path: Path) -> None:
    """The wheel has each module of tokencore, whatever an earlier version left in build/, and not the flows."""
    (tmp_path / "build" / "lib" / "flows").mkdir(parents=True)
    (tmp_path / "build" / "lib" / "flows" / "earlier.py").touch()
    for name in ("tokencore", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, check=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("tokencore-*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tokencore").rglob("*.py")}
    assert inside == modules | {"tokencore/py.typed"}


def test_every_dependency_has_a_bound_a_reason_and_a_pin() -> None:
    """Every dependency has a bound and a reason; all it needs is pinned too, so the pins are the list to audit."""
    for requirement in REQUIREMENTS:
        wanted = Requirement(requirement)
        assert wanted.name in UNBOUNDED or any(clause.operator in ("<", "==") for clause in wanted.specifier)
        assert re.search(rf'^    "{re.escape(requirement)}",\s+# \w', PYPROJECT, re.MULTILINE), requirement
    assert [pin for pin in PINS if not re.fullmatch(r"[\w.-]+==[0-9][\w.]*", pin, re.ASCII)] == []
    found, seen, waiting = dict[str, str](), set[str](), [(Requirement(line), [""]) for line in REQUIREMENTS]
    for one, extras in waiting:
        if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            found[canonicalize_name(one.name)] = metadata.version(one.name)
            if str(one) not in seen:
                waiting += [(Requirement(line), ["", *one.extras]) for line in metadata.requires(one.name) or []]
                seen.add(str(one))
    assert found == {name: PINNED.get(name) for name in found}
    assert len(found) > len(PINS) / 2


def test_the_example_has_every_setting() -> None:
    """.env.example has each setting of KIS and Slack, and loads with all of them switched on: none is misspelt."""
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    lines = re.findall(r"^#?((?:KIS|SLACK|PREFECT_UI)_\w[\w-]*)=(.*)$", example, re.MULTILINE)
    Path(".env").write_text("\n".join(f"{name}={value or 'https://example.com'}" for name, value in lines), "utf-8")
    loaded = Settings.load()
    assert loaded.model_fields_set == Settings.model_fields.keys()
    assert loaded.misspelt() == {}
