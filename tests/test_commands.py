"""The commands: what they print, import and leave untouched, their exit codes, and outputs that cannot be written."""

import errno
import getpass
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import NoneType

import pytest
from builders import CANARIES, KEY, SECRET, make_jwt, make_token
from running import (
    Command,
    Ran,
    asked,
    cached,
    folder,
    issue_of,
    on_disk,
    one_line,
    outcomes,
    record,
    snapshot,
    start,
    tokencore,
    until,
)

from tokencore import Key, Settings, TokenManager, USTokenManager
from tokencore.attempts import Attempt, Outcome
from tokencore.clients.exports import CLIENTS
from tokencore.commands import COMMANDS, parsers
from tokencore.kis.codes import KNOWN
from tokencore.reports.tables import REFUSED
from tokencore.sandbox import APP_KEY, Sandbox
from tokencore.tokens import KST

pytestmark = pytest.mark.usefixtures("gateway")
NEVER_NULL = {  # fields of `check --json`, with and without a token
    "market": str, "status": str, "valid": bool, "remaining_seconds": int, "remaining_hours": float,
    "buffer_seconds": float, "proactive_refresh_seconds": float, "cache_exists": bool, "environment": str, "file": str,
    "issues_last_24h": int, "next_need": dict, "covers_next_need": bool,
}  # fmt: skip
TWO_KEYS = {"KIS_MARKETS__KR__APP_KEY": KEY, "KIS_MARKETS__KR__APP_SECRET": SECRET}
WITH_A_TOKEN = ("expires_at", "issued_at", "cached_at", "permissions", "cooldown_until")


def test_refresh_renews_or_declines_with_4(quick: Sandbox, command: Command) -> None:
    """Refresh exits 4 for a young token or at the ceiling, unless a person forces it, and records who asked and why."""
    cached(86_000)
    assert re.search(r"from \d{4}-\d\d-\d\d \d\d:\d\d:\d\d KST", one_line(command("refresh", "us")))
    old = cached(50_000)
    for options, code, said, requests in (
        (("--reason", "수동 갱신", "--by", "김민지"), 0, "Renewed.\n", 1),
        ((), 4, "KIS_MAX_ISSUES_PER_DAY", 1),
        (("--force",), 2, "add --yes", 1),
        (("--force", "--yes"), 0, "Renewed.\n", 2),
        (("--force", "--yes"), 0, "KIS returned the present token", 3),
    ):
        ran = command("refresh", "us", *options, KIS_MAX_ISSUES_PER_DAY="1")
        assert (ran.code, said in ran.out + ran.err, asked(quick)) == (code, True, requests)
        if requests < 2:
            cached(50_000)
        time.sleep(0.1)
    assert command("get", "kr").out != old.access_token + "\n"
    assert "김민지  수동 갱신" in command("history").out
    assert [line["by"] for line in json.loads(command("history", "--json").out)] == ["김민지", *[getpass.getuser()] * 2]


def at_a_terminal(answer: str, *arguments: str) -> Ran:
    """Run a command at a real terminal, with a person's answer to its question."""
    ours, theirs = os.openpty()
    os.write(ours, answer.encode())
    program = [sys.executable, "-m", "tokencore", *arguments]
    ran = subprocess.run(program, stdin=theirs, capture_output=True, text=True, timeout=30, check=False)
    os.close(ours)
    os.close(theirs)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_a_second_forced_refresh_asks_on_a_terminal(quick: Sandbox, command: Command) -> None:
    """The question says who had the key renewed and when; renewals by programs are no reason to ask."""
    quick.set_rules(same_token=0)
    assert command("get", "us").code == 0
    for by, answer, code in (("김민지", "", 0), ("Kim", "no\n", 2), ("Kim", "y\n", 0)):
        ran = at_a_terminal(answer, "refresh", "us", "--force", "--by", by)
        assert (ran.code, "김민지 renewed this key at" in ran.err) == (code, bool(answer))
    assert asked(quick) == 3


def test_delete_removes_one_markets_file_and_the_keys_with_the_last(gateway: Sandbox, command: Command) -> None:
    """The other market keeps its token until it is the last one deleted."""
    command("get", "us")
    for market, left in (("us", 0), ("KR", 3)):
        assert command("delete", market) == Ran(0, "Deleted.\n", "")
        assert command("check", "kr").code == left
    ran = command("delete", "us")
    assert (ran.code, "no token file" in ran.out, gateway.stats()["revokes"]) == (0, True, 0)


