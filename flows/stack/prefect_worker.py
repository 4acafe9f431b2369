"""`prefect worker start`, with its arguments, for a process worker that keeps no run's environment in a file.

Without a command, Prefect's worker prepares each run in a process of its own and notes the run's environment, secrets
too, in a file meanwhile. With the command it starts the run itself, and Python once less.
"""

from __future__ import annotations

import runpy
import shlex
import sys

from prefect.workers.process import ProcessJobConfiguration, ProcessWorker


class Configuration(ProcessJobConfiguration):
    """How this machine's worker starts a run: by its own interpreter, as machines have it in different places."""

    command: str | None = shlex.join([sys.executable, "-m", "prefect.engine"])


def main(*arguments: str) -> None:
    """Run the worker until a signal ends it."""
    ProcessWorker.job_configuration = Configuration
    sys.argv = ["prefect", "worker", "start", *arguments]
    runpy.run_module("prefect", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
