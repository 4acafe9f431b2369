"""The token of every market, and what the key's record says of the last requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokencore import record
from tokencore.doctor.finding import CREDENTIALS, NO_TOKEN, fail, ok, warn
from tokencore.limits import tell
from tokencore.refusals import KNOWN

if TYPE_CHECKING:
    from tokencore.doctor.finding import Finding
    from tokencore.manager import TokenManager
    from tokencore.vitals import Vitals


def check(one: Vitals) -> Finding:
    """The token of a market."""
    name = f"token {one.market}"
    if one.trouble:
        return fail(name, one.trouble, "look at the token directory, above", NO_TOKEN)
    hope = f"the next renewal is planned for {tell(one.renewal_at)}" if one.renewal_at else ""
    if not one.valid:
        cure = f"tokencore get {one.market}" + (f", or wait: {hope}" if hope else "")
        return fail(name, f"{one.status}: no program can use it", cure, NO_TOKEN)
    until = f"valid until {tell(one.expires_at)}" if one.expires_at else "valid"
    if one.need is None:
        return ok(name, f"{until}; no exchange is configured")
    need = f"the need from {tell(one.need[0])}"
    if one.covered:
        return ok(name, f"{until}; covers {need}")
    if hope:
        return ok(name, f"{until}; {hope}, ahead of {need}")
    return warn(name, f"{until}, not through {need}, and no renewal is planned", "see the line on issuing")


def issuing(manager: TokenManager, one: Vitals) -> Finding:
    """What the record of a key says: refused credentials, the ceiling, the last request."""
    name = f"issuing {'+'.join(manager.sharing())}"
    if one.attempts is None:
        return warn(name, "the issuance record cannot be read", "mend the permissions of key-*.jsonl")
    last = record.latest(manager.history())
    if last is None:
        return ok(name, "no request is on record")
    told = f"last request {tell(last.at)}: {last.outcome}; {one.issues} of {one.ceiling} issues in 24 hours"
    if last.outcome in record.CREDENTIALS:
        cure = KNOWN[last.code].cure if last.code in KNOWN else "check the credentials; then run `tokencore refresh`"
        return fail(name, f"{told}; nothing tries again by itself", cure, CREDENTIALS)
    if one.issues >= one.ceiling:
        return warn(name, told, "wait, or find out what renews so often: tokencore history")
    return ok(name, told)
