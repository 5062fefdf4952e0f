"""A training step of a 4096 x 4096 linear layer whose weight is made of units: over dense, and over single entries.

    python benchmarks/units.py [--save] [--return-memory] [--batches 128,512] [--densities 0.1,0.05,0.02,0.01]
                               [--units 2x1,4x1,8x1,16x1,8x8,16x16] [--rounds 9] [--dtype bfloat16] [--busy]
    REGROW_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/units.py --save

A unit of g x k is g consecutive outputs and k consecutive inputs, all active or none; 1 x 1 is single entries. Layers
are made by `sparsify`, compressed. A step is the forward product and both gradients, through autograd. Inputs,
outputs and their gradients are batch-major: (batch, features), contiguous. GFLOP/s count the products with active
entries only. Candidates that compute something else than a float64 reference are reported instead of timed. With
`--busy` everything is measured a second time while another process takes one core. Instruction sets are chosen by
environment variables, ours and oneDNN's each by its own.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial

import click
import timing
import torch
from linear import DENSE, SIZE, SPARSE, unit_answers
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
        dtype: of values.
        density: share of active entries.
    """

    def __init__(self, structure: Units | None, dtype: torch.dtype, density: float) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
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
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--busy", is_flag=True, help="Measure also while another process takes one core.")
@timing.ROUNDS
@timing.options
def main(
    batches: str, densities: str, units: str, dtype: str, busy: bool, rounds: int, save: bool, keep_memory: bool
) -> None:
    """Measure, print and perhaps save."""
    kept = keep_memory and timing.keep_memory()
    pairs = {batch: (torch.randn(batch, SIZE), torch.randn(batch, SIZE)) for batch in map(int, batches.split(","))}
    operation = Operation(F.linear, unit_answers)
    structures: dict[str, Units | None] = {"1 x 1": None, **parse(units)}
    make = {name: partial(Compressed, structure, getattr(torch, dtype)) for name, structure in structures.items()}
    if dtype == "float32":
        # Without instructions of its own bfloat16 takes seconds.
        has_half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dense = {name: DENSE[name] for name in ("oneDNN", *(["bfloat16"] if has_half else []))}
        sparse = {"SparseLab": SPARSE["SparseLab"], **{name: Candidate(layer) for name, layer in make.items()}}
    else:
        dense = {name: DENSE[name] for name in ("bfloat16", "oneDNN")}
        sparse = {name: Candidate(layer, torch.Tensor.bfloat16, 1e-2) for name, layer in make.items()}
    reference, notes = timing.prepare(dense, [1.0], operation, [*pairs.values()])
    situations = {"": nullcontext} | ({", one core taken by another process": timing.busy} if busy else {})
    tables = []
    for density in map(float, densities.split(",")):
        layers, wrong = timing.prepare(sparse, [density], operation, [*pairs.values()])
        notes += wrong
        references = [next(iter(dense)), *(timing.label(*key) for key in layers if key[0] in ("1 x 1", "SparseLab"))]
        for batch, pair in pairs.items():
            flops = 6 * batch * SIZE**2
            for words, situation in situations.items():
                with situation():
                    table = timing.compare(dense | sparse, reference | layers, pair, references, flops, rounds)
                tables.append(f"Batch {batch}, density {100 * density:g} %, a training step{words}:\n\n{table}")
    what = ["units", *([dtype] if dtype != "float32" else []), *(["busy"] if busy else [])]
    isa = [os.environ["REGROW_ISA"]] if "REGROW_ISA" in os.environ else []
    timing.report("_".join([*what, *isa]), [*tables, *notes], save, kept)


if __name__ == "__main__":
    main()
