"""A training step of a 4096 x 4096 linear layer whose weight is made of units: over dense, and over single entries.

    python benchmarks/units.py [--save] [--return-memory] [--batches 128,512] [--densities 0.1,0.05,0.02,0.01]
                               [--units 2x1,4x1,8x1,16x1,8x8,16x16] [--rounds 9]

A unit of g x k is g consecutive outputs and k consecutive inputs, all active or none; `SparseLinear` is the library's
layer of single entries at the same density. A step is the forward product and both gradients, through autograd. Inputs,
outputs and their gradients are batch-major: (batch, features), contiguous. GFLOP/s count the products with active
entries only. Candidates that compute something else than a float64 reference are reported instead of timed.
"""

from __future__ import annotations

from functools import partial

import click
import timing
import torch
from linear import DENSE, SIZE, ours, unit_answers
from timing import Candidate, Operation
from torch import Tensor, nn
from torch.nn import functional as F

from regrow import Topology, kernels
from regrow.kernels import UnitIndex, unit_index


class UnitLinear(nn.Module):
    """y = x W^T, with a share of the units of W active, at random places."""

    def __init__(self, unit: tuple[int, int], density: float) -> None:
        super().__init__()
        whole = Topology((SIZE, SIZE), unit=unit)
        active = torch.randperm(whole.places)[: round(density * whole.places)].sort().values
        self.index: UnitIndex = unit_index(whole.at(active))
        self.weight = nn.Parameter(torch.randn(len(active), *reversed(unit)) / (density * SIZE) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return kernels.linear(x, self.weight, None, self.index)


def parse(units: str) -> dict[str, tuple[int, int]]:
    """Units by name, from "8x1,16x16"."""
    pairs = [unit.split("x") for unit in units.split(",")]
    return {f"{g} x {k}": (int(g), int(k)) for g, k in pairs}


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
    dense = {"oneDNN": DENSE["oneDNN"]}
    sparse = {"SparseLinear": Candidate(ours)}
    sparse |= {name: Candidate(partial(UnitLinear, unit)) for name, unit in parse(units).items()}
    reference, notes = timing.prepare(dense, [1.0], operation, [*pairs.values()])
    tables = []
    for density in map(float, densities.split(",")):
        layers, wrong = timing.prepare(sparse, [density], operation, [*pairs.values()])
        notes += wrong
        references = ["oneDNN", timing.label("SparseLinear", density)]
        for batch, pair in pairs.items():
            flops = 6 * batch * SIZE**2
            table = timing.compare(dense | sparse, reference | layers, pair, references, flops, rounds)
            tables.append(f"Batch {batch}, density {100 * density:g} %, a training step:\n\n{table}")
    timing.report("units", [*tables, *notes], save, kept)


if __name__ == "__main__":
    main()
