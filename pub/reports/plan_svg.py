"""The plan as a picture: a row per exchange with its sessions and needs, the token's life, the renewals, and now.

It is plain SVG, drawn 420 units wide so that it can be read on a phone, with its own background that follows
the reader's light or dark setting. It holds no token, key or secret.
"""

from __future__ import annotations

import textwrap
from datetime import datetime, timedelta
from html import escape
from typing import TYPE_CHECKING

from tokencore.sealing import sealed
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokencore.outlook import Plan, Row

WIDTH, MARGIN, LABEL = 420, 10, 46  # units; the label column holds an order code
ROW, BAR = 22, 12  # units: the height of a row, and of a session's bar
HEAD, FOOT = 62, 34
TITLE = 52  # characters that fit in the width
TIP = 1.5  # units, the width of the buffer's mark: five minutes to scale would be invisible
_LEGEND = ("session", "need", "quiet", "token", "buffer", "renewal")  # the words, and the colours that they explain
_STYLE = """
text{font:11px system-ui,sans-serif;fill:var(--ink)}.small{font-size:9.5px;fill:var(--soft)}
.title{font-weight:600;font-size:13px}
svg{--paper:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--quiet:#eef6ee;--need:#b6d7f5;--session:#1f6feb;
--token:#2da44e;--buffer:#d29922;--renewal:#cf222e}
@media(prefers-color-scheme:dark){svg{--paper:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--quiet:#12261a;
--need:#1d3b60;--session:#4493f8;--token:#3fb950;--buffer:#d29922;--renewal:#ff7b72}}
""".replace("\n", "")


@sealed
def draw_plans(plans: Sequence[Plan]) -> str:
    """Draw the plans, one key below the other, as an SVG document; times are in KST."""
    drawn, height, title = [], 0, "; ".join(f"{' + '.join(plan.markets)}: {_rule(plan)}" for plan in plans)
    for plan in plans:
        drawn.append(f'<g transform="translate(0 {height})">{"".join(_panel(plan))}</g>')
        height += _bottom(plan) + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%" role="img" '
        f'style="max-width:840px"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="var(--paper)"/>{"".join(drawn)}</svg>\n'
    )


def _panel(plan: Plan) -> list[str]:
    bottom, x = _bottom(plan), _x(plan, plan.now)
    return [
        _text(MARGIN, 18, textwrap.shorten(" + ".join(plan.markets), TITLE, placeholder=" …"), "title"),
        _text(MARGIN, 31, f"{_rule(plan)}; days and times in KST", "small"),
        *_quiet(plan, bottom),
        *_days(plan, bottom),
        *[part for number, row in enumerate(plan.rows) for part in _row(plan, row, HEAD + ROW * number)],
        *_token(plan, bottom - ROW),
        *[_renewal(plan, renewal.at, bottom) for renewal in plan.renewals],
        f'<path d="M{x} {HEAD - 4}V{bottom}" stroke="var(--ink)" stroke-width="1.2"/>',
        _text(x + 2, bottom + 10, "now", "small"),
        *_legend(bottom + FOOT - 8),
    ]


def _row(plan: Plan, row: Row, top: float) -> list[str]:
    return [
        _text(MARGIN, top + 14, row.code),
        *[_bar(plan, need, top + 3, BAR + 4, "need") for need in row.needs],
        *[_bar(plan, session, top + 5, BAR, "session") for session in row.sessions],
    ]


def _bottom(plan: Plan) -> int:
    return HEAD + ROW * (len(plan.rows) + 1)


def _rule(plan: Plan) -> str:
    if plan.refused:
        return "KIS refused the credentials: no renewal until a person acts"
    anchor = plan.outlook.anchor
    return f"one token, renewal aimed at {anchor:%H:%M} KST" if anchor else "one token, renewed before it expires"


def _x(plan: Plan, at: datetime) -> float:
    left, right = MARGIN + LABEL, WIDTH - MARGIN
    share = (at - plan.start) / (plan.until - plan.start)
    return round(left + (right - left) * min(1.0, max(0.0, share)), 1)


