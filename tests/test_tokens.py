"""The token as a value: when it ends, which formats it is read from, and what is refused as a token."""

import json
import math
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from builders import DAY, NOW, make_answer, make_jwt, make_token
from hypothesis import given
from hypothesis import strategies as st

from tokencore.tokens import Token, as_answer, from_answer, from_text, to_cache

HOUR = timedelta(hours=1)
PLAIN, JWT = "opaque-token-of-another-format", make_jwt(issued=NOW)
IN_KST, IN_UTC = "2026-11-24 17:15:00", "2026-11-24T08:15:00Z"


def set_zone(name: str) -> None:
    """Set this machine's time zone until the test ends."""
    os.environ["TZ"] = name
    time.tzset()


def from_content(content: dict[str, Any]) -> Token:
    """The token read from a file with these fields."""
    return from_text(json.dumps(content, default=str))[0]


@given(st.lists(st.one_of(st.none(), st.integers(-100_000, 10_000_000)), min_size=3, max_size=3))
def test_the_expiry_is_the_earliest_of_all_that_kis_says(told: list[int | None]) -> None:
    """Of the text in KST, the JWT's `exp` and `expires_in` the earliest counts, and any of them may be missing."""
    text, claim, lifetime = told
    answer: dict[str, object] = {"access_token": make_jwt(issued=NOW, exp=None), "token_type": "Bearer"}
    if text is not None:
        answer["access_token_token_expired"] = f"{NOW + timedelta(seconds=text) + 9 * HOUR:%Y-%m-%d %H:%M:%S}"
    if claim is not None:
        answer["access_token"] = make_jwt(issued=NOW, exp=int(NOW.timestamp()) + claim)
    if lifetime is not None:
        answer["expires_in"] = (lifetime, lifetime + 0.0, f" {lifetime} ")[lifetime % 3]
    known = [seconds for seconds in told if seconds is not None]
    if not known:
        with pytest.raises(ValueError, match="no readable expiry"):
            from_answer(answer, NOW)
        return
    assert from_answer(answer, NOW).expires_at == NOW + timedelta(seconds=min(known))


@pytest.mark.parametrize(
    ("age", "life"),
    [(0 * HOUR, DAY), (5 * HOUR, DAY), (0 * HOUR, 90 * DAY)],
    ids=["usual", "repeated: its own issue and expiry", "three months, as of partner corporates"],
)
def test_the_answer_of_kis_is_read_whole(age: timedelta, life: timedelta) -> None:
    """An answer gives issue and expiry in aware UTC, even if a repeated token's `expires_in` claims a whole life."""
    token = from_answer(make_answer(life.total_seconds(), now=NOW - age), NOW + timedelta(seconds=3))
    assert (token.issued_at, token.expires_at, token.token_type) == (NOW - age, NOW - age + life, "Bearer")
    assert token.expires_at.tzinfo is UTC


LIFETIMES = (True, None, "", "soon", math.nan, math.inf, 1e300, 10**400, "9" * 50, [86_400])
TIMES = (None, "", "soon", True, math.nan, 1e400, 10**400, -1, "2026-13-01 00:00:00", "9999-12-31 23:59:59")


@pytest.mark.parametrize(("lifetime", "text"), list(zip(LIFETIMES, TIMES, strict=True)))
def test_an_expiry_that_cannot_be_one_counts_for_nothing(lifetime: object, text: object) -> None:
    """A damaged lifetime or time is not taken for an expiry; without another one the JWT's own `exp` suffices."""
    answer = {"access_token": PLAIN, "expires_in": lifetime, "access_token_token_expired": text}
    with pytest.raises(ValueError, match="no readable expiry"):
        from_answer(answer, NOW)
    with pytest.raises(ValueError, match="no expiry"):
        from_content({"access_token": PLAIN, "expires_at": text})
    assert from_content({"access_token": JWT, "expires_at": text}).expires_at == NOW + DAY


@pytest.mark.parametrize("text", [None, "", 5, "two words", "line\nbreak", "토큰", "\x7f", "x" * 5000])
def test_what_cannot_stand_in_a_header_is_no_token(text: object) -> None:
    """Text that would break or forge a header never becomes a token, and the error does not repeat it."""
    with pytest.raises(ValueError, match="access_token") as caught:
        from_answer({**make_answer(now=NOW), "access_token": text}, NOW)
    assert not text or str(text) not in str(caught.value)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)
FIELDS = ("access_token", "expires_at", "cached_at", "created_at", "issued_at", "expires_in", "rejected_at")
BROKEN = (make_jwt(exp=1e300, iat="x"), "a.b.c", "a.!!.c", "a.W10.c", f"a.{'W1tb' * 9999}.c", "2026-02-30")
TEXTS = st.sampled_from([PLAIN, make_jwt(), *BROKEN])


@given(st.dictionaries(st.sampled_from([*FIELDS, "access_token_token_expired"]), st.one_of(JSON, TEXTS)))
def test_no_content_breaks_the_reading(content: dict[str, Any]) -> None:
    """Any content of a file or an answer gives a token with aware times, or a `ValueError`."""
    for from_file in (True, False):
        try:
            token = from_content(content) if from_file else from_answer(content, NOW)
        except ValueError:
            continue
        assert token.expires_at.utcoffset() == timedelta(0)
        assert token.issued_at is None or token.issued_at.utcoffset() == timedelta(0)
        token.same_until()


