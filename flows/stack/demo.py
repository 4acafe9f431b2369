"""The whole system with nothing to configure: a sandbox instead of KIS, and a stack of its own in a temporary folder.

It ignores this machine's settings, with its credentials, `.env` and other Prefect, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from flows.stack import environment, supervisor
from flows.stack.api import REFRESH, Api, StackError
from tokencore import sessions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

END = """\
The page: {page}
  Sign in with: {password}
  The tokens: {page}/artifacts/key/tokens (click its newest entry)
  The plan: {page}/artifacts/key/plan (click its newest entry)
  Renew manually: {page}/deployments/deployment/{form}/run
  A refusal: let KIS refuse the next request, then renew manually for kr, with force. Where the run asks, press Resume
  in the menu (three dots) of its page and choose "renew now". It ends as Declined and says until when the token serves.
    curl -X POST {gateway}/sandbox/fail -d '{{"mode": "limit", "count": 1}}'

Ctrl-C stops everything and leaves nothing behind.
"""


def demo(*, once: bool = False) -> int:
    """Start everything, warm up a token and show it; then, unless `once`, go on until SIGINT or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="tokencore-demo-") as folder, sandbox(Path(folder)) as known:
        _say("sandbox", "a server on this machine answers instead of KIS")
        _say("Prefect", "starting its server, a worker and the deployments (half a minute) ...")
        home = Path(known["PREFECT_HOME"])
        stack = supervisor.start(home, known, Path(folder))
        try:
            password = environment.password(home, known)
            api, page = Api(environment.address(known), password), environment.page(known)
            _say("page", f"{page} (sign in with {password}), to watch what follows")
            _play(api, known)
            if not once:
                form, gateway = api.deployment(REFRESH)["id"], known["KIS_BASE_URL"]
                with contextlib.suppress(KeyboardInterrupt):
                    print(END.format(form=form, password=password, page=page, gateway=gateway), flush=True)
                    signal.pause()
                print("Stopped.")
        finally:
            supervisor.stop(stack)
    return 0


def exchange(now: datetime) -> str:
    """Return the exchange whose session runs at `now` (aware) or is next on its own day; without one, a closed one."""
    ahead, closed = {}, ""
    for code in ("KRX", "NASD"):
        day = sessions.session(code, now.astimezone(ZoneInfo(sessions.exchange(code).zone)).date())
        if day is None:
            closed = code
        elif day.close > now:
            ahead[code] = day.open
    return min(ahead, key=ahead.__getitem__) if ahead else closed


def _play(api: Api, known: Mapping[str, str]) -> None:
    """Show the check that each start makes, run a warm-up after it, and show the tokens."""
    if last := api.last_check():
        _say("check-tokens", last[0])
    code = exchange(datetime.now(UTC))
    _complete(api, f"warm-up/{code}", exchange=code)
    if _check(known, "kr", output=subprocess.DEVNULL):
        _say("", "No session needs a token now, so a person asks for one:")
        _complete(api, REFRESH, market="kr", operator="make demo", reason="no session needs a token now")
    print(flush=True)
    _check(known)
    print(flush=True)


@contextlib.contextmanager
def sandbox(folder: Path) -> Iterator[dict[str, str]]:
    """Run a sandbox while the block lasts; yield the environment of a machine whose settings know only the sandbox."""
    alien = ("KIS_", "SLACK_", "PREFECT_", "TOKENCORE_")
    known = {name: value for name, value in os.environ.items() if not name.upper().startswith(alien)}
    known |= {
        "HOME": str(folder),
        "KIS_TOKEN_DIR": str(folder / "tokens"),
        "PREFECT_HOME": str(folder / "tokens" / "prefect"),
        "PREFECT_SERVER_API_PORT": str(_free_port()),
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # somebody is watching: Prefect's 10 would double the time
    }
    command = [sys.executable, "-m", "tokencore", "sandbox", "--port", str(_free_port())]
    pipe = subprocess.PIPE
    with subprocess.Popen(  # noqa: S603 - our own command
        command, env=known, cwd=folder, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as gateway:
        try:
            said = "".join(takewhile(str.strip, gateway.stdout or ()))
            yield known | dict(re.findall(r"^export (\w+)=(.+)$", said, re.MULTILINE))
        finally:
            gateway.terminate()


def _complete(api: Api, deployment: str, **parameters: object) -> None:
    state = api.run_to_end(deployment, **parameters)
    said = f"{state['type'].capitalize()}: {state['name']}. {state['message'] or ''}"
    if state["type"] != "COMPLETED":
        raise StackError(f"The run of {deployment} did not complete. {said}")
    _say(deployment.partition("/")[0], said)


def _check(known: Mapping[str, str], *markets: str, output: int | None = None) -> int:
    """Run `tokencore check` in a folder without `.env`, and return its exit code."""
    command = [sys.executable, "-m", "tokencore", "check", *markets]
    return subprocess.run(command, env=known, cwd=known["HOME"], stdout=output, check=False).returncode  # noqa: S603 - as above


def _say(who: str, what: str) -> None:
    print(f"{who:<14} {what}", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
