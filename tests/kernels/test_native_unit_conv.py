"""Compiled convolutions with weights made of units against torch's in float64, for every unit and instruction set."""

from __future__ import annotations

import itertools
import random
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support import native as memory
from support.convolutions import GEOMETRIES, Geometry
from support.native import DTYPES, ISAS, check, instance, require_untouched_edges, within

installed: Any = pytest.importorskip("regrow.kernels._native", reason="built without the compiled kernels")

OUTPUTS = (2, 4, 8, 16, 1, 12)


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every instruction set that this processor has."""
    return instance(request.param, monkeypatch)


def of_units(geometry: Geometry, outputs: int) -> Geometry:
    """A convolution with as many filters in each group as the units next to what it has fill."""
    group = -(-geometry.filters // (geometry.groups * outputs)) * outputs
    return replace(geometry, filters=group * geometry.groups)


class Weight:
    """A random weight of units of `outputs` filters; where it has more than two rows of them, the second is empty."""

    def __init__(
        self, geometry: Geometry, outputs: int, density: float, dtype: torch.dtype, index: torch.dtype = torch.int32
    ) -> None:
        filters, *place = geometry.weight_shape
        self.geometry, self.outputs, self.dtype = geometry, outputs, dtype
        self.mask = torch.rand(filters // outputs, *place) < density
        if len(self.mask) > 2:
            self.mask[1] = False
        flat = self.mask.flatten(1)
        self.count = int(flat.sum())
        # Wild numbers around the index: whoever follows one of them does not come back.
        self.starts = within(torch.cat([torch.zeros(1), flat.sum(1).cumsum(0)]).long(), 2**40)
        self.columns = within(flat.nonzero()[:, 1].to(index), 2**30)
        self.values = within(torch.randn(self.count, outputs).to(dtype), torch.nan)
        grid = torch.zeros(*self.mask.shape, outputs, dtype=torch.float64)
        grid[self.mask] = self.values.double()
        self.dense = grid.movedim(-1, 1).reshape(geometry.weight_shape)

    def at(self, full: Tensor) -> Tensor:
        """Entries of a weight in the order of the values."""
        grid = full.view(len(self.mask), self.outputs, *self.mask.shape[1:])
        return grid.movedim(1, -1)[self.mask]

    def call(self, native: Any, name: str, threads: int, *tensors: Tensor | None) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (self.starts, self.columns, *tensors)]
        head = (DTYPES.index(self.dtype), self.columns.dtype == torch.int64, threads, *astuple(self.geometry))
        getattr(native, f"unit_conv_{name}")(*head, self.outputs, self.count, *addresses)

    def results(self, native: Any, x: Tensor, dy: Tensor, bias: Tensor | None, threads: int) -> tuple[Tensor, ...]:
        """The product and both gradients."""
        y, dx, dvalues = (within(torch.full_like(t, torch.nan), torch.nan) for t in (dy, x, self.values))
        self.call(native, "forward", threads, self.values, x, bias, y)
        self.call(native, "input_gradient", threads, self.values, dy, dx)
        self.call(native, "backward", threads, self.values, x, dy, None, dvalues)
        both = tuple(within(torch.full_like(t, torch.nan), torch.nan) for t in (x, self.values))
        self.call(native, "backward", threads, self.values, x, dy, *both)
        check(both[0], dx.double(), torch.zeros(()))
        check(both[1], dvalues.double(), torch.zeros(()))
        return y, dx, dvalues


def operands(w: Weight) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output."""
    x = within(torch.randn(w.geometry.input_shape).to(w.dtype), torch.nan)
    shape = w.geometry.convolve(x[:1].float(), w.dense.float(), None).shape[1:]
    return x, within(torch.randn(len(x), *shape).to(w.dtype), torch.nan)


