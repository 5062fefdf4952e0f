"""Operators on weights made of units: against dense products in float64, with first and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regrow import Topology, kernels
from regrow.kernels import Keeper, UnitIndex, layout, native, reference
from regrow.kernels.unit_ops import unit_gradients, unit_sddmm, unit_spmm
from support.units import Unit, of_grid, unit_index

UNITS = [Unit(8), Unit(2, 3), Unit(3, 2), Unit(4, 4), Unit(1, 4), Unit(16)]
BATCHES = [0, 1, 3, 17]
DENSITIES = [0.0, 0.4, 1.0]


@pytest.fixture(params=["native", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Everything here holds for the compiled kernels and for the reference."""
    if request.param == "reference":
        monkeypatch.setattr(layout, "kernels", lambda *tensors: reference)
    elif native.instruction_set() is None:
        pytest.skip("the kernels are not compiled here")
    yield request.param


def random_grid(density: float, rows: int = 4, cols: int = 5) -> Topology:
    draw = torch.Generator().manual_seed(rows * cols)
    count = round(density * rows * cols)
    return Topology((rows, cols), torch.randperm(rows * cols, generator=draw)[:count].sort().values)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape) + 1)
    return torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype).requires_grad_()


def dense(grid: Topology, unit: Unit, values: Tensor) -> Tensor:
    """The weight with its zeros, differentiable."""
    units = values.new_zeros(grid.numel, unit.inputs, unit.outputs)
    units = units.index_put((grid.indices,), values[: grid.nnz])
    return unit.join(units.view(*grid.shape, unit.inputs, unit.outputs))


def at(grid: Topology, unit: Unit, full: Tensor) -> Tensor:
    return unit.split(full)[grid.mask]


def case(
    unit: Unit, density: float, batch: int, transposed: bool
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Topology]:
    grid = random_grid(density)
    index = unit_index(grid, unit)
    inner, outer = (index.rows, index.cols) if transposed else (index.cols, index.rows)
    inputs = (leaf(batch, inner), leaf(index.units + 2, unit.inputs, unit.outputs), leaf(outer))
    return lambda x, v, b: kernels.linear(x, v, b, index, transposed=transposed), inputs, grid


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_linear_equals_the_dense_product(unit: Unit, density: float, batch: int, transposed: bool):
    product, (x, values, bias), grid = case(unit, density, batch, transposed)
    weight = dense(grid, unit, values)
    torch.testing.assert_close(product(x, values, bias), F.linear(x, weight.t() if transposed else weight, bias))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("unit", "density"), [(Unit(8), 0.4), (Unit(2, 3), 0.4), (Unit(4), 0.0), (Unit(2, 2), 1.0)])
def test_linear_has_the_right_derivatives(unit: Unit, density: float, batch: int, transposed: bool):
    product, inputs, _ = case(unit, density, batch, transposed)
    whole = (unit, batch) == (Unit(2, 3), 1)
    assert torch.autograd.gradcheck(product, inputs, fast_mode=not whole)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=not whole)


def test_the_inert_tail_has_no_gradient_and_no_effect():
    product, (x, values, bias), grid = case(Unit(8), 0.4, 17, False)
    changed = values.detach().clone()
    changed[grid.nnz :] = torch.nan
    assert torch.equal(product(x, changed, bias), product(x, values, bias))
    (found,) = torch.autograd.grad(product(x, values, bias).square().sum(), values)
    assert found[: grid.nnz].all() and not found[grid.nnz :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("density", "batch"), [(0.05, 33), (0.5, 17), (1.0, 3)])
