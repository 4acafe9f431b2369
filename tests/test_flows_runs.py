"""What the flows share, without a Prefect server: safe errors, pauses between tries, one key beside the other."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import traceback
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from builders import ended, in_child
from hypothesis import given
from hypothesis import strategies as st
from running import asked

from flows import warm_up
from flows.runs import UnforeseenError, failures, harmless, retry_delays, safe_errors
from tokencore import IssuerUnavailableError, TokenError, TokenManager, TokenStoreError
from tokencore.policy import retry_delay
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

CANARY = "canary-0123456789"


def traced(error: Exception) -> str:
    """The traceback as Prefect would store it."""
    return "".join(traceback.format_exception(error))


def test_an_unforeseen_error_leaves_without_its_text() -> None:
    """Neither the message nor the traceback has the text of the error or of those behind it."""

    def fail() -> None:
        raise LookupError(CANARY) from KeyError(CANARY)

    with (
        pytest.raises(UnforeseenError, match=r"^Unexpected LookupError at test_flows_runs\.py:\d+; ") as caught,
        safe_errors(),
    ):
        fail()
    assert CANARY not in traced(caught.value)


def test_a_token_error_leaves_without_the_errors_behind_it() -> None:
    """Its own text is made for people; the error of a library that it was raised from is not."""

    def fail() -> None:
        raise IssuerUnavailableError("KIS cannot be reached.") from OSError(CANARY)

    with pytest.raises(TokenError, match="KIS cannot be reached") as caught, safe_errors():
        fail()
    assert CANARY not in traced(caught.value)


def test_a_warm_up_whose_token_reaches_no_file_has_failed(gateway: Sandbox) -> None:
    """On a full disk it does not say that the token is warm: no other process would find it."""

    def warm_up_on_a_full_disk() -> None:
        import resource  # not on every platform

        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # a line of the record fits, a token file does not
        with pytest.raises(TokenStoreError, match="only this process has it"):
            warm_up.keep(TokenManager("us"), datetime.now(UTC) + timedelta(hours=1))

    assert ended(in_child(warm_up_on_a_full_disk)) == 0
    assert asked(gateway) == 1


def test_what_is_harmless_is_logged_by_its_kind(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is raised, and the log does not have the error's text."""
    with harmless("The table could not be published"):
        raise OSError(CANARY)
    assert "The table could not be published: OSError." in caplog.text
    assert CANARY not in caplog.text


@given(interval=st.floats(0, 3600), minutes=st.integers(0, 600))
def test_prefect_never_tries_again_inside_the_cool_down(interval: float, minutes: int) -> None:
    """Every pause outlasts the issue interval by 5 s, all of them end within the span, and there are few."""
    delays = retry_delays(interval, timedelta(minutes=minutes))
    assert all(delay >= interval + 5 for delay in delays)
    assert sum(delays) <= minutes * 60
    assert len(delays) <= 20


def test_the_pauses_follow_the_renewal_rule() -> None:
    """With KIS's minute: 65 s three times, then 5 min, and 5 s more each; none without time before the open."""
    rule = [retry_delay(failed).total_seconds() + 5 for failed in itertools.chain(range(1, 8))]
    assert retry_delays(60, timedelta(minutes=24)) == rule
    assert retry_delays(60, timedelta(0)) == retry_delays(60, timedelta(minutes=-5)) == []


def test_a_failure_names_its_key_where_there_are_several() -> None:
    """With one key, the sentence is enough."""
    assert failures({"us+kr": IssuerUnavailableError("KIS is down.")}) == "KIS is down."
    assert failures({"us": IssuerUnavailableError("KIS is down."), "kr": "fine"}) == "us: KIS is down."
    assert failures({"us": "fine"}) == ""


def test_the_form_lists_the_configured_markets() -> None:
    """Those with credentials where there are any, else those that the settings name, else `us` and `kr`."""
    program = (
        "from flows.refresh_token import refresh_token; print(*refresh_token.parameters.properties['market']['enum'])"
    )

    def listed(**more: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KIS_")} | more
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    hong_kong = {"KIS_MARKETS__HK__EXCHANGES": "SEHK"}
    credentials = {"KIS_MARKETS__HK__APP_KEY": APP_KEY, "KIS_MARKETS__HK__APP_SECRET": APP_SECRET}
    assert listed(**hong_kong, **credentials) == "hk"
    assert listed(**hong_kong) == "us kr hk"
    assert listed(KIS_TIMEOUT="soon") == "us kr"
