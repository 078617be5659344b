"""The report: what it says, that it stands alone, that nothing breaks into or out of it, how it acts in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from multimodal.compare.report import readme_table, write_report
from multimodal.compare.report.markdown import cell
from multimodal.compare.report.pictures import Album
from multimodal.compare.report.questions import Book, boxes_of, embedded
from multimodal.compare.report.redaction import HIDDEN, setting, without_secrets
from multimodal.compare.report.spreadsheets import neutral
from multimodal.compare.report.svg import axis
from multimodal.compare.report.verdicts import verdicts
from multimodal.compare.report.write import html
from multimodal.compare.results import SHUFFLED, Results, Row
from multimodal.compare.summary import pairs_of, summarise
from multimodal.pipelines.protocol import Answer, Step, Usage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
COMMAND = "multimodal compare run --tasks slake --seed 0"
ATTACK = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>"
VOID = {"meta", "link", "br", "img", "input", "wbr", "hr"}
QUESTIONS = 120


def picture(folder: Path, number: int) -> Path:
    path = folder / f"{number}.png"
    if not path.exists():
        image = Image.new("RGB", (640, 400), (20 * number % 256, 90, 120))
        ImageDraw.Draw(image).text((40, 40), f"LABEL {number}", fill="white")
        image.save(path)
    return path


def row(pipeline: str, number: int, right: bool, images: tuple[Path, ...] = (), **changes: Any) -> Row:
    said = {"steps": (), "cost": 0.0, "confidence": 0.9 if right else 0.6, "text": "yes" if right else "no"}
    said |= {key: changes.pop(key) for key in tuple(said) if key in changes}
    answer = Answer(usage=Usage(100, 2, 1), first_token=0.1, total=0.2 + number / 100, **said)
    made = Row(
        "slake", pipeline, str(number), f"Question {number}?", "yes", images, answer,
        scores={"exact": float(right), "f1": float(right), "refused": 0.0},
        meta={"answer_type": "CLOSED" if number % 3 else "OPEN"},
    )  # fmt: skip
    return replace(made, **changes)


def results(rows: list[Row], **changes: Any) -> Results:
    made = Results(Path("run"), COMMAND, tuple(rows), {"slake": "exact", "captions": "rouge_l"})
    return replace(made, **changes)


def full(folder: Path) -> Results:
    """Three pipelines, the first two far apart; a control; errors; boxes; an attack; a missing picture."""
    ocr = Step("ocr", 0.05, "LABEL", True, {"boxes": [[0.1, 0.1, 0.4, 0.2]]})
    rows = []
    for number in range(QUESTIONS):
        shown = (picture(folder, number % 7) if number != 5 else folder / "gone.png",)
        rows += [
            row("native", number, number % 10 != 0, shown),
            row("native", number, number % 2 == 0, shown, control=SHUFFLED, text="only with the wrong picture"),
            row(
                "text_only", number, number % 3 == 0, shown, cost=0.002, confidence=None,
                steps=(ocr, Step("prompt", 0, f"The exact prompt {number}"), Step("llm", 0.1, "ok")),
            ),
            row("blind", number, number % 4 == 0, shown),
        ]  # fmt: skip
    rows[2] = replace(rows[2], answer=replace(rows[2].answer, text=ATTACK), question=ATTACK, target=ATTACK)  # type: ignore[type-var]
    for place in (6, 10):
        rows[place] = replace(
            rows[place], answer=None, error="503 from https://user:pw@host/v1 api_key=abc123", scores={}
        )
    rows[0] = replace(rows[0], question=ATTACK, target=ATTACK)
    return results(
        rows,
        machine={"cpu": "a CPU", "cores": "2"},
        settings={"seed": 0, "api_key": "sk-secretsecret", "endpoint": {"url": "http://host/v1", "token": "abc"}},
        peak_memory={"native": 3 * 2**30},
        throughput={("slake", "native"): 3.5},
        energy={("slake", "native"): 0.5},
    )


def page_of(made: Results) -> str:
    return html(made, summarise(made), pairs_of(made))


def said_by(made: Results) -> str:
    found = verdicts(made, summarise(made), pairs_of(made))
    return "\n".join(line for verdict in found for line in (verdict.headline, *verdict.points))


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


class Parsed(HTMLParser):
    """Fails where tags do not nest; keeps addresses and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (self.open and self.open[-1] == "svg" and tag == "svg"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("report")
    return write_report(full(folder), folder / "new" / "report")


@pytest.fixture(scope="module")
def page(written: list[Path]) -> str:
    return written[0].read_text(encoding="utf-8")


def test_four_files(written: list[Path]) -> None:
    assert [path.name for path in written] == ["report.html", "report.md", "figures.csv", "answers.csv"]
    assert all(path.stat().st_size for path in written)


def test_html_is_well_formed_and_stands_alone(page: str) -> None:
    parsed = Parsed(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "base"), tag
        for name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\(", page)
    drawn = [attributes for tag, attributes in parsed.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawn) == 4 and all(attributes["aria-label"] for attributes in drawn)
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 2


def test_order_and_content(page: str) -> None:
    parsed = Parsed(page)
    text = " ".join(" ".join(parsed.text).split())
    assert text.index("Not a medical device") < text.index("Verdict")
    ids = [attributes["id"] for tag, attributes in parsed.tags if tag == "section"]
    assert ids == ["verdict", "figures", "pairs", "plots", "time", "errors", "questions"]
    assert text.count(COMMAND) == 9  # at the top, beside each section, and with machine and settings
    for words in ("F1", "Calibration error", "Refused to answer", "With pictures of other questions", "p99", "3.00 GiB",
                  "3.5 a second", "Wh", "… closed (80)", "Adjusted p (Holm)", "Smallest difference", "a CPU",
                  "seconds", "US dollars per 1,000", "confidence, %"):  # fmt: skip
        assert words in text, words


def test_no_secret_is_passed_on(written: list[Path]) -> None:
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert not re.search('sk-secretsecret|user:pw|abc123|"abc"', text), path
    assert setting("api_key", "x") == HIDDEN and setting("max_new_tokens", 64) == "64"
    assert without_secrets("run --api-key sk-1 --seed 0") == f"run --api-key {HIDDEN} --seed 0"
    assert without_secrets("Bearer abc.def and hf_abcdefghij") == f"Bearer {HIDDEN} and {HIDDEN}"
    assert (
        without_secrets("--max-new-tokens 5 What key is it? monkey = 3")
        == "--max-new-tokens 5 What key is it? monkey = 3"
    )


def test_embedded_data(page: str) -> None:
    data = data_of(page)
    assert data["pipelines"] == ["native", "text_only", "blind"] and len(data["questions"]) == QUESTIONS
    assert [problem for uri, problem in data["pictures"] if not uri] == [
        "file 'gone.png' does not exist. Check the path."
    ]
    assert len(data["pictures"]) == 8, "each picture once"
    assert all(uri.startswith("data:image/jpeg;base64,") for uri, _ in data["pictures"] if uri)
    assert "only with the wrong picture" not in json.dumps(data["questions"]), "controls are no columns"
    first = data["questions"][0]
    assert first[2] == ATTACK and first[6] == 1, "disagree"
    assert [each[7] for each in data["questions"]].count(1) == 2
    steps = first[8][1][7]
    assert data["boxes"][steps[0][4]] == [[0.1, 0.1, 0.4, 0.2]] and data["texts"][steps[0][3]] == "LABEL"


def test_nothing_breaks_out_of_the_script() -> None:
    hostile = ["</script>", "<!--<script>", "&lt;", "a\u2028b", "]]>"]
    text = embedded(hostile)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == hostile


def test_verdicts_name_the_winner(tmp_path: Path) -> None:
    said = said_by(full(tmp_path))
    assert "native wins on slake: 90.0 %" in said and "p < 0.001" in said
    assert "native beats blind, which sees no picture, by" in said
    assert "it does use the right picture" in said
    assert "text_only gave no answer to 2 of 120 questions" in said


@pytest.mark.parametrize("winner", ["text_only", "hybrid", "blind"])
def test_verdicts_say_plainly_where_another_wins(winner: str) -> None:
    rows = [row("native", n, n % 2 == 0) for n in range(100)] + [row(winner, n, n % 10 != 0) for n in range(100)]
    said = said_by(results(rows))
    assert f"{winner} wins on slake: 90.0 %, 40.0 points more than native" in said
    assert ("It sees no picture." in said) == (winner == "blind")


def test_verdicts_say_what_the_sample_cannot_find() -> None:
    rows = [row("native", n, n % 2 == 0) for n in range(40)] + [row("blind", n, n % 2 == (n < 2)) for n in range(40)]
    rows += [row("text_only", n, (n + 1) % 20 != 0) for n in range(40)]
    said = said_by(results(rows))
    assert "text_only wins on slake" in said and "were right on the very same" not in said
    assert "less than this sample could find" in said and "not shown that seeing the picture helps" in said
    close = said_by(results([row(name, n, n % 7 != 0) for name in ("native", "hybrid") for n in range(40)]))
    assert "No clear winner" in close and "were right on the very same questions" in close


def test_graded_scores_are_no_percentages() -> None:
    rows = [
        replace(row(name, n, True), task="captions", scores={"rouge_l": 0.4 + 0.1 * (n % 3) + plus})
        for name, plus in (("native", 0.1), ("text_only", 0.0))
        for n in range(30)
    ]
    said = said_by(results(rows))
    assert "native wins on captions: 0.600, 0.100 more than text_only" in said
    text = page_of(results(rows))
    Parsed(text)
    assert "Answers are not simply right or wrong" in text
    assert data_of(text)["metrics"] == [["ROUGE-L", 0]]


def test_unfinished_run() -> None:
    rows = [row("native", n, True) for n in range(30)] + [row("blind", n, n > 3) for n in range(10)]
    assert "Unfinished: of 30 questions, blind 10 were asked so far." in said_by(results(rows))


def test_no_rows(tmp_path: Path) -> None:
    paths = write_report(results([]), tmp_path)
    assert "This run holds no answers yet" in paths[0].read_text() and "no answers yet" in paths[1].read_text()
    Parsed(paths[0].read_text())
    assert paths[2].read_text().startswith("task,pipeline") and len(paths[3].read_text().splitlines()) == 1
    assert "no answers yet" in readme_table(results([]))


def test_only_errors(tmp_path: Path) -> None:
    rows = [replace(row(name, n, True), answer=None, error="no\nkey", scores={}) for name in "ab" for n in range(3)]
    paths = write_report(results(rows), tmp_path)
    text = paths[0].read_text()
    Parsed(text)
    assert "No pipeline answered a question of slake: 6 errors" in text and "no\nkey" in text
    assert "| no key | 3 | slake | a |" in paths[1].read_text()


def test_one_pipeline_without_cost_or_confidence(tmp_path: Path) -> None:
    rows = [row("native", n, n % 2 == 0, cost=None, confidence=None) for n in range(6)]
    paths = write_report(results(rows), tmp_path)
    text = paths[0].read_text()
    Parsed(text)
    for said in ("There is nothing to compare it with", "Not known, so not shown: native.", "unknown",
                 "No pipeline says how sure it is.", "No two pipelines answered the same question"):  # fmt: skip
        assert said in text, said
    assert "Calibration error</th>" not in text


def test_odd_names_and_long_answers(tmp_path: Path) -> None:
    names = ['<b>"x"</b>', "=cmd|'/c calc'!A0", "a" * 300, "né\u202eon\ud800", "x|y\n## head", "__proto__", ""]
    rows = [row(name, n, n % 2 == 0, text="word " * 2000 + "\0") for name in names for n in range(4)]
    paths = write_report(results(rows), tmp_path)
    text = paths[0].read_text()
    Parsed(text)
    assert "<b>" not in text.split("<main>")[1] and len(data_of(text)["questions"][0][8][0][1]) == 10001
    assert all(
        line.count(" | ") == len(names) for line in paths[1].read_text().splitlines() if line.startswith("| Errors")
    )
    assert "\n## head" not in paths[1].read_text()
    with paths[2].open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(names)


def test_bad_pictures(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "empty.png").touch()
    names = ["moving.gif", "broken.png", "empty.png", "missing.png", ".", "nul\0.png"]
    album = Album()
    numbers = [album.number(tmp_path / name) for name in names]
    assert numbers == list(range(6)) and album.number(tmp_path / "moving.gif") == 0
    assert album.thumbnails[0].uri and all(each.problem and not each.uri for each in album.thumbnails[1:])
    rows = [row("native", n, True, (tmp_path / name,)) for n, name in enumerate(names)]
    Parsed(page_of(results(rows)))


def test_pictures_end_at_the_cap(tmp_path: Path) -> None:
    made = results([row("native", n, True, (picture(tmp_path, n),)) for n in range(4)])
    size = len(_first(tmp_path))
    album = Album(cap=int(2.5 * size))
    text = html(made, summarise(made), pairs_of(made), album)
    assert album.left_out >= 1 and f"{album.left_out} of them had no room" in text
    kept = [bool(each.uri) for each in album.thumbnails]
    assert kept == sorted(kept, reverse=True), "after the first that is left out, none follows"


def _first(folder: Path) -> str:
    album = Album()
    album.number(picture(folder, 0))
    with Image.open(picture(folder, 0)) as image:
        assert max(image.size) > 320
    return album.thumbnails[0].uri


def test_boxes_that_are_none_are_left_out() -> None:
    boxes = [[0, 0, 1, 1], [0, 0, 1], ["a", 0, 0, 0], [float("nan"), 0, 1, 1], [5, 5, 9, 9], None]
    assert boxes_of(Step("ocr", details={"boxes": boxes})) == ((0, 0, 1, 1),)
    assert boxes_of(Step("ocr", details={"boxes": "no"})) == boxes_of(Step("ocr")) == ()


def test_the_second_picture_is_read_by_the_second_step(tmp_path: Path) -> None:
    steps = tuple(Step("ocr", details={"boxes": [[0, 0, 1, 0.5 + n / 10]]}) for n in range(3))
    shown = (picture(tmp_path, 0), picture(tmp_path, 1))
    value = Book(results([row("text_only", 0, True, shown, steps=steps)]), Album()).value()
    assert [step[5] for step in value["questions"][0][8][0][7]] == [0, 1, 1]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    rows = [row("native", n, True, confidence=0.5) for n in range(3)]
    rows[0] = replace(rows[0], answer=replace(rows[0].answer, total=float("inf"), first_token=float("nan")))  # type: ignore[type-var]
    Parsed(page_of(results(rows)))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "  =1", "\r\n=1", "\uff1d1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert neutral(text) == f"'{text}"
    assert neutral("fine = 3") == "fine = 3" and neutral(-0.5) == -0.5


def test_csv(written: list[Path], tmp_path: Path) -> None:
    with written[2].open(encoding="utf-8", newline="") as file:
        figures = list(csv.DictReader(file))
    assert [line["pipeline"] for line in figures] == ["native", "text_only", "blind"]
    assert float(figures[0]["score.value"]) == 0.9 and figures[0]["by.closed.low"] and figures[1]["steps.ocr"] == "0.05"
    with written[3].open(encoding="utf-8", newline="") as file:
        answers = list(csv.DictReader(file))
    assert len(answers) == 3 * QUESTIONS and answers[1]["answer"] == ATTACK
    attacked = results([row("native", 0, True, text='=HYPERLINK("http://x")')])
    assert '"\'=HYPERLINK(""http://x"")"' in write_report(attacked, tmp_path)[3].read_text()


def test_markdown(written: list[Path]) -> None:
    text = written[1].read_text()
    assert text.count(f"```sh\n{COMMAND}\n```") == 2
    assert "| Exact match, 95 % interval | 90.0 % (" in text and "native \u2212 text_only" in text
    assert cell("a|b <img src=x> [x](y) &lt; text_only *b* p < 1") == (
        r"a\|b &lt;img src=x> \[x\](y) &amp;lt; text_only \*b\* p < 1"
    )


def test_readme_table(tmp_path: Path) -> None:
    text = readme_table(full(tmp_path))
    lines = text.splitlines()
    assert lines[0] == "**slake**, 120 questions"
    assert lines[2] == "| Pipeline | Exact match (95 % interval) | Median time | $ per 1,000 |"
    assert lines[4].startswith("| native | 90.0 % (") and lines[5].endswith("| $2.00 |")
    assert COMMAND in text


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.5, 0.5], [1e-4, 1e4], [0.0, 7.0], [3.0, 3.1], [1e9, 1e9 + 1]])
def test_axes_hold_their_values(values: list[float]) -> None:
    for zero, log in ((True, True), (False, False)):
        made = axis("x", values, str, zero=zero, log=log)
        assert 2 <= len(made.ticks) <= 12 and made.low < made.high
        assert all(made.low <= value * (1 + 1e-9) and value <= made.high * (1 + 1e-9) for value in values)


