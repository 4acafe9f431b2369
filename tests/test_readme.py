"""README.md and the pages in docs/ are true: code runs, settings load, links lead somewhere, commands are ours."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running import asked

from tokencore import Settings
from tokencore.cli import COMMANDS
from tokencore.commands import parsers

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = [code for language, code in BLOCKS if language == "sh" and "make " not in code]


def run(*command: str) -> None:
    """Run the command to its end; it succeeds."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
@pytest.mark.usefixtures("gateway")
def test_python_blocks_run(code: str) -> None:
    """Every Python block of the README runs to its end in a process of its own."""
    run(sys.executable, "-c", code)


@pytest.mark.parametrize("code", SHELL)
def test_shell_blocks_run(code: str, gateway: Sandbox) -> None:
    """Every shell block of the README runs without an error, and takes one issue at most."""
    run("/bin/sh", "-euc", f'tokencore() {{ "{sys.executable}" -m tokencore "$@"; }}\n{code}')
    assert asked(gateway) <= 1


def test_settings_blocks_are_read(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that the README shows, as .env and as config.toml, load without a complaint."""
    (isolated / ".tokencore").mkdir(mode=0o700)
    (isolated / ".tokencore" / "config.toml").write_text(next(code for kind, code in BLOCKS if kind == "toml"))
    loaded = Settings.load()
    assert loaded.market("hk").exchanges == ("SEHK",)
    assert loaded.overrides["KRX"].extended
    for line in "".join(code for kind, code in BLOCKS if kind == "ini").splitlines():
        monkeypatch.setenv(*line.split("=", 1))
    assert Settings.load().market("kr").app_key != Settings.load().market("us").app_key


def test_the_commands_are_the_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's table names the parser's commands, and docs/commands.md is what `make docs` would write."""
    assert set(re.findall(r"^\| `tokencore (\w+)", README, re.MULTILINE)) == parsers(COMMANDS)[1].keys()
    monkeypatch.syspath_prepend(ROOT / "docs")
    page = importlib.import_module("commands")
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every file and every heading that a page links to is there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        if "://" not in target:
            found = page.parent / name if name else page
            assert found.exists(), target
            titles = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE) if heading else []
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in ["", *slugs], target
