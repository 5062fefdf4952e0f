"""Convolutions with sparse weights as torch operators, for either kind of index, closed under differentiation.

The last arguments of every operator are the fields of the index. `keep` is the key of a `Keeper` that is shown the
operands of the value gradient; 0 is nobody.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regrow.kernels import activations, layout, unit_ops
from regrow.kernels.geometry import Geometry
from regrow.kernels.index import Index
from regrow.kernels.units import UnitIndex


def takes(index: UnitIndex, geometry: Geometry) -> bool:
    """Whether a unit is some filters of one group that share one tap of one channel."""
    return index.inputs == 1 and index.rows // geometry.groups % index.outputs == 0


class Convolutions:
    """The operators of one kind of index: the convolution and both gradients, each the derivative of the others.

    Args:
        kind: what their last arguments are the fields of.
        fields: those, as a schema.
        prefix: of their names.
    """

    def __init__(self, kind: type[Index] | type[UnitIndex], fields: str, prefix: str = "") -> None:
        self.kind = kind
        operands = "Tensor x, Tensor values, Tensor? bias, SymInt[] geometry, SymInt keep"
        self.forward = layout.operator(fields, f"{prefix}conv", operands)(self._forward)
        """(x, values, bias, geometry, keep, *index): the convolution of x (N, C, H, W), contiguous: (N, O, HO, WO)."""
        self.forward.register_fake(self._forward_shape)
        self.forward.register_autograd(self._forward_backward, setup_context=self._forward_context)
        operands = "Tensor dy, Tensor values, SymInt[] geometry, SymInt[] shape, SymInt keep"
        self.input_gradient = layout.operator(fields, f"{prefix}conv_input_gradient", operands)(self._input)
        """(dy, values, geometry, shape, keep, *index): the gradient of the input, of `shape` (N, C, H, W)."""
        self.input_gradient.register_fake(self._input_shape)
        self.input_gradient.register_autograd(self._input_backward, setup_context=self._input_context)
        operands = "Tensor x, Tensor dy, SymInt[] geometry, SymInt capacity, SymInt keep"
        self.value_gradient = layout.operator(fields, f"{prefix}conv_value_gradient", operands)(self._value)
        """(x, dy, geometry, capacity, keep, *index): the gradient of each value, zero beyond the active ones."""
        self.value_gradient.register_fake(self._value_shape)
        self.value_gradient.register_autograd(self._value_backward, setup_context=self._value_context)
        operands = "Tensor x, Tensor dy, Tensor values, SymInt[] geometry, SymInt keep"
        self.gradients = layout.operator(fields, f"{prefix}conv_backward", operands, "(Tensor, Tensor)")(self._both)
        """(x, dy, values, geometry, keep, *index): both gradients."""
        self.gradients.register_fake(self._both_shapes)
        self.gradients.register_autograd(self._both_backward, setup_context=self._both_context)

    def _forward(
        self, x: Tensor, values: Tensor, bias: Tensor | None, geometry: list[int], keep: int, *at: Any
    ) -> Tensor:
        index, shape = self.kind(*at), Geometry.from_ints(geometry)
        if isinstance(index, UnitIndex):
            _require(index, shape, x, values, bias=bias)
        out = self._forward_shape(x, values, bias, geometry, keep, *at)
        found = layout.kernels(x, values, index.starts)
        found.conv(x.contiguous(), values.contiguous(), layout.whole(bias), index, shape, out)
        return out

    def _forward_shape(
        self, x: Tensor, values: Tensor, bias: Tensor | None, geometry: list[int], keep: int, *at: Any
    ) -> Tensor:
        height, width = Geometry.from_ints(geometry).output(x.shape[2], x.shape[3])
        return x.new_empty(x.shape[0], self.kind(*at).rows, height, width)

    def _forward_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, ctx.geometry, ctx.keep, *at = inputs
        _save(ctx, (x, values), at)

    def _forward_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, values, *tensors = ctx.saved_tensors
        at = (*tensors, *ctx.sizes)
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        dx = dvalues = None
        dy = grad.contiguous()
        if need_x and need_values:
            dx, dvalues = self.gradients(x, dy, values, ctx.geometry, ctx.keep, *at)
        elif need_x:
            dx = self.input_gradient(dy, values, ctx.geometry, list(x.shape), ctx.keep, *at)
        elif need_values:
            dvalues = self.value_gradient(x, dy, ctx.geometry, values.shape[0], ctx.keep, *at)
        return dx, dvalues, grad.sum((0, 2, 3)) if need_bias else None, None, None, *[None] * len(at)

    def _input(self, dy: Tensor, values: Tensor, geometry: list[int], shape: list[int], keep: int, *at: Any) -> Tensor:
        index, out = self.kind(*at), dy.new_empty(shape)
        if isinstance(index, UnitIndex):
            _require(index, Geometry.from_ints(geometry), out, values, dy)
        found = layout.kernels(dy, values, index.starts)
        found.conv_input_gradient(dy.contiguous(), values.contiguous(), index, Geometry.from_ints(geometry), out)
        return out

    def _input_shape(
        self, dy: Tensor, values: Tensor, geometry: list[int], shape: list[int], keep: int, *at: Any
    ) -> Tensor:
        return dy.new_empty(shape)

    def _input_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, values, ctx.geometry, _, ctx.keep, *at = inputs
        _save(ctx, (dy, values), at)

    def _input_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dy, values, *tensors = ctx.saved_tensors
        at = (*tensors, *ctx.sizes)
        need_dy, need_values = ctx.needs_input_grad[:2]
        ddy = dvalues = None
        grad = grad.contiguous()
        if need_dy:
            ddy = self.forward(grad, values, None, ctx.geometry, ctx.keep, *at)
        if need_values:
            dvalues = self.value_gradient(grad, dy, ctx.geometry, values.shape[0], ctx.keep, *at)
        return ddy, dvalues, None, None, None, *[None] * len(at)

    def _value(self, x: Tensor, dy: Tensor, geometry: list[int], capacity: int, keep: int, *at: Any) -> Tensor:
        index, shape = self.kind(*at), Geometry.from_ints(geometry)
        out = self._value_shape(x, dy, geometry, capacity, keep, *at)
        if isinstance(index, UnitIndex):
            _require(index, shape, x, out, dy)
        out[index.columns.numel() :] = 0
        layout.kernels(x, dy, index.starts).conv_value_gradient(x.contiguous(), dy.contiguous(), index, shape, out)
        activations.keep(keep, x, dy, shape)
        return out

    def _value_shape(self, x: Tensor, dy: Tensor, geometry: list[int], capacity: int, keep: int, *at: Any) -> Tensor:
        index = self.kind(*at)
        return x.new_empty(capacity, *((index.inputs, index.outputs) if isinstance(index, UnitIndex) else ()))

    def _value_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, dy, ctx.geometry, _, _, *at = inputs
        _save(ctx, (x, dy), at)

    def _value_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, dy, *tensors = ctx.saved_tensors
        at = (*tensors, *ctx.sizes)
        need_x, need_dy = ctx.needs_input_grad[:2]
        dx = self.input_gradient(dy, grad, ctx.geometry, list(x.shape), 0, *at) if need_x else None
        ddy = self.forward(x, grad, None, ctx.geometry, 0, *at) if need_dy else None
        return dx, ddy, None, None, None, *[None] * len(at)

    def _both(
        self, x: Tensor, dy: Tensor, values: Tensor, geometry: list[int], keep: int, *at: Any
    ) -> tuple[Tensor, Tensor]:
        index, shape = self.kind(*at), Geometry.from_ints(geometry)
        if isinstance(index, UnitIndex):
            _require(index, shape, x, values, dy)
        dx, dvalues = self._both_shapes(x, dy, values, geometry, keep, *at)
        dvalues[index.columns.numel() :] = 0
        found = layout.kernels(x, dy, values, index.starts)
        found.conv_backward(x.contiguous(), dy.contiguous(), values.contiguous(), index, shape, dx, dvalues)
        activations.keep(keep, x, dy, shape)
        return dx, dvalues

    def _both_shapes(
        self, x: Tensor, dy: Tensor, values: Tensor, geometry: list[int], keep: int, *at: Any
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), values.new_empty(values.shape)

    def _both_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dy, values, ctx.geometry, ctx.keep, *at = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, (x, dy, values), at)

    def _both_backward(self, ctx: Any, to_dx: Tensor | None, to_dvalues: Tensor | None) -> tuple[Any, ...]:
        x, dy, values, *tensors = ctx.saved_tensors
        at = (*tensors, *ctx.sizes)
        need_x, need_dy, need_values = ctx.needs_input_grad[:3]
        from_dx = from_dvalues = to_x = to_values = None
        if to_dx is not None:
            to_dx = to_dx.contiguous()
            if need_dy:
                from_dx = self.forward(to_dx, values, None, ctx.geometry, ctx.keep, *at)
            if need_values:
                to_values = self.value_gradient(to_dx, dy, ctx.geometry, values.shape[0], ctx.keep, *at)
        if to_dvalues is not None:
            if need_dy:
                from_dvalues = self.forward(x, to_dvalues, None, ctx.geometry, 0, *at)
            if need_x:
                to_x = self.input_gradient(dy, to_dvalues, ctx.geometry, list(x.shape), 0, *at)
        return to_x, layout.total(from_dx, from_dvalues), to_values, None, None, *[None] * len(at)


def _save(ctx: Any, operands: tuple[Tensor, ...], at: list[Any]) -> None:
    """For the backward: operands and the fields of an index, whose tensors stand before its sizes."""
    ctx.sizes = [field for field in at if not isinstance(field, Tensor)]
    ctx.save_for_backward(*operands, *at[: len(at) - len(ctx.sizes)])


def _require(
    index: UnitIndex,
    geometry: Geometry,
    x: Tensor,
    values: Tensor,
    dy: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """What the kernels trust about their operands, as far as it shows without reading all of the index.

    Raises:
        ValueError: when sizes, types or devices do not fit each other.
    """
    unit_ops.require_index(index)
    unit_ops.require_alike(index, x, values, dy, bias)
    taps = geometry.kernel[0] * geometry.kernel[1]
    if min(*geometry.kernel, *geometry.stride, *geometry.dilation, geometry.groups) < 1 or min(geometry.padding) < 0:
        raise ValueError(f"sizes of a convolution are at least 1, and its padding at least 0: got {geometry}")
    if not takes(index, geometry) or index.rows % geometry.groups or index.cols % taps or not index.rows * index.cols:
        raise ValueError(
            f"units of {index.outputs} x {index.inputs} do not divide a weight of {index.rows:,} x {index.cols:,} with "
            f"{taps} taps in {geometry.groups} groups: a unit is filters of a group that share a tap of a channel"
        )
    channels = index.cols // taps * geometry.groups
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"the input has shape {tuple(x.shape)}, the weight takes (N, {channels:,}, H, W)")
    size = geometry.output(x.shape[2], x.shape[3])
    if min(size) < 1:
        raise ValueError(f"an input of {x.shape[2]} x {x.shape[3]} has no output: give larger images or more padding")
    unit_ops.require_values(values, index)
    if dy is not None:
        unit_ops.require_shape("the output gradient", dy, (x.shape[0], index.rows, *size))
    if bias is not None:
        unit_ops.require_shape("the bias", bias, (index.rows,))


ENTRIES = Convolutions(Index, layout.ENTRIES)
UNITS = Convolutions(UnitIndex, layout.UNITS, "unit_")
