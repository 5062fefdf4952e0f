"""A training step of a 4096 x 4096 linear layer whose weight is made of units: over dense, and over single entries.

    python benchmarks/units.py [--save] [--return-memory] [--batches 128,512] [--densities 0.1,0.05,0.02,0.01]
                               [--units 2x1,4x1,8x1,16x1,8x8,16x16] [--rounds 9]

A unit of g x k is g consecutive outputs and k consecutive inputs, all active or none; 1 x 1 is single entries. Layers
are made by `sparsify`, compressed. A step is the forward product and both gradients, through autograd. Inputs,
outputs and their gradients are batch-major: (batch, features), contiguous. GFLOP/s count the products with active
entries only. Candidates that compute something else than a float64 reference are reported instead of timed.
"""

from __future__ import annotations

from functools import partial

import click
import timing
import torch
from linear import DENSE, SIZE, unit_answers
from timing import Candidate, Operation
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow import methods
from regrow.core.method import Units
from regrow.parts import blocks


class Compressed(nn.Module):
    """y = x W^T as `sparsify` makes it, with a share of the units of W active, at random places.

    Args:
        structure: what is active or inactive together; None is every entry by itself.
        density: share of active entries.
    """

    def __init__(self, structure: Units | None, density: float) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE, bias=False)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        method = methods.static(density, structure=structure)
        self.sparsifier = regrow.sparsify(self, optimizer, method, storage="compressed")

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        y: Tensor = self.layer(x)
        return y


def parse(units: str) -> dict[str, Units]:
    """Units by name, from "8x1,16x16"."""
    pairs = [unit.split("x") for unit in units.split(",")]
    return {f"{g} x {k}": blocks(int(g), int(k)) for g, k in pairs}


@click.command(help=__doc__)
@click.option("--batches", default="128,512", show_default=True, help="Batch sizes.")
@click.option("--densities", default="0.1,0.05,0.02,0.01", show_default=True, help="Shares of active units.")
@click.option("--units", default="2x1,4x1,8x1,16x1,8x8,16x16", show_default=True, help="Outputs x inputs of units.")
@timing.ROUNDS
@timing.options
def main(batches: str, densities: str, units: str, rounds: int, save: bool, keep_memory: bool) -> None:
    """Measure, print and perhaps save."""
    kept = keep_memory and timing.keep_memory()
    pairs = {batch: (torch.randn(batch, SIZE), torch.randn(batch, SIZE)) for batch in map(int, batches.split(","))}
    operation = Operation(F.linear, unit_answers)
    dense = {name: DENSE[name] for name in ("oneDNN", "bfloat16")}
    structures: dict[str, Units | None] = {"1 x 1": None, **parse(units)}
    sparse = {name: Candidate(partial(Compressed, units)) for name, units in structures.items()}
    reference, notes = timing.prepare(dense, [1.0], operation, [*pairs.values()])
    tables = []
    for density in map(float, densities.split(",")):
        layers, wrong = timing.prepare(sparse, [density], operation, [*pairs.values()])
        notes += wrong
        references = ["oneDNN", timing.label("1 x 1", density)]
        for batch, pair in pairs.items():
            flops = 6 * batch * SIZE**2
            table = timing.compare(dense | sparse, reference | layers, pair, references, flops, rounds)
            tables.append(f"Batch {batch}, density {100 * density:g} %, a training step:\n\n{table}")
    timing.report("units", [*tables, *notes], save, kept)


if __name__ == "__main__":
    main()
