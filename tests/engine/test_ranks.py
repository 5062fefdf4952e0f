"""Masked storage on two ranks with different data: the topologies of one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.core.method import Method
from support.loops import (
    data,
    loss_of,
    mlp,
    rigl,
    set_,
)
from support.ranks import as_rank, two_ranks
from support.table import METHODS

RANKED: dict[str, tuple[Callable[[], Method], bool]] = {
    "rigl": (lambda: rigl(interval=2), False),
    "rigl-after": (lambda: rigl(interval=2, timing="after"), False),
    "set": (lambda: set_(interval=2), False),
    "snfs": (METHODS["snfs"], False),
    "snip": (lambda: methods.snip(0.5), False),
    "closure": (lambda: rigl(interval=2, timing="after"), True),
}


def history(name: str, wrap: Callable[[nn.Module], nn.Module], part: Callable[[Tensor], Tensor]) -> list[Any]:
    """Topologies after each of 6 steps, as lists of positions."""
    make, with_closure = RANKED[name]
    net = wrap(mlp())
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier, log = sparsify(net, opt, make()), []
    for step in range(1, 7):
        batch = tuple(part(t) for t in data(step))

        def closure(batch: Any = batch) -> Tensor:
            opt.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss.detach()

        if with_closure:
            opt.step(closure)
        else:
            closure()
            opt.step()
        log.append({n: t.indices.tolist() for n, t in sparsifier.topologies.items()})
    return log


def both(rank: int) -> dict[str, Any]:
    wrap = nn.parallel.DistributedDataParallel
    return {name: history(name, wrap, lambda t: t.chunk(2)[rank]) for name in RANKED}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_have_the_topologies_of_one_process(name: str, ranks: list[dict[str, Any]]):
    """Property 43: with different data on each rank."""
    assert ranks[0][name] == ranks[1][name]
    assert ranks[0][name] == history(name, lambda model: model, lambda t: t)
    assert any(now != ranks[0][name][0] for now in ranks[0][name]) or name == "snip"


if __name__ == "__main__":
    as_rank(both)
