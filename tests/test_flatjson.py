"""The light reader of JSON: the same as `json.loads` for every text, and without importing it for ours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from builders import KEY, NOW, make_token
from hypothesis import example, given, settings
from hypothesis import strategies as st
from running import start

from tokencore import flatjson
from tokencore.tokens import to_cache

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = json.dumps(to_cache(make_token(now=NOW), now=NOW, environment="real", key_fingerprint="0" * 16), indent=2) + "\n"
CLAIMS = json.dumps({"sub": "token", "exp": 1_795_358_818, "iat": 0, "jti": KEY}, separators=(",", ":"))
SIGNS = ['"', ":", ",", "{", "}", "[", "]", "\\", " ", "\n", "\t", "\0", "\x7f", "\u00a0", "\ufeff", "\ud800"]
SIGNS += ["0", "1", "-", ".", "e", "٣", "a", "null", "true", "NaN", '"a"', '"a":', '"a":"b"', '"a":1', '"a":01']
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def made(read: Callable[[str], object], text: str) -> str:
    """What a reader makes of a text, with its types; or that it is no JSON."""
    try:
        return repr(read(text))
    except ValueError:
        return "no JSON"


def agree(text: str) -> None:
    """The light reader and the full one have the same answer."""
    assert made(flatjson.loads, text) == made(json.loads, text)


@given(st.lists(st.sampled_from(SIGNS), max_size=14).map("".join))
@example('{"a":"b",}')
@example('{"a":1,}')
@example('{,"a":1}')
@example('{"a":"b""c":1}')
@example('{"a":1,2}')
@example('{"a":1,"a":"b"}')
@example('{"a":-1}')
@example('{"a":' + "9" * 5000 + "}")
@settings(max_examples=1000)
def test_every_text_of_json_signs_is_read_as_json_reads_it(text: str) -> None:
    """Whatever order braces, quotes, commas and digits stand in, both readers agree on it."""
    agree(text)
    agree("{" + text + "}")


@given(VALUES, st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_every_value_is_read_as_json_reads_it(value: object, indent: int | str | None, ascii_only: bool) -> None:  # noqa: FBT001 - drawn
    """Nested values, floats, escapes, numbers of any length: what is not flat and plain goes to `json`."""
    agree(json.dumps(value, indent=indent, ensure_ascii=ascii_only))


@given(st.sampled_from([FILE, CLAIMS]), st.data())
@settings(max_examples=500)
def test_every_damage_to_a_token_file_is_read_as_json_reads_it(text: str, data: st.DataObject) -> None:
    """A token file and the claims of a JWT with a piece cut out and another sign put in."""
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 3)))
    agree(text[:begin] + data.draw(st.sampled_from(["", *SIGNS])) + text[end:])


@pytest.mark.parametrize(
    "text", [FILE, CLAIMS, "{}", ' {"a" : 1 }\r\n'], ids=["token file", "claims", "empty", "loose"]
)
def test_what_is_usual_is_read_without_json(text: str) -> None:
    """The files that we write and the claims of KIS's tokens cost no import of `json`."""
    program = "import sys; from tokencore.flatjson import loads; print(loads(sys.stdin.read()), 'json' in sys.modules)"
    out, _ = start(program).communicate(text, timeout=30)
    assert out == f"{json.loads(text)} False\n"