@given(st.timedeltas(-2000 * DAY, 20_000 * DAY), st.integers(1, 10**7), st.sampled_from([NOW, None]))
def test_a_token_file_gives_back_what_was_saved(age: timedelta, life: int, rejected_at: datetime | None) -> None:
    """Text, expiry, issue and rejection come back from the file, to the microsecond."""
    saved = Token(PLAIN, NOW + age + timedelta(seconds=life), NOW + age, rejected_at=rejected_at)
    found, content = from_text(to_cache(saved, now=NOW, environment="paper", key_fingerprint="ab"))
    for field in ("access_token", "expires_at", "issued_at", "rejected_at", "token_type"):
        assert getattr(found, field) == getattr(saved, field)
    assert (found.cached_at, content["environment"], content["key_fingerprint"]) == (NOW, "paper", "ab")


@pytest.mark.parametrize("machine", ["Asia/Seoul", "UTC", "America/New_York"])
def test_times_of_earlier_tools_are_read_in_the_zone_they_were_written_in(machine: str) -> None:
    """Naive times are this machine's, epoch seconds need no zone, and of two readings the earlier expiry counts."""
    set_zone(machine)
    local, epoch = NOW.astimezone().replace(tzinfo=None), NOW.timestamp() + 0.25
    for content in (
        {"access_token": PLAIN, "expires_at": (local + DAY).isoformat(), "cached_at": local.isoformat()},
        {"access_token": PLAIN, "expires_at": epoch + 86_400, "created_at": epoch, "expires_datetime": "x"},
    ):
        found = from_content(content)
        for at, expected in ((found.issued_at, NOW), (found.expires_at, NOW + DAY)):
            assert at is not None
            assert abs(at - expected) < timedelta(seconds=1)
    elsewhere = (NOW + DAY + 9 * HOUR).replace(tzinfo=None)  # written in Seoul: the JWT's own `exp` bounds it
    assert from_content({"access_token": JWT, "expires_at": elsewhere.isoformat()}).expires_at == NOW + DAY
    assert from_content({"token": PLAIN, "expire": IN_KST}).expires_at == NOW + DAY  # KST or this machine's zone


FORMS = {
    "tokenP's own answer": json.dumps(make_answer(now=NOW)),
    "the same of ours": json.dumps(as_answer(make_token(now=NOW), NOW + HOUR)),
    "tokenP's answer with an opaque token": json.dumps({"access_token": PLAIN, "access_token_token_expired": IN_KST}),
    "other names": json.dumps({"token": PLAIN, "expired_at": IN_KST}),
    "camel and dashes": json.dumps({"Token": PLAIN, "Expiration": IN_UTC}),
    "epoch": json.dumps({"access_token": PLAIN, "expires_on": (NOW + DAY).timestamp()}),
    "epoch as text": json.dumps({"access_token": PLAIN, "timestamp": str(int((NOW + DAY).timestamp()))}),
    "the official sample's YAML": f"token: {JWT}\nvalid-date: 2026-11-24 17:15:00\n",
    "process": json.dumps({"Version": 1, "token": PLAIN, "Expiration": IN_UTC}),
    "env": f"export KIS_ACCESS_TOKEN={PLAIN}\nexport KIS_TOKEN_EXPIRES_AT={IN_UTC}\n",
    "dotenv": f"KIS_ACCESS_TOKEN={PLAIN}\nKIS_TOKEN_EXPIRES_AT={IN_UTC}\n",
    "header": f"Authorization: Bearer {JWT}",
    "bearer": f"Bearer {JWT}\n",
    "bare": f"\ufeff{JWT}\r\n",
    "a JSON string, as jq prints it": f'"{JWT}"\n',
    "one level down": json.dumps({"data": make_answer(now=NOW)}),
    "a list": json.dumps([make_answer(now=NOW)]),
    "PowerShell": f'$env:KIS_ACCESS_TOKEN="{JWT}"\n',
    "a variable of another name": f"KIS_TOKEN={JWT}\n",
    "camel case": json.dumps({"accessToken": PLAIN, "expiresAt": IN_UTC}),
    "expires_in": json.dumps({"access_token": PLAIN, "issued_at": NOW.isoformat(), "expires_in": 86400}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_people_already_have_is_understood(form: str) -> None:
    """Every form in which people keep a token and its expiry is read, with the same expiry."""
    set_zone("Asia/Seoul")
    token = from_text(FORMS[form])[0]
    assert token.access_token in {PLAIN, JWT}
    assert token.expires_at == NOW + DAY


def test_a_token_serves_until_the_buffer_before_its_expiry() -> None:
    """A token serves to a microsecond before expiry minus buffer, and never if rejected; its times must have a zone."""
    token, end = make_token(now=NOW), NOW + DAY - timedelta(seconds=300)
    assert [token.serves(at, 300) for at in (end - timedelta(microseconds=1), end)] == [True, False]
    assert not make_token(now=NOW, rejected=True).serves(NOW, 0)
    with pytest.raises(ValueError, match="zone"):
        Token(PLAIN, NOW.replace(tzinfo=None))


@pytest.mark.parametrize(("life", "seconds"), [(86_400, 21_600), (90 * 86_400, 21_600), (8, 2)])
def test_the_same_token_comes_back_for_six_hours(life: float, seconds: float) -> None:
    """Six hours after the issue, whose second KIS cuts off, there is another; a shorter life counts by a quarter."""
    assert make_token(life, now=NOW).same_until() == NOW + timedelta(seconds=seconds + 1)
    assert Token(PLAIN, NOW + DAY).same_until() is None
