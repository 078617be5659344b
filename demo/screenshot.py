"""Photographs the running demo for the README: ``python -m demo.screenshot http://127.0.0.1:7860/``.

The tab "Choose" needs a comparison to show (``python -m demo.app --comparisons FOLDER``). Needs Playwright (the extra
``test``) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from multimodal.samples import sample_images

FOLDER = Path(__file__).parent.parent / "assets" / "readme"
PATIENCE = 300_000  # milliseconds; a busy machine takes its time
SIZE = {"width": 1280, "height": 1000}


def main() -> int:
    """Use each tab as a person would, wait for what it shows, and save what the window holds with 256 colours."""
    parser = argparse.ArgumentParser(prog="python -m demo.screenshot", description=__doc__)
    parser.add_argument("address", help="of the running demo")
    parser.add_argument("tabs", nargs="*", metavar="TAB", help=f"which tabs (default: {' '.join(TABS)})")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default: assets/readme")
    options = parser.parse_args()
    if unknown := [tab for tab in options.tabs if tab not in TABS]:
        parser.error(f"there is no tab {unknown[0]}: give some of {' '.join(TABS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for tab in options.tabs or TABS:
        path = options.output / f"{tab}.png"
        image = photograph(options.address, TABS[tab])
        palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
        image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
        print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")
    return 0


def photograph(address: str, use: Callable[[Any], None]) -> Image.Image:
    """The window after somebody used the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#prompt textarea").wait_for()
        use(page)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = page.screenshot()
        browser.close()
    return Image.open(BytesIO(shot)).convert("RGB")


def _ask(page: Any) -> None:
    """Two questions about a film, and what is known of the second answer."""
    page.locator("#samples button").first.click()
    page.locator("#prompt .thumbnail-item").wait_for()
    for number, question in enumerate(("What modality is used to take this image?", "What is abnormal in this X-ray?")):
        page.locator("#prompt textarea").fill(question)
        page.locator("#prompt textarea").press("Enter")
        page.wait_for_function("n => document.querySelectorAll('#chat [data-testid=bot]').length > n", arg=number)
        page.locator("#facts .figures").wait_for()
    page.locator("#overlay img").evaluate("image => image.decode()")


def _compare(page: Any) -> None:
    """Four answers, and what two of them saw."""
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-samples button").nth(2).click()
    page.locator("#compare-picture img").wait_for()
    page.locator("#compare").click()
    page.locator("#vote-equal").wait_for()
    for name in ("text_only", "hybrid"):
        page.locator(f"#card-{name} summary").click()
    page.locator("#cards").evaluate("cards => window.scrollTo(0, cards.getBoundingClientRect().top + scrollY - 40)")


def _batch(page: Any) -> None:
    """Films, slices and a file that is no picture, in one zip file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for sample in (sample for sample in sample_images() if sample.source != "gradio"):
                archive.write(sample.path, f"pictures/{sample.path.name}")
            archive.writestr("pictures/notes.txt", "bananas")
        page.get_by_role("tab", name="Batch").click()
        page.locator("#batch-files input[type=file]").set_input_files(path)
        page.locator("#batch-files").get_by_text("pictures").first.wait_for()
    page.locator("#batch-prompt textarea").fill("What modality is used to take this image?")
    page.locator("#batch-start").click()
    page.locator("#batch-downloads").wait_for()


def _choose(page: Any) -> None:
    """The latest comparison."""
    page.get_by_role("tab", name="Choose").click()
    page.locator("#advice .advice").first.wait_for()


TABS = {"ask": _ask, "compare": _compare, "batch": _batch, "choose": _choose}


if __name__ == "__main__":
    sys.exit(main())
