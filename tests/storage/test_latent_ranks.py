"""Latent values on two ranks with different data: the same on both, and those of one process with all data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from regrow import sparsify
from support.pairs import batch, loss_of, model_of
from support.ranks import as_rank, two_ranks
from support.table import METHODS, OPTIMIZERS

CASES = ["dnw", "top_kast", "str", "movement", "l0", "variational_dropout"]


def history(method: str, rank: int | None) -> list[dict[str, Tensor]]:
    """Weights, topologies and state after each of 4 steps; all data where there is no rank."""
    model = model_of("linear")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = sparsify(model, optimizer, METHODS[method]())
    net = model if rank is None else DistributedDataParallel(model)
    log = []
    for step in range(1, 5):
        optimizer.zero_grad()
        x, y = (t if rank is None else t.chunk(2)[rank] for t in batch("linear", step))
        loss_of(net, (x, y)).backward()
        optimizer.step()
        state = {f"{w.name}:{k}": v.clone() for w in sparsifier.weights for k, v in w.state.items()}
        active = {f"{n} active": t.indices for n, t in sparsifier.topologies.items()}
        log.append({**{n: p.detach().clone() for n, p in model.named_parameters()}, **state, **active})
    return log


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_do_what_one_process_does(case: str, ranks: list[dict[str, Any]]):
    """Property 43: draws are those of one process, and what is trained beside needs no reduction of its own."""
    for ours, theirs, alone in zip(ranks[0][case], ranks[1][case], history(case, None), strict=True):
        assert ours.keys() == theirs.keys() == alone.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
            torch.testing.assert_close(tensor, alone[name], rtol=1e-9, atol=1e-11, msg=name)


if __name__ == "__main__":
    as_rank(lambda rank: {case: history(case, rank) for case in CASES})
