"""Prefect's server in a process of ours: `prefect server start` with two more doors closed.

A request that calls the server by a foreign name, as a web page does that had its own name point to this machine, is
refused. The page may reach nobody but the server: its second version asks an analytics host whatever the settings say.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.stack import environment, worker

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = b"connect-src 'self'; frame-ancestors 'none'; form-action 'self'"


class ContentSecurityPolicy:
    """Adds the policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, with one header more."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def without_text(record: logging.LogRecord) -> bool:
    """Leave of an exception its kind: where Slack refuses a message, the text has the webhook's address."""
    if record.exc_info and record.exc_info[0]:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", None
        record.exc_info = record.exc_text = None
    return True


def main() -> None:
    """Serve until SIGTERM."""
    threading.Thread(target=worker.end_with_parent, daemon=True).start()
    server = get_current_settings().server
    # Around the application, not in it: the server asks itself, past all this, under a name of its own.
    app = TrustedHostMiddleware(
        ContentSecurityPolicy(create_app(final=True)), environment.hosts(os.environ), www_redirect=False
    )
    logging.getLogger("prefect.server.utilities.messaging.memory").addFilter(without_text)
    uvicorn.run(
        app,
        host=server.api.host,
        port=server.api.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        log_level=server.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
