"""Products with sparse weights as torch operators, closed under differentiation.

The gradient of a product is a product with the transposed weight and a sampled one, and theirs are products again, so
derivatives of any order exist. Every operator has a shape rule, so `torch.compile` and `torch.export` see through it.
`keep` is the key of a `Keeper` that is shown the operands of the value gradient; 0 is nobody.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from regrow.core.topology import Topology
from regrow.kernels import activations, conv_ops, layout, unit_ops
from regrow.kernels.geometry import Geometry
from regrow.kernels.index import Index
from regrow.kernels.units import UnitIndex

_INT32 = torch.iinfo(torch.int32).max


def index(topology: Topology) -> Index:
    """The index of a topology of single entries, in O(nnz + rows + cols).

    Raises:
        ValueError: when the topology is made of larger units, which have a `unit_index`.

    Examples:
        >>> index(Topology((2, 3), torch.tensor([1, 2, 4]))).order.tolist()
        [0, 2, 1]
    """
    if not topology.is_unstructured:
        raise ValueError(f"an index is of single entries, and this is {topology}: take its unit_index, or its entries")
    fits = max(topology.rows, topology.row_size, topology.nnz) <= _INT32
    columns = topology.columns.to(torch.int32 if fits else torch.int64)
    found = layout.kernels(columns).transpose_index(topology.starts, columns, topology.row_size)
    return Index(topology.starts, columns, *found)


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index | UnitIndex, *, transposed: bool = False, keep: int = 0
) -> Tensor:
    """y = x W^T + b; with `transposed`, y = x W + b.

    Args:
        x: (..., cols), or (..., rows) when transposed. Feature-major input, (batch, cols) with stride (1, batch), gives
            feature-major output: element-wise operations keep the layout, so that it travels from layer to layer.
        values: (capacity,) of which the first nnz are used, in the order of the index; of units (capacity, inputs,
            outputs) of which the first `index.units` are used.
        bias: (rows,), or (cols,) when transposed; or None.
        index: of W.
        transposed: multiply by W instead of W^T. The thin units of 1 output x g inputs are best stored so, as units of
            g x 1 of the transposed weight.
        keep: the key of a `Keeper`.

    Returns:
        (..., rows), or (..., cols) when transposed; of the type that autocast asks for, if it does.

    Raises:
        ValueError: when the last axis of x does not fit, or the types differ.

    Examples:
        >>> from regrow.kernels import unit_index
        >>> eights = Topology((16, 3), torch.tensor([1, 2, 4]), unit=(8, 1))
        >>> linear(torch.ones(5, 3), torch.ones(3, 1, 8), None, unit_index(eights))[0].tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    expected = index.rows if transposed else index.cols
    if x.shape[-1] != expected:
        raise ValueError(f"the input has {x.shape[-1]:,} features, the sparse weight takes {expected:,}")
    x, values, bias = layout.cast(x, values, bias)
    flat = layout.flat(x)
    feature_major = layout.is_feature_major(flat)
    y: Tensor
    if isinstance(index, UnitIndex):
        y = unit_ops.unit_spmm(layout.for_units(flat), values, bias, transposed, feature_major, keep, *index)
    else:
        y = _spmm(flat, values, bias, transposed, feature_major, keep, *index)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def conv(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index | UnitIndex, geometry: Geometry, *, keep: int = 0
) -> Tensor:
    """The convolution of x (N, C, H, W) with a sparse weight, plus bias (O,): (N, O, HO, WO).

    Args:
        x: (N, C, H, W).
        values: (capacity,) of which the first nnz are used; of units (capacity, 1, outputs) of which the first
            `index.units` are used.
        bias: (O,) or None.
        index: of the weight seen as the matrix (O, C / groups * KH * KW). A unit is some filters that share one tap of
            one channel, all in one group.
        geometry: kernel, stride, padding, dilation, groups.
        keep: the key of a `Keeper`.

    Raises:
        ValueError: when the channels of x do not fit, or units are larger or span two groups.

    Examples:
        >>> from regrow.kernels import unit_index
        >>> eights = Topology((16, 1, 1, 2), torch.tensor([0, 3]), unit=(8, 1, 1, 1))
        >>> x, ones = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.ones(2, 1, 8)
        >>> y = conv(x, ones, None, unit_index(eights), Geometry((1, 2)))
        >>> y[0, 0].tolist(), y[0, 15].tolist()
        ([[1.0, 2.0]], [[2.0, 3.0]])
    """
    channels = index.cols * geometry.groups // (geometry.kernel[0] * geometry.kernel[1])
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"the input has shape {tuple(x.shape)}, the sparse convolution takes (N, {channels:,}, H, W)")
    if min(geometry.output(x.shape[2], x.shape[3])) < 1:
        raise ValueError(
            f"the input of {x.shape[2]} x {x.shape[3]}, padded by {geometry.padding}, is smaller than the kernel of "
            f"{geometry.kernel} with dilation {geometry.dilation}: give larger images or more padding"
        )
    x, values, bias = layout.cast(x, values, bias)
    products = conv_ops.UNITS if isinstance(index, UnitIndex) else conv_ops.ENTRIES
    y: Tensor = products.forward(x.contiguous(), values, bias, geometry.ints, keep, *index)
    return y


