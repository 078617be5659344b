"""What a comparison's run took beside the pipelines themselves, and how much sooner one answers than another.

    python -m benchmarks.comparison RUN

reads the folder that ``multimodal compare`` made. Overhead is the wall time of a task less the pipelines' own seconds,
for each answer; it is told only for runs of one question at a time, and where no reading of another pipeline was taken
over.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from multimodal.compare import read_results
from multimodal.compare.store import Store


def main() -> int:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    folder = parser.parse_args().run
    results = read_results(folder)
    groups = [group for group in Store(folder).groups() if "wall" in group and group["answers"]]
    print("| task | pipeline | control | answers | minutes | overhead for each answer | share of the model's time |")
    print("|---|---|---|---|---|---|---|")
    for group in groups:
        over = (group["wall"] - group["model_seconds"]) / group["answers"]
        share = over * group["answers"] / group["model_seconds"]
        print(
            f"| {group['task']} | {group['pipeline']} | {group['control']} | {group['answers']} "
            f"| {group['wall'] / 60:.1f} | {1000 * over:.1f} ms | {share:.1%} |"
        )
    means: dict[tuple[str, str], float] = defaultdict(float)
    for task in results.tasks:
        for pipeline in results.pipelines:
            rows = results.select(task=task, pipeline=pipeline)
            seconds = [row.answer.total for row in rows if row.answer is not None]
            if seconds:
                means[task, pipeline] = statistics.fmean(seconds)
    print("\n| task | pipeline | mean seconds for a question | of native's |\n|---|---|---|---|")
    for (task, pipeline), mean in means.items():
        native = means.get((task, "native"))
        ratio = "" if native is None else f"{mean / native:.1f} x"
        print(f"| {task} | {pipeline} | {mean:.3f} | {ratio} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
