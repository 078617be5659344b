"""What the page says of an answer: its figures, its words as buttons under bars, and attention over its pictures.

What it does: turns an `Answer` into HTML and pictures. What it does not know: events, the model.

What always holds: everything that a model or a person wrote is escaped. Gradio puts the value of `gr.HTML` into the
page as it is; its Handlebars form (`{{value}}`) would even run what looks like JavaScript in it, and is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from demo.conversation import Turn
from demo.shared import SHOWN_SIDE, fitted
from demo.wording import say
from multimodal.drawing import Word, answer_words, attention_maps, attention_overlay, gate_scale, heat_top

if TYPE_CHECKING:
    from multimodal.answer import Answer

# Listens on the whole list, since its buttons come and go with every answer. A word is chosen by pointing at it, by
# the keyboard reaching it, or by a touch. The chosen one is marked here and not by a new list from the server, which
# would take the focus from the keyboard; the server is told when the pointer rests.
ON_LOAD = """
let waiting, chosen;
const choose = event => {
  const button = event.target.closest('button[data-word]');
  if (!button || button === chosen) return;
  chosen = button;
  element.querySelectorAll('button[data-word]').forEach(other => other.setAttribute('aria-pressed', other === button));
  clearTimeout(waiting);
  waiting = setTimeout(() => trigger('click', {word: Number(button.dataset.word)}), 120);
};
['click', 'pointerover', 'focusin'].forEach(kind => element.addEventListener(kind, choose));
"""
WHOLE_ANSWER = -1


GAP = 8  # pixels between pictures


def doing(text: str) -> str:
    """What is going on, as HTML."""
    return f'<p class="doing" role="status">{escape(text)}</p>' if text else ""


def figures(answer: Answer, language: str = "en") -> str:
    """Confidence, times and tokens, as HTML."""
    timings, usage = answer.timings, answer.usage
    facts = [
        ("figure_confidence", f"{100 * answer.confidence:.0f} %"),
        ("figure_first", f"{timings.first_token:.1f} s"),
        ("figure_total", f"{timings.total:.1f} s"),
        ("figure_read", f"{usage.prompt_tokens}"),
        ("figure_written", f"{usage.completion_tokens}"),
    ]
    rows = "".join(f"<div><dt>{say(name, language)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    end = "" if answer.finished else f" {say('cut_short', language)}"
    return f'<dl class="figures">{rows}</dl><p class="caption">{say("about_confidence", language)}{end}</p>'


def unsure_notice(answer: Answer, language: str = "en") -> str:
    """That the model is not sure of its answer, as HTML; empty if it is."""
    if not answer.unsure:
        return ""
    percent = 100 * answer.confidence
    chance = say("about_percent", language, percent=percent) if percent >= 1 else say("below_percent", language)
    return f'<p class="notice" role="status">{say("not_sure", language, chance=chance)}</p>'


def word_buttons(words: Sequence[Word], language: str = "en") -> str:
    """The answer's words, each under a bar of how far its gates stood open, as HTML; the whole answer comes first."""
    scale = gate_scale(words)
    digits = 3 if scale < 0.1 else 2
    buttons = "".join(_word_button(index, word, scale, digits, language) for index, word in enumerate(words))
    return (
        f'<div class="words"><p class="caption">{say("about_words", language, scale=scale)}</p>'
        f'<button type="button" class="all" data-word="{WHOLE_ANSWER}" aria-pressed="true">'
        f'{say("whole_answer", language)}</button><div class="list">{buttons}</div></div>'
    )


def _word_button(index: int, word: Word, scale: float, digits: int, language: str) -> str:
    openness = f"{word.openness:.{digits}f}"
    return (
        f'<button type="button" data-word="{index}" aria-pressed="false" '
        f'aria-label="{escape(say("gates_open", language, word=word.text, openness=openness))}">'
        f'<small>{openness}</small><span class="bar"><i style="height:{100 * word.openness / scale:.1f}%"></i></span>'
        f'<span class="word">{escape(word.text)}</span></button>'
    )


def heat_legend(most: float, top: float, language: str = "en") -> str:
    """What the colours of the attention picture mean, as HTML."""
    if not most:
        return f'<p class="caption">{say("no_heat", language)}</p>'
    return (
        f'<div class="heat"><span>{say("even_share", language)}</span><i></i>'
        f"<span>{say('times_share', language, top=top)}</span></div>"
        f'<p class="caption">{say("most_heat", language, most=most)}</p>'
    )


def attention_picture(turn: Turn, index: int, language: str = "en") -> tuple[Image.Image, str]:
    """The pictures of an answer with the attention to them while a word was written, and the legend.

    Args:
        turn: Its answer has a trace.
        index: Of the word; any other number takes the whole answer.
        language: Of the legend.
    """
    assert turn.answer is not None
    words = answer_words(turn.answer)
    heat = attention_maps(turn.answer, words[index] if 0 <= index < len(words) else None)
    top = heat_top(heat)
    side = SHOWN_SIDE if len(turn.seen) == 1 else SHOWN_SIDE // 2
    drawn = [
        attention_overlay(fitted(picture, side), map_, top=top) for picture, map_ in zip(turn.seen, heat, strict=True)
    ]
    return _side_by_side(drawn), heat_legend(float(heat.max()), top, language)


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Two in a row, in order; a single one is left as it is."""
    if len(pictures) == 1:
        return pictures[0]
    rows = [pictures[start : start + 2] for start in range(0, len(pictures), 2)]
    width = max(sum(picture.width + GAP for picture in row) - GAP for row in rows)
    height = sum(max(picture.height for picture in row) + GAP for row in rows) - GAP
    sheet = Image.new("RGBA", (width, height))  # see-through, for light and dark pages
    y = 0
    for row in rows:
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + GAP
        y += max(picture.height for picture in row) + GAP
    return sheet
