"""The tab "Batch": one question about every picture of a folder or zip file, and a table that fills as it goes.

What it does: lays its parts out and joins them to `batching`.

What it does not know: how answers are made, the other tabs.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from demo.asking import Asking
from demo.batching import Batch, BatchError, Row, run, to_csv, to_jsonl
from demo.explanation import doing
from demo.shared import AT_ONCE, QUICK, asks_nothing, reason, session_of, warn
from demo.wording import TEXT, language_of, say

BETWEEN = 0.3  # seconds between two states of the table, which is sent as a whole
COLUMNS = ("picture", "answer", "confidence", "seconds", "error")


def batch_tab(asking: Asking) -> None:
    """The tab's parts, made where it is to stand.

    Args:
        asking: Runs the model.
    """
    number = gr.Number(0, precision=0, visible=False)  # bound to a batch when it is begun, unlike a State
    gr.HTML(TEXT("batch_header"))
    with gr.Row():
        with gr.Column(scale=5, min_width=300, elem_classes="half"):
            files = gr.File(label=TEXT("batch_files"), file_count="multiple", height=180, elem_id="batch-files")
            folder = gr.UploadButton(TEXT("batch_folder"), file_count="directory", size="sm", elem_id="batch-folder")
        with gr.Column(scale=6, min_width=300, elem_classes="half"):
            prompt = gr.Textbox(
                label=TEXT("batch_question"),
                placeholder=TEXT("batch_hint"),
                max_lines=5,
                max_length=4000,
                elem_id="batch-prompt",
            )
            with gr.Row():
                start = gr.Button(TEXT("batch_start"), variant="primary", elem_id="batch-start")
                cancel = gr.Button(TEXT("batch_cancel"), variant="stop", visible=False, elem_id="batch-cancel")
            status = gr.HTML(elem_id="batch-status")
            gr.HTML(TEXT("notice"))
            with gr.Accordion(TEXT("options"), open=False):
                length = gr.Slider(8, 256, value=64, step=8, label=TEXT("longest"), elem_id="batch-length")
    table = gr.HTML(apply_default_css=False, elem_id="batch-table")
    with gr.Row(visible=False, elem_id="batch-downloads") as downloads:
        as_csv = gr.DownloadButton(TEXT("download_csv"), size="sm", elem_id="batch-csv")
        as_jsonl = gr.DownloadButton(TEXT("download_jsonl"), size="sm", elem_id="batch-jsonl")

    telling = [status, table, downloads, as_csv, as_jsonl, start, cancel]

    def told(said: str, rows: Sequence[Row], language: str, *, running: bool) -> tuple[Any, ...]:
        ended = not running and bool(rows)
        written = (_written(to_csv(rows), "csv"), _written(to_jsonl(rows), "jsonl")) if ended else (None, None)
        return (
            said,
            table_of(rows, language),
            gr.Row(visible=ended),
            *written,
            gr.Button(visible=not running),
            gr.Button(visible=running),
        )

    def begin(paths: list[str] | None, text: str, request: gr.Request) -> tuple[Any, ...]:
        language = language_of(request)
        if not paths:
            warn(say("batch_none", language), title=say("batch_none_title", language))
        if not paths or asks_nothing(text, True, language):
            return 0, *(gr.skip() for _ in telling)  # no batch has this number
        said = doing(say("waiting", language))
        return asking.new_question(batch_session(request)), *told(said, [], language, running=True)

    def tell(
        number: float, paths: list[str], text: str, limit: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        yield tuple(gr.skip() for _ in telling)  # or Gradio would empty all parts when nothing comes of the batch
        language, session, rows, pause = language_of(request), batch_session(request), list[Row](), 0.0
        if not number or asking.has_another(session, int(number)):
            return
        try:
            with Batch([Path(path) for path in paths]) as batch:
                total = len(batch.entries)
                yield told(bar(0, total, say("batch_running", language, done=0, all=total)), [], language, running=True)
                for row in run(asking, session, int(number), batch.entries, text.strip(), max_new_tokens=int(limit)):
                    if row is None:
                        yield told(doing(say("loading", language)), rows, language, running=True)
                        continue
                    rows.append(row)
                    if time.monotonic() < pause:
                        continue
                    pause = time.monotonic() + BETWEEN
                    said = say("batch_running", language, done=len(rows), all=total)
                    yield told(bar(len(rows), total, said), rows, language, running=True)
            errors = sum(bool(row.error) for row in rows)
            ended = "batch_done" if len(rows) == total else "batch_cancelled"
            said = say(ended, language, done=len(rows), all=total, errors=errors)
            yield told(bar(len(rows), total, said), rows, language, running=False)
        except BatchError as error:
            warn(str(error), title=say("batch_refused_title", language))
            yield told("", rows, language, running=False)
        except Exception as error:
            warn(reason(error), title=say("no_answer_title", language))
            yield told("", rows, language, running=False)
        finally:
            if asking.wants(session, int(number)):  # Gradio closes this generator when the asker has gone
                asking.stop(session)

    def stop(request: gr.Request) -> None:
        asking.stop(batch_session(request))  # and `tell` says how far it came

    def take_folder(paths: list[str]) -> list[str]:
        return paths

    begun = gr.on([start.click, prompt.submit], begin, [files, prompt], [number, *telling], **QUICK)
    begun.then(
        tell,
        [number, files, prompt, length],
        telling,
        show_progress="hidden",
        trigger_mode="multiple",
        concurrency_limit=1,
        api_visibility="private",
    )
    cancel.click(stop, None, None, **AT_ONCE)
    folder.upload(take_folder, folder, files, **QUICK)


def bar(done: int, total: int, said: str) -> str:
    """How far a batch is, as HTML."""
    return (
        f'<div class="progress" role="status"><progress max="{total}" value="{done}" aria-label="{escape(said)}">'
        f"</progress><p>{escape(said)}</p></div>"
    )


def table_of(rows: Sequence[Row], language: str = "en") -> str:
    """The rows as HTML; empty without any."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{say(f"column_{name}", language)}</th>' for name in COLUMNS)
    body = "".join(
        f'<tr{" class=failed" if row.error else ""}><th scope="row">{escape(row.picture)}</th>'
        f"<td>{escape(row.answer)}</td><td>{_percent(row.confidence)}</td><td>{_seconds(row.seconds)}</td>"
        f"<td>{escape(row.error)}</td></tr>"
        for row in rows
    )
    return (
        f'<div class="rows" tabindex="0" role="region" aria-label="{say("batch_table", language)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def batch_session(request: gr.Request) -> str:
    """A batch goes on while its asker asks something else in another tab."""
    return f"{session_of(request)} batch"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def _written(text: str, ending: str) -> str:
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    path = folder / f"answers.{ending}"
    path.write_text(text, encoding="utf-8-sig" if ending == "csv" else "utf-8")  # or spreadsheets take it for Latin-1
    return str(path)
