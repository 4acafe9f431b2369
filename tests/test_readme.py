"""README.md is true: its code runs, its files and links exist, its commands and settings are ours."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tokencore.commands import parser
from tokencore.commands.completion import commands
from tokencore.settings import Settings
from tokencore.sources import CONFIG_FILE

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"```(\w+)\n(.*?)```", README, re.DOTALL)]
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "sh" and "make " not in code]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1][:40])
@pytest.mark.usefixtures("gateway")
def test_python_blocks_run(code: str) -> None:
    """Every Python block of the README runs to its end in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("code", SHELL, ids=lambda code: code.strip().splitlines()[0][:40])
def test_shell_blocks_run(code: str, gateway: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shell block of the README runs without an error, with `tokencore` as the command."""
    command = tmp_path / "bin" / "tokencore"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tokencore "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    ran = subprocess.run(["/bin/sh", "-euc", code], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert gateway.stats()["token_requests"] <= 1


def test_settings_blocks_are_read(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that the README shows, as .env and as config.toml, load without a complaint."""
    config = isolated / CONFIG_FILE.removeprefix("~/")
    config.parent.mkdir()
    config.write_text(next(code for language, code in BLOCKS if language == "toml"), encoding="utf-8")
    loaded = Settings.load()
    assert loaded.markets["hk"].exchanges == ["SEHK"]
    assert loaded.exchanges["krx"].extended
    for code in (code for language, code in BLOCKS if language == "ini"):
        for line in code.splitlines():
            monkeypatch.setenv(*line.split("=", 1))
    assert Settings.load().markets["kr"].app_key is not None


def test_commands_table_is_the_parsers() -> None:
    """The README's table names exactly the commands that the parser has."""
    told = set(re.findall(r"^\| `tokencore (\w+)", README, re.MULTILINE))
    assert told == set(commands(parser()))


def test_links_lead_somewhere() -> None:
    """Every file that the README links to is in the tree."""
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_pictures_are_small_and_shown() -> None:
    """All pictures together stay under 300 kB, and none lies there that the README does not lead to."""
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 300_000
    assert [picture.name for picture in pictures if f"docs/images/{picture.name}" not in README] == []


def test_first_screen_has_the_two_commands() -> None:
    """What it is and the two commands stand within the first ten lines."""
    top = "\n".join(README.splitlines()[:10])
    assert "make demo" in top
    assert "make test" in top


def test_page_of_commands_is_the_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/commands.md is what `make docs` would write now."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    page = importlib.import_module("commands")
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run `make docs`"