def test_delete_says_what_keeps_the_token_of_a_renamed_market(command: Command) -> None:
    """A market without a file of its own has the key's token as long as another market's file has it."""
    command("get", "us")
    (folder() / "us_api_token.json").rename(folder() / "old_api_token.json")
    assert command("delete", "kr").out == "Deleted.\n"
    assert "Other markets' files keep its key's token" in command("delete", "us").out
    assert "old_api_token.json" in command("doctor").out
    (folder() / "old_api_token.json").unlink()
    assert command("delete", "us").out == "Deleted.\n"


def test_delete_revoke_does_what_a_person_confirms(gateway: Sandbox, command: Command) -> None:
    """The question names the key's other markets and when KIS issues a new token; without a yes, or KIS's, it stays."""
    assert "no token to revoke" in at_a_terminal("", "delete", "us", "--revoke").out
    token = command("get", "us").out
    for answer in ("n\n", "yesterday\n", "\x04"):
        ran = at_a_terminal(answer, "delete", "us", "--revoke")
        assert (ran.code, ran.out, "Nothing was revoked or deleted." in ran.err) == (2, "", True)
    assert "add --yes" in one_line(command("delete", "us", "--revoke"))
    assert command("delete", "us", "--revoke", "--yes", KIS_ISSUE_INTERVAL="soon").code == 2
    assert command("get", "us", "--approval-key", KIS_ISSUE_INTERVAL="soon").code == 2
    assert (gateway.stats()["revokes"], gateway.stats()["approvals"]) == (0, 0)
    gateway.answer("/oauth2/revokeP", {}, 500, 1)
    assert "stays valid" in one_line(command("delete", "us", "--revoke", "--yes"))
    assert command("get", "us", "--no-renew").out == token
    until = f"only from {(issue_of(on_disk()) + timedelta(hours=6, seconds=1)).astimezone(KST):%Y-%m-%d %H:%M:%S} KST."
    ran = at_a_terminal("YES\n", "delete", "us", "--revoke")
    assert f"uses the token of us, kr loses it. KIS issues a new one {until}" in ran.err
    assert (ran.code, ran.out.endswith(f"KIS issues a new one {until}\nDeleted.\n")) == (0, True)
    assert (gateway.stats()["revokes"], command("check", "kr").code) == (1, 3)


def test_a_revoked_token_is_not_served_again_when_kis_returns_it(quick: Sandbox, command: Command) -> None:
    """Within six hours KIS hands out the token that it has just revoked: that is no valid token, and asked for once."""
    assert (command("get", "us").code, command("delete", "us", "--revoke", "--yes").code) == (0, 0)
    assert [line["outcome"] for line in json.loads(command("history", "--json").out)] == ["issued", "revoked"]
    assert ("nothing due" in command("tick").out, asked(quick)) == (True, 1)
    for _ in range(2):
        assert "returns the same token until" in one_line(ran := command("get", "kr"))
        assert (ran.code, asked(quick), command("check").code) == (4, 2, 3)
    assert json.loads(command("check", "us", "--json").out)[0]["status"] == "REJECTED"
    quick.set_rules(same_token=0, token_life=80_000)
    time.sleep(0.1)
    assert command("refresh", "us", "--force", "--yes").code == 0
    assert (command("check").code, command("check", "us", "--probe").code) == (0, 0)


def test_history_tells_every_attempt_of_every_key(quick: Sandbox, command: Command) -> None:
    """History is a table or JSON, even if it is empty; each attempt appears once, with all markets of its key."""
    assert command("history").out == "No attempt has been recorded.\n"
    assert json.loads(command("history", "us", "--json").out) == []
    quick.fail("limit", 1)
    for market in ("us", "kr"):
        assert command("get", market, **TWO_KEYS).code == 0
    lines = json.loads(command("history", "--json", **TWO_KEYS).out)
    said = [("+".join(line["markets"]), line["outcome"], line["code"]) for line in lines]
    assert said == [("us", "limit", "EGW00133"), ("us", "issued", None), ("kr", "issued", None)]
    assert set(lines[0]) == {"markets", "at", "outcome", "code", "expires_at", "reason", "by"}
    assert datetime.fromisoformat(lines[1]["expires_at"]) > datetime.now(UTC)
    table = command("history", "kr").out.splitlines()
    assert (len(table), "EGW00133" in table[1], "us+kr" in table[2]) == (3, True, True)


