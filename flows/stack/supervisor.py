"""Start, stop and inspect the stack under supervisord: Prefect's server, its worker and the deployments.

All its files are in `prefect/` of the token directory. Supervisord listens on a socket there, and knows what runs;
supervisord.conf says what it starts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from xmlrpc.client import Error as XmlRpcError
from xmlrpc.client import ServerProxy

from filelock import FileLock

from flows.stack import deployments, environment, worker
from flows.stack.api import CHECK, PATIENCE, REFRESH, StackError
from tokencore import ConfigurationError, Key, Settings, TokenStoreError, private_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.stack.api import Api

CONFIG = Path(__file__).with_name("supervisord.conf")
PARTS = ("supervisor", "server", "worker")
LAST_CHECK = "last check"
FOLDER = "TOKENCORE_FOLDER"  # where the stack was started; see flows/__init__.py
MARGIN = 5.0  # seconds that the parts of a killed supervisord may take longer to end
ANSWER = 20.0  # seconds to wait for supervisord's answer
FIRST_CHECK = 60.0  # seconds that a start waits for its check, which tries for most of an hour while KIS is down
NO_ANSWER = (OSError, HTTPException, XmlRpcError)
LOG_TAIL, LOG_WIDTH = 15, 500  # lines of a log that are shown with a failure, and characters of each
SOCKET_LENGTH = 90  # bytes of its folder's path: some systems allow 103 in all, and supervisord adds its process id
OUTDATED = "A stack that version 0.1 started runs: stop it with `make down`, then repeat `make up`."
UNWELL = 3  # the exit code of `status`


def run() -> NoReturn:
    """Become supervisord, in the foreground until SIGINT or SIGTERM; for `up`, and for systemd or a container.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        StackError: the stack runs already.
    """
    home, given = environment.home(Settings.load()), environment.with_dotenv()
    private_folder(str(home))
    if running(home):
        raise StackError("It runs already; `make status` shows its status.")
    listener = _listen(home, given)
    stack = environment.load(home, {**given, "KIS_TOKEN_DIR": str(home.parent), FOLDER: os.getcwd()})
    stack[worker.SUPERVISOR] = str(os.getpid())  # it stays the same as this process becomes supervisord
    stack[environment.LISTENER] = str(listener.fileno())
    os.set_inheritable(listener.fileno(), True)  # noqa: FBT003 - its only parameter
    shutil.rmtree(home / "tmp", ignore_errors=True)
    (home / "tmp").mkdir()
    place = f"{environment.host(given)}:{environment.port(given)}"
    config, text = home / CONFIG.name, CONFIG.read_text("utf-8")
    for name, value in {"PYTHON": shlex.quote(sys.executable), "%(here)s": str(home), "ADDRESS": place}.items():
        text = text.replace(name, value.replace("%", "%%"))
    config.write_text(text)
    os.chdir(home)
    os.execve(sys.executable, [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)], stack)  # noqa: S606 - no shell


def up() -> int:
    """Start the stack in the background unless it runs, and show its status.

    Raises:
        ConfigurationError: the settings cannot be used; nothing was started.
        StackError: a part could not be started, so that none runs; or a stack of version 0.1 is still running.
    """
    settings = Settings.load()
    Key.load(settings)  # reports a missing key or secret now, not in a run at night
    home = environment.home(settings)
    private_folder(str(home))
    with FileLock(home / "up.lock"):  # two at once: the second one waits for the first
        if _of_first_version(home):
            raise StackError(OUTDATED)
        if running(home):
            print("It runs already.")
        else:
            print("Starting Prefect's server, the deployments and a worker (half a minute) ...", flush=True)
            start(home, os.environ, Path.cwd())
    status()
    return 0


def down() -> int:
    """Stop what `up` or `run` started, and only that, even if the settings cannot be used any more.

    Raises:
        ConfigurationError: the settings cannot be used, and nothing was running where they say.
    """
    try:
        home = environment.home(Settings.load())
    except ConfigurationError:
        known = Settings.for_alerts()  # has the token directory
        if not known or not running(home := environment.home(known)):
            raise
    found = running(home)
    if not found:
        print("Nothing was running.")
        return 0
    with contextlib.suppress(ConfigurationError):  # then nobody waits for runs
        worker.drain(environment.api(home, as_started(home), timeout=5))
    with contextlib.suppress(ProcessLookupError):  # another `down` was quicker
        os.kill(found["supervisor"], signal.SIGTERM)
    while worker.is_alive(found["supervisor"]):  # it ends after all its parts, which get 30 seconds each
        time.sleep(0.1)
    print("Stopped.")
    return 0


def status() -> int:
    """Show what runs, and the tokens' status; return 0 if all is well, otherwise 3."""
    home = environment.home(Settings.load())
    found = running(home)
    shown = {part: f"process {found[part]}" if part in found else "NOT RUNNING" for part in PARTS}
    if found:
        shown |= _server_says(home) | {"logs": str(home)}
        print("\n".join(f"{name:<11} {what}" for name, what in shown.items()), flush=True)
    else:
        print("Nothing is running; `make up` starts it.", flush=True)
    well = found.keys() >= {*PARTS} and LAST_CHECK in shown
    tokens = subprocess.run([sys.executable, "-m", "tokencore", "check"], check=False).returncode
    return 0 if well and not tokens else UNWELL


