"""Compiled products of weights made of units against float64 dense ones, for every unit, type and instruction set."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from support import native as memory
from support.native import DTYPES, ISAS, check, instance, require_untouched_edges, within
from support.units import Unit

installed: Any = pytest.importorskip("regrow.kernels._native", reason="built without the compiled kernels")

UNITS = [(2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 8), (16, 16), (8, 2), (1, 4), (3, 1), (12, 3), (6, 5), (32, 1)]
BATCHES = (0, 1, 3, 4, 8, 17, 40, 64, 100, 130, 300)
GRIDS = ((1, 1), (5, 3), (9, 31), (3, 150))
DENSITIES = (0.05, 0.4, 1.0)


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every instruction set that this processor has."""
    return instance(request.param, monkeypatch)


def activations(batch: int, features: int, dtype: torch.dtype, feature_major: bool) -> Tensor:
    shape = (features, batch) if feature_major else (batch, features)
    inside = within(torch.randn(shape).to(dtype), torch.nan)
    return inside.t() if feature_major else inside


class Weight:
    """A random weight made of units; where there are more than two rows of them, the second is empty."""

    def __init__(
        self, unit: tuple[int, int], grid: tuple[int, int], density: float, dtype: torch.dtype, index: torch.dtype
    ) -> None:
        self.unit, self.dtype = Unit(*unit), dtype
        self.mask = torch.rand(grid) < density
        if grid[0] > 2:
            self.mask[1] = False
        self.rows, self.cols = grid[0] * unit[0], grid[1] * unit[1]
        self.count = int(self.mask.sum())
        # Wild numbers around the index: whoever follows one of them does not come back.
        self.starts = within(torch.cat([torch.zeros(1), self.mask.sum(1).cumsum(0)]).long(), 2**40)
        self.columns = within(self.mask.nonzero()[:, 1].to(index), 2**30)
        self.values = within(torch.randn(self.count, unit[1], unit[0]).to(dtype), torch.nan)
        units = torch.zeros(*grid, unit[1], unit[0], dtype=torch.float64)
        units[self.mask] = self.values.double()
        self.dense = self.unit.join(units)

    def head(self, threads: int) -> tuple[int, ...]:
        numbers = (DTYPES.index(self.dtype), self.columns.dtype == torch.int64, threads, *self.unit)
        return (*numbers, *self.mask.shape, self.count)

    def at(self, full: Tensor) -> Tensor:
        """Entries of a (rows, cols) matrix in the order of the values."""
        return self.unit.split(full)[self.mask]


def multiply(
    native: Any, w: Weight, x: Tensor, bias: Tensor | None, y: Tensor, transposed: bool = False, threads: int = 2
) -> None:
    pointers = (t.data_ptr() for t in (w.starts, w.columns, w.values, x))
    at_bias = 0 if bias is None else bias.data_ptr()
    native.unit_spmm(
        *w.head(threads), transposed, len(x), *pointers, *x.stride(), at_bias, y.data_ptr(), *y.stride()
    )  # fmt: skip


def sample(
    native: Any, w: Weight, x: Tensor, dy: Tensor, out: Tensor, dx: Tensor | None = None, threads: int = 2
) -> None:
    """The gradient of values, and where dx is there that of the input to it."""
    pointers = (t.data_ptr() for t in (w.starts, w.columns, w.values, x))
    at_dx = (0, 0, 0) if dx is None else (dx.data_ptr(), *dx.stride())
    native.unit_backward(
        *w.head(threads), len(x), *pointers, *x.stride(), dy.data_ptr(), *dy.stride(), *at_dx, out.data_ptr()
    )  # fmt: skip


