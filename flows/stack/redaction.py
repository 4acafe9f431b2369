"""What keeps a secret out of the server's log."""

from __future__ import annotations

import logging


class KindOnly(logging.Filter):
    """Of an exception, the log gets its kind and nothing of its text or traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        if record.exc_info and record.exc_info[0]:
            record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", None
            record.exc_info = record.exc_text = None
        return True