def start(home: Path, given: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """Start supervisord with the settings of that environment and folder; return when the deployments can be run.

    Raises:
        StackError: a part could not be started; all parts were stopped again.
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
    """Return the process ids of the parts that run; none if no supervisord answers, nor a stack of 0.1 is left."""
    try:
        parts = {one["name"]: one["pid"] for one in _supervisord(home, "getAllProcessInfo") if one["pid"]}
        return {"supervisor": _supervisord(home, "getPID"), **parts}
    except NO_ANSWER:
        return _of_first_version(home)


def _of_first_version(home: Path) -> dict[str, int]:
    """Return the process ids of a stack that version 0.1 started and that still runs: its file has them."""
    alive = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or no /proc
        noted = json.loads((home / "crew.json").read_text("utf-8"))["processes"]
        for name, (number, started) in noted.items():
            stat = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            if stat[19] == started and stat[0] != "Z":
                alive[name] = number
    return alive if "supervisor" in alive else {}


def as_started(home: Path) -> dict[str, str]:
    """Return Prefect's settings; of a running stack's server, host and port as they were when it was started."""
    found = environment.with_dotenv()
    with contextlib.suppress(*NO_ANSWER):
        place, _, port = _supervisord(home, "getIdentification").rpartition(":")
        if place:  # a stack that an earlier version started has none
            found |= {"PREFECT_SERVER_API_HOST": place, "PREFECT_SERVER_API_PORT": port}
    return found


def become_server() -> NoReturn:
    """Become Prefect's server, which gets no credentials for KIS and Slack."""
    os.chdir(os.environ["PREFECT_HOME"])
    own = {name: value for name, value in os.environ.items() if not name.startswith(("KIS_", "SLACK_", "TOKENCORE_"))}
    os.execve(sys.executable, [sys.executable, "-m", "flows.stack.server"], own)  # noqa: S606 - no shell is the point


def deploy() -> int:
    """Bring deployments and automations up to date, then check the tokens once, which makes up for missed runs."""
    threading.Thread(target=worker.end_with_parent, daemon=True).start()
    home = Path(os.environ["PREFECT_HOME"])
    server = environment.api(home, environment.with_dotenv())
    server.wait()
    deployments.apply(server, home)
    print(first_check(server))
    return 0


def first_check(server: Api, patience: float = FIRST_CHECK) -> str:
    """Check the tokens once, and say how that ended; if it goes on, because KIS is down, the start does too."""
    try:
        state = server.run_to_end(CHECK, patience)
    except StackError as error:
        return str(error)
    return f"{state['name']}: {state['message'] or 'done'}"


def _listen(home: Path, given: Mapping[str, str]) -> socket.socket:
    """Take the server's port, which supervisord and its parts keep until their end.

    Its clients wait while the server restarts; otherwise another user could take the port then, and their password.

    Raises:
        ConfigurationError: the port or the folder cannot be used.
    """
    if len(os.fsencode(home)) > SOCKET_LENGTH:
        raise ConfigurationError(f"{home} is too long for a socket in it; set a shorter KIS_TOKEN_DIR (demo: TMPDIR).")
    place, port = environment.host(given), environment.port(given)
    was_killed = (home / "supervisord.pid").exists()  # then its parts end by themselves, and hold the port until then
    give_up = time.monotonic() + (worker.TIME_TO_END + MARGIN) * was_killed
    while True:
        try:
            return socket.create_server((place, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < give_up:
                time.sleep(worker.POLL)
                continue
            why = str(error.strerror).partition(" (while ")[0]  # Python repeats the address
            raise ConfigurationError(
                f"Cannot listen on {place}, port {port}: {why}. Set PREFECT_SERVER_API_PORT to a free port, "
                "PREFECT_SERVER_API_HOST to an address of this machine."
            ) from None


def _supervisord(home: Path, method: str) -> Any:  # noqa: ANN401 - whatever its XML-RPC interface has
    """Return supervisord's answer; the connection is closed here, because Ctrl-C during a destructor would be lost."""
    from supervisor.xmlrpc import SupervisorTransport

    socket.setdefaulttimeout(ANSWER)  # its transport has no other time-out
    with ServerProxy("http://localhost", SupervisorTransport(None, None, f"unix://{home}/sock")) as server:
        return getattr(server.supervisor, method)()


def _wait_until_deployed(home: Path, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if (code := process.poll()) is not None:
            if code <= 0:  # by `down`, or a signal
                raise StackError(f"It was stopped before it was ready; its logs are in {home}.")
            said = (home / "supervisor.log").read_text(errors="replace").strip()
            if not said:
                raise TokenStoreError(
                    f"Nothing was started, nor could the reason be written into {home}. Free space there."
                )
            raise StackError(said, code)
        with contextlib.suppress(*NO_ANSWER):  # it does not answer yet
            for part in _supervisord(home, "getAllProcessInfo"):
                ended, name, code = part["statename"] == "EXITED", part["name"], part["exitstatus"]
                if part["statename"] in ("BACKOFF", "FATAL") or (ended and code):  # the first two have no code
                    raise StackError(_failure(home, name, f"exited with code {code}" if ended else "exited"))
                if ended and name == "deploy":
                    return
        time.sleep(0.2)
    raise StackError(_failure(home, "deploy", f"has not ended after {PATIENCE:.0f} s"))


def _failure(home: Path, part: str, what: str) -> str:
    log = home / f"{part}.log"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:] if log.exists() else []
    return "\n".join([f"{part}: {what}. The end of its log:", *(f"  {line[:LOG_WIDTH]}" for line in lines)])


def _server_says(home: Path) -> dict[str, str]:
    """Say where the UI is and how the server is; all is well if there is a line on the last check."""
    known, password = as_started(home), environment.PASSWORD
    page, server = environment.page(known), environment.api(home, known, timeout=5)
    shown = {"page": page, "password": password if known.get(password) else f"in {environment.password_file(home)}"}
    shown |= {name: f"{page}/artifacts/key/{name} (click its newest entry)" for name in ("tokens", "plan")}
    try:
        form = f"{page}/deployments/deployment/{server.deployment(REFRESH)['id']}/run (renews manually)"
        last = server.last_check()
    except StackError as error:
        return {**shown, "server says": f"NOT KNOWN. {error}"}
    check = {LAST_CHECK: f"{last[0]}, {last[1]:%Y-%m-%d %H:%M} UTC"} if last else {"checks": "NONE has ended yet"}
    return {**shown, "refresh": form, **check}
