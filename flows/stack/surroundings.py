"""What the server and the worker live in: address, password, keys and Prefect's settings, all of them environment.

What has to outlive a restart is generated once into the stack's home, for its owner only, and never shown.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from tokencore import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_PORT = "4200"  # Prefect's own
LOOPBACK = "127.0.0.1"
DATABASES = ("sqlite+aiosqlite", "postgresql+asyncpg")  # what Prefect's server speaks
USER = "admin"  # of a generated password
LOGGING = Path(__file__).with_name("logging.yml")

DEFAULTS = {
    # Nobody is called but KIS and Slack; the second version of the page makes the browser ask an analytics host.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # In memory, as is Prefect's default, a slot of a concurrency limit stays taken for ever if the server restarts.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Runs are kept for 90 days, not for ever.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    # A run shows once a minute that it lives (at the least every 30 s): what `A run shows no life` goes by.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    # A window that has ended is kept until it has been judged, which may take as long again as it lasted: with
    # Prefect's minute, most absences of a heartbeat would never be noticed. Some events wait a quarter of an hour.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "PT30M",
}
SERVER_ONLY = (
    "PREFECT_SERVER_ENCRYPTION_KEY",
    "PREFECT_SERVER_DATABASE_",
)  # the worker and its runs have no use for them


def for_server(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: without credentials, with the key that its blocks are encrypted with.

    Raises:
        ConfigurationError: the port or the database's address cannot be.

    """
    refuse_database(environment)
    own = {k: v for k, v in _common(home, environment).items() if not k.upper().startswith(("KIS_", "SLACK_"))}
    own.setdefault("PREFECT_SERVER_ENCRYPTION_KEY", encryption_key(home))
    return {"PREFECT_LOGGING_SETTINGS_PATH": str(LOGGING)} | own


def for_worker(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment, and that of all its runs.

    Raises:
        ConfigurationError: the port cannot be.

    """
    return {k: v for k, v in _common(home, environment).items() if not k.startswith(SERVER_ONLY)}


def _common(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process of this stack, whichever server or profile it has for other purposes."""
    clean = {k: v for k, v in environment.items() if not k.startswith(("PREFECT_API_", "PREFECT_PROFILE"))}
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{address(environment)}/api",
        "PREFECT_SERVER_API_HOST": host(environment),
        "PREFECT_SERVER_API_PORT": str(port(environment)),
        "PREFECT_SERVER_UI_API_URL": "/api",  # else the page asks port 4200, whatever the port is
        "PREFECT_CLI_PROMPT": "false",
        "no_proxy": ",".join(filter(None, [environment.get("no_proxy") or environment.get("NO_PROXY"), LOOPBACK])),
    }
    if found := password(home, environment):
        own |= {"PREFECT_SERVER_API_AUTH_STRING": found, "PREFECT_API_AUTH_STRING": found}
    return DEFAULTS | clean | own


def port(environment: Mapping[str, str]) -> int:
    """The port of the server.

    Raises:
        ConfigurationError: PREFECT_SERVER_API_PORT is no port.

    """
    text = environment.get("PREFECT_SERVER_API_PORT") or DEFAULT_PORT
    if not text.isdecimal() or not 0 < int(text) < 65536:  # noqa: PLR2004 - ports end there
        raise ConfigurationError(f"PREFECT_SERVER_API_PORT={text} is no port; set a number from 1 to 65535.")
    return int(text)


def host(environment: Mapping[str, str]) -> str:
    """Where the server listens."""
    return environment.get("PREFECT_SERVER_API_HOST") or LOOPBACK


def address(environment: Mapping[str, str]) -> str:
    """The server's address for programs of this machine.

    Raises:
        ConfigurationError: PREFECT_SERVER_API_PORT is no port.

    """
    place = host(environment)
    if place in ("0.0.0.0", "::"):  # noqa: S104 - told apart, not listened on
        place = LOOPBACK
    return f"http://{f'[{place}]' if ':' in place else place}:{port(environment)}"


def password(home: Path, environment: Mapping[str, str]) -> str | None:
    """The server's password as `user:secret`; None where only this machine can come to a server without one.

    One that listens for others always has one: generated once into `home` unless PREFECT_SERVER_API_AUTH_STRING is set.

    Raises:
        ConfigurationError: the one that is set cannot be.

    """
    refuse_password(environment)
    given = environment.get("PREFECT_SERVER_API_AUTH_STRING")
    if given or _is_loopback(host(environment)):
        return given or None
    return _kept(password_file(home), lambda: f"{USER}:{secrets.token_urlsafe(24)}")


def password_file(home: Path) -> Path:
    """Where a generated password is."""
    return home / "password"


def encryption_key(home: Path) -> str:
    """The Fernet key of the blocks in the database, which would otherwise keep a key of its own beside them."""
    return _kept(home / "encryption.key", lambda: base64.urlsafe_b64encode(os.urandom(32)).decode())


def _kept(path: Path, made: Callable[[], str]) -> str:
    """What the file says; where there is none, it is made, whole and for its owner only."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(made())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    return path.read_text("ascii").strip()


def _is_loopback(place: str) -> bool:
    try:
        return ipaddress.ip_address(place).is_loopback
    except ValueError:
        return place == "localhost"


def refuse_database(environment: Mapping[str, str]) -> None:
    """Prefect's own complaint would repeat the address, with its password, into the log.

    Raises:
        ConfigurationError: the database's address cannot be.

    """
    url = environment.get("PREFECT_SERVER_DATABASE_CONNECTION_URL")
    if url and not re.match(rf"({'|'.join(map(re.escape, DATABASES))})://", url):
        raise ConfigurationError(
            "PREFECT_SERVER_DATABASE_CONNECTION_URL names no database that Prefect can use; "
            "set postgresql+asyncpg://user:password@host/database.",
        )


def refuse_password(environment: Mapping[str, str]) -> None:
    """Prefect's server compares ASCII only: with any other password it answers everything with an internal error.

    Raises:
        ConfigurationError: the password cannot be.

    """
    if not environment.get("PREFECT_SERVER_API_AUTH_STRING", "").isascii():
        raise ConfigurationError(
            "PREFECT_SERVER_API_AUTH_STRING holds characters that Prefect's server cannot compare; "
            "set user:password in English letters, digits and signs.",
        )
