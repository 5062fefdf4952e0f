"""The kernels in plain torch: the oracle of the compiled ones, and what runs where these do not.

Half precision is accumulated in float32 and rounded once, as the compiled kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regrow.kernels.geometry import Geometry
from regrow.kernels.index import Index
from regrow.kernels.units import UnitIndex

_CHUNK = 1 << 22
"""Products held at once."""


def transpose_index(starts: Tensor, columns: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t_starts, t_rows, order) by sorting: starts (rows + 1,) int64, columns (nnz,) int32 or int64."""
    order = torch.argsort(columns, stable=True)
    rows = torch.arange(starts.numel() - 1, device=columns.device).repeat_interleave(starts.diff())
    t_starts = columns.new_zeros(cols + 1, dtype=torch.int64)
    t_starts[1:] = torch.bincount(columns.long(), minlength=cols).cumsum(0)
    return t_starts, rows[order].to(columns.dtype), order.to(columns.dtype)


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, transposed: bool, out: Tensor) -> None:
    """out (batch, rows) = x (batch, cols) W^T + bias; with `transposed`, out (batch, cols) = x (batch, rows) W."""
    into, of = (index.columns, _rows(index)) if transposed else (_rows(index), index.columns)
    total = _wide(x).new_zeros(out.shape[1], x.shape[0])
    features = _wide(x).t()
    wide = _wide(values)
    for part in _parts(index.nnz, x.shape[0]):
        total.index_add_(0, into[part], features[of[part].long()] * wide[part, None])
    total = total if bias is None else total + _wide(bias)[:, None]
    out.copy_(total.t())


def sddmm(x: Tensor, dy: Tensor, index: Index, out: Tensor) -> None:
    """out[j] = sum_b dy[b, row(j)] x[b, column(j)], j below nnz; x (batch, cols), dy (batch, rows)."""
    rows, x_t, dy_t = _rows(index), _wide(x).t(), _wide(dy).t()
    for part in _parts(index.nnz, x.shape[0]):
        out[part] = (dy_t[rows[part].long()] * x_t[index.columns[part].long()]).sum(1).to(out.dtype)


def backward(
    x: Tensor, dy: Tensor, values: Tensor, index: Index, transposed: bool, dx: Tensor, dvalues: Tensor
) -> None:
    """`spmm` of dy to dx and `sddmm` to dvalues: both gradients of y = x W^T, or of y = x W when `transposed`."""
    spmm(dy, values, None, index, not transposed, dx)
    sddmm(*((dy, x) if transposed else (x, dy)), index, dvalues)


