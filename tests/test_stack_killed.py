"""The stack in the background after a kill: what is left is found and ended."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from running import until
from stacks import in_proc

if TYPE_CHECKING:
    from stacks import Up

pytestmark = in_proc


def test_down_stops_what_a_killed_supervisor_left(up: Up) -> None:
    """Server and worker outlive a SIGKILL of their supervisor; `down` finds and ends them; once more is no error."""
    os.kill(up.processes()["supervisor"], signal.SIGKILL)
    until(lambda: "supervisor" not in up.processes())
    assert sorted(up.processes()) == ["server", "worker"]
    assert up.place.run("down") == (0, "Stopped.\n")
    assert up.place.living() == []
    assert up.place.run("down") == (0, "Nothing was running.\n")
