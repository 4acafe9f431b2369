"""Another user of this machine, for tests that run as root: what that one does, and what belongs to that one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

STRANGER = 54_321  # a user without a name, as good as any
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder outside of this user's private ones that other users may enter, but not write."""
    folder = Path(tempfile.mkdtemp(prefix="tokencore-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def by_a_stranger(program: str, folder: Path) -> None:
    """Let the other user run a line of the shell in a folder."""
    subprocess.run(
        ["/bin/sh", "-c", program], cwd=folder, user=STRANGER, group=STRANGER, extra_groups=[], env={}, check=True
    )


def give_away(path: Path) -> None:
    """Have it belong to the other user."""
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
