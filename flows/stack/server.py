"""Prefect's server in a process of our own: `prefect server start` with two more restrictions.

Requests for a foreign host name are refused: a web page sends them that made its own name point to this machine. The
UI may contact only the server: its second version asks an analytics host whatever the settings say.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.stack import environment, worker

POLICY = "connect-src 'self'; frame-ancestors 'none'; form-action 'self'"


def without_text(record: logging.LogRecord) -> bool:
    """Reduce an exception to its type: if Slack refuses a message, the text contains the webhook's address."""
    if record.exc_info and record.exc_info[0]:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", None
        record.exc_info = record.exc_text = None
    return True


def main() -> None:
    """Serve until SIGTERM."""
    threading.Thread(target=worker.end_with_parent, daemon=True).start()
    logging.getLogger("prefect.server.utilities.messaging.memory").addFilter(without_text)
    settings = get_current_settings().server
    # Around the application, not in it: the server also calls itself, past this check, by a name of its own.
    app = TrustedHostMiddleware(create_app(final=True), environment.hosts(os.environ), www_redirect=False)
    config = uvicorn.Config(
        app,
        timeout_keep_alive=settings.api.keepalive_timeout,
        log_level=settings.logging_level.lower(),
        headers=[("content-security-policy", POLICY)],
    )
    server = uvicorn.Server(config)
    server.run([socket.socket(fileno=int(os.environ[environment.LISTENER]))])
    sys.exit(not server.started)


if __name__ == "__main__":
    main()
