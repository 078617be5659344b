"""The command line of what goes beyond one machine: ``multimodal plan``.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_plan(command: Any) -> None:
    """Add ``plan`` to the commands."""
    plan = command("plan", "how many replicas of which kind a traffic takes, and what they cost")
    plan.add_argument("--rate", type=float, required=True, metavar="N", help="questions a second, on average")
    plan.add_argument(
        "--p99", type=float, default=2.0, metavar="SECONDS", help="in which 99 of 100 answers are whole (default: 2)"
    )
    plan.add_argument(
        "--kind",
        action="append",
        default=[],
        type=Path,
        metavar="JSON",
        help="what `python -m benchmarks.service_times` measured of a kind of replica; may be repeated (default: the "
        "embedded model on two cores)",
    )
    plan.add_argument(
        "--questions", type=float, default=3.0, metavar="N", help="about one picture, on average (default: 3)"
    )
    plan.add_argument(
        "--pause",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="between two questions about the same picture, on average (default: 20)",
    )
    plan.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    try:
        from multimodal.cluster.planning import ROUTINGS, Traffic, as_dict, plan, read_measurements, table
    except ImportError as error:  # it says what to install
        raise RuntimeError(str(error)) from None
    traffic = Traffic(rate=options.rate, questions=options.questions, pause=options.pause)
    plans = [
        plan(measured, traffic, p99=options.p99, routing=routing, seed=options.seed)
        for measured in map(read_measurements, options.kind or [None])
        for routing in ROUTINGS
    ]
    if options.json:
        import json

        print(json.dumps([as_dict(made) for made in plans], indent=2))
        return 0
    from rich.console import Console

    Console().print(table(plans))
    return 0
