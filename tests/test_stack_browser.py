"""The page as a person has it: buttons pressed in a real browser, against the stack in the background."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import browser
from running import until
from stacks import PASSWORD, SLOW, in_proc

from flows.stack.deploy import QUEUE
from flows.stack.leftovers import POOL

if TYPE_CHECKING:
    from stacks import Up

pytestmark = [in_proc, browser.needs_chromium]


def at_work(up: Up, deployment: str) -> list[str]:
    """The runs of a deployment that have not ended, by name."""
    lasting = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}}
    asked = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": lasting}
    return [run["name"] for run in up.api("POST", "flow_runs/filter", asked).json()]


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
        assert "KIS would hand back the present token" in browser.resume(page, "leave the token as it is")
        page.get_by_text("Declined").first.wait_for()
        browser.retry(page)
        assert "KIS would hand back the present token" in browser.resume(page, "leave the token as it is")
        until(lambda: up.api("GET", f"flow_runs/{run['id']}").json()["state"]["name"] == "Declined", SLOW)
    assert up.gateway.stats()["token_requests"] == before
