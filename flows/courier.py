"""The courier: brings messages to Slack beside the run, and notes what Slack took, wants to hear later or refused."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from flows import slack
from flows.incidents import Incidents
from flows.runs import logger
from tokencore import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from flows.messages import Message
    from flows.slack import Receipt, Thread

PATIENCE = 5.0  # seconds a run waits for Slack


class Post(NamedTuple):
    """A message on its way: into which thread it goes, and what is noted when Slack has it."""

    message: Message
    note: Callable[[Thread | None], None]
    thread: Thread | None = None
    broadcast: bool = False


def deliver(posts: Sequence[Post], now: datetime) -> None:
    """Send, and note what was taken, in a thread: not even a name server or an endless answer holds a run up longer."""
    if not posts:
        return
    send, log = slack.sender(Settings.load(), PATIENCE), logger()

    def carry() -> None:
        for post in posts:
            receipt = send(post.message, post.thread, broadcast=post.broadcast) if send else slack.Receipt()
            if receipt.refusal:
                log.warning("Slack did not take the message (%s); trouble is told by the next run.", receipt.refusal)
            with contextlib.suppress(OSError):  # then it is told once more
                _note(post, receipt, now)

    courier = threading.Thread(target=carry, daemon=True)
    courier.start()
    courier.join(PATIENCE)
    if courier.is_alive():
        log.warning("Slack has not answered within %.0f s; the run goes on.", PATIENCE)


def _note(post: Post, receipt: Receipt, now: datetime) -> None:
    if not receipt.refusal:
        post.note(receipt.thread)
    elif receipt.again_in:
        incidents_here().quiet(now + timedelta(seconds=receipt.again_in))


def incidents_here() -> Incidents:
    """Of this machine's token directory."""
    return Incidents(Settings.load().token_dir.expanduser().absolute())