@pytest.mark.usefixtures("slow")
def test_check_json_has_exactly_the_contracts_fields_and_tells_facts(command: Command) -> None:
    """There is one object per market, in the settings' order, and each field has its type, with and without a token."""
    empty = json.loads(command("check", "--json").out)
    command("get", "us")
    one, other = full = json.loads(command("check", "--json").out)
    assert (one["market"], other["market"]) == ("us", "kr")
    for listed, kind in ((empty, NoneType), (full, str)):
        types = [{name: type(value) for name, value in status.items()} for status in listed]
        assert types == [NEVER_NULL | dict.fromkeys(WITH_A_TOKEN, kind)] * 2
    for none in empty:
        assert (none["status"], none["remaining_seconds"], none["remaining_hours"]) == ("NO_TOKEN", 0, 0)
    expires, issued, calm = (datetime.fromisoformat(one[at]) for at in ("expires_at", "issued_at", "cooldown_until"))
    assert (expires - issued, calm.utcoffset()) == (timedelta(days=1), timedelta(0))
    assert one["remaining_hours"] == pytest.approx(one["remaining_seconds"] / 3600, abs=0.01)
    assert (one["file"], one["permissions"]) == (str(folder() / "us_api_token.json"), "0600")
    assert (one["issues_last_24h"], one["buffer_seconds"], one["proactive_refresh_seconds"]) == (1, 300, 1800)
    start, end = (datetime.fromisoformat(one["next_need"][edge]) for edge in ("start", "end"))
    assert start < end > datetime.now(UTC)
    assert one["covers_next_need"] is (end < expires - timedelta(seconds=270))


def broken() -> None:
    """Write a file for us that holds no token."""
    folder().mkdir(0o700)
    (folder() / "us_api_token.json").write_text("{")
    (folder() / "us_api_token.json").chmod(0o600)


PAPER = {"KIS_ENVIRONMENT": "paper"}
STATUSES: dict[str, tuple[Callable[[], object], dict[str, str], str]] = {
    "VALID": (lambda: cached(20_000), {}, "serves until"),
    "EXPIRING_SOON": (lambda: cached(1_700), {}, "serves until"),
    "EXPIRED in the buffer": (lambda: cached(290), {}, ""),
    "EXPIRED": (lambda: cached(-5_000), {}, ""),
    "UNREADABLE": (broken, {}, "us_api_token.json, mode 0600, no token: Expecting"),
    "NO_TOKEN as KIS refused": (
        lambda: record(Attempt(datetime.now(UTC), Outcome.BAD_SECRET, code="EGW00105")),
        *({}, "us: not renewed at [-0-9: ]+ KST: bad secret .EGW00105"),
    ),
    "REJECTED within six hours of its issue": (
        lambda: TokenManager("us").save_token(make_token(age=60, rejected=True)),
        *({}, "us: KIS returns the same token until .+ KIS has rejected .+ A new one can be issued from"),
    ),
    "NO_TOKEN of this environment": (lambda: cached(20_000), PAPER, ", of another key or environment"),
}


@pytest.mark.parametrize("case", STATUSES)
def test_check_words_and_exit_codes(command: Command, case: str) -> None:
    """`check` exits 0 only if every asked market is valid, shows no negative time, and says why a token is missing."""
    make, settings, words = STATUSES[case]
    make()
    ran = command("check", "us", "--json", **settings)
    one = json.loads(ran.out)[0]
    valid = case in ("VALID", "EXPIRING_SOON")
    assert (ran.code, one["status"], one["valid"]) == (0 if valid else 3, case.partition(" ")[0], valid)
    assert min(one["remaining_seconds"], one["remaining_hours"]) >= 0
    ran = command("check", **settings)
    assert (ran.code, bool(re.search(words, ran.out))) == (0 if valid else 3, True)
    assert command("check", "us", "kr", **TWO_KEYS | settings).code == 3, "the other key has no token"


def test_a_store_without_its_keys_is_one_warning(command: Command, caplog: pytest.LogCaptureFixture) -> None:
    """However many keys and markets look into it, the sentence comes once, and the machine's own files are read."""
    ran = command("check", KIS_STORE="postgresql://127.0.0.1:1/none", **TWO_KEYS)
    assert (ran.code, ran.out.count("NO_TOKEN"), caplog.text.count("KIS_STORE_KEYS is not set")) == (3, 2, 1)


@pytest.mark.parametrize("line", ["check", "check --json", "check --probe", "history", "tick", "plan", "metrics"])
def test_commands_that_only_read_change_no_file(gateway: Sandbox, command: Command, line: str) -> None:
    """Commands that only read change no file's content, time or mode, make no directory and issue nothing."""
    if line != "tick":  # without a token, it would renew
        assert command(*line.split()).code == 3 * line.startswith("check")
        assert not folder().exists()
    command("get", "us")
    before = snapshot(Path.home())
    assert command(*line.split()).code == 0
    assert snapshot(Path.home()) == before
    assert asked(gateway) == 1