def conv_transpose(
    x: Tensor, values: Tensor, index: Index, geometry: Geometry, size: tuple[int, int], *, keep: int = 0
) -> Tensor:
    """The transposed convolution of x (N, I, H, W) with a sparse weight: (N, O, *size).

    This is what the convolution of `geometry` passes back from a gradient x to an input of `size`.

    Args:
        x: (N, I, H, W).
        values: (capacity,) of which the first nnz are used.
        index: of the weight seen as the matrix (I, O / groups * KH * KW).
        geometry: of the convolution that is transposed.
        size: height and width of the output, which that convolution takes to H and W.
        keep: the key of a `Keeper`.

    Raises:
        ValueError: when the channels of x or `size` do not fit.
    """
    if x.dim() != 4 or x.shape[1] != index.rows:
        raise ValueError(
            f"the input has shape {tuple(x.shape)}, the transposed sparse convolution takes (N, {index.rows:,}, H, W)"
        )
    if min(*size, *x.shape[2:]) < 1 or geometry.output(*size) != (x.shape[2], x.shape[3]):
        raise ValueError(
            f"an output of {size[0]} x {size[1]} does not belong to an input of {x.shape[2]} x {x.shape[3]}, with a "
            f"kernel of {geometry.kernel}, stride {geometry.stride}, padding {geometry.padding} and dilation "
            f"{geometry.dilation}"
        )
    x, values, _ = layout.cast(x, values, None)
    channels = index.cols * geometry.groups // (geometry.kernel[0] * geometry.kernel[1])
    shape = [x.shape[0], channels, *size]
    y: Tensor = conv_ops.ENTRIES.input_gradient(x.contiguous(), values, geometry.ints, shape, keep, *index)
    return y


def sampled(operands: activations.Operands, index: Index | UnitIndex) -> Tensor:
    """The gradient of a weight at the entries of `index`, from what one product left behind.

    Returns:
        (nnz,), or (units, inputs, outputs) at the units of a `UnitIndex`, which need not be those of the product.
    """
    x, dy, geometry = operands
    if isinstance(index, UnitIndex):
        if geometry is not None and not conv_ops.takes(index, geometry):
            return _sampled_singly(operands, index)
        found: Tensor = (
            unit_ops.unit_sddmm(x, dy, index.units, 0, *index)
            if geometry is None
            else conv_ops.UNITS.value_gradient(x, dy, geometry.ints, index.units, 0, *index)
        )
    elif geometry is None:
        found = _sddmm(x, dy, index.nnz, 0, *index)
    else:
        found = conv_ops.ENTRIES.value_gradient(x, dy, geometry.ints, index.nnz, 0, *index)
    return found


def _sampled_singly(operands: activations.Operands, units: UnitIndex) -> Tensor:
    """`sampled` at units that the kernels of convolutions do not take: entry by entry."""
    whole = Topology.trusted((units.rows, units.cols), units.starts, units.columns, (units.outputs, units.inputs))
    positions, order = whole.entries.sort()
    found = sampled(operands, index(Topology(whole.shape, positions)))
    return torch.empty_like(found).index_copy_(0, order, found).view(units.units, units.inputs, units.outputs)


_operator = partial(layout.operator, layout.ENTRIES)


@_operator("spmm", "Tensor x, Tensor values, Tensor? bias, bool transposed, bool feature_major, SymInt keep")
def _spmm(
    x: Tensor, values: Tensor, bias: Tensor | None, transposed: bool, feature_major: bool, keep: int, *at: Tensor
) -> Tensor:
    """x (batch, cols) W^T + bias, or x (batch, rows) W + bias; `feature_major` is the layout of the output."""
    index = Index(*at)
    out = layout.empty(x, index.cols if transposed else index.rows, feature_major)
    layout.kernels(x, values, index.starts).spmm(
        layout.flat(x), values.contiguous(), layout.whole(bias), index, transposed, out
    )
    return out


@_spmm.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, transposed: bool, feature_major: bool, keep: int, *at: Tensor
) -> Tensor:
    index = Index(*at)
    return layout.empty(x, index.cols if transposed else index.rows, feature_major)


