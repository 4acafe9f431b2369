"""The environment of Prefect's server and worker: address, password, keys and Prefect's settings.

What has to outlive a restart is generated once in the stack's folder, for its owner only; only the demo shows it.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.stack.api import Api
from tokencore import ConfigurationError, Settings, private_folder, trusted_dotenv

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PORT = "4200"  # Prefect's own
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - compared with, not listened on
THIS_MACHINE = re.compile(r"localhost|127\.[\d.]+")
DATABASES = ("sqlite+aiosqlite://", "postgresql+asyncpg://")  # what Prefect's server speaks
USER = "admin"  # the user of a generated password
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # noqa: S105 - the name of the setting
BLOCKS_KEY = "PREFECT_SERVER_ENCRYPTION_KEY"
LISTENER = "STACK_LISTENER"  # the file descriptor of the socket on the server's port, for the processes of the stack

DEFAULTS = {
    # No service is contacted except KIS and Slack.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # In memory, Prefect's default, a slot of a concurrency limit would stay taken forever if the server restarts.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Runs are kept for 90 days, not forever.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    # A run sends a heartbeat each minute (Prefect's least is 30 s); the automation `A run shows no life` relies on it.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    # How long a window is kept after its end until it is evaluated, which may take as long again as the window lasted:
    # with Prefect's minute, most missing heartbeats would go unnoticed. Some events wait a quarter of an hour.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "PT30M",
}
# Whatever else the user's environment holds (cloud keys, database addresses) is none of a flow run's business.
PASSED_ON = re.compile(
    r"(KIS|SLACK|PREFECT|LC|PYTHON|XDG)_?\w*|PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|TZ|TERM|VIRTUAL_ENV|LD_LIBRARY_PATH"
    r"|DO_NOT_TRACK|DBUS_SESSION_BUS_ADDRESS|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|TOKENCORE_\w+"
    r"|(?i:(https?|all|no)_proxy)"
)
ANOTHER_PREFECT = ("PREFECT_API_", "PREFECT_PROFILE")  # the server or profile that the user has for other purposes


def load(home: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the stack's environment: the part of `given` that is passed on, and settings that keep Prefect in `home`.

    Creates the password and the blocks' encryption key in `home` if there are none.

    Raises:
        ConfigurationError: the port, the password or the database's address cannot be used.
    """
    _check(given)
    secret = given.get(PASSWORD) or _kept(password_file(home), f"{USER}:{secrets.token_urlsafe(24)}")
    fernet_key = base64.urlsafe_b64encode(os.urandom(32)).decode()
    own = {
        "TMPDIR": str(home / "tmp"),  # Prefect's worker leaves files there, under a name that others may own
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{address(given)}/api",
        "PREFECT_API_AUTH_STRING": secret,
        "PREFECT_UI_URL": page(given),
        PASSWORD: secret,
        BLOCKS_KEY: given.get(BLOCKS_KEY) or _kept(home / "encryption.key", fernet_key),
        "PREFECT_SERVER_API_HOST": host(given),
        "PREFECT_SERVER_API_PORT": str(port(given)),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "page"),  # otherwise in Prefect's folder, for its first user
        "PREFECT_SERVER_UI_API_URL": "/api",  # otherwise the page asks port 4200, whatever the port is
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(origins(given)),  # of its two names, this one wins
        "PREFECT_CLI_PROMPT": "false",
        "no_proxy": ",".join(filter(None, [given.get("no_proxy") or given.get("NO_PROXY"), LOOPBACK])),
    }
    passed_on = {name for name in given if PASSED_ON.fullmatch(name) and not name.startswith(ANOTHER_PREFECT)}
    return DEFAULTS | {name: given[name] for name in passed_on} | own


def _check(given: Mapping[str, str]) -> None:
    if not given.get(PASSWORD, "").isascii():
        raise ConfigurationError(
            f"{PASSWORD} holds characters that Prefect's server cannot compare; "
            "set user:password in English letters, digits and signs.",
        )
    url = given.get("PREFECT_SERVER_DATABASE_CONNECTION_URL")
    if url and not url.startswith(DATABASES):  # Prefect would log it with its password
        raise ConfigurationError(
            "PREFECT_SERVER_DATABASE_CONNECTION_URL names no database that Prefect can use; "
            "set postgresql+asyncpg://user:password@host/database.",
        )