def check_products(native: Any, w: Weight, biased: bool, threads: int = 2) -> None:
    geometry, size = w.geometry, w.dense.abs()
    x, dy = operands(w)
    bias = within(torch.randn(geometry.filters).to(w.dtype), torch.nan) if biased else None
    wide = None if bias is None else bias.double()
    y, dx, dvalues = w.results(native, x, dy, bias, threads)
    scale = geometry.convolve(x.double().abs(), size, None if wide is None else wide.abs())
    check(y, geometry.convolve(x.double(), w.dense, wide), scale)
    expected, weight = geometry.gradients(dy.double(), x.double(), w.dense)
    scale, weight_scale = geometry.gradients(dy.double().abs(), x.double().abs(), size)
    check(dx, expected, scale)
    check(dvalues, w.at(weight), w.at(weight_scale))


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_products(native: Any, name: str, outputs: int) -> None:
    draw = random.Random(f"{name} {outputs}")
    torch.manual_seed(0)
    geometry = of_units(GEOMETRIES[name], outputs)
    for dtype, density in zip(draw.sample(DTYPES, 3), (0.0, 0.1, draw.choice((0.3, 1.0))), strict=True):
        w = Weight(geometry, outputs, density, dtype, draw.choice((torch.int32, torch.int64)))
        check_products(native, w, biased=draw.random() < 0.5, threads=draw.choice((1, 2, 3)))


def test_random_geometries(native: Any) -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(60):
        groups, outputs = draw.choice((1, 1, 2, 3)), draw.choice(OUTPUTS)
        geometry = Geometry(
            draw.choice((1, 3, 16, 17, 20)), groups * draw.choice((1, 2, 7)),
            draw.choice((13, 15, 19)), draw.choice((13, 16, 35)), groups * outputs * draw.choice((1, 3)),
            draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3)), draw.choice((1, 2, 3)),
            draw.choice((0, 1, 3)), draw.choice((0, 1, 2)), draw.choice((1, 2, 3)), draw.choice((1, 2)), groups,
        )  # fmt: skip
        w = Weight(geometry, outputs, draw.choice((0.1, 0.4)), draw.choice(DTYPES))
        check_products(native, w, biased=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [2, 8, 12])
def test_results_do_not_depend_on_threads(native: Any, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for geometry in (
        Geometry(70, 30, 8, 8, 20),
        Geometry(2, 8, 8, 8, 40),
        Geometry(3, 12, 9, 9, 48, groups=3),
        replace(GEOMETRIES["strided"], images=100),
    ):
        w = Weight(of_units(geometry, outputs), outputs, 0.3, dtype)
        x, dy = operands(w)
        one, *others = (w.results(native, x, dy, None, threads) for threads in (1, 2, 3, 7))
        assert all(torch.equal(a, b) for other in others for a, b in zip(other, one, strict=True))


def test_starts_that_lead_out_of_the_columns_are_refused(native: Any) -> None:
    w = Weight(Geometry(2, 3, 4, 4, 16), 8, 1.0, torch.float32)
    w.starts[-1] = w.count + 1
    x, dy = operands(w)
    for name, tensors in (
        ("forward", (w.values, x, None, dy)),
        ("input_gradient", (w.values, dy, x)),
        ("backward", (w.values, x, dy, None, w.values)),
    ):
        with pytest.raises(
            ValueError, match="starts must run from 0 to the number of columns, 54, and run from 0 to 55"
        ):
            w.call(native, name, 2, *tensors)


@pytest.mark.parametrize("isa", ISAS)
def test_no_memory_beyond_the_operands_is_touched(isa: str) -> None:
    """Also not where it would change no result: every operand begins or ends at a page that must not be touched."""
    require_untouched_edges(isa, __file__)


def touch_edges() -> None:
    """Products whose operands all lie at the edge of what may be touched."""
    draw = random.Random(0)
    for name, outputs in zip(GEOMETRIES, itertools.cycle((2, 8, 12)), strict=False):
        w = Weight(of_units(GEOMETRIES[name], outputs), outputs, 0.3, draw.choice(DTYPES))
        check_products(installed, w, biased=draw.random() < 0.5)


if __name__ == "__main__":
    within, memory.is_alone = memory.at_edge, lambda tensor: True
    touch_edges()
    print("done")
