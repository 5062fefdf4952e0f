"""The compiled kernels: pointers and sizes of tensors handed over, and whether there are any."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from regrow.kernels.geometry import Geometry
from regrow.kernels.index import Index
from regrow.kernels.units import UnitIndex

_log = logging.getLogger("regrow")
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def _find() -> ModuleType | None:
    """The compiled module, unless it is missing or the environment variable REGROW_ISA says "reference"."""
    if os.environ.get("REGROW_ISA") == "reference":
        return None
    try:
        return importlib.import_module("regrow.kernels._native")
    except ImportError:
        return None


_native = _find()
_told = False


def instruction_set() -> str | None:
    """The instruction set that the compiled kernels use on this machine; None where they were not compiled."""
    return None if _native is None else str(_native.isa())


def runs_on(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these tensors; where they are missing, says so once in the log `regrow`."""
    global _told  # noqa: PLW0603 - one message per process
    if _native is None:
        if not _told:
            _told = True
            _log.warning(
                "sparse layers run on the slow reference in plain torch, since regrow was installed without its "
                "compiled kernels or REGROW_ISA=reference is set: install a C++ compiler and then regrow anew"
            )
        return False
    return all(t.device.type == "cpu" and (not t.is_floating_point() or t.dtype in _DTYPES) for t in tensors)


