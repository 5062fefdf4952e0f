"""Compressed storage on two ranks with different data: the same topologies and values, those of masked storage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regrow import methods, sparsify
from regrow.core.method import Method, Need, Rule, Start
from regrow.core.topology import Topology
from regrow.core.weight import Weights
from regrow.parts.drops import lowest
from regrow.parts.growth import gradient, highest
from regrow.parts.schedules import constant
from regrow.parts.scores import magnitude
from regrow.parts.updates import chain, drop_and_grow, every
from support.loops import same
from support.pairs import batch, loss_of, model_of, tensors
from support.ranks import as_rank, two_ranks
from support.table import METHODS, OPTIMIZERS

STEPS = 6


def rigl(**options: Any) -> Method:
    return methods.rigl(0.3, interval=2, until=30, anneal=constant, **options)


class Routed(nn.Module):
    """Each rank sends its data through a layer of its own, and both through a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(12, 5)]).double()
        self.route = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[self.route](x) + self.layers[2](x)


CASES: dict[str, tuple[Callable[[], Method], str, str]] = {
    "rigl": (rigl, "sgd", "linear"),
    "rigl conv": (rigl, "adamw", "conv"),
    "rigl after": (lambda: rigl(timing="after"), "adamw", "linear"),
    "set": (lambda: methods.set_(0.3, interval=2, until=30), "adamw", "linear"),
    "snfs": (METHODS["snfs"], "adamw", "linear"),
    "snip": (lambda: methods.snip(0.3), "sgd", "linear"),
    "closure": (lambda: rigl(timing="after"), "sgd", "linear"),
    "clipped": (rigl, "adamw", "linear"),
    "scaled": (rigl, "adamw", "linear"),
    "fused scaled": (rigl, "adamw-fused", "linear"),
    "fused scaled after": (lambda: rigl(timing="after"), "adamw-fused", "linear"),
    "accumulated": (rigl, "adamw", "linear"),
    "accumulated without sync": (rigl, "adamw", "linear"),
    "routed": (rigl, "adamw", "linear"),
    "routed after": (lambda: rigl(timing="after"), "adamw", "linear"),
}
"""Method, optimizer and model of each; what else a case does is in its name."""


def history(case: str, storage: Any, rank: int, wraps: bool = True) -> list[Any]:
    """Topologies and tensors after each of `STEPS` steps; the whole batch on one rank unless it `wraps`."""
    make, optimizer, kind = CASES[case]
    model = Routed() if "routed" in case else model_of(kind)
    model.eval()
    opt = OPTIMIZERS[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, make(), storage=storage, allow_dense=True)
    net = DistributedDataParallel(model, find_unused_parameters="routed" in case) if wraps else model
    scaler = torch.amp.GradScaler("cpu", enabled="scaled" in case, init_scale=1024.0)
    log = []
    for step in range(1, STEPS + 1):
        model.route = rank if step % 3 else 3
        x, y = (t.chunk(2)[rank] if wraps else t for t in batch(kind, step))
        pieces = 3 if "accumulated" in case else 1

        def closure(x: Tensor = x, y: Tensor = y, pieces: int = pieces) -> Tensor:
            opt.zero_grad()
            for i, piece in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
                alone = wraps and "without sync" in case and i < pieces - 1
                with net.no_sync() if alone else contextlib.nullcontext():
                    loss = loss_of(net, piece) / pieces
                    scaler.scale(loss * (300 if case == "clipped" else 1)).backward()
            return loss.detach()

        if case == "closure":
            opt.step(closure)
        else:
            closure()
            if case == "clipped":
                sparsifier.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
        log.append(({n: t.indices for n, t in sparsifier.topologies.items()}, tensors(model, opt)))
    assert sparsifier.updates == (0 if case == "snip" else 1 if case == "snfs" else 3)
    return log


def broadcast_bytes() -> list[int]:
    """What is broadcast before each of 3 forward passes of a compressed model with batch norm."""
    parallel: Any = torch.nn.parallel.distributed.dist
    original, counts = parallel._broadcast_coalesced, [0]

    def counting(group: Any, sent: list[Tensor], *args: Any) -> Any:
        counts[-1] += sum(t.nbytes for t in sent)
        return original(group, sent, *args)

    model = model_of("conv")
    opt = OPTIMIZERS["sgd"](model.parameters())
    sparsify(model, opt, rigl(), storage="compressed")
    net = DistributedDataParallel(model)
    parallel._broadcast_coalesced = counting
    for step in range(3):
        counts.append(0)
        opt.zero_grad()
        loss_of(net, batch("conv", step)).backward()
        opt.step()
    parallel._broadcast_coalesced = original
    return counts[1:]


