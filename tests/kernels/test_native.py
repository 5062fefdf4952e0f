"""The compiled products of a sparse matrix against float64 dense products, for every size, type and instruction set."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

installed: Any = pytest.importorskip("regrow.kernels._native", reason="built without the compiled kernels")
native: Any = installed

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# What a float32 or float64 sum may lose, and the last rounding to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 8e-3}
BATCHES = (0, 1, 3, 8, 17, 64, 100, 128, 300, 512)
SHAPES = ((1, 1), (5, 3), (33, 70), (130, 41), (3, 500))
DENSITIES = (0.02, 0.3, 1.0)


def loaded() -> Any:
    """Another instance of the extension, which reads REGROW_ISA again."""
    spec = importlib.util.spec_from_file_location("_native", installed.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["plain", "avx2", "avx512"])
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every instruction set that this processor has."""
    global native  # noqa: PLW0603
    monkeypatch.setenv("REGROW_ISA", request.param)
    try:
        native = loaded()
    except ImportError as error:
        pytest.skip(str(error))
    assert native.isa() == request.param
    yield
    native = installed


class Weight:
    """A random sparse matrix, its transposed index and its dense form, in float64."""

    def __init__(self, rows: int, cols: int, density: float, dtype: torch.dtype, index: torch.dtype) -> None:
        mask = torch.rand(rows, cols) < density
        if rows > 2:
            mask[1] = False  # a row without entries
        self.rows, self.cols, self.dtype, self.index64 = rows, cols, dtype, index == torch.int64
        self.values = torch.randn(int(mask.sum())).to(dtype)
        self.columns = mask.nonzero()[:, 1].to(index)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        self.mask = mask
        self.dense = torch.zeros(rows, cols, dtype=torch.float64)
        self.dense[mask] = self.values.double()
        # Filled with what would be seen: the kernels must write all of it.
        self.t_starts = torch.full((cols + 1,), -1, dtype=torch.int64)
        self.t_rows, self.order = torch.full_like(self.columns, -1), torch.full_like(self.columns, -1)
        native.transpose_index(
            self.index64, rows, cols, *pointers(self.starts, self.columns, self.t_starts, self.t_rows, self.order)
        )


def pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def activations(batch: int, features: int, dtype: torch.dtype, feature_major: bool) -> Tensor:
    """Random activations (batch, features) within a larger tensor of NaN, which a stray read would bring in."""
    shape = (features, batch) if feature_major else (batch, features)
    around = torch.full((shape[0] + 2, shape[1]), torch.nan, dtype=dtype)
    inside = around[1:-1]
    inside.copy_(torch.randn(shape))
    return inside.t() if feature_major else inside


