"""Outgoing connections per pixel, counted from the topologies that runs saved.

    python experiments/count_connections.py RUN [RUN ...] > experiments/mnist-connectivity/connections.md

For every run: the mean over the two outermost rings of pixels, the mean over the central half (14 x 14 of 28 x 28),
their ratio at the start and at the end, and the total, which must be the same to the last connection.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import regrow
from regrow.app import models
from regrow.app.pictures import border_ratio


def final_counts(run: Path) -> np.ndarray:
    """Connections that leave each pixel, (28, 28), from the saved model of a run."""
    settings = json.loads((run / "config.json").read_text())
    model = models.build(settings["model"], (1, 28, 28), 10)
    topologies = regrow.load(run / "model.safetensors", model)
    name = f"{models.vision_input_layer(model)}.weight"
    return topologies[name].mask.sum(0).view(28, 28).numpy()


def row(run: Path) -> str:
    """One line of the table."""
    counts = final_counts(run)
    with np.load(run / "connections.npz") as maps:
        start = maps["counts"][0]
    inner = counts[2:-2, 2:-2]
    ring = (counts.sum() - inner.sum()) / (counts.size - inner.size)
    centre = counts[7:21, 7:21].mean()
    before, after = (float(border_ratio(c[None])[0]) for c in (start, counts))
    accuracy = json.loads((run / "result.json").read_text())["accuracy"]
    return (
        f"| {run.name} | {100 * accuracy:.2f} | {ring:.3f} | {centre:.2f} | {100 * before:.1f} % | {100 * after:.2f} % "
        f"| {int(start.sum()):,} | {int(counts.sum()):,} |"
    )


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    head = "run | test accuracy % | border mean | centre mean | border / centre, start | end | total, start | end"
    print(f"| {head} |\n|" + " --- |" * 8)
    for run in parser.parse_args().runs:
        print(row(run))


if __name__ == "__main__":
    main()
