"""The compiled sparse convolution against torch's in float64, for every geometry, type and instruction set."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.convolutions import GEOMETRIES, Geometry
from support.native import DTYPES, check

native: Any = pytest.importorskip("regrow.kernels._native", reason="built without the compiled kernels")


class Weight:
    """A random sparse weight, its transposed index and its dense form, in float64."""

    def __init__(self, geometry: Geometry, density: float, dtype: torch.dtype, index: torch.dtype) -> None:
        mask = torch.rand(geometry.weight_shape) < density
        if geometry.filters > 2:
            mask[1] = False  # a row without entries
        flat = mask.flatten(1)
        self.geometry, self.dtype, self.mask, self.index64 = geometry, dtype, mask, index == torch.int64
        self.values = torch.randn(int(mask.sum())).to(dtype)
        self.dense = torch.zeros(geometry.weight_shape, dtype=torch.float64)
        self.dense[mask] = self.values.double()
        rows, columns = flat.nonzero(as_tuple=True)
        order = torch.argsort(columns * len(flat) + rows)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), flat.sum(1).cumsum(0)])
        self.t_starts = torch.cat([torch.zeros(1, dtype=torch.int64), flat.sum(0).cumsum(0)])
        self.columns, self.t_rows, self.order = columns.to(index), rows[order].to(index), order.to(index)

    def call(self, name: str, *tensors: Tensor | None, threads: int = 2) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        getattr(native, name)(DTYPES.index(self.dtype), self.index64, threads, *astuple(self.geometry), *addresses)

    def forward(self, x: Tensor, bias: Tensor | None, **options: int) -> Tensor:
        shape = self.geometry.convolve(x[:1].float(), self.dense.float(), None).shape[1:]
        y = surrounded(torch.Size([len(x), *shape]), self.dtype)
        self.call("conv_forward", self.starts, self.columns, self.values, x, bias, y, **options)
        return y

    def input_gradient(self, dy: Tensor, **options: int) -> Tensor:
        dx = surrounded(torch.Size(self.geometry.input_shape), self.dtype)
        self.call("conv_input_gradient", self.t_starts, self.t_rows, self.order, self.values, dy, dx, **options)
        return dx

    def value_gradient(self, x: Tensor, dy: Tensor, dx: Tensor | None = None, **options: int) -> Tensor:
        """The gradient of values, and where dx is there that of the input to it."""
        dvalues = surrounded(self.values.shape, self.dtype)
        index = (self.starts, self.columns, self.t_starts, self.t_rows, self.order, self.values)
        self.call("conv_backward", *index, x, dy, dx, dvalues, **options)
        return dvalues


def surrounded(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of NaN between others of NaN, which a stray read would bring in and a stray write would change."""
    margin = 64
    around = torch.full((shape.numel() + 2 * margin,), torch.nan, dtype=dtype)
    return around[margin : margin + shape.numel()].view(shape)


def random_like(tensor: Tensor) -> Tensor:
    return surrounded(tensor.shape, tensor.dtype).copy_(torch.randn(tensor.shape))


def check_products(w: Weight, biased: bool, threads: int) -> None:
    geometry = w.geometry
    x = random_like(surrounded(torch.Size(geometry.input_shape), w.dtype))
    bias = torch.randn(geometry.filters).to(w.dtype) if biased else None
    wide = None if bias is None else bias.double()
    x64, size = x.double(), w.dense.abs()

    y = w.forward(x, bias, threads=threads)
    expected = geometry.convolve(x64, w.dense, wide)
    check(y, expected, geometry.convolve(x64.abs(), size, None if wide is None else wide.abs()))

    dy = random_like(y)
    dx, dweight = geometry.gradients(dy.double(), x64, w.dense)
    dx_scale, dweight_scale = geometry.gradients(dy.double().abs(), x64.abs(), size)
    found, dvalues = w.input_gradient(dy, threads=threads), w.value_gradient(x, dy, threads=threads)
    check(found, dx, dx_scale)
    check(dvalues, dweight[w.mask], dweight_scale[w.mask])
    both = surrounded(x.shape, w.dtype)
    assert torch.equal(w.value_gradient(x, dy, both, threads=threads), dvalues)
    check(both, found.double(), torch.zeros(()))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_products(name: str) -> None:
    draw = random.Random(name)
    torch.manual_seed(0)
    for dtype in DTYPES:
        for density in (0.0, 0.05, draw.choice((0.3, 1.0))):
            index = draw.choice((torch.int32, torch.int64))
            w = Weight(GEOMETRIES[name], density, dtype, index)
            check_products(w, biased=draw.random() < 0.5, threads=draw.choice((1, 2, 3)))


def test_random_geometries() -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    tested = 0
    while tested < 60:
        groups = draw.choice((1, 1, 1, 2, 5))
        geometry = Geometry(
            draw.choice((1, 3, 16, 17, 20)), groups * draw.choice((1, 2, 7)),
            draw.choice((1, 4, 5, 8, 13)), draw.choice((1, 4, 7, 8, 16, 19, 35)), groups * draw.choice((1, 2, 5)),
            draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3)), draw.choice((1, 2, 3)),
            draw.choice((0, 1, 3)), draw.choice((0, 1, 2)), draw.choice((1, 2, 3)), draw.choice((1, 2)), groups,
        )  # fmt: skip
        reach = (
            geometry.dilation_height * (geometry.kernel_height - 1) + 1,
            geometry.dilation_width * (geometry.kernel_width - 1) + 1,
        )
        if (
            geometry.height + 2 * geometry.padding_height < reach[0]
            or geometry.width + 2 * geometry.padding_width < reach[1]
        ):
            continue
        tested += 1
        w = Weight(geometry, draw.choice((0.1, 0.4)), draw.choice(DTYPES), torch.int32)
        check_products(w, biased=False, threads=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for geometry in (Geometry(70, 30, 8, 8, 20), Geometry(2, 8, 8, 8, 40), replace(GEOMETRIES["strided"], images=100)):
        w = Weight(geometry, 0.2, dtype, torch.int32)
        x = torch.randn(geometry.input_shape).to(dtype)
        y = w.forward(x, None)
        results = []
        for n in (1, 2, 3, 7):
            both = torch.empty_like(x)
            found = (
                w.forward(x, None, threads=n),
                w.input_gradient(y, threads=n),
                w.value_gradient(x, y, both, threads=n),
            )
            results.append((*found, both))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_instruction_set_is_the_one_named() -> None:
    assert native.isa() == os.environ.get("REGROW_ISA", native.isa())


@pytest.fixture(scope="module")
def others() -> dict[str, subprocess.Popen[str]]:
    """The same tests at once in processes that were told other instruction sets."""
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    return {
        isa: subprocess.Popen(command, env={**os.environ, "REGROW_ISA": isa}, stdout=subprocess.PIPE, text=True)
        for isa in ("plain", "avx2", "avx512")
        if isa != native.isa() and "REGROW_ISA" not in os.environ
    }


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa: str, others: dict[str, subprocess.Popen[str]]) -> None:
    if isa not in others:
        pytest.skip("this process has it, or was told another")
    output, _ = others[isa].communicate()
    if "lacks REGROW_ISA" in output or "names no instruction set" in output:
        pytest.skip(f"not on this processor: {isa}")
    assert others[isa].returncode == 0, output