def unit_spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: UnitIndex, transposed: bool, out: Tensor) -> None:
    """As `spmm`, of values (units or more, inputs, outputs), for units of any size."""
    into, of = (index.columns, _rows(index)) if transposed else (_rows(index), index.columns)
    size_into, size_of = (index.inputs, index.outputs) if transposed else (index.outputs, index.inputs)
    features = _by_units(x, size_of)
    wide = _wide(values if transposed else values.transpose(1, 2))
    total = features.new_zeros(out.shape[1] // size_into, size_into, x.shape[0])
    for part in _parts(index.units, x.shape[0] * index.inputs * index.outputs):
        total.index_add_(0, into[part], _multiply(wide[part], features[of[part].long()]))
    y = total.flatten(0, 1)
    y = y if bias is None else y + _wide(bias)[:, None]
    out.copy_(y.t())


def unit_sddmm(x: Tensor, dy: Tensor, index: UnitIndex, out: Tensor) -> None:
    """out[j, k, g] = sum_b dy[b, row(j) + g] x[b, column(j) + k], j below the number of units."""
    rows, columns = _rows(index), index.columns
    x_t, dy_t = _by_units(x, index.inputs), _by_units(dy, index.outputs)
    for part in _parts(index.units, x.shape[0] * index.inputs * index.outputs):
        found = _multiply(x_t[columns[part].long()], dy_t[rows[part].long()].transpose(1, 2))
        out[part] = found.to(out.dtype)


def unit_backward(
    x: Tensor, dy: Tensor, values: Tensor, index: UnitIndex, transposed: bool, dx: Tensor, dvalues: Tensor
) -> None:
    """As `backward`, of values (units or more, inputs, outputs)."""
    unit_spmm(dy, values, None, index, not transposed, dx)
    unit_sddmm(*((dy, x) if transposed else (x, dy)), index, dvalues)


def conv(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index | UnitIndex, geometry: Geometry, out: Tensor
) -> None:
    """out (N, O, HO, WO) = the convolution of x (N, C, H, W) with the sparse weight."""
    patches = _patches(x, geometry)
    y = patches.new_empty(patches.shape[0], out.shape[1])
    _product(patches, values, bias, _grouped(index, geometry), False, y)
    out.copy_(y.view(out.shape[0], *out.shape[2:], out.shape[1]).permute(0, 3, 1, 2))


def conv_input_gradient(dy: Tensor, values: Tensor, index: Index | UnitIndex, geometry: Geometry, out: Tensor) -> None:
    """out (N, C, H, W): the gradient of the input from dy (N, O, HO, WO)."""
    n, _, height, width = out.shape
    grouped = _grouped(index, geometry)
    flat = _wide(dy).permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
    patches = flat.new_empty(flat.shape[0], grouped.cols)
    _product(flat, values, None, grouped, True, patches)
    columns = patches.view(n, dy.shape[2] * dy.shape[3], grouped.cols).transpose(1, 2)
    kernel, stride, padding, dilation, _ = geometry
    out.copy_(F.fold(columns, (height, width), kernel, dilation, padding, stride) if n else out)


def conv_value_gradient(x: Tensor, dy: Tensor, index: Index | UnitIndex, geometry: Geometry, out: Tensor) -> None:
    """out[j], j below nnz or units: the gradient of each value, from x (N, C, H, W) and dy (N, O, HO, WO)."""
    flat, grouped = _wide(dy).permute(0, 2, 3, 1).reshape(-1, dy.shape[1]), _grouped(index, geometry)
    if isinstance(grouped, UnitIndex):
        unit_sddmm(_patches(x, geometry), flat, grouped, out)
    else:
        sddmm(_patches(x, geometry), flat, grouped, out)


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
    conv_input_gradient(dy, values, index, geometry, dx)
    conv_value_gradient(x, dy, index, geometry, dvalues)


def _product(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index | UnitIndex, transposed: bool, out: Tensor
) -> None:
    if isinstance(index, UnitIndex):
        unit_spmm(x, values, bias, index, transposed, out)
    else:
        spmm(x, values, bias, index, transposed, out)


def _patches(x: Tensor, geometry: Geometry) -> Tensor:
    """(N HO WO, C KH KW): what each output position sees."""
    kernel, stride, padding, dilation, _ = geometry
    size = x.shape[1] * kernel[0] * kernel[1]
    if not x.shape[0]:
        return _wide(x).new_empty(0, size)
    return F.unfold(_wide(x), kernel, dilation, padding, stride).transpose(1, 2).reshape(-1, size)


def _grouped(index: Index | UnitIndex, geometry: Geometry) -> Index | UnitIndex:
    """The index with columns counted over all input channels instead of those of the row's group."""
    group = _rows(index).long() // max(1, (index.starts.numel() - 1) // geometry.groups)
    columns, cols = index.columns.long() + group * index.cols, index.cols * geometry.groups
    if isinstance(index, UnitIndex):
        return index._replace(columns=columns, cols=cols)
    return index._replace(columns=columns, t_starts=columns.new_empty(cols + 1))


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    # Autocast is still on within an operator, and would round the operands of a matrix product.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _by_units(x: Tensor, size: int) -> Tensor:
    """(features / size, size, batch): the activations x (batch, features) that a unit meets."""
    return _wide(x).t().reshape(x.shape[1] // size, size, x.shape[0])


def _rows(index: Index | UnitIndex) -> Tensor:
    """The row of each column of the index: of each entry, or of each unit counted in units."""
    columns, starts = index.columns, index.starts
    rows = torch.arange(starts.numel() - 1, dtype=columns.dtype, device=columns.device)
    return rows.repeat_interleave(starts.diff(), output_size=columns.numel())


def _parts(nnz: int, batch: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, batch))
    return [slice(i, min(nnz, i + step)) for i in range(0, nnz, step)]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
