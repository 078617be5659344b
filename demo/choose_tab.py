"""The tab "Choose": a comparison that was run, what to choose by it under one's own limits, and its report.

What it does: lays its parts out and joins them to `Choosing`. Nothing is read before the tab is opened.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from demo.choosing import Choosing, ChoosingError, Wishes, framed, told
from demo.shared import QUICK, reason
from demo.wording import TEXT


def choose_tab(choosing: Choosing, tab: gr.Tab) -> None:
    """The tab's parts, made where it is to stand.

    Args:
        choosing: Finds and reads comparisons.
        tab: The tab.
    """
    gr.HTML(TEXT("choose_header"))
    with gr.Row(elem_id="wishes"):
        with gr.Column(min_width=260):
            folder = gr.Dropdown(
                [],
                label=TEXT("comparison"),
                info=TEXT("latest_or_path" if choosing.anywhere else "latest_first"),
                allow_custom_value=choosing.anywhere,
                elem_id="comparison",
            )
            here = gr.Checkbox(label=TEXT("here"), elem_id="here")
        with gr.Column(min_width=260):
            volume = gr.Slider(
                0, 200_000, value=1000, step=100, label=TEXT("volume"), info=TEXT("volume_about"), elem_id="volume"
            )
            labelled = gr.Slider(
                0,
                10_000,
                value=0,
                step=50,
                label=TEXT("labelled"),
                info=TEXT("labelled_about"),
                elem_id="labelled",
            )
        with gr.Column(min_width=260):
            latency = gr.Slider(
                0, 60, value=0, step=0.5, label=TEXT("latency"), info=TEXT("latency_about"), elem_id="latency"
            )
            memory = gr.Slider(
                0, 64, value=0, step=0.5, label=TEXT("memory_limit"), info=TEXT("memory_limit_about"), elem_id="memory"
            )
    advice = gr.HTML(apply_default_css=False, elem_id="advice")
    gr.HTML(TEXT("report"))
    report = gr.HTML(apply_default_css=False, elem_id="report")
    wishes = [volume, latency, memory, here, labelled]

    def advise(said: str | None, *wished: Any) -> str:
        try:
            return choosing.advice(said or "", _wishes(*wished))
        except Exception as error:
            return told(_why(error))

    def show(said: str | None) -> str:
        try:
            return framed(choosing.report(said or ""))
        except Exception as error:
            return told(_why(error))

    def arrive(said: str | None, *wished: Any) -> tuple[Any, ...]:
        found = choosing.found()
        said = said or next(iter(found), "")
        return gr.Dropdown(found, value=said or None), advise(said, *wished), show(said)

    def both(said: str | None, *wished: Any) -> tuple[str, str]:
        return advise(said, *wished), show(said)

    # One at a time: drawings are made with settings that count for the whole process.
    alone = {**QUICK, "concurrency_limit": 1, "concurrency_id": "advice", "show_progress": "minimal"}
    tab.select(arrive, [folder, *wishes], [folder, advice, report], **alone)
    folder.input(both, [folder, *wishes], [advice, report], **alone)
    gr.on([part.change for part in wishes], advise, [folder, *wishes], advice, trigger_mode="always_last", **alone)


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, ChoosingError) else reason(error)


def _wishes(volume: float, latency: float, memory: float, here: bool, labelled: float) -> Wishes:
    """As a slider's number box may be empty, nothing is 0."""
    return Wishes(volume or 0, latency or 0, memory or 0, here, labelled or 0)
