"""The issuance record's form: one JSON object a line, which other programs read too. Never a token or a key."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tokencore.attempts import BY_LENGTH, REASON_LENGTH, Attempt, Outcome
from tokencore.tokens import sane

CODE_LENGTH, DIGEST_LENGTH, HOST_LENGTH = 12, 8, 64
KEEP = 1024  # attempts: years of daily renewals, or days of KIS being down
_WORDS = frozenset(Outcome)


def parse(text: str) -> list[Attempt]:
    """All attempts, oldest first; a line that cannot be read is skipped."""
    return [attempt for line in text.split("\n") if (attempt := _parse(line))]


def render(attempts: list[Attempt]) -> str:
    """The file's content: the last `KEEP` attempts."""
    return "".join(f"{json.dumps(_content(one), ensure_ascii=False)}\n" for one in attempts[-KEEP:])


def _content(attempt: Attempt) -> dict[str, Any]:
    content = {
        "at": attempt.at.isoformat(timespec="milliseconds"),
        "outcome": attempt.outcome.value,
        "code": attempt.code,
        "expires_at": attempt.expires_at.isoformat() if attempt.expires_at else None,
        "reason": attempt.reason[:REASON_LENGTH],
        "by": attempt.by[:BY_LENGTH],
        "credentials": attempt.credentials,
        "pid": attempt.pid,
    }
    return content | {"host": attempt.host} if attempt.host else content


def _parse(line: str) -> Attempt | None:
    try:
        found = json.loads(line)
        word = found["outcome"]
        return Attempt(
            at=_aware(found["at"]),
            # A later version's own word is an attempt of which no more is known than that it was made.
            outcome=Outcome(word) if word in _WORDS else Outcome.SENT,
            code=str(found["code"])[:CODE_LENGTH] if found.get("code") else None,
            expires_at=_aware(found["expires_at"]) if found.get("expires_at") else None,
            reason=str(found.get("reason", ""))[:REASON_LENGTH],
            by=str(found.get("by", ""))[:BY_LENGTH],
            credentials=str(found.get("credentials", ""))[:DIGEST_LENGTH],
            pid=int(found.get("pid", 0)),
            host=str(found.get("host", ""))[:HOST_LENGTH],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _aware(text: str) -> datetime:
    at = datetime.fromisoformat(text).astimezone(UTC)
    if not sane(at):
        raise ValueError(at)
    return at