def test_a_page_for_a_thousand_questions_is_made_quickly(tmp_path: Path) -> None:
    rows = [row(f"p{k}", n, n % (k + 2) == 0, (picture(tmp_path, n % 10),)) for n in range(1053) for k in range(8)]
    made = results(rows)
    text = html(made, [], [], Album())
    assert len(text) < 3_000_000 and len(data_of(text)["questions"]) == 1053


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives a browser: pip install -e '.[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_in_a_browser(browser: Any, written: list[Path], width: int, scheme: str) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda entry: wrong.append(entry.text) if entry.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(written[0].as_uri())
    count = page.locator("#count")
    cards = page.locator(".question")

    assert cards.count() == 50 and count.inner_text() == "Showing 50 of 120 questions."
    assert page.evaluate("[window.pwned, document.scripts.length]") == [None, 2]
    assert cards.first.locator(".asked").inner_text() == ATTACK
    assert ATTACK in cards.first.inner_text() and cards.first.locator("img").count() == 1
    assert "✗ wrong" in cards.first.inner_text() and "✓ right" in cards.first.inner_text()
    assert "confidence 60 %" in cards.first.inner_text() and "200 ms" in cards.first.inner_text()
    assert "No picture: file 'gone.png' does not exist" in cards.nth(5).inner_text()
    page.locator("#more").click()
    page.locator("#more").click()
    assert cards.count() == 120 and page.locator("#more").is_hidden()

    saw = cards.first.locator("details").nth(1)
    assert saw.locator(".step").count() == 0, "filled when it is opened"
    saw.locator("summary").click()
    saw.locator(".step").first.wait_for()
    assert "The exact prompt 0" in saw.inner_text() and "kept from an earlier question" in saw.inner_text()
    frame, drawn = saw.locator(".overlay svg").bounding_box(), saw.locator("rect").bounding_box()
    assert abs(drawn["width"] / frame["width"] - 0.4) < 0.03, "boxes lie over the picture, as shares of it"

    page.locator("#failed").check()
    assert count.inner_text() == "Showing 2 of 2 questions that fit, 120 in all."
    assert "⚠ error" in cards.first.inner_text() and HIDDEN in cards.first.inner_text()
    page.locator("#failed").uncheck()
    page.locator("#disagree").check()
    some = cards.count()
    assert 0 < some <= 50 and all("wrong" in text and "right" in text for text in cards.all_inner_texts())
    page.locator("#disagree").uncheck()
    page.locator("#kind").select_option(label="open")
    assert "of 40 questions" in count.inner_text()
    page.locator("#search").fill("QUESTION 6?")
    expect(cards).to_have_count(1)
    page.locator("#search").fill("nothing has this")
    expect(count).to_have_text("No question fits. There are 120 in all.")
    assert page.locator("#task").is_hidden(), "there is only one"

    assert page.evaluate("document.documentElement.scrollWidth") <= width, "tables scroll within their own box"
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((box) => box.clientWidth <= innerWidth)")
    assert not wrong and [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
