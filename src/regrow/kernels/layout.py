"""Which kernels take some tensors, and in which types and layouts they take and give them."""

from __future__ import annotations

import functools
import importlib
import logging
import os
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

_log = logging.getLogger("regrow")


def kernels(*tensors: Tensor) -> ModuleType:
    """Those for GPUs or the compiled ones, where they are there and take these tensors, else the reference."""
    if tensors[0].is_cuda:
        return on_gpu()
    return native if native.runs_on(*tensors) else reference


@functools.cache
def on_gpu() -> ModuleType:
    """The Triton programs on NVIDIA GPUs; the reference without Triton, elsewhere, and where REGROW_ISA says so."""
    if os.environ.get("REGROW_ISA") == "reference" or torch.version.cuda is None:
        return reference
    try:
        return importlib.import_module("regrow.kernels.gpu")
    except ImportError as error:
        _log.warning(
            "sparse layers on the GPU run on the slow reference in plain torch, since Triton cannot be imported (%s): "
            "install it with pip install triton",
            error,
        )
        return reference


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


def for_units(x: Tensor) -> Tensor:
    """x (batch, features) as products with units read it: feature-major on a GPU, converted once for all of a step."""
    return x.t().contiguous().t() if x.is_cuda else x


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


def operator(
    index: str, name: str, arguments: str, returns: str = "Tensor"
) -> Callable[[Callable[..., object]], CustomOpDef]:
    """What declares the torch operator `name` of `arguments` and, after them, the fields of an `index`, as schemas."""
    return torch.library.custom_op(f"regrow::{name}", mutates_args=(), schema=f"({arguments}, {index}) -> {returns}")


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of those terms that are there."""
    there = [term for term in terms if term is not None]
    return functools.reduce(torch.add, there) if there else None
