"""How Prefect's server reaches Slack, and what its automations say there.

The webhook's address and the bot's token go into the secrets of a block, whose content the server encrypts with
the key of this stack; its database has neither in clear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from flows import slack

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    from flows.words import Words
    from tokencore import Settings

BLOCK = "tokencore-slack"
TIMEOUT = 10  # seconds for Slack to answer the server
_RUN_NAME, _RUN_PAGE = "{{ flow_run.name }}", "{{ flow_run|ui_url }}"


class Notice(NamedTuple):
    """What an automation tells, as Prefect's templates: the server fills them in by itself, without our code."""

    subject: str
    body: str


def crashed(words: Words) -> Notice:
    """Of a run whose process ended before it did."""
    return _notice(words, "crashed", words("server.next"), run=_RUN_NAME)


def late(words: Words) -> Notice:
    """Of a run that nothing starts."""
    return _notice(words, "late", None, run=_RUN_NAME)


def no_worker(words: Words) -> Notice:
    """Of a work pool without a worker."""
    return _notice(words, "worker", None)


def no_check(words: Words, gone: timedelta) -> Notice:
    """Of `gone` without a check."""
    return _notice(words, "check", None, gone=words.lasted(gone))


def _notice(words: Words, what: str, next_attempt: str | None, **facts: str) -> Notice:
    """A headline, what happened, what still works, what is next, what to do, and the run where there is one."""
    answers = [("works", words("works.cached")), ("next", next_attempt), ("do", words(f"server.{what}.do"))]
    lines = [f"*{words(f'label.{name}')}:* {text}" for name, text in answers if text]
    if "run" in facts:
        lines.append(f"{words('label.run')}: <{_RUN_PAGE}|{_RUN_NAME}>")
    said = words(f"server.{what}.said", **facts)
    return Notice(f":rotating_light: {words(f'server.{what}.head', **facts)}", "\n".join([said, *lines]))


def save(settings: Settings) -> UUID | None:
    """Have the block for the settings' way to Slack on the server; its id. Without a way there is none."""
    wanted = _block(settings)
    if wanted:
        block = CustomWebhookNotificationBlock.model_validate({"name": "Slack", "timeout": TIMEOUT, **wanted})
        return cast("UUID", block.save(BLOCK, overwrite=True))  # no coroutine: there is no event loop here
    with get_client(sync_client=True) as client:
        try:
            known = client.read_block_document_by_name(BLOCK, CustomWebhookNotificationBlock.get_block_type_slug())
        except ObjectNotFound:
            return None
        client.delete_block_document(known.id)
    return None


def _block(settings: Settings) -> dict[str, object] | None:
    text = "*{{subject}}*\n{{body}}"
    if settings.slack_bot_token and settings.slack_channel:
        return {
            "url": f"{slack.API}chat.postMessage",
            "headers": {"Authorization": "Bearer {{token}}"},
            "json_data": {"channel": settings.slack_channel, "text": text, "unfurl_links": False},
            "secrets": {"token": settings.slack_bot_token.get_secret_value()},
        }
    if settings.slack_webhook_url:
        return {
            "url": "{{webhook}}",
            "json_data": {"text": text},
            "secrets": {"webhook": settings.slack_webhook_url.get_secret_value()},
        }
    return None
