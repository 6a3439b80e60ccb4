#!/usr/bin/env python3
"""Make docs/compare.png of a page of `turboquant compare`: `python3 tools/make_screenshot.py compare-…/report.html`.

The program needs chromium and chromedriver, and the Python packages selenium, pytest and Pillow.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

import browser  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument(
        "picture", type=Path, nargs="?", default=ROOT / "docs" / "compare.png", help="default: %(default)s"
    )
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument(
        "--height", type=int, help="of the picture, from the page's top; default: to the end of the charts"
    )
    options = parser.parse_args()
    from PIL import Image

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser.start(Path(profile)) as window:
        window.open(options.page.resolve(), width=options.width)
        end = "return Math.ceil(document.querySelector('.charts').getBoundingClientRect().bottom + scrollY + 16);"
        shot = window.screenshot(options.height or window.run(end))
    picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(options.picture, optimize=True)
    print(f"{options.picture}: {picture.width} x {picture.height}, {options.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
