"""`tokencore metrics`: what Prometheus reads, over HTTP, from a file and from standard output."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import requests
from builders import CANARIES, KEY, SECRET
from prometheus_client.parser import text_string_to_metric_families
from running import Ran, cached, folder, issue_of, on_disk, one_line, snapshot

from tokencore import TokenManager
from tokencore.commands.health import LOOPBACK, _address
from tokencore.exporter import Exporter
from tokencore.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tokencore.sandbox import Sandbox

    Command = Callable[..., Ran]


def samples(text: str) -> dict[str, dict[str, float]]:
    """The samples by name, then by market and outcome."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = " ".join(sample.labels[name] for name in ("market", "outcome") if name in sample.labels)
            found.setdefault(sample.name, {})[label] = sample.value
    return found


@pytest.fixture
def exporter(gateway: Sandbox) -> Iterator[Exporter]:  # noqa: ARG001 - for its settings
    """The exporter on a free port."""
    with Exporter(LOOPBACK, 0) as running:
        yield running


def get(exporter: Exporter, path: str, **headers: str) -> requests.Response:
    """What it answers."""
    return requests.get(exporter.url + path, headers=headers, timeout=5)


@pytest.mark.usefixtures("gateway")
def test_standard_output_has_every_market(command: Command) -> None:
    """Times are the token's own in epoch seconds, states 0 or 1, and all outcomes stand there from the start."""
    TokenManager("us").get_valid_token()
    found = samples(command("metrics").out)
    token = on_disk()
    assert found["kis_token_expiration_timestamp_seconds"] == {
        "us": token.expires_at.timestamp(), "kr": token.expires_at.timestamp(),
    }  # fmt: skip
    assert found["kis_token_issue_timestamp_seconds"]["kr"] == issue_of(token).timestamp()
    assert found["kis_token_valid"] == {"us": 1, "kr": 1}
    assert found["kis_issuance_last_day_issues"]["us"] == 1
    attempts = found["kis_issuance_attempts_total"]
    assert {name for name in attempts if name.startswith("us ")} == {f"us {outcome}" for outcome in Outcome}
    assert (attempts["us issued"], attempts["us limit"]) == (1, 0)


@pytest.mark.usefixtures("gateway")
def test_what_is_unknown_is_absent(command: Command) -> None:
    """Without a token there is no expiry, rather than 1970, and without a cool-down no end of one; valid is 0."""
    found = samples(command("metrics").out)
    assert found["kis_token_valid"] == {"us": 0, "kr": 0}
    for name in ("kis_token_expiration", "kis_token_issue", "kis_issuance_cooldown_end"):
        assert f"{name}_timestamp_seconds" not in found
    assert found["kis_token_need_start_timestamp_seconds"]["us"] > 0


