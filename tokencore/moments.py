"""The types of `datetime`, from the module in C that it takes them from.

On Python 3.11 `import datetime` first runs 2,500 lines of Python, which those types then replace: 1.5 ms of the 6
that a cached `get` may cost beyond an empty program. The types are the very same.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import UTC, datetime, timedelta, timezone
else:
    try:
        from _datetime import UTC, datetime, timedelta, timezone
    except ImportError:  # an interpreter without it
        from datetime import UTC, datetime, timedelta, timezone

__all__ = ["UTC", "datetime", "timedelta", "timezone"]
