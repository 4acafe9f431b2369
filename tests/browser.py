"""A person at the page: a Chromium of this machine, driven through playwright's Python package."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
PATIENCE = 60_000.0  # milliseconds for what two idle cores do in three seconds

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed here")


@contextlib.contextmanager
def page(width: int = 1280, height: int = 800) -> Iterator[Page]:
    """An empty page of a browser with a profile of its own."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-component-update"])
        opened = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
        opened.set_default_timeout(PATIENCE)
        yield opened
        browser.close()


def sign_in(page: Page, password: str) -> None:
    """Answer the page that a server with a password shows first; it goes on to where one wanted to go."""
    page.get_by_placeholder("admin:pass").fill(password)
    page.get_by_role("button", name="Login").click()
    page.get_by_placeholder("admin:pass").wait_for(state="detached")
