"""A training step of a 4096 x 4096 linear layer, forward and both backward products: dense, peers, and this library.

    python benchmarks/linear.py [--save] [--return-memory] [--batches 128,512] [--densities 0.1,0.05,0.02,0.01]

Inputs, outputs and their gradients are batch-major: (batch, features), contiguous. A masked layer is `nn.Linear`, in
time as in everything else. GFLOP/s count the products with active entries only. Candidates that compute something
else than a float64 reference are reported instead of timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import timing
import torch
from timing import Candidate, Operation
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.app.peers import sparselab, sparseprop
from regrow.engine.timing import CSRLinear, Maker, torch_sparse
from regrow.nn.base import nonzero

SIZE = 4096

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def random_weight(density: float) -> Tensor:
    """A weight with uniformly random active entries, exactly as many as the density says."""
    weight = torch.zeros(SIZE * SIZE)
    active = torch.randperm(SIZE * SIZE)[: round(density * SIZE * SIZE)]
    weight[active] = torch.randn(len(active)) / (density * SIZE) ** 0.5
    return weight.view(SIZE, SIZE)


def dense(density: float) -> nn.Module:
    """What torch does: MKL in float32, oneDNN in bfloat16."""
    return nn.Linear(SIZE, SIZE, bias=False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in float32 through oneDNN, which takes transposed views as they are.

    This is the operator of torch.compile's linear layers, and the fastest of the ways into oneDNN: `mkldnn_linear` runs
    the same product but converts its tensors first, convolutions of size 1 run others, several times slower.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class OneDNN(torch.autograd.Function):
    """A linear layer's three products, all through oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Outputs."""
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of inputs and weight."""
        x, weight = ctx.saved_tensors
        return product(dy, weight.t()), product(dy.t(), x.t())


class OneDNNLinear(nn.Linear):
    """nn.Linear through oneDNN instead of MKL."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return OneDNN.apply(x, self.weight)


class AutogradCSRLinear(CSRLinear):
    """torch.sparse as its documentation writes it, with its own backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return torch.sparse.mm(self.matrix(self.values), x.t()).t()


def sparse(make: Maker, density: float) -> nn.Module:
    """What `make` makes of a weight of ours."""
    layer = dense(density)
    layer.weight.data = random_weight(density)
    return make(layer, {"weight": nonzero(layer.weight)})


def ours(density: float) -> nn.Module:
    """This library's layer."""
    from regrow.nn import SparseLinear

    return SparseLinear(SIZE, SIZE, bias=False, density=density)


DENSE = {
    "nn.Linear": Candidate(dense),
    "oneDNN": Candidate(lambda density: OneDNNLinear(SIZE, SIZE, bias=False)),
    "bfloat16": Candidate(lambda density: dense(density).bfloat16(), torch.Tensor.bfloat16, 1e-2),
}
SPARSE = {
    "torch.sparse, its own backward": Candidate(
        partial(sparse, lambda layer, at: AutogradCSRLinear(layer.weight, at["weight"]))
    ),
    "torch.sparse, by hand": Candidate(partial(sparse, torch_sparse)),
    "SparseLab": Candidate(partial(sparse, sparselab)),
    "SparseProp": Candidate(partial(sparse, sparseprop)),
    "regrow": Candidate(ours),
}
REFERENCES = ["oneDNN", "nn.Linear"]


def unit_answers(layer: Callable[[Tensor], Tensor]) -> Tensor:
    """A dense weight from the outputs of unit inputs."""
    return layer(torch.eye(SIZE)).t()


@click.command(help=__doc__)
@click.option("--batches", default="128,512", show_default=True, help="Batch sizes of training steps.")
@click.option("--densities", default="0.1,0.05,0.02,0.01", show_default=True, help="Shares of active entries.")
@timing.ROUNDS
@timing.options
def main(batches: str, densities: str, rounds: int, save: bool, keep_memory: bool) -> None:
    """Measure, print and perhaps save."""
    kept = keep_memory and timing.keep_memory()
    shares = [float(share) for share in densities.split(",")]
    pairs = {batch: (torch.randn(batch, SIZE), torch.randn(batch, SIZE)) for batch in map(int, batches.split(","))}
    one = torch.randn(1, SIZE), torch.randn(1, SIZE)
    operation = Operation(F.linear, unit_answers)
    layers, notes = timing.prepare(DENSE, [1.0], operation, [*pairs.values(), one])
    sparse, wrong = timing.prepare(SPARSE, shares, operation, [*pairs.values(), one])
    layers |= sparse
    compare = partial(timing.compare, DENSE | SPARSE, references=REFERENCES, rounds=rounds)
    tables = [
        f"Batch {batch}, a training step:\n\n{compare(layers, pair, flops=6 * batch * SIZE**2)}"
        for batch, pair in pairs.items()
    ]
    few = {key: layer for key, layer in layers.items() if key[1] in (1.0, shares[0])}
    table = compare(few, one, flops=2 * SIZE**2, make=timing.inference)
    tables.append(f"Batch 1, forward alone:\n\n{table}")
    timing.report("linear", [*tables, *notes, *wrong], save, kept)


if __name__ == "__main__":
    main()
