"""The command line of what goes beyond one machine: ``multimodal batch``, ``--ray``, ``migrate`` and ``plan``.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.arguments import PRECISION_HELP, PRECISIONS, count, quiet
from multimodal.presets import PRESETS

if TYPE_CHECKING:
    from multimodal.compare import CompareSettings, Results


def add_batch(command: Any) -> None:
    """Add ``batch`` to the commands."""
    batch = command("batch", "ask about many pictures, on one machine or many; the same command goes on after a kill")
    batch.add_argument(
        "source", type=Path, metavar="IN", help="a folder of pictures, or .parquet, .jsonl or .tar (WebDataset) files"
    )
    batch.add_argument("output", type=Path, metavar="OUT", help="folder for Parquet files with the answers")
    batch.add_argument("--prompt", help="asked about each picture that has no question of its own")
    batch.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    batch.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    batch.add_argument("--max-new-tokens", type=count, default=128, help="length limit of an answer (default: 128)")
    batch.add_argument("--rows", type=count, default=256, help="in a shard, and so in a file (default: 256)")
    batch.add_argument("--replicas", type=count, default=1, help="how many models answer, at most (default: 1)")
    add_resources(batch)
    batch.set_defaults(run=_batch)


def add_ray(command: argparse.ArgumentParser, *, service: bool) -> None:
    """Add what is said of a cluster to ``serve`` or ``compare``.

    Args:
        command: The one.
        service: Whether it lasts, so that replicas may follow the load, and be replaced.
    """
    cluster = command.add_argument_group("a cluster")
    cluster.add_argument(
        "--ray", action="store_true", help="answer on Ray: on the cluster that RAY_ADDRESS names, else on this machine"
    )
    cluster.add_argument(
        "--replicas",
        type=_replicas if service else count,
        default=1,
        metavar="N",
        help=f"how many models answer{'; auto for as many as waiting requests need' if service else ''} (default: 1)",
    )
    add_resources(cluster)
    if service:
        cluster.add_argument(
            "--update",
            action="store_true",
            help="replace what the cluster's service serves by what this command says, replica by replica, and return",
        )


def _replicas(text: str) -> int | str:
    """A whole number from 1, or ``"auto"``."""
    try:
        return text if text == "auto" else count(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of replicas nor auto") from None


def add_resources(command: argparse._ActionsContainer) -> None:
    """Options of every command that puts models on a cluster."""
    command.add_argument("--num-cpus", type=float, default=1, metavar="N", help="cores of a replica (default: 1)")
    command.add_argument(
        "--num-gpus", type=float, default=0, metavar="N", help="GPUs of a replica, or a share of one (default: 0)"
    )


def add_migrate(command: Any) -> None:
    """Add ``migrate`` to the commands."""
    migrate = command("migrate", "bring the tables of a database to what this version needs; before it is served with")
    migrate.add_argument("database", help="an SQLite file, or a URL such as postgresql+psycopg://HOST/NAME")
    migrate.set_defaults(run=_migrate)


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


def serve_on_ray(options: argparse.Namespace, limits: Mapping[str, Any]) -> int:
    """Run ``serve --ray``.

    Args:
        options: Of ``serve``.
        limits: Fields of :class:`~multimodal.service.ServiceSettings`.
    """
    if options.log is not None or options.audit is not None:
        raise ValueError("--log and --audit are files of one process: with --ray, Ray's own logs say what happened")
    try:
        from multimodal.cluster import serving
    except ImportError as error:  # it says what to install
        raise RuntimeError(str(error)) from None
    settings = serving.ServingSettings(
        model=_model_everywhere(options.model),
        name=options.name,
        adapters=[str(folder.resolve()) for folder in options.adapter],
        precision=options.precision,
        replicas=options.replicas,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        store=_store_everywhere(options.store),
        limits=dict(limits),
    )
    if options.update:
        serving.update_on_ray(settings)
    else:
        serving.serve_on_ray(settings, host=options.host, port=options.port)
    return 0


def compare_on_ray(options: argparse.Namespace, settings: CompareSettings) -> Results:
    """Run ``compare --ray``."""
    from multimodal.cluster import comparing

    resources = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    try:
        return comparing.compare_on_ray(settings, replicas=options.replicas, **resources)
    except ImportError as error:  # it says what to install
        raise RuntimeError(str(error)) from None


def _model_everywhere(model: str) -> str:
    """A model's folder by its whole path: replicas have working directories of their own."""
    return str(Path(model).resolve()) if model not in PRESETS and Path(model).is_dir() else model


def _store_everywhere(store: str | None) -> str | None:
    """A store's file, likewise."""
    return store if store is None or "://" in store else str(Path(store).resolve())


def _batch(options: argparse.Namespace) -> int:
    quiet()
    from dataclasses import fields

    from multimodal.cluster.batch import BatchSettings, run_batch

    given = {entry.name: getattr(options, entry.name) for entry in fields(BatchSettings)}
    settings = BatchSettings(**{**given, "source": str(options.source.resolve())})
    try:
        done = run_batch(
            settings,
            options.output,
            replicas=options.replicas,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            say=lambda line: print(line, flush=True),
        )
    except ImportError as error:  # it says what to install
        raise RuntimeError(str(error)) from None
    before = f"; {done.skipped} were there" if done.skipped else ""
    print(f"written: {options.output} ({done.shards} shards, {done.rows} rows, {done.errors} with an error{before})")
    return 0


def _migrate(options: argparse.Namespace) -> int:
    try:
        from multimodal.store.migrate import migrate
    except ImportError as error:  # it says what to install
        raise RuntimeError(str(error)) from None
    revision = migrate(options.database)
    print(f"migrated: revision {revision}" if revision else "migrated: there are no revisions yet")
    return 0


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
