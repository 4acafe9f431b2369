"""What Prefect's server and worker find in their environment: address, password, keys and Prefect's settings.

What has to outlive a restart is generated once into the stack's folder, for its owner only, and never shown.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tokencore import ConfigurationError, trusted_dotenv

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

DEFAULT_PORT = "4200"  # Prefect's own
LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
DATABASES = ("sqlite+aiosqlite", "postgresql+asyncpg")  # what Prefect's server speaks
USER = "admin"  # of a generated password
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # noqa: S105 - the name of the setting

DEFAULTS = {
    # Nobody is called but KIS and Slack.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # In memory, as is Prefect's default, a slot of a limit that you set stays taken for ever if the server restarts.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Runs are kept for 90 days, not for ever.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    # A run sends a heartbeat each minute (Prefect's least is 30 s): what the automation `A run shows no life` goes by.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    # A window that has ended is kept until it has been judged, which may take as long again as it lasted: with
    # Prefect's minute, most absences of a heartbeat would never be noticed. Some events wait a quarter of an hour.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "PT30M",
}
# Whatever else the user's environment holds (cloud keys, database addresses) is no business of a flow run.
PASSED_ON = re.compile(
    r"(KIS|SLACK|PREFECT|LC|PYTHON|XDG)_?\w*|PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|TZ|TERM|VIRTUAL_ENV|LD_LIBRARY_PATH"
    r"|DO_NOT_TRACK|DBUS_SESSION_BUS_ADDRESS|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|TOKENCORE_\w+"
    r"|(?i:(https?|all|no)_proxy)"
)
ANOTHER_PREFECT = ("PREFECT_API_", "PREFECT_PROFILE")  # the server or profile that the user has for other purposes
SERVER_ONLY = ("PREFECT_SERVER_",)  # the database's address and the key of the blocks among them
WORKER_ONLY = ("KIS_", "SLACK_", "TOKENCORE_")


def load(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The stack's environment: what it passes on of `environment`, with what keeps Prefect in `home`.

    Makes the password and the key of the blocks in `home` where there are none.

    Raises:
        ConfigurationError: the port, the password or the database's address cannot be used.

    """
    check(environment)
    own = {
        "TMPDIR": str(home / "tmp"),  # Prefect's worker leaves something there, under a name that others may own
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{address(environment)}/api",
        "PREFECT_UI_URL": page(environment),
        "PREFECT_SERVER_API_HOST": host(environment),
        "PREFECT_SERVER_API_PORT": str(port(environment)),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "page"),  # otherwise beside Prefect, for its first user alone
        "PREFECT_SERVER_UI_API_URL": "/api",  # otherwise the page asks port 4200, whatever the port is
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(origins(environment)),  # of its two names the one that wins
        "PREFECT_CLI_PROMPT": "false",
        "no_proxy": ",".join(filter(None, [environment.get("no_proxy") or environment.get("NO_PROXY"), LOOPBACK])),
    }
    found = password(home, environment) or _kept(password_file(home), lambda: f"{USER}:{secrets.token_urlsafe(24)}")
    own |= {PASSWORD: found, "PREFECT_API_AUTH_STRING": found}
    passed_on = {name: value for name, value in environment.items() if PASSED_ON.fullmatch(name)}
    passed_on = {name: value for name, value in passed_on.items() if not name.startswith(ANOTHER_PREFECT)}
    given = environment.get("PREFECT_SERVER_ENCRYPTION_KEY")
    own["PREFECT_SERVER_ENCRYPTION_KEY"] = given or _kept(home / "encryption.key", _fernet_key)
    return DEFAULTS | passed_on | own


def for_server(stack: Mapping[str, str]) -> dict[str, str]:
    """The server's part of the stack's environment: no credentials of KIS or Slack."""
    return {name: value for name, value in stack.items() if not name.startswith(WORKER_ONLY)}


