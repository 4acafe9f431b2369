"""The stack in the background, with the user's credentials: start, stop and look.

Everything of it is in `prefect/` of the token directory: the database, the logs, and `crew.json`, which tells
the processes by number and birth, so that none but these is ever stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dotenv import dotenv_values
from filelock import BaseFileLock, FileLock, Timeout

from flows.stack import leftovers, surroundings
from flows.stack.api import Api
from flows.stack.crew import POLL, Asked, Crew, CrewError, EndedError, birth, crew_file, told
from flows.stack.server import CHECK, Prefect, addresses, form
from tokencore import ConfigurationError, Settings, managers

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMBERS = ("supervisor", "deploy", "worker", "server")  # in the order in which they are stopped
SPACE = 4 * 1024 * 1024  # bytes; a new database and the first logs take half of it
PATIENCE = 100.0  # seconds for a process to end; the supervisor gives each of its members 30


def run() -> int:
    """Stay in the foreground until SIGINT or SIGTERM; for `up`, and for systemd or a container.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        CrewError: a part could not be started; nothing of it runs.

    """
    home = _home()
    private(home)
    with _only_one(home), Crew(home) as crew:
        prefect = Prefect(crew, home, environment())
        crew.tell(url=prefect.url, ready=False)
        try:
            prefect.start()
            crew.tell(ready=True, check=_first_check(prefect))
            crew.watch(lambda: _catch_up(prefect), lambda name: _clear(prefect, name))
        finally:
            prefect.stop()
    return 0


def up() -> int:
    """Start it in the background, unless it runs, and tell how it is.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was started.
        CrewError: a part could not be started; nothing of it runs.
        EndedError: it was asked to end on the way; nothing of it runs.

    """
    managers()  # a missing key or secret is said now, not by a run at night
    known, home = environment(), _home()
    place, number = surroundings.host(known), surroundings.port(known)
    surroundings.refuse_database(known)
    surroundings.refuse_password(known)
    private(home)
    with _lock(home, "up"):
        if "supervisor" in _running(home):
            print("It runs already.")
        else:
            _stop_all(home)  # what a supervisor that was killed has left behind
            _refuse_taken(place, number)
            _refuse_full(home)
            print("Starting Prefect's server, the deployments and a worker (half a minute) ...", flush=True)
            _start(home)
    return status()


def down() -> int:
    """Stop what `up` started, and only that.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    home = _home()
    if not home.is_dir():
        print("Nothing was running.")
        return 0
    with _lock(home, "up"):
        print("Stopped." if _stop_all(home) else "Nothing was running.")
    return 0


def status() -> int:
    """Tell what runs, and how the tokens are.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    home = _home()
    facts, running = told(home), _running(home)
    if not running:
        print("Nothing is running; `make up` starts it.")
    else:
        for name, address in addresses(facts["url"]).items():
            print(f"{name:<11} {address}")
        for name in ("supervisor", "server", "worker"):
            print(f"{name:<11} {f'process {running[name]}' if name in running else 'NOT RUNNING'}")
        for name, told_of in _on_the_server().items():
            print(f"{name:<11} {told_of}")
        print(f"{'first check':<11} {facts.get('check', 'not yet done')}")
        print(f"{'logs':<11} {home}")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "tokencore", "check"], check=False)
    return 0


def environment() -> dict[str, str]:
    """The worker's environment: this process's, completed from `.env`, with folders that hold anywhere.

    Flow runs work in a directory of their own: there is no `.env`, and a relative folder would be another one.
    """
    known = dict(os.environ)
    known |= {k: v for k, v in dotenv_values(".env", interpolate=False).items() if v and not known.get(k)}
    known["KIS_TOKEN_DIR"] = str(_home().parent)
    if folder := known.get("KIS_SECRETS_DIR"):
        known["KIS_SECRETS_DIR"] = str(Path(folder).expanduser().absolute())
    return known


def api() -> Api:
    """The server's, with its password.

    Raises:
        ConfigurationError: the settings are malformed, so that nobody knows where to look.

    """
    known = environment()
    return Api(surroundings.address(known), surroundings.password(_home(), known))


def private(folder: Path) -> None:
    """Make `folder` and the one above, for their owner only."""
    for step in (folder.parent, folder):
        step.mkdir(mode=0o700, parents=True, exist_ok=True)


def _home() -> Path:
    return Settings.load().token_dir / "prefect"


def _lock(home: Path, name: str, *, wait: float = -1) -> BaseFileLock:
    return FileLock(home / f"{name}.lock", wait, preserve_lock_file=True)


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Two crews in one folder would take each other's files for their own."""
    lock = _lock(home, "run", wait=0)
    try:
        lock.acquire()
    except Timeout:
        raise CrewError("It runs already; `make status` tells how it is.") from None
    try:
        yield
    finally:
        lock.release()


