"""A model on the meta device becomes sparse without ever having a dense form."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow import methods, sparsify
from regrow.parts.allocation import uniform
from support.pairs import NETS, positions, require_inert_tails
from support.table import METHODS, OPTIMIZERS


class Wide(nn.Module):
    """Layers with enough entries to see how they are distributed, sparse and not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.skipped = nn.Linear(400, 300), nn.Linear(300, 200, bias=False)
        self.image, self.norm = nn.Conv2d(8, 32, 5), nn.BatchNorm2d(32)
        self.embed, self.recurrent = nn.Embedding(30, 20), nn.GRU(100, 50)
        self.attention = nn.MultiheadAttention(60, 4, add_bias_kv=True)


def wide(method: Any, device: str = "meta", **options: Any) -> tuple[Wide, Any]:
    with torch.device(device):
        model = Wide()
    options = {"skip": "skipped", "storage": "compressed", "seed": 3, **options}
    return model, sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, **options)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["rigl", "snfs", "gmp", "snip"])
def test_a_model_on_the_meta_device_trains_like_any_other(method: str, net: str):
    with torch.device("meta"):
        model = NETS[net][0]()
    before = dict(model.named_parameters())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    sparsifier = sparsify(model, optimizer, METHODS[method](), storage="compressed", allow_dense=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in before.values()}
    start = {name: p.detach().clone() for name, p in before.items()}
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, *NETS[net][1], generator=draw), torch.randint(0, 5, (16,), generator=draw)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        require_inert_tails(model, optimizer)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sparsifier.updates == {"snip": 0, "gmp": 6}.get(method, 5)
    assert all((p != start[n]).any() for n, p in before.items() if p.numel() and n != "0.bias")
    assert sum(at.numel() for at in positions(model).values()) == math.floor(0.2 * sparsifier.numel + 0.5)


def require_alike(found: Tensor, expected: Tensor) -> None:
    """Both may be drawn from one distribution, by the test of Kolmogorov and Smirnov at a level of 0.1 %."""
    a, b = found.reshape(-1).sort().values, expected.reshape(-1).sort().values
    at = torch.cat([a, b])
    gap = (torch.searchsorted(a, at, right=True) / a.numel() - torch.searchsorted(b, at, right=True) / b.numel()).abs()
    assert float(gap.max()) < 1.95 * math.sqrt(1 / a.numel() + 1 / b.numel())


def test_values_are_drawn_as_the_modules_draw_theirs():
    model, _ = wide(methods.static(0.5))
    torch.manual_seed(5)
    usual = dict(Wide().named_parameters())
    at = positions(model)
    assert len(at) == 6
    for name, parameter in model.named_parameters():
        expected = usual[name].detach()
        assert (parameter.shape == expected.shape) == (name not in at)
        if expected.unique().numel() == 1:
            assert torch.equal(parameter.detach(), expected), name
        else:
            require_alike(parameter.detach(), expected)
            assert parameter.unique().numel() > 0.99 * parameter.numel()
    assert torch.equal(model.norm.running_var, torch.ones(32)) and int(model.norm.num_batches_tracked) == 0


def test_fan_in_scales_values_to_the_connections_that_there_are():
    plain, scaled = (wide(methods.static(0.1), init=init)[0] for init in ("module", "fan_in"))
    for name, at in positions(plain).items():
        assert torch.equal(positions(scaled)[name], at)
        width = plain.get_buffer(f"{name}_t_starts").numel() - 1
        rows = at // width
        fan_in = torch.bincount(rows)[rows].double()
        expected = plain.get_parameter(name).double() * (width / fan_in).sqrt()
        torch.testing.assert_close(scaled.get_parameter(name).double(), expected, rtol=1e-6, atol=0)


def test_fan_in_needs_connections_to_scale_to():
    with pytest.raises(ValueError, match="no connections to scale values to before its first step"):
        wide(methods.snip(0.1), init="fan_in", allow_dense=True)


def test_dense_modules_are_initialized_after_what_they_hold():
    """`nn.MultiheadAttention` has the last word on the bias of its `out_proj`."""
    model, _ = wide(methods.static(0.5), skip=["skipped", "attention*"])
    assert type(model.attention) is nn.MultiheadAttention
    assert not model.attention.out_proj.bias.any() and model.attention.in_proj_weight.std() > 0.01


def test_positions_depend_on_the_seed_and_not_on_the_device():
    topologies = [wide(METHODS["static"](), device)[1].topologies for device in ("meta", "cpu")]
    other = wide(METHODS["static"](), seed=4)
    assert topologies[0] == topologies[1] != other[1].topologies
    again, once = wide(METHODS["static"](), seed=4)[0], other[0]
    at = positions(once)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in once.named_parameters() if n in at)


def test_tied_weights_are_drawn_once():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30))
    model[2].weight = model[0].weight
    sparsifier = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), methods.static(0.5), storage="compressed")
    assert model[2].weight is model[0].weight and model[0].weight.numel() == sparsifier.nnz == 450
    assert model[0].weight.abs().max() <= 1 / math.sqrt(30)


def test_an_optimizer_with_state_of_no_values_is_refused():
    """Adagrad makes its sums at once, and where they start is lost on the meta device."""
    with torch.device("meta"):
        model = nn.Linear(20, 10)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Adagrad began with state on the meta device"):
        sparsify(model, optimizer, methods.static(0.5), storage="compressed")
    assert model.weight.is_meta and type(model) is nn.Linear


def test_a_layer_may_have_no_active_entry():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    method = methods.rigl(0.0005, until=9, interval=2, allocate=uniform)
    sparsifier = sparsify(model, optimizer, method, storage="compressed")
    assert {name: t.nnz for name, t in sparsifier.topologies.items()} == {"0.weight": 10, "1.weight": 0}
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(3, 200)).square().sum().backward()
        optimizer.step()
    assert sparsifier.updates == 2 and model[1].weight.shape == (0,)


def test_masked_storage_says_that_it_needs_values():
    with pytest.raises(ValueError, match=r'first\.weight lies on the meta device.*storage="compressed"'):
        wide(methods.static(0.5), storage="masked")


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.body = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)


def test_a_module_that_does_not_say_how_it_is_initialized_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Custom())
    with pytest.raises(ValueError, match=r"^1 has scale on the meta device and no reset_parameters"):
        sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), methods.static(0.5), storage="compressed")
    assert all(p.is_meta for p in model.parameters()) and type(model[0]) is nn.Linear


HUGE = """
import resource
import torch
from torch import nn
import regrow
from regrow import methods

torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(20_000, 20_000), nn.ReLU(), nn.Linear(20_000, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
allocate = regrow.parts.allocation.uniform
method = methods.set_(0.001, until=9, interval=2, allocate=allocate)
sparsifier = regrow.sparsify(model, optimizer, method, storage="compressed")
first = sparsifier.topologies["0.weight"]
for step in range(4):
    optimizer.zero_grad()
    model(torch.ones(2, 20_000)).square().mean().backward()
    optimizer.step()
assert sparsifier.updates == 2 and sparsifier.nnz == 400_200
assert first != sparsifier.topologies["0.weight"]
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_a_huge_layer_takes_memory_for_its_connections_only():
    """Dense it takes 1.6 GB, and three times that with gradient and momentum; 400,200 connections take 10 MB."""
    path = {"PYTHONPATH": str(Path(regrow.__file__).parents[1]), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", HUGE], env=path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 200e6
