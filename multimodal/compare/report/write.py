"""Writes the four files of a report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from multimodal.compare.report import svg
from multimodal.compare.report.markdown import EMPTY, NOT_MEDICAL, markdown
from multimodal.compare.report.pictures import Album
from multimodal.compare.report.plots import plots
from multimodal.compare.report.questions import Book, embedded
from multimodal.compare.report.redaction import setting, without_secrets
from multimodal.compare.report.spreadsheets import write_answers, write_figures
from multimodal.compare.report.tables import errors_table, main_table, paired_table, steps_table
from multimodal.compare.report.verdicts import BRACKETS, Verdict, verdicts
from multimodal.compare.results import Results
from multimodal.compare.summary import Figures, Pair, pairs_by_kind, pairs_of, summarise

HERE = Path(__file__).parent


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``figures.csv`` and ``answers.csv``.

    Args:
        results: A finished or unfinished run.
        folder: Where they go; made if it is missing.

    Returns:
        The four files, the page first.

    Raises:
        OSError: If they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, text, figures_file, answers_file = (
        folder / name for name in ("report.html", "report.md", "figures.csv", "answers.csv")
    )
    figures, pairs = summarise(results), pairs_of(results)
    _save(page, html(results, figures, pairs))
    _save(text, markdown(results, figures, pairs))
    write_figures(figures_file, figures)
    write_answers(answers_file, results)
    return [page, text, figures_file, answers_file]


def html(results: Results, figures: Sequence[Figures], pairs: Sequence[Pair], album: Album | None = None) -> str:
    """The page.

    Args:
        results: The run.
        figures: What ``summarise`` gives for it.
        pairs: What ``pairs_of`` gives for it.
        album: Takes the pictures; by default a new one.
    """
    album = album or Album()
    book = Book(results, album).value()  # fills the album
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("template.html.j2").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The only script that a browser will run on this page; nothing may be loaded from anywhere.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        data=Markup(embedded(book)),
        tasks=[_task(results, verdict, figures, pairs) for verdict in verdicts(results, figures, pairs)],
        errors=errors_table(results),
        pipelines=[(svg.key(number), name) for number, name in enumerate(results.pipelines)],
        questions=len(book["questions"]),
        left_out=album.left_out,
        command=without_secrets(results.command).strip() or "(the command was not noted)",
        machine=[(name, without_secrets(str(value))) for name, value in results.machine.items()],
        settings=[(name, setting(name, value)) for name, value in results.settings.items()],
        not_medical=NOT_MEDICAL,
        brackets=BRACKETS,
        empty="" if results.rows else EMPTY,
    )


def _task(results: Results, verdict: Verdict, figures: Sequence[Figures], pairs: Sequence[Pair]) -> dict[str, Any]:
    mine = [each for each in figures if each.task == verdict.task]
    two = [pair for pair in pairs if pair.task == verdict.task]
    by_kind = [pair for pair in pairs_by_kind(results) if pair.task == verdict.task]
    return {
        "name": verdict.task,
        "verdict": verdict,
        "main": main_table(verdict.task, mine) if mine else None,
        "paired": paired_table(verdict.task, results.metric[verdict.task], two),
        "kinds": paired_table(verdict.task, results.metric[verdict.task], by_kind),
        "plots": plots(results, verdict.task, mine),
        "steps": steps_table(verdict.task, mine),
    }


def _save(path: Path, text: str) -> None:
    # A model may write half of a surrogate pair, which no file can hold. Line ends must stay: the script is hashed.
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(text)