@pytest.mark.parametrize("unit", [Unit(8), Unit(2, 3)], ids=str)
def test_other_dtypes_stay_within_rounding(unit: Unit, density: float, batch: int, dtype: torch.dtype):
    """|error| <= 4 eps sqrt(terms) of the sum of magnitudes, for outputs and all gradients."""
    grid = random_grid(density, 20, 30)
    index = unit_index(grid, unit)
    x, values = leaf(batch, index.cols, dtype=dtype), leaf(index.units, unit.inputs, unit.outputs, dtype=dtype)
    dy = leaf(batch, index.rows, dtype=dtype).detach()
    y = kernels.linear(x, values, None, index)
    dx, dvalues = torch.autograd.grad(y, (x, values), dy)
    wide_x, wide_dy, weight = x.detach().double(), dy.double(), dense(grid, unit, values.detach().double())
    exact = [
        (y, wide_x @ weight.t(), wide_x.abs() @ weight.abs().t(), index.cols),
        (dx, wide_dy @ weight, wide_dy.abs() @ weight.abs(), index.rows),
        (dvalues, at(grid, unit, wide_dy.t() @ wide_x), at(grid, unit, wide_dy.abs().t() @ wide_x.abs()), batch),
    ]
    for found, right, size, terms in exact:
        assert found.dtype == dtype
        assert ((found.detach().double() - right).abs() <= 4 * torch.finfo(dtype).eps * math.sqrt(terms) * size).all()


def test_operators_are_sound_for_compilers():
    """Shape rules, autograd registration and tracing, by torch's own check; gradients arrive expanded there."""
    index = unit_index(random_grid(0.4), Unit(8, 2))
    values = leaf(index.units + 2, 2, 8, dtype=torch.float32)
    x, dy, bias = (leaf(*s, dtype=torch.float32) for s in ((3, index.cols), (3, index.rows), (index.rows,)))
    torch.library.opcheck(unit_spmm, (x, values, bias, False, False, 0, *index))
    torch.library.opcheck(unit_spmm, (dy, values, None, True, True, 0, *index))
    torch.library.opcheck(unit_sddmm, (x, dy, index.units + 2, 0, *index))
    torch.library.opcheck(unit_gradients, (x, dy, values, False, False, 0, *index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 9, 40, 300])
@pytest.mark.parametrize("unit", [Unit(8), Unit(2, 3)], ids=str)
def test_both_gradients_at_once_are_those_of_the_separate_operators(
    unit: Unit, batch: int, transposed: bool, dtype: torch.dtype
):
    index = unit_index(random_grid(0.2, 20, 30), unit)
    features, others = (index.rows, index.cols) if transposed else (index.cols, index.rows)
    x, values = (
        t.detach().to(dtype) for t in (leaf(batch, features), leaf(index.units + 2, unit.inputs, unit.outputs))
    )
    for dy in (leaf(batch, others, dtype=dtype).detach(), leaf(others, batch, dtype=dtype).detach().t()):
        for feature_major in (False, True):
            dx, dvalues = unit_gradients(x, dy, values, transposed, feature_major, 0, *index)
            alone = unit_spmm(dy, values, None, not transposed, feature_major, 0, *index)
            operands = (dy, x) if transposed else (x, dy)
            assert torch.equal(dx, alone) and dx.stride() == alone.stride()
            assert torch.equal(dvalues, unit_sddmm(*operands, index.units + 2, 0, *index))


def test_a_program_with_units_compiles_whole():
    index = unit_index(random_grid(0.4), Unit(8))
    values, x = leaf(index.units, 1, 8), leaf(3, 5)

    def loss(x: Tensor, values: Tensor) -> Tensor:
        return kernels.linear(x, values, None, index).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(loss(x, values), (x, values))
    for found, right in zip(torch.autograd.grad(compiled(x, values), (x, values)), eager, strict=True):
        torch.testing.assert_close(found, right)


def test_layout_travels():
    """A feature-major input gives a feature-major output and gets a feature-major gradient; others stay batch-major."""
    index = unit_index(random_grid(0.4), Unit(8))
    values = leaf(index.units, 1, 8)
    for x in (leaf(3, 5), leaf(5, 3).detach().t().requires_grad_()):
        y = kernels.linear(x, values, None, index)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.is_contiguous() == dx.is_contiguous() == x.is_contiguous()
        assert y.t().is_contiguous() == dx.t().is_contiguous() == x.t().is_contiguous()


