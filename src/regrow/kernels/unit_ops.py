"""Products with weights made of units as torch operators, closed under differentiation as those of single entries are.

The last arguments of every operator are the fields of a `UnitIndex`. Values are (capacity, inputs, outputs), of which
the first `units` are used. `keep` is the key of a `Keeper` that is shown the operands of the value gradient; 0 is
nobody.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from regrow.kernels import activations, layout
from regrow.kernels.units import UnitIndex

_operator = partial(layout.operator, layout.UNITS)


@_operator("unit_spmm", "Tensor x, Tensor values, Tensor? bias, bool transposed, bool feature_major, SymInt keep")
def unit_spmm(
    x: Tensor, values: Tensor, bias: Tensor | None, transposed: bool, feature_major: bool, keep: int, *at: Any
) -> Tensor:
    """x (batch, cols) W^T + bias, or x (batch, rows) W + bias; `feature_major` is the layout of the output.

    Raises:
        ValueError: when sizes, types or devices do not fit each other.
    """
    index = UnitIndex(*at)
    features, others = (index.rows, index.cols) if transposed else (index.cols, index.rows)
    require_index(index)
    require_alike(index, x, values, bias)
    require_shape("the input", x, (x.shape[0], features))
    require_values(values, index)
    if bias is not None:
        require_shape("the bias", bias, (others,))
    out = layout.empty(x, others, feature_major)
    found = layout.kernels(x, values, index.starts)
    found.unit_spmm(layout.flat(x), values.contiguous(), layout.whole(bias), index, transposed, out)
    return out


@unit_spmm.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, transposed: bool, feature_major: bool, keep: int, *at: Any
) -> Tensor:
    index = UnitIndex(*at)
    return layout.empty(x, index.cols if transposed else index.rows, feature_major)


def _spmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, ctx.transposed, _, ctx.keep, starts, columns, *ctx.sizes = inputs
    ctx.save_for_backward(x, values, starts, columns)


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *tensors = ctx.saved_tensors
    at = (*tensors, *ctx.sizes)
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    dx = dvalues = None
    # In the layout of x, so that the operations below meet gradients laid out as their own outputs.
    dy, feature_major = layout.for_units(layout.flat(grad)), layout.is_feature_major(x)
    if need_x and need_values:
        dx, dvalues = unit_gradients(x, dy, values, ctx.transposed, feature_major, ctx.keep, *at)
    elif need_x:
        dx = unit_spmm(dy, values, None, not ctx.transposed, feature_major, ctx.keep, *at)
    elif need_values:
        inner, outer = (dy, x) if ctx.transposed else (x, dy)
        dvalues = unit_sddmm(inner, outer, values.shape[0], ctx.keep, *at)
    return dx, dvalues, grad.sum(0) if need_bias else None, *[None] * 8


unit_spmm.register_autograd(_spmm_backward, setup_context=_spmm_context)


@_operator("unit_sddmm", "Tensor x, Tensor dy, SymInt capacity, SymInt keep")
def unit_sddmm(x: Tensor, dy: Tensor, capacity: int, keep: int, *at: Any) -> Tensor:
    """(capacity, inputs, outputs): at each entry the sum over b of dy[b, row] x[b, column]; zero beyond the units.

    Raises:
        ValueError: when sizes, types or devices do not fit each other.
    """
    index = UnitIndex(*at)
    require_index(index)
    require_alike(index, x, dy)
    require_shape("the input", x, (x.shape[0], index.cols))
    require_shape("the output gradient", dy, (x.shape[0], index.rows))
    if capacity < index.units:
        raise ValueError(f"a capacity of {capacity:,} units is too small for the {index.units:,} active ones")
    out = x.new_empty(capacity, index.inputs, index.outputs)
    out[index.units :] = 0
    layout.kernels(x, dy, index.starts).unit_sddmm(layout.flat(x), layout.flat(dy), index, out)
    activations.keep(keep, x, dy)
    return out


@unit_sddmm.register_fake
def _(x: Tensor, dy: Tensor, capacity: int, keep: int, *at: Any) -> Tensor:
    index = UnitIndex(*at)
    return x.new_empty(capacity, index.inputs, index.outputs)


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dy, _, _, starts, columns, *ctx.sizes = inputs
    ctx.save_for_backward(x, dy, starts, columns)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, dy, *tensors = ctx.saved_tensors
    at = (*tensors, *ctx.sizes)
    need_x, need_dy = ctx.needs_input_grad[:2]
    dx = unit_spmm(dy, grad, None, True, layout.is_feature_major(x), 0, *at) if need_x else None
    ddy = unit_spmm(x, grad, None, False, layout.is_feature_major(dy), 0, *at) if need_dy else None
    return dx, ddy, *[None] * 7


unit_sddmm.register_autograd(_sddmm_backward, setup_context=_sddmm_context)


_OPERANDS = "Tensor x, Tensor dy, Tensor values, bool transposed, bool feature_major, SymInt keep"


@_operator("unit_spmm_backward", _OPERANDS, "(Tensor, Tensor)")
def unit_gradients(
    x: Tensor, dy: Tensor, values: Tensor, transposed: bool, feature_major: bool, keep: int, *at: Any
) -> tuple[Tensor, Tensor]:
    """Both gradients of `unit_spmm`: that of x, `feature_major` or not, and that of the values, zero beyond the units.

    Raises:
        ValueError: when sizes, types or devices do not fit each other.
    """
    index = UnitIndex(*at)
    features, others = (index.rows, index.cols) if transposed else (index.cols, index.rows)
    require_index(index)
    require_alike(index, x, dy, values)
    require_shape("the input", x, (x.shape[0], features))
    require_shape("the output gradient", dy, (x.shape[0], others))
    require_values(values, index)
    dx, dvalues = layout.empty(x, features, feature_major), values.new_empty(values.shape)
    dvalues[index.units :] = 0
    found = layout.kernels(x, dy, values, index.starts)
    found.unit_backward(layout.flat(x), layout.flat(dy), values.contiguous(), index, transposed, dx, dvalues)
    activations.keep(keep, *((dy, x) if transposed else (x, dy)))
    return dx, dvalues


@unit_gradients.register_fake
def _(
    x: Tensor, dy: Tensor, values: Tensor, transposed: bool, feature_major: bool, keep: int, *at: Any
) -> tuple[Tensor, Tensor]:
    return layout.empty(x, x.shape[1], feature_major), values.new_empty(values.shape)


def _gradients_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dy, values, ctx.transposed, _, ctx.keep, starts, columns, *ctx.sizes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dy, values, starts, columns)


def _gradients_backward(ctx: Any, to_dx: Tensor | None, to_dvalues: Tensor | None) -> tuple[Any, ...]:
    x, dy, values, *tensors = ctx.saved_tensors
    at = (*tensors, *ctx.sizes)
    need_x, need_dy, need_values = ctx.needs_input_grad[:3]
    transposed, keep = ctx.transposed, ctx.keep
    from_dx = from_dvalues = to_x = to_values = None
    if to_dx is not None:
        to_dx = layout.flat(to_dx)
        if need_dy:
            from_dx = unit_spmm(to_dx, values, None, transposed, layout.is_feature_major(dy), keep, *at)
        if need_values:
            to_values = unit_sddmm(*((dy, to_dx) if transposed else (to_dx, dy)), values.shape[0], keep, *at)
    if to_dvalues is not None:
        if need_dy:
            from_dvalues = unit_spmm(x, to_dvalues, None, transposed, layout.is_feature_major(dy), 0, *at)
        if need_x:
            to_x = unit_spmm(dy, to_dvalues, None, not transposed, layout.is_feature_major(x), 0, *at)
    return to_x, layout.total(from_dx, from_dvalues), to_values, *[None] * 8


unit_gradients.register_autograd(_gradients_backward, setup_context=_gradients_context)


def require_index(index: UnitIndex) -> None:
    """What the kernels trust about an index, as far as it shows without reading all of it."""
    starts, columns = index.starts, index.columns
    if starts.dtype != torch.int64 or columns.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"starts are int64 and columns int32 or int64, got {starts.dtype} and {columns.dtype}")
    if starts.dim() != 1 or starts.numel() < 1 or columns.dim() != 1:
        shapes = f"{tuple(starts.shape)} and {tuple(columns.shape)}"
        raise ValueError(f"starts are (rows of units + 1,) and columns (units,), got {shapes}")
    if not starts.is_contiguous() or not columns.is_contiguous():
        raise ValueError("starts and columns must be contiguous: call .contiguous() on both")
    if min(index.outputs, index.inputs) < 1 or index.cols % index.inputs:
        raise ValueError(
            f"units of {index.outputs} x {index.inputs} do not divide a matrix of {index.rows:,} x {index.cols:,}"
        )


def require_alike(index: UnitIndex, x: Tensor, *others: Tensor | None) -> None:
    """That all tensors have one type, and lie with the index on one device."""
    for tensor in others:
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"a product takes tensors of one type on one device, got {x.dtype} on {x.device} and {tensor.dtype} on "
                f"{tensor.device}"
            )
    if not index.starts.device == index.columns.device == x.device:
        raise ValueError(f"the index lies on {index.starts.device}, the input on {x.device}: move them together")


def require_values(values: Tensor, index: UnitIndex) -> None:
    """That there are values for all units."""
    if values.dim() != 3 or values.shape[0] < index.units or values.shape[1:] != (index.inputs, index.outputs):
        raise ValueError(
            f"the values are {tuple(values.shape)}, {index.units:,} units of {index.outputs} outputs x {index.inputs} "
            f"inputs take ({index.units:,} or more, {index.inputs}, {index.outputs})"
        )


def require_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """That a tensor is as the weight takes it."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, the weight takes {shape}")
