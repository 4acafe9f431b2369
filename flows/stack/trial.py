"""A test message on request, by the way that alerts take: `make test-alert`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import ConfigurationError, Settings

if TYPE_CHECKING:
    from flows.slack import Receipt

REFUSED = 1  # the exit code where Slack did not take the message
PATIENCE = 20.0  # seconds; a person waits, and Slack may ask for some
CURES = {
    "channel_not_found": "Correct SLACK_CHANNEL, and invite the bot into the channel if it is private.",
    "not_in_channel": "Invite the bot into the channel (/invite), or give it the scope chat:write.public.",
    "missing_scope": "Give the bot the scope chat:write, and install it again.",
    "invalid_auth": "Correct SLACK_BOT_TOKEN: it begins with xoxb-.",
    "HTTP 403": "Correct SLACK_WEBHOOK_URL, or ask who administers Slack why it is forbidden.",
    "HTTP 404": "Correct SLACK_WEBHOOK_URL, or make a new webhook: this one is unknown or was removed.",
    "ValueError": "Correct SLACK_WEBHOOK_URL: it is no address; copy it again from Slack.",
    "URLError": "Look at this machine's network and its proxy.",
}


def send() -> int:
    """Send one message and tell in a sentence whether Slack took it; the exit code.

    Raises:
        ConfigurationError: a setting is missing or malformed; nothing was sent.

    """
    from flows import slack  # all of Prefect comes with these, and no other command here needs it
    from flows.letters import Pen
    from flows.words import LANGUAGES

    settings = Settings.load()
    transmit = slack.sender(settings, PATIENCE)
    if transmit is None:
        raise ConfigurationError(f"Nothing was sent: set {_missing(settings)}, as .env.example shows.")
    pen = Pen(LANGUAGES[settings.slack_language], ("", None), settings.slack_mention, datetime.now(UTC))
    receipt = transmit(pen.test())
    print(_told(receipt))
    return REFUSED if receipt.refusal else 0


def _told(receipt: Receipt) -> str:
    if not receipt.refusal:
        return f"Slack took the test message, by {'the bot' if receipt.thread else 'the webhook'}: look at its channel."
    return f"Slack did not take the test message ({receipt.refusal}). {CURES.get(receipt.refusal, 'Try again later.')}"


def _missing(settings: Settings) -> str:
    if settings.slack_bot_token:
        return "SLACK_CHANNEL"
    return "SLACK_BOT_TOKEN" if settings.slack_channel else "SLACK_WEBHOOK_URL, or SLACK_BOT_TOKEN and SLACK_CHANNEL"