def test_operands_that_are_not_contiguous():
    grid, unit = random_grid(0.4), Unit(8)
    index = unit_index(grid, unit)
    x, values = leaf(6, 10)[::2, ::2], leaf(2 * index.units, 1, 16)[::2, :, ::2]
    bias = leaf(2 * index.rows)[::2]
    torch.testing.assert_close(kernels.linear(x, values, bias, index), F.linear(x, dense(grid, unit, values), bias))


def test_leading_dimensions_and_autocast():
    index = unit_index(random_grid(0.4), Unit(8))
    values, x = leaf(index.units, 1, 8, dtype=torch.float32), leaf(2, 3, 5, dtype=torch.float32)
    y = kernels.linear(x, values, None, index)
    torch.testing.assert_close(y.view(6, 32), kernels.linear(x.view(6, 5), values, None, index))
    with torch.autocast("cpu", torch.bfloat16):
        half = kernels.linear(x, values, None, index)
    assert half.dtype == torch.bfloat16
    expected = kernels.linear(x.bfloat16(), values.bfloat16(), None, index)
    assert torch.equal(half, expected)
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)


def test_thin_units_across_inputs_are_those_of_the_transposed_weight():
    """Units of 1 output x 4 inputs: stored by column, they are units of 4 x 1 of the transposed weight."""
    grid = random_grid(0.4, 3, 7)
    values, x, bias = leaf(grid.nnz, 1, 4), leaf(5, 12), leaf(7)
    weight = dense(grid, Unit(4), values).t()
    assert torch.equal(Unit(1, 4).split(weight).count_nonzero(dim=(2, 3)) > 0, grid.mask.t())
    y = kernels.linear(x, values, bias, unit_index(grid, Unit(4)), transposed=True)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_keeper_sees_operands_from_which_every_gradient_can_be_had(transposed: bool):
    unit, grid, full = Unit(4, 2), random_grid(0.4), random_grid(1.0)
    _, (x, values, _), _ = case(unit, 0.4, 3, transposed)
    index, cols = unit_index(grid, unit), unit_index(grid, unit).cols
    keeper = Keeper(lambda n: None)
    y = kernels.linear(x, values, None, index, transposed=transposed, keep=keeper.key)
    (found,) = torch.autograd.grad((y**2).sum(), values)
    rows = torch.cat([keeper.rows(0, 4, cols), keeper.rows(4, 12, cols), keeper.rows(12, 16, cols)])
    torch.testing.assert_close(at(grid, unit, rows), found[: index.units])
    everywhere = kernels.sampled(keeper.kept[0], unit_index(full, unit))
    torch.testing.assert_close(everywhere, at(full, unit, rows))
    entries = kernels.sampled(keeper.kept[0], kernels.index(Topology((16, 10))))
    torch.testing.assert_close(entries.view(16, 10), rows)


def test_second_derivatives_reach_the_keeper_too():
    unit, grid = Unit(4), random_grid(0.4)
    index, x = unit_index(grid, unit), leaf(3, 5)
    values = leaf(index.units, 1, 4)
    keeper = Keeper(lambda n: None)
    y = kernels.linear(x, values, None, index, keep=keeper.key)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    keeper.kept.clear()
    (found,) = torch.autograd.grad((dx**2).sum(), values)
    assert len(keeper.kept) == 2
    torch.testing.assert_close(at(grid, unit, keeper.rows(0, 16, 5)), found)


