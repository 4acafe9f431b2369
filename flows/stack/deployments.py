"""Apply prefect.yaml and automations.yaml as the settings require: what runs when, and who hears if it does not run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from flows.stack.api import POOL, StackError
from tokencore import Key, Settings, sessions

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from flows.stack.api import Api

PREFECT_FILE = Path(__file__).resolve().parents[2] / "prefect.yaml"
AUTOMATIONS_FILE = Path(__file__).with_name("automations.yaml")
OURS = "tokencore"  # the tag of the automations that are ours to change and to remove
BLOCK = "tokencore-slack"
UNHEARD = " Nobody hears of it: the settings have no way to Slack."
TRIES = 3  # SQLite under load makes the server answer 503; Prefect's own client asks six times, then gives up


def apply(api: Api, folder: Path) -> None:
    """Bring deployments and automations up to date on the server of this process's settings; repeating it is harmless.

    Raises:
        StackError: Prefect did not accept the deployments, or gave no answer.
    """
    settings = Settings.load()
    traded = {sessions.exchange(code).code for key in Key.load(settings) for code in key.exchanges}
    table = by_settings(yaml.safe_load(PREFECT_FILE.read_text("utf-8")), traded)
    os.chdir(folder)  # Prefect reads `.env` and `prefect.toml` in the folder where it is loaded
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump(table), "utf-8")
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    if all(subprocess.run(command, check=False, cwd=folder).returncode for _ in range(TRIES)):  # noqa: S603 - our own command
        raise StackError("Prefect did not take the deployments.")
    _remove_others(api, {one["name"] for one in table["deployments"]})
    _apply_automations(settings)


def by_settings(table: dict[str, Any], traded: Collection[str]) -> dict[str, Any]:
    """Return the deployments without the warm-ups of exchanges that nobody trades, and with the others switched on."""
    kept = [one for one in table["deployments"] if one.get("parameters", {}).get("exchange") in (None, *traded)]
    for one in kept:
        one["tags"] = [tag for tag in one["tags"] if tag != "off"]
        one["schedules"] = [{k: v for k, v in each.items() if k != "active"} for each in one["schedules"]]
    return {**table, "deployments": kept}


def _remove_others(api: Api, wanted: Collection[str]) -> None:
    """Remove the warm-ups of exchanges that are no longer traded: they would keep running, and fail."""
    warm_ups = {"flows": {"name": {"any_": ["warm-up"]}}, "work_pools": {"name": {"any_": [POOL]}}}
    for one in api.ask("POST", "deployments/filter", warm_ups):
        if one["name"] not in wanted and one["name"] in sessions.EXCHANGES:
            api.ask("DELETE", f"deployments/{one['id']}")


def _apply_automations(settings: Settings) -> None:
    """Update our automations, known by name and tag; delete obsolete ones, keep off what people switched off."""
    from prefect.client.orchestration import get_client

    wanted = automations(settings.slack_language, _slack_block(settings))
    with get_client(sync_client=True) as client:
        ours = {one.name: one for one in client.read_automations() if OURS in one.tags}
        for name in ours.keys() - wanted.keys():
            client.delete_automation(ours[name].id)
        for name, made in wanted.items():
            if known := ours.get(name):
                made.enabled = known.enabled
                # The client leaves out fields that were not set, but the server needs them; the owner it refuses.
                full = type(made).model_validate(made.model_dump(exclude={"owner_resource"}))
                client.update_automation(known.id, full)
            else:
                client.create_automation(made)


def automations(language: str, block: UUID | None) -> dict[str, Any]:
    """Return the automations of automations.yaml by name; they send messages with `block`, or none without one."""
    from prefect.events.schemas.automations import AutomationCore

    found = {}
    for entry in yaml.safe_load(AUTOMATIONS_FILE.read_text("utf-8")):
        message, actions = entry.pop("message", None), entry.pop("actions", [])
        if message and block:
            actions.append({"type": "send-notification", "block_document_id": block, **message[language]})
        elif message:
            entry["description"] += UNHEARD
        actions = actions or [{"type": "do-nothing"}]
        entry["trigger"]["type"] = "event"
        found[entry["name"]] = AutomationCore.model_validate({**entry, "tags": [OURS], "actions": actions})
    return found


def _slack_block(settings: Settings) -> UUID | None:
    """Save the settings for Slack on the server, secrets encrypted; return the block's id, or None without settings."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    text = "*{{subject}}*\n{{body}}"
    if settings.slack_bot_token and settings.slack_channel:
        way: dict[str, object] = {
            "url": "https://slack.com/api/chat.postMessage",
            "headers": {"Authorization": "Bearer {{token}}"},
            "json_data": {"channel": settings.slack_channel, "text": text, "unfurl_links": False},
            "secrets": {"token": settings.slack_bot_token.get_secret_value()},
        }
    elif settings.slack_webhook_url:
        webhook = settings.slack_webhook_url.get_secret_value()
        way = {"url": "{{webhook}}", "json_data": {"text": text}, "secrets": {"webhook": webhook}}
    else:
        kind = CustomWebhookNotificationBlock.get_block_type_slug()
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
            client.delete_block_document(client.read_block_document_by_name(BLOCK, kind).id)
        return None
    block = CustomWebhookNotificationBlock.model_validate({"name": "Slack", "timeout": 10, **way})
    return cast("UUID", block.save(BLOCK, overwrite=True))  # not a coroutine: there is no event loop here
