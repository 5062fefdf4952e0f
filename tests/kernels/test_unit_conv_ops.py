"""Convolutions with weights made of units as operators: against dense ones in float64, with both derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regrow import Topology, kernels
from regrow.kernels import Geometry, Keeper, conv_ops, layout, native, reference
from regrow.kernels.activations import Operands

GEOMETRY = Geometry((2, 3), (2, 1), (1, 1), (1, 2), 2)
SIZE = (4, 7)
DENSITIES = [0.0, 0.3, 1.0]


@pytest.fixture(params=["native", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Everything here holds for the compiled kernels and for the reference."""
    if request.param == "reference":
        monkeypatch.setattr(layout, "kernels", lambda *tensors: reference)
    elif native.instruction_set() is None:
        pytest.skip("the kernels are not compiled here")
    yield request.param


def random_topology(outputs: int, density: float, filters: int = 0) -> Topology:
    """Of 2 groups of 3 input channels, by default with 2 units of filters in each."""
    whole = Topology((filters or 4 * outputs, 3, 2, 3), unit=(outputs, 1, 1, 1))
    draw = torch.Generator().manual_seed(whole.places)
    return whole.at(torch.randperm(whole.places, generator=draw)[: round(density * whole.places)].sort().values)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape) + 1)
    return torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype).requires_grad_()


def dense(topology: Topology, values: Tensor) -> Tensor:
    """The weight with its zeros, differentiable."""
    flat = values.new_zeros(topology.numel)
    return flat.index_put((topology.entries,), values.reshape(-1)[: topology.nnz]).view(topology.shape)


def dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _, stride, padding, dilation, groups = GEOMETRY
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def case(outputs: int, density: float, images: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Topology]:
    topology = random_topology(outputs, density)
    index = kernels.unit_index(topology)
    inputs = (leaf(images, 6, *SIZE), leaf(index.units + 2, 1, outputs), leaf(index.rows))
    return lambda x, v, b: kernels.conv(x, v, b, index, GEOMETRY), inputs, topology


@pytest.mark.parametrize("images", [0, 1, 3, 17])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("outputs", [8, 2, 3])
def test_conv_equals_the_dense_one(outputs: int, density: float, images: int):
    product, (x, values, bias), topology = case(outputs, density, images)
    torch.testing.assert_close(product(x, values, bias), dense_conv(x, dense(topology, values), bias))


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize(("outputs", "density"), [(8, 0.3), (2, 0.3), (4, 0.0), (2, 1.0)])
def test_conv_has_the_right_derivatives(outputs: int, density: float, images: int):
    product, inputs, _ = case(outputs, density, images)
    whole = (outputs, density, images) == (2, 0.3, 1)
    assert torch.autograd.gradcheck(product, inputs, fast_mode=not whole)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=not whole)


