"""Latent values on two ranks with different data: the same on both, and those of one process with all data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import regrow
from regrow import sparsify
from support.pairs import batch, loss_of, model_of
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


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    file = f"file://{folder / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    torch.save({case: history(case, rank) for case in CASES}, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(regrow.__file__).parents[1]), str(Path(__file__).parents[1])])
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], **options) for rank in range(2)]
    try:
        for run in runs:
            _, errors = run.communicate(timeout=120)
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_do_what_one_process_does(case: str, ranks: list[dict[str, Any]]):
    """Property 43: draws are those of one process, and what is trained beside needs no reduction of its own."""
    for ours, theirs, alone in zip(ranks[0][case], ranks[1][case], history(case, None), strict=True):
        assert ours.keys() == theirs.keys() == alone.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
            torch.testing.assert_close(tensor, alone[name], rtol=1e-9, atol=1e-11, msg=name)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
    # Gloo's threads may outlive the group on a busy machine, and abort an ordinary exit; all results are on disk.
    os._exit(0)
