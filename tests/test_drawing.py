"""Heat lies where the model looked, bars stand for words, and every answer can be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.answer import Answer, Timings, Usage
from multimodal.drawing import (
    LEAST_TOP,
    WIDTH,
    _font,
    _has_glyph,
    _wrap,
    answer_words,
    attention_maps,
    attention_overlay,
    draw_trace,
    gate_scale,
    heat_top,
)
from multimodal.fusion import FusionTrace

GRID = (3, 4)


def trace_of(cells: list[list[tuple[int, int]]], gates: list[float] | None = None) -> FusionTrace:
    """Token ``t`` looks at the cell ``cells[t][i]`` of picture ``i``, at all pictures alike; two blocks, alike."""
    tokens, images = len(cells), len(cells[0])
    regions = GRID[0] * GRID[1]
    attention = torch.zeros(1, 2, tokens, images, regions)
    for token, looks in enumerate(cells):
        for image, (row, column) in enumerate(looks):
            attention[0, :, token, image, row * GRID[1] + column] = 1 / images
    openness = torch.tensor(gates or [0.5] * tokens).expand(1, 2, tokens)
    return FusionTrace(
        layers=(1, 3),
        attention_gates=openness,
        feed_forward_gates=openness,
        attention=attention,
        resampler_maps=torch.eye(regions).expand(1, images, regions, regions),
        grid=GRID,
    )


def answer_of(tokens: list[str], *, finished: bool = True, images: int = 1, **changes: Any) -> Answer:
    """An answer whose text its tokens make; the last one ends it, if it is finished."""
    trace = trace_of([[(0, 0)] * images] * len(tokens), gates=changes.pop("gates", None))
    return Answer(
        **{
            "text": "".join(tokens[:-1] if finished else tokens).strip(),
            "confidence": 0.62,
            "timings": Timings(0.1, 0.2, 0.3),
            "usage": Usage(20, len(tokens), images),
            "tokens": tuple(tokens),
            "finished": finished,
            "trace": trace,
            **changes,
        }
    )


# ---- words


@pytest.mark.parametrize(
    ("tokens", "finished", "words"),
    [
        (["Card", "i", "omeg", "aly", ".", "<end>"], True, [("Cardiomegaly.", 0, 5)]),
        (["Left", " lu", "ng", "<end>"], True, [("Left", 0, 1), ("lung", 1, 3)]),
        ([" Left", " lung"], False, [("Left", 0, 1), ("lung", 1, 2)]),
        (["a", "\n\n", "b", " ", " ", "c", "<end>"], True, [("a", 0, 1), ("b", 2, 3), ("c", 5, 6)]),
        (["\N{CJK UNIFIED IDEOGRAPH-80BA}", "\N{CJK UNIFIED IDEOGRAPH-90E8}", "<end>"], True, None),
        (["<end>"], True, []),
        ([" ", "", "<end>"], True, []),
    ],
)
def test_tokens_become_words(tokens: list[str], finished: bool, words: list[tuple[str, int, int]] | None) -> None:
    found = [(word.text, word.start, word.stop) for word in answer_words(answer_of(tokens, finished=finished))]
    assert found == (words if words is not None else [(token, i, i + 1) for i, token in enumerate(tokens[:-1])])


def test_a_word_of_half_characters_is_read_whole() -> None:
    answer = answer_of(["\ufffd", "\ufffd", "l", " is", "<end>"], text="\N{LATIN SMALL LETTER O WITH DIAERESIS}l is")
    assert [word.text for word in answer_words(answer)] == ["\N{LATIN SMALL LETTER O WITH DIAERESIS}l", "is"]


def test_openness_is_the_mean_over_the_tokens_of_a_word() -> None:
    words = answer_words(answer_of(["le", "ft", " lung", "<end>"], gates=[0.125, 0.25, 0.625, 1.0]))
    assert [word.openness for word in words] == pytest.approx([0.1875, 0.625])
    assert gate_scale(words) == 1.0
    assert gate_scale(words[:1]) == 0.2
    assert gate_scale([]) > 0


def test_an_answer_without_a_trace_is_refused() -> None:
    for function in (answer_words, attention_maps):
        with pytest.raises(ValueError, match="trace=True"):
            function(answer_of(["a", "<end>"], trace=None))


# ---- where the model looked


def test_maps_are_multiples_of_an_even_share() -> None:
    answer = answer_of(["a", " b", "<end>"], trace=trace_of([[(0, 0)], [(2, 3)], [(1, 1)]], gates=[0.1, 0.3, 0.9]))
    maps = attention_maps(answer)
    assert maps.shape == (1, *GRID)
    assert maps.sum() == pytest.approx(12)
    assert maps[0, 0, 0] == pytest.approx(3)  # a quarter of the openness of the two words, on one of twelve cells
    assert maps[0, 2, 3] == pytest.approx(9)
    assert maps[0, 1, 1] == 0  # where it looked when it chose to end
    word = attention_maps(answer, answer_words(answer)[1])
    assert word[0, 2, 3] == pytest.approx(12)


def test_shut_gates_and_an_empty_answer_give_no_heat() -> None:
    assert attention_maps(answer_of(["a", "<end>"], gates=[0.0, 0.0])).max() == 0
    assert attention_maps(answer_of(["<end>"])).max() == 0


CORNERS = {(0, 0): (0, 0), (0, 3): (0, -1), (2, 0): (-1, 0), (2, 3): (-1, -1)}


@pytest.mark.parametrize("size", [(300, 200), (90, 240), (64, 64)])
@pytest.mark.parametrize("cell", CORNERS)
def test_heat_at_a_corner_of_the_grid_lies_at_that_corner_of_the_picture(
    cell: tuple[int, int], size: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "#808080")
    heat = np.zeros(GRID)
    heat[cell] = 12
    drawn = np.asarray(attention_overlay(image, heat), dtype=float)
    assert drawn.shape == (size[1], size[0], 3)
    changed = np.abs(drawn - 128).sum(-1)  # (height, width)
    corners = {other: changed[place] for other, place in CORNERS.items()}
    assert corners[cell] > 60
    assert all(value == 0 for other, value in corners.items() if other != cell)
    rows, columns = np.nonzero(changed)  # heat reaches at most one cell further, and into its own cell at least
    height, width = size[1] / GRID[0], size[0] / GRID[1]
    assert height <= np.ptp(rows) + 1 <= 1.5 * height + 1
    assert width <= np.ptp(columns) + 1 <= 1.5 * width + 1


def test_more_attention_is_brighter_and_an_even_share_has_no_colour() -> None:
    level = np.linspace(0, 5, 40)[None]
    drawn = attention_overlay(Image.new("RGB", (400, 10), "black"), level, top=5)
    brightness = np.asarray(drawn.convert("L"), dtype=float)[5]
    assert (np.diff(brightness) >= -1).all()  # -1: rounding
    assert brightness[:75].max() == 0 < brightness[100]


def test_nearly_even_attention_does_not_look_like_a_finding() -> None:
    assert heat_top(np.full(GRID, 1.1)) == LEAST_TOP
    image = Image.new("RGB", (40, 30), "#808080")
    drawn = np.asarray(attention_overlay(image, np.full(GRID, 1.05)), dtype=float)
    assert np.abs(drawn - 128).max() < 20


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_any_mode_is_drawn_on(mode: str) -> None:
    assert attention_overlay(Image.new(mode, (20, 10)), np.ones(GRID)).mode == "RGB"


# ---- the whole drawing


@pytest.mark.parametrize("size", [(64, 64), (1000, 100), (100, 1000), (1, 1)])
def test_pictures_of_all_shapes_are_drawn(size: tuple[int, int]) -> None:
    drawn = draw_trace(Image.new("RGB", size), answer_of(["Left", " lung", "<end>"]), question="Which lung?")
    assert drawn.mode == "RGB" and drawn.width == WIDTH and drawn.height < 1000


def test_several_pictures_lie_side_by_side() -> None:
    images = [Image.new("RGB", (60, 60), colour) for colour in ("red", "green", "blue")]
    answer = answer_of(["Left", " lung", "<end>"], images=3)
    assert draw_trace(images, answer).height > 600  # two rows of two columns
    with pytest.raises(ValueError, match="3 pictures, but 1"):
        draw_trace(images[0], answer)


def test_long_answers_take_more_rows_and_lose_no_word() -> None:
    image = Image.new("RGB", (60, 60))
    short = draw_trace(image, answer_of([" word"] * 30, finished=False))
    long = draw_trace(image, answer_of([" word"] * 300, finished=False))
    assert long.height > 2 * short.height
    bars = np.asarray(long)[-300:-60]
    assert (bars == (126, 3, 168)).all(-1).any(), "no bar near the end"


@pytest.mark.parametrize(
    "tokens",
    [
        ["<end>"],
        ["x" * 500, "<end>"],
        [
            "\N{CYRILLIC SMALL LETTER EL}\N{CYRILLIC SMALL LETTER IO}",
            "\N{CJK UNIFIED IDEOGRAPH-80BA}",
            "\U0001fac1",
            "<end>",
        ],
    ],
)
def test_strange_answers_are_drawn(tokens: list[str]) -> None:
    drawn = draw_trace(Image.new("RGB", (60, 60)), answer_of(tokens), question="\N{CJK UNIFIED IDEOGRAPH-80BA}? " * 200)
    assert drawn.height < 1200


def test_bars_are_as_high_as_their_gates_are_open() -> None:
    drawn = np.asarray(draw_trace(Image.new("RGB", (60, 60)), answer_of(["a", " b", "<end>"], gates=[0.25, 0.5, 0.0])))
    bars = (drawn == (126, 3, 168)).all(-1)  # (height, width)
    heights = sorted({int(count) for count in bars.sum(0) if count})
    assert heights == [33, 65]  # a half and the whole of the scale, which ends at 0.5, and the base line


def test_a_font_that_has_the_characters_is_taken() -> None:
    assert _font(20, "abc") is _font(20, "xyz")
    assert _has_glyph(_font(20, "a"), "a")
    assert not _has_glyph(_font(20, "a"), "\U0001fac1")
    assert _font(20, "\U0010fffe") is _font(20, "a"), "characters that no font has are left to Pillow's own"


def test_lines_fit_and_are_cut_where_there_are_too_many() -> None:
    font = _font(20, "a")
    lines = _wrap("lung " * 100, 20, 300, most=3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 300 for line in [*lines, *_wrap("x" * 400, 20, 300, most=99)])
    assert "".join(_wrap("x" * 400, 20, 300, most=99)) == "x" * 400
    assert _wrap("", 20, 300, most=3) == []
