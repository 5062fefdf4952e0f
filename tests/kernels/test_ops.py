"""Operators on sparse weights: against dense products in float64, with first and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regrow import Topology, kernels
from regrow.kernels import Geometry, Index, Keeper, conv_ops, layout, native, ops, reference

DENSITIES = [0.0, 0.3, 1.0]
BATCHES = [0, 1, 3, 17]
GEOMETRY = Geometry((2, 3), (2, 1), (1, 1), (1, 2), 2)


@pytest.fixture(params=["native", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Everything here holds for the compiled kernels and for the reference."""
    if request.param == "reference":
        monkeypatch.setattr(layout, "kernels", lambda *tensors: reference)
    elif native.instruction_set() is None:
        pytest.skip("the kernels are not compiled here")
    yield request.param


def random_topology(shape: tuple[int, ...], density: float) -> Topology:
    """Uniform positions; at the densities above some rows and columns are empty."""
    numel = math.prod(shape)
    draw = torch.Generator().manual_seed(numel)
    return Topology(shape, torch.randperm(numel, generator=draw)[: round(density * numel)].sort().values)


def dense(topology: Topology, values: Tensor) -> Tensor:
    """The weight with its zeros, differentiable."""
    flat = values.new_zeros(topology.numel)
    return flat.index_put((topology.indices,), values[: topology.nnz]).view(topology.shape)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape) + 1)
    return torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype).requires_grad_()


def require_derivatives(product: Callable[..., Tensor], inputs: tuple[Tensor, ...], whole: bool):
    """First and second derivatives, along random directions, or entry by entry where `whole`, which is slow."""
    assert torch.autograd.gradcheck(product, inputs, fast_mode=not whole)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=not whole)


def linear_case(
    density: float, batch: int, transposed: bool
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Topology]:
    topology = random_topology((5, 7), density)
    index = kernels.index(topology)
    inner, outer = (5, 7) if transposed else (7, 5)
    inputs = (leaf(batch, inner), leaf(topology.nnz + 2), leaf(outer))
    return lambda x, v, b: kernels.linear(x, v, b, index, transposed=transposed), inputs, topology


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("density", DENSITIES)
def test_linear_equals_the_dense_product(density: float, batch: int, transposed: bool):
    product, (x, values, bias), topology = linear_case(density, batch, transposed)
    weight = dense(topology, values)
    torch.testing.assert_close(product(x, values, bias), F.linear(x, weight.t() if transposed else weight, bias))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("density", DENSITIES)
def test_linear_has_the_right_derivatives(density: float, batch: int, transposed: bool):
    product, inputs, _ = linear_case(density, batch, transposed)
    require_derivatives(product, inputs, whole=batch == 3)


def conv_case(density: float, batch: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Topology]:
    topology = random_topology((4, 3, 2, 3), density)
    index = kernels.index(topology)
    inputs = (leaf(batch, 6, 4, 7), leaf(topology.nnz + 2), leaf(4))
    return lambda x, v, b: kernels.conv(x, v, b, index, GEOMETRY), inputs, topology


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("density", DENSITIES)
def test_conv_equals_the_dense_one(density: float, batch: int):
    product, (x, values, bias), topology = conv_case(density, batch)
    y = F.conv2d(
        x, dense(topology, values), bias, GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation, GEOMETRY.groups
    )
    torch.testing.assert_close(product(x, values, bias), y)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("density", DENSITIES)
def test_conv_has_the_right_derivatives(density: float, batch: int):
    product, inputs, _ = conv_case(density, batch)
    require_derivatives(product, inputs, whole=(density, batch) == (0.3, 1))


def transposed_case(density: float, batch: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Topology]:
    """One more output row than the input asks for, as with output_padding."""
    topology = random_topology((6, 2, 2, 3), density)
    index = kernels.index(topology)
    inputs = (leaf(batch, 6, 4, 7), leaf(topology.nnz + 2))
    return lambda x, v: kernels.conv_transpose(x, v, index, GEOMETRY, (7, 9)), inputs, topology


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("density", DENSITIES)
def test_conv_transpose_equals_the_dense_one(density: float, batch: int):
    product, (x, values), topology = transposed_case(density, batch)
    _, stride, padding, dilation, groups = GEOMETRY
    y = F.conv_transpose2d(x, dense(topology, values), None, stride, padding, (1, 0), groups, dilation)
    torch.testing.assert_close(product(x, values), y)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("density", DENSITIES)
