"""`tokencore metrics`: what Prometheus reads over HTTP, from a file and from standard output."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import requests
from builders import CANARIES, KEY, SECRET, make_token
from prometheus_client.parser import text_string_to_metric_families
from running import Command, Opens, Ran, asked, cached, folder, issue_of, on_disk, one_line, snapshot

from tokencore import Key, Settings, TokenManager
from tokencore.attempts import Outcome
from tokencore.commands.monitoring import LOOPBACK, address
from tokencore.reports.metrics import Watch, listening
from tokencore.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("gateway")


def samples(text: str) -> dict[str, dict[str, float]]:
    """The samples by name, then by market and outcome."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = " ".join(sample.labels[name] for name in ("market", "outcome") if name in sample.labels)
            found.setdefault(sample.name, {})[label] = sample.value
    return found


@pytest.fixture
def url(gateway: Sandbox) -> Iterator[str]:  # noqa: ARG001 - for its settings
    """The URL of an exporter on a free port."""
    with listening(Watch(), LOOPBACK, 0) as running:
        yield running


def get(url: str) -> requests.Response:
    """Return the answer to a GET request."""
    return requests.get(url, timeout=5)


def test_standard_output_has_what_is_known_of_every_market(command: Command) -> None:
    """Without a token there is no expiry, rather than 1970; with one there are its times, and always all outcomes."""
    found, day = samples(command("metrics").out), 86_400.0
    assert found["kis_token_valid"] == {"us": 0, "kr": 0}
    edges = [found[f"kis_token_need_{edge}_timestamp_seconds"]["us"] for edge in ("start", "end")]
    assert 0 < edges[1] - edges[0] < day
    times = ("kis_token_expiration", "kis_token_issue", "kis_issuance_cooldown_end", "kis_approval_key_expiration")
    assert not {f"{name}_timestamp_seconds" for name in times} & found.keys()
    TokenManager("us").get_valid_token()
    TokenManager("us").get_approval_key()
    found, token = samples(command("metrics").out), on_disk()
    assert found["kis_token_expiration_timestamp_seconds"] == dict.fromkeys(("us", "kr"), token.expires_at.timestamp())
    assert found["kis_token_issue_timestamp_seconds"]["kr"] == issue_of(token).timestamp()
    assert (found["kis_token_valid"], found["kis_issuance_last_day_issues"]["us"]) == ({"us": 1, "kr": 1}, 1)
    assert found["kis_approval_key_expiration_timestamp_seconds"]["kr"] == pytest.approx(time.time() + day, abs=60)
    attempts = found["kis_issuance_attempts_total"]
    assert {name: attempts[f"us {name}"] for name in Outcome} == {name: float(name == "issued") for name in Outcome}


def test_the_textfile_is_replaced_whole_and_readable_by_all(command: Command, tmp_path: Path) -> None:
    """The file has mode 0644 under any umask, leaves no draft, and is replaced behind a link that leads to it."""
    cached()
    (tmp_path / "node").mkdir()
    (link := tmp_path / "link").symlink_to(target := tmp_path / "node" / "kis.prom")
    for place in (target, link):
        os.umask(0o077)
        assert (command("metrics", "--textfile", str(place)), os.umask(0o022)) == (Ran(0, "", ""), 0o077)
        assert samples(place.read_text())["kis_token_valid"] == {"us": 1, "kr": 1}
    assert (stat.S_IMODE(target.lstat().st_mode), link.is_symlink()) == (0o644, True)
    assert list(target.parent.iterdir()) == [target]


def test_a_textfile_that_is_no_file_is_refused(command: Command, tmp_path: Path) -> None:
    """An empty path, as of an unset variable, a folder, a device or no folder is one sentence, even for root."""
    os.mkfifo(pipe := tmp_path / "pipe")
    (folder := tmp_path / "folder").mkdir()
    for place in ("", str(folder), str(pipe), f"{folder}/missing/kis.prom"):
        assert f"--textfile={place} cannot be written" in one_line(command("metrics", "--textfile", place))
    assert (pipe.is_fifo(), folder.is_dir()) == (True, True)
    os.chdir(folder)
    folder.rmdir()
    assert "cannot be written (No such file" in one_line(command("metrics", "--textfile", "kis.prom"))


def test_every_scrape_reads_anew(url: str) -> None:
    """The next scrape shows another process's renewal and a new market; broken settings leave the last good ones."""
    plain = get(f"{url}/metrics?name[]=kis_token_valid")
    assert plain.headers["Content-Type"].startswith("text/plain; version=")
    assert samples(plain.text)["kis_token_valid"]["us"] == 0
    TokenManager("us").get_valid_token()
    os.environ["KIS_MARKETS__HK__EXCHANGES"] = "SEHK"
    for buffer, good in (("300", 1), ("long", 0), ("300", 1)):
        os.environ["KIS_BUFFER"] = buffer
        found = samples(get(f"{url}/metrics").text)
        assert (found["kis_settings_readable"], found["kis_token_valid"]) == ({"": good}, {"us": 1, "kr": 1, "hk": 1})
    (path := next(folder().glob("key-*.jsonl"))).unlink()
    path.mkdir()
    name = "kis_issuance_record_readable"
    assert (found[name]["us"], samples(get(f"{url}/metrics").text)[name]["us"]) == (1, 0)
    assert {get(url + path).status_code for path in ("/", "/readyz/jp", "/readyz/us/x", "/livez/us")} == {404}