def _bar(plan: Plan, span: tuple[datetime, datetime], top: float, height: float, colour: str, why: str = "") -> str:
    """Draw a bar with its times as its tooltip; with a `why`, which precedes them, it is planned and drawn hollow."""
    begin, end = _x(plan, span[0]), _x(plan, span[1])
    if end <= begin:
        return ""
    look = f'fill="none" stroke="var(--{colour})"' if why else f'fill="var(--{colour})"'
    return (
        f'<rect x="{begin}" y="{top}" width="{round(end - begin, 1)}" height="{height}" rx="1.5" {look}>'
        f"<title>{why}{_span(span)}</title></rect>"
    )


def _days(plan: Plan, bottom: float) -> Iterable[str]:
    count = (plan.until - plan.start).days
    step = max(1, round(count / 7))
    for number in range(count + 1):
        day = plan.start + timedelta(days=number)
        x = _x(plan, day)
        yield f'<path d="M{x} {HEAD - 6}V{bottom}" stroke="var(--line)" stroke-width=".7"/>'
        if number < count and number % step == 0:
            yield _text(x + 2, HEAD - 10, day.astimezone(KST).strftime("%a %d"), "small")


def _quiet(plan: Plan, bottom: float) -> Iterable[str]:
    """Draw the time of day in which no exchange of the key needs a token on any day."""
    if plan.outlook.quiet is None:
        return
    begin, end = plan.outlook.quiet
    for number in range(-1, (plan.until - plan.start).days + 1):
        day = (plan.start + timedelta(days=number)).astimezone(KST).date()
        closes = day + timedelta(days=end <= begin)
        span = datetime.combine(day, begin, KST), datetime.combine(closes, end, KST)
        yield _bar(plan, span, HEAD - 4, bottom - HEAD + 4, "quiet")


def _token(plan: Plan, top: float) -> Iterable[str]:
    """Draw the life of the present token, the buffer at its end and, hollow, the lives of the tokens planned."""
    yield _text(MARGIN, top + 14, "token")
    tip = timedelta(seconds=plan.buffer)
    token = plan.token
    if token and token.rejected_at is None:
        begin = token.issued_at or plan.start
        yield _bar(plan, (begin, token.expires_at - tip), top + 5, BAR, "token")
        if plan.start < token.expires_at < plan.until:
            x = _x(plan, token.expires_at)
            yield f'<rect x="{x - TIP}" y="{top + 5}" width="{TIP}" height="{BAR}" fill="var(--buffer)"/>'
    for life in plan.lives:
        yield _bar(plan, life, top + 6, BAR - 2, "token", "planned: ")


def _renewal(plan: Plan, at: datetime, bottom: float) -> str:
    x, tip = _x(plan, at), f"<title>renewal {_span((at, at))}</title>"
    return (
        f'<path d="M{x} {HEAD - 4}V{bottom - 2}" stroke="var(--renewal)" stroke-dasharray="2 2"/>'
        f'<circle cx="{x}" cy="{bottom - 11}" r="3" fill="var(--renewal)">{tip}</circle>'
    )


def _legend(y: float) -> Iterable[str]:
    x = float(MARGIN)
    for word in _LEGEND:
        yield f'<rect x="{x}" y="{y - 8}" width="9" height="9" fill="var(--{word})" stroke="var(--line)"/>'
        yield _text(x + 12, y, word, "small")
        x += 24 + 5.2 * len(word)


def _text(x: float, y: float, words: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{round(x, 1)}" y="{y}"{kind}>{escape(words)}</text>'


def _span(span: tuple[datetime, datetime]) -> str:
    begin, end = f"{span[0].astimezone(KST):%m-%d %H:%M}", f"{span[1].astimezone(KST):%m-%d %H:%M}"
    return f"{begin} KST" if begin == end else f"{begin} to {end} KST"
