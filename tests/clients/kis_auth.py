"""A reader of KIS<date> files that does what the official sample's `kis_auth.py` does, step by step.

The sample (koreainvestment/open-trading-api, examples_user/kis_auth.py) is published without a package, so this
module, written for the tests, follows its published logic under the same names: the file of today is named when the
module is imported and made empty where it is missing; `read_token` parses it as YAML and compares local times as
text; `auth` takes that token, or asks tokenP and saves the answer; calls go out by `_url_fetch`.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
import yaml

config_root = os.path.join(os.path.expanduser("~"), "KIS", "config")
token_tmp = os.path.join(config_root, f"KIS{datetime.today():%Y%m%d}")  # noqa: DTZ002 - local, as the sample's
if not os.path.exists(token_tmp):
    Path(token_tmp).touch()
_cfg = yaml.safe_load(Path(config_root, "kis_devlp.yaml").read_text(encoding="utf-8"))
_base_headers = {"Content-Type": "application/json", "Accept": "text/plain", "charset": "UTF-8"}


def save_token(my_token: str, my_expired: str) -> None:
    """Write the answer of tokenP, its time as KIS told it."""
    Path(token_tmp).write_text(f"token: {my_token}\nvalid-date: {my_expired}\n", encoding="utf-8")


def read_token() -> str | None:
    """The token of the file while its `valid-date` is later than the local clock; None for anything else."""
    try:
        found = yaml.safe_load(Path(token_tmp).read_text(encoding="utf-8"))
        expiry = datetime.strftime(found["valid-date"], "%Y-%m-%d %H:%M:%S")
        now = datetime.today().strftime("%Y-%m-%d %H:%M:%S")  # noqa: DTZ002 - local, as the sample's
        return str(found["token"]) if expiry > now else None
    except Exception:  # noqa: BLE001 - as the sample does
        return None


def auth(svr: str = "prod") -> None:
    """Use the saved token, or ask for one and save it."""
    app, secret = ("my_app", "my_sec") if svr == "prod" else ("paper_app", "paper_sec")
    token = read_token()
    if token is None:
        asked = {"grant_type": "client_credentials", "appkey": _cfg[app], "appsecret": _cfg[secret]}
        answer = requests.post(f"{_cfg[svr]}/oauth2/tokenP", data=json.dumps(asked), headers=_base_headers, timeout=10)
        if answer.status_code != requests.codes.ok:
            return
        token = answer.json()["access_token"]
        save_token(token, answer.json()["access_token_token_expired"])
    _base_headers.update(authorization=f"Bearer {token}", appkey=_cfg[app], appsecret=_cfg[secret])


def _url_fetch(api_url: str, ptr_id: str, tr_cont: str, params: dict[str, str]) -> Any:  # noqa: ANN401 - JSON
    headers = {**_base_headers, "tr_id": ptr_id, "custtype": "P", "tr_cont": tr_cont}
    return requests.get(f"{_cfg['prod']}{api_url}", headers=headers, params=params, timeout=10).json()
