"""Accuracy against exploration, over the update interval: reads the results of a comparison, draws and tabulates.

Usage: python experiments/draw_exploration.py experiments/itop-exploration
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(folder: Path) -> None:
    """Write `exploration.png` and `exploration.md` beside `results.json`."""
    runs = json.loads((folder / "results.json").read_text())["runs"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        interval = re.search(r"interval-(\d+)", run["run"])
        if interval:
            groups[run["method"], int(interval[1])].append(run)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    lines = ["| method | interval | updates | R_s | accuracy % |", "| --- | --- | --- | --- | --- |"]
    for method in sorted({method for method, _ in groups}):
        points = []
        for interval in sorted(i for m, i in groups if m == method):
            group = groups[method, interval]
            accuracy = [100 * run["accuracy"] for run in group]
            explored = statistics.fmean(run["explored"] for run in group)
            spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
            points.append((interval, explored, statistics.fmean(accuracy), spread))
            row = [method, f"{interval:,}", f"{group[0]['updates']:,}", f"{explored:.3f}"]
            lines.append(f"| {' | '.join(row)} | {points[-1][2]:.2f} ± {spread:.2f} |")
        for axis, column in zip(axes, (0, 1), strict=True):
            x = [point[column] for point in points]
            axis.errorbar(x, [p[2] for p in points], [p[3] for p in points], marker="o", capsize=3, label=method)
    axes[0].set(xscale="log", xlabel="optimizer steps between two updates", ylabel="test accuracy, %")
    axes[1].set(xlabel="R_s: share of connections that ever existed")
    axes[0].legend()
    figure.savefig(folder / "exploration.png", dpi=120)
    (folder / "exploration.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