def test_conv_transpose_has_the_right_derivatives(density: float, batch: int):
    product, inputs, _ = transposed_case(density, batch)
    require_derivatives(product, inputs, whole=(density, batch) == (0.3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("density", "batch"), [(0.05, 33), (0.5, 17), (1.0, 3)])
def test_other_dtypes_stay_within_rounding(density: float, batch: int, dtype: torch.dtype):
    """|error| <= 4 eps sqrt(terms) of the sum of magnitudes, for outputs and all gradients."""
    topology = random_topology((60, 90), density)
    index = kernels.index(topology)
    x, values = leaf(batch, 90, dtype=dtype), leaf(topology.nnz, dtype=dtype)
    dy = leaf(batch, 60, dtype=dtype).detach()
    y = kernels.linear(x, values, None, index)
    dx, dvalues = torch.autograd.grad(y, (x, values), dy)
    wide_x, wide_dy, weight = x.detach().double(), dy.double(), dense(topology, values.detach().double())
    exact = [
        (y, wide_x @ weight.t(), wide_x.abs() @ weight.abs().t(), 90),
        (dx, wide_dy @ weight, wide_dy.abs() @ weight.abs(), 60),
        (dvalues, at(topology, wide_dy.t() @ wide_x), at(topology, wide_dy.abs().t() @ wide_x.abs()), batch),
    ]
    for found, right, size, terms in exact:
        assert found.dtype == dtype
        assert ((found.detach().double() - right).abs() <= 4 * torch.finfo(dtype).eps * math.sqrt(terms) * size).all()


def at(topology: Topology, full: Tensor) -> Tensor:
    return full.reshape(-1)[topology.indices]


def test_operators_are_sound_for_compilers():
    """Shape rules, autograd registration and tracing, by torch's own check; gradients arrive expanded there."""
    index = kernels.index(random_topology((5, 7), 0.4))
    values, x, dy, bias = (leaf(*s, dtype=torch.float32) for s in ((index.nnz + 2,), (3, 7), (3, 5), (5,)))
    torch.library.opcheck(ops._spmm, (x, values, bias, False, False, 0, *index))
    torch.library.opcheck(ops._spmm, (dy, values, None, True, True, 0, *index))
    torch.library.opcheck(ops._sddmm, (x, dy, index.nnz + 2, 0, *index))
    torch.library.opcheck(ops._gradients, (x, dy, values, False, False, 0, *index))
    index = kernels.index(random_topology((4, 3, 2, 3), 0.4))
    values, x = leaf(index.nnz, dtype=torch.float32), leaf(2, 6, 4, 7, dtype=torch.float32)
    dy = leaf(2, 4, *GEOMETRY.output(4, 7), dtype=torch.float32)
    torch.library.opcheck(conv_ops.ENTRIES.forward, (x, values, None, GEOMETRY.ints, 0, *index))
    torch.library.opcheck(conv_ops.ENTRIES.input_gradient, (dy, values, GEOMETRY.ints, [2, 6, 4, 7], 0, *index))
    torch.library.opcheck(conv_ops.ENTRIES.value_gradient, (x, dy, GEOMETRY.ints, index.nnz, 0, *index))
    torch.library.opcheck(conv_ops.ENTRIES.gradients, (x, dy, values, GEOMETRY.ints, 0, *index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 8, 9, 40, 300])
def test_both_gradients_at_once_are_those_of_the_separate_operators(batch: int, transposed: bool, dtype: torch.dtype):
    index = kernels.index(random_topology((50, 70), 0.2))
    features, others = (50, 70) if transposed else (70, 50)
    x, values = leaf(batch, features, dtype=dtype).detach(), leaf(index.nnz + 2, dtype=dtype).detach()
    for dy in (leaf(batch, others, dtype=dtype).detach(), leaf(others, batch, dtype=dtype).detach().t()):
        for feature_major in (False, True):
            dx, dvalues = ops._gradients(x, dy, values, transposed, feature_major, 0, *index)
            alone = ops._spmm(dy, values, None, not transposed, feature_major, 0, *index)
            operands = (dy, x) if transposed else (x, dy)
            assert torch.equal(dx, alone) and dx.stride() == alone.stride()
            assert torch.equal(dvalues, ops._sddmm(*operands, index.nnz + 2, 0, *index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("images", [0, 1, 17, 40])
def test_both_gradients_of_a_convolution_at_once_are_those_of_the_separate_operators(images: int, dtype: torch.dtype):
    index, products = kernels.index(random_topology((4, 3, 2, 3), 0.4)), conv_ops.ENTRIES
    x, values = leaf(images, 6, 9, 11, dtype=dtype).detach(), leaf(index.nnz + 2, dtype=dtype).detach()
    dy = leaf(images, 4, *GEOMETRY.output(9, 11), dtype=dtype).detach()
    dx, dvalues = products.gradients(x, dy, values, GEOMETRY.ints, 0, *index)
    assert torch.equal(dx, products.input_gradient(dy, values, GEOMETRY.ints, list(x.shape), 0, *index))
    assert torch.equal(dvalues, products.value_gradient(x, dy, GEOMETRY.ints, index.nnz + 2, 0, *index))


@pytest.mark.parametrize("fixed", ["x", "values"])
def test_a_gradient_that_nobody_asks_for_is_not_computed(fixed: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise AssertionError

    index = kernels.index(random_topology((5, 7), 0.4))
    operands = {"x": leaf(3, 7), "values": leaf(index.nnz)}
    y = kernels.linear(
        **{name: t.detach() if name == fixed else t for name, t in operands.items()}, bias=None, index=index
    )
    other = operands["x" if fixed == "values" else "values"]
    for module in (native, reference):
        monkeypatch.setattr(module, "backward", refuse)
        monkeypatch.setattr(module, "sddmm" if fixed == "values" else "spmm", refuse)
    (found,) = torch.autograd.grad(y.sum(), other)
    assert found.isfinite().all()


def test_layout_travels():
    """A feature-major input gives a feature-major output and gets a feature-major gradient; others stay batch-major."""
    index = kernels.index(random_topology((5, 7), 0.4))
    values = leaf(index.nnz)
    for x in (leaf(3, 7), leaf(7, 3).detach().t().requires_grad_()):
        y = kernels.linear(x, values, None, index)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.is_contiguous() == dx.is_contiguous() == x.is_contiguous()
        assert y.t().is_contiguous() == dx.t().is_contiguous() == x.t().is_contiguous()


def test_leading_dimensions_and_autocast():
    index = kernels.index(random_topology((5, 7), 0.4))
    values, x = leaf(index.nnz, dtype=torch.float32), leaf(2, 3, 7, dtype=torch.float32)
    y = kernels.linear(x, values, None, index)
    torch.testing.assert_close(y.view(6, 5), kernels.linear(x.view(6, 7), values, None, index))
    with torch.autocast("cpu", torch.bfloat16):
        half = kernels.linear(x, values, None, index)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_refused():
    index = kernels.index(random_topology((5, 7), 0.4))
    values = leaf(index.nnz)
    with pytest.raises(ValueError, match="the input has 5 features, the sparse weight takes 7"):
        kernels.linear(leaf(3, 5), values, None, index)
    with pytest.raises(ValueError, match=r"the input is torch.float32, the sparse weight torch.float64: convert them"):
        kernels.linear(leaf(3, 7, dtype=torch.float32), values, None, index)
    conv = kernels.index(random_topology((4, 3, 2, 3), 0.4))
    with pytest.raises(ValueError, match=r"takes \(N, 6, H, W\)"):
        kernels.conv(leaf(2, 3, 4, 7), leaf(conv.nnz), None, conv, GEOMETRY)


@pytest.mark.parametrize("density", DENSITIES)
def test_index_is_the_transposed_one(density: float):
    topology = random_topology((6, 4), density)
    index: Index = kernels.index(topology)
    values = torch.arange(1.0, index.nnz + 1, dtype=torch.float64)
    transposed = Topology.from_rows((4, 6), index.t_starts, index.t_rows)
    assert torch.equal(dense(transposed, values[index.order.long()]), dense(topology, values).t())


def test_a_keeper_sees_operands_from_which_every_gradient_can_be_had():
    full = random_topology((5, 7), 1.0)
    topology = random_topology((5, 7), 0.4)
    index = kernels.index(topology)
    x, values = leaf(3, 7), leaf(topology.nnz)
    keeper = Keeper(lambda n: None)
    y = kernels.linear(x, values, None, index, keep=keeper.key)
    (found,) = torch.autograd.grad((y**2).sum(), values)
    rows = torch.cat([keeper.rows(0, 2, 7), keeper.rows(2, 5, 7)])
    torch.testing.assert_close(at(topology, rows), found)
    torch.testing.assert_close(kernels.sampled(keeper.kept[0], kernels.index(full)).view(5, 7), rows)
    assert keeper.nbytes == 8 * (3 * 7 + 3 * 5)


def test_a_keeper_sees_convolutions_too():
    topology = random_topology((4, 3, 2, 3), 0.4)
    index = kernels.index(topology)
    x, values = leaf(2, 6, 4, 7), leaf(topology.nnz)
    keeper = Keeper(lambda n: None)
    y = kernels.conv(x, values, None, index, GEOMETRY, keep=keeper.key)
    (found,) = torch.autograd.grad((y**2).sum(), values)
    rows = torch.cat([keeper.rows(0, 1, 18), keeper.rows(1, 3, 18), keeper.rows(3, 4, 18)])
    torch.testing.assert_close(at(topology, rows), found)


def test_a_keeper_sees_transposed_convolutions_too_and_their_second_derivatives():
    """Rows are inputs there. What a gradient penalty adds arrives as well."""
    topology = random_topology((6, 2, 2, 3), 0.4)
    index = kernels.index(topology)
    x, values = leaf(2, 6, 4, 7), leaf(topology.nnz)
    keeper = Keeper(lambda n: None)
    y = kernels.conv_transpose(x, values, index, GEOMETRY, (7, 9), keep=keeper.key)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    keeper.kept.clear()
    (found,) = torch.autograd.grad((dx**2).sum(), values)
    rows = torch.cat([keeper.rows(0, 1, 12), keeper.rows(1, 4, 12), keeper.rows(4, 6, 12)])
    assert len(keeper.kept) == 2
    torch.testing.assert_close(at(topology, rows), found)


def test_an_output_that_no_convolution_takes_to_the_input_is_refused():
    index = kernels.index(random_topology((6, 2, 2, 3), 0.4))
    values = leaf(index.nnz)
    with pytest.raises(ValueError, match=r"takes \(N, 6, H, W\)"):
        kernels.conv_transpose(leaf(2, 5, 4, 7), values, index, GEOMETRY, (7, 9))
    with pytest.raises(ValueError, match=r"an output of 9 x 9 does not belong to an input of 4 x 7, with a kernel of"):
        kernels.conv_transpose(leaf(2, 6, 4, 7), values, index, GEOMETRY, (9, 9))


def test_an_image_smaller_than_the_kernel_is_refused():
    index = kernels.index(random_topology((4, 3, 3, 3), 0.4))
    with pytest.raises(ValueError, match=r"input of 2 x 2, padded by \(0, 0\), is smaller than the kernel of \(3, 3\)"):
        kernels.conv(leaf(1, 3, 2, 2), leaf(index.nnz), None, index, Geometry((3, 3)))


def test_autocast_leaves_float64_alone():
    index = kernels.index(random_topology((5, 7), 0.4))
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(leaf(3, 7), leaf(index.nnz), None, index).dtype == torch.float64
