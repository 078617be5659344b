"""Photographs the running demo for the README: ``python -m demo.screenshot http://127.0.0.1:7860/``.

Needs Playwright (the extra ``test``) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

OUTPUT = Path(__file__).parent.parent / "assets" / "readme" / "demo.png"
PATIENCE = 300_000  # milliseconds; a busy machine takes its time


def main() -> int:
    """Click a sample, ask, wait for the attention, and save the page with 256 colours."""
    parser = argparse.ArgumentParser(prog="python -m demo.screenshot", description=__doc__)
    parser.add_argument("address", help="of the running demo")
    parser.add_argument("--sample", type=int, default=0, help="which sample picture, from 0 (default: 0)")
    parser.add_argument("--question", help="what to ask (default: what the sample suggests)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: assets/readme/demo.png")
    options = parser.parse_args()
    image = photograph(options.address, options.sample, options.question)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(options.output, optimize=True)
    print(f"{options.output}: {image.width} x {image.height}, {options.output.stat().st_size / 1000:.0f} kB")
    return 0


def photograph(address: str, sample: int, question: str | None) -> Image.Image:
    """The page with an answer and its attention, 1,200 pixels wide."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#samples button").nth(sample).click()
        page.locator("#picture img").wait_for()
        if question:
            page.locator("#prompt textarea").fill(question)
        page.locator("#ask").click()
        page.locator("#overlay img").wait_for()
        page.locator("#overlay img").evaluate("image => image.decode()")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = page.screenshot(full_page=True)
        browser.close()
    return Image.open(BytesIO(shot)).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
