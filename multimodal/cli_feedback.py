"""The command line of what people said of answers: ``multimodal feedback export``.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any


def add_feedback(command: Any) -> None:
    """Add ``feedback export`` to the commands."""
    feedback = command("feedback", "what people said of answers in the demo, to train on")
    actions = feedback.add_subparsers(title="actions", required=True, metavar="ACTION")
    about = "write corrected and liked answers as rows that train and adapt read"
    export = actions.add_parser("export", help=about, description=f"{about[0].upper()}{about[1:]}.")
    export.add_argument("output", type=Path, metavar="OUT.jsonl", help="the file, which is written anew")
    export.add_argument(
        "--preferences",
        action="store_true",
        help="instead, pairs of a better and a worse answer (prompt, chosen, rejected), for preference optimisation",
    )
    export.add_argument(
        "--folder",
        type=Path,
        metavar="FOLDER",
        help="where the demo kept it, its --feedback (default: ~/.local/share/multimodal)",
    )
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    try:
        from multimodal.store import StoreError
        from multimodal.store.feedback import FILE, Feedback, data_folder
    except ModuleNotFoundError as error:
        raise RuntimeError(f"this needs {error.name}, which is not installed: pip install 'multimodal[demo]'") from None

    folder = options.folder or data_folder()
    if not (folder / FILE).is_file():
        raise StoreError(f"{folder}: there is no {FILE}. Give feedback in the demo first, or name its --folder")
    feedback = Feedback(folder)
    done = (feedback.export_preferences if options.preferences else feedback.export)(options.output)
    print(f"{done.written:,} rows written to {options.output}")
    for reason, many in done.left_out.items():
        print(f"  left out: {many:,} {reason}")
    if done.written and not options.preferences:
        print(f"to learn from them:\n  multimodal adapt {shlex.quote(str(options.output))} --output FOLDER")
    return 0
