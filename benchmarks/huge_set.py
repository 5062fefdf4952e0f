"""Train one layer of 1,000,000 x 1,000,000 with 10 connections per row by SET, and check every update.

    python benchmarks/huge_set.py

Dense, its weight alone would take 4 TB.
"""

from __future__ import annotations

import numpy as np
import torch
from huge import Before, Task, Watch, among, held_out, kept_by_brute_force, peak_bytes, require, train
from torch import nn

import regrow
from regrow import methods
from regrow.core.draws import Stream
from regrow.parts.allocation import uniform

N, PER_ROW, LATENT = 1_000_000, 10, 4
STEPS, INTERVAL, UNTIL, BATCH = 200, 60, 180, 16
FRACTION, SEED, HELD_OUT = 0.1, 0, 7


def main() -> None:
    """Train, checking every update."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    task = Task.draw(N, N, LATENT, generator)
    with torch.device("meta"):
        layer = nn.Linear(N, N, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01 * N, momentum=0.9)
    watch = Watch(layer, optimizer)
    method = methods.set_(PER_ROW / N, until=UNTIL, interval=INTERVAL, fraction=FRACTION, allocate=uniform)
    sparsifier = regrow.sparsify(layer, optimizer, method, storage="compressed", init="fan_in", seed=SEED)
    print(sparsifier)
    first = held_out(layer, task, HELD_OUT, BATCH)
    updates = 0
    for before in train(watch, optimizer, sparsifier, task, STEPS, BATCH, generator):
        check(before, sparsifier.topologies["weight"])
        updates += 1
    last = held_out(layer, task, HELD_OUT, BATCH)
    require(f"{updates} updates, at least 2", updates >= 2)
    require(f"held-out loss {first:.4f} -> {last:.4f}, at most half", last <= first / 2)
    require(f"{sparsifier.nnz:,} connections, as many as at first", sparsifier.nnz == PER_ROW * N)
    require(f"peak resident memory {peak_bytes() / 1e9:.2f} GB, under 3 GB", peak_bytes() < 3e9)


def check(before: Before, after: regrow.Topology) -> None:
    """The smallest magnitudes go, and the draws of the weight's own stream, counted among the free places, come."""
    kept, now = kept_by_brute_force(before, FRACTION), after.indices.numpy()
    require(f"all {len(kept):,} connections with the largest magnitudes stay", among(kept, now).all())
    grown = now[~among(now, kept)]
    ranks = grown - np.searchsorted(kept, grown)
    drawn = Stream(SEED, "weight", before.step).subset(N * N - len(kept), len(grown))
    require(
        f"the {len(grown):,} grown ones are those drawn among the {N * N - len(kept):,} free places",
        np.array_equal(ranks, drawn),
    )


if __name__ == "__main__":
    main()
