"""The stack under supervisord: Prefect's server, its worker, what tidies up after them; started, stopped and looked at.

Everything of it is in `prefect/` of the token directory. Each part holds a lock on its file of that folder for as long
as its process lives, with its number in the file: what is stopped is ours, whatever number it has.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from xmlrpc.client import Error as XmlRpcError
from xmlrpc.client import ServerProxy

from filelock import FileLock

from flows.stack import deployments, environment, orphans
from flows.stack.api import CHECK, POOL, REFRESH, Api, StackError
from tokencore import ConfigurationError, Key, Settings, private_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS = ("worker", "tidy", "deploy", "server")  # in the order in which supervisord stops them
SHOWN = ("supervisor", "server", "worker")
ARTIFACTS = ("tokens", "plan")
CHECK_AT_START = "TOKENCORE_CHECK_AT_START"  # empty: the demo runs something else first
FOLDER = "TOKENCORE_FOLDER"  # where the stack was started, see flows/__init__.py
SPACE = 24 * 1024 * 1024  # bytes; the page takes 17 MB, a new database and the first logs 2
PATIENCE = 300.0  # seconds for a start: two idle cores take 14 for the first start of the server alone
STOPPING = 100.0  # seconds; supervisord gives each part 30
LOG_TAIL = 15  # lines of a log that are shown with a failure
SOCKET_LENGTH = (
    90  # bytes of its folder's path: the whole may have 103 on some systems, and supervisord adds its number
)
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


def run() -> NoReturn:
    """Become supervisord, in the foreground until SIGINT or SIGTERM; for `up`, and for systemd or a container.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        StackError: it runs already.

    """
    home, given = _home(), environment.with_dotenv()
    private_folder(str(home))
    _hold(home, "supervisor")
    _prepare(home, given)
    settings = {"KIS_TOKEN_DIR": str(home.parent), FOLDER: os.getcwd()}
    stack = environment.load(home, given | settings)
    shutil.rmtree(home / "tmp", ignore_errors=True)
    (home / "tmp").mkdir()
    config = home / "supervisord.conf"
    config.write_text(_config())
    os.execve(sys.executable, [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)], stack)  # noqa: S606 - no shell


def up() -> int:
    """Start it in the background, unless it runs, and show how it is.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        StackError: a part could not be started; nothing of it runs.

    """
    Key.load(Settings.load())  # a missing key or secret is said now, not by a run at night
    home, given = _home(), environment.with_dotenv()
    environment.check(given)
    private_folder(str(home))
    with FileLock(home / "up.lock", preserve_lock_file=True):
        if "supervisor" in running(home):
            print("It runs already.")
        else:
            _prepare(home, given)
            print("Starting Prefect's server, the deployments and a worker (half a minute) ...", flush=True)
            start(home, os.environ, Path.cwd())
    status()
    return 0


def down() -> int:
    """Stop what `up` or `run` started, and only that.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    home = _home()
    if not running(home):
        print("Nothing was running.")
        return 0
    with FileLock(home / "up.lock", preserve_lock_file=True):
        orphans.drain(api(timeout=5))
        stop(home)
    print("Stopped.")
    return 0


def status() -> int:
    """Show what runs, and how the tokens are; 0 if all is well, otherwise 3.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    home = _home()
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


def start(home: Path, given: Mapping[str, str], folder: Path) -> None:
    """Start supervisord with the settings of that environment and folder; returns when the deployments can be run.

    Raises:
        StackError: a part could not be started; nothing of it runs.

    """
    log = home / "supervisor.log"
    command = [sys.executable, "-m", "flows.stack", "run"]
    with log.open("wb") as output:
        supervisor = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env=given,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until_deployed(home, supervisor)
    except BaseException:
        supervisor.terminate()  # it ends what it has started
        supervisor.wait()
        raise


def stop(home: Path, parts: Sequence[str] = ("supervisor", *PARTS)) -> None:
    """End these parts: supervisord ends the others; where it was killed, they are ended here."""
    for part in parts:
        for request in (signal.SIGTERM, signal.SIGKILL):
            give_up = time.monotonic() + STOPPING
            if number := running(home).get(part):
                with contextlib.suppress(ProcessLookupError):  # it ended in this moment
                    os.kill(number, request)
            while part in running(home) and time.monotonic() < give_up:
                time.sleep(0.1)


def running(home: Path) -> dict[str, int]:
    """The parts whose process lives, and its number."""
    found = {}
    for part in ("supervisor", *PARTS):
        with contextlib.suppress(FileNotFoundError), _lock_file(home, part).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found[part] = int(file.read() or 0)
    return {part: number for part, number in found.items() if number}


def become_server() -> NoReturn:
    """Become Prefect's server."""
    _become("server", [sys.executable, "-m", "flows.stack.server"], environment.for_server(os.environ))


def become_worker() -> NoReturn:
    """Become Prefect's worker, after what died with the one before or was missed meanwhile is ended."""
    server = api()
    _wait_for(server)
    orphans.mark_crashed(server)
    orphans.skip_overdue(server)
    command = ["worker", "start", "--pool", POOL, "--type", "process", "--name", orphans.WORKER]
    _become("worker", [sys.executable, "-m", "prefect", *command], environment.for_worker(os.environ))


def tidy() -> int:
    """Look after overdue runs until SIGTERM, which comes once the worker is gone; then end what that left behind."""
    _hold(_home(), "tidy")
    try:
        orphans.watch_sleep(api())
    except KeyboardInterrupt:  # how SIGTERM comes
        orphans.mark_cancelled(api())
    return 0