def refused(match: str, index: UnitIndex, x: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
    with pytest.raises(ValueError, match=match):
        unit_spmm(x, values, bias, False, False, 0, *index)


def test_what_would_read_out_of_bounds_is_refused():
    index = unit_index(random_grid(0.4), Unit(8))
    x, values = torch.zeros(3, 5), torch.zeros(index.units, 1, 8)
    refused(r"the input has shape \(3, 4\), the weight takes \(3, 5\)", index, x[:, :4], values)
    refused(
        r"the values are \(7, 1, 8\), 8 units of 8 outputs x 1 inputs take \(8 or more, 1, 8\)", index, x, values[1:]
    )
    refused(r"the values are \(8, 1, 4\), 8 units", index, x, values[..., :4])
    refused(r"the bias has shape \(31,\), the weight takes \(32,\)", index, x, values, torch.zeros(31))
    refused("got torch.float32 on cpu and torch.float64 on cpu", index, x, values.double())
    refused("starts are int64 and columns", index._replace(starts=index.starts.int()), x, values)
    refused(r"columns \(units,\), got \(5,\) and \(1, 8\)", index._replace(columns=index.columns[None]), x, values)
    refused(
        "must be contiguous", index._replace(columns=index.columns.repeat(2).view(2, 8).t().reshape(-1)[::2]), x, values
    )
    refused("units of 8 x 2 do not divide a matrix of 32 x 5", index._replace(inputs=2), x, values.view(8, 1, 8))
    refused("units of 0 x 1 do not divide a matrix of 0 x 5", index._replace(outputs=0), x, values)


def test_gradients_that_would_read_or_write_out_of_bounds_are_refused():
    index = unit_index(random_grid(0.4), Unit(8))
    x, dy = torch.zeros(3, 5), torch.zeros(3, 32)
    for match, operands, capacity in (
        (r"the output gradient has shape \(2, 32\), the weight takes \(3, 32\)", (x, dy[:2]), 8),
        (r"the output gradient has shape \(3, 31\)", (x, dy[:, 1:]), 8),
        (r"the input has shape \(3, 4\)", (x[:, 1:], dy), 8),
        ("a capacity of 7 units is too small for the 8 active ones", (x, dy), 7),
        ("got torch.float32 on cpu and torch.float64 on cpu", (x, dy.double()), 8),
    ):
        with pytest.raises(ValueError, match=match):
            unit_sddmm(*operands, capacity, 0, *index)
    values = torch.zeros(8, 1, 8)
    for match, (x_, dy_, values_) in (
        (r"the output gradient has shape \(2, 32\), the weight takes \(3, 32\)", (x, dy[:2], values)),
        (r"the input has shape \(3, 4\)", (x[:, 1:], dy, values)),
        (r"the values are \(7, 1, 8\), 8 units", (x, dy, values[1:])),
        ("got torch.float32 on cpu and torch.float64 on cpu", (x, dy, values.double())),
    ):
        with pytest.raises(ValueError, match=match):
            unit_gradients(x_, dy_, values_, False, False, 0, *index)


def test_what_does_not_fit_is_refused():
    index = unit_index(random_grid(0.4), Unit(8))
    values = leaf(index.units, 1, 8)
    with pytest.raises(ValueError, match="the input has 4 features, the sparse weight takes 5"):
        kernels.linear(leaf(3, 4), values, None, index)
    with pytest.raises(ValueError, match=r"the input is torch.float32, the sparse weight torch.float64: convert them"):
        kernels.linear(leaf(3, 5, dtype=torch.float32), values, None, index)
    with pytest.raises(ValueError, match=r"of shape \(16, 4, 3, 3\) has units of 8 x 2 x 1 x 1"):
        kernels.unit_index(Topology((16, 4, 3, 3), unit=(8, 2, 1, 1)))
    with pytest.raises(ValueError, match="an index is of single entries, and this is Topology"):
        kernels.index(Topology((16, 7), unit=(8, 1)))


def test_an_index_shares_the_memory_of_its_grid():
    topology = of_grid(random_grid(0.4), Unit(8, 2))
    index = kernels.unit_index(topology)
    assert index.columns is topology.columns and index.starts is topology.starts
    assert (index.rows, index.cols, index.units, index.nnz) == (32, 10, 8, 128)
