"""Slack and the Prefect server, asked over HTTP: nothing is posted, and no client of theirs is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dotenv import dotenv_values

from tokencore.doctor.finding import fail, ok, skipped, warn
from tokencore.doctor.reach import Reached, UnreachedError, ask
from tokencore.sources import DOTENV_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tokencore.doctor.finding import Finding

SLACK_API = "https://slack.com/api/"
POOL, CHECK = "tokens", "check_tokens"  # the work pool and the hourly deployment of prefect.yaml
DEFAULT_PORT = "4200"
_OK, _UNAUTHORIZED, _ERROR = 200, 401, 400


def slack(values: Mapping[str, Any]) -> list[Finding]:
    """Whether Slack would take an alert; `values` are the merged settings."""
    webhook, bot = values.get("slack_webhook_url"), values.get("slack_bot_token")
    try:
        if webhook:
            return [_webhook(str(webhook).strip())]
        if bot:
            return [_bot(str(bot).strip(), str(values.get("slack_channel") or ""))]
    except UnreachedError as error:
        return [fail("slack", str(error), error.cure)]
    return [skipped("slack", "not set up: alerts are logged only", "set SLACK_WEBHOOK_URL to hear of trouble")]


def _webhook(url: str) -> Finding:
    """Only its host is asked: a webhook can be tried by posting alone."""
    parts = urlsplit(url)
    if not parts.hostname or parts.scheme not in ("https", "http"):
        return fail("slack", "SLACK_WEBHOOK_URL is no address", "copy it again from Slack")
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"
    ask("GET", host)
    return ok("slack", f"{parts.hostname} answers; only a message proves the webhook: make test-alert")


def _bot(token: str, channel: str) -> Finding:
    answer = ask("POST", f"{SLACK_API}auth.test", headers={"Authorization": f"Bearer {token}"})
    told = answer.json if isinstance(answer.json, dict) else {}
    if not told.get("ok"):
        why = _word(told.get("error")) or f"HTTP {answer.status}"
        return fail("slack", f"Slack refuses the bot: {why}", "copy SLACK_BOT_TOKEN again (xoxb-...)")
    if not channel:
        return fail("slack", "SLACK_CHANNEL is not set, so the bot posts nowhere", "set it to a channel's name or ID")
    return ok("slack", f"accepts the bot (auth.test); only a message proves {_word(channel)}: make test-alert")


def prefect(exchanges: Iterable[str], home: str) -> list[Finding]:
    """The server, its deployments for these exchanges, and its worker; `home` is where `make up` keeps them."""
    known = _environment()
    url = known.get("PREFECT_API_URL", "").rstrip("/")
    port = known.get("PREFECT_SERVER_API_PORT") or DEFAULT_PORT
    expected = bool(url) or os.path.isdir(home)
    url = url or f"http://127.0.0.1:{port}/api"
    parts = urlsplit(url)  # of which a password may be part
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    try:
        auth = _auth(known)
        answer = ask("POST", f"{url}/deployments/filter", auth=auth, json={})
        pool = ask("GET", f"{url}/work_pools/{POOL}", auth=auth)
    except UnreachedError as error:
        if expected:
            return [fail("prefect", f"{shown}: {error}", "make up; or name the right server in PREFECT_API_URL")]
        return [skipped("prefect", f"no server at {shown}", "without one, let cron run `tokencore tick` every minute")]
    if answer.status == _UNAUTHORIZED:
        cure = "set PREFECT_API_AUTH_STRING (user:password) as the server has it"
        return [fail("prefect", f"{shown} wants other credentials", cure)]
    if answer.status != _OK or not isinstance(answer.json, list):
        return [
            fail("prefect", f"{shown} answers HTTP {answer.status}, not as a Prefect server does", "check the port")
        ]
    return [ok("prefect", f"{shown} answers"), _deployments(answer.json, exchanges), _worker(pool)]


def _environment() -> dict[str, str]:
    """The environment, completed from `.env` as `make up` does it."""
    try:
        read = dotenv_values(DOTENV_FILE, interpolate=False)
    except (OSError, UnicodeDecodeError):  # the line on the settings tells of it
        read = {}
    return {**{name: value for name, value in read.items() if value}, **os.environ}


def _auth(known: Mapping[str, str]) -> tuple[str, str] | None:
    names = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
    user, _, password = next((known[name] for name in names if known.get(name)), "").partition(":")
    return (user, password) if user else None


def _deployments(found: list[Any], exchanges: Iterable[str]) -> Finding:
    active = {one["name"] for one in found if isinstance(one, dict) and _scheduled(one)}
    lacking = [name for name in [CHECK, *exchanges] if name not in active]
    if lacking:
        cure = (
            "make down, then make up; in prefect.yaml take away `active: false` of these, or unpause them in the page"
        )
        return warn("prefect deployments", f"no active schedule: {', '.join(lacking)}", cure)
    return ok("prefect deployments", f"{len(active)} with an active schedule, all that the markets need")


def _scheduled(deployment: Mapping[str, Any]) -> bool:
    return not deployment.get("paused") and any(one.get("active") for one in deployment.get("schedules") or [])


def _worker(pool: Reached) -> Finding:
    told = pool.json if isinstance(pool.json, dict) else {}
    if pool.status >= _ERROR or told.get("status") != "READY":
        word = _word(told.get("status")) or f"HTTP {pool.status}"
        return fail("prefect worker", f"the work pool {POOL!r} is {word}: no run starts", "make up")
    return ok("prefect worker", f"the work pool {POOL!r} has a worker")


def _word(text: object) -> str:
    """A word of an answer, if it is one: whatever else it holds is not repeated."""
    text = str(text or "")
    return text if len(text) <= 64 and text.isprintable() else ""  # noqa: PLR2004 - longer is no word
