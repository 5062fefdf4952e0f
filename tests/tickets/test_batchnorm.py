"""BatchNorm statistics estimated anew, against NumPy over the whole data."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.tickets import reestimate_batchnorm
from support.table import OPTIMIZERS, STORAGES


def model_of(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(1)
    body = [nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(45, 6)]
    return nn.Sequential(*body, nn.BatchNorm1d(6, momentum=momentum), nn.Linear(6, 3))


def batches(*sizes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(n, 2, 5, 5, generator=draw) * 3 + 10 * i for i, n in enumerate(sizes)]


def exact(model: nn.Module, data: list[Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and unbiased variance of all that reaches each BatchNorm while batches are normalized by their own."""
    twin, found = copy.deepcopy(model).train(), []
    stages = [(twin[:1], 1), (twin[:5], 5)]
    for stage, _ in stages:
        with torch.no_grad():
            parts = [stage(x).double() for x in data]
        x = np.concatenate([p.movedim(1, -1).reshape(-1, p.shape[1]).numpy() for p in parts])
        found.append((x.mean(0), x.var(0, ddof=1)))
    return found


@pytest.mark.parametrize("momentum", [0.1, None, 0.9])
@pytest.mark.parametrize("sizes", [(8,), (8, 8, 3), (5, 2, 16, 2)])
def test_statistics_are_those_of_all_data_together(momentum: float | None, sizes: tuple[int, ...]):
    """Property 38."""
    model, data = model_of(momentum), batches(*sizes)
    reestimate_batchnorm(model, data)
    for norm, (mean, variance) in zip((model[1], model[5]), exact(model, data), strict=True):
        np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
        assert norm.momentum == momentum and int(norm.num_batches_tracked) == len(sizes)


def test_a_large_mean_costs_no_digits():
    """Sums of squares would lose the variance; the pooled deviations keep it."""
    norm, draw = nn.BatchNorm1d(2).double(), torch.Generator().manual_seed(0)
    data = [torch.randn(n, 2, generator=draw).double() + 1e8 for n in (50, 7)]
    reestimate_batchnorm(norm, data)
    expected = np.concatenate([x.numpy() for x in data]).var(0, ddof=1)
    np.testing.assert_allclose(norm.running_var.numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_else_changes(storage: str):
    model = model_of()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = sparsify(model, optimizer, methods.rigl(0.4, until=30, interval=3), storage=storage)
    for _ in range(2):
        optimizer.zero_grad()
        model(batches(6)[0]).square().mean().backward()
        optimizer.step()
    model.train()
    model[1].eval()
    model[4].eval()
    modes = [m.training for m in model.modules()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    reestimate_batchnorm(model, batches(6, 4))
    after = model.state_dict()
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert changed == {f"{i}.running_{k}" for i in (1, 5) for k in ("mean", "var")}
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, grads[n]) and p.requires_grad for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert sparsifier.step == 2


def test_batches_may_be_pairs_or_what_forward_takes():
    data = batches(8, 3)
    models = [model_of() for _ in range(3)]
    reestimate_batchnorm(models[0], data)
    reestimate_batchnorm(models[1], [(x, torch.zeros(len(x))) for x in data])
    reestimate_batchnorm(models[2], [{"image": x} for x in data], lambda model, batch: model(batch["image"]))
    for other in models[1:]:
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in models[0].state_dict().items())


class Branches(nn.Module):
    """One norm twice, one never, one by keyword, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.keyword = (nn.BatchNorm1d(3) for _ in range(3))
        self.without = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(x) + self.twice(2 * x)
        return self.without(y + self.keyword(input=x))


def test_modules_that_run_twice_or_never():
    model, x = Branches(), torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(model.never.running_mean, 5)
    model.never.num_batches_tracked.fill_(17)
    reestimate_batchnorm(model, [x[:4], x[4:]])
    torch.testing.assert_close(model.twice.running_mean, torch.cat([x, 2 * x]).mean(0))
    torch.testing.assert_close(model.twice.running_var, torch.cat([x, 2 * x]).var(0))
    torch.testing.assert_close(model.keyword.running_mean, x.mean(0))
    assert bool((model.never.running_mean == 5).all()) and int(model.never.num_batches_tracked) == 17
    assert model.without.running_mean is None


def test_without_batchnorm_no_batch_is_drawn():
    def drawn() -> Iterator[Tensor]:
        raise AssertionError("a batch was asked for")
        yield

    reestimate_batchnorm(nn.Linear(3, 2), drawn())


def broken() -> Iterator[Tensor]:
    yield batches(4)[0]
    raise KeyError("the data ended early")


def test_errors_leave_everything_as_it_was():
    model = model_of().eval()
    reestimate_batchnorm(model, batches(7))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="no batch reached any of the 2 BatchNorm modules"):
        reestimate_batchnorm(model, [])
    with pytest.raises(KeyError, match="ended early"):
        reestimate_batchnorm(model, broken())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


RANKS = """
import sys, torch
from tickets.test_batchnorm import batches, model_of
from regrow.tickets import reestimate_batchnorm
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
model, data = model_of(), batches(8, 8, 3)
reestimate_batchnorm(model, data[:1] if rank == 0 else data[1:])
torch.save(model.state_dict(), f"{sys.argv[2]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_ranks_pool_what_they_saw(tmp_path: Path):
    tests = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent / 'src')!r}]\n{RANKS}",
    ]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    errors = [run.communicate(timeout=120)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = model_of()
    reestimate_batchnorm(alone, batches(8, 8, 3))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], tensor)
