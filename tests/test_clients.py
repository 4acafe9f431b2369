"""The other clients themselves, with the code of docs/other-clients.md: warm token in, no issue request out.

mojito2 and python-kis are the real packages, each in its own environment; the official sample is read by
`clients/kis_auth.py`. `make test` starts a few processes of each, `make clients` as many as a big bot has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from environments import PINS, interpreter_with
from running import asked, on_disk, tokencore

from tokencore import TokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

DOCS = Path(__file__).resolve().parent.parent / "docs" / "other-clients.md"
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


@pytest.fixture(scope="session")
def pythons() -> dict[str, Path]:
    """The interpreters of the clients' environments, built side by side; what cannot be had is missing."""

    def build(client: str) -> Path | None:
        try:
            return interpreter_with(client)
        except subprocess.CalledProcessError as error:
            if THOROUGH:
                raise AssertionError(error.stderr) from None
            return None

    clients = [pins.stem for pins in PINS.glob("*.txt")]
    with ThreadPoolExecutor() as pool:
        built = dict(zip(clients, pool.map(build, clients), strict=True))
    return {"kis-auth": Path(sys.executable)} | {client: python for client, python in built.items() if python}


class Bots:
    """Processes that run the document's code for a client: the first block, and after each `swap` the second."""

    def __init__(self, client: str, python: Path, count: int) -> None:
        """Start so many, all at once."""
        first, later = (f"{code}\nprint('quoted', flush=True)\n" for code in blocks(client))
        program = f"import os, sys\n{POINTED[client]}{first}\nfor _ in sys.stdin:\n    exec({later!r})\n"
        # Whatever would go out to KIS's own hosts meets a closed door.
        env = {**os.environ, "PYTHONPATH": str(PINS), "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
        self._started = [
            subprocess.Popen(
                [str(python), "-c", program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]

    def quoted(self) -> int:
        """How many of them have got their quotes."""
        return sum(one.stdout is not None and one.stdout.readline() == "quoted\n" for one in self._started)

    def swap(self) -> None:
        """Let them take over the new token."""
        for one in self._started:
            assert one.stdin is not None
            one.stdin.write("swap\n")
            one.stdin.flush()

    def end(self) -> None:
        """Let them end by themselves."""
        for one in self._started:
            one.communicate(timeout=60)


def prepared(client: str, gateway: Sandbox, pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of the three clients at their defaults, and the settings that export there; the client's Python."""
    if client not in pythons:
        pytest.skip(f"{client} cannot be installed here; `make clients` says why")
    monkeypatch.setenv("KIS_HTS_ID", "me")
    monkeypatch.setenv("KIS_MARKETS__US__EXPORTS", f"mojito2:{Path.cwd()},python-kis,kis-auth")
    config = Path.home() / "KIS" / "config"
    for made in (config, Path.home() / ".pykis" / "cache"):
        made.mkdir(parents=True)
    told = f"prod: {gateway.url}\nmy_app: {APP_KEY}\nmy_sec: {APP_SECRET}\n"
    (config / "kis_devlp.yaml").write_text(told)
    return pythons[client]


@pytest.mark.parametrize("client", QUOTES)
def test_client_uses_the_token_and_issues_none(
    client: str, nowhere: Sandbox, pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process takes the warm token for its quotes, and the next one after a renewal, without an issue request."""
    python = prepared(client, nowhere, pythons, monkeypatch)
    nowhere.set_rules(same_token=0, issue_interval=0)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "0")
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
    client: str, gateway: Sandbox, pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter-proof: without a copy the same code sends one request; its token is then the key's, for no other."""
    bots = Bots(client, prepared(client, gateway, pythons, monkeypatch), 1)
    assert bots.quoted() == 1
    bots.end()
    assert asked(gateway) == 1
    token = TokenManager("us").get_valid_token()
    assert TokenManager("kr").get_valid_token() == token == on_disk().access_token
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("code", blocks("requests"))
def test_plain_requests_are_signed(code: str) -> None:
    """The document's code for plain requests gets its quote."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("code", [*blocks("sh"), *blocks("js")])
def test_commands_run(code: str, gateway: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's commands run as they stand; Node's code where there is Node."""
    program = ["/bin/sh", "-euc", code]
    if code in blocks("js"):
        program = [shutil.which("node") or pytest.skip("there is no Node here"), "-e", code]
    command = tmp_path / "bin" / "tokencore"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tokencore "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    monkeypatch.setenv("KIS_HTS_ID", "me")
    ran = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_settings_are_read() -> None:
    """The setting that the document shows is one that tokencore takes."""
    (text,) = blocks("ini")
    settings = dict(line.split("=", 1) for line in text.splitlines())
    assert tokencore("plan", **settings).code == 0
