"""What our code adds to a Prefect run: each flow compared to an empty one with as many tasks, as a Markdown table.

Run `make bench`, or this file where Prefect is installed. A temporary server with its own database runs on loopback.
The flows run in turn in this process, with a valid token in the cache, so that no token is issued. Calls to the
server (artifacts, planned runs) count as ours.
"""

from __future__ import annotations

import logging
import os
import statistics

from measuring import gateway, interleaved, quantile, show

ROUNDS = 15


def main() -> None:
    """Run the flows and print the table."""
    from prefect import flow, task  # imported once the benchmark's settings are in place
    from prefect.cache_policies import NO_CACHE
    from prefect.testing.utilities import prefect_test_harness

    from flows.check_tokens import check_tokens
    from flows.warm_up import warm_up
    from tokencore import USTokenManager

    @task(persist_result=False, cache_policy=NO_CACHE)
    def nothing() -> None:
        """Do nothing."""

    @flow(persist_result=False, log_prints=False)
    def empty(tasks: int) -> None:
        for future in [nothing.submit() for _ in range(tasks)]:
            future.result()

    USTokenManager().get_valid_token()
    logging.disable(logging.INFO)
    with prefect_test_harness(server_startup_timeout=120):
        works = {
            "empty, no task": lambda: empty(0),
            "`warm_up`": lambda: warm_up("NASD", return_state=True),
            "empty, one task": lambda: empty(1),
            "`check_tokens`, one key": lambda: check_tokens(return_state=True),
        }
        taken = interleaved(works, ROUNDS)
    rows = []
    for (bare, floor), (name, ours) in zip(list(taken.items())[::2], list(taken.items())[1::2], strict=True):
        rows.append([bare, *told(floor), ""])
        added = statistics.median(ours) / statistics.median(floor) - 1
        rows.append([name, *told(ours), f"+ {100 * added:.0f} %"])
    show("A Prefect run", ["flow", "p50", "p99", "beyond the empty one"], rows, f"Load: {os.getloadavg()[0]:.1f}.")


def told(seconds: list[float]) -> list[str]:
    """Format the median and the p99 in milliseconds."""
    return [f"{1000 * statistics.median(seconds):.0f} ms", f"{1000 * quantile(seconds, 0.99):.0f} ms"]


if __name__ == "__main__":
    with gateway():
        main()
