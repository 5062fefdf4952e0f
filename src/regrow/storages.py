"""Which storage each parameter gets, and what compressed storage refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.discovery import Found
from regrow.method import Method, Need
from regrow.nn import SparseModule
from regrow.storage.compressed import CompressedParameter
from regrow.storage.masked import MaskedParameter
from regrow.streams import Stream
from regrow.weight import StoredParameter

Storage = Literal["masked", "compressed"]

_DENSE_NEEDS = {
    Need.DENSE_VALUES: "holds a value at every position during training",
    Need.EVERY_GRADIENT: "reads the gradient at every position at every step",
    Need.EXPLORED: "keeps a record of every position",
}


def stored(found: Sequence[Found], owners: Sequence[Optimizer], storage: Storage, limit: int) -> list[StoredParameter]:
    """Each parameter found, in the storage asked for.

    Args:
        found: the parameters to sparsify.
        owners: the optimizer of each.
        storage: how values are held.
        limit: bytes of inputs and output gradients that compressed storage may keep at an update.

    Raises:
        ValueError: for a parameter or an optimizer that the storage cannot take.
    """
    parameters: list[StoredParameter] = []
    compressed: list[CompressedParameter] = []
    allow = _budget(compressed, limit)
    for f, owner in zip(found, owners, strict=True):
        if storage == "masked":
            if f.parameter.is_meta:
                raise ValueError(
                    f'{f.name} lies on the meta device, where storage="masked" finds no values: build the model on a '
                    'real device, or use storage="compressed"'
                )
            parameters.append(MaskedParameter(f.parameter, owner, f.names, f.out_axis, f.in_axis))
        else:
            compressed.append(CompressedParameter(f.parameter, owner, f.names, f.out_axis, f.in_axis, f.holders, allow))
            parameters.append(compressed[-1])
    return parameters


def _budget(parameters: Sequence[CompressedParameter], limit: int) -> Callable[[int], None]:
    def allow(more: int) -> None:
        kept = sum(p.kept_bytes for p in parameters)
        if kept + more > limit:
            raise RuntimeError(
                f"an update would keep at least {kept + more:,} bytes of inputs and output gradients, above the limit "
                f"of {limit:,}: raise update_memory= in regrow.sparsify, or lower the batch size"
            )

    return allow


def require_sparse(method: Method, found: Sequence[Found], has_batches: bool) -> None:
    """Raise ValueError when compressed storage would be dense with `method`, naming layer and bytes."""
    largest = max(found, key=lambda f: f.parameter.numel())
    size = largest.parameter.numel() * largest.parameter.element_size()
    reasons = [reason for need, reason in _DENSE_NEEDS.items() if need in method.needs]
    if method.start.needs_gradient and not has_batches:
        reasons.append("starts from a dense model's gradient, unless batches= and loss= are given")
    if reasons:
        raise ValueError(
            f"{method.name} {' and '.join(reasons)}, which compressed storage exists to avoid: {largest.name} alone "
            f'takes {size:,} bytes dense; pass allow_dense=True to accept that, or use storage="masked"'
        )


def quarter_of_free_memory() -> int:
    """A quarter of the bytes of memory that are available now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free // 4


def leave_meta_device(model: nn.Module, seed: int) -> None:
    """Give what is left of a model on the meta device real memory, as its modules initialize it.

    Parameters keep their identity, so that the optimizer that holds them goes on.

    Raises:
        ValueError: for a module that does not say how it is initialized.
    """
    for path, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        on_meta = {name: tensor for name, tensor in own.items() if tensor.is_meta}
        if not on_meta:
            continue
        reset = getattr(module, "reset_parameters", None)
        if not isinstance(module, SparseModule) and reset is None:
            raise ValueError(
                f"{path or type(module).__name__} has {', '.join(on_meta)} on the meta device and no reset_parameters "
                "to initialize them: build that module on a real device"
            )
        for name, tensor in on_meta.items():
            real = torch.zeros_like(tensor, device="cpu")
            if isinstance(tensor, nn.Parameter):
                torch.utils.swap_tensors(tensor, nn.Parameter(real, tensor.requires_grad))  # type: ignore[no-untyped-call]
            else:
                module.register_buffer(name, real, persistent=name not in module._non_persistent_buffers_set)
        if isinstance(module, SparseModule):
            for name in on_meta:
                _draw(module, name, Stream(seed, f"{path}.{name}", -1))
        else:
            assert reset is not None
            reset()


def _draw(module: SparseModule, name: str, stream: Stream) -> None:
    tensor: Tensor = getattr(module, name)
    drawn = module.initial(name)(stream, tensor.numel())
    tensor.detach().copy_(drawn.view(tensor.shape))