def test_probe_proves_each_valid_token_with_one_call(gateway: Sandbox, command: Command) -> None:
    """`--probe` exits 0 if KIS accepts the token, 3 if not, 6 without KIS; markets share a call, nothing is issued."""
    cached(100)
    assert (command("check", "--probe").code, gateway.stats()["quotes_refused"]) == (3, {})
    command("get", "us")
    ran = command("check", "--probe")
    assert (ran.code, ran.out.count("KIS accepts the token"), gateway.stats()["quotes"]) == (0, 2, 1)
    gateway.kill_tokens()
    ran = command("check", "us", "--probe", "--json")
    one = json.loads(ran.out)[0]
    assert (ran.code, one["probe"]["accepted"], one["status"]) == (3, False, "VALID")
    assert "EGW00121" in one["probe"]["told"]
    gateway.__exit__()
    ran = command("check", "kr", "--probe")
    assert (ran.code, "not known" in ran.out, asked(gateway)) == (6, True, 1)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(("mode", "code", "then"), [("limit", 4, 4), ("bad-key", 5, 5), ("down", 6, 4)])
def test_tick_says_why_it_cannot_renew_and_gives_every_key_its_turn(
    gateway: Sandbox, command: Command, mode: str, code: int, then: int
) -> None:
    """A tick gives a failed renewal with its market and exit code; the next leaves KIS alone, says why and how long."""
    gateway.fail(mode, 1)
    ran = command("tick", **TWO_KEYS)
    assert (ran.code, "us: due, but not renewed; " in ran.out, "kr: renewed; next " in ran.out) == (code, True, True)
    assert re.fullmatch(r"tokencore: us: [^\n]+\n", ran.err)
    ran = command("tick", KIS_ISSUE_INTERVAL="60", **TWO_KEYS)
    if then == 4:
        later = TokenManager("us").history()[-1].at + timedelta(seconds=65)
        assert f"us: due, but not renewed; next {later.astimezone(KST):%Y-%m-%d %H:%M} KST" in ran.out
    assert (ran.code, "kr: nothing due; next " in ran.out, asked(gateway)) == (then, True, 2)


def test_tick_says_of_a_partner_firms_token_that_no_renewal_is_needed(command: Command) -> None:
    """A token of three months serves all sessions whose days are known: that is not the same as no need of a token."""
    TokenManager("us").save_token(make_token(90 * 86_400))
    assert command("tick") == Ran(0, "us+kr: nothing due; no renewal is needed in the weeks ahead\n", "")


def test_nothing_promises_a_renewal_with_refused_credentials(quick: Sandbox, command: Command) -> None:
    """After refused credentials, plan and tick say that a person has to act instead of giving the next renewal."""
    cached(23 * 3600)
    assert json.loads(command("plan", "--json").out)[0]["renewals"]
    quick.fail("bad-key", 1)
    assert command("refresh", "us", "--force").code == 5
    assert json.loads(command("plan", "--json").out)[0]["renewals"] == []
    for name in ("plan", "tick"):
        said = " ".join(command(name).out.split())
        assert (REFUSED in said, "next renewal" in said) == (True, False)
    assert "no renewal until a person acts" in command("plan", "--svg", "-").out
    assert asked(quick) == 1


def test_exec_runs_a_program_with_the_token_and_has_its_exit_code(gateway: Sandbox, command: Command) -> None:
    """The program has token and expiry in its environment, gets its own arguments, and sets the command's exit code."""
    program = "import os, sys; print(os.environ['KIS_ACCESS_TOKEN'], os.environ['KIS_TOKEN_EXPIRES_AT'], *sys.argv[1:])"
    ran = tokencore("exec", "us", "--", sys.executable, "-c", f"{program}; sys.exit(7)", "--", "-x")
    token = on_disk()
    assert ran == Ran(7, f"{token.access_token} {token.expires_at:%Y-%m-%dT%H:%M:%SZ} -- -x\n", "")
    assert tokencore("exec", "us", "--", "sh", "-c", "yes | head -n 1") == Ran(0, "y\n", ""), "pipes end quietly"
    for impossible in ("no-such-program", ""):
        assert (command("exec", "us", "--", impossible).code) == 2
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN  # again, so that a failed output is an error and no death
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_a_file_that_cannot_be_removed_is_named(command: Command) -> None:
    """As a single mounted file does, a folder in place of the key's file withstands `delete`: exit 7 with its path."""
    cached()
    (file,) = folder().glob("key-*.json")
    file.unlink()
    file.mkdir()
    assert command("delete", "us").code == 0
    assert str(file) in one_line(ran := command("delete", "kr"))
    assert ran.code == 7


def test_the_help_of_exec_is_its_own_or_the_programs(gateway: Sandbox, command: Command) -> None:
    """`--help` before the program shows the command's help; after `--` it is the program's; without a name, neither."""
    for asking in (("--help",), ("us", "--help"), ("us", "-h"), ("us", "--help", "--", "true")):
        assert "usage: tokencore exec" in command("exec", *asking).out
    assert tokencore("exec", "us", "--", "sh", "-c", "echo $0", "--help").out == "--help\n"
    for unclear in ((), ("--", ""), ("sh", "-c", "true"), ("sh", "--help")):
        assert "name it after --" in command("exec", "us", *unclear).err
    assert asked(gateway) == 1


