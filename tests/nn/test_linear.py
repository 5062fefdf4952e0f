"""Sparse linear maps do what dense ones do with the same zeros."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import regrow
from regrow import kernels
from regrow.nn import SparseBilinear, SparseConv1D, SparseLinear, SparseModule
from support.twins import assert_equal, sparsified

SHAPES = [(1, 1), (7, 3), (3, 17), (33, 20)]


def make(cls: type[nn.Module], n_in: int, n_out: int, bias: bool = True) -> nn.Module:
    dense = Conv1D(n_out, n_in) if cls is Conv1D else nn.Linear(n_in, n_out, bias)
    nn.init.normal_(dense.weight)
    if dense.bias is not None:
        nn.init.normal_(dense.bias)
    return dense.double()


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equals_the_dense_one(cls: type[nn.Module], n_in: int, n_out: int, density: float) -> None:
    dense = make(cls, n_in, n_out)
    for room in (0, 5):
        sparse = sparsified(dense, density, room=room)
        for batch in [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)]:
            assert_equal(sparse, dense, torch.randn(*batch, n_in, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_bilinear_equals_the_dense_one(density: float, bias: bool) -> None:
    dense = nn.Bilinear(5, 3, 4, bias).double()
    for room in (0, 5):
        sparse = sparsified(dense, density, room=room)
        for batch in [(), (1,), (5,), (2, 3), (0,)]:
            assert_equal(sparse, dense, *(torch.randn(*batch, n, dtype=torch.float64) for n in (5, 3)))


def test_bilinear_second_derivatives() -> None:
    sparse = sparsified(nn.Bilinear(3, 2, 2).double(), 0.7)
    x, z = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradgradcheck(lambda x, z, *_: sparse(x, z).sin(), (x, z, sparse.weight, sparse.bias))


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_a_keeper_sees_the_gradient_of_a_bilinear_weight_at_every_position(density: float) -> None:
    dense = nn.Bilinear(5, 3, 4).double()
    sparse = sparsified(dense, density)
    keeper = kernels.Keeper(lambda n: None)
    sparse.keys["weight"] = keeper.key
    assert_equal(sparse, dense, *(torch.randn(7, n, dtype=torch.float64) for n in (5, 3)))
    torch.testing.assert_close(keeper.rows(0, 4, 15), dense.weight.grad.view(4, 15))
    torch.testing.assert_close(kernels.sampled(keeper.kept[0], sparse.index()), sparse.weight.grad)


def test_bilinear_layers_of_ones_own() -> None:
    layer = SparseBilinear(90, 30, 20, False, density=0.1, seed=0, dtype=torch.float64)
    assert layer.topology().nnz == 5400 and layer.bias is None
    assert 0.98 / 90**0.5 < layer.weight.abs().max() <= 1 / 90**0.5
    assert repr(layer.to_dense()) == repr(nn.Bilinear(90, 30, 20, False))
    x, z = torch.randn(2, 90, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
    torch.testing.assert_close(layer(input1=x, input2=z), layer.to_dense()(x, z))
    with pytest.raises(
        ValueError, match=r"shapes \(2, 90\) and \(3, 30\), this SparseBilinear takes \(\.\.\., 90\) and"
    ):
        layer(x, z[[0, 1, 1]])
    with pytest.raises(ValueError, match=r"shapes \(2, 30\) and \(2, 90\)"):
        layer(z, x)


def test_without_bias() -> None:
    dense = make(nn.Linear, 5, 4, bias=False)
    assert_equal(sparsified(dense, 0.5), dense, torch.randn(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
def test_inputs_of_any_layout(cls: type[nn.Module]) -> None:
    dense = make(cls, 5, 4)
    sparse = sparsified(dense, 0.5)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(sparse(x.t()), dense(x.t()))
    assert sparse(x.t()).t().is_contiguous()
    wide = torch.randn(6, 2, 15, dtype=torch.float64)[:, 0, ::3]
    torch.testing.assert_close(sparse(wide), dense(wide))


def test_second_derivatives() -> None:
    sparse = sparsified(make(nn.Linear, 3, 2), 0.7)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: sparse(x).sin(), (x, sparse.weight, sparse.bias))


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_a_keeper_sees_the_gradient_at_every_position(cls: type[nn.Module], density: float) -> None:
    dense = make(cls, 5, 4)
    sparse = sparsified(dense, density)
    keeper = kernels.Keeper(lambda n: None)
    sparse.keys["weight"] = keeper.key
    assert_equal(sparse, dense, torch.randn(3, 5, dtype=torch.float64))
    torch.testing.assert_close(keeper.rows(0, len(dense.weight), dense.weight.shape[1]), dense.weight.grad)


def test_a_new_one_is_as_sparse_as_asked() -> None:
    layer = SparseLinear(40, 30, density=0.1, seed=0)
    assert layer.weight.shape == (120,)
    assert layer.topology().nnz == int((layer.to_dense().weight != 0).sum()) == 120
    assert layer.topology().shape == (30, 40)
    again, other = SparseLinear(40, 30, density=0.1, seed=0), SparseLinear(40, 30, density=0.1, seed=1)
    assert torch.equal(layer.weight, again.weight) and layer.topology() == again.topology()
    assert layer.topology() != other.topology()
    assert SparseLinear(4, 3, False, density=1, dtype=torch.float64).to_dense().bias is None


def test_memory_goes_with_active_entries() -> None:
    layer = SparseLinear(10**6, 10**6, bias=False, density=1e-9, seed=0)
    assert layer(torch.ones(1, 10**6)).shape == (1, 10**6)
    assert sum(p.numel() for p in layer.parameters()) == 1000


def test_values_are_drawn_as_torch_draws_them() -> None:
    layer = SparseLinear(400, 300, density=0.5, seed=0)
    for parameter in layer.parameters():
        assert parameter.abs().max() <= 1 / 20
        assert parameter.abs().max() > 0.98 / 20
        assert abs(parameter.mean().item()) < 0.005
    gpt2 = sparsified(Conv1D(300, 400), 0.5)
    assert isinstance(gpt2, SparseConv1D)
    assert abs(gpt2.initial("weight")(_Counting(), 10_001).std().item() - 0.02) < 1e-4
    assert not gpt2.initial("bias")(_Counting(), 300).any()


class _Counting:
    """Stands for a stream: evenly spread over [0, 1)."""

    def uniform(self, count: int) -> object:
        return (torch.arange(count, dtype=torch.float64) / count).numpy()


def test_fan_in_initialization_keeps_the_variance_of_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 400)
    for density in (0.05, 0.3):
        layer = SparseLinear(400, 200, False, density=density, seed=0, init="fan_in")
        fan_in = layer.topology().mask.sum(1)
        bound = torch.sqrt(400 / fan_in) / math.sqrt(400)
        assert bool((layer.to_dense().weight.abs() <= bound[:, None] * (1 + 1e-6)).all())
        assert abs(layer(x).var().item() - 1 / 3) < 0.03


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_compiles_to_one_graph(density: float) -> None:
    dense = make(nn.Linear, 5, 4)
    sparse = sparsified(dense, density)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), dense(x))
    compiled(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad.view(-1)[sparse.topology().indices])


def test_compiled_code_follows_the_topology() -> None:
    sparse = SparseLinear(5, 4, density=0.5, seed=0)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5)
    before = compiled(x)
    sparse.rewire("weight", SparseLinear(5, 4, density=0.5, seed=1).topology())
    torch.testing.assert_close(compiled(x), sparse.to_dense()(x))
    assert not torch.equal(before, compiled(x))


def test_errors_say_what_is_wrong() -> None:
    layer = SparseLinear(5, 4, density=0.5)
    with pytest.raises(ValueError, match="the input has 4 features, the sparse weight takes 5"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got -0.1"):
        SparseLinear(5, 4, density=-0.1)
    with pytest.raises(ValueError, match=r"room for 10 active entries, which a topology of shape .* with 20 does not"):
        layer.rewire("weight", SparseLinear(5, 4, density=1).topology())
    with pytest.raises(ValueError, match=r"weight has shape \(4, 5\)"):
        layer.rewire("weight", SparseLinear(4, 5, density=0.5).topology())


def test_it_says_what_it_is() -> None:
    assert repr(SparseLinear(5, 4, density=0.5)) == (
        "SparseLinear(in_features=5, out_features=4, bias=True, 10 of 20 active)"
    )
    assert repr(sparsified(Conv1D(4, 5), 1.0)) == "SparseConv1D(5, 4, 20 of 20 active)"


def test_it_is_differentiable_as_a_dense_weight() -> None:
    layer: SparseModule = SparseLinear(5, 4, density=0.5)
    weight: Tensor = layer.dense()
    assert weight.shape == (4, 5)
    weight.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * layer.weight.detach())


def test_the_input_goes_by_the_name_that_torch_gives_it():
    layer = regrow.nn.SparseLinear(4, 3, density=0.5)
    conv = regrow.nn.SparseConv1d(4, 3, 1, density=0.5)
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(conv(input=x[:, :, None]), conv(x[:, :, None]))
