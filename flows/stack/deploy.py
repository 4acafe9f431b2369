"""What runs when, and what is told when it does not: the deployments of prefect.yaml and the automations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flows.stack.leftovers import POOL

PREFECT_FILE = Path(__file__).resolve().parents[2] / "prefect.yaml"
QUEUE = "by-hand"  # of refresh_token, as prefect.yaml names it
AT_ONCE = 3  # of its runs: two go on beside one whose process was killed, for the minutes until that is marked Crashed


def deploy() -> int:
    """Make all of it on the server of this process's settings, or bring it up to date; again, and nothing changes."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(command, check=False)  # noqa: S603 - our own command
    if not done.returncode:
        from flows.stack import automations  # loads all of Prefect

        _limit()
        automations.upsert()
    return done.returncode


def _limit() -> None:
    """prefect.yaml, which makes the queue, has no place for its limit; a pause of it, made in the page, stays."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        queue = client.read_work_queue_by_name(QUEUE, POOL)
        client.update_work_queue(queue.id, concurrency_limit=AT_ONCE)