def checked(result: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Errors are relative to the sum of absolute values of what was added up; nothing around the result was written."""
    assert not result.isnan().any()
    error = (result.double() - expected).abs()
    assert bool((error <= TOLERANCES[result.dtype] * (scale + 1e-30)).all()), float((error / (scale + 1e-30)).max())
    around = result._base if result._base is not None else result
    around = around._base if around._base is not None else around
    assert around[0].isnan().all() and around[-1].isnan().all()


def multiply(w: Weight, x: Tensor, bias: Tensor | None, y: Tensor, transposed: bool = False, threads: int = 2) -> None:
    starts, columns, order = (w.t_starts, w.t_rows, w.order) if transposed else (w.starts, w.columns, None)
    rows, cols = (w.cols, w.rows) if transposed else (w.rows, w.cols)
    native.spmm(
        DTYPES.index(w.dtype), w.index64, threads, rows, cols, len(x), *pointers(starts, columns),
        0 if order is None else order.data_ptr(), w.values.data_ptr(), x.data_ptr(), *x.stride(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), *y.stride(),
    )  # fmt: skip


def sample(w: Weight, x: Tensor, dy: Tensor, dx: Tensor | None, threads: int = 2) -> Tensor:
    """The gradient of values, and where dx is there that of the input to it."""
    around = torch.full((len(w.values) + 2,), torch.nan, dtype=w.dtype)
    native.backward(
        DTYPES.index(w.dtype), w.index64, threads, w.rows, w.cols, len(x),
        *pointers(w.starts, w.columns, w.t_starts, w.t_rows, w.order, w.values), x.data_ptr(), *x.stride(),
        dy.data_ptr(), *dy.stride(), *((0, 0, 0) if dx is None else (dx.data_ptr(), *dx.stride())),
        around[1:-1].data_ptr(),
    )  # fmt: skip
    return around[1:-1]


def check_products(w: Weight, batch: int, x_major: bool, y_major: bool) -> None:
    """Forward, input gradient and value gradient of one weight, layouts as given."""
    x, dy = activations(batch, w.cols, w.dtype, x_major), activations(batch, w.rows, w.dtype, y_major)
    bias = torch.randn(w.rows).to(w.dtype)

    y = activations(batch, w.rows, w.dtype, y_major).fill_(0.5)
    multiply(w, x, bias, y)
    scale = x.double().abs() @ w.dense.abs().t() + bias.double().abs()
    checked(y, x.double() @ w.dense.t() + bias.double(), scale)

    dx = activations(batch, w.cols, w.dtype, x_major).fill_(0.5)
    multiply(w, dy, None, dx, transposed=True)
    checked(dx, dy.double() @ w.dense, dy.double().abs() @ w.dense.abs())

    expected = (dy.double().t() @ x.double())[w.mask]
    dvalues = sample(w, x, dy, None)
    checked(dvalues, expected, (dy.double().abs().t() @ x.double().abs())[w.mask])

    both = activations(batch, w.cols, w.dtype, x_major).fill_(0.5)
    assert torch.equal(sample(w, x, dy, both), dvalues)
    checked(both, dx.double(), torch.zeros(()))


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype: torch.dtype) -> None:
    layouts = itertools.cycle(itertools.product((False, True), repeat=2))
    indices = itertools.cycle((torch.int32, torch.int64, torch.int64, torch.int32, torch.int32))
    cases = [((33, 70), 0.0), *itertools.product(SHAPES, DENSITIES)]
    for number, ((rows, cols), density) in enumerate(cases):
        w = Weight(rows, cols, density, dtype, next(indices))
        for batch in BATCHES[number % 3 :: 3]:
            x_major, y_major = next(layouts)
            check_products(w, batch, x_major, y_major)


@pytest.mark.usefixtures("_isa")
def test_columns_in_several_panels_and_batches_in_several_groups() -> None:
    check_products(Weight(20, 5000, 0.1, torch.float32, torch.int32), 600, False, False)
    check_products(Weight(20, 5000, 0.1, torch.bfloat16, torch.int32), 600, True, False)
    check_products(Weight(7, 3000, 1.0, torch.float64, torch.int32), 400, False, True)
    check_products(Weight(300, 20, 0.1, torch.float32, torch.int32), 4000, False, False)


def test_transposed_index() -> None:
    w = Weight(130, 41, 0.3, torch.float32, torch.int32)
    rows = torch.arange(130).repeat_interleave(w.starts.diff())
    expected = torch.argsort(w.columns * 1000 + rows)
    assert torch.equal(w.order.long(), expected)
    assert torch.equal(w.t_rows.long(), rows[expected])
    assert torch.equal(w.t_starts.diff(), torch.bincount(w.columns.long(), minlength=41))


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transpose(dtype: torch.dtype) -> None:
    for rows, cols, threads in itertools.product((0, 1, 5, 16, 33, 130), (0, 1, 7, 32, 100, 515), (1, 2)):
        source = torch.randn(rows, cols + 3).to(dtype)
        target = torch.full((cols, rows + 2), torch.nan, dtype=dtype)
        native.transpose(
            DTYPES.index(dtype), threads, rows, cols, source.data_ptr(), cols + 3, target.data_ptr(), rows + 2
        )
        assert torch.equal(target[:, :rows], source[:, :cols].t())
        assert target[:, rows:].isnan().all()


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    w = Weight(301, 400, 0.1, dtype, torch.int32)
    for batch in (1, 6, 130):
        x, results = activations(batch, 400, dtype, False), []
        for threads in (1, 2, 3, 7):
            y, dx = activations(batch, 301, dtype, False), activations(batch, 400, dtype, False)
            multiply(w, x, None, y, threads=threads)
            results.append((y, sample(w, x, y, dx, threads), dx))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("_isa")
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan_and_infinity() -> None:
    w = Weight(1, 1, 1.0, torch.bfloat16, torch.int32)
    w.values.fill_(1 + 2**-7)
    x = torch.tensor([1 + 2**-7, 3 + 2**-6, torch.nan, torch.inf, -torch.inf, 1e38] * 4).to(torch.bfloat16)[:, None]
    for batch in (6, 24):
        y = torch.zeros(batch, 1, dtype=torch.bfloat16)
        multiply(w, x[:batch], None, y)
        expected = (x[:batch].float() * w.values.float()).to(torch.bfloat16)
        assert torch.allclose(y, expected, rtol=0, atol=0, equal_nan=True)


def test_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_ISA", "sse9")
    with pytest.raises(ImportError, match="sse9"):
        loaded()
