"""The automations for real: made by the command of the deployments, fired by kills, heard at a Slack on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings
from running import asked, until
from slack_endpoint import SlackEndpoint
from stacks import PASSWORD, SLOW, WEBHOOK, in_proc

from flows import slack
from flows.stack import automations, surroundings
from flows.stack.crew import birth
from flows.words import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stacks import Up

NAMES = [rule.name for rule in automations.rules(automations.Patience(), ENGLISH)]
SHORT = automations.Patience(*[timedelta(seconds=10)] * 4)  # Prefect has no shorter windows
BOT = "xoxb-Canary-Token"
MINUTE = 60
WAIT, TRIES = 100, 3  # seconds for a message to come, and how often to ask for it; two idle cores take 31 s once
pytestmark = in_proc


@pytest.fixture
def client(up: Up, tmp_path: Path) -> Iterator[None]:
    """Prefect's client in this process talks to the stack."""
    with temporary_settings(
        {PREFECT_API_URL: f"{up.url}/api", PREFECT_API_AUTH_STRING: PASSWORD, PREFECT_HOME: tmp_path}
    ):
        yield


def made(up: Up) -> dict[str, dict[str, Any]]:
    """The automations on the server, by name; two of one name are an error."""
    found = up.api("POST", "automations/filter", {}).json()
    assert len({one["name"] for one in found}) == len(found)
    return {one["name"]: one for one in found}


def told(endpoint: SlackEndpoint) -> list[str]:
    """What the server's automations told, as text; the flows' own messages have blocks."""
    return [message["text"] for message in endpoint.told if "blocks" not in message]