def deploy() -> int:
    """Bring deployments and automations up to date, then check the tokens once: what was missed is made good.

    Raises:
        StackError: Prefect could not be made to.

    """
    home, server = _home(), api()
    _hold(home, "deploy")
    _wait_for(server)
    deployments.apply(server, home)
    if os.environ.get(CHECK_AT_START, "yes"):
        state = deployments.run_to_end(server, CHECK)
        print(f"{state['name']}: {state['message'] or 'done'}")
    return 0


def api(timeout: float = 30) -> Api:
    """The server's, with its password.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    given = environment.with_dotenv()
    return Api(environment.address(given), environment.password(_home(), given), timeout)


def _home() -> Path:
    """The stack's folder; one that is there has been looked at.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.
        TokenStoreError: another user can have put something into it.

    """
    home = Path(Settings.load().token_dir).absolute() / "prefect"
    if home.exists():
        private_folder(str(home))
    return home


def _lock_file(home: Path, part: str) -> Path:
    return home / f"{part}.pid"


def _hold(home: Path, part: str) -> None:
    """Hold the part's lock as long as this process lives, whatever program it becomes.

    Raises:
        StackError: another process holds it.

    """
    file = os.open(_lock_file(home, part), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StackError("It runs already; `make status` shows how it is.") from None
    os.set_inheritable(file, True)  # noqa: FBT003 - the function takes nothing else
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())


def _become(part: str, command: list[str], known: Mapping[str, str]) -> NoReturn:
    home = _home()
    _hold(home, part)
    os.chdir(home)
    os.execve(command[0], command, known)  # noqa: S606 - no shell is the point


def _prepare(home: Path, given: Mapping[str, str]) -> None:
    """Stop what a killed supervisord has left, and refuse what would make a part fail later, less clearly."""
    environment.check(given)
    stop(home, PARTS)
    place, port = environment.host(given), environment.port(given)
    try:
        family, kind, _, _, address = socket.getaddrinfo(place, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"Port {port} is taken by another program; set PREFECT_SERVER_API_PORT to a free one."
        else:
            reason = f"Cannot listen on PREFECT_SERVER_API_HOST={place}, port {port}: {error.strerror}. "
            reason += "Set it to an address of this machine."
        raise ConfigurationError(reason) from None
    if len(os.fsencode(home)) > SOCKET_LENGTH:
        raise ConfigurationError(f"{home} is too long for a socket in it; set a shorter KIS_TOKEN_DIR (demo: TMPDIR).")
    probe_file = home / "space.tmp"
    try:
        probe_file.write_bytes(bytes(SPACE))  # on a full disk the log could not even say why it ended
    finally:
        probe_file.unlink(missing_ok=True)


def _config() -> str:
    python = shlex.quote(sys.executable).replace("%", "%%")
    options = {  # the highest priority starts last and stops first
        "server": {"priority": 10, "autorestart": "true", "startsecs": 20},
        "deploy": {"priority": 20, "autorestart": "false", "startsecs": 0},
        "tidy": {"priority": 30, "autorestart": "true", "startsecs": 5},
        "worker": {"priority": 40, "autorestart": "true", "startsecs": 5},
    }
    return CONFIG + "".join(PROGRAM.format(part=part, python=python, **one) for part, one in options.items())


def _wait_until_deployed(home: Path, supervisor: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if supervisor.poll() is not None:
            raise StackError((home / "supervisor.log").read_text(errors="replace").strip(), supervisor.returncode)
        parts = {one["name"]: one for one in _parts(home)}
        for part, one in parts.items():
            if one["statename"] in ("BACKOFF", "FATAL") or (one["statename"] == "EXITED" and one["exitstatus"]):
                raise StackError(_failure(home, part, f"exited with code {one['exitstatus']}"))
        if parts.get("deploy", {}).get("statename") == "EXITED":
            return
        time.sleep(0.2)
    raise StackError(_failure(home, "deploy", f"has not ended after {PATIENCE:.0f} s"))


def _parts(home: Path) -> list[dict[str, Any]]:
    """What supervisord says of its parts; nothing while it starts."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{home}/sock")
    try:
        found: Any = ServerProxy("http://localhost", transport).supervisor.getAllProcessInfo()
    except (OSError, HTTPException, XmlRpcError):
        return []
    return list(found)


def _failure(home: Path, part: str, what: str) -> str:
    log = home / f"{part}.log"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:] if log.exists() else []
    return "\n".join([f"{part}: {what}. The end of its log:", *(f"  {line}" for line in lines)])


def _wait_for(server: Api) -> None:
    """Supervisord starts all parts at once; these wait for the first one.

    Raises:
        StackError: the server did not come up in time.

    """
    give_up = time.monotonic() + PATIENCE
    while not server.answers("ready"):
        if time.monotonic() > give_up:
            raise StackError(f"Prefect's server at {server.url} does not answer.")
        time.sleep(0.5)


def _show(name: str, what: str) -> None:
    print(f"{name:<11} {what}")


def _show_server(home: Path) -> bool:
    """What the server itself says; whether that is all well."""
    given, server = environment.with_dotenv(), api(timeout=5)
    page, kept = environment.page(given), environment.password_file(home)
    _show("page", page)
    _show("password", environment.PASSWORD if given.get(environment.PASSWORD) else f"in {kept}")
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
