"""The demo as a person uses it: a real server, a real browser (Debian's Chromium, headless).

The model is tiny and random, and takes its time over each token so that it can be stopped midway; the last test asks
the embedded model.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import demo
from multimodal.journal import Journal
from tests.demo.tiny import free_port, save_comparison

sync_api = pytest.importorskip("playwright.sync_api", reason="drives a browser: pip install -e '.[test]'")
pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]

ROOT = Path(demo.__file__).parent.parent
ASSETS = ROOT / "assets"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What is wider than the window, though it can't be scrolled to: names of elements.
STICKING_OUT = """() => {
  const scrolled = element => element && (['auto', 'scroll'].includes(getComputedStyle(element).overflowX)
    && element !== document.documentElement && element !== document.body || scrolled(element.parentElement));
  return [...document.querySelectorAll('main *')]
    .filter(element => element.checkVisibility() && !scrolled(element.parentElement))
    .filter(element => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(element => `${element.tagName} ${element.id} ${element.className}`);
}"""
PATIENCE = 120  # seconds for anything to appear: the machine may be busy
SLOW = 0.15  # seconds for each token


class Server:
    """A running demo."""

    def __init__(self, port: int, log: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.log = log
        self.folder = log.parent

    def tokens(self) -> int:
        """How many were generated so far."""
        return self.log.read_text().count("token\n")

    def wait_until_idle(self) -> int:
        """Wait until no tokens are generated any more, and give their number."""
        deadline = time.monotonic() + PATIENCE
        before = -1
        while (now := self.tokens()) != before:
            assert time.monotonic() < deadline, "tokens are generated on and on"
            before = now
            time.sleep(20 * SLOW)
        return now


@contextmanager
def start(folder: Path | str, temporary: Path, *, seconds: float) -> Iterator[Server]:
    """Start the demo, and end it."""
    port = free_port()
    log = temporary / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.demo.slow_app", str(seconds), "--model", str(folder)),
                *("--port", str(port), "--votes", str(temporary), "--comparisons", str(temporary)),
            ],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 2 * PATIENCE
            while "The model is ready" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield Server(port, log)
            assert "Traceback" not in log.read_text(), log.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    assert not list(temporary.glob("multimodal-demo-*")), "what was uploaded is gone with the server"


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start(tiny_folder, tmp_path_factory.mktemp("demo"), seconds=SLOW) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A person on the page, and what the browser has to say of it."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.address = server.address
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(1000 * PATIENCE)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._note_request)
        self.page.on("console", lambda entry: self.errors.append(entry.text) if entry.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.address)
        self.page.locator("#ask").wait_for()

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def upload(self, name: str, content: bytes) -> None:
        self.page.locator("#upload input[type=file]").set_input_files(
            [{"name": name, "mimeType": "application/octet-stream", "buffer": content}]
        )

    def upload_picture(self, path: Path) -> None:
        self.upload(path.name, path.read_bytes())
        self.page.locator("#picture img").wait_for()

    def limit(self, tokens: int) -> None:
        if not self.page.locator("#length").is_visible():
            self.page.get_by_role("button", name="Options").click()
        field = self.page.locator("#length input[type=number]")
        bar = self.page.locator("#length input[type=range]")
        for _ in range(10):  # what is typed while the slider still opens is lost
            field.fill(str(tokens))
            field.press("Tab")
            self.page.wait_for_timeout(200)
            if field.input_value() == bar.input_value() == str(tokens):
                return
        raise AssertionError("the slider does not take what is typed")

    def ask(self, question: str) -> None:
        box = self.page.locator("#prompt textarea")
        box.fill(question)
        box.press("Enter")
        self.page.locator("#status .figures").wait_for(state="detached")  # of the answer before

    def answer(self) -> str:
        return self.page.locator("#answer textarea").input_value()

    def words(self) -> int:
        return len(self.answer().split())

    def wait_for_words(self, count: int) -> None:
        self.page.wait_for_function(
            "count => document.querySelector('#answer textarea').value.trim().split(/\\s+/).length >= count", arg=count
        )

    def wait_until_done(self) -> None:
        self.page.locator("#status .figures").wait_for()
        self.page.locator("#ask").wait_for()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """A visit during which nothing may be asked of other hosts and nothing may go wrong in the browser."""
    visit = Visit(browser, server)
    yield visit
    visit.page.close()
    assert visit.elsewhere == []
    assert visit.errors == []


def test_upload_ask_read_look_and_stop(visit: Visit, server: Server) -> None:
    page = visit.page
    assert page.get_by_text("Not a medical device").is_visible()
    visit.upload_picture(ASSETS / "samples" / "chest_film.png")
    visit.limit(16)

    visit.ask("What is abnormal in this X-ray?")
    lengths: list[int] = []
    while not page.locator("#status .figures").is_visible():
        lengths.append(visit.words())
        page.wait_for_timeout(100)
    assert len(set(lengths) - {0}) > 2 and lengths == sorted(lengths), f"the answer did not grow: {lengths}"
    assert visit.words() == 16
    status = page.locator("#status").inner_text()
    assert "The model is not sure" in status and "the chance that the whole answer is right" in status
    assert page.locator("#least input[type=number]").input_value() == "50"

    overlay = page.locator("#overlay img")
    overlay.wait_for()
    assert overlay.evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
    whole = overlay.get_attribute("src")
    words = page.locator("#words .list button")
    assert words.count() == 16
    words.nth(3).press("Enter")  # the keyboard reaches them
    page.wait_for_function("before => document.querySelector('#overlay img').src !== before", arg=whole)
    assert words.nth(3).get_attribute("aria-pressed") == "true"

    visit.limit(512)  # more than a minute
    visit.ask("Describe this film at length.")
    page.locator("#explanation").wait_for(state="hidden")
    visit.wait_for_words(4)
    page.locator("#stop").click()
    visit.wait_until_done()
    stopped = visit.answer()
    assert 4 <= len(stopped.split()) < 200
    assert "cut short" in page.locator("#status").inner_text()
    page.locator("#overlay img").wait_for()
    made = server.tokens()
    page.wait_for_timeout(10 * 1000 * SLOW)
    assert visit.answer() == stopped, "the text still grows"
    assert server.tokens() == made, "the server still generates what nobody reads"

    visit.limit(8)
    visit.ask("And now?")
    visit.wait_until_done()
    assert visit.words() == 8


def test_what_cannot_be_used_is_told_clearly(visit: Visit) -> None:
    page = visit.page
    toasts = page.get_by_test_id("toast-body")
    visit.ask("What is this?")
    toasts.filter(has_text="Add a picture first").wait_for()

    visit.upload("notes.png", b"%PDF-1.7 not a picture")
    toasts.filter(has_text="'notes.png' is a PDF document, not a picture").wait_for()
    whole = (ASSETS / "samples" / "label.png").read_bytes()
    visit.upload("broken.png", whole[: len(whole) // 2])
    toasts.filter(has_text="'broken.png' is damaged or cut short").wait_for()
    assert page.locator("#picture").count() == 0

    visit.upload_picture(ASSETS / "samples" / "label.png")
    visit.ask("   ")
    toasts.filter(has_text="Type what you want to know").wait_for()
    assert visit.answer() == ""
    assert not page.locator("#stop").is_visible()


def test_pictures_that_browsers_cannot_show_are_shown_all_the_same(visit: Visit, tmp_path: Path) -> None:
    film = tmp_path / "film.tif"
    Image.linear_gradient("L").convert("I;16").save(film)
    visit.upload_picture(film)
    assert visit.page.locator("#picture img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 256


def test_a_sample_is_one_click_and_a_new_question_ends_the_old_one(visit: Visit) -> None:
    page = visit.page
    page.locator("#samples button").first.click()
    page.locator("#picture img").wait_for()
    assert page.locator("#prompt textarea").input_value() == "What is abnormal in this X-ray?"
    visit.limit(512)
    page.locator("#ask").click()
    visit.wait_for_words(3)
    visit.limit(8)
    visit.ask("Something else?")
    visit.wait_until_done()
    assert visit.words() == 8
    page.wait_for_timeout(5 * 1000 * SLOW)
    assert visit.words() == 8, "the first answer still comes"


def test_people_who_leave_make_room_for_others(browser: Any, server: Server, visit: Visit) -> None:
    others = [Visit(browser, server) for _ in range(3)]  # more than are answered at once
    for other in others:
        other.page.locator("#samples button").first.click()
        other.page.locator("#picture img").wait_for()
        other.limit(512)
        other.ask("Describe this at length.")
        other.page.locator("#stop").wait_for()
    others[0].wait_for_words(2)
    for other in others:
        other.page.close()
    made = server.tokens()
    assert server.wait_until_idle() - made < 100, "answers are written on for nobody"
    visit.upload_picture(ASSETS / "samples" / "label.png")
    visit.limit(8)
    visit.ask("What is this?")
    visit.wait_until_done()
    assert visit.words() == 8


def test_a_phone_needs_no_sideways_scrolling(browser: Any, server: Server) -> None:
    visit = Visit(browser, server, viewport={"width": 390, "height": 844})
    visit.page.locator("#samples button").first.click()
    visit.page.locator("#picture img").wait_for()
    visit.limit(24)
    visit.ask("What is this?")
    visit.wait_until_done()
    visit.page.locator("#overlay img").wait_for()
    for part in ("#picture", "#upload", "#prompt", "#ask", "#answer", "#status", "#overlay", "#words", "#length"):
        box = visit.page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, f"{part} sticks out: {box}"
    visit.page.close()


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_every_tab_at_both_widths(
    browser: Any, server: Server, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    visit = Visit(browser, server, viewport={"width": width, "height": height}, color_scheme=scheme)
    page = visit.page

    def photograph(name: str) -> None:
        page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
        assert page.evaluate(STICKING_OUT) == [], f"{name} is too wide"

    photograph("ask")
    page.get_by_role("tab", name="Compare").click()
    samples = page.locator("#compare-samples button")
    samples.first.wait_for()
    page.locator("#compare").click()
    page.get_by_test_id("toast-body").filter(has_text="Add a picture first").wait_for()
    samples.first.click()
    page.locator("#compare-picture img").wait_for()
    assert page.locator("#tabs").get_by_text("Not a medical device").locator("visible=true").count() == 1
    tokens = page.locator("#compare-length input[type=number]")
    page.get_by_role("button", name="Options").locator("visible=true").click()
    tokens.fill("8")
    tokens.press("Tab")
    page.locator("#compare").click()
    page.locator("#vote-equal").wait_for()
    cards = page.locator(".card")
    assert cards.count() == 4 and page.locator(".card .said").count() == 4
    for fold in page.locator(".card summary").all():
        fold.click()
    assert page.locator(".boxed rect").count() == 4, "two lines of text, read for two pipelines"
    assert page.locator(".boxed img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    photograph("compare")
    votes = Journal(server.folder / "votes.jsonl")
    before = len(votes.read())
    page.locator("#vote-hybrid").click()
    page.get_by_text("your vote is kept").wait_for()
    assert not page.locator("#vote-native").is_visible(), "one vote for each comparison"
    *_, vote = votes.read()
    assert len(votes.read()) == before + 1 and vote["vote"] == "hybrid" and len(vote["replies"]) == 4

    page.get_by_role("tab", name="Choose").click()
    if not (server.folder / "comparison-1").exists():
        page.locator("#advice").get_by_text("multimodal compare --tasks").wait_for()
        save_comparison(server.folder / "comparison-1")
        page.get_by_role("tab", name="Ask").click()
        page.get_by_role("tab", name="Choose").click()
    page.locator("#advice .advice").wait_for()
    page.frame_locator("#report iframe").get_by_role("heading", name="Comparison on toy").wait_for()
    volume = page.locator("#volume input[type=number]")
    volume.fill("5000")
    volume.press("Tab")
    page.locator("#advice").get_by_text("Cost at 5,000 calls a day").wait_for()
    page.locator("#here input").check()
    page.locator("#advice").get_by_text("toy: use native").wait_for()
    page.locator("#report iframe").scroll_into_view_if_needed()  # what was never in the window is not painted
    photograph("choose")
    page.close()
    assert visit.elsewhere == [] and visit.errors == []


@pytest.mark.skipif(
    not (ASSETS / "embedded" / "config.json").is_file(), reason="the embedded model has not been trained yet"
)
def test_the_embedded_model_answers_about_a_sample(browser: Any, tmp_path: Path) -> None:
    with start("embedded", tmp_path, seconds=0) as server:
        visit = Visit(browser, server)
        visit.upload_picture(ASSETS / "samples" / "chest_film.png")
        visit.limit(16)
        visit.ask("What modality is used to take this image?")
        visit.wait_until_done()
        assert re.search(r"\w", visit.answer())
        visit.page.locator("#overlay img").wait_for()
        visit.page.close()
        assert visit.elsewhere == [] and visit.errors == []
