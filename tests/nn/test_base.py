"""What holds for every sparse module: copies, states, types, and which dense modules have one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from regrow.core.topology import Topology
from regrow.nn import (
    SparseConv2d,
    SparseConv3d,
    SparseGRU,
    SparseLinear,
    SparseModule,
    SparseMultiheadAttention,
    from_dense,
    kind_of,
    sparse_class,
)
from regrow.nn.kinds import KINDS
from support.twins import sparsified, tensors, topology

Make = Callable[[], nn.Module]

CASES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "Conv1D": (lambda: Conv1D(4, 5), (3, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, (2, 3, 2), (2, 1, 1), groups=2), (2, 4, 5, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 3, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, (2, 3, 2), (2, 1, 1)), (2, 4, 3, 4, 3)),
    "Bilinear": (lambda: nn.Bilinear(5, 3, 4), (3, 5)),
    "RNN": (lambda: nn.RNN(5, 4, bidirectional=True), (3, 2, 5)),
    "GRU": (lambda: nn.GRU(5, 4, 2), (3, 2, 5)),
    "LSTM": (lambda: nn.LSTM(5, 4, batch_first=True), (3, 2, 5)),
    "RNNCell": (lambda: nn.RNNCell(5, 4), (2, 5)),
    "GRUCell": (lambda: nn.GRUCell(5, 4), (2, 5)),
    "LSTMCell": (lambda: nn.LSTMCell(5, 4), (2, 5)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2), (3, 2, 6)),
    "MultiheadAttention, separate": (lambda: nn.MultiheadAttention(6, 2, kdim=6, vdim=5), (3, 2, 6)),
}
every = pytest.mark.parametrize("case", CASES)


def pair(case: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, SparseModule]:
    dense = CASES[case][0]().to(dtype)
    return dense, sparsified(dense, 0.5, room=2)


def run(case: str, module: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(CASES[case][1]).to(dtype)
    if case == "MultiheadAttention, separate":
        return tensors(module(x, x, x[..., :5].contiguous()))
    if case == "Bilinear":
        return tensors(module(x, torch.randn(3, 3).to(dtype)))
    return tensors(module(x, x, x) if "Attention" in case else module(x))


def weights(module: nn.Module) -> list[str]:
    """The names of the weights of a dense module."""
    kind = kind_of(type(module))
    assert kind is not None
    return list(kind.weights_of(module))


def same(one: nn.Module, other: nn.Module, case: str) -> bool:
    return all(torch.equal(a, b) for a, b in zip(run(case, one), run(case, other), strict=True))


@every
def test_there_and_back_nothing_is_lost(case: str) -> None:
    dense = CASES[case][0]().double()
    for zeroed in (False, True):
        if zeroed:
            with torch.no_grad():
                for name in weights(dense):
                    getattr(dense, name).view(-1)[::2] = 0
        before = copy.deepcopy(dense.state_dict())
        sparse = from_dense(dense)
        for name in weights(dense):
            assert getattr(sparse, name).numel() == int(getattr(dense, name).count_nonzero())
        back = sparse.eval().to_dense()
        assert type(back) is type(dense) and not back.training
        assert list(back.state_dict()) == list(before)
        assert vars(back).keys() == vars(dense).keys()
        for name, tensor in before.items():
            assert torch.equal(back.state_dict()[name], tensor)
            assert torch.equal(dense.state_dict()[name], tensor)
        assert type(sparse) is sparse_class(dense)
        assert same(back, dense.eval(), case)
        dense.train()


@every
def test_from_dense_keeps_given_topologies_and_frozen_weights(case: str) -> None:
    dense = CASES[case][0]()
    name = weights(dense)[-1]
    parameter = getattr(dense, name).requires_grad_(False)
    given = topology(tuple(parameter.shape), 0.5)
    sparse = from_dense(dense, {name: given})
    assert sparse.topology(name) == given
    assert not getattr(sparse, name).requires_grad
    assert not getattr(sparse.to_dense(), name).requires_grad
    expected = torch.where(given.mask, parameter, 0)
    assert torch.equal(getattr(sparse.to_dense(), name), expected)


@every
def test_a_state_dict_brings_its_topology(case: str) -> None:
    _, one = pair(case)
    other = copy.deepcopy(one)
    for name, shape in one.shapes.items():
        nnz = one.topology(name).nnz
        moved = torch.randperm(one.topology(name).numel)[:nnz].sort().values
        other.rewire(name, Topology(shape, moved))
        assert other.topology(name) != one.topology(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    assert not same(one, other, case)
    other.load_state_dict(_reloaded(one.state_dict(), weights_only=True))
    assert same(one, other, case)
    for name in one.shapes:
        assert other.topology(name) == one.topology(name)
        for mine, theirs in zip(other.index(name), one.index(name), strict=True):
            assert torch.equal(mine, theirs)


def _reloaded(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@every
def test_the_state_holds_values_and_topology_only(case: str) -> None:
    dense, sparse = pair(case)
    expected = set(dense.state_dict()) | {f"{n}_{field}" for n in sparse.shapes for field in ("starts", "columns")}
    assert set(sparse.state_dict()) == expected
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in dense.named_parameters()]


@every
def test_copies_are_their_own(case: str) -> None:
    _, sparse = pair(case)
    sparse.keys[next(iter(sparse.shapes))] = 7
    for twin in (copy.deepcopy(sparse), _reloaded(sparse, weights_only=False)):
        assert not twin.keys
        assert type(twin) is type(sparse)
        assert twin.dense_type is sparse.dense_type
        sparse.keys.clear()
        assert same(twin, sparse, case)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert not same(twin, sparse, case)
        sparse.keys[next(iter(sparse.shapes))] = 7


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Torch says so of its own recurrent layers.
@pytest.mark.filterwarnings("ignore:.*not supported with oneDNN:UserWarning")
def test_types(case: str, dtype: torch.dtype) -> None:
    dense, sparse = pair(case)
    dense, sparse = dense.to(dtype), sparse.to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    for ours, theirs in zip(run(case, sparse, dtype), run(case, dense, dtype), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    sum(o.sum() for o in run(case, sparse, dtype)).backward()
    for parameter in sparse.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
    assert all(sparse.index(name).columns.dtype == torch.int32 for name in sparse.shapes)


@every
def test_autocast(case: str) -> None:
    dense, sparse = pair(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(case, sparse, torch.float32)
        sum(o.float().sum() for o in ours).backward()
    for mine, theirs in zip(ours, run(case, dense, torch.float32), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0.04, atol=0.04)
        assert not torch.allclose(mine.float(), theirs, rtol=1e-6, atol=1e-6)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sparse.parameters())


@every
def test_capacity_beyond_the_active_entries_is_inert(case: str) -> None:
    _, sparse = pair(case)
    before = run(case, sparse)
    with torch.no_grad():
        for name in sparse.shapes:
            getattr(sparse, name)[sparse.index(name).nnz :] = 1e6
    for ours, theirs in zip(run(case, sparse), before, strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_that_does_not_fit_is_refused() -> None:
    layer = SparseLinear(5, 4, density=0.5, seed=0)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["weight_columns"][0] = 5
    with pytest.raises(RuntimeError, match=r"weight: columns of a weight of shape \(4, 5\) must ascend"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight: weight has shape .* room for 10 .* with 20 does not fit"):
        layer.load_state_dict(SparseLinear(5, 4, density=1).state_dict())


def test_every_dense_class_has_its_own_sparse_one() -> None:
    """And every one of them goes through this file."""
    ours = [row for row in KINDS.values() if isinstance(row.dense, str) or row.dense.__module__.startswith("torch.")]
    rows = {row.name: row.sparse for row in ours if row.sparse is not None}
    made = [make() for make, _ in CASES.values()]
    assert {type(dense).__name__: sparse_class(dense) for dense in made} == rows
    assert len(set(rows.values())) == len(rows)
    assert all(cls.dense_type.__name__ == name for name, cls in rows.items() if name != "Conv1D")


def test_which_modules_have_a_sparse_class() -> None:
    class Named(nn.GRU):
        pass

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Scaled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    computed = parametrize.register_parametrization(nn.Linear(2, 2), "bias", nn.ReLU())
    assert sparse_class(Named(2, 2)) is SparseGRU
    assert sparse_class(nn.MultiheadAttention(2, 1).out_proj) is SparseLinear
    assert sparse_class(nn.MultiheadAttention(2, 1)) is SparseMultiheadAttention
    assert sparse_class(nn.Conv2d(1, 1, 1)) is SparseConv2d
    assert sparse_class(nn.LazyConv3d(1, 1)) is SparseConv3d
    others = [Doubled(2, 2), Standardized(1, 1, 1), Scaled(2, 2), patched, computed]
    others += [nn.LayerNorm(2), nn.RNNBase("GRU", 2, 2), nn.Embedding(2, 2)]
    assert [sparse_class(module) for module in others] == [None] * len(others)


def test_a_subclass_comes_back_as_itself() -> None:
    class Named(nn.GRU):
        pass

    dense = Named(3, 2)
    sparse = from_dense(dense)
    assert type(sparse) is SparseGRU
    assert type(sparse.to_dense()) is Named
    assert not hasattr(sparse.to_dense(), "dense_type")
