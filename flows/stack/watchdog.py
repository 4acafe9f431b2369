"""The watchdog: a server cannot report its own death, so a timer outside of it asks whether it looks after the tokens.

It is quick and light while all is well: Prefect is not imported until there is something to report.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flows.stack import environment, supervisor
from flows.stack.api import CHECK, Api, StackError
from tokencore import ConfigurationError, Settings, open_document

if TYPE_CHECKING:
    from types import ModuleType

WHO = "Prefect"  # the subject of the incident; in a fleet, with the machine that looks
PATIENCE = 45.0  # seconds: a restart must not raise an alert
PAUSE = 5.0  # seconds between two questions
SILENCE = timedelta(minutes=90)  # for so long no check has ended: one was missed, and the next is late


def watch(patience: float = PATIENCE) -> int:
    """Look for a sign of life of the server and its newest check; alert Slack if there is none, and when it is back.

    The exit code is 1 while there is none, with a line on standard error, for cron's mail or the journal.

    Raises:
        ConfigurationError: the settings cannot be used; Slack was told as by a check, which may not run.
    """
    try:
        settings = Settings.load()
        found = silence(settings, patience)
    except ConfigurationError as error:
        if patience:  # a person may be writing them
            time.sleep(patience)
            return watch(patience=0)
        if known := Settings.for_alerts():
            alerts = _alerts()
            alerts.report(known, alerts.ALL_KEYS, error, datetime.now(UTC), name=alerts.SETTINGS)
        raise
    who = f"{WHO} ({platform.node()})" if settings.store else WHO  # one that can reach the server ends no other's alert
    if found is None and who not in str(open_document(settings, "incidents").read()):  # surely nothing was reported
        return 0
    alerts, now = _alerts(), datetime.now(UTC)
    if found is None:
        alerts.resolved(settings, who, now)
        return 0
    alerts.report(settings, who, alerts.causes.SilenceError(found), now)
    print(found, file=sys.stderr)
    return 1


def test_alert() -> int:
    """Send one message as alerts are sent, and print whether Slack accepted it; return 1 if it did not.

    Raises:
        ConfigurationError: the settings for Slack are missing; nothing was sent.
    """
    settings, alerts = Settings.load(), _alerts()
    messages, slack = alerts.messages, alerts.slack
    if not slack.is_configured(settings):
        ways = "SLACK_WEBHOOK_URL, or SLACK_BOT_TOKEN and SLACK_CHANNEL"
        raise ConfigurationError(f"Nothing was sent: set {ways}, as .env.example shows.")
    texts = messages.LANGUAGES[settings.slack_language]
    receipt = slack.send(settings, messages.test(texts, settings.slack_mention, datetime.now(UTC)))
    if receipt.refusal:
        print(f"Slack did not accept the test message ({receipt.refusal}): {receipt.fix}.")
        return 1
    way = "bot" if receipt.thread else "webhook"
    print(f"Slack accepted the test message, by the {way}: look at its channel.")
    return 0


def silence(settings: Settings, patience: float) -> str | None:
    """Say what has been wrong with the server for `patience` seconds; None as soon as all is well."""
    home, other = environment.home(settings), os.environ.get("PREFECT_API_URL")
    own = (home / supervisor.CONFIG.name).exists()  # otherwise none was ever started here
    if other and not own:
        api = Api(other.removesuffix("/api"), os.environ.get("PREFECT_API_AUTH_STRING"))
    else:
        api = environment.api(home, supervisor.as_started(home))
    give_up = time.monotonic() + patience
    while True:
        # Whoever listens in place of our own server must not get its password.
        dead = own and not supervisor.running(home)
        found = f"Prefect's server at {api.url} does not run." if dead else _silence(api, datetime.now(UTC))
        if found is None or time.monotonic() >= give_up:
            return found
        time.sleep(PAUSE)


def _silence(api: Api, now: datetime) -> str | None:
    if not api.answers("health"):
        return f"Prefect's server at {api.url} does not answer."
    try:
        last = api.last_check()
        # Before the first check has ended, its deployment counts.
        seen = last[1] if last else datetime.fromisoformat(api.deployment(CHECK)["created"])
    except StackError as error:
        return str(error)
    if now - seen > SILENCE:
        return f"No check of the tokens has ended since {seen:%Y-%m-%d %H:%M} UTC."
    return None


def _alerts() -> ModuleType:
    """Import alerts, with all of Prefect, which reads no profile of the user's and makes no folder in the home."""
    os.environ["PREFECT_HOME"] = os.devnull
    os.environ.pop("PREFECT_PROFILE", None)
    from flows import alerts

    return alerts
