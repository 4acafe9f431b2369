"""A KIS gateway on loopback: real HTTP, KIS's rules at any speed, and its failures on request.

Tests use `with Sandbox(...) as gateway`, people `tokencore sandbox`. Both are driven over HTTP too:
`POST /sandbox/fail`, `/sandbox/clear` and `/sandbox/rules`, `GET /sandbox/stats`. It issues for made-up
credentials, knows nothing of KIS's own hosts and logs neither token, key nor secret.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

from tokencore.errors import ConfigurationError
from tokencore.sandbox_http import Server
from tokencore.sandbox_rules import FAILURES, KILL, Gateway, Rules

if TYPE_CHECKING:
    import argparse
    from typing import Self, Unpack

    from tokencore.commands.shared import AddCommand
    from tokencore.sandbox_rules import Lengths

DEFAULT_PORT = 9480
APP_KEY = ("SANDBOX-KEY-" * 3)[:36]  # as long as KIS's, and plainly nobody's
APP_SECRET = ("SANDBOX-SECRET-" * 12)[:180]


class Sandbox(Gateway):
    """The gateway while a `with` block lasts; leaving it closes the port and every connection.

    The keywords beside `port` (0 takes a free one) are the lengths of `Rules` in seconds, `app_key` and
    `app_secret` to accept only these, and `verbose` for one line a request on standard error.

    Raises:
        ConfigurationError: a length is impossible or, on entering, the port cannot be had.

    """

    def __init__(
        self,
        *,
        port: int = 0,
        app_key: str | None = None,
        app_secret: str | None = None,
        verbose: bool = False,
        **lengths: Unpack[Lengths],
    ) -> None:
        """Keep what `__enter__` needs to open the port."""
        super().__init__(Rules(**lengths), app_key=app_key, app_secret=app_secret)
        self._port = port
        self._verbose = verbose

    def __enter__(self) -> Self:
        try:
            self._server = Server(self._port, self, verbose=self._verbose)
        except (OSError, OverflowError) as error:
            message = f"Port {self._port} of 127.0.0.1 cannot be had ({error}): choose another with --port."
            raise ConfigurationError(message) from None
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        """The base URL, for KIS_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_port}"


def add(command: AddCommand) -> None:
    """Add the command to the parser."""
    parser = command("sandbox", run, "a KIS gateway on loopback, to try things out")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="on 127.0.0.1 (%(default)s; 0: any)")
    for rule, text in (
        ("token_life", "how long a token lives"),
        ("same_token", "how long the same token is handed out again"),
        ("issue_interval", "the time in which a key is granted one request"),
        ("latency", "how long tokenP takes to answer"),
    ):
        option, default = f"--{rule.replace('_', '-')}", getattr(Rules, rule)
        parser.add_argument(option, type=float, default=default, metavar="S", help=f"{text} (%(default)g s)")
    parser.add_argument("--fail", choices=FAILURES, help="let tokenP fail like this until it is cleared")
    parser.add_argument("--verbose", action="store_true", help="one line a request on standard error")


def run(namespace: argparse.Namespace) -> int:
    """The command: serve as the options of `add` say; 0 when it was asked to end."""
    options = ("port", "token_life", "same_token", "issue_interval", "latency", "fail", "verbose")
    serve(**{name: getattr(namespace, name) for name in options})
    return 0


def serve(
    *,
    port: int = DEFAULT_PORT,
    fail: str | None = None,
    verbose: bool = False,
    **lengths: Unpack[Lengths],
) -> None:
    """Print how to point the settings here, then serve until SIGINT or SIGTERM; for the main thread.

    `lengths` are those of `Rules`, in seconds.

    Raises:
        ConfigurationError: the port cannot be had, or a length or failure is impossible.

    """
    # A shell's background jobs start with SIGINT ignored, and SIGTERM would end without closing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Sandbox(port=port, verbose=verbose, **lengths) as gateway:
            if fail:
                gateway.fail(fail)
            sys.stdout.write(_welcome(gateway.url))
            sys.stdout.flush()
            while True:
                time.sleep(60)
    except KeyboardInterrupt:
        return


def _welcome(url: str) -> str:
    return f"""\
# A KIS gateway for trying things out; nothing here reaches KIS. Ctrl-C ends it.
export KIS_BASE_URL={url}
export KIS_APP_KEY={APP_KEY}
export KIS_APP_SECRET={APP_SECRET}

# Let the next token request fail ({", ".join(FAILURES)}),
# or kill the tokens that are out ({KILL}); without "count" it lasts until /sandbox/clear:
#   curl -X POST {url}/sandbox/fail -d '{{"mode": "limit", "count": 1}}'
#   curl -X POST {url}/sandbox/clear
# Shorten a rule (seconds), or see what was asked and answered:
#   curl -X POST {url}/sandbox/rules -d '{{"issue_interval": 5}}'
#   curl {url}/sandbox/stats
"""