def _spmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, ctx.transposed, _, ctx.keep, *at = inputs
    ctx.save_for_backward(x, values, *at)


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *at = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    dx = dvalues = None
    # In the layout of x, so that the operations below meet gradients laid out as their own outputs.
    dy, feature_major = layout.flat(grad), layout.is_feature_major(x)
    if need_x and need_values:
        dx, dvalues = _gradients(x, dy, values, ctx.transposed, feature_major, ctx.keep, *at)
    elif need_x:
        dx = _spmm(dy, values, None, not ctx.transposed, feature_major, ctx.keep, *at)
    elif need_values:
        inner, outer = (dy, x) if ctx.transposed else (x, dy)
        dvalues = _sddmm(inner, outer, values.shape[0], ctx.keep, *at)
    return dx, dvalues, grad.sum(0) if need_bias else None, *[None] * 8


_spmm.register_autograd(_spmm_backward, setup_context=_spmm_context)


@_operator("sddmm", "Tensor x, Tensor dy, SymInt capacity, SymInt keep")
def _sddmm(x: Tensor, dy: Tensor, capacity: int, keep: int, *at: Tensor) -> Tensor:
    """(capacity,): at each active entry the sum over the batch of dy[b, row] x[b, column]; zero beyond nnz."""
    index = Index(*at)
    out = x.new_empty(capacity)
    out[index.nnz :] = 0
    layout.kernels(x, dy, index.starts).sddmm(layout.flat(x), layout.flat(dy), index, out)
    activations.keep(keep, x, dy)
    return out


@_sddmm.register_fake
def _(x: Tensor, dy: Tensor, capacity: int, keep: int, *at: Tensor) -> Tensor:
    return x.new_empty(capacity)


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dy, _, _, *at = inputs
    ctx.save_for_backward(x, dy, *at)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, dy, *at = ctx.saved_tensors
    dx = _spmm(dy, grad, None, True, layout.is_feature_major(x), 0, *at) if ctx.needs_input_grad[0] else None
    ddy = _spmm(x, grad, None, False, layout.is_feature_major(dy), 0, *at) if ctx.needs_input_grad[1] else None
    return dx, ddy, *[None] * 7


_sddmm.register_autograd(_sddmm_backward, setup_context=_sddmm_context)


_OPERANDS = "Tensor x, Tensor dy, Tensor values, bool transposed, bool feature_major, SymInt keep"


@_operator("spmm_backward", _OPERANDS, "(Tensor, Tensor)")
def _gradients(
    x: Tensor, dy: Tensor, values: Tensor, transposed: bool, feature_major: bool, keep: int, *at: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients of `_spmm`: that of x, `feature_major` or not, and that of the values, zero beyond nnz."""
    index = Index(*at)
    dx, dvalues = layout.empty(x, x.shape[1], feature_major), values.new_empty(values.shape)
    dvalues[index.nnz :] = 0
    found = layout.kernels(x, dy, values, index.starts)
    found.backward(layout.flat(x), layout.flat(dy), values.contiguous(), index, transposed, dx, dvalues)
    activations.keep(keep, *((dy, x) if transposed else (x, dy)))
    return dx, dvalues


@_gradients.register_fake
def _(
    x: Tensor, dy: Tensor, values: Tensor, transposed: bool, feature_major: bool, keep: int, *at: Tensor
) -> tuple[Tensor, Tensor]:
    return layout.empty(x, x.shape[1], feature_major), values.new_empty(values.shape)


def _gradients_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dy, values, ctx.transposed, _, ctx.keep, *at = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dy, values, *at)


def _gradients_backward(ctx: Any, to_dx: Tensor | None, to_dvalues: Tensor | None) -> tuple[Any, ...]:
    """`to_dx` meets dx = dy W, and `to_dvalues` the products that dvalues was sampled from."""
    x, dy, values, *at = ctx.saved_tensors
    need_x, need_dy, need_values = ctx.needs_input_grad[:3]
    transposed, keep = ctx.transposed, ctx.keep
    from_dx = from_dvalues = to_x = to_values = None
    if to_dx is not None:
        to_dx = layout.flat(to_dx)
        if need_dy:
            from_dx = _spmm(to_dx, values, None, transposed, layout.is_feature_major(dy), keep, *at)
        if need_values:
            to_values = _sddmm(*((dy, to_dx) if transposed else (to_dx, dy)), values.shape[0], keep, *at)
    if to_dvalues is not None:
        if need_dy:
            from_dvalues = _spmm(x, to_dvalues, None, transposed, layout.is_feature_major(dy), 0, *at)
        if need_x:
            to_x = _spmm(dy, to_dvalues, None, not transposed, layout.is_feature_major(x), 0, *at)
    return to_x, layout.total(from_dx, from_dvalues), to_values, *[None] * 8


_gradients.register_autograd(_gradients_backward, setup_context=_gradients_context)
