"""Messages to Slack through slack_sdk: a bot with a channel, which can answer in threads, or a webhook.

The webhook's address and the bot's token are secrets: slack_sdk's own log lines and errors repeat the first, so
neither leaves this module.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from slack_sdk.http_retry import RetryHandler

    from flows.alerts.messages import Message
    from tokencore import Settings

    Thread = tuple[str, str]

API = "https://slack.com/api/"  # where a bot speaks; a webhook is an address of its own
TIMEOUT = 3  # seconds for each step of a request
OK = 200
ARCHIVED = "the channel is archived: unarchive it, or choose another one"
FIXES = {  # what Slack says, and what to do
    "channel_not_found": "correct SLACK_CHANNEL, and invite the bot into the channel if it is private",
    "channel_is_archived": ARCHIVED,
    "is_archived": ARCHIVED,
    "not_in_channel": "invite the bot into the channel (/invite), or give it the scope chat:write.public",
    "missing_scope": "give the bot the scope chat:write, and install it again",
    "invalid_auth": "correct SLACK_BOT_TOKEN: it begins with xoxb-",
    "not_authed": "set SLACK_BOT_TOKEN: it begins with xoxb-",
    "account_inactive": "the bot was removed: install it again, and set its new SLACK_BOT_TOKEN",
    "token_revoked": "the bot's token was revoked: install it again, and set its new SLACK_BOT_TOKEN",
    "token_expired": "the bot's token has expired: install it again, and set its new SLACK_BOT_TOKEN",
    "restricted_action": "ask who administers Slack to let the bot post in this channel",
    "action_prohibited": "ask who administers Slack to let the webhook post in this channel",
    "posting_to_general_channel_denied": "choose another channel, or ask who administers Slack",
    "invalid_blocks": "this is a fault of tokencore's: please report it; the message is in the run's log",
    "invalid_payload": "this is a fault of tokencore's: please report it; the message is in the run's log",
    "no_service": "correct SLACK_WEBHOOK_URL, or make a new webhook: this one was disabled or removed",
    "no_team": "correct SLACK_WEBHOOK_URL: its workspace no longer exists",
    "invalid_token": "correct SLACK_WEBHOOK_URL: it is incomplete",
    "HTTP 403": "correct SLACK_WEBHOOK_URL, or ask who administers Slack why it is forbidden",
    "HTTP 404": "correct SLACK_WEBHOOK_URL, or make a new webhook: this one is unknown or was removed",
    "HTTP 429": "Slack asks for less: the next run sends the message",
    "ValueError": "correct SLACK_WEBHOOK_URL: it is not an address; copy it again from Slack",
    "URLError": "check this machine's network and its proxy",
    "TimeoutError": "check this machine's network; the next run sends the message",
}
AGAIN = "the next run sends the message"

_silent = logging.getLogger("flows.alerts.slack.sdk")
_silent.setLevel(logging.CRITICAL + 1)


class Receipt(NamedTuple):
    """What became of a message.

    Attributes:
        refusal: Slack's word, HTTP's status or the fault where Slack did not accept it; empty where it did.
        thread: the channel and the time stamp under which a bot's message is to be answered.

    """

    refusal: str = ""
    thread: Thread | None = None

    @property
    def fix(self) -> str:
        """What to do about the refusal."""
        return FIXES.get(self.refusal, AGAIN)


class Send(Protocol):
    """Sends one message."""

    def __call__(self, message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
        """Into that thread, where the way has threads; with `broadcast` the channel sees it too. Never raises."""


def sender(settings: Settings) -> Send | None:
    """What sends messages the way the settings say; None without Slack settings."""
    if settings.slack_bot_token and settings.slack_channel:
        return _guarded(_bot(settings.slack_bot_token.get_secret_value(), settings.slack_channel))
    if settings.slack_webhook_url:
        return _guarded(_webhook(settings.slack_webhook_url.get_secret_value()))
    return None


def _guarded(send: Send) -> Send:
    def attempt(message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
        try:
            return send(message, thread, broadcast=broadcast)
        except Exception as error:  # noqa: BLE001 - its text may contain the webhook's address
            return Receipt(type(error).__name__)

    return attempt


def _webhook(url: str) -> Send:
    def send(message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:  # noqa: ARG001 - a webhook has no threads
        from slack_sdk.webhook import WebhookClient  # loaded when there is something to send

        answer = WebhookClient(url, TIMEOUT, logger=_silent, retry_handlers=_retries()).send(
            text=message.fallback, blocks=message.blocks
        )
        return Receipt() if answer.status_code == OK else Receipt(_word(answer.body, answer.status_code))

    return send


def _bot(token: str, channel: str) -> Send:
    def send(message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
        from slack_sdk import WebClient  # as above
        from slack_sdk.errors import SlackApiError

        client = WebClient(token, API, TIMEOUT, logger=_silent, retry_handlers=_retries())
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
            if error.response.status_code == OK and thread:  # the thread is gone, or the bot has left its channel
                return send(message)
            return Receipt(_word(str(error.response.get("error", "")), error.response.status_code))
        return Receipt(thread=thread or (str(answer["channel"]), str(answer["ts"])))

    return send


def _word(said: str, status: int) -> str:
    """Slack's own word, such as `channel_is_archived`; HTTP's status where it says anything else."""
    return said if re.fullmatch(r"[a-z]+(_[a-z]+)+", said) else f"HTTP {status}"


def _retries() -> list[RetryHandler]:
    """slack_sdk's own: another try after a lost connection, a fault of Slack's, and its Retry-After."""
    from slack_sdk.http_retry.builtin_handlers import (
        ConnectionErrorRetryHandler,
        RateLimitErrorRetryHandler,
        ServerErrorRetryHandler,
    )

    return [ConnectionErrorRetryHandler(), RateLimitErrorRetryHandler(), ServerErrorRetryHandler()]
