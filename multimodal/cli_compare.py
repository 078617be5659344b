"""The command line of the comparison: ``multimodal compare``, ``multimodal compare report`` and ``multimodal advise``.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multimodal.arguments import PRECISION_HELP, PRECISIONS, count, names, quiet, share
from multimodal.cli_cluster import add_ray, compare_on_ray


def add_compare(command: Any) -> None:
    """Add ``compare`` and ``compare report`` to the commands."""
    compare = command("compare", "which way of answering is the best: accuracy, latency, cost and memory, side by side")
    compare.add_argument(
        "--tasks",
        type=names,
        metavar="TASK,...",
        help="slake, slake-zh, vqa-rad, grocery, grocery-descriptions, grocery-brands, clothing (in folders of a "
        "--root), NAME:FOLDER, or a .jsonl or .csv file of your own",
    )
    compare.add_argument(
        "--pipelines",
        type=names,
        default=["native", "text_only", "blind"],
        metavar="NAME,...",
        help="native, hybrid, text_only, text_only_tuned, blind, blind_tuned, hosted, or your own as "
        "my_file.py:MyClass (default: native,text_only,blind)",
    )
    compare.add_argument("--output", type=Path, default=Path("comparison"), help="its folder (default: comparison)")
    compare.add_argument("--root", type=Path, default=Path(), help="folder that data sets are in (default: .)")
    compare.add_argument("--split", default="validation", help="which split (default: validation)")
    compare.add_argument("--limit", type=count, help="draw at most so many questions of each task")
    compare.add_argument("--seed", type=int, default=0, help="of the draw and of shuffled pictures (default: 0)")
    compare.add_argument(
        "--concurrency",
        type=count,
        default=1,
        help="questions at a time, of each replica on a cluster; seconds are honest at 1 (default: 1)",
    )
    compare.add_argument(
        "--no-shuffled", dest="shuffled", action="store_false", help="leave out the control with other pictures"
    )
    compare.add_argument("--retry-errors", action="store_true", help="ask again what ended in an error before")
    compare.add_argument("--max-cost", type=float, metavar="DOLLARS", help="stop before the run costs more in all")
    compare.add_argument("--skip-bad", action="store_true", help="leave out broken rows, and list them")
    parts = compare.add_argument_group("what pipelines are made of")
    parts.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    parts.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    parts.add_argument("--adapter", type=Path, metavar="FOLDER", help="of native and hybrid")
    parts.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="PIPELINE=FOLDER",
        help="adapter of text_only_tuned or blind_tuned, from `multimodal train --recipe text_only`; may be repeated",
    )
    parts.add_argument(
        "--endpoint",
        default="local",
        metavar="URL",
        help="of text_only: deepseek, kimi, openai, vllm, ollama or a URL; keys come from the environment or a .env "
        "file (default: local, the model's own decoder)",
    )
    parts.add_argument("--endpoint-model", default="", metavar="NAME", help="what it calls the model")
    parts.add_argument("--hosted", default="local", metavar="URL", help="of hosted, likewise: pictures are sent there")
    parts.add_argument("--hosted-model", default="", metavar="NAME", help="what it calls the model")
    parts.add_argument(
        "--prompt", type=Path, metavar="JINJA", help="of text_only (default: text_only.j2 of the package)"
    )
    parts.add_argument("--ocr", choices=["rapidocr", "tesseract"], default="rapidocr", help="who reads text")
    parts.add_argument("--captioner", default="", metavar="NAME", help="also caption pictures: a folder or hub id")
    parts.add_argument(
        "--judge", default="", metavar="URL", help="endpoint of a language model that judges answers, too"
    )
    parts.add_argument("--judge-model", default="", metavar="NAME", help="what it calls the model")
    parts.add_argument("--assumptions", type=Path, metavar="YAML", help="prices of your own; see docs/choosing.md")
    add_ray(compare, service=False)
    compare.set_defaults(run=_compare)

    report = compare.add_subparsers(metavar="report RUN").add_parser("report", help="write the report of a comparison")
    report.add_argument("comparison", type=Path, metavar="RUN", help="its folder")
    report.add_argument("--output", dest="report", type=Path, metavar="FOLDER", help="for the report (default: RUN)")
    report.set_defaults(run=_report)


def add_advise(command: Any) -> None:
    """Add ``advise`` to the commands."""
    advise = command("advise", "which pipeline to choose, and what it costs over three years")
    advise.add_argument("comparison", type=Path, metavar="RUN", help="folder of a comparison")
    advise.add_argument("--task", help="which of its tasks decides (default: the only one)")
    advise.add_argument("--daily-volume", type=count, default=1000, help="questions a day (default: 1000)")
    advise.add_argument("--memory", type=float, metavar="GIB", help="of one machine, at most")
    advise.add_argument("--latency", type=float, metavar="SECONDS", help="that 99 of 100 answers take, at most")
    advise.add_argument("--concurrency", type=count, default=1, help="people who ask at once (default: 1)")
    advise.add_argument("--min-accuracy", type=share, metavar="SHARE", help="at least, 0 to 1")
    advise.add_argument("--data-stays-here", action="store_true", help="nothing may leave this machine")
    advise.add_argument("--audit", action="store_true", help="every answer must be reproducible later")
    advise.add_argument("--labelled-examples", type=int, default=0, help="how many there are (default: 0)")
    advise.add_argument(
        "--deploy",
        action="append",
        default=[],
        metavar="PIPELINE=PRICE",
        help="reckon as if this pipeline asked an API of this price, such as text_only=deepseek-v4-flash, with the "
        "accuracy that was measured; may be repeated",
    )
    advise.add_argument(
        "--hardware", default="cpu_server", help="kind of machine of the assumptions (default: cpu_server)"
    )
    advise.add_argument("--assumptions", type=Path, metavar="YAML", help="numbers of your own; see docs/choosing.md")
    advise.add_argument("--html", type=Path, metavar="FILE", help="write it as a page with plots, too")
    advise.set_defaults(run=_advise)


def _compare(options: argparse.Namespace) -> int:
    quiet()
    from multimodal.compare import CompareSettings, compare
    from multimodal.compare.assumptions import load_assumptions
    from multimodal.compare.report import write_report
    from multimodal.pipelines import PipelineSettings
    from multimodal.pipelines.endpoint import Price

    if not options.tasks:
        raise ValueError("nothing to compare on: give --tasks, such as --tasks slake --root DATA")
    chosen = _chosen(options, PipelineSettings, leave=("tuned", "prices", "readings", "prompt"))
    prices = {
        name: Price(each.input, each.output) for name, each in load_assumptions(options.assumptions).prices.items()
    }
    made_of = PipelineSettings(
        **chosen,
        **({} if options.prompt is None else {"prompt": options.prompt}),
        tuned={name: Path(folder) for name, folder in _pairs(options.tuned).items()},
        prices=prices,
    )
    settings = CompareSettings(
        **_chosen(options, CompareSettings, leave=("made_of",)),
        made_of=made_of,
    )
    results = compare_on_ray(options, settings) if options.ray else compare(settings)
    for path in write_report(results, settings.output):
        print(f"written: {path}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from multimodal.compare import read_results
    from multimodal.compare.report import write_report

    for path in write_report(read_results(options.comparison), options.report or options.comparison):
        print(f"written: {path}")
    return 0


def _advise(options: argparse.Namespace) -> int:
    from multimodal.compare import read_results
    from multimodal.compare.advice import Constraints
    from multimodal.compare.advise_command import deployments_of, render

    results = read_results(options.comparison)
    constraints = Constraints(
        **{**_chosen(options, Constraints, leave=("memory",)), "memory": _gibibytes(options.memory)}
    )
    given: dict[str, Any] = {
        "deployments": deployments_of(results, hardware=options.hardware, apis=_pairs(options.deploy)),
        "task": options.task,
        "assumptions": options.assumptions,
    }
    print(render(results, constraints, **given))
    if options.html is not None:
        options.html.write_text(render(results, constraints, **given, form="html"), encoding="utf-8")
        print(f"written: {options.html}")
    return 0


def _pairs(given: Sequence[str]) -> dict[str, str]:
    """What stands before and behind the first "=" of each."""
    for pair in given:
        if "=" not in pair:
            raise ValueError(f"{pair!r} is not PIPELINE=VALUE: give a pipeline's name, = and the value")
    return dict(pair.partition("=")[::2] for pair in given)


def _gibibytes(number: float | None) -> int | None:
    return None if number is None else int(number * 2**30)


def _chosen(options: argparse.Namespace, kind: Any, *, leave: Sequence[str]) -> dict[str, Any]:
    """What the command line says of a class's fields."""
    from dataclasses import fields

    names = [entry.name for entry in fields(kind) if entry.name not in leave and hasattr(options, entry.name)]
    return {name: getattr(options, name) for name in names}
