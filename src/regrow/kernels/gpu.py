"""The kernels on NVIDIA GPUs: Triton programs for weights made of units, plain torch for everything else.

Importing this needs Triton. Weights of single entries, convolutions, float64 and units of more than 128 rows or columns
run on the reference, on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from regrow.kernels import gpu_programs, reference
from regrow.kernels.reference import (
    backward,
    conv,
    conv_backward,
    conv_input_gradient,
    conv_value_gradient,
    sddmm,
    spmm,
    transpose_index,
)
from regrow.kernels.units import UnitIndex

__all__ = [
    "backward",
    "conv",
    "conv_backward",
    "conv_input_gradient",
    "conv_value_gradient",
    "sddmm",
    "spmm",
    "transpose_index",
    "unit_backward",
    "unit_sddmm",
    "unit_spmm",
]

SUMS = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32}
"""The types that the programs take, and the type in which each is summed."""

_LARGEST = 128
"""Outputs or inputs of a unit that one program makes."""
_DIRECT = 16
"""Inputs of a unit from which on the input gradient is a gathered product; with fewer, most of a tile would be idle."""
_WORKSPACE = 1 << 27
"""Bytes of what terms add to an input gradient that are held at once."""
_TERMS = 64
"""Terms of one tile of `sampled` and `partial`: what a warp group multiplies at once."""


class Launch(NamedTuple):
    """One launch of a program: a value, so that what would run on a GPU can be compiled and looked at without one."""

    program: Any
    instances: int
    """How many of it run."""
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3


class Plan(NamedTuple):
    """What products read of a topology beside its `UnitIndex`: the transposed list of units, and tiles of terms."""

    starts: Tensor
    """(columns of units + 1,) int64: where each column of units begins in transposed order."""
    rows: Tensor
    """(units,): the row of each unit, in transposed order, counted in units."""
    order: Tensor
    """(units,): where each unit in transposed order stands among the values."""
    tile_rows: Tensor
    """(tiles,) int32: the row of units of each tile; as many as there are rows where the tile is none."""
    tile_numbers: Tensor
    """(tiles,) int32: which tile of its row it is."""


def unit_spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: UnitIndex, transposed: bool, out: Tensor) -> None:
    """As `reference.unit_spmm`; sums in float32, rounded once, in an order that does not vary."""
    if not takes(x, index):
        return reference.unit_spmm(x, values, bias, index, transposed, out)
    return _run(x, products(x.t().contiguous(), values, bias, index, transposed, out, at_once(x)))


def unit_sddmm(x: Tensor, dy: Tensor, index: UnitIndex, out: Tensor) -> None:
    """As `reference.unit_sddmm`; sums in float32, rounded once, in an order that does not vary."""
    if not takes(x, index):
        return reference.unit_sddmm(x, dy, index, out)
    return _run(x, samples(x.t().contiguous(), dy.t().contiguous(), index, out))


def unit_backward(
    x: Tensor, dy: Tensor, values: Tensor, index: UnitIndex, transposed: bool, dx: Tensor, dvalues: Tensor
) -> None:
    """Both programs, one after the other."""
    unit_spmm(dy, values, None, index, not transposed, dx)
    unit_sddmm(*((dy, x) if transposed else (x, dy)), index, dvalues)


def takes(x: Tensor, index: UnitIndex) -> bool:
    """Whether the programs multiply activations of this type by units of this size."""
    return x.dtype in SUMS and max(index.outputs, index.inputs) <= _LARGEST


def at_once(x: Tensor) -> int:
    """Rows that the tensor cores of the device of x take at once: 64 from Hopper on, 16 before."""
    return 16 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9 else 64


def products(
    x: Tensor, values: Tensor, bias: Tensor | None, index: UnitIndex, transposed: bool, out: Tensor, rows_at_once: int
) -> Iterator[Launch]:
    """The launches of `unit_spmm`, in their order.

    Args:
        x: (features, batch), contiguous; otherwise as for `unit_spmm`.
        values: (capacity, inputs, outputs), contiguous.
        bias: (features of out,) or None.
        index: of W.
        transposed: multiply by W instead of W^T.
        out: (batch, features), of any strides.
        rows_at_once: what `at_once` says.
    """
    if not out.numel():
        return
    if transposed and index.inputs < _DIRECT:
        yield from _summed_partials(x, values, bias, index, out)
        return
    if transposed:
        plan = plan_of(index)
        lists = {"starts": plan.starts, "columns": plan.rows, "order": plan.order}
        sizes = {"PER": index.outputs, "MADE": index.inputs, "STEP_PER": 1, "STEP_MADE": index.outputs}
    else:
        lists = {"starts": index.starts, "columns": index.columns}
        sizes = {"PER": index.inputs, "MADE": index.outputs, "STEP_PER": index.outputs, "STEP_MADE": 1}
    batch, rows = x.shape[1], lists["starts"].numel() - 1
    # The rows of a product are outputs where there are as many as tensor cores take at once, else batch.
    width, lanes = _power(sizes["MADE"]), min(_lanes(x), _power(batch))
    tile = {"TERMS": _depth(x), "WIDTH": width, "BATCH": lanes, "OUTPUTS_FIRST": width >= rows_at_once}
    at = {"batch": batch, "rows": rows, "out_feature": out.stride(1), "out_batch": out.stride(0)}
    tensors = {"x": x, "values": values, "bias": bias, "order": None, **lists, "out": out}
    arguments = {**tensors, **at, **sizes, **tile, **_arithmetic(x)}
    yield Launch(gpu_programs.gathered, rows * _tiles(batch, lanes), arguments, warps=4 if width < 128 else 8)


def samples(x: Tensor, dy: Tensor, index: UnitIndex, out: Tensor) -> Iterator[Launch]:
    """The launches of `unit_sddmm`; x (cols, batch) and dy (rows, batch), contiguous."""
    if not index.units:
        return
    plan = plan_of(index)
    tensors = {"x": x, "dy": dy, "starts": index.starts, "columns": index.columns, "out": out}
    tiles = {"tile_rows": plan.tile_rows, "tile_numbers": plan.tile_numbers}
    sizes = _unit(index) | {"batch": x.shape[1], "WIDTH": _power(index.outputs), "BATCH": _depth(x)}
    arguments = {**tensors, **tiles, **sizes, **_arithmetic(x)}
    yield Launch(gpu_programs.sampled, plan.tile_rows.numel(), arguments)


def _summed_partials(
    dy: Tensor, values: Tensor, bias: Tensor | None, index: UnitIndex, out: Tensor
) -> Iterator[Launch]:
    """out (batch, cols) = dy (rows, batch) times W: what each term adds, then the sum of each feature in its order."""
    plan, arithmetic = plan_of(index), _arithmetic(dy)
    terms, tiles, lanes, batch = index.units * index.inputs, plan.tile_rows.numel(), _lanes(dy), dy.shape[1]
    chunk = min(batch, max(1, _WORKSPACE // (4 * lanes * max(1, terms))) * lanes)
    partials = dy.new_empty(terms * chunk, dtype=torch.promote_types(dy.dtype, torch.float32))
    made: dict[str, Any] = {"dy": dy, "values": values, "starts": index.starts, "out": partials, "batch": batch}
    made |= {"tile_rows": plan.tile_rows, "tile_numbers": plan.tile_numbers, "tiles": tiles, **_unit(index)}
    made |= {"WIDTH": min(_depth(dy), _power(index.outputs)), "BATCH": lanes, **arithmetic}
    added: dict[str, Any] = {"partials": partials, "bias": bias, "starts": plan.starts, "order": plan.order, "out": out}
    added |= {"features": index.cols, "out_feature": out.stride(1), "out_batch": out.stride(0)}
    added |= {"K": index.inputs, "TERMS": 8, "BATCH": 256, "SUM": arithmetic["SUM"]}
    for begin in range(0, batch, chunk):
        part = {"begin": begin, "size": min(chunk, batch - begin)}
        if terms:
            yield Launch(gpu_programs.partial, tiles * _tiles(part["size"], lanes), made | part)
        yield Launch(gpu_programs.summed, index.cols * _tiles(part["size"], 256), added | part)


_plans: MutableMapping[Tensor, tuple[Tensor, tuple[int, ...], Plan]] = WeakTensorKeyDictionary()


def plan_of(index: UnitIndex) -> Plan:
    """The plan of an index, made on its device and kept as long as `index.columns` lives and nobody writes to it."""
    key = (index.cols, index.outputs, index.inputs, _version(index.starts), _version(index.columns))
    known = _plans.get(index.columns)
    if known is None or known[0] is not index.starts or known[1] != key:
        # `starts` is compared by identity, and so must live as long as what was made of it.
        known = (index.starts, key, _plan(index))
        _plans[index.columns] = known
    return known[2]


def _plan(index: UnitIndex) -> Plan:
    rows = index.starts.numel() - 1
    transposed = reference.transpose_index(index.starts, index.columns, index.cols // index.inputs)
    # No more tiles than this: each row ends in one that is not full. Asking how many there are would wait for the GPU.
    most = rows + index.units * index.inputs // _TERMS
    ends = (index.starts.diff() * index.inputs + (_TERMS - 1)).div(_TERMS, rounding_mode="floor").cumsum(0)
    tile = torch.arange(most, device=index.starts.device)
    row = torch.searchsorted(ends, tile, right=True)
    number = tile - torch.cat([ends.new_zeros(1), ends])[row]
    return Plan(*transposed, row.int(), number.int())


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; one made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _run(x: Tensor, launches: Iterator[Launch]) -> None:
    # Of a tensor on the CPU, where Triton interprets the programs, the number is -1, which changes nothing.
    with torch.cuda.device(x.get_device()):
        for program, instances, arguments, warps, stages in launches:
            # Fusion is named, since its default differs between versions of Triton.
            program[(instances,)](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def _unit(index: UnitIndex) -> dict[str, int]:
    return {"rows": index.starts.numel() - 1, "G": index.outputs, "K": index.inputs, "TERMS": _TERMS}


def _arithmetic(x: Tensor) -> dict[str, Any]:
    """The type of sums; float32 is multiplied as torch's own products are told to."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"SUM": SUMS[x.dtype], "PRECISION": "tf32" if tf32 else "ieee"}


def _depth(x: Tensor) -> int:
    """What a tile sums at once: 128 bytes."""
    return 128 // x.element_size()


def _lanes(x: Tensor) -> int:
    """How much of the batch a tile makes at once: 256 bytes."""
    return 256 // x.element_size()


def _power(size: int) -> int:
    """The next power of 2, at least 16: with less, some versions of Triton leave the tensor cores aside."""
    return max(16, 1 << (size - 1).bit_length())


def _tiles(size: int, step: int) -> int:
    return -(-size // step)
