"""Messages to Slack through slack_sdk: a webhook, or a bot with a channel.

The webhook's address and the bot's token are secrets: slack_sdk's own log lines and errors repeat the
first, so neither gets out of this room.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from slack_sdk.http_retry import RetryHandler

    from flows.messages import Message
    from tokencore import Settings

    Send = Callable[[Message], str]

API = "https://slack.com/api/"  # where a bot speaks; a webhook is an address of its own
TIMEOUT = 3  # seconds for each step of a request
_OK = 200

_silent = logging.getLogger("flows.slack.sdk")
_silent.setLevel(logging.CRITICAL + 1)


def sender(settings: Settings) -> Send | None:
    """What sends a message and answers why Slack did not take it, empty when it did; None without Slack settings."""
    if settings.slack_webhook_url:
        return _guarded(_webhook(settings.slack_webhook_url.get_secret_value()))
    if settings.slack_bot_token and settings.slack_channel:
        return _guarded(_bot(settings.slack_bot_token.get_secret_value(), settings.slack_channel))
    return None


def _guarded(send: Send) -> Send:
    def attempt(message: Message) -> str:
        try:
            return send(message)
        except Exception as error:  # noqa: BLE001 - its text may hold the webhook's address
            return type(error).__name__

    return attempt


def _webhook(url: str) -> Send:
    def send(message: Message) -> str:
        from slack_sdk.webhook import WebhookClient  # loaded when there is something to tell

        client = WebhookClient(url, TIMEOUT, logger=_silent, retry_handlers=_retries())
        answer = client.send(text=message.fallback, blocks=message.blocks)
        return "" if answer.status_code == _OK else f"HTTP {answer.status_code}"

    return send


def _bot(token: str, channel: str) -> Send:
    def send(message: Message) -> str:
        from slack_sdk import WebClient  # as above
        from slack_sdk.errors import SlackApiError

        client = WebClient(token, API, TIMEOUT, logger=_silent, retry_handlers=_retries())
        try:
            client.chat_postMessage(channel=channel, text=message.fallback, blocks=message.blocks, unfurl_links=False)
        except SlackApiError as error:
            return str(error.response.get("error", "refused"))  # a word, such as channel_not_found
        return ""

    return send


def _retries() -> list[RetryHandler]:
    from slack_sdk.http_retry.builtin_handlers import (
        ConnectionErrorRetryHandler,
        RateLimitErrorRetryHandler,
        ServerErrorRetryHandler,
    )

    return [ConnectionErrorRetryHandler(), RateLimitErrorRetryHandler(), ServerErrorRetryHandler()]
