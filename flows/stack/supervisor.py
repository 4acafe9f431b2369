"""The stack under supervisord: Prefect's server, its worker and the deployments; started, stopped and looked at.

Everything of it is in `prefect/` of the token directory. Supervisord listens on a socket there, and knows what runs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from xmlrpc.client import Error as XmlRpcError
from xmlrpc.client import ServerProxy

from flows.stack import deployments, environment, worker
from flows.stack.api import CHECK, PATIENCE, REFRESH, StackError
from tokencore import ConfigurationError, Key, Settings, private_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

SHOWN = ("supervisor", "server", "worker")
ARTIFACTS = ("tokens", "plan")
FOLDER = "TOKENCORE_FOLDER"  # where the stack was started, see flows/__init__.py
ANSWER = 20.0  # seconds for an answer of supervisord
NO_ANSWER = (OSError, HTTPException, XmlRpcError)
LOG_TAIL = 15  # lines of a log that are shown with a failure
SOCKET_LENGTH = 90  # bytes of its folder's path: 103 for the whole on some systems, and supervisord adds its number
UNWELL = 3  # the exit code of `status`

CONFIG = """\
[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile=%(here)s/supervisord.pid

[unix_http_server]
file=%(here)s/sock
chmod=0600

[supervisorctl]
serverurl=unix://%(here)s/sock

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
PROGRAM = """
[program:{part}]
command={python} -m flows.stack {part}
priority={priority}
autorestart={autorestart}
startsecs={startsecs}
startretries=1000000
stopwaitsecs=30
redirect_stderr=true
stdout_logfile=%(here)s/{part}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=2
"""
PARTS = (  # the highest priority starts last and stops first
    {"part": "server", "priority": 10, "autorestart": "true", "startsecs": 20},
    {"part": "deploy", "priority": 20, "autorestart": "false", "startsecs": 0},
    {"part": "worker", "priority": 30, "autorestart": "true", "startsecs": 5},
)


def run() -> NoReturn:
    """Become supervisord, in the foreground until SIGINT or SIGTERM; for `up`, and for systemd or a container.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        StackError: it runs already.

    """
    home, given = environment.home(), environment.with_dotenv()
    private_folder(str(home))
    if running(home):
        raise StackError("It runs already; `make status` shows how it is.")
    _refuse(home, given)
    stack = environment.load(home, {**given, "KIS_TOKEN_DIR": str(home.parent), FOLDER: os.getcwd()})
    shutil.rmtree(home / "tmp", ignore_errors=True)
    (home / "tmp").mkdir()
    python = shlex.quote(sys.executable).replace("%", "%%")
    config = home / "supervisord.conf"
    config.write_text(CONFIG + "".join(PROGRAM.format(python=python, **part) for part in PARTS))
    os.execve(sys.executable, [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)], stack)  # noqa: S606 - no shell


def up() -> int:
    """Start it in the background, unless it runs, and show how it is.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        StackError: a part could not be started; nothing of it runs.

    """
    Key.load(Settings.load())  # a missing key or secret is said now, not by a run at night
    home = environment.home()
    if running(home):
        print("It runs already.")
    else:
        print("Starting Prefect's server, the deployments and a worker (half a minute) ...", flush=True)
        start(home, os.environ, Path.cwd())
    status()
    return 0


def down() -> int:
    """Stop what `up` or `run` started, and only that.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    home = environment.home()
    found = running(home)
    if not found:
        print("Nothing was running.")
        return 0
    worker.drain(environment.api(timeout=5))
    with contextlib.suppress(*NO_ANSWER):  # another `down` was quicker
        _supervisord(home).shutdown()
    while worker.is_alive(found["supervisor"]):  # it ends when all parts have ended, whom it gives 30 seconds each
        time.sleep(0.1)
    print("Stopped.")
    return 0


def status() -> int:
    """Show what runs, and how the tokens are; 0 if all is well, otherwise 3.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    home = environment.home()
    found = running(home)
    well = all(part in found for part in SHOWN)
    if not found:
        print("Nothing is running; `make up` starts it.")
    else:
        for part in SHOWN:
            _show(part, f"process {found[part]}" if part in found else "NOT RUNNING")
        well = _show_server(home) and well
        _show("logs", str(home))
    sys.stdout.flush()
    tokens = subprocess.run([sys.executable, "-m", "tokencore", "check"], check=False).returncode
    return 0 if well and not tokens else UNWELL