def crash(up: Up) -> str:
    """A run of the check in the far future that crashed; its name."""
    deployment = up.api("GET", "deployments/name/check-tokens/check_tokens").json()["id"]
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    run = up.api("POST", f"deployments/{deployment}/create_flow_run", {"state": later}).json()
    up.api("POST", f"flow_runs/{run['id']}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    name: str = run["name"]
    return name


def heard(endpoint: SlackEndpoint, words: str) -> bool:
    """Whether Slack is told this in time."""
    with contextlib.suppress(AssertionError):
        until(lambda: any(words in text for text in told(endpoint)), WAIT)
        return True
    return False


def crash_told(up: Up, endpoint: SlackEndpoint) -> str:
    """What Slack is told of such a run; of another one where Prefect keeps the event back (see below)."""
    for _ in range(TRIES):
        name = crash(up)
        if heard(endpoint, name):
            break
    return next(text for text in told(endpoint) if name in text)


def stored(up: Up) -> bytes:
    """All that the stack keeps: database, write-ahead log, logs."""
    return b"".join(path.read_bytes() for path in up.folder.rglob("*") if path.is_file())


def test_up_made_them(up: Up) -> None:
    """Every automation is there when `up` returns, switched on, with our mark."""
    there = made(up)
    assert sorted(there) == sorted(NAMES)
    assert all(one["enabled"] and one["tags"] == [automations.OWNED] for one in there.values())


def test_a_crash_is_told_with_what_to_do(up: Up) -> None:
    """Within seconds Slack has whose crash it is, what still works, what to do and the link to the run."""
    text = crash_told(up, up.slack)
    assert re.match(r"\*:rotating_light: A run crashed: [a-z-]+\*\n", text)
    assert "*Still works:* cached tokens" in text
    assert "*To do:* " in text
    assert f"{up.url}/runs/flow-run/" in text


def test_a_slack_that_refuses_leaves_no_address_in_the_log(up: Up) -> None:
    """The server tries again, and logs the kind of the error, not its text with the webhook's address."""
    up.slack.answers.append(403)
    assert crash_told(up, up.slack)
    log = (up.folder / "server.log").read_text()
    assert "HTTPStatusError" in log
    assert WEBHOOK not in log


def test_the_way_to_slack_is_encrypted(up: Up) -> None:
    """The block is in the database, the webhook's address in nothing of the stack's; nor is the key in the database."""
    crash(up)
    database = (up.folder / "prefect.db").read_bytes() + (up.folder / "prefect.db-wal").read_bytes()
    assert b"tokencore-slack" in database
    assert WEBHOOK.encode() not in stored(up)
    assert surroundings.encryption_key(up.folder).encode() not in database
    with sqlite3.connect(up.folder / "prefect.db") as tables:
        assert not tables.execute("SELECT * FROM configuration WHERE key = 'ENCRYPTION_KEY'").fetchall()


@pytest.mark.usefixtures("client")
def test_a_bot_tells_it_too_and_its_token_is_encrypted(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bot's token and a channel the message goes to chat.postMessage; the token is nowhere in clear."""
    monkeypatch.setenv("SLACK_BOT_TOKEN", BOT)
    monkeypatch.setenv("SLACK_CHANNEL", "#tokens")
    with SlackEndpoint() as endpoint:
        monkeypatch.setattr(slack, "API", f"{endpoint.url}/api/")
        automations.upsert()
        assert crash_told(up, endpoint)
        assert endpoint.requests[0] == ("/api/chat.postMessage", f"Bearer {BOT}")
        assert endpoint.told[0]["channel"] == "#tokens"
    assert BOT.encode() not in stored(up)


@pytest.mark.usefixtures("client")
def test_made_again_they_are_the_same(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """No duplicate, one of ours that is no more goes, one that a person made or switched off stays as it is."""
    before = made(up)
    switched_off, renamed = before[NAMES[0]], before[NAMES[1]]
    up.api("PATCH", f"automations/{switched_off['id']}", {"enabled": False})
    content = {key: value for key, value in renamed.items() if key not in ("id", "created", "updated")}
    up.api("POST", "automations/", content | {"name": "A person's", "tags": []})
    up.api("POST", "automations/", content | {"name": "Ours of old"})
    monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{up.slack.url}/services/{WEBHOOK}")
    automations.upsert()
    automations.upsert()
    after = made(up)
    assert sorted(after) == sorted([*NAMES, "A person's"])
    assert {name: after[name]["id"] for name in NAMES} == {name: before[name]["id"] for name in NAMES}
    assert [name for name in after if not after[name]["enabled"]] == [NAMES[0]]
    up.api("PATCH", f"automations/{switched_off['id']}", {"enabled": True})
    up.api("DELETE", "automations/" + after["A person's"]["id"])


@pytest.mark.usefixtures("client")
def test_without_slack_they_still_mark_dead_runs(up: Up) -> None:
    """The block goes with the settings, and the automations stay, with what they do beside telling."""
    automations.upsert()
    there = made(up)
    assert sorted(there) == sorted(NAMES)
    kinds = {action["type"] for one in there.values() for action in one["actions"]}
    assert kinds == {"do-nothing", "change-flow-run-state"}
    unheard = {name for name, one in there.items() if automations.UNHEARD in one["description"]}
    assert unheard == {name for name, one in there.items() if one["actions"][0]["type"] == "do-nothing"}
    assert up.api("POST", "block_documents/filter", {}).json() == []


@pytest.mark.usefixtures("client")
def test_a_killed_worker_is_told(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker and run killed, none to start them again: no worker, a late run, a missing check, a run marked Crashed.

    It is done again where one of them stays away: Prefect keeps an event that overtook its forerunner, as happens on
    a busy machine, for a quarter of an hour.
    """
    monkeypatch.setenv("SLACK_WEBHOOK_URL", f"{up.slack.url}/services/{WEBHOOK}")
    missing = ["No worker", "A run is late", "The hourly check is missing", "A run crashed: refresh kr"]
    for _ in range(TRIES):
        automations.upsert(SHORT)  # before the run gives the sign of life that it is judged by
        missing = not_told(up, missing)
        automations.upsert()
        if not missing:
            break
    assert missing == []


def not_told(up: Up, expected: list[str]) -> list[str]:
    """Which of the messages Slack does not get after worker and run were killed in the midst of a renewal."""
    up.gateway.set_rules(latency=60)
    refresh = up.api("GET", "deployments/name/refresh-token/refresh_token").json()["id"]
    parameters = {"parameters": {"market": "kr", "operator": "Kim", "force": True, "reason": "test"}}

    def create() -> str:
        made: str = up.api("POST", f"deployments/{refresh}/create_flow_run", parameters).json()["id"]
        return made

    until(lambda: cooled_down(up), 2 * MINUTE)
    run, before, processes = create(), asked(up.gateway), up.processes()
    until(lambda: asked(up.gateway) > before, SLOW)
    os.kill(processes["supervisor"], signal.SIGSTOP)  # it would start another worker within seconds
    try:
        os.kill(processes["worker"], signal.SIGKILL)
        os.kill(int(up.api("GET", f"flow_runs/{run}").json()["infrastructure_pid"]), signal.SIGKILL)
        late = create()
        missing = [words for words in expected if not heard(up.slack, words)]
        up.api("POST", f"flow_runs/{late}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
        return missing
    finally:
        up.gateway.set_rules(latency=0)
        os.kill(processes["supervisor"], signal.SIGCONT)
        until(lambda: up.processes().get("worker", processes["worker"]) != processes["worker"], SLOW)
        assert not birth(processes["worker"])


def cooled_down(up: Up) -> bool:
    """Whether KIS's minute since the last request is over."""
    check = [sys.executable, "-m", "tokencore", "check", "kr", "--json"]
    shown = subprocess.run(check, env=up.place.environment, cwd=up.place.work, capture_output=True, check=False).stdout
    return json.loads(shown)[0]["cooldown_until"] is None
