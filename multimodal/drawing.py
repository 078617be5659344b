"""Draws what an answer's trace knows: how much picture went into each word, and where its attention lay.

What it does: merges tokens into words, folds attention over the picture, and lays picture, bars and text out as one
image for `multimodal ask --trace`. The demo takes the parts it needs from here.

What it does not know: the model, files, web pages. It needs Pillow and NumPy alone.

What always holds: every scale that is drawn is also written; the attention grid covers the whole picture, since the
encoder squeezes it into a square; the end-of-answer token is no word.

Axes: W words, I images, rows and columns of the encoder's grid.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from multimodal.answer import Answer
    from multimodal.fusion import FusionTrace

# Five anchors of the colour map "plasma" (van der Walt and Smith, 2015, CC0): its lightness rises evenly, so that more
# attention always looks brighter, in print and to the colour-blind too.
PLASMA = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], dtype=np.float32)
# Opacity of the strongest heat: the picture must still show through.
OPACITY = 0.7
# How much of the picture's own colour stays under the heat.
COLOUR_KEPT = 0.4
# Attention this many times an even share is painted in the brightest colour at least: a map that is nearly even must
# not look like a finding.
LEAST_TOP = 3.0
# Where the scale of the bars may end; 1 is a gate that is fully open.
GATE_SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)

# Pixels: the whole drawing, its edges, the column of pictures, between two things; a bar's height and width.
WIDTH, MARGIN, PICTURE, GAP = 1200, 32, 520, 12
BAR_HEIGHT, BAR_WIDTH = 64, 34
INK, MUTED, FAINT, PAPER, BAR_INK = "#1b1f24", "#5b6470", "#dfe3e8", "white", "#7e03a8"

# Tried in order for text beyond Pillow's own font, which knows the Latin letters; found by name where the system keeps
# its fonts.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "msyh.ttc")


@dataclass(frozen=True)
class Word:
    """A word of an answer.

    Attributes:
        text: As a person reads it, without spaces.
        start: Its first token, counted in ``Answer.tokens``.
        stop: One past its last token.
        openness: Mean openness of the attention gates over its tokens, 0 shut to 1 open.
    """

    text: str
    start: int
    stop: int
    openness: float


def answer_words(answer: Answer) -> list[Word]:
    """The words of an answer, each with how far its gates stood open.

    A word begins after white space, and in scripts that have none (Chinese, Japanese) at every token.

    Raises:
        ValueError: If the answer has no trace.
    """
    openness = _trace(answer).openness()[0].tolist()
    spans: list[tuple[int, int]] = []
    before = " "
    for index, token in enumerate(_answer_tokens(answer)):
        if token[:1].isspace() or before[-1:].isspace() or unicodedata.east_asian_width(token[:1] or " ") in "WF":
            spans.append((index, index))
        spans[-1] = (spans[-1][0], index + 1)
        before = token or before
    texts = ["".join(answer.tokens[start:stop]).strip() for start, stop in spans]
    found = [(text, *span) for text, span in zip(texts, spans, strict=True) if text]
    whole = answer.text.split()
    if len(whole) == len(found):  # a token may hold half a character; the text holds it whole
        found = [(text, start, stop) for text, (_, start, stop) in zip(whole, found, strict=True)]
    return [Word(text, start, stop, float(np.mean(openness[start:stop]))) for text, start, stop in found]


def attention_maps(answer: Answer, word: Word | None = None) -> np.ndarray:
    """Where the model looked while it wrote a word, or the whole answer.

    Args:
        answer: With its trace.
        word: One of its words; None takes all, each token weighted by how far its gates stood open.

    Returns:
        ``(I, rows, columns)`` in multiples of an even share: 1 everywhere if the model looked at all parts of all
        pictures alike, 0 where it did not look, or where the gates are shut.

    Raises:
        ValueError: If the answer has no trace.
    """
    trace = _trace(answer)
    start, stop = (word.start, word.stop) if word else (0, len(_answer_tokens(answer)))
    images = trace.attention.shape[3]
    maps = np.stack([trace.image_attention(image)[0, start:stop].float().numpy() for image in range(images)], axis=1)
    weights = trace.openness()[0, start:stop].float().numpy()
    mean = np.einsum("tirc,t->irc", maps, weights / max(float(weights.sum()), 1e-9))
    return mean * mean.size


def heat_top(maps: np.ndarray) -> float:
    """The attention to paint in the brightest colour, for all pictures alike."""
    return max(float(maps.max(initial=0)), LEAST_TOP)


def gate_scale(words: Sequence[Word]) -> float:
    """Where a scale from 0 that holds the openness of all words may end."""
    most = max((word.openness for word in words), default=0.0)
    return next((scale for scale in GATE_SCALES if most <= scale), 1.0)


def attention_overlay(image: Image.Image, heat: np.ndarray, *, top: float | None = None) -> Image.Image:
    """A picture with the attention to it as heat over it.

    What got its even share or less is left as it is, but for its colours, which are muted everywhere to leave colour to
    the heat.

    Args:
        image: Any size.
        heat: ``(rows, columns)`` in multiples of an even share, as from :func:`attention_maps`; the grid covers the
            whole picture.
        top: The heat painted in the brightest colour; None takes what :func:`heat_top` says of this picture.

    Returns:
        A new RGB image of the same size.
    """
    top = heat_top(heat) if top is None else top
    grid = Image.fromarray(np.clip((heat - 1) / (top - 1), 0, 1).astype(np.float32))
    level = np.asarray(grid.resize(image.size, Image.Resampling.BILINEAR))[..., None]  # (height, width, 1)
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)  # (height, width, 3)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]  # (height, width, 1)
    picture = COLOUR_KEPT * picture + (1 - COLOUR_KEPT) * grey
    # The square root makes faint heat plain to see; its colour still tells how faint it is.
    mixed = picture + OPACITY * np.sqrt(level) * (heat_colours(level[..., 0]) - picture)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def heat_colours(level: np.ndarray) -> np.ndarray:
    """Colours ``(..., 3)``, 0 to 255, of levels ``(...)`` from 0 to 1."""
    anchors = np.linspace(0, 1, len(PLASMA))
    return np.stack([np.interp(level, anchors, channel) for channel in PLASMA.T], axis=-1)


def draw_trace(image: Image.Image | Sequence[Image.Image], answer: Answer, *, question: str = "") -> Image.Image:
    """One image that explains an answer: its pictures under their attention, and a bar for each of its words.

    Args:
        image: The picture asked about, or the pictures in their order.
        answer: With its trace.
        question: Written above, if given.

    Returns:
        An RGB image, ``WIDTH`` wide and as high as it needs.

    Raises:
        ValueError: If the answer has no trace, or there are fewer pictures than it saw.
    """
    pictures = [image] if isinstance(image, Image.Image) else list(image)
    maps, words = attention_maps(answer), answer_words(answer)
    if len(pictures) != len(maps):
        raise ValueError(f"the answer saw {len(maps)} pictures, but {len(pictures)} were given to draw on")
    right = WIDTH - 3 * MARGIN - PICTURE
    heading, left, bars = _heading(question, answer), _picture_column(pictures, maps), _bar_column(words, right)
    height = 4 * MARGIN + heading.height + max(left.height, bars.height)
    canvas = Image.new("RGB", (WIDTH, height), PAPER)
    canvas.paste(heading, (MARGIN, MARGIN))
    canvas.paste(left, (MARGIN, 2 * MARGIN + heading.height))
    canvas.paste(bars, (2 * MARGIN + PICTURE, 2 * MARGIN + heading.height))
    note = "Not a medical device: answers may be wrong, and must not guide diagnosis or treatment."
    ImageDraw.Draw(canvas).text((MARGIN, height - 1.4 * MARGIN), note, MUTED, _font(14, note))
    return canvas


def _trace(answer: Answer) -> FusionTrace:
    if answer.trace is None:
        raise ValueError("the answer has no trace: ask about a picture, with trace=True")
    return answer.trace


def _answer_tokens(answer: Answer) -> tuple[str, ...]:
    return answer.tokens[:-1] if answer.finished else answer.tokens


def _heading(question: str, answer: Answer) -> Image.Image:
    width = WIDTH - 2 * MARGIN
    sure = f"Confidence {answer.confidence:.2f} (the chance that it is right, as the model estimates it)"
    sure += f" \N{MIDDLE DOT} {answer.usage.completion_tokens} tokens"
    sure += "" if answer.finished else " \N{MIDDLE DOT} cut short"
    blocks = [
        _text_block([(line, 18, MUTED) for line in _wrap(question.strip(), 18, width, most=3)], width),
        _text_block([(line, 26, INK) for line in _wrap(answer.text or "(empty answer)", 26, width, most=4)], width),
        _text_block([(sure, 15, MUTED)], width),
    ]
    return _stacked([block for block in blocks if block.height], width)


def _picture_column(pictures: Sequence[Image.Image], maps: np.ndarray) -> Image.Image:
    """The pictures, in two columns if there are several, and the scale of their heat."""
    across = 1 if len(pictures) == 1 else 2
    side = (PICTURE - (across - 1) * GAP) // across
    top = heat_top(maps)
    tiles = [
        attention_overlay(_fitted(picture, side), heat, top=top) for picture, heat in zip(pictures, maps, strict=True)
    ]
    rows = [tiles[start : start + across] for start in range(0, len(tiles), across)]
    legend = _heat_legend(float(maps.max(initial=0)), top)
    height = sum(max(tile.height for tile in row) + GAP for row in rows) + legend.height
    column = Image.new("RGB", (PICTURE, height), PAPER)
    y = 0
    for row in rows:
        for index, tile in enumerate(row):
            column.paste(tile, (index * (side + GAP), y))
        y += max(tile.height for tile in row) + GAP
    column.paste(legend, (0, y))
    return column


def _heat_legend(most: float, top: float) -> Image.Image:
    """The colours as they come out on mid-grey, and what their ends mean."""
    legend = Image.new("RGB", (PICTURE, 64), PAPER)
    level = np.linspace(1, top, PICTURE, dtype=np.float32)[None]
    legend.paste(attention_overlay(Image.new("RGB", (PICTURE, 14), "#808080"), level, top=top))
    draw = ImageDraw.Draw(legend)
    font = _font(15, "x")
    draw.text((0, 32), "Attention: an even share or less", INK, font, anchor="ls")
    draw.text((PICTURE, 32), f"{top:.1f} times an even share", INK, font, anchor="rs")
    note = f"The most here is {most:.1f} times." if most else "The gates are shut: the model did not look."
    draw.text((0, 54), note, MUTED, font, anchor="ls")
    return legend


def _bar_column(words: Sequence[Word], width: int) -> Image.Image:
    """The answer as running text, over each word a bar for the openness of its gates."""
    scale = gate_scale(words)
    heading = _text_block(
        [
            ("How much picture went into each word", 18, INK),
            (f"Bars: mean openness of the attention gates, from 0 to {scale:g}", 15, MUTED),
            ("(0 is shut: language alone; 1 would be fully open)", 15, MUTED),
        ],
        width,
    )
    if not words:
        return _stacked([heading, _text_block([("The answer has no words.", 15, MUTED)], width)], width)
    rows: list[list[tuple[Word, str, int]]] = [[]]
    x = 0
    for word in words:
        text = _shortened(word.text, 17, width)
        cell = max(BAR_WIDTH, round(_font(17, text).getlength(text)))
        if rows[-1] and x + cell > width:
            rows.append([])
            x = 0
        rows[-1].append((word, text, cell))
        x += cell + GAP
    return _stacked([heading, *(_bar_row(row, scale, width) for row in rows)], width)


def _bar_row(row: Sequence[tuple[Word, str, int]], scale: float, width: int) -> Image.Image:
    """Words side by side, each given as the word, its text as drawn and the pixels it takes."""
    image = Image.new("RGB", (width, BAR_HEIGHT + 46), PAPER)
    draw = ImageDraw.Draw(image)
    digits = 3 if scale < 0.1 else 2
    base = BAR_HEIGHT + 18
    x = 0.0
    for word, text, cell in row:
        middle = x + cell / 2
        left, right = middle - BAR_WIDTH / 2, middle + BAR_WIDTH / 2
        height = round(BAR_HEIGHT * word.openness / scale)
        draw.rectangle((left, base - BAR_HEIGHT, right, base), FAINT)
        draw.rectangle((left, base - height, right, base), BAR_INK)
        draw.text((middle, base - BAR_HEIGHT - 4), f"{word.openness:.{digits}f}", MUTED, _font(13, "0"), anchor="ms")
        draw.text((middle, base + 20), text, INK, _font(17, text), anchor="ms")
        x += cell + GAP
    return image


def _stacked(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    image = Image.new("RGB", (width, sum(block.height + GAP for block in blocks)), PAPER)
    y = 0
    for block in blocks:
        image.paste(block, (0, y))
        y += block.height + GAP
    return image


def _text_block(lines: Sequence[tuple[str, int, str]], width: int) -> Image.Image:
    """Lines of ``(text, size, colour)``."""
    image = Image.new("RGB", (width, sum(round(1.35 * size) for _, size, _ in lines)), PAPER)
    draw = ImageDraw.Draw(image)
    y = 0
    for text, size, colour in lines:
        draw.text((0, y + size), text, colour, _font(size, text), anchor="ls")
        y += round(1.35 * size)
    return image


def _wrap(text: str, size: int, width: int, *, most: int) -> list[str]:
    """Lines no wider than ``width``; the last of at most ``most`` ends in dots if there is more."""
    font = _font(size, text)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width:  # no space to break at: break where the line ends
            cut = next(end for end in range(len(word), 0, -1) if end == 1 or font.getlength(word[:end]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], _shortened(f"{lines[most - 1]} ...", size, width)]
    return lines


def _shortened(text: str, size: int, width: int) -> str:
    font = _font(size, text)
    if font.getlength(text) <= width:
        return text
    end = next(end for end in range(len(text), -1, -1) if not end or font.getlength(text[:end] + "...") <= width)
    return f"{text[:end].rstrip()}..."


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """As large as fits into a square, larger too: a DICOM slice may have 64 pixels."""
    factor = min(side / image.width, side / image.height)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int, text: str) -> Font:
    """Pillow's own font, or of the system's the one that has the most characters of the text; others become boxes."""
    own = _load_font("", size)
    assert own is not None  # Pillow carries it
    if text.isascii():
        return own
    fonts = [own, *(font for name in FONTS if (font := _load_font(name, size)))]
    return max(fonts, key=lambda font: sum(_has_glyph(font, character) for character in set(text)))


@lru_cache(maxsize=64)
def _load_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:  # this system has no such font
        return None


@lru_cache(maxsize=4096)
def _has_glyph(font: Font, character: str) -> bool:
    """Whether the font draws the character as anything but its box for missing ones, as U+10FFFF is in every font."""
    mask, missing = font.getmask(character), font.getmask("\U0010ffff")
    return character.isspace() or mask.size != missing.size or bytes(mask) != bytes(missing)
