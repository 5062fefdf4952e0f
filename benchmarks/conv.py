"""A training step of 3 x 3 convolutions at the sizes of a ResNet on CIFAR: dense, peers, and this library.

    python benchmarks/conv.py [--save] [--return-memory] [--stages 64x32,128x16,256x8,512x4] [--densities 0.1,0.05,0.02]
                              [--units 8]

64 images, as many channels out as in, stride and padding 1, forward and both backward products. Dense layers get and
return the layout that their name says; all others NCHW. A unit is some filters that share one tap of one channel, all
active or none; without one, single entries are active. GFLOP/s count the products of active entries with the image,
not with its padding. Candidates that compute something else than a float64 reference are reported instead of timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import timing
import torch
from timing import Candidate, Operation
from torch import Tensor, nn
from torch.nn import functional as F

from regrow import Topology
from regrow.app.peers import peers
from regrow.nn import SparseConv2d
from regrow.nn.base import nonzero

IMAGES = 64


def dense(channels: int, density: float) -> nn.Module:
    """What torch does: oneDNN, which converts contiguous tensors to layouts of its own and back."""
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def sparseprop(channels: int, width: int, density: float) -> nn.Module:
    """SparseProp's layer around a weight of ours."""
    layer = dense(channels, density)
    weight = torch.zeros(layer.weight.numel())
    active = torch.randperm(len(weight))[: round(density * len(weight))]
    weight[active] = torch.randn(len(active)) / (9 * density * channels) ** 0.5
    layer.weight.data = weight.view_as(layer.weight)
    return peers(layer, width)["SparseProp"](layer, {"weight": nonzero(layer.weight)})


def ours(channels: int, density: float) -> nn.Module:
    """This library's layer of single entries."""
    return SparseConv2d(channels, channels, 3, padding=1, bias=False, density=density)


def ours_of_units(channels: int, outputs: int, density: float) -> nn.Module:
    """This library's layer of units of `outputs` filters."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    whole = Topology(tuple(layer.weight.shape), unit=(outputs, 1, 1, 1))
    topology = whole.at(torch.randperm(whole.places)[: round(density * whole.places)].sort().values)
    values = torch.randn(topology.nnz) / (9 * density * channels) ** 0.5
    return SparseConv2d.adopt(layer, {"weight": (nn.Parameter(values), topology)})


def channels_last(tensor: Tensor) -> Tensor:
    """A tensor with its channels innermost."""
    return tensor.contiguous(memory_format=torch.channels_last)


def dense_candidates(channels: int) -> dict[str, Candidate]:
    """Dense convolutions by layout and type."""
    make = partial(dense, channels)
    return {
        "NCHW": Candidate(make),
        "channels_last": Candidate(lambda density: make(density).to(memory_format=torch.channels_last), channels_last),
        "oneDNN tensors": Candidate(make, torch.Tensor.to_mkldnn),
        "bfloat16, NCHW": Candidate(lambda density: make(density).bfloat16(), torch.Tensor.bfloat16, 1e-2),
        "bfloat16, channels_last": Candidate(
            lambda density: make(density).to(torch.bfloat16, memory_format=torch.channels_last),
            lambda tensor: channels_last(tensor).bfloat16(),
            1e-2,
        ),
    }


def sparse_candidates(channels: int, width: int, units: list[int]) -> dict[str, Candidate]:
    """Sparse convolutions."""
    entries = {
        "SparseProp": Candidate(partial(sparseprop, channels, width)),
        "regrow": Candidate(partial(ours, channels)),
    }
    return entries | {f"regrow, units of {g}": Candidate(partial(ours_of_units, channels, g)) for g in units}


REFERENCES = ["NCHW", "channels_last"]


def unit_answers(channels: int, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """A dense weight from the outputs of images that are one at a single place of a single channel."""
    images = torch.zeros(channels, channels, 5, 5)
    images[range(channels), range(channels), 2, 2] = 1
    return layer(images)[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1).contiguous()


def stage(channels: int, width: int, shares: list[float], units: list[int], rounds: int) -> tuple[str, list[str]]:
    """A table of one size, and a line about each candidate that cannot be timed."""
    shape = (IMAGES, channels, width, width)
    pair = torch.randn(shape), torch.randn(shape)
    operation = Operation(partial(F.conv2d, padding=1), partial(unit_answers, channels))
    first, then = dense_candidates(channels), sparse_candidates(channels, width, units)
    layers, notes = timing.prepare(first, [1.0], operation, [pair])
    sparse, wrong = timing.prepare(then, shares, operation, [pair])
    flops = 6 * IMAGES * channels**2 * (3 * width - 2) ** 2
    return timing.compare(first | then, layers | sparse, pair, REFERENCES, flops, rounds), notes + wrong


@click.command(help=__doc__)
@click.option("--stages", default="64x32,128x16,256x8,512x4", show_default=True, help="Channels x width and height.")
@click.option("--densities", default="0.1,0.05,0.02", show_default=True, help="Shares of active entries.")
@click.option("--units", default="8", show_default=True, help="Filters of units.")
@timing.ROUNDS
@timing.options
def main(stages: str, densities: str, units: str, rounds: int, save: bool, keep_memory: bool) -> None:
    """Measure, print and perhaps save."""
    kept = keep_memory and timing.keep_memory()
    parts = []
    for size in stages.split(","):
        channels, width = map(int, size.split("x"))
        shares, sizes = [float(share) for share in densities.split(",")], [int(size) for size in units.split(",")]
        table, notes = stage(channels, width, shares, sizes, rounds)
        parts += [f"{channels} channels, {width} x {width}, a training step:\n\n{table}", *notes]
    timing.report("conv", parts, save, kept)


if __name__ == "__main__":
    main()
