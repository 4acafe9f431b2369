"""What the server and the worker live in: who may come in, and what each of them gets to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flows.stack import surroundings
from tokencore import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

OPEN = {"PREFECT_SERVER_API_HOST": "0.0.0.0"}  # noqa: S104 - nothing listens
SECRETS = {
    "KIS_APP_SECRET": "CanarySecret",
    "SLACK_BOT_TOKEN": "CanaryToken",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://u:CanaryPassword@h/d",
}


@pytest.mark.parametrize("place", ["127.0.0.1", "::1", "localhost", ""])
def test_a_server_for_this_machine_needs_no_password(place: str, folder: Path) -> None:
    """On loopback there is none unless it is set."""
    assert surroundings.password(folder, {"PREFECT_SERVER_API_HOST": place}) is None
    assert surroundings.password(folder, {"PREFECT_SERVER_API_AUTH_STRING": "a:b"}) == "a:b"


@pytest.mark.parametrize("place", ["0.0.0.0", "::", "192.0.2.7", "keeper.example"])  # noqa: S104 - nothing listens
def test_a_server_for_others_always_has_a_password(place: str, folder: Path) -> None:
    """One is made, for its owner only, the same after a restart; server and worker both get it."""
    environment = {"PREFECT_SERVER_API_HOST": place}
    found = surroundings.password(folder, environment)
    assert found
    assert found.startswith("admin:")
    assert len(found) > 30
    assert surroundings.password(folder, environment) == found
    assert oct(surroundings.password_file(folder).stat().st_mode & 0o777) == "0o600"
    for known in (surroundings.for_server(folder, environment), surroundings.for_worker(folder, environment)):
        assert known["PREFECT_API_AUTH_STRING"] == known["PREFECT_SERVER_API_AUTH_STRING"] == found


def test_a_password_that_prefect_cannot_compare_is_said(folder: Path) -> None:
    """Its server would answer everything with an internal error; the sentence names the setting, not the password."""
    with pytest.raises(ConfigurationError, match=r"^PREFECT_SERVER_API_AUTH_STRING holds characters") as caught:
        surroundings.password(folder, {"PREFECT_SERVER_API_AUTH_STRING": "admin:비밀번호"})
    assert "비밀" not in str(caught.value)


def test_programs_of_this_machine_come_in_by_loopback(folder: Path) -> None:
    """Where the server listens everywhere they need no other address; a single one is kept."""
    assert surroundings.for_worker(folder, OPEN)["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert surroundings.for_server(folder, OPEN)["PREFECT_SERVER_API_HOST"] == OPEN["PREFECT_SERVER_API_HOST"]
    assert surroundings.address({"PREFECT_SERVER_API_HOST": "::1"}) == "http://[::1]:4200"


def test_each_gets_only_the_secrets_that_it_needs(folder: Path) -> None:
    """The server none of KIS's or Slack's; the worker neither the database's address nor the key of the blocks."""
    server, worker = surroundings.for_server(folder, SECRETS), surroundings.for_worker(folder, SECRETS)
    assert {name for name in server if "Canary" in server[name]} == {"PREFECT_SERVER_DATABASE_CONNECTION_URL"}
    assert {name for name in worker if "Canary" in worker[name]} == {"KIS_APP_SECRET", "SLACK_BOT_TOKEN"}
    assert "PREFECT_SERVER_ENCRYPTION_KEY" not in worker


def test_the_key_of_the_blocks_is_made_once(folder: Path) -> None:
    """It outlives a restart, its owner alone can read it, and one that is set is taken instead."""
    key = surroundings.for_server(folder, {})["PREFECT_SERVER_ENCRYPTION_KEY"]
    assert surroundings.for_server(folder, {})["PREFECT_SERVER_ENCRYPTION_KEY"] == key
    assert oct((folder / "encryption.key").stat().st_mode & 0o777) == "0o600"
    given = surroundings.for_server(folder, {"PREFECT_SERVER_ENCRYPTION_KEY": "given"})
    assert given["PREFECT_SERVER_ENCRYPTION_KEY"] == "given"


def test_nobody_is_called_but_those_of_the_settings(folder: Path) -> None:
    """Prefect's analytics are off in both."""
    for known in (surroundings.for_server(folder, {}), surroundings.for_worker(folder, {})):
        assert known["DO_NOT_TRACK"] == "1"
        assert known["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_a_database_that_cannot_be_is_refused_without_its_address(folder: Path) -> None:
    """The sentence names the setting and shows a right one."""
    with pytest.raises(ConfigurationError, match="PREFECT_SERVER_DATABASE_CONNECTION_URL") as caught:
        surroundings.for_server(folder, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgres://u:Canary@h/d"})
    assert "Canary" not in str(caught.value)
