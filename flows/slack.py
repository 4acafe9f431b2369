"""Messages to Slack through slack_sdk: a bot with a channel, which can answer in threads, or a webhook.

The webhook's address and the bot's token are secrets: slack_sdk's own log lines and errors repeat the
first, so neither gets out of this room.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slack_sdk.http_retry import HttpRequest, HttpResponse, RetryHandler, RetryState

    from flows.messages import Message
    from tokencore import Settings

    Thread = tuple[str, str]

API = "https://slack.com/api/"  # where a bot speaks; a webhook is an address of its own
TIMEOUT = 3  # seconds for each step of a request
JITTER = 1.0  # seconds that slack_sdk may add to Slack's Retry-After
_OK, _TOO_MANY = 200, 429

_silent = logging.getLogger("flows.slack.sdk")
_silent.setLevel(logging.CRITICAL + 1)


class Receipt(NamedTuple):
    """What became of a message.

    Attributes:
        refusal: why Slack did not take it; empty when it did.
        again_in: for how many seconds Slack wants to hear nothing, where it said so.
        thread: the channel and the time stamp under which a bot's message is to be answered.

    """

    refusal: str = ""
    again_in: float | None = None
    thread: Thread | None = None


class Send(Protocol):
    """Sends one message."""

    def __call__(self, message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
        """Into that thread, where the way has threads; with `broadcast` the channel sees it too."""


def sender(settings: Settings, patience: float) -> Send | None:
    """What sends messages and begins nothing after `patience` seconds from now; None without Slack settings."""
    until = time.monotonic() + patience
    if settings.slack_bot_token and settings.slack_channel:
        return _guarded(_bot(settings.slack_bot_token.get_secret_value(), settings.slack_channel, until), until)
    if settings.slack_webhook_url:
        return _guarded(_webhook(settings.slack_webhook_url.get_secret_value(), until), until)
    return None


def _guarded(send: Send, until: float) -> Send:
    def attempt(message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
        if time.monotonic() >= until:
            return Receipt("no time left")
        try:
            return send(message, thread, broadcast=broadcast)
        except Exception as error:  # noqa: BLE001 - its text may hold the webhook's address
            return Receipt(type(error).__name__)

    return attempt


def _webhook(url: str, until: float) -> Send:
    def send(message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:  # noqa: ARG001 - a webhook has no threads
        from slack_sdk.webhook import WebhookClient  # loaded when there is something to tell

        client = WebhookClient(url, TIMEOUT, logger=_silent, retry_handlers=_retries(until))
        answer = client.send(text=message.fallback, blocks=message.blocks)
        if answer.status_code == _OK:
            return Receipt()
        return Receipt(f"HTTP {answer.status_code}", _pause(answer.status_code, answer.headers))

    return send


def _bot(token: str, channel: str, until: float) -> Send:
    def send(message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
        from slack_sdk import WebClient  # as above
        from slack_sdk.errors import SlackApiError

        client = WebClient(token, API, TIMEOUT, logger=_silent, retry_handlers=_retries(until))
        where, stamp = thread or (channel, None)
        try:
            answer = client.chat_postMessage(
                channel=where,
                thread_ts=stamp,
                reply_broadcast=broadcast if stamp else None,
                text=message.fallback,
                blocks=message.blocks,
                unfurl_links=False,
            )
        except SlackApiError as error:
            if error.response.status_code == _OK and thread:  # the thread is gone, or the bot has left its channel
                return send(message)
            pause = _pause(error.response.status_code, error.response.headers)
            return Receipt(str(error.response.get("error", "refused")), pause)  # a word, such as channel_not_found
        return Receipt(thread=thread or (str(answer["channel"]), str(answer["ts"])))

    return send


def _pause(status: int, headers: Mapping[str, str]) -> float | None:
    told = next((value for name, value in headers.items() if name.lower() == "retry-after"), "1")
    return float(told) if status == _TOO_MANY and told.isdecimal() else None


def _retries(until: float) -> list[RetryHandler]:
    """Another try after a fault, once, and after Slack's Retry-After where that is over before `until` (monotonic)."""
    from slack_sdk.http_retry.builtin_handlers import (
        ConnectionErrorRetryHandler,
        RateLimitErrorRetryHandler,
        ServerErrorRetryHandler,
    )

    class Patient(RateLimitErrorRetryHandler):
        def _can_retry(
            self,
            *,
            state: RetryState,  # noqa: ARG002 - the signature is slack_sdk's
            request: HttpRequest,  # noqa: ARG002
            response: HttpResponse | None = None,
            error: Exception | None = None,  # noqa: ARG002
        ) -> bool:
            if response is None:
                return False
            pause = _pause(response.status_code, {name: values[0] for name, values in response.headers.items()})
            return pause is not None and time.monotonic() + pause + JITTER < until

    return [ConnectionErrorRetryHandler(), Patient(), ServerErrorRetryHandler()]