@pytest.mark.parametrize(("minutes", "needed"), [(-5, True), (180, False)], ids=["open", "closed"])
def test_ready_is_whoever_has_a_token_for_the_session_that_runs(
    gateway: Sandbox, url: str, opens: Opens, minutes: int, *, needed: bool
) -> None:
    """`/readyz` is 503, with the reason, only while a session runs without a token that lasts; `/livez` never is."""
    own = {"MINE__EXCHANGES": opens(timedelta(minutes=minutes)), "MINE__APP_KEY": KEY, "MINE__APP_SECRET": SECRET}
    own |= {"US__EXCHANGES": "[]", "KR__EXCHANGES": "[]"}
    os.environ |= {f"KIS_MARKETS__{name}": value for name, value in own.items()}
    gateway.set_rules(issue_interval=0)
    answer = get(f"{url}/readyz/MINE")
    assert answer.status_code == get(f"{url}/readyz").status_code == (503 if needed else 200)
    reason = "mine: not ready: no token serves now (NO_TOKEN); the session ends at " if needed else "mine: ready"
    assert answer.text.startswith(reason)
    assert (get(f"{url}/readyz/us").text, get(f"{url}/livez").text) == ("us: ready\n", "alive\n")
    TokenManager("mine").save_token(make_token(1_000))
    assert ("the token serves until" in get(f"{url}/readyz/mine").text) is needed
    TokenManager("mine").refresh(force=True)
    assert get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize(("minutes", "needed"), [(-5, True), (180, False)], ids=["open", "closed"])
def test_one_broken_key_hides_no_other(gateway: Sandbox, url: str, opens: Opens, minutes: int, *, needed: bool) -> None:
    """An unreadable key is 0 in one metric, absent from the others and unready in a session; nothing is written."""
    gateway.set_rules(issue_interval=0)
    opens(timedelta(minutes=minutes))
    os.environ |= {"KIS_MARKETS__KR__APP_KEY": KEY, "KIS_MARKETS__KR__APP_SECRET": SECRET}
    for market in ("us", "kr"):
        TokenManager(market).get_valid_token()
    (folder() / f"key-{Key.load(Settings.load())[1].fingerprint}.json").chmod(0o666)
    before = snapshot(folder())
    metrics, ready = get(f"{url}/metrics").text, get(f"{url}/readyz").text
    assert samples(metrics)["kis_market_readable"] == {"us": 1, "kr": 0}
    assert samples(metrics)["kis_token_valid"] == {"us": 1}
    assert ready.splitlines()[1] == f"kr: {'not ready: it cannot be read (TokenStoreError)' if needed else 'ready'}"
    assert [canary for canary in CANARIES if canary in metrics + ready] == []
    assert (snapshot(folder()), asked(gateway)) == (before, 2)


def test_the_command_serves_until_sigterm_and_a_taken_port_is_exit_2(command: Command) -> None:
    """The exporter ends with 0 and nothing on standard error; a second one on its port ends with one sentence."""
    program = [sys.executable, "-m", "tokencore", "metrics", "--listen", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        address = running.stdout.readline().partition("/metrics")[0].removeprefix("http://")
        ran = command("metrics", "--listen", address)
        assert (ran.code, "Cannot listen on 127.0.0.1" in one_line(ran)) == (2, True)
        running.send_signal(signal.SIGTERM)
        assert (running.communicate(timeout=10)[1], running.returncode) == ("", 0)


def test_other_hosts_are_only_where_they_are_named(command: Command) -> None:
    """A port alone means loopback, any other interface has to be named, and a malformed address is a usage error."""
    assert address("9479") == address(":9479") == ("127.0.0.1", 9479)
    assert (address("192.0.2.1:9479"), address("[::1]:9479")) == (("192.0.2.1", 9479), ("::1", 9479))
    assert {command("metrics", "--listen", text).code for text in ("", "localhost", "127.0.0.1:65536")} == {2}


def test_the_alert_rules_and_the_dashboard_ask_for_the_metrics_and_outcomes_that_exist() -> None:
    """Together the alert rules and the dashboard use every metric, so that none is exported that nobody looks at."""
    known = {f"{one.name}_total" if one.type == "counter" else one.name for one in Watch().collect()}
    docs = Path(__file__).resolve().parent.parent / "docs"
    text = "".join((docs / name).read_text(encoding="utf-8") for name in ("alerts.rules.yml", "grafana.json"))
    assert set(re.findall(r"\bkis_\w+", text)) == known
    outcomes = {word for words in re.findall(r'outcome!?=~?\\?"([\w|]+)', text) for word in words.split("|")}
    assert set() < outcomes <= set(Outcome)
