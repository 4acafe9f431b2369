"""JSON for the path of a cached token: `json.loads`, without the `json` package for what is usually there.

Importing `json` brings `re` and `enum` along: 3.5 ms, a third of what Python takes to start at all. Token files
and the claims of a JWT are flat objects of plain strings and whole numbers; those are read here, and
everything else by `json` itself.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"  # what JSON allows around its signs, and nothing else
_DIGITS = 15  # of a whole number that is read here; an epoch has ten


def loads(text: str) -> Any:  # noqa: ANN401 - whatever is in there, as json.loads has it
    """What `json.loads` makes of `text`.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested without end.

    """
    found = _flat_object(text)
    if found is not None:
        return found
    import json  # 3.5 ms

    return json.loads(text)


def _flat_object(text: str) -> dict[str, str | int] | None:
    """The object, if it is a flat one of plain strings and whole numbers; None for every other text."""
    body = text.strip(_SPACE)
    if body[:1] != "{" or body[-1:] != "}" or "\\" in body:
        return None
    # Without a backslash a quote begins or ends a string: every second piece lies inside of one.
    pieces = body[1:-1].split('"')
    strings, signs = pieces[1::2], [piece.strip(_SPACE) for piece in pieces[::2]]
    if len(strings) == len(signs) or signs[0] or not all(string.isprintable() for string in strings):
        return None
    signs[-1] += ","  # so that every member ends with one
    found: dict[str, str | int] = {}
    name = None
    for string, after in zip(strings, signs[1:], strict=True):
        number = after[1:-1].strip(_SPACE)
        if name is not None and after == ",":
            found[name], name = string, None
        elif name is None and after == ":":
            name = string
        elif name is None and after == f":{after[1:-1]}," and _is_whole(number):
            found[string] = int(number)
        else:
            return None
    return found


def _is_whole(number: str) -> bool:
    plain = number.isascii() and number.isdecimal() and len(number) <= _DIGITS
    return plain and (number == "0" or number[0] != "0")