def late() -> str:
    """What is said to one who wraps the model first."""
    net = DistributedDataParallel(model_of("linear"))
    try:
        sparsify(net, OPTIMIZERS["sgd"](net.parameters()), rigl(), storage="compressed")
    except ValueError as error:
        return str(error)
    return ""


INPUTS = [0.0, 0, 1, 2, 3, 4], [0.0, 0, -3, 6, 1, 8]
"""Of each rank, zero where the weight is active."""


def unheard(rank: int, storage: Any) -> dict[str, Tensor]:
    """What a method reads where no active entry has a gradient, and the second moments after growth by it.

    Elsewhere compressed storage takes the scale from the active entries' own gradient, which DDP has reduced.
    """
    model = nn.Linear(6, 3, bias=False).double()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    found: dict[str, Tensor] = {}

    def note(weights: Weights, step: int) -> None:
        found["in blocks"] = torch.cat([block for _, block in weights[0].grad_blocks()])
        found["at positions"] = weights[0].grads_at(torch.arange(18))

    start = Start(lambda weights, probe: weights[0].rewire(Topology((3, 6), torch.tensor([0, 1, 6, 7, 12, 13]))))
    update = chain((Rule(note),), drop_and_grow(constant(0.5), lowest(magnitude), highest(gradient)))
    sparsify(model, opt, Method("m", start, every(2, update, until=3), needs=Need.GRADIENT), storage=storage)
    net = DistributedDataParallel(model)
    for x in ([1.0, 1, 0, 0, 0, 0], INPUTS[rank]):
        opt.zero_grad()
        (net(torch.tensor([x]).double()) * torch.tensor([1, 2, 3])).sum().backward()
        opt.step()
    return {**found, "second moments": tensors(model, opt)["weight:exp_avg_sq"]}


def both(rank: int) -> dict[str, Any]:
    logs: dict[str, Any] = {f"{s} {case}": history(case, s, rank) for case in CASES for s in ("masked", "compressed")}
    logs |= {f"{storage} unheard": unheard(rank, storage) for storage in ("masked", "compressed")}
    return {**logs, "broadcast": broadcast_bytes(), "late": late()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_stay_equal_and_equal_to_masked_storage(case: str, ranks: list[dict[str, Any]]):
    """Property 43."""
    logs = [ranks[0][f"compressed {case}"], ranks[1][f"compressed {case}"], ranks[0][f"masked {case}"]]
    for (ours, tensors_), (theirs, others), (expected, values) in zip(*logs, strict=True):
        assert same(ours, theirs) and same(tensors_, others)
        assert same(ours, expected) and tensors_.keys() == values.keys()
        for name, tensor in values.items():
            torch.testing.assert_close(tensors_[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    assert not same(logs[0][0][0], logs[0][-1][0]) or case == "snip"


@pytest.mark.parametrize("case", [case for case in CASES if "routed" not in case])
def test_two_ranks_do_what_one_process_does(case: str, ranks: list[dict[str, Any]]):
    for (ours, _), (alone, _) in zip(
        ranks[0][f"compressed {case}"], history(case, "compressed", 0, False), strict=True
    ):
        assert same(ours, alone)


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_growth_reads_the_mean_over_ranks(storage: str, ranks: list[dict[str, Any]]):
    """Property 43: the mean, not the sum, also where no active entry shows the scale; newcomers start with it."""
    mean = np.outer([1, 2, 3], np.mean(INPUTS, axis=0)).ravel()
    for found in (rank[f"{storage} unheard"] for rank in ranks):
        np.testing.assert_allclose(found["in blocks"], mean, rtol=1e-12)
        np.testing.assert_allclose(found["at positions"], mean, rtol=1e-12)
        newcomers = np.argsort(-abs(mean), kind="stable")[:3]
        assert sorted(mean[newcomers]) == [12, 12, 18]
        # After one step, Adam's average of a constant square g^2 is (1 - 0.999) g^2.
        np.testing.assert_allclose(found["second moments"][newcomers], 1e-3 * mean[newcomers] ** 2, rtol=1e-9)


def test_topologies_are_not_broadcast(ranks: list[dict[str, Any]]):
    """Running statistics of batch norm are: two of 6 numbers in float64, and a count."""
    assert ranks[0]["broadcast"] == [2 * 6 * 8 + 8] * 3


def test_a_model_that_is_wrapped_first_is_refused(ranks: list[dict[str, Any]]):
    """Its gradients would never meet those of the other rank."""
    assert "0.weight cannot become compressed while something else refers to it" in ranks[0]["late"]
    assert "before DistributedDataParallel" in ranks[0]["late"]


if __name__ == "__main__":
    as_rank(both)
