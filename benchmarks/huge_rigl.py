"""Train one layer of 65,536 x 65,536 at density 0.1 % by RigL, and check what was grown against brute force.

    python benchmarks/huge_rigl.py

Dense, its weight, gradient and momentum would take 51 GB.
"""

from __future__ import annotations

import numpy as np
import torch
from huge import Before, Task, Watch, among, held_out, kept_by_brute_force, peak_bytes, require, train
from torch import nn

import regrow
from regrow import methods
from regrow.parts.allocation import uniform

N, DENSITY, LATENT = 65_536, 0.001, 128
STEPS, INTERVAL, UNTIL, BATCH = 200, 60, 180, 64
FRACTION, ROWS, HELD_OUT = 0.3, 50, 7


def main() -> None:
    """Train, checking every update."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    task = Task.draw(N, N, LATENT, generator)
    with torch.device("meta"):
        layer = nn.Linear(N, N, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.003 * N, momentum=0.9)
    watch = Watch(layer, optimizer)
    method = methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, fraction=FRACTION, allocate=uniform)
    sparsifier = regrow.sparsify(layer, optimizer, method, storage="compressed", init="fan_in")
    print(sparsifier)
    first = held_out(layer, task, HELD_OUT, BATCH)
    updates = 0
    for before in train(watch, optimizer, sparsifier, task, STEPS, BATCH, generator):
        check(before, sparsifier.topologies["weight"])
        updates += 1
    last = held_out(layer, task, HELD_OUT, BATCH)
    require(f"{updates} updates, at least 2", updates >= 2)
    require(f"held-out loss {first:.4f} -> {last:.4f}, at most half", last <= first / 2)
    require(f"{sparsifier.nnz:,} connections, as many as at first", sparsifier.nnz == round(DENSITY * N * N))
    require(f"peak resident memory {peak_bytes() / 1e9:.2f} GB, under 2 GB", peak_bytes() < 2e9)


def check(before: Before, after: regrow.Topology) -> None:
    """Compare 50 random rows with their dense gradient: grown is what exceeds the threshold, and nothing else."""
    fraction = FRACTION * (1 + np.cos(np.pi * before.step / UNTIL)) / 2
    kept, now = kept_by_brute_force(before, fraction), after.indices.numpy()
    require(f"all {len(kept):,} connections with the largest magnitudes stay", among(kept, now).all())
    grown = now[~among(now, kept)]
    x, dy = before.x.double(), before.dy.double()
    threshold = np.inf
    for part in np.array_split(grown, 1 + len(grown) // 10_000):
        sizes = (x[:, part % N] * dy[:, part // N]).sum(0).abs()
        threshold = min(threshold, float(sizes.min()))
    rows = np.sort(np.random.default_rng(before.step).choice(N, ROWS, replace=False))
    wrong = close = expected = 0
    for row in rows:
        gradient = (dy[:, row] @ x).abs().numpy()
        gradient[kept[(kept >= row * N) & (kept < (row + 1) * N)] - row * N] = 0
        here = np.zeros(N, dtype=bool)
        here[grown[(grown >= row * N) & (grown < (row + 1) * N)] - row * N] = True
        doubtful = np.abs(gradient - threshold) <= 1e-5 * threshold
        expected += int(here.sum())
        close += int(doubtful.sum())
        wrong += int(((gradient > threshold) != here)[~doubtful].sum())
    require(
        f"{ROWS} random rows: their {expected:,} grown connections are those whose gradient exceeds the global "
        f"threshold {threshold:.3g} ({wrong} differ; {close} lie within 1e-5 of it)",
        wrong == 0 and expected > 0,
    )


if __name__ == "__main__":
    main()
