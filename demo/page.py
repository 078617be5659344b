"""The page: its tabs, and what it needs of the server.

What it does not know: how the model is loaded, where the server listens, what happens in a tab.

What always holds: the page asks no host but its own for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from demo.ask_tab import Choice, ask_tab
from demo.asking import Asking
from demo.batch_tab import batch_session, batch_tab
from demo.choose_tab import choose_tab
from demo.choosing import Choosing
from demo.compare_tab import compare_tab
from demo.comparing import Comparing
from demo.shared import session_of
from demo.wording import TEXT
from multimodal.store.feedback import Feedback

CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
QUEUE = 32
MOST_VISITORS = 100  # whose conversations are kept at once
LARGEST_UPLOAD = 512 * 2**20  # bytes: a zip file of pictures; of a picture, `load_image` reads less
# Seconds. Pictures that were shown lie in files of the server until the browser has fetched them.
SWEEP_EVERY, SHOWN_FOR = 300, 1800


def build(
    asking: Asking, feedback: Feedback, *, comparing: Comparing, choosing: Choosing, choices: Sequence[Choice]
) -> gr.Blocks:
    """The page.

    Args:
        asking: Runs the models.
        feedback: Keeps what people say of answers.
        comparing: Asks pipelines made of the first model.
        choosing: Finds and reads comparisons.
        choices: Models and adapters to choose from.
    """
    with gr.Blocks(title="Ask about pictures", delete_cache=(SWEEP_EVERY, SHOWN_FOR), analytics_enabled=False) as page:
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(TEXT("tab_ask"), id="ask"):
                conversation = ask_tab(asking, feedback, choices=choices)
            with gr.Tab(TEXT("tab_compare"), id="compare") as compare:
                compare_tab(comparing, compare, conversation)
            with gr.Tab(TEXT("tab_batch"), id="batch"):
                batch_tab(asking)
            with gr.Tab(TEXT("tab_choose"), id="choose") as choose:
                choose_tab(choosing, choose)

        def leave(request: gr.Request) -> None:
            asking.stop(session_of(request))
            asking.stop(batch_session(request))
            comparing.stop(session_of(request))

        page.unload(leave)
    return page.queue(max_size=QUEUE)


def launch_options() -> dict[str, Any]:
    """What the page needs of ``launch``."""
    return {**looks(), "state_session_capacity": MOST_VISITORS, "share": False, "quiet": True}


def looks() -> dict[str, Any]:
    """What the page needs of whatever serves it: its looks, its limits, and that it keeps nothing."""
    return {
        "theme": gr.themes.Soft(primary_hue="violet", font=["sans-serif"], font_mono=["monospace"]).set(
            body_text_color_subdued="*neutral_600",  # Gradio's own is too faint to read on white
            body_text_color_subdued_dark="*neutral_400",
            button_primary_background_fill="*primary_600",  # so is white on theirs, and their links on black
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_hover_dark="*primary_700",
            link_text_color_dark="*secondary_400",
            link_text_color_visited="*secondary_600",
            link_text_color_visited_dark="*secondary_400",
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_400",
            block_label_background_fill="transparent",
            block_label_background_fill_dark="transparent",
            block_label_text_color="*body_text_color",
            block_label_text_color_dark="*body_text_color",
            block_title_background_fill="transparent",
            block_title_background_fill_dark="transparent",
            block_title_text_color="*body_text_color",
            block_title_text_color_dark="*body_text_color",
            block_title_padding="0",
            block_shadow="none",
            input_border_width="1px",
            input_border_color="*neutral_300",
            checkbox_border_color="*neutral_400",
            checkbox_border_color_dark="*neutral_500",
        ),
        "css": CSS,
        "i18n": TEXT,
        "max_file_size": LARGEST_UPLOAD,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
    }
