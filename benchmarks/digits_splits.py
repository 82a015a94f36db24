"""The digits demo on several splits, to see how much the results vary.

    python benchmarks/digits_splits.py --seeds=3 --runs=runs/splits

Each seed draws its own base pool, training set and test set, and trains its own base
model, generator and classifiers. A split's number is the mean over classifier seeds;
intervals are Student's t over splits. Finished runs are not run again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from scipy import stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=pathlib.Path, default="runs/splits")
    arguments, overrides = parser.parse_known_args()
    metrics = []
    for seed in range(arguments.seeds):
        workdir = arguments.runs / str(seed)
        command = [sys.executable, "-m", "mvc_jax.train"]
        command += ["--config=configs/digits.py", f"--workdir={workdir}"]
        command += [f"--config.seed={seed}", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        path = workdir / "evaluate" / "metrics.json"
        metrics.append(json.loads(path.read_text()))
    print(table(metrics))


def table(metrics: list[dict]) -> str:
    """Two Markdown tables: accuracies by run and split, differences by question."""
    count = len(metrics)
    lines = [
        "| test accuracy, % | " + " | ".join(f"split {i}" for i in range(count)) + " |",
        "|---|" + "---:|" * count,
    ]
    for rows in zip(*(m["runs"] for m in metrics), strict=True):
        cells = [f"{100 * row['accuracy']['mean']:.1f}" for row in rows]
        lines.append(f"| {rows[0]['title']} | {' | '.join(cells)} |")
    lines += ["", "| question | mean difference, points | 95 % interval over splits |"]
    lines.append("|---|---:|---:|")
    for answers in zip(*(m["questions"] for m in metrics), strict=True):
        values = 100 * np.asarray([answer["mean"] for answer in answers])
        low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        question = answers[0]["question"]
        lines.append(
            f"| {question} | {values.mean():+.1f} | {low:+.1f} to {high:+.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
