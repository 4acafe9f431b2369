"""The command's front door: what `get` prints and imports, exit codes, one line on standard error, broken pipes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import make_token
from running import Ran, asked, cached, one_line, start, tokencore, until

from tokencore import TokenManager, USTokenManager
from tokencore.cli import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.sandbox import Sandbox

    Command = Callable[..., Ran]

HEAVY = ("requests", "urllib3", "pydantic", "pydantic_settings", "filelock", "prefect", "argparse", "holidays")
SLOW = ("typing", "pathlib", "logging", "tomllib", "dotenv")  # a millisecond each
GET = """if True:
    import sys
    before = {*sys.modules}
    from tokencore.cli import main
    code = main(["get", "us"])
    print(*{*sys.modules} - before, file=sys.stderr)
"""


def test_get_prints_the_token_and_nothing_else(gateway: Sandbox) -> None:
    """Standard output is the token and a newline, exit 0; the second call asks nothing."""
    first, second = tokencore("get", "us"), tokencore("get", "kr")
    assert (first.code, first.err, first.out.count("\n")) == (0, "", 1)
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", first.out)
    assert second == first
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_cached_get_imports_nothing_heavy() -> None:
    """Printing a cached token imports neither HTTP, validation and locking, nor what takes a millisecond."""
    token = cached(20_000)
    child = start(GET)
    out, modules = child.communicate(timeout=30)
    assert out == token.access_token + "\n"
    assert set(modules.split()).isdisjoint((*HEAVY, *SLOW))
    assert "tokencore.manager" in modules


def test_get_no_renew_asks_nothing(gateway: Sandbox, command: Command) -> None:
    """Only what is cached: the token while it is valid, even late in its life; exit 3 and a sentence without one."""
    ran = command("get", "us", "--no-renew")
    assert ran.code == 3
    assert "NO_TOKEN" in one_line(ran)
    token = cached(1_000)
    assert command("get", "--no-renew", "us") == Ran(0, token.access_token + "\n", "")
    cached(299)
    for style in ([], ["--json"], ["--format", "env"]):
        assert "EXPIRED" in one_line(command("get", "us", "--no-renew", *style))
    assert asked(gateway) == 0


@pytest.mark.usefixtures("gateway")
def test_get_for_a_shells_eval_sets_variables_that_children_see(command: Command) -> None:
    """Whatever signs a token has: the shell takes them as they are, and runs none of them."""
    odd = "$(>ran)`>ran`;>ran;\\'\"&*"
    USTokenManager().save_token(make_token(text=odd))
    lines = command("get", "us", "--format", "env").out
    program = f"eval \"$(cat)\"; {sys.executable} -c \"import os; print(os.environ['KIS_ACCESS_TOKEN'], end='')\""
    ran = subprocess.run(["/bin/sh", "-euc", program], input=lines, capture_output=True, text=True, check=True)
    assert ran.stdout == odd
    assert not os.path.exists("ran")
    assert re.search(r"^export KIS_TOKEN_EXPIRES_AT=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", lines, re.MULTILINE)


@pytest.mark.usefixtures("gateway")
def test_get_as_other_programs_read_it(command: Command) -> None:
    """JSON with times in UTC, `credential_process` as AWS's tools have it, tokenP's own answer with its expiry in KST.

    And what `curl -H` takes, and docker's `--env-file`, without quotes.
    """
    token = cached(20_000)

    def said(*options: str) -> str:
        ran = command("get", "us", *options)
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    ours, answer = json.loads(said("--json")), json.loads(said("--format", "answer"))
    for one in (ours, answer):
        assert (one["access_token"], one["token_type"]) == (token.access_token, "Bearer")
    assert datetime.fromisoformat(ours["expires_at"]).utcoffset() == timedelta(0)
    assert (ours["environment"], 19_900 < ours["remaining_seconds"] <= 20_000) == ("real", True)
    assert answer["access_token_token_expired"] == f"{token.expires_at + timedelta(hours=9):%Y-%m-%d %H:%M:%S}"
    assert 19_900 < answer["expires_in"] <= 20_000
    expiry = f"{token.expires_at:%Y-%m-%dT%H:%M:%SZ}"
    process = {"Version": 1, "token": token.access_token, "Expiration": expiry}
    assert json.loads(said("--format", "process")) == process
    assert said("--format", "header") == f"Authorization: Bearer {token.access_token}\n"
    lines = f"KIS_ACCESS_TOKEN={token.access_token}\nKIS_TOKEN_EXPIRES_AT={expiry}\n"
    assert said("--format", "dotenv") == lines


@pytest.mark.usefixtures("gateway")
def test_names_of_markets_may_be_in_capitals(command: Command) -> None:
    """`get US` and `check US us` are about `us`, once."""
    token = cached(20_000)
    assert command("get", "US") == Ran(0, token.access_token + "\n", "")
    ran = command("check", "US", "us", "us", "--json")
    assert (ran.code, [one["market"] for one in json.loads(ran.out)]) == (0, ["us"])


WRONG = [line.split() for line in (
    "get us --json --format env", "get us --format yaml", "get", "gett us", "get us kr", "get us --force", "get hk",
    "get ../us", "check us hk", "check --probed", "refresh", "delete", "history us kr", "tick us", "exec us",
    "exec us -- no-such-program", "reject us --json", "completion cmd", "sandbox --port x", "plan --days 0",
    "plan --days x", "plan --svg no/plan.svg",
)]  # fmt: skip


@pytest.mark.parametrize("arguments", [*WRONG, ["get", ""], ["get", "\udcff"]], ids=" ".join)
@pytest.mark.usefixtures("gateway")
def test_wrong_usage_is_one_sentence_and_exit_2(command: Command, arguments: list[str]) -> None:
    """No usage text, no traceback: a sentence that says what was wrong."""
    ran = command(*arguments)
    assert ran.code == 2
    assert one_line(ran)


@pytest.mark.parametrize("error", [RuntimeError("the secret is Canary"), OSError(errno.ENOSPC, "Canary")], ids=repr)
@pytest.mark.usefixtures("gateway")
def test_unexpected_error_is_one_line_without_its_text(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A bug ends with 1 and its place, says nothing that could be a secret, and is not blamed on the output."""

    def bug(_: TokenManager) -> str:
        raise error

    monkeypatch.setattr(TokenManager, "get_valid_token", bug)
    ran = command("get", "us")
    assert ran.code == 1
    assert re.search(rf"Unexpected {type(error).__name__}.* at test_cli.py", one_line(ran))
    assert "Canary" not in ran.err


