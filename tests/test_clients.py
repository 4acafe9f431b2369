"""The other clients themselves, with the code of docs/bots.md: warm token in, no issue request out.

mojito2 and python-kis are the real packages, from exact pins, each in a virtual environment beside the one that runs
the tests; it is built once, as that takes longer than all the tests. The official sample is read by
`clients/kis_auth.py`. `make test` starts a few processes of each, `make clients` as many as a big bot has.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from running import asked, on_disk, tokencore

from tokencore import TokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

PINS = Path(__file__).with_name("clients")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "bots.md"
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"```([\w -]+)\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)]
THOROUGH = "TOKENCORE_CLIENTS" in os.environ  # `make clients`
PROCESSES = 32 if THOROUGH else 3
QUOTES = {"mojito2": (1, 1), "python-kis": (6, 1), "kis-auth": (1, 1)}  # calls that the code makes at its start, later
# The libraries know KIS's hosts only, so each is pointed to the gateway where it keeps them; the sample has a setting.
POINTED = {
    "mojito2": "import mojito\n"
    "mojito.KoreaInvestment.set_base_url = lambda self, mock: setattr(self, 'base_url', os.environ['KIS_BASE_URL'])\n",
    "python-kis": "import pykis.kis\npykis.kis.REAL_DOMAIN = os.environ['KIS_BASE_URL']\n",
    "kis-auth": "",
}


def blocks(language: str) -> list[str]:
    """The code of the document's blocks of a language."""
    return [code for name, code in BLOCKS if name.split()[-1] == language]


def interpreter_with(client: str) -> Path | None:
    """The Python of an environment with `client`, built if need be; None where its packages cannot be had."""
    pins = PINS / f"{client}.txt"
    if not pins.exists():
        return Path(sys.executable)
    home = Path(sys.prefix, "clients", f"{client}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}")
    python, complete = home / "bin" / "python", home / "complete"
    home.parent.mkdir(exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if not complete.exists():
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, symlinks=True)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "-r"]
            if subprocess.run([*pip, str(pins)], check=False, capture_output=not THOROUGH).returncode:
                return None
            complete.touch()
    return python


@pytest.fixture(scope="session")
def pythons() -> dict[str, Path | None]:
    """The interpreters of all clients, built side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(QUOTES, pool.map(interpreter_with, QUOTES), strict=True))


class Bots:
    """Processes that run the document's code for a client: the first block, and after each `swap` the second."""

    def __init__(self, client: str, python: Path, count: int) -> None:
        """Start so many, all at once."""
        first, later = (f"{code}\nprint('quoted', flush=True)\n" for code in blocks(client))
        program = f"import os, sys\n{POINTED[client]}{first}\nfor _ in sys.stdin:\n    exec({later!r})\n"
        # Whatever would go out to KIS's own hosts meets a closed door.
        env = {**os.environ, "PYTHONPATH": str(PINS), "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
        command, pipe = [str(python), "-c", program], subprocess.PIPE
        self._started = [
            subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True, bufsize=1) for _ in range(count)
        ]

    def quoted(self) -> int:
        """How many of them have got their quotes."""
        return sum(one.stdout is not None and one.stdout.readline() == "quoted\n" for one in self._started)

    def swap(self) -> None:
        """Let them take over the new token."""
        for one in self._started:
            print("swap", file=one.stdin)

    def end(self) -> None:
        """Let them end by themselves."""
        for one in self._started:
            one.communicate(timeout=60)


@pytest.fixture
def python(client: str, gateway: Sandbox, pythons: dict[str, Path | None]) -> Path:
    """The client's Python; the folders of all clients at their defaults, and the settings that export there."""
    if not (found := pythons[client]):
        assert not THOROUGH
        pytest.skip(f"{client} cannot be installed here; `make clients` says why")
    os.environ |= {"KIS_HTS_ID": "me", "KIS_MARKETS__US__EXPORTS": f"mojito2:{Path.cwd()},python-kis,kis-auth"}
    config = Path.home() / "KIS" / "config"
    for made in (config, Path.home() / ".pykis" / "cache"):
        made.mkdir(parents=True)
    (config / "kis_devlp.yaml").write_text(f"prod: {gateway.url}\nmy_app: {APP_KEY}\nmy_sec: {APP_SECRET}\n")
    return found


@pytest.mark.parametrize("client", QUOTES)
def test_client_uses_the_token_and_issues_none(client: str, nowhere: Sandbox, python: Path) -> None:
    """Every process takes the warm token for its quotes, and the next one after a renewal, without an issue request."""
    nowhere.set_rules(same_token=0, issue_interval=0)
    os.environ["KIS_ISSUE_INTERVAL"] = "0"
    first = TokenManager("us").get_valid_token()
    bots = Bots(client, python, PROCESSES)
    assert bots.quoted() == PROCESSES
    assert (asked(nowhere), nowhere.stats()["quotes"]) == (1, PROCESSES * QUOTES[client][0])
    nowhere.kill_tokens()
    assert TokenManager("us").refresh(force=True)
    assert on_disk().access_token != first
    bots.swap()
    assert bots.quoted() == PROCESSES
    bots.end()
    stats = nowhere.stats()
    assert (asked(nowhere), stats["quotes"], stats["quotes_refused"]) == (2, PROCESSES * sum(QUOTES[client]), {})


@pytest.mark.parametrize("client", QUOTES)
def test_without_the_file_a_client_issues_and_its_token_is_taken_over(
    client: str, gateway: Sandbox, python: Path
) -> None:
    """The counter-proof: without a copy the same code sends one request; its token is then the key's, for no other."""
    bots = Bots(client, python, 1)
    assert bots.quoted() == 1
    bots.end()
    assert asked(gateway) == 1
    token = TokenManager("us").get_valid_token()
    assert TokenManager("kr").get_valid_token() == token == on_disk().access_token
    assert asked(gateway) == 1


PROGRAMS = [
    *([sys.executable, "-c", code] for code in blocks("requests")),
    *(["/bin/sh", "-euc", code] for code in blocks("sh")),
    *(["node", "-e", code] for code in blocks("js")),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: Path(one[0]).name)
def test_code_that_needs_no_client_runs(program: list[str], gateway: Sandbox, tmp_path: Path) -> None:
    """The document's code for plain requests gets its quote, and its commands run; Node's where there is Node."""
    if not shutil.which(program[0]):
        pytest.skip(f"there is no {program[0]} here")
    command = tmp_path / "bin" / "tokencore"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tokencore "$@"\n')
    command.chmod(0o755)
    os.environ |= {"PATH": f"{command.parent}:{os.environ['PATH']}", "KIS_HTS_ID": "me"}
    ran = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_settings_are_read() -> None:
    """The setting that the document shows is one that tokencore takes."""
    (text,) = blocks("ini")
    assert tokencore("plan", **dict(line.split("=", 1) for line in text.splitlines())).code == 0
