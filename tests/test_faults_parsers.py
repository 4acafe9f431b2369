"""Bytes that nobody foresaw, in every parser of what this package did not write: `make fuzz` looks on for longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parsers import PARSERS
from scenarios import FULL

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = 3000 if FULL else 60
SIGNS = (b'"', b"{", b"}", b"[", b",", b":", b"=", b".", b"\\", b"\n", b"\0", b"\xff", b"-", b"9" * 20, b"1e400", b"__")


def damaged(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """A seed of which a few pieces are replaced by signs, others' pieces or chance."""
    piece = st.sampled_from(SIGNS) | st.binary(max_size=6) | st.sampled_from(seeds).map(lambda seed: seed[:400])

    @st.composite
    def draw(choose: st.DrawFn) -> bytes:
        content = choose(st.sampled_from(seeds))
        for _ in range(choose(st.integers(0, 4))):
            begin = choose(st.integers(0, len(content)))
            end = choose(st.integers(begin, min(len(content), begin + 12)))
            content = content[:begin] + choose(piece) + content[end:]
        return content

    return draw() | st.binary(max_size=200)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_keeps_its_promises_on_any_bytes(name: str, record_property: Callable[[str, object], None]) -> None:
    """Each seed, and what becomes of it by damage: documented errors, one line of words, no credential in them."""
    parse, seeds = PARSERS[name]
    for seed in seeds:
        parse(seed)

    @settings(max_examples=EXAMPLES, phases=[Phase.generate], database=None)
    @given(content=damaged(seeds))
    def explore(content: bytes) -> None:
        parse(content)

    explore()
    record_property("cases", len(seeds) + EXAMPLES)