def for_worker(stack: Mapping[str, str]) -> dict[str, str]:
    """The worker's part, and that of all its runs: neither the database's address nor the key of the blocks."""
    return {name: value for name, value in stack.items() if not name.startswith(SERVER_ONLY)}


def with_dotenv() -> dict[str, str]:
    """This process's environment, completed with Prefect's settings from `.env` of the working directory.

    Those of KIS and Slack stay where they are: tokencore reads them. It also judges whom a `.env` may come from.

    Raises:
        ConfigurationError: a source of settings cannot be read, or gives an address for a secret of another source.

    """
    found = trusted_dotenv()
    return {**os.environ, **{name: value for name, value in found.items() if name.startswith("PREFECT_")}}


def check(environment: Mapping[str, str]) -> None:
    """Refuse what Prefect would take and then fail with, or would repeat into its log.

    Raises:
        ConfigurationError: the port, the password or the database's address cannot be used.

    """
    port(environment)
    if not environment.get(PASSWORD, "").isascii():
        raise ConfigurationError(
            f"{PASSWORD} holds characters that Prefect's server cannot compare; "
            "set user:password in English letters, digits and signs.",
        )
    url = environment.get("PREFECT_SERVER_DATABASE_CONNECTION_URL")
    if url and not re.match(rf"({'|'.join(map(re.escape, DATABASES))})://", url):
        raise ConfigurationError(
            "PREFECT_SERVER_DATABASE_CONNECTION_URL names no database that Prefect can use; "
            "set postgresql+asyncpg://user:password@host/database.",
        )


def port(environment: Mapping[str, str]) -> int:
    """The port of the server.

    Raises:
        ConfigurationError: PREFECT_SERVER_API_PORT is no port.

    """
    text = environment.get("PREFECT_SERVER_API_PORT") or DEFAULT_PORT
    if not text.isdecimal() or not 0 < int(text) < 65536:  # noqa: PLR2004 - ports end there
        raise ConfigurationError(f"PREFECT_SERVER_API_PORT={text[:20]} is no port; set a number from 1 to 65535.")
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
    place = LOOPBACK if place in EVERYWHERE else place
    return f"http://{f'[{place}]' if ':' in place else place}:{port(environment)}"


def page(environment: Mapping[str, str]) -> str:
    """Where people reach the page: the version whose links lead through its login to where they point."""
    given = (environment.get("PREFECT_UI_URL") or address(environment)).rstrip("/")
    return given if given.endswith("/v2") else f"{given}/v2"


def origins(environment: Mapping[str, str]) -> list[str]:
    """The web origins whose scripts may ask the server: the page's own, by each name that it has."""
    shown = urlsplit(page(environment))
    found = [address(environment), f"{shown.scheme}://{shown.netloc}"]
    if is_local(environment):
        found.append(f"http://localhost:{port(environment)}")
    return list(dict.fromkeys(found))


def hosts(environment: Mapping[str, str]) -> list[str]:
    """The names by which requests may call the server; any, where it listens for other machines."""
    if not is_local(environment):
        return ["*"]
    return [re.sub(r":\d+$", "", urlsplit(one).netloc) for one in origins(environment)]


def is_local(environment: Mapping[str, str]) -> bool:
    """Whether the server listens for this machine only."""
    try:
        return ipaddress.ip_address(host(environment)).is_loopback
    except ValueError:
        return host(environment) == "localhost"


def password(home: Path, environment: Mapping[str, str]) -> str | None:
    """The server's password as `user:password`: the one that is set, or the generated one; None where there is none."""
    if given := environment.get(PASSWORD):
        return given
    return (password_file(home).read_text("ascii").strip() or None) if password_file(home).exists() else None


def password_file(home: Path) -> Path:
    """Where a generated password is."""
    return home / "password"


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(os.urandom(32)).decode()


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What the file holds; where there is none, or an empty one, it is made, whole and for its owner only."""
    if not path.exists() or not path.stat().st_size:
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    return path.read_text("ascii").strip()
