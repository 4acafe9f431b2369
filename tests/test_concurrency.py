"""Many processes and threads at once: one request, everyone served, and nobody left with a dead process's lock."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import requests
from builders import ended, in_child, make_token
from running import asked, at_a_barrier, start, until

from tokencore import KRTokenManager, USTokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from running import Ran

PROCESSES = 32
MINUTE = 60.0  # seconds: KIS's, on the gateway and in the settings
WANT_A_TOKEN = """
import json, sys, time
from tokencore import TokenManager

manager = TokenManager(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
token = manager.get_valid_token()
print(json.dumps([time.monotonic(), token]))
"""
FOLLOW_THE_RULE = """
import json, sys
from datetime import datetime
from tokencore import Key, Settings

key = Key.load(Settings.load())[0]
state = key.state(datetime.fromisoformat(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
decision = key.tick(state)
print(json.dumps([decision.renewed, repr(decision.trouble)]))
"""


def answers(ends: list[Ran]) -> list[tuple[float, str]]:
    """When each process had its token, and which; all of them ended well."""
    assert [one.code for one in ends] == [0] * len(ends), ends[0].err
    return [(at, token) for at, token in (json.loads(one.out) for one in ends)]


def test_start_of_32_processes_makes_one_request_and_serves_all_at_once(slow: Sandbox) -> None:
    """Fresh processes without a token, half for us and half for kr: one issue for all, and none sits out the minute.

    How soon they have it is measured by `benchmarks/stampede.py`.
    """
    began, ends = at_a_barrier(WANT_A_TOKEN, [[("us", "kr")[n % 2]] for n in range(PROCESSES)])
    served = answers(ends)
    assert len({token for _, token in served}) == 1
    assert asked(slow) == 1
    assert max(at for at, _ in served) - began < MINUTE / 2


@pytest.mark.usefixtures("nowhere")
def test_renewal_ahead_by_32_processes_is_one_request_and_nobody_waits_in_vain(slow: Sandbox) -> None:
    """With 25 minutes left one process renews; the others are served the old token, or late ones the new."""
    old = make_token(age=86_400 - 1_500)
    USTokenManager().save_token(old)
    _, ends = at_a_barrier(WANT_A_TOKEN, [["us"]] * PROCESSES)
    assert {token for _, token in answers(ends)} <= {old.access_token, USTokenManager().get_valid_token()}
    assert asked(slow) == 1


def test_processes_that_start_inside_a_foreign_minute_wait_it_out_and_ask_once_more(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program issued just before the start: one refusal, then one request for all, a cool-down later."""
    gateway.set_rules(issue_interval=60)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "1.5")
    body = {"grant_type": "client_credentials", "appkey": APP_KEY, "appsecret": APP_SECRET}
    assert requests.post(f"{gateway.url}/oauth2/tokenP", json=body, timeout=5).status_code == 200
    refused = threading.Thread(target=_end_the_minute_after_a_refusal, args=(gateway,))
    refused.start()
    _, ends = at_a_barrier(WANT_A_TOKEN, [["us"]] * 8)
    refused.join()
    assert len({token for _, token in answers(ends)}) == 1
    assert [request["outcome"] for request in gateway.stats()["requests"]] == ["new", "EGW00133", "same"]


def _end_the_minute_after_a_refusal(gateway: Sandbox) -> None:
    until(lambda: asked(gateway) == 2, within=30)
    gateway.set_rules(issue_interval=0)


def test_32_threads_make_one_request(slow: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that share a manager, and threads with one each, get one token from one request, minute or not."""
    slow.set_rules(issue_interval=0)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "0")
    shared = USTokenManager()
    barrier, got = threading.Barrier(PROCESSES), []

    def want(number: int) -> None:
        own = shared if number % 2 else KRTokenManager()
        barrier.wait()
        got.append(own.get_valid_token())

    threads = [threading.Thread(target=want, args=(n,)) for n in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == PROCESSES
    assert len(set(got)) == 1
    assert asked(slow) == 1


def test_child_forked_while_a_thread_renews_waits_for_it_and_gets_its_token(slow: Sandbox) -> None:
    """A fork in the middle of a renewal inherits neither gate nor lock: the child is served by the same request."""
    manager = USTokenManager()
    got: list[str] = []
    renewing = threading.Thread(target=lambda: got.append(manager.get_valid_token()))
    renewing.start()
    until(lambda: asked(slow) == 1)

    def ask_in_the_child() -> None:
        served = manager.get_valid_token()
        assert served == KRTokenManager().get_valid_token()

    began = time.monotonic()
    assert ended(in_child(ask_in_the_child)) == 0
    assert time.monotonic() - began < 5
    renewing.join()
    assert got == [manager.get_valid_token()]
    assert asked(slow) == 1


def test_process_killed_while_it_asks_frees_the_lock_but_not_the_minute(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `kill -9` in the middle of a request, with a forked child alive, the next process waits out the minute."""
    gateway.set_rules(issue_interval=0, latency=5)
    monkeypatch.setenv("KIS_ISSUE_INTERVAL", "1")
    monkeypatch.setenv("KIS_TIMEOUT", "0.9")
    program = WANT_A_TOKEN.replace("token =", "import os, threading; threading.Thread(target=fork).start(); token =")
    forking = "import os, time\ndef fork():\n    time.sleep(0.2)\n    os.fork() or time.sleep(3)\n"
    victim = start(forking + program, "us")
    assert victim.stdin is not None
    victim.stdin.write("go\n")
    victim.stdin.flush()
    until(lambda: asked(gateway) == 1)
    time.sleep(0.4)
    victim.send_signal(signal.SIGKILL)
    gateway.set_rules(latency=0)
    began = time.monotonic()
    assert USTokenManager().get_valid_token()
    assert time.monotonic() - began < 4
    assert asked(gateway) == 2
    assert [attempt.outcome.value for attempt in USTokenManager().history()] == ["sent", "issued"]
    first, second = (attempt.at for attempt in USTokenManager().history())
    assert (second - first).total_seconds() >= 1
    victim.communicate()


def test_concurrent_ticks_make_one_request_and_none_of_them_reports_trouble(slow: Sandbox) -> None:
    """Eight schedulers fire in the same second: one renews, the others see that another was quicker."""
    _, ends = at_a_barrier(FOLLOW_THE_RULE, [["2025-11-24T08:15:00+00:00"]] * 8)
    decisions = [json.loads(one.out) for one in ends]
    assert sorted(decisions) == [[False, "None"]] * 7 + [[True, "None"]]
    assert asked(slow) == 1
