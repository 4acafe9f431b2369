"""Takes the pictures of README and of these pages, from a running system of its own; `make pictures` runs it.

The market `hk` has a key that KIS refuses, so that the page shows the worst first. Needs Chromium or Chrome.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

import requests
from playwright.sync_api import sync_playwright

from flows.stack import demo, environment, supervisor
from flows.stack.api import REFRESH, Api

if TYPE_CHECKING:
    from collections.abc import Mapping

    from playwright.sync_api import Page

FOLDER = Path(__file__).parent / "images"
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ANOTHER = {
    "KIS_MARKETS__HK__EXCHANGES": "SEHK",
    "KIS_MARKETS__HK__APP_KEY": f"PS{'wrong' * 6}1234",
    "KIS_MARKETS__HK__APP_SECRET": "wrong" * 36,
}
SCREEN, PHONE = (1280, 540), (390, 844)  # pixels


def main() -> None:
    """Have a token of one key, start the system, be refused one of the other key, and take the pictures."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tokencore-pictures-") as folder, demo.sandbox(Path(folder)) as known:
        _plan(known)
        given, home = known | ANOTHER, Path(known["PREFECT_HOME"])
        stack = supervisor.start(home, given, Path(folder))
        try:
            password = environment.password(home, given) or ""
            api = Api(environment.address(given), password)
            requests.post(f"{known['KIS_BASE_URL']}/sandbox/fail", json={"mode": "bad-key", "count": 1}, timeout=10)
            api.run_to_end(REFRESH, market="hk", operator="make pictures", reason="a picture")
            _take(environment.page(given), password)
        finally:
            supervisor.stop(stack)


def _plan(known: Mapping[str, str]) -> None:
    """The week ahead of a key that has just been renewed."""
    for arguments in (("get", "us"), ("plan", "--svg", str(FOLDER / "plan.svg"))):
        command = [sys.executable, "-m", "tokencore", *arguments]
        subprocess.run(command, env=known, cwd=known["HOME"], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own


def _take(page: str, password: str) -> None:
    """The newest table of tokens, on a screen and on a phone."""
    with sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
        shown = browser.new_page(color_scheme="light", reduced_motion="reduce", timezone_id="Asia/Seoul")
        shown.goto(f"{page}/artifacts/key/tokens")
        shown.get_by_placeholder("admin:pass").fill(password)
        shown.get_by_role("button", name="Login").click()
        shown.wait_for_url("**/artifacts/key/tokens*")
        shown.locator('a[href*="/artifacts/artifact/"]').first.click()
        shown.get_by_role("cell", name="hk", exact=True).wait_for()
        shown.get_by_text("Ready to scale?").wait_for(state="hidden")  # there until the page has read its settings
        for name, (width, height) in {"page.png": SCREEN, "phone.png": PHONE}.items():
            _shoot(shown, FOLDER / name, width, height)


def _shoot(shown: Page, file: Path, width: int, height: int) -> None:
    shown.set_viewport_size({"width": width, "height": height})
    shown.wait_for_load_state("networkidle")
    shown.evaluate("document.fonts.ready")
    shown.screenshot(path=file, animations="disabled")
    print(f"{file.relative_to(FOLDER.parents[1])}  {file.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
