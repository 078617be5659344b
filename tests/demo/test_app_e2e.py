"""The demo as a person uses it: a real server, a real browser (Debian's Chromium, headless).

The model is tiny and random, and takes its time over each token so that it can be stopped midway; the last test asks
the embedded model.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import demo
from multimodal.data import read_jsonl
from multimodal.model import MultiModalModel
from multimodal.samples import sample_images
from multimodal.service import serving
from multimodal.store import open_database
from multimodal.store.feedback import Feedback
from multimodal.store.keys import KeyStore
from tests.demo.tiny import free_port, save_comparison

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="checks: pip install -e '.[test]'")
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
    "--use-fake-device-for-media-stream",  # a camera
    "--use-fake-ui-for-media-stream",
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
# What can be scrolled to the side by a few pixels, which nobody meant: where scroll bars take room, it shows one.
ALMOST_FITTING = """() => [...document.querySelectorAll('main *')]
  .filter(element => element.checkVisibility() && ['auto', 'scroll'].includes(getComputedStyle(element).overflowX))
  .filter(element => element.scrollWidth > element.clientWidth && element.scrollWidth < element.clientWidth + 16)
  .map(element => `${element.tagName} ${element.id} ${element.className}`)"""
# Controls without a name that a screen reader could say, and pictures that say nothing of themselves.
NAMELESS = """() => {
  const named = element => element.getAttribute('aria-label') || element.getAttribute('aria-labelledby')
    || element.labels?.length || element.title || element.placeholder || element.innerText?.trim()
    || element.querySelector('[aria-label], img[alt]:not([alt=""])');
  const controls = 'button, a[href], input:not([type=hidden], [type=file]), textarea, select, iframe, progress';
  return [...document.querySelectorAll(controls)]
    .filter(element => element.checkVisibility({visibilityProperty: true}) && element.getClientRects().length)
    .filter(element => !named(element) && !element.closest('#chat .image-container')) // Gradio leaves these out
    .map(element => element.outerHTML.slice(0, 160));
}"""
# Text of ours that stands out from what is behind it by less than WCAG AA asks for: 4.5, and 3 where it is large.
FAINT = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(value => value / 255);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((value, index) => value * a + below[index] * (1 - a));
  const light = colour => colour.map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = element => element
    ? over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [1, 1, 1];
  const ours = 'h1, h2, h3, header p, label, .caption, .notice, .doing, dt, dd, .words button *, .card *, .rows *, ' +
    '.message-content, [data-testid=block-info], [role=tab]';
  return [...document.querySelectorAll(ours)]
    .filter(element => element.checkVisibility({opacityProperty: true, visibilityProperty: true}))
    .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
    .map(element => {
      const style = getComputedStyle(element), back = behind(element);
      const [dark, bright] = [light(over(rgba(style.color), back)), light(back)].sort((a, b) => a - b);
      const large = parseFloat(style.fontSize) >= 24 || parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700;
      return [(bright + 0.05) / (dark + 0.05), large ? 3 : 4.5, element];
    })
    .filter(([ratio, least]) => ratio < least)
    .map(([ratio, , element]) => `${ratio.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
}"""
# What axe finds in parts that Gradio makes and gives no way to change: rules, and what stands in the elements.
GRADIOS = {
    # A picture in the chat lies in a button without a name; Gradio drops the `alt_text` that a message has for it.
    "button-name": ('<div class="image-frame',),
    # What closes a message lies in what folds it up, and what chooses a file in the button that is pressed for it.
    "nested-interactive": ('class="toast-header', 'class="icon-button'),
}
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
                *("--port", str(port), "--feedback", str(temporary / "kept"), "--comparisons", str(temporary)),
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

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(1000 * PATIENCE)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._note_request)
        self.page.on("console", lambda entry: self.errors.append(entry.text) if entry.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.box.wait_for()

    @property
    def box(self) -> Any:
        return self.page.locator("#prompt textarea")

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def upload(self, *files: tuple[str, bytes]) -> None:
        """Attach files, and wait until the box shows them."""
        thumbnails = self.page.locator("#prompt .thumbnail-item")
        before = thumbnails.count()
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#prompt").get_by_test_id("upload-button").click()
        chooser.value.set_files(
            [{"name": name, "mimeType": "application/octet-stream", "buffer": content} for name, content in files]
        )
        self.page.wait_for_function(
            "count => document.querySelectorAll('#prompt .thumbnail-item').length >= count", arg=before + len(files)
        )

    def upload_picture(self, *paths: Path) -> None:
        self.upload(*((path.name, path.read_bytes()) for path in paths))

    def take_sample(self, number: int) -> None:
        self.page.locator("#samples button").nth(number).click()
        self.page.locator("#prompt .thumbnail-item").wait_for()

    def limit(self, tokens: int) -> None:
        if not self.page.locator("#length").is_visible():
            self.page.locator("#options").get_by_role("button").first.click()
        self.slide("#length", tokens)

    def slide(self, slider: str, value: int) -> None:
        """Type a number into a slider that is shown."""
        field = self.page.locator(f"{slider} input[type=number]")
        bar = self.page.locator(f"{slider} input[type=range]")
        for _ in range(10):  # what is typed while the slider still opens is lost
            field.fill(str(value))
            field.press("Tab")
            self.page.wait_for_timeout(200)
            if field.input_value() == bar.input_value() == str(value):
                return
        raise AssertionError("the slider does not take what is typed")

    def ask(self, question: str) -> None:
        """Send a question in, and wait until the conversation shows it."""
        before = self.questions().count()
        self.box.fill(question)
        self.box.press("Enter")
        self.page.wait_for_function(
            "count => document.querySelectorAll('#chat [data-testid=user] .message-content').length > count", arg=before
        )

    def questions(self) -> Any:
        return self.page.locator("#chat [data-testid=user] .message-content")

    def answers(self) -> list[str]:
        return self.page.locator("#chat [data-testid=bot] .message-content").all_inner_texts()

    def answer(self) -> str:
        return (self.answers() or [""])[-1]

    def words(self) -> int:
        return len(self.answer().split())

    def wait_for_words(self, count: int) -> None:
        """Of the answer that is being written."""
        self.page.wait_for_function(
            r"""count => {
              const last = [...document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]')].at(-1);
              return last?.dataset.testid === 'bot' && last.innerText.trim().split(/\s+/).length >= count
                && document.querySelector('#prompt .stop-button');
            }""",
            arg=count,
        )

    def stop(self) -> Any:
        return self.page.locator("#prompt").get_by_role("button", name="Stop")

    def wait_until_done(self) -> None:
        self.page.locator("#facts .figures").wait_for()
        self.page.locator("#prompt").get_by_test_id("submit-button").wait_for()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """A visit during which nothing may be asked of other hosts and nothing may go wrong in the browser."""
    visit = Visit(browser, server.address)
    yield visit
    visit.page.close()
    assert visit.elsewhere == []
    assert visit.errors == []


def test_upload_ask_read_look_and_stop(visit: Visit, server: Server) -> None:
    page = visit.page
    assert page.get_by_text("Not a medical device").locator("visible=true").count() == 1
    visit.limit(16)
    visit.upload_picture(ASSETS / "samples" / "chest_film.png")
    visit.ask("What is abnormal in this X-ray?")
    lengths: list[int] = []
    while not page.locator("#facts .figures").is_visible():
        lengths.append(visit.words())
        page.wait_for_timeout(100)
    assert len(set(lengths) - {0}) > 2 and lengths == sorted(lengths), f"the answer did not grow: {lengths}"
    assert visit.words() == 16
    facts = page.locator("#facts").inner_text()
    assert "The model is not sure" in facts and "the chance that the whole answer is right" in facts
    assert page.locator("#least input[type=number]").input_value() == "50"

    overlay = page.locator("#overlay img")
    overlay.wait_for()
    assert overlay.evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
    words = page.locator("#words .list button")
    assert words.count() == 16

    def choose(how: Any, word: int) -> None:
        before = overlay.get_attribute("src")
        how(words.nth(word))
        page.wait_for_function("before => document.querySelector('#overlay img').src !== before", arg=before)
        assert words.nth(word).get_attribute("aria-pressed") == "true"

    choose(lambda word: word.focus(), 3)  # the keyboard reaches them
    choose(lambda word: word.hover(), 5)

    visit.limit(512)  # more than a minute
    visit.ask("Describe this film at length.")
    page.locator("#explanation").wait_for(state="hidden")
    visit.wait_for_words(4)
    visit.stop().click()
    visit.wait_until_done()
    stopped = visit.answer()
    assert 4 <= len(stopped.split()) < 200
    assert "cut short" in page.locator("#facts").inner_text()
    overlay.wait_for()
    made = server.tokens()
    page.wait_for_timeout(10 * 1000 * SLOW)
    assert visit.answer() == stopped, "the text still grows"
    assert server.tokens() == made, "the server still generates what nobody reads"

    visit.limit(8)
    visit.ask("And now?")
    visit.wait_until_done()
    assert visit.words() == 8 and len(visit.answers()) == 3


def test_a_conversation_over_several_pictures_is_edited_retried_and_judged(visit: Visit, server: Server) -> None:
    page, chat = visit.page, visit.page.locator("#chat")
    feedback = Feedback(server.folder / "kept")
    before = len(feedback.ratings())
    visit.limit(8)
    visit.upload_picture(ASSETS / "samples" / "chest_film.png", ASSETS / "samples" / "label.png")
    visit.ask("What is in these two?")
    visit.wait_until_done()
    assert chat.locator("img").count() == 2
    for number in range(2, 16):
        if number % 5 == 0:
            visit.take_sample(number // 5)
        visit.ask(f"Question {number}: what else?")
        visit.wait_until_done()
    assert len(visit.answers()) == 15 and chat.locator("img").count() == 5
    assert all(visit.answers())

    page.locator("#which input").click()  # back to the first answer: both pictures side by side
    page.locator("#which input").fill("1. ")
    page.get_by_role("option").first.click()
    page.wait_for_function("document.querySelector('#overlay img')?.naturalWidth > 600")

    chat.get_by_role("button", name="Like", exact=True).first.click()
    page.locator("#status").get_by_text("it is kept").wait_for()
    page.locator("#feedback").get_by_role("button").first.click()
    page.locator("#save").click()
    page.locator("#kept").get_by_text("Write what would be right").wait_for()
    page.locator("#corrected textarea").fill("A film and a label.")
    page.locator("#comment textarea").fill("The label is upright.")
    page.locator("#save").click()
    page.locator("#kept").get_by_text("it is kept").wait_for()
    liked, corrected = feedback.ratings()[before:]
    assert liked.verdict == "like" and liked.question == "What is in these two?" and len(liked.pictures) == 2
    assert (corrected.corrected, corrected.comment) == ("A film and a label.", "The label is upright.")
    feedback.export(server.folder / "out.jsonl")
    *_, row = read_jsonl(server.folder / "out.jsonl")
    assert row.answer == "A film and a label." and len(row.images) == 2

    visit.limit(16)
    chat.get_by_role("button", name="Retry").click()
    page.wait_for_function(
        "[...document.querySelectorAll('#chat [data-testid=bot]')].at(-1).innerText.trim().split(/\\s+/).length === 16"
    )
    visit.wait_until_done()
    assert len(visit.answers()) == 15

    visit.limit(8)
    chat.get_by_role("button", name="Edit").locator("visible=true").nth(1).click()
    chat.get_by_role("textbox").fill("Something else?")
    chat.get_by_role("button", name="Submit").click()
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length === 2")
    visit.wait_until_done()
    assert visit.questions().all_inner_texts() == ["What is in these two?", "Something else?"]

    chat.get_by_role("button", name="Clear").click()
    page.locator("#explanation").wait_for(state="hidden")
    assert visit.answers() == []


def test_what_cannot_be_used_is_told_clearly(visit: Visit) -> None:
    page = visit.page
    toasts = page.get_by_test_id("toast-body")
    visit.box.fill("What is this?")
    visit.box.press("Enter")
    toasts.filter(has_text="Add a picture first").wait_for()
    assert visit.box.input_value() == "What is this?", "what was typed stays"

    whole = (ASSETS / "samples" / "label.png").read_bytes()
    visit.upload(("notes.png", b"%PDF-1.7 not a picture"), ("broken.png", whole[: len(whole) // 2]), ("a.png", whole))
    visit.box.press("Enter")
    toasts.filter(has_text="'notes.png' is a PDF document, not a picture").wait_for()
    toasts.filter(has_text="'broken.png' is damaged or cut short").wait_for()
    page.wait_for_function("document.querySelectorAll('#prompt .thumbnail-item').length === 1")
    visit.box.fill("   ")
    visit.box.press("Enter")
    toasts.filter(has_text="Type what you want to know").wait_for()
    assert visit.answers() == [] and not visit.stop().is_visible()
    page.locator("#prompt .thumbnail-item").wait_for()
    visit.limit(8)
    visit.ask("<b>What</b> is this? ![](http://example.org/a.png)")
    visit.wait_until_done()
    assert visit.questions().last.inner_text() == "<b>What</b> is this? ![](http://example.org/a.png)"


def test_dicom_sixteen_bits_paste_and_camera(visit: Visit, tmp_path: Path) -> None:
    page, shown = visit.page, visit.page.locator("#chat img")
    visit.limit(8)
    film = tmp_path / "film.tif"
    Image.linear_gradient("L").convert("I;16").save(film)
    dicom = next((sample.path for sample in sample_images() if sample.path.suffix == ".dcm"), film)
    visit.upload_picture(film, dicom)
    visit.ask("What is this?")
    visit.wait_until_done()
    assert shown.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
    assert shown.nth(1).evaluate("image => image.decode().then(() => image.naturalWidth)") > 0

    data = list((ASSETS / "samples" / "label.png").read_bytes())
    visit.box.evaluate(
        """(box, data) => {
          const clipboard = new DataTransfer();
          clipboard.items.add(new File([new Uint8Array(data)], 'pasted.png', {type: 'image/png'}));
          box.dispatchEvent(new ClipboardEvent('paste', {clipboardData: clipboard, bubbles: true, cancelable: true}));
        }""",
        data,
    )
    page.locator("#prompt .thumbnail-item").wait_for()
    page.locator("#camera-fold").get_by_role("button").first.click()
    page.locator("#camera").get_by_text("Webcam").click()
    page.wait_for_function("(video => video && video.videoWidth > 0)(document.querySelector('#camera video'))")
    page.locator("#camera").get_by_role("button", name="capture photo").click()
    page.wait_for_function("document.querySelectorAll('#prompt .thumbnail-item').length === 2")
    visit.ask("And these?")
    page.wait_for_function("document.querySelectorAll('#chat img').length === 4")
    visit.wait_until_done()


def test_a_sample_is_one_click_and_a_stopped_answer_makes_room(visit: Visit) -> None:
    page = visit.page
    visit.take_sample(0)
    assert visit.box.input_value() == "What is abnormal in this X-ray?"
    visit.limit(512)
    page.locator("#prompt").get_by_test_id("submit-button").click()
    visit.wait_for_words(3)
    visit.stop().click()
    visit.wait_until_done()
    visit.limit(8)
    visit.ask("Something else?")
    visit.wait_until_done()
    assert visit.words() == 8
    page.wait_for_timeout(5 * 1000 * SLOW)
    assert visit.words() == 8, "the first answer still comes"


def test_people_who_leave_make_room_for_others(browser: Any, server: Server, visit: Visit) -> None:
    others = [Visit(browser, server.address) for _ in range(3)]  # more than are answered at once
    for other in others:
        other.limit(512)
        other.take_sample(0)
        other.ask("Describe this at length.")
        other.stop().wait_for()
    others[0].wait_for_words(2)
    for other in others:
        other.page.close()
    made = server.tokens()
    assert server.wait_until_idle() - made < 100, "answers are written on for nobody"
    visit.limit(8)
    visit.upload_picture(ASSETS / "samples" / "label.png")
    visit.ask("What is this?")
    visit.wait_until_done()
    assert visit.words() == 8


def test_the_page_speaks_chinese_to_those_who_prefer_it(browser: Any, server: Server) -> None:
    visit = Visit(browser, server.address, locale="zh-CN")
    page = visit.page
    page.get_by_role("tab", name="提问").wait_for()
    assert page.get_by_text("非医疗器械").locator("visible=true").count() == 1
    visit.box.fill("这是什么")
    visit.box.press("Enter")
    page.get_by_test_id("toast-body").filter(has_text="请先添加图片").wait_for()
    page.close()


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    page = visit.page
    visit.limit(8)
    reached = set()
    page.locator("#tabs [role=tab]").first.focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id"))
    assert {"prompt", "samples", "model", "camera-fold", "options", "length"} <= reached
    page.locator("#samples button").first.focus()
    page.keyboard.press("Enter")
    page.locator("#prompt .thumbnail-item").wait_for()
    visit.box.focus()
    page.keyboard.press("Enter")
    visit.wait_until_done()
    assert visit.words() == 8


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_every_tab_at_both_widths(
    browser: Any, server: Server, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    visit = Visit(browser, server.address, viewport={"width": width, "height": height}, color_scheme=scheme)
    page = visit.page

    def photograph(name: str) -> None:
        for dark in (scheme != "dark", scheme == "dark"):  # that of the picture last
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            page.wait_for_timeout(300)  # transitions of colours end
            assert faults(page) == [], f"{name}, {'dark' if dark else 'light'}"
        page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
        assert page.evaluate(STICKING_OUT) == [], f"{name} is too wide"
        assert page.evaluate(ALMOST_FITTING) == [], f"{name}: scrolls by a few pixels"
        assert page.evaluate(NAMELESS) == [], f"{name}: parts without a name"
        assert page.evaluate(FAINT) == [], f"{name}: text that is hard to read"

    def notices() -> int:
        return page.get_by_text("Not a medical device").locator("visible=true").count()

    photograph("ask-empty")
    visit.limit(24)
    visit.take_sample(0)
    visit.ask("What is this? " + "Incomprehensibilities " * 8 + "a" * 80)  # a long question, and a word that never ends
    visit.wait_until_done()
    page.locator("#overlay img").wait_for()
    wide = io.BytesIO()
    Image.new("RGB", (3000, 120), "teal").save(wide, format="PNG")
    visit.upload(("wide.png", wide.getvalue()))
    visit.ask("And this wide one?")
    visit.wait_until_done()
    photograph("ask")
    assert notices() == 1

    page.get_by_role("tab", name="Compare").click()
    samples = page.locator("#compare-samples button")
    samples.first.wait_for()
    page.locator("#compare-picture img").wait_for()  # that of the conversation
    assert "wide one" in page.locator("#compare-prompt textarea").input_value()
    samples.first.click()
    page.wait_for_function("document.querySelector('#compare-picture img').naturalHeight > 200")
    page.get_by_role("button", name="Options").locator("visible=true").click()
    visit.slide("#compare-length", 8)
    page.locator("#compare").click()
    page.locator("#vote-equal").wait_for()
    cards = page.locator(".card")
    assert cards.count() == 4 and page.locator(".card .said").count() == 4
    for fold in page.locator(".card summary").all():
        fold.click()
    assert page.locator(".boxed rect").count() == 4, "two lines of text, read for two pipelines"
    assert page.locator(".boxed img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    photograph("compare")
    assert notices() == 1
    feedback = Feedback(server.folder / "kept")
    before = len(feedback.votes())
    page.locator("#vote-hybrid").click()
    page.get_by_text("your vote is kept").wait_for()
    assert not page.locator("#vote-native").is_visible(), "one vote for each comparison"
    *_, vote = feedback.votes()
    assert len(feedback.votes()) == before + 1 and vote.better == "hybrid" and len(vote.answers) == 4

    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-start").click()
    page.get_by_test_id("toast-body").filter(has_text="Add pictures or a zip file first").wait_for()
    page.locator("#batch-files input[type=file]").set_input_files(
        [{"name": "shop.zip", "mimeType": "application/zip", "buffer": zip_of_pictures(4)}]
    )
    page.locator("#batch-files").get_by_text("shop").first.wait_for()
    page.locator("#batch-prompt textarea").fill("What is this?")
    page.get_by_role("button", name="Options").locator("visible=true").click()
    visit.slide("#batch-length", 8)
    page.locator("#batch-start").click()
    rows = page.locator("#batch-table tbody tr")
    page.locator("#batch-status").get_by_text("Done: 5 of 5 pictures, 1 with an error.").wait_for()
    assert rows.count() == 5 and rows.last.inner_text().count("damaged or cut short") == 1
    photograph("batch")
    assert notices() == 1
    with page.expect_download() as download:
        page.locator("#batch-jsonl").click()
    read = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [len(row["answer"].split()) for row in read] == [8, 8, 8, 8, 0]
    with page.expect_download() as download:
        page.locator("#batch-csv").click()
    assert Path(download.value.path()).read_text(encoding="utf-8-sig").startswith("picture,question,answer")
    visit.slide("#batch-length", 256)
    page.locator("#batch-start").click()
    page.locator("#batch-status progress").wait_for()
    page.locator("#batch-cancel").click()
    page.locator("#batch-status").get_by_text("Cancelled after").wait_for()

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


def faults(page: Any) -> list[str]:
    """Serious and critical faults that axe finds in the page as it is, but for Gradio's own."""
    return [
        f"{rule['id']}: {node['html'][:160]} {node['failureSummary']}"
        for rule in axe.Axe().run(page).response["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
        if not any(part in node["html"] for part in GRADIOS.get(rule["id"], ()))
    ]


@pytest.mark.parametrize("guarded", [False, True])
def test_a_chat_on_the_page_of_the_service(
    browser: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The policy and the login of the service are in nobody's way."""
    from demo.mounted import mounted  # needs Gradio

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # set back after the demo has set it
    monkeypatch.chdir(tmp_path)
    save_comparison(tmp_path / "comparison-1")
    database = open_database(tmp_path / "store.sqlite")
    login: dict[str, Any] = {}
    if guarded:
        secret, _ = KeyStore(database).create("Ann", scopes=["demo"])
        login["http_credentials"] = {"username": "Ann", "password": secret}
    model = MultiModalModel.from_pretrained(tiny_folder)
    with (
        mounted(model, name=str(tiny_folder), anywhere=False) as front,
        serving(model, name="tiny", database=database, front=front) as url,
    ):
        visit = Visit(browser, url.removesuffix("/v1"), **login)
        visit.limit(8)
        visit.upload_picture(ASSETS / "samples" / "label.png")
        visit.ask("What is this?")
        visit.wait_until_done()
        assert visit.words() == 8
        visit.page.locator("#overlay img").wait_for()
        assert faults(visit.page) == [] and visit.page.evaluate(NAMELESS) == []
        visit.page.get_by_role("tab", name="Choose").click()
        report = visit.page.frame_locator("#report iframe")
        report.get_by_role("heading", name="Comparison on toy").wait_for()
        visit.page.close()
        assert visit.elsewhere == [] and visit.errors == []


def zip_of_pictures(count: int) -> bytes:
    """So many pictures in a folder, what a Mac adds to them, and one that is broken."""
    whole = (ASSETS / "samples" / "label.png").read_bytes()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(count):
            archive.writestr(f"shop/{number}.png", whole)
        archive.writestr("__MACOSX/shop/._0.png", b"x")
        archive.writestr("shop/broken.png", whole[:500])
    return stream.getvalue()


@pytest.mark.skipif(
    not (ASSETS / "embedded" / "config.json").is_file(), reason="the embedded model has not been trained yet"
)
def test_the_embedded_model_answers_about_a_sample(browser: Any, tmp_path: Path) -> None:
    with start("embedded", tmp_path, seconds=0) as server:
        visit = Visit(browser, server.address)
        visit.limit(16)
        visit.upload_picture(ASSETS / "samples" / "chest_film.png")
        visit.ask("What modality is used to take this image?")
        visit.wait_until_done()
        assert re.search(r"\w", visit.answer())
        visit.page.locator("#overlay img").wait_for()
        visit.page.close()
        assert visit.elsewhere == [] and visit.errors == []