OUTPUTS = ["get us", "check", "--help", "plan --svg -"]


@pytest.mark.parametrize("line", OUTPUTS)
@pytest.mark.usefixtures("gateway")
def test_reader_that_has_gone_is_no_error(line: str) -> None:
    """A closed pipe ends the command with 0 and without a word."""
    cached(20_000)
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(
        [sys.executable, "-m", "tokencore", *line.split()], stdout=writing, stderr=subprocess.PIPE
    ) as running:
        os.close(writing)
        _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
@pytest.mark.parametrize("line", OUTPUTS)
@pytest.mark.usefixtures("gateway")
def test_output_that_cannot_be_written_is_one_line_and_1(line: str, redirect: str) -> None:
    """Full or closed: exit 1 and one sentence that does not ask to be reported, nothing at the interpreter's end."""
    cached(20_000)
    program = f"{sys.executable} -m tokencore {line} {redirect}"
    ran = subprocess.run(["/bin/sh", "-c", program], stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert ran.returncode == 1
    assert "Standard output cannot be written" in one_line(Ran(1, "", ran.stderr))


@pytest.mark.usefixtures("nowhere")
def test_get_with_a_valid_token_does_not_wait_for_a_hanging_kis(quick: Sandbox) -> None:
    """In the proactive window: the present token and 0, while KIS accepts the request and would never answer."""
    token = cached(1_500)
    quick.fail("hang")
    assert tokencore("get", "us", KIS_TIMEOUT="300") == Ran(0, token.access_token + "\n", "")


def test_interrupted_command_ends_at_once_with_one_line(gateway: Sandbox) -> None:
    """Ctrl-C while KIS is asked: one line, no traceback; the attempt stays recorded."""
    gateway.fail("hang")
    listening = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in the background, too
    running = start(f"{listening}; from tokencore.cli import main; sys.exit(main(['get', 'us']))")
    until(lambda: asked(gateway) == 1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (130, "", "tokencore: Interrupted.\n")
    assert [attempt.outcome.value for attempt in USTokenManager().history()] == ["sent"]


def test_command_alone_prints_the_help_and_says_what_is_missing(command: Command) -> None:
    """Every command and exit code on standard output, one sentence on standard error, exit 2; 0 for `--help`."""
    ran = command()
    assert (ran.code, ran.out.startswith("usage: tokencore")) == (2, True)
    assert re.fullmatch(r"tokencore: No command was given[^\n]+\n", ran.err)
    assert command("--help") == Ran(0, ran.out, "")
    words = [name for names in COMMANDS.values() for name in names] + ["7 store unusable"]
    assert [word for word in words if word not in ran.out] == []
