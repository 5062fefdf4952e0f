"""Models whose parameters have no memory yet: what initializes them, and when."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from regrow.core.draws import Stream
from regrow.nn import SparseModule
from regrow.storage.pending import swap_memory


def on_meta_device(model: nn.Module) -> bool:
    """Whether a part of the model lies on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def require_initializers(model: nn.Module) -> None:
    """Raise ValueError for a module on the meta device that does not say how it is initialized."""
    for path, module in model.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        on_meta = [name for name, tensor in own if tensor.is_meta]
        if on_meta and not isinstance(module, SparseModule) and initializer(module) is None:
            raise ValueError(
                f"{path or type(module).__name__} has {', '.join(on_meta)} on the meta device and no reset_parameters "
                "to initialize them: build that module on a real device"
            )


def initializer(module: nn.Module) -> Callable[[], None] | None:
    """What draws the values of a dense module anew, or None where it does not say how."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def spare_topologies_the_broadcast(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending topologies before each forward: every rank makes the same."""
    names = [
        f"{path}.{name}_{field}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, SparseModule)
        for name in module.shapes
        for field in module.fields(name)
    ]
    if names:
        ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
        model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def leave_meta_device(model: nn.Module, seed: int) -> None:
    """Give what is left of a model on the meta device real memory, as its modules initialize it.

    Parameters keep their identity, so that the optimizer that holds them goes on.
    """
    # Children first: what holds them may have the last word on them.
    for path, module in reversed(list(model.named_modules())):
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        on_meta = {name: tensor for name, tensor in own.items() if tensor.is_meta}
        if not on_meta:
            continue
        for name, tensor in on_meta.items():
            # NaN, so that an entry which the module does not initialize is noticed below.
            blank = math.nan if tensor.is_floating_point() else 0
            real = torch.full_like(tensor, blank, device="cpu")
            if isinstance(tensor, nn.Parameter):
                swap_memory(tensor, nn.Parameter(real, tensor.requires_grad))
            else:
                module.register_buffer(name, real, persistent=name not in module._non_persistent_buffers_set)
        if isinstance(module, SparseModule):
            module.initialize({name: Stream(seed, f"{path}.{name}", -1) for name in on_meta})
        else:
            draw = initializer(module)
            assert draw is not None
            draw()
            unfilled = [name for name in on_meta if bool(getattr(module, name).isnan().any())]
            if unfilled:
                raise ValueError(
                    f"{path or type(module).__name__} has {', '.join(unfilled)} on the meta device, which its "
                    "reset_parameters leaves without values: build that module on a real device"
                )
