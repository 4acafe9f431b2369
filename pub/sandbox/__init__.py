"""A KIS gateway on loopback: real HTTP, KIS's rules at any speed, and its failures on request.

Tests use `with Sandbox(...) as gateway`, people `tokencore sandbox`. Both can also be controlled over HTTP: `POST` to
`/sandbox/fail`, `/sandbox/answer`, `/sandbox/clear` and `/sandbox/rules`, `GET /sandbox/stats`. The sandbox issues for
made-up credentials, knows nothing of KIS's own hosts and logs neither token, key nor secret.
"""

from __future__ import annotations

from tokencore.sandbox.rules import FAILURES, KILL
from tokencore.sandbox.server import Sandbox

__all__ = ["APP_KEY", "APP_SECRET", "Sandbox", "welcome"]

APP_KEY = ("SANDBOX-KEY-" * 3)[:36]  # as long as KIS's, and obviously made up
APP_SECRET = ("SANDBOX-SECRET-" * 12)[:180]


def welcome(url: str) -> str:
    """Return what `tokencore sandbox` prints: how to use the gateway at `url`, and how to control it."""
    return f"""\
# A KIS gateway for trying things out; nothing here reaches KIS. Ctrl-C ends it.
export KIS_BASE_URL={url}
export KIS_APP_KEY={APP_KEY}
export KIS_APP_SECRET={APP_SECRET}

# Let the next token request fail ({", ".join(FAILURES)}, or a code such as EGW00210),
# or kill the tokens that are out ({KILL}); without "count" it lasts until /sandbox/clear:
#   curl -X POST {url}/sandbox/fail -d '{{"mode": "limit", "count": 1}}'
#   curl -X POST {url}/sandbox/clear
# Script any other answer, for one path or for all that begin alike:
#   curl -X POST {url}/sandbox/answer -d '{{"path": "/uapi/", "status": 401, "content": {{"error_code": "EGW00121"}}}}'
# Shorten a rule (seconds), or see what was asked and answered:
#   curl -X POST {url}/sandbox/rules -d '{{"issue_interval": 5}}'
#   curl {url}/sandbox/stats"""
