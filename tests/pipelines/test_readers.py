"""What is read off pictures: once each, never another one's, and put into words by a template that can do no harm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from multimodal.images import ImageError
from multimodal.pipelines.prompts import HYBRID, TEXT_ONLY, ReadingPrompt
from multimodal.pipelines.protocol import PipelineError, Step
from multimodal.pipelines.readers import LABELS, ImageNetTags, KeptReader, RapidOcr, Tesseract


class Colour:
    """Reads the colour of the first pixel, and counts."""

    name = "ocr"

    def __init__(self, digest: str = "colour", output: str = "{}") -> None:
        self.digest, self.output, self.count = digest, output, 0

    def prepare(self) -> None:
        """Nothing to load."""

    def read(self, picture: Image.Image) -> Step:
        self.count += 1
        return Step(self.name, 0.5, self.output.format(picture.getpixel((0, 0))), details={"size": list(picture.size)})


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


def saved(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    plain(colour).save(folder / name)
    return folder / name


def labelled(*lines: str) -> Image.Image:
    """Lines of print, one below the other, on white."""
    picture = Image.new("RGB", (480, 120 * len(lines)), "white")
    for place, line in enumerate(lines):
        ImageDraw.Draw(picture).text((40, 120 * place + 30), line, fill="black", font=ImageFont.load_default(size=48))
    return picture


def test_a_picture_is_read_once() -> None:
    reader = Colour()
    kept = KeptReader(reader)
    first, again = kept.read(plain((1, 2, 3))), kept.read(plain((1, 2, 3)))
    assert reader.count == 1
    assert (first.cached, again.cached) == (False, True)
    assert (first.output, first.seconds) == (again.output, again.seconds) == ("(1, 2, 3)", 0.5)


def test_a_file_its_bytes_and_its_copy_are_one_picture(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.png", (9, 9, 9))
    copy = tmp_path / "b.png"
    copy.write_bytes(path.read_bytes())
    reader = Colour()
    kept = KeptReader(reader)
    steps = [kept.read(each) for each in (path, str(path), copy, path.read_bytes())]
    assert reader.count == 1 and len({step.details["picture"] for step in steps}) == 1


def test_two_pictures_never_mix(tmp_path: Path) -> None:
    reader = Colour()
    kept = KeptReader(reader)
    colours = [(number, 0, 0) for number in range(5)]
    shown = [kept.read(saved(tmp_path, "same.png", colour)) for colour in colours]
    assert [step.output for step in shown] == [str(colour) for colour in colours]
    assert [kept.read(plain(colour)).output for colour in colours] == [str(colour) for colour in colours]
    assert len({step.details["picture"] for step in shown}) == 5


def test_the_same_pixels_in_another_shape_are_another_picture() -> None:
    kept = KeptReader(Colour())
    assert [kept.read(plain((7, 7, 7), size)).details["size"] for size in ((6, 4), (4, 6), (12, 2))] == [
        [6, 4],
        [4, 6],
        [12, 2],
    ]


def test_what_was_read_outlives_the_process(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "ocr.jsonl"
    first = KeptReader(Colour(), file).read(plain((1, 1, 1)))
    reader = Colour()
    again = KeptReader(reader, file).read(plain((1, 1, 1)))
    assert reader.count == 0
    assert again.cached and again.details["kept"] and not first.details["kept"]
    assert (again.output, again.seconds, again.details["size"]) == (first.output, 0.5, [6, 4])


def test_another_readers_words_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "ocr.jsonl"
    KeptReader(Colour("one"), file).read(plain((1, 1, 1)))
    other = Colour("other", "by the other {}")
    assert KeptReader(other, file).read(plain((1, 1, 1))).output == "by the other (1, 1, 1)"
    assert other.count == 1


def test_half_a_line_after_a_kill_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "ocr.jsonl"
    kept = KeptReader(Colour(), file)
    for colour in ((1, 1, 1), (2, 2, 2)):
        kept.read(plain(colour))
    file.write_bytes(file.read_bytes()[:-20])
    reader = Colour()
    again = KeptReader(reader, file)
    assert again.read(plain((1, 1, 1))).cached and again.read(plain((2, 2, 2))).output == "(2, 2, 2)"
    assert reader.count == 1
    assert [json.loads(line)["step"]["output"] for line in file.read_text().splitlines()] == ["(1, 1, 1)", "(2, 2, 2)"]


def test_a_broken_picture_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        KeptReader(Colour()).read(tmp_path / "broken.png")


@pytest.fixture(scope="module")
def ocr() -> RapidOcr:
    return RapidOcr()


def test_print_is_found_with_its_place(ocr: RapidOcr) -> None:
    step = ocr.read(labelled("OAT MILK", "1 LITRE"))
    assert [line.upper() for line in step.output.splitlines()] == ["OAT MILK", "1 LITRE"]
    assert step.name == "ocr" and step.seconds > 0
    first, second = step.details["boxes"]
    for left, top, width, height in (first, second):
        assert 0 <= left < left + width <= 1 and 0 <= top < top + height <= 1
        assert 0.02 < left < 0.15 and 0.3 < width < 0.8
    assert first[1] + first[3] < 0.55 and second[1] > 0.45  # one in the upper half, the other in the lower
    assert all(0.5 <= score <= 1 for score in step.details["scores"]) and len(step.details["scores"]) == 2


@pytest.mark.parametrize("size", [(64, 64), (1, 1)])
def test_nothing_is_found_where_there_is_nothing(ocr: RapidOcr, size: tuple[int, int]) -> None:
    step = ocr.read(plain((90, 90, 90), size))
    assert (step.output, step.details) == ("", {"boxes": [], "scores": []})


def test_labels_come_by_their_share() -> None:
    tags = ImageNetTags()
    tags.prepare()
    step = tags.read(labelled("A"))
    shares = step.details["shares"]
    assert len(step.details["labels"]) == len(set(step.details["labels"])) == len(shares) == LABELS == 5
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0 and sum(shares) <= 1
    assert step.output.startswith(f"{step.details['labels'][0]} {shares[0]:.0%}, ") and step.output.count("%") == 5


def test_without_tesseract_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="tesseract is not installed: install it"):
        Tesseract().read(plain((0, 0, 0)))


def program(folder: Path, script: str) -> None:
    (folder / "tesseract").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "tesseract").chmod(0o755)


def test_what_tesseract_prints_is_tidied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, r"cat > /dev/null; printf '\n  OAT   MILK \n\n\n1 l\n\f'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert Tesseract().read(plain((0, 0, 0))).output == "OAT MILK\n1 l"


def test_a_tesseract_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, "cat > /dev/null; echo 'no   language data' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PipelineError, match=r"tesseract fails \(no language data\)"):
        Tesseract().read(plain((0, 0, 0)))


def prompt(tmp_path: Path, template: str, readers: Sequence[Any] | None = None) -> ReadingPrompt:
    (tmp_path / "own.j2").write_text(template)
    return ReadingPrompt([KeptReader(Colour())] if readers is None else readers, tmp_path / "own.j2")


def test_the_prompt_has_what_was_read_and_the_question() -> None:
    made = ReadingPrompt([KeptReader(Colour(output="OAT\nMILK"))], TEXT_ONLY)
    text, steps = made.of("What is it?", [plain((1, 1, 1))])
    assert "Printed text in it: OAT / MILK" in text and "Question: What is it?" in text
    assert "Caption" not in text and "may show" not in text
    assert [step.name for step in steps] == ["ocr"]


def test_where_nothing_was_read_nothing_is_said_of_it() -> None:
    text, _ = ReadingPrompt([KeptReader(Colour(output=""))], HYBRID).of("What is it?", [plain((1, 1, 1))])
    assert text == "What is it?"


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    made = prompt(
        tmp_path, "{% for line in ocr.splitlines() %}[{{ line }}]{% endfor %} {{ question | upper }}{{ tags }}"
    )
    text, steps = made.of("why?", [plain((1, 1, 1)), plain((2, 2, 2))])
    assert text == "[(1, 1, 1)][(2, 2, 2)] WHY?" and len(steps) == 2


def test_what_is_read_is_text_and_no_template(tmp_path: Path) -> None:
    made = prompt(tmp_path, "{{ ocr }}|{{ question }}", [KeptReader(Colour(output="{{{{ 6*7 }}}}"))])
    assert made.of("{{ 6*7 }}", [plain((1, 1, 1))])[0] == "{{ 6*7 }}|{{ 6*7 }}"


def test_another_template_or_reader_is_another_digest(tmp_path: Path) -> None:
    one, same = (prompt(tmp_path, "{{ question }}").digest for _ in range(2))
    others = {
        prompt(tmp_path, "{{ question }}!").digest,
        prompt(tmp_path, "{{ question }}", [KeptReader(Colour("other"))]).digest,
        prompt(tmp_path, "{{ question }}", []).digest,
    }
    assert one == same and len({one, *others}) == 4


@pytest.mark.parametrize(
    "template",
    [
        "{{ nobody }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ question.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ question.format.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ range(99999999) | list }}",
        "{{ 1 / 0 }}",
        "{{ question + 1 }}",
        "{{ question.encode('no-such-code') }}",
    ],
)
def test_a_template_gets_at_nothing_but_its_variables(tmp_path: Path, template: str) -> None:
    with pytest.raises(PipelineError, match=r"own\.j2 cannot be filled in .*it has ocr, tags, caption, question"):
        prompt(tmp_path, template).of("why?", [])


def test_a_template_with_a_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"own\.j2 is no Jinja template .*repair it"):
        prompt(tmp_path, "{% if ocr %}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_template_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "gone.j2").write_bytes(content)
    with pytest.raises(PipelineError, match=r"gone\.j2 cannot be read .*give a Jinja file"):
        ReadingPrompt([], tmp_path / "gone.j2")
