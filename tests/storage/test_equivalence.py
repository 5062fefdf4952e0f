"""Masked and compressed storage make the same run: to the bit where arithmetic is exact, else as far as it allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow import methods, sparsify
from support import table
from support.pairs import Run, batch, loss_of, positions, tensors
from support.table import DENSITY, METHODS


class Exact(nn.Module):
    """Layers whose inputs are one-hot, so that each entry of each gradient is one number and nothing is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(9, 6, bias=False), nn.Linear(5, 11, bias=False)
        self.image, self.line = nn.Conv2d(2, 4, (2, 3), bias=False), nn.Conv1d(3, 4, 3, bias=False)

    def forward(self, step: int | Tensor) -> Tensor:
        """A loss whose gradients are random numbers that bfloat16 can hold."""
        draw, total = torch.Generator().manual_seed(int(step)), torch.zeros(())
        for layer, shape in ((self.wide, (9,)), (self.tall, (5,)), (self.image, (2, 2, 3)), (self.line, (3, 3))):
            n = math.prod(shape)
            y = layer(torch.eye(n, dtype=layer.weight.dtype).view(n, *shape))
            total = total + (y * torch.randn(y.shape, generator=draw).bfloat16().to(y.dtype)).sum()
        return total


# Powers of two, since torch rounds products with others differently in the last few entries of a tensor in bfloat16;
# nor does it always round all entries alike in its fused optimizers.
EXACT: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=2**-4, momentum=0.875, weight_decay=2**-10),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2**-9, weight_decay=0.125),
}


def exact_run(storage: Any, method: str, optimizer: str, dtype: torch.dtype, autocast: bool = False) -> list[Any]:
    torch.manual_seed(0)
    model = Exact().to(dtype)
    opt = EXACT[optimizer](model.parameters())
    recipe = METHODS[method]()
    first = {"batches": [0.0, -1.0], "loss": lambda model, step: model(torch.tensor(step))}
    first = first if recipe.start.needs_batches else {}
    sparsifier = sparsify(model, opt, recipe, storage=storage, allow_dense=True, **first)
    assert positions(model).keys() == (set(sparsifier.topologies) if storage == "compressed" else set())
    log = []
    for step in range(1, 10):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(step)
        loss.backward()
        opt.step()
        log.append((sparsifier.topologies, tensors(model, opt)))
    return log


TWICE = {"rigl-reset", "granet", "granet-dense", "granet-reset", "granet_uniform", "dsr", "mest", "mest-soft", "deep_r"}
TWICE |= {"granet-parts", "granet-lamp", "granet-units", "mest-units", "deep_r-parts", "haste-units", "deep_r-nm"}
"""An update may remove an entry and grow it again; it has lost its gradient then in compressed storage."""


def require_identical(method: str, *runs: list[Any]) -> None:
    for (old, expected), (new, found) in zip(*runs, strict=True):
        assert old == new
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if method not in TWICE or not key.endswith(":grad"):
                assert torch.equal(tensor, found[key]), key


IN = [("adamw", torch.bfloat16), ("sgd", torch.float32), ("adamw", torch.float64)]
"""Each dtype with one optimizer; the one that keeps more state in the coarsest and in the finest."""
EXACT_RUNS = [(m, optimizer, dtype) for m, row in METHODS.items() if row.compresses for optimizer, dtype in IN]
EXACT_RUNS += [(method, "sgd", torch.bfloat16) for method in ("static", "rigl", "set", "snfs", "gmp", "snip")]


@pytest.mark.parametrize(("method", "optimizer", "dtype"), EXACT_RUNS, ids=str)
def test_where_nothing_is_rounded_both_storages_agree_to_the_bit(method: str, optimizer: str, dtype: torch.dtype):
    """Topology, values, optimizer state and gradient, after ordinary steps and two updates."""
    require_identical(method, *(exact_run(s, method, optimizer, dtype) for s in ("masked", "compressed")))


@pytest.mark.parametrize("method", ["rigl", "snfs", "set"])
def test_autocast_changes_nothing_where_nothing_is_rounded(method: str):
    dtype = torch.float32
    require_identical(method, *(exact_run(s, method, "adamw", dtype, True) for s in ("masked", "compressed")))


MOVING = [name for name in METHODS if name.startswith(("rigl", "set", "snfs"))]
# What an optimizer does to an entry does not depend on why the entry moved: AdamW beside one method of each growth.
RUNS = [(method, net, "sgd") for method in MOVING for net in ("linear", "conv")]
RUNS += [(method, net, "adamw") for method in ("rigl", "set", "snfs") for net in ("linear", "conv")]
RUNS += [(method, net, "adamw") for method in ("rigl", "snfs") for net in ("gru", "lstm", "attention")]
RUNS += [(method, net, "sgd") for method in ("dsr", "mest-soft", "deep_r", "gse") for net in ("linear", "conv")]
RUNS += [(method, "conv", "sgd") for method in ("dense", "static", "static-er", "snip", "gmp", "gmp-global")]


@pytest.mark.parametrize(("method", "net", "optimizer"), RUNS)
def test_free_runs_stay_together(method: str, net: str, optimizer: str, monkeypatch: pytest.MonkeyPatch):
    """Many steps and updates in float64: equal topologies at each, and losses as equal as arithmetic allows.

    With AdamW, which forgets least, 200 steps and 19 updates; half of that with SGD, a quarter of recurrent networks.
    """
    steps = 50 if net not in ("linear", "conv") else 200 if optimizer == "adamw" else 100
    monkeypatch.setattr(table, "INTERVAL", 9)
    monkeypatch.setattr(table, "UNTIL", steps - 10 if steps == 100 else 180)
    masked, compressed = (Run(s, METHODS[method](), net, optimizer) for s in ("masked", "compressed"))
    first = masked.sparsifier.topologies
    for step in range(1, steps + 1):
        expected, found = masked.step(step), compressed.step(step)
        assert found == pytest.approx(expected, rel=1e-9), f"step {step}"
        assert compressed.sparsifier.topologies == masked.sparsifier.topologies, f"step {step}"
    assert (first != masked.sparsifier.topologies) == (method not in ("dense", "static", "static-er"))


def test_snip_from_batches_makes_the_same_start():
    batches = [batch("conv", i) for i in range(3)]
    runs = [Run(s, methods.snip(DENSITY), "conv", batches=batches, loss=loss_of) for s in ("masked", "compressed")]
    assert all(run.sparsifier.started and run.sparsifier.step == 0 for run in runs)
    for step in range(1, 20):
        assert runs[0].step(step) == pytest.approx(runs[1].step(step), rel=1e-9)
    runs[0].require_equal(runs[1])
    assert {p.numel() for p in runs[1].model.parameters()} >= {t.nnz for t in runs[0].sparsifier.topologies.values()}


def test_another_seed_is_another_run():
    """What is compared above does depend on what both storages draw."""
    runs = [Run("compressed", METHODS["set"](), seed=seed).go(1, 12) for seed in (0, 1)]
    assert runs[0].sparsifier.topologies != runs[1].sparsifier.topologies
