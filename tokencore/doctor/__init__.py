"""`tokencore doctor`: everything that a working set-up needs, looked at once, with the cure for what is wrong.

Read-only: nothing is issued, written or posted. It works with everything broken: each group of checks has its own
thread, and none of them is waited for longer than `DEADLINE`.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from tokencore import fleet, sessions, sources
from tokencore.doctor import configured, duplicates, gateway, others, place, tokens
from tokencore.doctor.finding import Finding, State, fail, skipped
from tokencore.errors import TokenError
from tokencore.market import DEFAULT_EXCHANGES, TOKEN_DIR, fingerprint
from tokencore.market import folder as absolute
from tokencore.vitals import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from tokencore.manager import TokenManager

    Check = Callable[[], list[Finding]]

__all__ = ["Finding", "State", "examine"]

DEADLINE = 30.0  # seconds for the whole examination


def examine() -> list[Finding]:
    """Look at everything; the findings in the order in which they are best mended."""
    values, keys = _values(), _keys()
    folder = _folder(values)
    checks: dict[str, Check] = {"settings": configured.check, "token directory": partial(_place, folder, values, keys)}
    if keys:
        checks["tokens"] = partial(_tokens, keys)
    else:
        checks["tokens"] = partial(list, [skipped("tokens", "the settings must be mended first")])
    for url, there in _by_url(keys).items():
        checks[f"kis {url}"] = partial(gateway.check, url, there)
    checks["slack"] = partial(others.slack, values)
    checks["prefect"] = partial(others.prefect, _traded(keys), os.path.join(folder, "prefect"))
    checks["duplicates"] = partial(_duplicates, keys)
    return _all(checks)


def _all(checks: Mapping[str, Check]) -> list[Finding]:
    """What the checks find, each in a thread of its own that nobody waits for after the deadline."""
    found: dict[str, list[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = check()
        except TokenError as error:
            found[name] = [fail(name, str(error), "see the settings, above", error.exit_code)]
        except Exception as error:  # noqa: BLE001 - one check's fault hides no other; its text may hold anything
            found[name] = [fail(name, f"could not be looked at ({type(error).__name__})", "please report this line")]

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in checks.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + DEADLINE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {DEADLINE:.0f} s"
    return [one for name in checks for one in found.get(name) or [fail(name, late, "look for what hangs there")]]


def _values() -> dict[str, Any]:
    try:
        return sources.gather().values
    except TokenError:  # the first finding says why
        return {}


def _keys() -> list[TokenManager]:
    try:
        return fleet.managers(one_per_key=True)
    except TokenError:
        return []


def _folder(values: Mapping[str, Any]) -> str:
    try:
        return absolute(values.get("token_dir", TOKEN_DIR))
    except ValueError:
        return absolute(TOKEN_DIR)


def _place(folder: str, values: Mapping[str, Any], keys: list[TokenManager]) -> list[Finding]:
    markets = values.get("markets", {})
    return place.check(folder, {*DEFAULT_EXCHANGES, *markets}, [_fingerprint(key) for key in keys])


def _tokens(keys: list[TokenManager]) -> list[Finding]:
    seen = {one.market: one for one in Watch().look(datetime.now(UTC))}
    held = [tokens.check(one) for one in seen.values()]
    return held + [tokens.issuing(key, seen[key.market.name]) for key in keys]


def _by_url(keys: list[TokenManager]) -> dict[str, list[TokenManager]]:
    found: dict[str, list[TokenManager]] = {}
    for key in keys:
        found.setdefault(key.get_api_url(), []).append(key)
    return found


def _traded(keys: list[TokenManager]) -> list[str]:
    codes = [sessions.exchange(code).code for key in keys for code in key.key_exchanges()]
    return list(dict.fromkeys(codes))


def _duplicates(keys: list[TokenManager]) -> list[Finding]:
    if not keys:
        return [skipped("duplicates", "the settings must be mended first")]
    present: dict[str, list[str]] = {}
    for key in keys:  # one app key may serve real and paper
        token = key.newest_token()
        present.setdefault(str(key.market.app_key), []).extend([token.access_token] if token else [])
    return duplicates.check(present)


def _fingerprint(key: TokenManager) -> str:
    return fingerprint(str(key.market.app_key), key.get_api_url())
