"""Everything at once, with nothing to configure: a sandbox instead of KIS, a stack of its own in a temporary folder.

It knows nothing of this machine's settings: no credentials, no `.env`, no other Prefect. Nothing outlives it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flows.stack.crew import Crew, CrewError
from flows.stack.server import CHECK, REFRESH, Prefect, addresses

if TYPE_CHECKING:
    from collections.abc import Mapping

WARM_UP = "warm-up/KRX"
PATIENCE = 30.0  # seconds for the sandbox to start
END = """\
The page: {page}
  The tokens: {tokens}
  The plan: {plan}
  Renew by hand: {form}
  Let KIS refuse the next request, then renew by hand, with force, and see what the run tells:
    curl -X POST {sandbox}/sandbox/fail -d '{{"mode": "limit", "count": 1}}'
"""


def demo(*, once: bool = False) -> int:
    """Start all, warm a token up and show it; then stay until SIGINT or SIGTERM, unless it is for `once`.

    Raises:
        CrewError: a part could not be started, or a run did not complete; nothing is left running.
        EndedError: it was asked to end on the way.

    """
    with tempfile.TemporaryDirectory(prefix="tokencore-demo-") as folder, Crew(Path(folder)) as crew:
        environment = _environment(Path(folder))
        environment |= _sandbox(crew, environment)
        _say("sandbox", f"{environment['KIS_BASE_URL']} answers instead of KIS")
        prefect = Prefect(crew, Path(folder), environment)
        _say("Prefect", "starting its server, a worker and the deployments (half a minute) ...")
        prefect.start()
        _say("Prefect", f"{prefect.url} is up; every deployment is on its schedule")
        _complete(prefect, WARM_UP, exchange="KRX")
        if _tokencore(environment, "check", "kr", show=False):
            _say("", "No session needs a token now, so a person asks for one:")
            _complete(prefect, REFRESH, market="kr", operator="make demo", reason="no session needs a token now")
        _complete(prefect, CHECK)
        print(flush=True)
        _tokencore(environment, "check")
        print(flush=True)
        shown = addresses(prefect.url) | {"form": prefect.form(), "sandbox": environment["KIS_BASE_URL"]}
        print(END.format(**shown), flush=True)
        if not once:
            print("Ctrl-C stops everything and leaves nothing behind.", flush=True)
            crew.watch()
    if not once:
        print("Stopped.")
    return 0


def _environment(folder: Path) -> dict[str, str]:
    """This process's, without what would lead to an account, a message to Slack or another Prefect."""
    alien = ("KIS_", "SLACK_", "PREFECT_")
    harmless = {name: value for name, value in os.environ.items() if not name.upper().startswith(alien)}
    return harmless | {
        "HOME": str(folder),
        "TMPDIR": str(folder),  # Prefect's worker leaves something in there
        "KIS_TOKEN_DIR": str(folder / "tokens"),
        "PREFECT_SERVER_API_PORT": str(_free_port()),
    }


def _sandbox(crew: Crew, environment: Mapping[str, str]) -> dict[str, str]:
    """Start it; the settings that it says to export."""
    command = [sys.executable, "-m", "tokencore", "sandbox", "--port", str(_free_port())]
    gateway = crew.start("sandbox", command, environment)

    def exports() -> dict[str, str]:
        return dict(re.findall(r"^export (\w+)=(.+)$", gateway.log.read_text(), re.MULTILINE))

    crew.wait(lambda: "KIS_APP_SECRET" in exports(), "its settings", PATIENCE, of=gateway)
    return exports()


def _complete(prefect: Prefect, deployment: str, **parameters: object) -> None:
    state = prefect.run(deployment, **parameters)
    told = f"{state['type'].capitalize()}: {state['name']}. {state['message'] or ''}"
    if state["type"] != "COMPLETED":
        raise CrewError(f"The run of {deployment} did not complete. {told}")
    _say(deployment.partition("/")[0], told)


def _tokencore(environment: Mapping[str, str], *arguments: str, show: bool = True) -> int:
    """Run the command where no `.env` is; its exit code."""
    output = None if show else subprocess.DEVNULL
    command = [sys.executable, "-m", "tokencore", *arguments]
    return subprocess.run(  # noqa: S603 - our own command
        command, env=environment, cwd=environment["HOME"], stdout=output, check=False
    ).returncode


def _say(who: str, what: str) -> None:
    print(f"{who:<14} {what}", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
