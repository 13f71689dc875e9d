"""The machine's own Chromium, for whatever draws or is tested in one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """Where it is; None if there is none on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def window() -> Iterator[Browser]:
    """One that runs without a window.

    Raises:
        ValueError: if there is none.
    """
    if (path := chromium()) is None:
        raise ValueError(f"no Chromium on the path (looked for {', '.join(NAMES)})")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
