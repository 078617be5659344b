"""Photographs the running demo for the README: ``python -m demo.screenshot http://127.0.0.1:7860/``.

Needs Playwright (the extra ``test``) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

OUTPUT = Path(__file__).parent.parent / "assets" / "readme" / "demo.png"
PATIENCE = 300_000  # milliseconds; a busy machine takes its time


def main() -> int:
    """Use a tab as a person would, wait for what it shows, and save the page with 256 colours."""
    parser = argparse.ArgumentParser(prog="python -m demo.screenshot", description=__doc__)
    parser.add_argument("address", help="of the running demo")
    parser.add_argument("--tab", choices=["ask", "compare", "choose"], default="ask", help="which tab (default: ask)")
    parser.add_argument("--sample", type=int, default=0, help="which sample picture, from 0 (default: 0)")
    parser.add_argument("--question", help="what to ask (default: what the sample suggests)")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels (default: 1200)")
    parser.add_argument("--dark", action="store_true", help="as people see it who prefer a dark page")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: assets/readme/demo.png")
    options = parser.parse_args()
    image = photograph(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(options.output, optimize=True)
    print(f"{options.output}: {image.width} x {image.height}, {options.output.stat().st_size / 1000:.0f} kB")
    return 0


def photograph(options: argparse.Namespace) -> Image.Image:
    """The whole page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(
            viewport={"width": options.width, "height": 1100}, color_scheme="dark" if options.dark else "light"
        )
        page.set_default_timeout(PATIENCE)
        page.goto(options.address)
        {"ask": _ask, "compare": _compare, "choose": _choose}[options.tab](page, options)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = page.screenshot(full_page=True)
        browser.close()
    return Image.open(BytesIO(shot)).convert("RGB")


def _ask(page: Any, options: argparse.Namespace) -> None:
    """An answer and its attention."""
    _prepare(page, options, "")
    page.locator("#ask").click()
    page.locator("#overlay img").wait_for()
    page.locator("#overlay img").evaluate("image => image.decode()")


def _compare(page: Any, options: argparse.Namespace) -> None:
    """Four answers, and what two of them saw."""
    page.get_by_role("tab", name="Compare").click()
    _prepare(page, options, "compare-")
    page.locator("#compare").click()
    page.locator("#vote-equal").wait_for()
    for name in ("text_only", "hybrid"):
        page.locator(f"#card-{name} summary").click()


def _choose(page: Any, options: argparse.Namespace) -> None:
    """The latest comparison."""
    page.get_by_role("tab", name="Choose").click()
    page.locator("#advice .advice").first.wait_for()
    page.frame_locator("#report iframe").locator("h1").wait_for()


def _prepare(page: Any, options: argparse.Namespace, prefix: str) -> None:
    """Choose the sample and the question."""
    page.locator(f"#{prefix}samples button").nth(options.sample).click()
    page.locator(f"#{prefix}picture img").wait_for()
    if options.question:
        page.locator(f"#{prefix}prompt textarea").fill(options.question)


if __name__ == "__main__":
    sys.exit(main())
