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
import numpy as np
import timing
import torch
from timing import Candidate, Operation
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 4096

torch.sparse.check_sparse_tensor_invariants.disable()
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


class CSR(torch.autograd.Function):
    """A linear layer's three products, each through the fastest that torch.sparse has for it.

    Torch's own backward of a CSR product transposes the weight anew, or multiplies with a CSC one, each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: CSRLinear) -> Tensor:
        """Outputs."""
        x_columns = x.t().contiguous()
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return (layer.matrix(values) @ x_columns).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of inputs and values."""
        x, values = ctx.saved_tensors
        dy_columns = dy.t().contiguous()
        dx = (ctx.layer.transposed(values) @ dy_columns).t()
        pattern = ctx.layer.matrix(values)
        return dx, torch.sparse.sampled_addmm(pattern, dy_columns, x, beta=0.0).values(), None


class CSRLinear(nn.Module):
    """torch.sparse at its best: CSR of the weight and of its transpose."""

    def __init__(self, density: float) -> None:
        super().__init__()
        weight = random_weight(density).to_sparse_csr()
        places = torch.arange(1.0, weight.values().numel() + 1, dtype=torch.float64)
        numbered = torch.sparse_csr_tensor(weight.crow_indices(), weight.col_indices(), places, weight.shape)
        turned = numbered.to_dense().t().contiguous().to_sparse_csr()
        self.index = weight.crow_indices(), weight.col_indices()
        self.turned = turned.crow_indices(), turned.col_indices()
        self.order = turned.values().long() - 1
        self.values = nn.Parameter(weight.values())

    def matrix(self, values: Tensor) -> Tensor:
        """The weight."""
        return torch.sparse_csr_tensor(*self.index, values, (SIZE, SIZE))

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        return torch.sparse_csr_tensor(*self.turned, values[self.order], (SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return CSR.apply(x, self.values, self)


class AutogradCSRLinear(CSRLinear):
    """torch.sparse as its documentation writes it, with its own backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return torch.sparse.mm(self.matrix(self.values), x.t()).t()


def sparselab(density: float) -> nn.Module:
    """SparseLab's layer around a weight of ours, set as its constructor sets its own."""
    from sparselab import PaddedCSR, SparseLinear

    layer = SparseLinear(SIZE, SIZE, bias=False, sparsity=1 - density)
    layer._csr = PaddedCSR.from_dense(random_weight(density))
    layer._values = nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    return layer


def sparseprop(density: float) -> nn.Module:
    """SparseProp's layer, made from a sparse `nn.Linear` as its README does."""
    from sparseprop.modules import SparseLinear

    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = random_weight(density)
    return SparseLinear.from_dense(layer)


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
    "torch.sparse, its own backward": Candidate(AutogradCSRLinear),
    "torch.sparse, by hand": Candidate(CSRLinear),
    "SparseLab": Candidate(sparselab),
    "SparseProp": Candidate(sparseprop),
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