def start(home: Path, given: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """Start supervisord with the settings of that environment and folder; returns when the deployments can be run.

    Raises:
        StackError: a part could not be started; nothing of it runs.

    """
    private_folder(str(home))
    log = home / "supervisor.log"
    command, null = [sys.executable, "-m", "flows.stack", "run"], subprocess.DEVNULL
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, env=given, cwd=folder, stdin=null, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_deployed(home, process)
    except BaseException:
        stop(process)
        raise
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """End supervisord, which ends all parts first."""
    process.terminate()
    process.wait()


def running(home: Path) -> dict[str, int]:
    """The parts whose process lives, and its number; none where no supervisord answers."""
    try:
        calls = _supervisord(home)
        return {"supervisor": calls.getPID()} | {
            one["name"]: one["pid"] for one in calls.getAllProcessInfo() if one["pid"]
        }
    except NO_ANSWER:
        return {}


def become_server() -> NoReturn:
    """Become Prefect's server, which gets no credentials of KIS and Slack."""
    os.chdir(os.environ["PREFECT_HOME"])
    command = [sys.executable, "-m", "flows.stack.server"]
    os.execve(sys.executable, command, environment.for_server(os.environ))  # noqa: S606 - no shell is the point


def deploy() -> int:
    """Bring deployments and automations up to date, then check the tokens once: what was missed is made good.

    Raises:
        StackError: Prefect could not be made to.

    """
    server = environment.api()
    server.wait()
    deployments.apply(server, Path(os.environ["PREFECT_HOME"]))
    state = deployments.run_to_end(server, CHECK)
    print(f"{state['name']}: {state['message'] or 'done'}")
    return 0


def _refuse(home: Path, given: Mapping[str, str]) -> None:
    """Refuse what would make a part fail later, less clearly.

    Raises:
        ConfigurationError: the server cannot listen there, or supervisord in that folder.

    """
    place, port = environment.host(given), environment.port(given)
    try:
        family, _, _, _, address = socket.getaddrinfo(place, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on {place}, port {port}: {error.strerror}. Set PREFECT_SERVER_API_PORT to a free port, "
            "PREFECT_SERVER_API_HOST to an address of this machine."
        ) from None
    if len(os.fsencode(home)) > SOCKET_LENGTH:
        raise ConfigurationError(f"{home} is too long for a socket in it; set a shorter KIS_TOKEN_DIR (demo: TMPDIR).")


def _supervisord(home: Path) -> Any:  # noqa: ANN401 - whatever its XML-RPC interface has
    from supervisor.xmlrpc import SupervisorTransport

    socket.setdefaulttimeout(ANSWER)  # its transport knows no other
    return ServerProxy("http://localhost", SupervisorTransport(None, None, f"unix://{home}/sock")).supervisor


def _wait_until_deployed(home: Path, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise StackError((home / "supervisor.log").read_text(errors="replace").strip(), process.returncode)
        with contextlib.suppress(*NO_ANSWER):  # it does not answer yet
            for part in _supervisord(home).getAllProcessInfo():
                ended, name = part["statename"] == "EXITED", part["name"]
                if part["statename"] in ("BACKOFF", "FATAL") or (ended and part["exitstatus"]):
                    raise StackError(_failure(home, name, f"exited with code {part['exitstatus']}"))
                if ended and name == "deploy":
                    return
        time.sleep(0.2)
    raise StackError(_failure(home, "deploy", f"has not ended after {PATIENCE:.0f} s"))


def _failure(home: Path, part: str, what: str) -> str:
    log = home / f"{part}.log"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:] if log.exists() else []
    return "\n".join([f"{part}: {what}. The end of its log:", *(f"  {line}" for line in lines)])


def _show(name: str, what: str) -> None:
    print(f"{name:<11} {what}")


def _show_server(home: Path) -> bool:
    """What the server itself says; whether that is all well."""
    given, server = environment.with_dotenv(), environment.api(timeout=5)
    page = environment.page(given)
    _show("page", page)
    given_password = given.get(environment.PASSWORD)
    _show("password", environment.PASSWORD if given_password else f"in {environment.password_file(home)}")
    for name in ARTIFACTS:
        _show(name, f"{page}/artifacts/key/{name} (click its newest entry)")
    try:
        counts = {name: len(server.ask("POST", f"{name}/filter", {})) for name in ("deployments", "automations")}
        form = f"{page}/deployments/deployment/{server.deployment(REFRESH)['id']}/run"
        last = server.last_check()
    except StackError as error:
        _show("server says", f"NOT KNOWN. {error}")
        return False
    _show("refresh", f"{form} (renews manually)")
    for name, count in counts.items():
        _show(name, str(count) if count else "NONE; `make down` and `make up` make them")
    _show("last check", f"{last[0]}, {last[1]:%Y-%m-%d %H:%M} UTC" if last else "none yet")
    return all(counts.values()) and last is not None
