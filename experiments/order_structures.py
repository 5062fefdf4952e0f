"""What ordering outputs returns of the accuracy that groups cost.

    python experiments/order_structures.py --data-dir $REGROW_DATA/mnist --out experiments/mnist-ordered

784-304-112-10 on MNIST with the settings of `mnist-structures`. The first steps are RigL's with single entries, at
twice the density. Then hidden neurons are ordered, or not; the groups of largest magnitudes stay, by ERK; and RigL goes
on with these. Finished runs are kept beside the table, so that an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import regrow
from regrow import methods
from regrow.app.data import batches, load, normalize
from regrow.app.machine import versions
from regrow.app.models import build
from regrow.parts import by_score, erk, groups, magnitude

STEPS, BATCH, FIRST = 9370, 64, 1500
UNTIL = STEPS * 3 // 4
DENSITIES, SEEDS = (0.1, 0.05), 3
VARIANTS = {"groups(8)": (8, False), "groups(8), ordered": (8, True)}
"""The size of a group, and whether alike neurons are put side by side first."""


def indices(n: int, seed: int) -> Iterator[Tensor]:
    """The examples of each step, epoch after epoch."""
    return (index for epoch in count() for index in batches(n, BATCH, seed, epoch))


def train(data_dir: Path, density: float, variant: str, seed: int) -> dict[str, Any]:
    """One run: its accuracy on the test set, and what it depends on."""
    torch.set_num_threads(1)
    size, is_ordered = VARIANTS[variant]
    data = load("mnist", data_dir)
    images, begun = normalize(data), time.perf_counter()
    model = build("mlp", (1, 28, 28), 10, hidden=(304, 112), seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    first = methods.rigl(2 * density, until=UNTIL)
    then = methods.rigl(density, until=UNTIL - FIRST, structure=groups(size))
    then = then._replace(start=by_score(density, magnitude, erk))
    sparsifier = regrow.sparsify(model, optimizer, first, seed=seed)
    for step, index in enumerate(islice(indices(len(data.train_y), seed), STEPS)):
        if step == FIRST:
            sparsifier.remove()
            if is_ordered:
                regrow.order_outputs(model, images.train_x[:BATCH], size, optimizer=optimizer)
            sparsifier = regrow.sparsify(model, optimizer, then, seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(images.train_x[index]), data.train_y[index]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = float((model(images.test_x).argmax(1) == data.test_y).double().mean())
    return {
        "variant": variant,
        "density": density,
        "seed": seed,
        "accuracy": accuracy,
        "nnz": sparsifier.nnz,
        "seconds": time.perf_counter() - begun,
        "versions": versions(),
    }


def kept(file: Path, data_dir: Path, density: float, variant: str, seed: int) -> dict[str, Any]:
    """The run, from its file where it is finished."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(train(data_dir, density, variant, seed), indent=1))
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Mean and standard deviation over seeds, a row for each variant."""
    yield "| single entries, then | " + " | ".join(f"{d:.0%}" for d in DENSITIES) + " |"
    yield "|" + " --- |" * (1 + len(DENSITIES))
    for variant in VARIANTS:
        found = [[100 * r["accuracy"] for r in runs if (r["variant"], r["density"]) == (variant, d)] for d in DENSITIES]
        cells = [f"{statistics.fmean(a):.2f} ± {statistics.stdev(a):.2f}" for a in found]
        yield f"| {variant} | " + " | ".join(cells) + " |"


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    chosen = [(d, v, s) for s, d, v in product(range(SEEDS), DENSITIES, VARIANTS)]
    files = [given.out / "runs" / f"{v}-{d:g}-seed{s}.json".replace(", ", "-").replace(" ", "_") for d, v, s in chosen]
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        waiting = [pool.submit(kept, f, given.data_dir, *c) for f, c in zip(files, chosen, strict=True)]
        runs = [w.result() for w in waiting]
    about = runs[0]["versions"]
    command = f"python experiments/order_structures.py --data-dir $REGROW_DATA/mnist --out experiments/{given.out.name}"
    text = (
        f"`{command}`\n\n{STEPS:,} steps each, the first {FIRST:,} with single entries, {SEEDS} seeds; masked storage; "
        f"regrow {about['regrow']}, torch {about['torch']}, {about['processor']}.\n\nAccuracy on the test set in %, "
        "mean and standard deviation over runs.\n\n"
    )
    (given.out / "table.md").write_text(text + "\n".join(table(runs)) + "\n")
    (given.out / "results.json").write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