def check_products(native: Any, w: Weight, batch: int, x_major: bool, y_major: bool, threads: int = 2) -> None:
    """Both products and the value gradient of one weight, with and without bias, layouts as given."""
    x, dy = activations(batch, w.cols, w.dtype, x_major), activations(batch, w.rows, w.dtype, y_major)
    wide_x, wide_dy = x.double(), dy.double()
    for transposed, operand, weight, major in ((False, x, w.dense.t(), y_major), (True, dy, w.dense, x_major)):
        features = weight.shape[1]
        bias = within(torch.randn(features).to(w.dtype), torch.nan) if batch % 2 else None
        y = activations(batch, features, w.dtype, major)
        multiply(native, w, operand, bias, y, transposed, threads)
        offset = torch.zeros(features, dtype=torch.float64) if bias is None else bias.double()
        scale = operand.double().abs() @ weight.abs() + offset.abs()
        check(y, operand.double() @ weight + offset, scale)
    out, both = (within(torch.full_like(w.values, torch.nan), torch.nan) for _ in range(2))
    sample(native, w, x, dy, out, threads=threads)
    check(out, w.at(wide_dy.t() @ wide_x), w.at(wide_dy.abs().t() @ wide_x.abs()))
    alone, dx = (activations(batch, w.cols, w.dtype, x_major) for _ in range(2))
    multiply(native, w, dy, None, alone, True, threads)
    sample(native, w, x, dy, both, dx, threads)
    check(dx, alone.double(), torch.zeros(()))
    check(both, out.double(), torch.zeros(()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: "x".join(map(str, unit)))
def test_products(native: Any, unit: tuple[int, int], dtype: torch.dtype) -> None:
    layouts = itertools.cycle(itertools.product((False, True), repeat=2))
    indices = itertools.cycle((torch.int32, torch.int64, torch.int32))
    cases = [((9, 31), 0.0), *itertools.product(GRIDS, DENSITIES)]
    for number, (grid, density) in enumerate(cases):
        w = Weight(unit, grid, density, dtype, next(indices))
        for batch in BATCHES[number % 4 :: 4]:
            check_products(native, w, batch, *next(layouts))


@pytest.mark.parametrize("threads", [2, 3])
def test_columns_in_several_panels_and_batches_in_several_groups(native: Any, threads: int) -> None:
    """More tiles than are packed at a time, rows that reach beyond a panel, weights larger than tiles and smaller."""
    check_products(native, Weight((8, 1), (4, 12000), 0.02, torch.float32, torch.int32), 300, False, False, threads)
    check_products(native, Weight((16, 16), (3, 700), 0.1, torch.bfloat16, torch.int32), 130, True, False, threads)
    check_products(native, Weight((2, 1), (7, 6000), 1.0, torch.float64, torch.int64), 70, False, True, threads)
    check_products(native, Weight((4, 4), (300, 8), 0.1, torch.float32, torch.int32), 4000, False, False, threads)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_weights_without_rows_or_columns(native: Any, sizes: tuple[int, int]) -> None:
    for batch in (0, 1, 5, 40):
        check_products(native, Weight((8, 1), sizes, 1.0, torch.float32, torch.int32), batch, False, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", [(2, 1), (8, 1), (16, 1), (6, 5), (16, 16)], ids=str)
def test_results_do_not_depend_on_threads(native: Any, unit: tuple[int, int], dtype: torch.dtype) -> None:
    w = Weight(unit, (21, 90), 0.3, dtype, torch.int32)
    for batch in (1, 3, 17, 100, 260):
        x, dy = activations(batch, w.cols, dtype, False), activations(batch, w.rows, dtype, False)
        results = []
        for threads in (1, 2, 3, 5):
            y, dx = torch.empty(batch, w.rows, dtype=dtype), torch.empty(batch, w.cols, dtype=dtype)
            both, dvalues = torch.empty_like(dx), torch.empty_like(w.values)
            multiply(native, w, x, None, y, threads=threads)
            multiply(native, w, dy, None, dx, transposed=True, threads=threads)
            sample(native, w, x, dy, dvalues, both, threads=threads)
            results.append((y, dx, both, dvalues))
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_starts_that_lead_out_of_the_columns_are_refused(native: Any) -> None:
    w = Weight((8, 1), (5, 3), 1.0, torch.float32, torch.int32)
    w.starts[-1] = w.count + 1
    x, y = torch.zeros(2, 3), torch.zeros(2, 40)
    with pytest.raises(ValueError, match="starts must run from 0 to the number of columns, 12, and run from 0 to 13"):
        multiply(native, w, x, None, y)
    with pytest.raises(ValueError, match="starts must run from 0"):
        sample(native, w, x, y, torch.zeros(12, 1, 8))


@pytest.mark.parametrize("isa", ISAS)
def test_no_memory_beyond_the_operands_is_touched(isa: str) -> None:
    """Also not where it would change no result: every operand begins or ends at a page that must not be touched."""
    require_untouched_edges(isa, __file__)


def touch_edges() -> None:
    """Products whose operands all lie at the edge of what may be touched."""
    layouts = itertools.cycle(itertools.product((False, True), repeat=2))
    dtypes = itertools.cycle(DTYPES)
    for unit, batch, grid in itertools.product(UNITS, (1, 3, 17, 100), ((5, 3), (9, 31))):
        check_products(installed, Weight(unit, grid, 0.4, next(dtypes), torch.int32), batch, *next(layouts))


if __name__ == "__main__":
    within, memory.is_alone = memory.at_edge, lambda tensor: True
    touch_edges()
    print("done")