def test_the_inert_tail_has_no_gradient_and_no_effect():
    product, (x, values, bias), topology = case(8, 0.3, 3)
    changed = values.detach().clone()
    changed[topology.active :] = torch.nan
    assert torch.equal(product(x, changed, bias), product(x, values, bias))
    (found,) = torch.autograd.grad(product(x, values, bias).square().sum(), values)
    assert found[: topology.active].all() and not found[topology.active :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_stay_within_rounding(dtype: torch.dtype):
    """|error| <= 4 eps sqrt(terms) of the sum of magnitudes, for outputs and all gradients."""
    product, inputs, topology = case(8, 0.3, 17)
    x, values, _ = (t.detach().to(dtype).requires_grad_() for t in inputs)
    y = product(x, values, None)
    dy = leaf(*y.shape, dtype=dtype).detach()
    found = (y.detach(), *torch.autograd.grad(y, (x, values), dy))
    exact = _with_gradients(x, values, dy, topology, lambda t: t.detach().double())
    sizes = _with_gradients(x, values, dy, topology, lambda t: t.detach().double().abs())
    for mine, right, size, terms in zip(found, exact, sizes, (18, 24, 17 * 28), strict=True):
        assert mine.dtype == dtype
        assert ((mine.double() - right).abs() <= 4 * torch.finfo(dtype).eps * math.sqrt(terms) * size).all()


def _with_gradients(
    x: Tensor, values: Tensor, dy: Tensor, topology: Topology, of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    x, values = of(x).requires_grad_(), of(values).requires_grad_()
    y = dense_conv(x, dense(topology, values))
    return y.detach(), *torch.autograd.grad(y, (x, values), of(dy))


def test_operators_are_sound_for_compilers():
    """Shape rules, autograd registration and tracing, by torch's own check; gradients arrive expanded there."""
    _, inputs, topology = case(8, 0.3, 2)
    index = kernels.unit_index(topology)
    x, values, bias = (t.detach().float().requires_grad_() for t in inputs)
    dy = leaf(2, index.rows, *GEOMETRY.output(*SIZE), dtype=torch.float32)
    units = conv_ops.UNITS
    torch.library.opcheck(units.forward, (x, values, bias, GEOMETRY.ints, 0, *index))
    torch.library.opcheck(units.input_gradient, (dy, values, GEOMETRY.ints, list(x.shape), 0, *index))
    torch.library.opcheck(units.value_gradient, (x, dy, GEOMETRY.ints, index.units + 2, 0, *index))
    torch.library.opcheck(units.gradients, (x, dy, values, GEOMETRY.ints, 0, *index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("images", [0, 1, 17, 40])
def test_both_gradients_at_once_are_those_of_the_separate_operators(images: int, dtype: torch.dtype):
    _, (x, values, _), topology = case(8, 0.3, images)
    index, units = kernels.unit_index(topology), conv_ops.UNITS
    x, values = (t.detach().to(dtype) for t in (x, values))
    dy = leaf(images, index.rows, *GEOMETRY.output(*SIZE), dtype=dtype).detach()
    dx, dvalues = units.gradients(x, dy, values, GEOMETRY.ints, 0, *index)
    assert torch.equal(dx, units.input_gradient(dy, values, GEOMETRY.ints, list(x.shape), 0, *index))
    assert torch.equal(dvalues, units.value_gradient(x, dy, GEOMETRY.ints, index.units + 2, 0, *index))


def test_a_program_with_units_compiles_whole():
    product, (x, values, bias), _ = case(8, 0.3, 2)
    compiled = torch.compile(lambda *args: product(*args).square().sum(), backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(product(x, values, bias).square().sum(), (x, values, bias))
    for found, right in zip(torch.autograd.grad(compiled(x, values, bias), (x, values, bias)), eager, strict=True):
        torch.testing.assert_close(found, right)


def test_operands_that_are_not_contiguous_and_autocast():
    product, (x, values, bias), topology = case(8, 0.3, 4)
    last = x.detach().to(memory_format=torch.channels_last)
    spread = values.detach().repeat_interleave(2, 2)[..., ::2]
    torch.testing.assert_close(product(last, spread, bias), dense_conv(x, dense(topology, values), bias))
    with torch.autocast("cpu", torch.bfloat16):
        half = product(x.float(), values.float(), bias.float())
    assert torch.equal(half, product(x.bfloat16(), values.bfloat16(), bias.bfloat16()))


def test_a_keeper_sees_operands_from_which_every_gradient_can_be_had():
    _, (x, values, _), topology = case(4, 0.3, 3)
    index = kernels.unit_index(topology)
    keeper = Keeper(lambda n: None)
    y = kernels.conv(x, values, None, index, GEOMETRY, keep=keeper.key)
    (found,) = torch.autograd.grad((y**2).sum(), values)
    rows = torch.cat([keeper.rows(0, 4, index.cols), keeper.rows(4, 16, index.cols)]).view(-1)
    torch.testing.assert_close(rows[topology.entries], found[: index.units].view(-1))
    # Units of other sizes than the product's; those of 16 filters span both groups, those of 2 x 3 several channels.
    for unit in ((8, 1, 1, 1), (16, 1, 1, 1)):
        other = Topology(topology.shape, unit=unit).at(torch.tensor([0, 3, 17]))
        sampled = kernels.sampled(keeper.kept[0], kernels.unit_index(other))
        assert sampled.shape == (3, 1, unit[0])
        torch.testing.assert_close(sampled.view(-1), rows[other.entries])
    matrix = Topology((16, 18), torch.tensor([1, 4, 9]), unit=(2, 3))
    sampled = kernels.sampled(keeper.kept[0], kernels.unit_index(matrix))
    torch.testing.assert_close(sampled.view(-1), rows[matrix.entries])


def refused(match: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_what_would_read_or_write_out_of_bounds_is_refused():
    _, inputs, topology = case(8, 0.3, 2)
    x, values, bias = (t.detach() for t in inputs)
    index, units, ints = kernels.unit_index(topology), conv_ops.UNITS, GEOMETRY.ints
    dy = torch.zeros(2, index.rows, *GEOMETRY.output(*SIZE), dtype=torch.float64)

    def forward(x=x, values=values, bias=bias, ints=ints, index=index) -> Callable[[], Tensor]:
        return lambda: units.forward(x, values, bias, ints, 0, *index)

    few, count = index.units - 1, index.units
    refused(r"the input has shape \(2, 5, 4, 7\), the weight takes \(N, 6, H, W\)", forward(x[:, 1:]))
    refused(r"the input has shape \(6, 4, 7\), the weight takes", forward(x[0]))
    refused(
        rf"the values are \({few}, 1, 8\), {count} units of 8 outputs x 1 inputs take", forward(values=values[:few])
    )
    refused(r"the bias has shape \(31,\), the weight takes \(32,\)", forward(bias=bias[1:]))
    refused("got torch.float64 on cpu and torch.float32 on cpu", forward(values=values.float()))
    refused("starts are int64 and columns", forward(index=index._replace(starts=index.starts.int())))
    refused("units of 8 x 1 do not divide a weight of 32 x 17 with 6 taps", forward(index=index._replace(cols=17)))
    refused("units of 8 x 2 do not divide a weight of 32 x 18", forward(index=index._replace(inputs=2)))
    refused("units of 8 x 1 do not divide a weight of 32 x 18 .* in 3 groups", forward(ints=[*ints[:-1], 3]))
    refused("units of 8 x 1 do not divide a weight of 32 x 18 .* in 8 groups", forward(ints=[*ints[:-1], 8]))
    for broken in ([0, *ints[1:]], [*ints[:2], 0, *ints[3:]], [*ints[:4], -1, *ints[5:]], [*ints[:-1], 0]):
        refused("sizes of a convolution are at least 1, and its padding at least 0", forward(ints=broken))
    refused("an input of 4 x 2 has no output", forward(x[..., :2], ints=[*ints[:4], 0, 0, *ints[6:]]))
    refused(
        r"the output gradient has shape \(2, 31, 3, 5\), the weight takes \(2, 32, 3, 5\)",
        lambda: units.input_gradient(dy[:, 1:], values, ints, list(x.shape), 0, *index),
    )
    refused(
        r"the output gradient has shape \(2, 32, 3, 5\), the weight takes \(2, 32, 4, 5\)",
        lambda: units.input_gradient(dy, values, ints, [2, 6, 6, 7], 0, *index),
    )
    refused(
        r"the output gradient has shape \(1, 32, 3, 5\), the weight takes \(2, 32, 3, 5\)",
        lambda: units.value_gradient(x, dy[:1], ints, index.units, 0, *index),
    )
    refused(
        rf"the values are \({few}, 1, 8\), {count} units", lambda: units.value_gradient(x, dy, ints, few, 0, *index)
    )
    refused(
        rf"the values are \({few}, 1, 8\), {count} units",
        lambda: units.gradients(x, dy, values[:few], ints, 0, *index)[0],
    )


def test_has_kernels_knows_what_a_unit_of_a_convolution_is():
    eights = Topology((16, 6, 3, 3), unit=(8, 1, 1, 1))
    assert kernels.has_kernels(eights) and kernels.has_kernels(eights, 2)
    assert not kernels.has_kernels(eights, 4)
    assert kernels.has_kernels(Topology((16, 6, 3), unit=(8, 1, 1)))
    assert kernels.has_kernels(Topology((16, 6, 3, 3, 3), unit=(8, 1, 1, 1, 1)))
    assert not kernels.has_kernels(Topology((16, 6, 3, 3)))
    assert not kernels.has_kernels(Topology((16, 6, 3, 3), unit=(8, 2, 1, 1)))
    assert not kernels.has_kernels(Topology((16, 6, 3, 3), unit=(8, 1, 1, 3)))


def test_an_entry_by_itself_is_sampled_as_ever():
    operands = Operands(leaf(2, 6, *SIZE).detach(), leaf(2, 16, *GEOMETRY.output(*SIZE)).detach(), GEOMETRY)
    every = kernels.sampled(operands, kernels.index(Topology((16, 3, 2, 3))))
    units = Topology((16, 3, 2, 3), unit=(8, 1, 1, 1))
    torch.testing.assert_close(kernels.sampled(operands, kernels.unit_index(units)).view(-1), every[units.entries])