def transpose_index(starts: Tensor, columns: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t_starts, t_rows, order) by counting: starts (rows + 1,) int64, columns (nnz,) int32 or int64."""
    assert _native is not None
    t_starts = torch.empty(cols + 1, dtype=torch.int64)
    t_rows, order = torch.empty_like(columns), torch.empty_like(columns)
    pointers = [t.data_ptr() for t in (starts, columns, t_starts, t_rows, order)]
    _native.transpose_index(_wide(columns), starts.numel() - 1, cols, *pointers)
    return t_starts, t_rows, order


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, transposed: bool, out: Tensor) -> None:
    """out (batch, rows) = x (batch, cols) W^T + bias; with `transposed`, out (batch, cols) = x (batch, rows) W."""
    assert _native is not None
    starts, columns, order = index.starts, index.columns, 0
    rows, cols = index.rows, index.cols
    if transposed:
        starts, columns, order = index.t_starts, index.t_rows, index.order.data_ptr()
        rows, cols = cols, rows
    _native.spmm(
        _DTYPES[x.dtype],
        _wide(columns),
        torch.get_num_threads(),
        rows,
        cols,
        x.shape[0],
        starts.data_ptr(),
        columns.data_ptr(),
        order,
        values.data_ptr(),
        x.data_ptr(),
        *x.stride(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *out.stride(),
    )


def sddmm(x: Tensor, dy: Tensor, index: Index, out: Tensor) -> None:
    """out[j] = sum_b dy[b, row(j)] x[b, column(j)], j below nnz; x (batch, cols), dy (batch, rows)."""
    _backward(x, dy, index, out, (0, 0, 0, 0), (0, 0, 0))


def backward(
    x: Tensor, dy: Tensor, values: Tensor, index: Index, transposed: bool, dx: Tensor, dvalues: Tensor
) -> None:
    """`spmm` of dy to dx and `sddmm` to dvalues: both gradients of y = x W^T, or of y = x W when `transposed`."""
    if transposed:
        spmm(dy, values, None, index, False, dx)
        return sddmm(dy, x, index, dvalues)
    back = [t.data_ptr() for t in (index.t_starts, index.t_rows, index.order, values)]
    return _backward(x, dy, index, dvalues, back, (dx.data_ptr(), *dx.stride()))


def _backward(x: Tensor, dy: Tensor, index: Index, dvalues: Tensor, back: Sequence[int], dx: tuple[int, ...]) -> None:
    assert _native is not None
    _native.backward(
        _DTYPES[x.dtype],
        _wide(index.columns),
        torch.get_num_threads(),
        index.rows,
        index.cols,
        x.shape[0],
        index.starts.data_ptr(),
        index.columns.data_ptr(),
        *back,
        x.data_ptr(),
        *x.stride(),
        dy.data_ptr(),
        *dy.stride(),
        *dx,
        dvalues.data_ptr(),
    )


def unit_spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: UnitIndex, transposed: bool, out: Tensor) -> None:
    """As `spmm`, of values (units or more, inputs, outputs)."""
    assert _native is not None
    _native.unit_spmm(
        *_units(x, index),
        transposed,
        x.shape[0],
        index.starts.data_ptr(),
        index.columns.data_ptr(),
        values.data_ptr(),
        x.data_ptr(),
        *x.stride(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *out.stride(),
    )


def unit_sddmm(x: Tensor, dy: Tensor, index: UnitIndex, out: Tensor) -> None:
    """out[j, k, g] = sum_b dy[b, row(j) + g] x[b, column(j) + k], j below the number of units."""
    _unit_backward(x, dy, index, out, 0, (0, 0, 0))


def unit_backward(
    x: Tensor, dy: Tensor, values: Tensor, index: UnitIndex, transposed: bool, dx: Tensor, dvalues: Tensor
) -> None:
    """As `backward`, of values (units or more, inputs, outputs)."""
    if transposed:
        unit_spmm(dy, values, None, index, False, dx)
        return unit_sddmm(dy, x, index, dvalues)
    return _unit_backward(x, dy, index, dvalues, values.data_ptr(), (dx.data_ptr(), *dx.stride()))


def _unit_backward(x: Tensor, dy: Tensor, index: UnitIndex, dvalues: Tensor, values: int, dx: tuple[int, ...]) -> None:
    assert _native is not None
    _native.unit_backward(
        *_units(x, index),
        x.shape[0],
        index.starts.data_ptr(),
        index.columns.data_ptr(),
        values,
        x.data_ptr(),
        *x.stride(),
        dy.data_ptr(),
        *dy.stride(),
        *dx,
        dvalues.data_ptr(),
    )


def conv(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index | UnitIndex, geometry: Geometry, out: Tensor
) -> None:
    """out (N, O, HO, WO) = the convolution of x (N, C, H, W), contiguous, with the sparse weight."""
    assert _native is not None
    run = _native.unit_conv_forward if isinstance(index, UnitIndex) else _native.conv_forward
    bias_at = 0 if bias is None else bias.data_ptr()
    data = [index.starts, index.columns, values, x]
    run(*_conv(x, index, geometry), *(t.data_ptr() for t in data), bias_at, out.data_ptr())


def conv_input_gradient(dy: Tensor, values: Tensor, index: Index | UnitIndex, geometry: Geometry, out: Tensor) -> None:
    """out (N, C, H, W): the gradient of the input from dy (N, O, HO, WO), contiguous."""
    assert _native is not None
    if isinstance(index, UnitIndex):
        run, where = _native.unit_conv_input_gradient, [index.starts, index.columns]
    else:
        run, where = _native.conv_input_gradient, [index.t_starts, index.t_rows, index.order]
    run(*_conv(out, index, geometry), *(t.data_ptr() for t in [*where, values, dy, out]))


def conv_value_gradient(x: Tensor, dy: Tensor, index: Index | UnitIndex, geometry: Geometry, out: Tensor) -> None:
    """out[j], j below nnz or units: the gradient of values, from x (N, C, H, W) and dy (N, O, HO, WO), contiguous."""
    back = [0] if isinstance(index, UnitIndex) else [0, 0, 0, 0]
    _conv_backward(x, dy, index, geometry, back, 0, out)


def conv_backward(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    index: Index | UnitIndex,
    geometry: Geometry,
    dx: Tensor,
    dvalues: Tensor,
) -> None:
    """`conv_input_gradient` to dx and `conv_value_gradient` to dvalues."""
    needed = [values] if isinstance(index, UnitIndex) else [index.t_starts, index.t_rows, index.order, values]
    _conv_backward(x, dy, index, geometry, [t.data_ptr() for t in needed], dx.data_ptr(), dvalues)


def _conv_backward(
    x: Tensor,
    dy: Tensor,
    index: Index | UnitIndex,
    geometry: Geometry,
    back: Sequence[int],
    dx: int,
    dvalues: Tensor,
) -> None:
    assert _native is not None
    run = _native.unit_conv_backward if isinstance(index, UnitIndex) else _native.conv_backward
    at = (index.starts.data_ptr(), index.columns.data_ptr(), *back, x.data_ptr(), dy.data_ptr(), dx, dvalues.data_ptr())
    run(*_conv(x, index, geometry), *at)


def _conv(x: Tensor, index: Index | UnitIndex, geometry: Geometry) -> tuple[int, ...]:
    head = (_DTYPES[x.dtype], _wide(index.columns), torch.get_num_threads())
    numbers = (*head, *x.shape, index.rows, *(n for pair in geometry[:-1] for n in pair), geometry.groups)
    return (*numbers, index.outputs, index.units) if isinstance(index, UnitIndex) else numbers


def _units(x: Tensor, index: UnitIndex) -> tuple[int, ...]:
    head = (_DTYPES[x.dtype], _wide(index.columns), torch.get_num_threads(), index.outputs, index.inputs)
    return (*head, index.starts.numel() - 1, index.cols // index.inputs, index.units)


def _wide(columns: Tensor) -> bool:
    return columns.dtype == torch.int64
