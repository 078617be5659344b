"""What the page says of an answer: its figures, and its words as buttons under bars.

What it does: turns an `Answer` into HTML. What it does not know: Gradio, events, the model.

What always holds: everything that a model or a person wrote is escaped. Gradio puts the value of `gr.HTML` into the
page as it is; its Handlebars form (`{{value}}`) would even run what looks like JavaScript in it, and is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from multimodal.drawing import Word, gate_scale

if TYPE_CHECKING:
    from multimodal.model import Answer

# Listens on the whole list, since its buttons come and go with every answer. The pressed button is marked here and not
# by a new list from the server, which would take the focus from the keyboard.
ON_LOAD = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-word]');
  if (!button) return;
  element.querySelectorAll('button[data-word]').forEach(other => other.setAttribute('aria-pressed', other === button));
  trigger('click', {word: Number(button.dataset.word)});
});
"""
WHOLE_ANSWER = -1


def doing(text: str) -> str:
    """What is going on, as HTML."""
    return f'<p class="doing" role="status">{escape(text)}</p>' if text else ""


def figures(answer: Answer) -> str:
    """Confidence, times and tokens, as HTML."""
    timings, usage = answer.timings, answer.usage
    facts = [
        ("Confidence", f"{100 * answer.confidence:.0f} %"),
        ("First word after", f"{timings.first_token:.1f} s"),
        ("Answer after", f"{timings.total:.1f} s"),
        ("Tokens read", f"{usage.prompt_tokens}"),
        ("Tokens written", f"{usage.completion_tokens}"),
    ]
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    end = "" if answer.finished else " The answer was cut short: stopped, or at its length limit."
    return (
        f'<dl class="figures">{rows}</dl>'
        '<p class="caption">Confidence is the chance that the whole answer is right, as the model estimates it. On '
        f"pictures unlike those that it was trained on, it can be far off.{end}</p>"
    )


def unsure_notice(answer: Answer) -> str:
    """That the model is not sure of its answer, as HTML; empty if it is."""
    if not answer.unsure:
        return ""
    chance = f"about {100 * answer.confidence:.0f} %" if answer.confidence >= 0.01 else "less than 1 %"
    return (
        '<p class="notice" role="status"><strong>The model is not sure.</strong> '
        f"By its own estimate, the chance that the whole answer is right is {chance}.</p>"
    )


def word_buttons(words: Sequence[Word]) -> str:
    """The answer's words, each under a bar of how far its gates stood open, as HTML; the whole answer comes first."""
    scale = gate_scale(words)
    digits = 3 if scale < 0.1 else 2
    buttons = "".join(
        f'<button type="button" data-word="{index}" aria-pressed="false" '
        f'aria-label="{escape(word.text)}, gates open {word.openness:.{digits}f}">'
        f'<small>{word.openness:.{digits}f}</small><span class="bar"><i style="height:'
        f'{100 * word.openness / scale:.1f}%"></i></span><span class="word">{escape(word.text)}</span></button>'
        for index, word in enumerate(words)
    )
    return (
        '<div class="words"><p class="caption">Choose a word to see where the model looked for it. '
        f"Bars: how much picture went into the word, as the mean openness of its gates; they end at {scale:g}, and a "
        f"gate that is fully open has 1.</p>"
        f'<button type="button" class="all" data-word="{WHOLE_ANSWER}" aria-pressed="true">Whole answer</button>'
        f'<div class="list">{buttons}</div></div>'
    )


def heat_legend(most: float, top: float) -> str:
    """What the colours of the attention picture mean, as HTML."""
    if not most:
        return '<p class="caption">No heat: the gates are shut, the model did not look at the picture.</p>'
    return (
        '<div class="heat"><span>an even share<br>of attention or less</span><i></i>'
        f"<span>{top:.1f} times<br>an even share</span></div>"
        f'<p class="caption">The most in this picture is {most:.1f} times an even share.</p>'
    )
