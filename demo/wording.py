"""What the page says, in English and Chinese: `words/en.toml` and `words/zh.toml`.

Text that stands on the page from the start is a key of :data:`TEXT`, which the browser translates (Gradio's ``I18n``);
what an event says is chosen here, by the language that the asker's browser prefers.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import gradio as gr

WORDS = {
    file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in Path(__file__).parent.glob("words/*.toml")
}
# Gradio looks a language up by the whole name that the browser gives it.
TEXT = gr.I18n(**WORDS, **{"zh-CN": WORDS["zh"]})


def say(key: str, language: str = "en", **values: Any) -> str:
    """A sentence in a language of :func:`language_of`; values are put in for what stands in braces."""
    return WORDS[language][key].format(**values)


def language_of(request: gr.Request) -> str:
    """``"zh"`` where the browser prefers Chinese, else ``"en"``."""
    return "zh" if request.headers.get("accept-language", "").strip().lower().startswith("zh") else "en"