@pytest.fixture
def give(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs a command with a text on standard input; its output must not hold a secret."""

    def run(text: str | bytes, *arguments: str) -> Ran:
        given = io.BytesIO(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
        ran = command(*arguments)
        assert not any(canary in ran.out + ran.err for canary in CANARIES)
        return ran

    return run


DEEP = '{"a":' * 9_000  # more than Python's parser takes


def test_reject_replaces_an_old_token_and_says_when_a_young_one_can_be(quick: Sandbox, give: Command) -> None:
    """A rejected token older than six hours is renewed once; for a younger one exit 4 says when and how to force it."""
    old = cached(50_000)
    quick.fail("dead-token")
    assert give(f"Authorization: Bearer {old.access_token}\n", "reject", "us") == Ran(0, "", "")
    young = TokenManager("kr").get_valid_token()
    assert young != old.access_token
    for unknown in (old.access_token, DEEP):
        assert give(unknown, "reject", "kr") == Ran(0, "", "")
    ran = give(young, "reject", "us")
    assert (ran.code, "six hours after its issue" in one_line(ran), "--force" in ran.err) == (4, True, True)
    assert (give("\n", "reject", "us").code, tokencore("get", "kr").code, asked(quick)) == (2, 4, 1)
    time.sleep(0.1)
    assert (give("", "refresh", "us", "--force", "--yes").code, asked(quick)) == (4, 2)
    assert TokenManager("us").get_token_status()["status"] == "REJECTED"


def test_commands_that_warn_of_nothing_leave_standard_error_to_errors(quick: Sandbox) -> None:
    """Without a terminal, a rejected token is one line or none, and a refusal after a wait is one."""
    program = [sys.executable, "-m", "tokencore", "reject", "us"]
    for token, code, lines in ((cached(50_000), 0, 0), (cached(), 4, 1)):
        ran = subprocess.run(program, input=token.access_token, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (code, "", lines)
    TokenManager("us").delete_token()
    TokenManager("kr").delete_token()
    quick.fail("limit")
    refused = tokencore("get", "us", KIS_ISSUE_INTERVAL="1.5", KIS_MAX_ISSUES_PER_DAY="9")
    assert (refused.code, "EGW00133" in one_line(refused)) == (4, True)


def test_reject_replaces_an_approval_key(quick: Sandbox, give: Command, command: Command) -> None:
    """A rejected approval key is not served again; `check --json` says when the present one, if any, expires."""
    assert "approval_key_expires_at" not in command("check", "us", "--json").out
    first = command("get", "us", "--approval-key").out
    time.sleep(0.1)
    assert give(first, "reject", "us", "--approval-key") == Ran(0, "", "")
    assert command("get", "us", "--approval-key").out != first
    assert "approval_key_expires_at" in json.loads(command("check", "--json").out)[1]
    assert asked(quick) == 0


def test_a_token_moves_to_another_machine_without_an_issue(
    tmp_path: Path, gateway: Sandbox, give: Command, command: Command
) -> None:
    """An imported token is proven by a quote call, once rejected too, and counts for KIS's six hours only."""
    elsewhere = command("get", "us", "--json", KIS_TOKEN_DIR=str(tmp_path / "elsewhere")).out
    assert give(elsewhere, "import", "us").code == 0
    assert TokenManager("kr").get_valid_token() == json.loads(elsewhere)["access_token"]
    assert on_disk().issued_at == datetime.fromisoformat(json.loads(elsewhere)["issued_at"]).replace(microsecond=0)
    assert (outcomes(), asked(gateway), gateway.stats()["quotes"]) == (["imported"], 1, 1)
    assert "Known already" in give(elsewhere, "import", "us").out
    status = TokenManager("us").get_token_status()
    assert (status["issues_last_24h"], status["cooldown_until"]) == (0, None)
    assert "six hours after its issue" in command("refresh", "us").err
    gateway.fail("down")
    assert give(elsewhere, "reject", "us").code == 4
    declined = give(elsewhere, "import", "us", "--offline")
    assert (declined.code, "rejected this token" in one_line(declined)) == (3, True)
    assert give(elsewhere, "import", "us").code == 0
    assert not TokenManager("us").is_token_expired()


def test_a_token_is_taken_offline_as_a_shell_sets_it_but_over_no_better_one(give: Command, gateway: Sandbox) -> None:
    """The earlier of the JWT's `exp` and the given expiry counts; a longer present token stays, except with --force."""
    longer, shorter = make_jwt(APP_KEY, life=7200), make_jwt(APP_KEY, life=3900)
    text = f"export KIS_ACCESS_TOKEN='{longer}'\nexport KIS_TOKEN_EXPIRES_AT=2099-01-01T00:00:00Z"
    assert give(text, "import", "us", "--offline").code == 0
    assert timedelta(hours=1) < on_disk().expires_at - datetime.now(UTC) <= timedelta(hours=2)
    declined = give(shorter, "import", "us", "--offline")
    assert (declined.code, "lasts longer" in one_line(declined), on_disk().access_token) == (2, True, longer)
    assert give(shorter, "import", "us", "--offline", "--force").code == 0
    assert (on_disk().access_token, gateway.stats()["requests"]) == (shorter, [])


def test_mojito2s_file_is_imported_without_being_loaded(give: Command, gateway: Sandbox) -> None:
    """The token in a pickle of any protocol is taken, and nothing in the file is run."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        theirs = make_jwt(APP_KEY, life=7200 + protocol)
        content = pickle.dumps([{"access_token": theirs, "api_key": APP_KEY}, sys.exit], protocol)
        assert give(content, "import", "us", "--offline").code == 0
        assert on_disk().access_token == theirs
    assert asked(gateway) == 0


def late(**fields: object) -> str:
    """Return JSON with a living token of the key, and other fields."""
    return json.dumps({"access_token": make_jwt(APP_KEY), "expires_at": "2099-01-01T00:00Z", **fields})


REFUSED_INPUT: dict[str, tuple[Callable[[], str], int, str]] = {
    "nothing": (lambda: "", 2, "holds no token"),
    "far too much": (lambda: "x" * 70_000, 2, "holds no token"),
    "an opaque token without an expiry": (lambda: "not-a-jwt", 2, "gives its expiry"),
    "two tokens": (lambda: f"{make_jwt(APP_KEY)} {make_jwt(APP_KEY, life=7200)}", 2, "gives its expiry"),
    "JSON that is no object": (lambda: "[1]", 2, "gives its expiry"),
    "JSON without an end": (lambda: DEEP, 2, "gives its expiry"),
    "another key's": (make_jwt, 2, "another app key"),
    "expired": (lambda: make_jwt(APP_KEY, life=-60), 3, "no longer serves"),
    "about to expire": (lambda: make_jwt(APP_KEY, life=200), 3, "no longer serves"),
    "of the other environment": (lambda: late(environment="paper"), 2, "of another environment"),
    "rejected": (lambda: late(rejected_at="2026-11-01T00:00Z"), 3, "KIS rejected the token at"),
    "an opaque one that nobody proves": (lambda: late(access_token="opaque"), 2, "does not say whose it is"),
}


@pytest.mark.parametrize("case", REFUSED_INPUT)
def test_what_is_no_token_of_the_key_is_refused(case: str, give: Command) -> None:
    """Import says in a sentence what is wrong with the input, saves nothing and does not repeat the token."""
    text, code, words = REFUSED_INPUT[case]
    ran = give(text(), "import", "us", "--offline")
    assert (ran.code, words in one_line(ran)) == (code, True), ran.err
    assert (TokenManager("us").load_token(), outcomes()) == (None, [])


def test_a_token_that_kis_refuses_is_not_saved(gateway: Sandbox, give: Command) -> None:
    """Import gives KIS's code if KIS rejects the token, and offers --offline if KIS cannot be reached."""
    for code, words in ((3, "EGW00121"), (6, "--offline")):
        ran = give(make_jwt(APP_KEY), "import", "us")
        assert (ran.code, words in one_line(ran)) == (code, True)
        os.environ["KIS_BASE_URL"] = "http://127.0.0.1:1"
    assert TokenManager("us").load_token() is None
    assert asked(gateway) == 0


def test_completion_knows_commands_options_and_the_settings_markets(command: Command) -> None:
    """In a real bash, completion offers commands, markets and clients; zsh's and fish's scripts know the markets."""
    own = {"KIS_MARKETS__HK__EXCHANGES": "SEHK"}
    Path("script").write_text(command("completion", "bash", **own).out)
    for line, offered in {"ge": {"get"}, "get ": {"us", "kr", "hk"}, "export kr --to ": {*CLIENTS}}.items():
        words = ["tokencore", *line.split(), *([""] if line.endswith(" ") else [])]
        typed = f"COMP_WORDS=({' '.join(word or repr('') for word in words)}); COMP_CWORD={len(words) - 1}"
        ask = 'compopt() { :; }; _shtab_tokencore; printf "%s\\n" "${COMPREPLY[@]}"'
        program = ["bash", "-c", f"source ./script\n{typed}\n{ask}"]
        assert set(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()) == offered
    assert all("us kr hk" in command("completion", shell, **own).out for shell in ("zsh", "fish"))


# --- the front door: `get`, wrong usage, outputs that cannot be written

HEAVY = ("requests", "urllib3", "pydantic", "pydantic_settings", "filelock", "prefect", "argparse", "holidays")
SLOW = ("typing", "pathlib", "logging", "tomllib", "dotenv")  # each takes a millisecond to import
GET = """if True:
    import sys
    before = {*sys.modules}
    from tokencore.cli import main
    code = main(["get", "us"])
    print(*{*sys.modules} - before, file=sys.stderr)
"""


def test_get_prints_the_token_and_nothing_else_and_imports_nothing_heavy_for_it(gateway: Sandbox) -> None:
    """Get prints the token and a newline; a cached one costs no request and loads no HTTP, validation or locking."""
    first, second = tokencore("get", "us"), tokencore("get", "kr")
    assert (first.code, first.err, first.out.count("\n")) == (0, "", 1)
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", first.out)
    out, modules = start(GET).communicate(timeout=30)
    assert first.out == second.out == out
    assert set(modules.split()).isdisjoint((*HEAVY, *SLOW))
    assert "tokencore.manager" in modules
    assert asked(gateway) == 1


@pytest.mark.usefixtures("gateway")
def test_a_get_that_waits_for_another_process_imports_little_for_it() -> None:
    """A command that finds the token while another process still holds the lock loads neither HTTP nor validation."""
    store, token = Key.load(Settings.load())[0].store, make_token()
    with store.lock(wait=5):
        waiting = start(GET)
        time.sleep(1)
        assert waiting.poll() is None
        store.save(token)
        out, modules = waiting.communicate(timeout=30)
    assert out == f"{token.access_token}\n"
    assert set(modules.split()).isdisjoint(("requests", "pydantic", "holidays", "asyncio"))


def test_warnings_of_get_begin_with_the_programs_name(gateway: Sandbox) -> None:
    """Warnings of get begin with `tokencore:`, with and without a cached token; standard output has the token alone."""
    for _ in range(2):
        ran = tokencore("get", "us", KIS_APP_KEY=f" {APP_KEY}", KIS_ENVIRONMENT="mock", KIS_BASE_URL=gateway.url)
        lines = ran.err.splitlines()
        assert (ran.code, len(ran.out.split()), bool(lines)) == (0, 1, True)
        assert [line for line in lines if not line.startswith("tokencore: ")] == []


def test_get_no_renew_asks_nothing(gateway: Sandbox, command: Command) -> None:
    """With --no-renew, get prints the cached token as long as it is valid, and otherwise exits 3 with a sentence."""
    ran = command("get", "us", "--no-renew")
    assert (ran.code, "NO_TOKEN" in one_line(ran)) == (3, True)
    token = cached(1_000)
    assert command("get", "--no-renew", "us") == Ran(0, token.access_token + "\n", "")
    cached(299)
    for style in ([], ["--json"], ["--format", "env"]):
        assert "EXPIRED" in one_line(command("get", "us", "--no-renew", *style))
    assert asked(gateway) == 0


def test_get_for_a_shells_eval_sets_variables_that_children_see(command: Command) -> None:
    """A token's special characters reach the variable unchanged, and the shell runs none of them."""
    odd = "$(>ran)`>ran`;>ran;\\'\"&*"
    USTokenManager().save_token(make_token(text=odd))
    lines = command("get", "us", "--format", "env").out
    program = f"eval \"$(cat)\"; {sys.executable} -c \"import os; print(os.environ['KIS_ACCESS_TOKEN'], end='')\""
    ran = subprocess.run(["/bin/sh", "-euc", program], input=lines, capture_output=True, text=True, check=True)
    assert (ran.stdout, os.path.exists("ran")) == (odd, False)
    assert re.search(r"^export KIS_TOKEN_EXPIRES_AT=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", lines, re.MULTILINE)


def test_get_as_other_programs_read_it(command: Command) -> None:
    """Get prints JSON in UTC, AWS's `credential_process`, tokenP's answer in KST, curl's header, and Docker's lines."""
    token = cached(20_000)

    def said(*options: str) -> str:
        ran = command("get", "US", *options)
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    ours, answer = json.loads(said("--json")), json.loads(said("--format", "answer"))
    expiry, text = f"{token.expires_at:%Y-%m-%dT%H:%M:%SZ}", token.access_token
    both = {"access_token": text, "token_type": "Bearer"}
    issued, left = (ours.pop(name) for name in ("issued_at", "remaining_seconds"))
    assert datetime.fromisoformat(issued) < datetime.now(UTC)
    at = f"{token.expires_at:%Y-%m-%dT%H:%M:%S}+00:00"
    assert ours == both | {"market": "us", "environment": "real", "expires_at": at}
    assert 19_900 < answer.pop("expires_in") <= left <= 20_000
    assert answer == both | {"access_token_token_expired": f"{token.expires_at.astimezone(KST):%Y-%m-%d %H:%M:%S}"}
    assert json.loads(said("--format", "process")) == {"Version": 1, "token": text, "Expiration": expiry}
    assert said("--format", "header") == f"Authorization: Bearer {text}\n"
    assert said("--format", "dotenv") == f"KIS_ACCESS_TOKEN={text}\nKIS_TOKEN_EXPIRES_AT={expiry}\n"
    assert [one["market"] for one in json.loads(command("check", "US", "us", "us", "--json").out)] == ["us"]


WRONG = [line.split() for line in (
    "get us --json --format env", "get us --format yaml", "get", "gett us", "get us kr", "get us --force", "get hk",
    "get us --no-renew --approval-key",
    "get ../us", "check us hk", "check --probed", "refresh", "delete", "history us kr", "tick us", "exec us",
    "exec us -- no-such-program", "reject us --json", "completion cmd", "sandbox --port x", "plan --days 0",
    "plan --days 32", "plan --days x", "plan --svg no/plan.svg", "plan --json --svg -",
)]  # fmt: skip


@pytest.mark.parametrize("arguments", [*WRONG, ["get", ""], ["get", "\udcff"]], ids=" ".join)
def test_wrong_usage_is_one_sentence_and_exit_2(command: Command, arguments: list[str]) -> None:
    """Wrong usage is exit 2 and a sentence that says what was wrong, without usage text or traceback."""
    ran = command(*arguments)
    assert (ran.code, bool(one_line(ran))) == (2, True)


@pytest.mark.parametrize("error", [RuntimeError("the secret is Canary"), OSError(errno.ENOSPC, "Canary")], ids=repr)
def test_unexpected_error_is_one_line_without_its_text(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A bug is exit 1 with its place but without its text, which may hold a secret; the output is not blamed."""

    def bug(_: TokenManager) -> str:
        raise error

    monkeypatch.setattr(TokenManager, "get_valid_token", bug)
    ran = command("get", "us")
    assert ran.code == 1
    assert re.search(rf"Unexpected {type(error).__name__}.* at test_commands.py", one_line(ran))
    assert "Canary" not in ran.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "| true"])
@pytest.mark.parametrize("line", ["get us", "check", "--help", "plan --svg -"])
def test_output_that_cannot_be_written_is_one_line_and_1(line: str, redirect: str) -> None:
    """A full or closed output is exit 1 and just one sentence; a pipe whose reader has gone changes no exit code."""
    cached(20_000)
    if (line, redirect) == ("check", "| true"):
        TokenManager("us").delete_token()
        TokenManager("kr").delete_token()
    program = f"({sys.executable} -m tokencore {line}; echo $? >code) {redirect}"
    ran = subprocess.run(["/bin/sh", "-c", program], stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    code = int(Path("code").read_text())
    if redirect == "| true":
        assert (code, ran.stderr) == (3 if line == "check" else 0, "")
    else:
        assert (code, "Standard output cannot be written" in one_line(Ran(1, "", ran.stderr))) == (1, True)


def test_interrupted_command_ends_at_once_with_one_line(gateway: Sandbox) -> None:
    """Ctrl-C during a request ends with one line and no traceback, and the attempt stays recorded."""
    gateway.fail("hang")
    listening = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # even in the background
    running = start(f"{listening}; from tokencore.cli import main; sys.exit(main(['get', 'us']))")
    until(lambda: asked(gateway) == 1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err, outcomes()) == (130, "", "tokencore: Interrupted.\n", ["sent"])


def test_command_alone_prints_the_help_and_says_what_is_missing(command: Command) -> None:
    """Without a command, help with all commands and exit codes goes to standard output, and the exit code is 2."""
    ran = command()
    assert (ran.code, ran.out.startswith("usage: tokencore")) == (2, True)
    assert re.fullmatch(r"tokencore: No command was given[^\n]+\n", ran.err)
    assert command("--help") == Ran(0, ran.out, "")
    words = [name for names in COMMANDS.values() for name in names] + ["7 store unusable"]
    assert [word for word in words if word not in ran.out] == []


@pytest.mark.parametrize("text", sorted({REFUSED, *(fix for _, _, fix in KNOWN.values())}))
def test_a_command_that_a_message_names_is_whole(text: str) -> None:
    """Whoever types what a message says to run meets no error of usage."""
    for named in re.findall("`tokencore ([^`]+)`", text):
        parsers()[0].parse_args(named.split())