def _running(home: Path) -> dict[str, int]:
    processes: dict[str, int] = told(home).get("processes", {})
    return processes


def _first_check(prefect: Prefect) -> str:
    """What was missed is made good now, not at the next full hour; how that ended."""
    try:
        state = prefect.run(CHECK)
    except CrewError as error:
        return str(error)
    return f"{state['name']}: {state['message'] or 'done'}"


def _on_the_server() -> dict[str, str]:
    """What is on the server, by name, or why that is not known."""
    server = api()
    try:
        found = {one: len(server.ask("POST", f"{one}/filter", {})) for one in ("deployments", "automations")}
        by_hand = {"refresh": f"{form(server)} (renews by hand)"} if found["deployments"] else {}
    except CrewError as error:
        return {"deployments": f"NOT KNOWN. {error}"}
    shown = {one: str(count) if count else "NONE; `make down` and `make up` make them" for one, count in found.items()}
    kept = surroundings.password_file(_home())
    return by_hand | shown | ({"password": f"in {kept}"} if kept.exists() else {})


def _clear(prefect: Prefect, restarting: str) -> None:
    """Before a worker is there again, what died with the one before is ended: it would keep its deployment's slot."""
    if restarting == "worker":
        try:
            prefect.bury()
        except CrewError as error:
            print(error, file=sys.stderr, flush=True)  # Prefect's own automation does it some minutes later


def _catch_up(prefect: Prefect) -> None:
    """After a sleep one check runs at once; what was missed meanwhile does not."""
    try:
        prefect.skip_overdue()
        prefect.check()
    except CrewError as error:
        print(error, file=sys.stderr, flush=True)  # the hourly check comes


def _refuse_taken(place: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(place, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            cure = f"Port {port} is taken by another program; set PREFECT_SERVER_API_PORT to a free one."
        else:
            cure = f"PREFECT_SERVER_API_HOST={place} cannot be listened on, at port {port}: {error.strerror}. "
            cure += "Set it to an address of this machine."
        raise ConfigurationError(cure) from None


def _refuse_full(home: Path) -> None:
    """On a full disk the supervisor could not even write why it ended."""
    probe = home / "space.tmp"
    try:
        probe.write_bytes(bytes(SPACE))
    finally:
        probe.unlink(missing_ok=True)


def _start(home: Path) -> None:
    log = home / "supervisor.log"
    with Asked() as asked:
        with log.open("wb") as output:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "flows.stack", "run"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while not asked and not told(home).get("ready"):
            if supervisor.poll() is not None:
                raise CrewError(log.read_text(errors="replace"))
            time.sleep(POLL)
        if asked:
            supervisor.terminate()  # it ends what it has started
            supervisor.wait()
            raise EndedError


def _stop_all(home: Path) -> bool:
    """The supervisor stops the others; where it was killed, they are stopped here. Whether there were any."""
    found = False
    for name in MEMBERS:
        if pid := _running(home).get(name):
            found = True
            _stop(pid)
        if found and name == "worker":
            leftovers.cancel(api())
    crew_file(home).unlink(missing_ok=True)
    return found


def _stop(pid: int) -> None:
    born = birth(pid)  # it may forget itself in crew.json before it has ended
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it ended in this moment
            os.kill(pid, request)
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            if not born or birth(pid) != born:
                return
            time.sleep(POLL)
