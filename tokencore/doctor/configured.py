"""The settings: well-formed or not, and where each came from, with everything masked that is not plainly public."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokencore import outlets, settings, sources
from tokencore.doctor.finding import SETTINGS, fail, ok, skipped, warn
from tokencore.errors import ConfigurationError
from tokencore.settings import Settings
from tokencore.sources import CONFIG_FILE, DOTENV_FILE

if TYPE_CHECKING:
    from typing import Any

    from tokencore.doctor.finding import Finding
    from tokencore.sources import Gathered

PLAIN = (
    *("ENVIRONMENT", "BASE_URL", "TOKEN_DIR", "EXCHANGES", "EXPORTS", "CLOSED", "EXTENDED", "ISSUE_INTERVAL"),
    *("KEYRING", "BUFFER", "PROACTIVE_WINDOW", "TIMEOUT", "MAX_ISSUES_PER_DAY", "SLACK_CHANNEL"),
)  # what may be shown; any other value might be secret
LENGTHS = {"APP_KEY": 36, "APP_SECRET": 180}  # characters, as KIS issues them
LONGEST = 60  # characters of a value that are shown
_OTHERS = 0o077


def check() -> list[Finding]:
    """Whether the settings load, and a line for each that is set."""
    try:
        found = sources.gather()
    except ConfigurationError as error:
        return [fail("settings", str(error), "mend or remove that source", SETTINGS)]
    unknown, kept = settings.unknown_names(), _in_keyring(found)
    known = [_one(name, found) for name in sorted(found.origins) if name not in unknown]
    alien = [_alien(*one) for one in unknown.items()]
    return [_loads(found), *known, *kept, *alien, *_shared_exports(found), *_open_to_others(found)]


def _loads(found: Gathered) -> Finding:
    try:
        Settings.load()
    except ConfigurationError as error:
        return fail("settings", str(error), "correct it where it was set, see below", SETTINGS)
    if not any(name.endswith("APP_KEY") for name in found.origins):
        cure = f"set KIS_APP_KEY and KIS_APP_SECRET in the environment, .env or {CONFIG_FILE}"
        return fail("settings", "no market has an app key", cure, SETTINGS)
    return ok("settings", f"{len(found.origins)} set, all well-formed")


def _one(name: str, found: Gathered) -> Finding:
    value = _value(name, found.values)
    field = name.rpartition("__")[2].removeprefix("KIS_")
    shown = f"{_shown(field, value)}, from {_place(found.origins[name])}"
    usual = LENGTHS.get(field)
    if usual and isinstance(value, str) and len(value.strip()) != usual:
        shown += f"; KIS's have {usual}: copy it again if KIS refuses it"
    return ok(f"setting {name}", shown)


def _shown(field: str, value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if field not in PLAIN or "@" in text or "?" in text:
        return f"{len(text.strip())} characters"
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _place(origin: str) -> str:
    return "the environment" if origin == "environment" else origin


def _value(name: str, values: dict[str, Any]) -> object:
    branch: Any = values
    for step in name.lower().removeprefix("kis_").split("__"):
        branch = branch.get(step, "") if isinstance(branch, dict) else ""
    return branch


def _in_keyring(found: Gathered) -> list[Finding]:
    """The secrets that only the keyring has; without KIS_KEYRING nothing is asked."""
    try:
        origins = sources.origins()
    except ConfigurationError as error:
        return [fail("keyring", str(error), "unlock it, or give the secret another source", SETTINGS)]
    return [
        ok(f"setting {name}", f"kept, in {origin}") for name, origin in origins.items() if name not in found.origins
    ]


def _alien(name: str, meant: str) -> Finding:
    told = "is none of tokencore's settings"
    if not meant:
        return skipped(f"setting {name}", told, "remove it, unless another program uses it")
    return warn(f"setting {name}", told, f"meant is perhaps {meant}")


def _shared_exports(found: Gathered) -> list[Finding]:
    """Real and paper, or two keys, in one file of another client."""
    try:
        places = outlets.clashes(found.values)
    except (ConfigurationError, ValueError):  # the first line says why
        return []
    cure = "give each of them a folder of its own (KIS_MARKETS__<NAME>__EXPORTS)"
    told = "is named by markets with different keys or environments; the first one alone has its token there"
    return [fail("exports", f"{place.folder} ({place.client}) {told}", cure, SETTINGS) for place in places]


def _open_to_others(found: Gathered) -> list[Finding]:
    """Files with credentials in them that other users of the machine may read."""
    if os.name != "posix":
        return []
    holding = {origin for name, origin in found.origins.items() if name.endswith(("APP_KEY", "APP_SECRET", "_TOKEN"))}
    return [
        warn("settings file", f"{path} holds credentials, and other users may read it", f"chmod 600 {path}")
        for path in (DOTENV_FILE, CONFIG_FILE)
        if path in holding and os.stat(os.path.expanduser(path)).st_mode & _OTHERS
    ]
