"""Send messages to Slack with slack_sdk, by a bot in a channel, which can reply in threads, or by a webhook.

The webhook's address and the bot's token are secrets. The log lines and errors of slack_sdk repeat the address, so
neither leaves this module.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from slack_sdk.http_retry import RetryHandler

    from flows.alerts.messages import Message
    from tokencore import Settings

    Thread = tuple[str, str]

API = "https://slack.com/api/"  # for a bot; a webhook has its own address
TIMEOUT = 3  # seconds for each step of a request
OK = 200
REINSTALL = "install the bot again, and set its new SLACK_BOT_TOKEN"
ASK = "ask who administers Slack to allow posts there, or choose another channel"
ARCHIVED = "the channel is archived: unarchive it, or choose another one"
REPORT = "this is a bug in tokencore: please report it; the message is in the run's log"
FIXES = {  # what Slack says, and what to do
    "channel_not_found": "correct SLACK_CHANNEL, and invite the bot into the channel if it is private",
    "not_in_channel": "invite the bot into the channel (/invite), or give it the scope chat:write.public",
    "missing_scope": "give the bot the scope chat:write, and install it again",
    **dict.fromkeys(("invalid_auth", "not_authed"), "set SLACK_BOT_TOKEN again: it begins with xoxb-"),
    **dict.fromkeys(("account_inactive", "token_revoked", "token_expired"), REINSTALL),
    **dict.fromkeys(("restricted_action", "action_prohibited", "posting_to_general_channel_denied"), ASK),
    **dict.fromkeys(("channel_is_archived", "is_archived"), ARCHIVED),
    **dict.fromkeys(("invalid_blocks", "invalid_payload"), REPORT),
    "no_service": "correct SLACK_WEBHOOK_URL, or make a new webhook: this one was disabled or removed",
    "no_team": "correct SLACK_WEBHOOK_URL: its workspace no longer exists",
    "invalid_token": "correct SLACK_WEBHOOK_URL: it is incomplete",
    "HTTP 403": "correct SLACK_WEBHOOK_URL, or ask who administers Slack why it is forbidden",
    "HTTP 404": "correct SLACK_WEBHOOK_URL, or make a new webhook: this one is unknown or was removed",
    **dict.fromkeys(
        ("ValueError", "SlackRequestError", "InvalidURL"),
        "correct SLACK_WEBHOOK_URL: it is not an address; copy it again from Slack",
    ),
    "URLError": "check this machine's network and its proxy",
    "TimeoutError": "check this machine's network",
}

_silent = logging.getLogger("flows.alerts.slack.sdk")
_silent.setLevel(logging.CRITICAL + 1)


class Receipt(NamedTuple):
    """The result of sending a message."""

    refusal: str = ""  # Slack's word, the HTTP status or the exception, if Slack did not accept it
    thread: Thread | None = None  # the channel and the time stamp with which to reply to a bot's message

    @property
    def fix(self) -> str:
        """What to do about the refusal."""
        return FIXES.get(self.refusal, "alerts are sent again by the next run")


def is_configured(settings: Settings) -> bool:
    """Whether the settings have a way to Slack."""
    return bool((settings.slack_bot_token and settings.slack_channel) or settings.slack_webhook_url)


def send(settings: Settings, message: Message, thread: Thread | None = None, *, broadcast: bool = False) -> Receipt:
    """Send a message as the settings say; never raises. Without settings for Slack, nothing is sent or refused.

    A bot replies in `thread`; with `broadcast`, its channel sees the reply too. A webhook has no threads.
    """
    try:
        if settings.slack_bot_token and settings.slack_channel:
            token, channel = settings.slack_bot_token.get_secret_value(), (settings.slack_channel, None)
            receipt = _by_bot(token, message, thread or channel, broadcast=broadcast)
            if receipt.refusal and thread:  # the thread is gone, or the bot has left its channel
                receipt = _by_bot(token, message, channel, broadcast=broadcast)
            return receipt
        if settings.slack_webhook_url:
            return _by_webhook(settings.slack_webhook_url.get_secret_value(), message)
    except Exception as error:  # noqa: BLE001 - its text may contain the webhook's address
        return Receipt(type(error).__name__)
    return Receipt()


def _by_webhook(url: str, message: Message) -> Receipt:
    from slack_sdk.webhook import WebhookClient  # imported when there is something to send

    client = WebhookClient(url, TIMEOUT, logger=_silent, retry_handlers=_retries())
    answer = client.send(text=message.fallback, blocks=message.blocks)
    return Receipt() if answer.status_code == OK else Receipt(_word(answer.body, answer.status_code))


def _by_bot(token: str, message: Message, place: tuple[str, str | None], *, broadcast: bool) -> Receipt:
    from slack_sdk import WebClient  # as above
    from slack_sdk.errors import SlackApiError

    client = WebClient(token, API, TIMEOUT, logger=_silent, retry_handlers=_retries())
    channel, stamp = place
    try:
        answer = client.chat_postMessage(
            channel=channel,
            thread_ts=stamp,
            reply_broadcast=broadcast if stamp else None,
            text=message.fallback,
            blocks=message.blocks,
            unfurl_links=False,
        )
    except SlackApiError as error:
        return Receipt(_word(str(error.response.get("error", "")), error.response.status_code))
    return Receipt(thread=(str(answer["channel"]), stamp or str(answer["ts"])))


def _word(said: str, status: int) -> str:
    """Return Slack's own word, such as `channel_is_archived`, or the HTTP status if it says anything else."""
    return said if re.fullmatch(r"[a-z]+(_[a-z]+)+", said) else f"HTTP {status}"


def _retries() -> list[RetryHandler]:
    """Return slack_sdk's own handlers: they retry after a lost connection, a server error, or as Retry-After says."""
    from slack_sdk.http_retry import builtin_handlers as own

    return [own.ConnectionErrorRetryHandler(), own.RateLimitErrorRetryHandler(), own.ServerErrorRetryHandler()]
