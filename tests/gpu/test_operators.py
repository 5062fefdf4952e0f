"""The operators on weights made of units, on the programs for GPUs: derivatives, layouts and whole trainings."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow import Topology, kernels, methods
from regrow.kernels import UnitIndex, layout, reference
from regrow.nn import SparseLinear
from regrow.parts import blocks, groups
from support.units import Unit, unit_index

WHY = "Triton is an extra: make test-gpu installs it"
gpu: Any = pytest.importorskip("regrow.kernels.gpu", reason=WHY)
triton: Any = pytest.importorskip("triton", reason=WHY)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DERIVED = [Unit(8), Unit(2, 16), Unit(3, 2), Unit(16, 16)]


def feature_major(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensors on a GPU meet; and float64, which the interpreter sums as exactly as `gradcheck` needs."""
    monkeypatch.setattr(layout, "kernels", lambda *tensors: gpu)
    monkeypatch.setattr(layout, "for_units", feature_major)
    if DEVICE.type == "cpu":
        monkeypatch.setitem(gpu.SUMS, torch.float64, triton.language.float64)


def random_index(unit: Unit, rows: int = 3, cols: int = 4, count: int = 5) -> UnitIndex:
    draw = torch.Generator().manual_seed(0)
    places = torch.randperm(rows * cols, generator=draw)[:count].sort().values
    index = unit_index(Topology((rows, cols), places), unit)
    return index._replace(starts=index.starts.to(DEVICE), columns=index.columns.to(DEVICE))


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("unit", DERIVED, ids=str)
def test_linear_has_the_right_derivatives(unit: Unit, transposed: bool):
    index = random_index(unit)
    inner, outer = (index.rows, index.cols) if transposed else (index.cols, index.rows)
    inputs = leaf(3, inner), leaf(index.units + 1, unit.inputs, unit.outputs), leaf(outer)

    def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear(x, values, bias, index, transposed=transposed)

    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=True)


@pytest.mark.parametrize("unit", DERIVED, ids=str)
def test_activations_are_converted_once_and_come_in_the_layout_they_had(unit: Unit, monkeypatch: pytest.MonkeyPatch):
    seen = []
    for name in ("unit_spmm", "unit_sddmm"):
        right = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, right=right: (seen.append(a[:2]), right(*a))[1])
    index = random_index(unit)
    values = leaf(index.units, unit.inputs, unit.outputs, dtype=torch.float32)
    for x in (leaf(3, index.cols, dtype=torch.float32), feature_major(leaf(3, index.cols, dtype=torch.float32))):
        y = kernels.linear(x, values, None, index)
        assert layout.is_feature_major(y) == layout.is_feature_major(x)
        torch.autograd.grad(y, (x, values), torch.randn(3, index.rows, device=DEVICE))
    (x, _), (dy, _), (same_x, same_dy), *_ = seen
    assert len(seen) == 6
    assert all(layout.is_feature_major(t) for t in (x, dy))
    assert (x.data_ptr(), dy.data_ptr()) == (same_x.data_ptr(), same_dy.data_ptr())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_topology_has_one_plan_until_it_is_rewired(compiled: bool, monkeypatch: pytest.MonkeyPatch):
    """The same tensors reach the programs in every step, so that what follows from them is made once."""
    made, plan = [], gpu._plan
    monkeypatch.setattr(gpu, "_plan", lambda index: (made.append(index), plan(index))[1])
    layer = sparse_layer([1, 2, 4])
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for _ in range(3):
        forward(leaf(2, 3, dtype=torch.float32)).sum().backward()
    assert len(made) == 1
    layer.rewire("weight", Topology((16, 3), torch.tensor([0, 3, 5]), (8, 1)))
    x = leaf(2, 3, dtype=torch.float32)
    forward(x).sum().backward()
    assert len(made) == 2
    torch.testing.assert_close(x.grad, layer.to_dense().weight.sum(0).expand(2, 3))


def sparse_layer(places: list[int]) -> SparseLinear:
    topology = Topology((16, 3), torch.tensor(places), (8, 1))
    values = nn.Parameter(torch.randn(topology.nnz, device=DEVICE))
    return SparseLinear.adopt(nn.Linear(3, 16, bias=False, device=DEVICE), {"weight": (values, topology)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_leading_axes_and_no_batch(dtype: torch.dtype):
    index = random_index(Unit(8))
    values, bias = leaf(index.units, 1, 8, dtype=dtype), leaf(index.rows, dtype=dtype)
    x = leaf(2, 3, index.cols, dtype=dtype)
    y = kernels.linear(x, values, bias, index)
    right = torch.empty(6, index.rows, dtype=dtype, device=DEVICE)
    reference.unit_spmm(x.detach().view(6, -1), values.detach(), bias.detach(), index, False, right)
    torch.testing.assert_close(y.view(6, -1), right)
    assert kernels.linear(x[:0], values, bias, index).shape == (0, 3, index.rows)


def train(structure: Any, dtype: torch.dtype) -> tuple[list[float], dict[str, Topology]]:
    """Losses of a short training in compressed storage, and the topologies it ends with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).to(DEVICE, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = methods.rigl(0.4, until=12, interval=3, structure=structure)
    sparsifier = regrow.sparsify(model, optimizer, method, storage="compressed")
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(12):
        x = torch.randn(20, 24, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :16].tanh()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, sparsifier.topologies


@pytest.mark.parametrize("structure", [groups(8), blocks(16, 8)], ids=["groups", "blocks"])
def test_a_training_is_that_of_the_reference(structure: Any, monkeypatch: pytest.MonkeyPatch):
    """In float64 in the interpreter; on a card, where only losses can be compared, in float32."""
    dtype = torch.float64 if DEVICE.type == "cpu" else torch.float32
    losses, topologies = train(structure, dtype)
    monkeypatch.setattr(layout, "kernels", lambda *tensors: reference)
    right, expected = train(structure, dtype)
    assert losses == pytest.approx(right, rel=1e-9 if dtype == torch.float64 else 1e-3)
    assert right[-1] < right[0]
    if dtype == torch.float64:
        assert {n: t.positions.tolist() for n, t in topologies.items()} == {
            n: t.positions.tolist() for n, t in expected.items()
        }


def test_the_programs_stand_in_for_the_whole_reference():
    """What an operator may ask for is there, with the same parameters."""
    public = {name: f for name, f in vars(reference).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert set(public) == set(gpu.__all__)
    for name, function in public.items():
        assert inspect.signature(getattr(gpu, name)) == inspect.signature(function)
