"""Sparse convolutions do what dense ones do with the same zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from regrow import kernels
from regrow.kernels import Index, UnitIndex
from regrow.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseModule
from support.twins import assert_equal, sparsified, topology

OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "bias": False},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2},
    {"kernel_size": 2, "padding": 1, "padding_mode": "replicate", "stride": 3},
]
PLANE: list[dict[str, Any]] = [
    {"kernel_size": (3, 1), "padding": (0, 2), "stride": (1, 2)},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": (1, 4), "padding": (1, 0), "padding_mode": "circular"},
]
SPACE: list[dict[str, Any]] = [
    {"kernel_size": (3, 1, 2), "padding": (2, 0, 1), "stride": (1, 2, 1)},
    {"kernel_size": (2, 3, 1), "padding": "same", "dilation": (2, 1, 1), "groups": 2},
    {"kernel_size": (1, 3, 2), "padding": (0, 1, 0), "stride": (2, 1, 1)},
    {"kernel_size": (2, 1, 1), "padding": (1, 0, 0), "dilation": (3, 1, 1), "stride": (2, 1, 1), "bias": False},
]
KINDS = [(cls, options) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for options in OPTIONS]
KINDS += [(nn.Conv2d, options) for options in PLANE] + [(nn.Conv3d, options) for options in SPACE]
SIZES = {nn.Conv1d: (9,), nn.Conv2d: (9, 7), nn.Conv3d: (5, 9, 7)}


def label(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else repr(value)


def image(cls: type[nn.Module], *batch: int) -> torch.Tensor:
    return torch.randn(*batch, 4, *SIZES[cls], dtype=torch.float64)


# Torch itself says so of an even kernel with "same" padding.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("cls", "options"), KINDS, ids=label)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equals_the_dense_one(cls: type[nn.Module], options: dict[str, Any], density: float) -> None:
    dense = cls(4, 6, **options).double()
    for room in (0, 5):
        sparse = sparsified(dense, density, room=room)
        assert_equal(sparse, dense, image(cls, 3))
        assert_equal(sparse, dense, image(cls))
    got, expected = sparse(image(cls, 0)), dense(image(cls, 0))
    assert got.shape == expected.shape
    assert sparse(image(cls, 3)).is_contiguous()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("cls", "options"), KINDS, ids=label)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("outputs", [2, 3])
def test_units_equal_the_dense_one(cls: type[nn.Module], options: dict[str, Any], density: float, outputs: int) -> None:
    """They run on units unless one would span two groups; room may be for parts of a unit."""
    dense = cls(4, 6, **options).double()
    sparse = sparsified(dense, density, room=5, outputs=outputs)
    assert isinstance(sparse.index(), UnitIndex) == (6 // options.get("groups", 1) % outputs == 0)
    assert_equal(sparse, dense, image(cls, 3))
    assert sparse(image(cls, 0)).shape == dense(image(cls, 0)).shape


@pytest.mark.parametrize("groups", [1, 2])
def test_units_of_transposed_convolutions_run_on_entries(groups: int) -> None:
    """Their rows are inputs."""
    dense = nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=groups).double()
    sparse = sparsified(dense, 0.4, outputs=2)
    assert isinstance(sparse.index(), Index)
    assert_equal(sparse, dense, image(nn.Conv2d, 3))


def test_a_rewired_convolution_of_units_gives_what_its_new_topology_says() -> None:
    dense = nn.Conv2d(4, 16, 3, padding=1).double()
    sparse, x = sparsified(dense, 0.3, room=300, outputs=8), image(nn.Conv2d, 2)
    sparse.rewire("weight", topology((16, 4, 3, 3), 0.5, 8))
    with torch.no_grad():
        sparse.weight.normal_()
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x))
    assert not torch.allclose(sparse(x), dense(x))


def test_channels_last_input() -> None:
    dense = nn.Conv2d(4, 6, 3).double()
    x = image(nn.Conv2d, 2).to(memory_format=torch.channels_last)
    assert_equal(sparsified(dense, 0.5), dense, x)


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.Conv3d])
def test_second_derivatives(cls: type[nn.Module]) -> None:
    sparse = sparsified(cls(2, 2, 2, padding=1, groups=2).double(), 0.8)
    x = torch.randn(1, 2, *[1, 2, 3][-len(SIZES[cls]) :], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: sparse(x).sin(), (x, sparse.weight, sparse.bias))


@pytest.mark.parametrize(("cls", "groups"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 1), (nn.Conv3d, 2)], ids=label)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_keeper_sees_the_gradient_at_every_position(
    cls: type[nn.Module], groups: int, density: float, outputs: int
) -> None:
    dense = cls(4, 6, 3, stride=2, padding=1, groups=groups).double()
    sparse = sparsified(dense, density, outputs=outputs)
    keeper = kernels.Keeper(lambda n: None)
    sparse.keys["weight"] = keeper.key
    assert_equal(sparse, dense, image(cls, 3))
    expected = dense.weight.grad.view(6, -1)
    torch.testing.assert_close(keeper.rows(0, 6, expected.shape[1]), expected)
    torch.testing.assert_close(keeper.rows(2, 5, expected.shape[1]), expected[2:5])
    anywhere = topology(tuple(dense.weight.shape), 0.3)
    sampled = kernels.sampled(keeper.kept[0], kernels.index(anywhere))
    torch.testing.assert_close(sampled, dense.weight.grad.view(-1)[anywhere.indices])
    units = topology(tuple(dense.weight.shape), 0.3, 3)
    sampled = kernels.sampled(keeper.kept[0], kernels.unit_index(units)).view(-1)
    torch.testing.assert_close(sampled, dense.weight.grad.view(-1)[units.entries])


@pytest.mark.parametrize("cls", [SparseConv1d, SparseConv2d, SparseConv3d])
def test_constructors_take_what_torch_takes(cls: type[SparseModule]) -> None:
    sparse = cls(4, 6, 3, 2, 1, 1, 2, False, density=0.25, seed=0, dtype=torch.float64)
    dense = cls.dense_type(4, 6, 3, 2, 1, 1, 2, False)
    assert sparse.shapes["weight"] == dense.weight.shape
    assert sparse.topology().nnz == dense.weight.numel() // 4
    assert sparse.bias is None
    assert repr(sparse.to_dense()) == repr(dense)
    x = image(cls.dense_type, 2)
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x))
    again = cls(4, 6, 3, 2, 1, 1, 2, False, density=0.25, seed=0, dtype=torch.float64)
    assert torch.equal(sparse(x), again(x))
    circular = cls(4, 6, 3, padding=1, padding_mode="circular", density=0.5, dtype=torch.float64)
    torch.testing.assert_close(circular(x), circular.to_dense()(x))
    other = circular.to_dense()
    other.padding_mode = "zeros"
    assert not torch.allclose(circular(x), other(x))


def test_values_are_drawn_as_torch_draws_them() -> None:
    layer = SparseConv2d(50, 60, 3, groups=5, density=0.5, seed=0)
    bound = 1 / 90**0.5
    for parameter in layer.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize(("density", "outputs"), [(0.4, 1), (1.0, 1), (0.4, 2), (1.0, 2)])
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=label)
def test_compiles_to_one_graph(cls: type[nn.Module], density: float, outputs: int) -> None:
    dense = cls(4, 6, 3, padding="same").double()
    sparse = sparsified(dense, density, outputs=outputs)
    torch.compiler.reset()  # which counts how often it compiles one function
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = image(cls, 2)
    torch.testing.assert_close(compiled(x), dense(x))
    compiled(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad.view(-1)[sparse.topology().entries])


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="groups=3 must divide in_channels=4 and out_channels=6"):
        SparseConv2d(4, 6, 3, groups=3, density=0.5)
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got 1.5"):
        SparseConv1d(4, 6, 3, density=1.5)
    with pytest.raises(ValueError, match="input of depth 2, padding included, is smaller than the kernel of 3"):
        SparseConv3d(4, 6, 3, density=0.5)(torch.zeros(1, 4, 2, 5, 5))
    layer = SparseConv2d(4, 6, 3, density=0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 9, 9\), this SparseConv2d takes \(N, 4, H, W\)"):
        layer(torch.zeros(2, 3, 9, 9))


def test_it_says_what_it_is() -> None:
    assert repr(SparseConv1d(4, 6, 3, density=0.5)) == (
        "SparseConv1d(4, 6, kernel_size=(3,), stride=(1,), padding=(0,), groups=1, bias=True, 36 of 72 active)"
    )
