"""A reader of KIS<date> files that does what the official sample's `kis_auth.py` does, step by step.

The sample (koreainvestment/open-trading-api, examples_user/kis_auth.py) is published without a package, so this
module, written for the tests, follows its published logic under the same names: the file of today is named when the
module is imported and made empty where it is missing; it is parsed as YAML, and local times are compared as text.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
import yaml

# ruff: noqa: DTZ002 - local times, as the sample's
config_root = Path.home() / "KIS" / "config"
token_tmp = config_root / f"KIS{datetime.today():%Y%m%d}"
token_tmp.touch()
_cfg = yaml.safe_load((config_root / "kis_devlp.yaml").read_text(encoding="utf-8"))
_base_headers = {"Content-Type": "application/json", "Accept": "text/plain", "charset": "UTF-8"}


def read_token() -> str | None:
    """The token of the file while its `valid-date` is later than the local clock; None for anything else."""
    try:
        found = yaml.safe_load(Path(token_tmp).read_text(encoding="utf-8"))
        expiry = datetime.strftime(found["valid-date"], "%Y-%m-%d %H:%M:%S")
        return str(found["token"]) if expiry > datetime.today().strftime("%Y-%m-%d %H:%M:%S") else None
    except Exception:  # noqa: BLE001 - as the sample does
        return None


def auth() -> None:
    """Use the saved token, or ask for one and save it, with its time as KIS told it."""
    if (token := read_token()) is None:
        asked = {"grant_type": "client_credentials", "appkey": _cfg["my_app"], "appsecret": _cfg["my_sec"]}
        url = f"{_cfg['prod']}/oauth2/tokenP"
        answer = requests.post(url, data=json.dumps(asked), headers=_base_headers, timeout=10).json()
        token, expiry = answer["access_token"], answer["access_token_token_expired"]
        Path(token_tmp).write_text(f"token: {token}\nvalid-date: {expiry}\n", encoding="utf-8")
    _base_headers.update(authorization=f"Bearer {token}", appkey=_cfg["my_app"], appsecret=_cfg["my_sec"])


def _url_fetch(api_url: str, ptr_id: str, tr_cont: str, params: dict[str, str]) -> Any:  # noqa: ANN401 - JSON
    headers = {**_base_headers, "tr_id": ptr_id, "custtype": "P", "tr_cont": tr_cont}
    return requests.get(f"{_cfg['prod']}{api_url}", headers=headers, params=params, timeout=10).json()