def test_the_textfile_is_replaced_whole_and_readable_by_all(gateway: Sandbox, command: Command, tmp_path: Path) -> None:
    """Mode 0644 under any umask, nothing else left in the folder, and nothing issued or written elsewhere."""
    cached()
    before, target = snapshot(folder()), tmp_path / "node" / "kis.prom"
    target.parent.mkdir()
    old = os.umask(0o077)
    try:
        for _ in range(2):
            assert command("metrics", "--textfile", str(target)) == Ran(0, "", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["kis.prom"]
    assert samples(target.read_text())["kis_token_valid"] == {"us": 1, "kr": 1}
    assert snapshot(folder()) == before
    assert gateway.stats()["requests"] == []


@pytest.mark.usefixtures("gateway")
def test_a_textfile_without_a_name_is_exit_2(command: Command) -> None:
    """A shell's unset variable is no wish for standard output: cron would keep quiet about it."""
    ran = command("metrics", "--textfile", "")
    assert (ran.code, ran.out) == (2, "")
    assert "cannot be written" in ran.err


@pytest.mark.usefixtures("gateway")
def test_a_textfile_that_cannot_be_written_is_exit_2(command: Command, tmp_path: Path) -> None:
    """One sentence with the path, and no draft is left."""
    target = tmp_path / "kis.prom"
    target.mkdir()
    ran = command("metrics", "--textfile", str(target))
    assert ran.code == 2
    assert str(target) in one_line(ran)
    assert [path.name for path in tmp_path.iterdir() if "prom" in path.name] == ["kis.prom"]


def test_scrapes_speak_the_format_that_is_asked_for(exporter: Exporter) -> None:
    """Prometheus' text by default, OpenMetrics for who accepts it; HEAD has no body, other paths are 404."""
    plain = get(exporter, "/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "kis_token_valid" in samples(plain.text)
    open_metrics = get(exporter, "/metrics?x=1", Accept="application/openmetrics-text; version=1.0.0")
    assert open_metrics.headers["Content-Type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")
    assert requests.head(exporter.url + "/metrics", timeout=5).content == b""
    assert get(exporter, "/").status_code == 404


def test_every_scrape_reads_anew(exporter: Exporter) -> None:
    """What changed between two scrapes shows in the second."""
    assert samples(get(exporter, "/metrics").text)["kis_token_valid"]["us"] == 0
    TokenManager("us").get_valid_token()
    assert samples(get(exporter, "/metrics").text)["kis_token_valid"]["us"] == 1


@pytest.mark.usefixtures("nowhere")
def test_ready_is_when_every_market_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with the reason for each market that lacks a token, 200 when none does; alive it is in any case."""
    monkeypatch.setenv("KIS_MARKETS__KR__APP_KEY", KEY)
    monkeypatch.setenv("KIS_MARKETS__KR__APP_SECRET", SECRET)
    cached()
    with Exporter(LOOPBACK, 0) as exporter:
        answer = get(exporter, "/readyz")
        assert answer.status_code == 503
        assert answer.text.splitlines()[0] == "us: ready"
        assert answer.text.splitlines()[1].startswith("kr: not ready: there is no token; ")
        assert get(exporter, "/livez").status_code == 200
        TokenManager("kr").get_valid_token()
        assert get(exporter, "/readyz").status_code == 200


def test_serving_changes_nothing_and_tells_no_secret(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path issues, writes or shows a token, key or secret."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    cached(1_000)
    before = snapshot(folder())
    with Exporter(LOOPBACK, 0) as exporter:
        told = [get(exporter, path).text for path in ("/metrics", "/livez", "/readyz", "/")]
    assert [canary for canary in CANARIES if any(canary in text for text in told)] == []
    assert snapshot(folder()) == before
    assert gateway.stats()["requests"] == []


@pytest.mark.usefixtures("gateway")
def test_the_command_serves_until_sigterm_and_a_taken_port_is_exit_2(command: Command) -> None:
    """It ends with 0 and without a word on standard error; a second one on its port gets one sentence."""
    with subprocess.Popen(
        [sys.executable, "-m", "tokencore", "metrics", "--listen", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        address = running.stdout.readline().partition("/metrics")[0]
        assert requests.get(f"{address}/livez", timeout=5).text == "alive\n"
        ran = command("metrics", "--listen", address.removeprefix("http://"))
        assert ran.code == 2
        assert "cannot be had" in one_line(ran)
        running.send_signal(signal.SIGTERM)
        assert (running.communicate(timeout=10)[1], running.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9479", ("127.0.0.1", 9479)),
        (":9479", ("127.0.0.1", 9479)),
        ("192.0.2.1:9479", ("192.0.2.1", 9479)),
        ("[::1]:9479", ("::1", 9479)),
    ],
)
def test_other_hosts_are_only_where_they_are_named(text: str, address: tuple[str, int]) -> None:
    """A port alone is loopback's; every interface has to be asked for."""
    assert _address(text) == address


@pytest.mark.parametrize("text", ["", "localhost", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "port"])
def test_no_address_is_a_usage_error(command: Command, text: str) -> None:
    """Exit 2 and one sentence."""
    ran = command("metrics", "--listen", text)
    assert ran.code == 2
    assert "HOST:PORT" in one_line(ran)


def test_without_settings_nothing_is_exported(command: Command) -> None:
    """Exit 2 with the sentence that names the variable, rather than metrics without a market."""
    ran = command("metrics")
    assert ran.code == 2
    assert "KIS_APP_KEY" in one_line(ran)
