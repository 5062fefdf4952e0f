"""Sparse transposed convolutions do what dense ones do with the same zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.core.topology import fan_in_scale
from regrow.nn import SparseConvTranspose1d, SparseConvTranspose2d, SparseConvTranspose3d, SparseModule
from support.twins import assert_equal, sparsified, topology

CLASSES = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
SIZES = {nn.ConvTranspose1d: (5,), nn.ConvTranspose2d: (5, 4), nn.ConvTranspose3d: (3, 5, 4)}
OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "bias": False},
    {"kernel_size": 2, "stride": 3, "groups": 2},
    {"kernel_size": 2, "dilation": 2, "output_padding": 1},
    {"kernel_size": 3, "stride": 2, "dilation": 4, "output_padding": 3, "padding": 2, "groups": 2},
]
PLANE: list[dict[str, Any]] = [
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (0, 2), "output_padding": (0, 1)},
    {"kernel_size": (3, 1), "dilation": (2, 1), "output_padding": (1, 0), "padding": (1, 0), "groups": 2},
]
SPACE: list[dict[str, Any]] = [
    {"kernel_size": (2, 1, 3), "stride": (3, 1, 2), "padding": (1, 0, 1), "output_padding": (2, 0, 1)},
    {"kernel_size": (3, 2, 1), "dilation": (3, 1, 1), "output_padding": (2, 0, 0), "padding": (4, 0, 0), "groups": 2},
    {"kernel_size": (1, 2, 2), "stride": (2, 1, 1), "bias": False},
]
CASES = [(cls, options) for cls in CLASSES for options in OPTIONS]
CASES += [(nn.ConvTranspose2d, options) for options in PLANE] + [(nn.ConvTranspose3d, options) for options in SPACE]


def label(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else repr(value)


def image(cls: type[nn.Module], *batch: int) -> Tensor:
    return torch.randn(*batch, 4, *SIZES[cls], dtype=torch.float64)


@pytest.mark.parametrize(("cls", "options"), CASES, ids=label)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equals_the_dense_one(cls: type[nn.Module], options: dict[str, Any], density: float) -> None:
    dense = cls(4, 6, **options).double()
    for room in (0, 5):
        sparse = sparsified(dense, density, room=room)
        assert_equal(sparse, dense, image(cls, 3))
        assert_equal(sparse, dense, image(cls))
    assert sparse(image(cls, 0)).shape == dense(image(cls, 0)).shape
    assert sparse(image(cls, 3)).is_contiguous()


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_the_size_of_the_output_may_be_asked_for(cls: type[nn.Module]) -> None:
    dense = cls(4, 6, 3, stride=3, padding=1).double()
    sparse, x = sparsified(dense, 0.5), image(cls, 2)
    least = [3 * n - 2 for n in SIZES[cls]]
    for extra in range(3):
        size = [n + (extra + i) % 3 for i, n in enumerate(least)]
        assert_equal(sparse, dense, x, output_size=size)
        assert list(sparse(x, output_size=torch.Size([2, 6, *size])).shape[2:]) == size
        assert_equal(sparse, dense, x[0], output_size=size)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="requested an output size of"):
            sparse(x, [n + wrong for n in least])


def test_channels_last_input() -> None:
    dense = nn.ConvTranspose2d(4, 6, 3).double()
    x = image(nn.ConvTranspose2d, 2).to(memory_format=torch.channels_last)
    assert_equal(sparsified(dense, 0.5), dense, x)


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_second_derivatives(cls: type[nn.Module]) -> None:
    sparse = sparsified(cls(2, 2, 2, stride=2, padding=1, groups=2, output_padding=1).double(), 0.8)
    x = torch.randn(1, 2, *[1, 2, 3][-len(SIZES[cls]) :], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: sparse(x).sin(), (x, sparse.weight, sparse.bias))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", CLASSES, ids=label)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_a_keeper_sees_the_gradient_at_every_position(cls: type[nn.Module], groups: int, density: float) -> None:
    """Its rows are inputs."""
    dense = cls(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups).double()
    sparse = sparsified(dense, density)
    keeper = kernels.Keeper(lambda n: None)
    sparse.keys["weight"] = keeper.key
    assert_equal(sparse, dense, image(cls, 3))
    expected = dense.weight.grad.view(4, -1)
    torch.testing.assert_close(keeper.rows(0, 4, expected.shape[1]), expected)
    torch.testing.assert_close(keeper.rows(1, 3, expected.shape[1]), expected[1:3])
    anywhere = topology(tuple(dense.weight.shape), 0.3)
    sampled = kernels.sampled(keeper.kept[0], kernels.index(anywhere))
    torch.testing.assert_close(sampled, dense.weight.grad.view(-1)[anywhere.indices])


@pytest.mark.parametrize("cls", [SparseConvTranspose1d, SparseConvTranspose2d, SparseConvTranspose3d])
def test_constructors_take_what_torch_takes(cls: type[SparseModule]) -> None:
    options = (4, 6, 3, 2, 1, 1, 2, False, 2)
    sparse = cls(*options, density=0.25, seed=0, dtype=torch.float64)
    dense = cls.dense_type(*options)
    assert sparse.shapes["weight"] == dense.weight.shape
    assert sparse.topology().nnz == dense.weight.numel() // 4
    assert repr(sparse.to_dense()) == repr(dense)
    x = image(cls.dense_type, 2)
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x))
    assert torch.equal(sparse(x), cls(*options, density=0.25, seed=0, dtype=torch.float64)(x))


def test_values_are_drawn_as_torch_draws_them() -> None:
    """Torch counts the entries behind the first axis, outputs here, as the fan-in."""
    layer = SparseConvTranspose2d(200, 50, 3, groups=5, density=0.5, seed=0)
    bound = 1 / 90**0.5
    for parameter in layer.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound


def test_fan_in_scales_values_to_the_inputs_that_each_output_has() -> None:
    plain, scaled = (SparseConvTranspose2d(6, 5, 3, density=0.3, seed=0, init=init) for init in ("module", "fan_in"))
    factor = fan_in_scale(plain.topology(), out_axis=1)
    torch.testing.assert_close(scaled.weight.double(), plain.weight.double() * factor, rtol=1e-6, atol=0)
    assert factor.unique().numel() > 1


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_compiles_to_one_graph(cls: type[nn.Module], density: float) -> None:
    dense = cls(4, 6, 3, stride=2, output_padding=1).double()
    sparse = sparsified(dense, density)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = image(cls, 2)
    torch.testing.assert_close(compiled(x), dense(x))
    compiled(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad.view(-1)[sparse.topology().indices])


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="groups=3 must divide in_channels=4 and out_channels=6"):
        SparseConvTranspose2d(4, 6, 3, groups=3, density=0.5)
    with pytest.raises(ValueError, match=r"takes \(N, 4, D, H, W\)"):
        SparseConvTranspose3d(4, 6, 3, density=0.5)(torch.zeros(2, 3, 5, 5, 5))
    with pytest.raises(
        ValueError, match=r"output_padding=\(1,\) must be smaller than stride=\(1,\) or dilation=\(1,\)"
    ):
        SparseConvTranspose1d(4, 6, 3, output_padding=1, density=0.5)(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="an input of depth 3 leaves nothing of an output padded by 2"):
        SparseConvTranspose3d(4, 6, 1, padding=(2, 0, 0), density=0.5)(torch.zeros(1, 4, 3, 2, 2))


def test_it_says_what_it_is() -> None:
    assert repr(SparseConvTranspose1d(4, 6, 3, density=0.5)) == (
        "SparseConvTranspose1d(4, 6, kernel_size=(3,), stride=(1,), padding=(0,), groups=1, bias=True, "
        "36 of 72 active, output_padding=(0,))"
    )
