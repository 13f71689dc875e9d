"""A picture of a report, as README shows it: python tools/screenshot.py REPORT.html OUT.png [WIDTH [HEIGHT [light]]]

Opens the file in the machine's own Chromium without a window, on a dark page unless `light` is asked for. HEIGHT 0 takes
the whole page, and is the default.
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import window

WIDTH = 1200


def shoot(report: Path, out: Path, width: int = WIDTH, height: int = 0, *, light: bool = False) -> None:
    """Write a picture of `report` to `out`, at two pixels to a point.

    Raises:
        ValueError: if there is no Chromium.
    """
    with window() as browser:
        page = browser.new_page(
            viewport={"width": width, "height": height or 900},
            device_scale_factor=2,
            color_scheme="light" if light else "dark",
        )
        page.goto(report.resolve().as_uri())
        page.wait_for_function("[...document.querySelectorAll('.js-chart')].every(box => box.querySelector('.main-svg'))")
        page.screenshot(path=out, full_page=height == 0)


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    sizes = [int(size) for size in sys.argv[3:5]]
    shoot(Path(sys.argv[1]), Path(sys.argv[2]), *sizes, light=sys.argv[5:] == ["light"])
