"""The page as a person has it: buttons pressed in a real browser, against the stack in the background."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

import browser
from running import until
from stacks import PASSWORD, SLOW, in_proc

from flows.stack.deploy import QUEUE
from flows.stack.leftovers import POOL

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page
    from stacks import Up

HEARD = 100  # seconds; then it is pressed again, as docs/operating.md says: a busy SQLite drops a person's answer

pytestmark = [in_proc, browser.needs_chromium]


def at_work(up: Up, deployment: str) -> list[str]:
    """The runs of a deployment that have not ended, by name."""
    lasting = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}}
    asked = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": lasting}
    return [run["name"] for run in up.api("POST", "flow_runs/filter", asked).json()]


def insist(page: Page, press: Callable[[], None], state: Callable[[], str], then: str) -> None:
    """Press, three times at most, until the state is another one; then wait for the one that it leads to."""
    before = state()
    for _ in range(3):
        press()
        with contextlib.suppress(AssertionError):
            until(lambda: state() != before, HEARD)
            break
        page.reload()
    until(lambda: state() == then, SLOW)
    page.reload()


def test_a_person_refreshes_in_the_page_and_is_asked_first(up: Up) -> None:
    """The form starts a run that waits; its page says what would happen; the answer ends it, and Retry asks anew."""
    get = [sys.executable, "-m", "tokencore", "get", "us"]
    subprocess.run(get, env=up.place.environment, cwd=up.place.work, stdout=subprocess.DEVNULL, check=True)
    form = up.api("GET", "deployments/name/refresh-token/refresh_token").json()["id"]
    until(lambda: not at_work(up, form), SLOW)  # what an earlier test has killed or left may still ask for a token
    before = up.gateway.stats()["token_requests"]
    paused = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
    with browser.page() as page:
        page.goto(f"{up.url}/deployments/deployment/{form}/run")
        browser.sign_in(page, PASSWORD)
        browser.submit(page, "us", "Kim Minji", "a bot lost it")
        until(lambda: bool(up.api("POST", "flow_runs/filter", paused).json()), SLOW)
        (run,) = up.api("POST", "flow_runs/filter", paused).json()
        queue = up.api("GET", f"work_pools/{POOL}/queues/{run['work_queue_name']}").json()
        assert (queue["name"], queue["active_slots"]) == (QUEUE, 0)  # a person takes no slot
        page.goto(f"{up.url}/runs/flow-run/{run['id']}")

        def state() -> str:
            return str(up.api("GET", f"flow_runs/{run['id']}").json()["state"]["name"])

        def decline() -> None:
            assert "KIS would hand back the present token" in browser.resume(page, "leave the token as it is")

        insist(page, decline, state, "Declined")
        insist(page, lambda: browser.retry(page), state, "Paused")
        insist(page, decline, state, "Declined")
    assert up.gateway.stats()["token_requests"] == before
