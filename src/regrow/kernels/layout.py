"""Which kernels take some tensors, and in which types and layouts they take and give them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from regrow.kernels import native, reference
from regrow.kernels.index import Index

# Not one `Tensor[]`: torch flattens lists in Python at every call, a quarter of the time of a small layer's step.
ENTRIES = ", ".join(f"Tensor {field}" for field in Index._fields)
"""The fields of an `Index` as arguments of an operator."""
UNITS = "Tensor starts, Tensor columns, SymInt cols, SymInt outputs, SymInt inputs"
"""The fields of a `UnitIndex` as arguments of an operator."""


def kernels(*tensors: Tensor) -> ModuleType:
    """The compiled kernels where they take these tensors, else the reference."""
    return native if native.runs_on(*tensors) else reference


def cast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the type that autocast asks for; without it they must agree already.

    Raises:
        ValueError: when they do not.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, values.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != values.dtype or (bias is not None and bias.dtype != values.dtype):
        also = "" if bias is None else f" and bias {bias.dtype}"
        raise ValueError(f"the input is {x.dtype}, the sparse weight {values.dtype}{also}: convert them to one type")
    return x, values, bias


def flat(x: Tensor) -> Tensor:
    """x (..., features) as (batch, features), with one of both strides 1."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def whole(bias: Tensor | None) -> Tensor | None:
    """A contiguous bias."""
    return None if bias is None else bias.contiguous()


def is_feature_major(x: Tensor) -> bool:
    """Whether x (batch, features) holds the batch of each feature side by side."""
    return x.t().is_contiguous() and not x.is_contiguous()


def empty(x: Tensor, features: int, feature_major: bool) -> Tensor:
    """(batch of x, features), not initialized."""
    batch = x.shape[0]
    return x.new_empty(features, batch).t() if feature_major else x.new_empty(batch, features)


def operator(index: str, name: str, arguments: str) -> Callable[[Callable[..., object]], CustomOpDef]:
    """What declares the torch operator `name` of `arguments` and, after them, the fields of an `index`, as schemas."""
    return torch.library.custom_op(f"regrow::{name}", mutates_args=(), schema=f"({arguments}, {index}) -> Tensor")
