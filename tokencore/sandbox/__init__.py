"""A KIS gateway on loopback: real HTTP, KIS's rules at any speed, and its failures on request.

Tests use `with Sandbox(...) as gateway`, people `tokencore sandbox`. Both are driven over HTTP too: `POST` to
`/sandbox/fail`, `/sandbox/answer`, `/sandbox/clear` and `/sandbox/rules`, `GET /sandbox/stats`. It issues for made-up
credentials, knows nothing of KIS's own hosts and logs neither token, key nor secret.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

from tokencore.errors import ConfigurationError
from tokencore.sandbox.rules import FAILURES, KILL, RULES, Gateway
from tokencore.sandbox.server import Server

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Self

DEFAULT_PORT = 9480
APP_KEY = ("SANDBOX-KEY-" * 3)[:36]  # as long as KIS's, and plainly nobody's
APP_SECRET = ("SANDBOX-SECRET-" * 12)[:180]


class Sandbox(Gateway):
    """The gateway while a `with` block lasts; leaving it closes the port and every connection.

    The keywords beside `port` (0 takes a free one) are the lengths of `RULES` in seconds, `app_key` and
    `app_secret` to accept only these, and `verbose` for one line a request on standard error.

    Raises:
        ConfigurationError: a length is impossible or, on entering, the port is not free.

    """

    def __init__(
        self, *, port: int = 0, verbose: bool = False, app_key: str = "", app_secret: str = "", **lengths: float
    ) -> None:
        """Keep what `__enter__` needs to open the port."""
        super().__init__(app_key=app_key, app_secret=app_secret, **lengths)
        self._port, self._verbose = port, verbose

    def __enter__(self) -> Self:
        try:
            self._server = Server(self._port, self, verbose=self._verbose)
        except (OSError, OverflowError) as error:
            message = f"Cannot listen on 127.0.0.1:{self._port} ({error}): choose another port with --port."
            raise ConfigurationError(message) from None
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        """The base URL, for KIS_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"


def add(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = command("sandbox", run, "a KIS gateway on loopback, to try things out")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="on 127.0.0.1 (%(default)s; 0: any)")
    for rule, text in (
        ("token_life", "how long a token lives"),
        ("same_token", "how long the same token is handed out again"),
        ("issue_interval", "the time in which a key is granted one request"),
        ("latency", "how long tokenP takes to answer"),
    ):
        option = f"--{rule.replace('_', '-')}"
        parser.add_argument(option, type=float, default=RULES[rule], metavar="S", help=f"{text} (%(default)g s)")
    parser.add_argument("--fail", metavar="FAILURE", help=f"what tokenP does: {', '.join(FAILURES)}, or a code of KIS")
    parser.add_argument("--verbose", action="store_true", help="one line a request on standard error")


def run(options: argparse.Namespace) -> int:
    """The command: print how to point the settings here, then serve until SIGINT or SIGTERM; 0.

    Raises:
        ConfigurationError: the port is not free, or a length or failure is impossible.

    """
    lengths = {name: getattr(options, name) for name in RULES}
    # A shell's background jobs start with SIGINT ignored, and SIGTERM would end without closing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Sandbox(port=options.port, verbose=options.verbose, **lengths) as gateway:
            if options.fail:
                gateway.fail(options.fail)
            sys.stdout.write(_welcome(gateway.url))
            sys.stdout.flush()
            while True:
                time.sleep(60)
    except KeyboardInterrupt:
        return 0


def _welcome(url: str) -> str:
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
#   curl {url}/sandbox/stats
"""
