"""Which storage each parameter gets, and what compressed storage refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from torch.optim import Optimizer

from regrow.core.checks import require_choice
from regrow.core.method import Method, Need
from regrow.core.names import matches
from regrow.core.weight import StoredParameter
from regrow.engine.discovery import Found
from regrow.parts.observers import EXPLORATION
from regrow.storage.compressed import CompressedParameter
from regrow.storage.latent import LatentParameter, latent_parameters
from regrow.storage.masked import MaskedParameter

Storage = Literal["masked", "compressed"]
"""How the values of a parameter are held."""

Choice = Storage | Literal["auto"] | Mapping[str, Storage]
"""What can be asked for: one storage for all, whichever is faster for each, or by name or glob, masked elsewhere."""

_DENSE_NEEDS = {
    Need.DENSE_VALUES: "holds a value at every position during training",
    Need.EVERY_GRADIENT: "reads the gradient at every position at every step",
    Need.EXPLORED: "keeps a record of every position",
}


def assign(storage: Storage | Mapping[str, Storage], found: Sequence[Found]) -> list[Storage]:
    """The storage of each parameter found: of several globs that fit the first counts, without one it is masked.

    Raises:
        ValueError: for a storage that there is none of, or a glob that fits none of the parameters.
    """
    if not isinstance(storage, Mapping):
        require_choice("sparsify", "storage", storage, (*get_args(Storage), "auto"))
        return [storage] * len(found)
    for pattern, held in storage.items():
        require_choice("sparsify", f"storage of {pattern!r}", held, get_args(Storage))
        if not any(_fits(pattern, f) for f in found):
            names = ", ".join(f.name for f in found)
            raise ValueError(f"sparsify: storage names {pattern!r}, which matches none of the weights: {names}")
    return [next((held for pattern, held in storage.items() if _fits(pattern, f)), "masked") for f in found]


def _fits(pattern: str, found: Found) -> bool:
    return any(matches(pattern, name) for name in (found.name, *found.names))


def storage_of(parameter: StoredParameter) -> Storage:
    """How the values of a parameter are held."""
    return "compressed" if isinstance(parameter, CompressedParameter) else "masked"


def stored(
    found: Sequence[Found], owners: Sequence[Optimizer], storages: Sequence[Storage], limit: int, method: Method
) -> list[StoredParameter]:
    """Each parameter found, in the storage asked for.

    Args:
        found: the parameters to sparsify.
        owners: the optimizer of each.
        storages: how the values of each are held.
        limit: bytes of inputs and output gradients that compressed storage may keep at an update.
        method: that will work on them.

    Raises:
        ValueError: for a parameter or an optimizer that the storage cannot take.
    """
    parameters: list[StoredParameter] = []
    compressed: list[CompressedParameter] = []
    allow = _budget(compressed, limit)
    for f, storage in zip(found, storages, strict=True):
        if storage == "masked" and f.parameter.is_meta:
            raise ValueError(
                f'{f.name} lies on the meta device, where storage="masked" finds no values: build the model on a '
                "real device" + (', or use storage="compressed"' if method.latent is None else "")
            )
    if method.latent is not None:
        wanted = [(f.parameter, owner, f.names, f.out_axis, f.in_axis) for f, owner in zip(found, owners, strict=True)]
        return list(latent_parameters(wanted, method.name, method.latent))
    for f, owner, storage in zip(found, owners, storages, strict=True):
        if storage == "masked":
            parameters.append(MaskedParameter(f.parameter, owner, f.names, f.out_axis, f.in_axis))
        else:
            compressed.append(CompressedParameter(f.parameter, owner, f.names, f.out_axis, f.in_axis, f.holders, allow))
            parameters.append(compressed[-1])
    return parameters


def hardened(parameter: LatentParameter) -> MaskedParameter:
    """The same parameter in masked storage: the weight as it is evaluated, with the topology that it has."""
    parameter.remove()
    weights = parameter.weights
    names, out_axis, in_axis = [w.name for w in weights], weights[0].out_axis, weights[0].in_axis
    twin = MaskedParameter(parameter.parameter, parameter.optimizer, names, out_axis, in_axis)
    for new, old in zip(twin.weights, weights, strict=True):
        new.state = {key: old.state[key] for key in EXPLORATION if key in old.state}
        new.rewire(old.topology)
    twin.mask_gradient()
    return twin


def _budget(parameters: Sequence[CompressedParameter], limit: int) -> Callable[[int], None]:
    def allow(more: int) -> None:
        kept = sum(p.kept_bytes for p in parameters)
        if kept + more > limit:
            for parameter in parameters:
                parameter.forget_unfinished()
            kept = sum(p.kept_bytes for p in parameters)
        if kept + more > limit:
            raise RuntimeError(
                f"an update would keep at least {kept + more:,} bytes of inputs and output gradients, above the limit "
                f"of {limit:,}: raise update_memory= in regrow.sparsify, or lower the batch size"
            )

    return allow


def dense_reasons(method: Method, has_batches: bool) -> list[str]:
    """What makes compressed storage as large as dense with `method`, as ends of a sentence about it."""
    reasons = [reason for need, reason in _DENSE_NEEDS.items() if need in method.needs]
    if method.start.needs_gradient and not has_batches:
        reasons.append("starts from a dense model's gradient, unless batches= and loss= are given")
    return reasons


def require_sparse(method: Method, found: Sequence[Found], has_batches: bool, allow_dense: bool) -> None:
    """Raise ValueError when compressed storage would be dense with `method`, naming layer and bytes."""
    if found and method.latent is not None:
        raise ValueError(
            f"{method.name} computes weights from values that it trains at every position, which compressed storage "
            f'has no place for: leave {found[0].name} in storage="masked"'
        )
    reasons = dense_reasons(method, has_batches)
    if reasons and found and not allow_dense:
        largest = max(found, key=lambda f: f.parameter.numel())
        size = largest.parameter.numel() * largest.parameter.element_size()
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