def with_dotenv() -> dict[str, str]:
    """Return this process's environment, completed with Prefect's settings from `.env` in the working directory.

    Those for KIS and Slack are left out: tokencore reads them itself. It also decides whether to trust a `.env`.
    """
    return {**os.environ, **{name: value for name, value in trusted_dotenv().items() if name.startswith("PREFECT_")}}


def port(environment: Mapping[str, str]) -> int:
    """Return the server's port.

    Raises:
        ConfigurationError: the setting is not a port.
    """
    text = environment.get("PREFECT_SERVER_API_PORT") or DEFAULT_PORT
    if not text.isdecimal() or not 0 < int(text) < 65536:  # noqa: PLR2004 - ports end there
        raise ConfigurationError(f"PREFECT_SERVER_API_PORT={text[:20]} is not a port; set a number from 1 to 65535.")
    return int(text)


def host(environment: Mapping[str, str]) -> str:
    """Return the address on which the server listens."""
    return environment.get("PREFECT_SERVER_API_HOST") or LOOPBACK


def address(environment: Mapping[str, str]) -> str:
    """Return the server's URL for programs on this machine."""
    place = host(environment)
    return f"http://{LOOPBACK if place == EVERYWHERE else place}:{port(environment)}"


def page(environment: Mapping[str, str]) -> str:
    """Return the UI's URL for people: its version 2, whose links still lead to their target after the login.

    Raises:
        ConfigurationError: PREFECT_UI_URL is not an address that a browser can open.
    """
    given = (environment.get("PREFECT_UI_URL") or address(environment)).rstrip("/")
    if not re.fullmatch(r"(?i)https?://(\[[\da-f:.]+\]|[^\[\]@\s/?#:]+)(:\d+)?(/\S*)?", given):
        raise ConfigurationError("PREFECT_UI_URL is not the address of a page; set http://host:port or https://host.")
    return given if given.endswith("/v2") else f"{given}/v2"


def origins(environment: Mapping[str, str]) -> list[str]:
    """Return the web origins whose scripts may call the server: the UI's own, by each of its names."""
    shown = urlsplit(page(environment))
    found = (address(environment), f"{shown.scheme}://{shown.netloc}", f"http://localhost:{port(environment)}")
    return list(dict.fromkeys(found))


def hosts(environment: Mapping[str, str]) -> list[str]:
    """Return the host names that requests may use for the server; any, if it listens for other machines."""
    if not THIS_MACHINE.fullmatch(host(environment)):
        return ["*"]
    return [urlsplit(one).hostname or "" for one in origins(environment)]


def home(settings: Settings) -> Path:
    """Return the stack's folder; if it exists, it was checked to be private.

    Raises:
        TokenStoreError: another user may have put something into it.
    """
    found = Path(settings.token_dir).absolute() / "prefect"
    if found.exists():
        private_folder(str(found))
    return found


def api(folder: Path, given: Mapping[str, str], timeout: float = 30) -> Api:
    """Return a client of the server that is `given`, with its password; `timeout` is in seconds for each answer."""
    return Api(address(given), password(folder, given), timeout)


def password(folder: Path, environment: Mapping[str, str]) -> str | None:
    """Return the server's password as `user:password`, set or generated; None if there is none."""
    file = password_file(folder)
    return environment.get(PASSWORD) or (file.read_text("ascii").strip() if file.exists() else "") or None


def password_file(folder: Path) -> Path:
    """Return the path of the generated password."""
    return folder / "password"


def _kept(path: Path, fresh: str) -> str:
    """Return the file's content; if the file is missing or empty, write `fresh` to it first."""
    if not path.exists() or not path.stat().st_size:
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.touch(0o600)
        draft.write_text(fresh, "ascii")
        draft.replace(path)
    return path.read_text("ascii").strip()
