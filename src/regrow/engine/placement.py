"""Which storage each parameter gets, and what compressed storage refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from torch.optim import Optimizer

from regrow.core.checks import require_choice
from regrow.core.method import Method, Need
from regrow.core.names import matches
from regrow.core.text import some
from regrow.engine.discovery import Found
from regrow.engine.probe import FirstStep, Source
from regrow.storage.latent import latent_parameters
from regrow.storage.masked import MaskedParameter
from regrow.storage.memory import Memory
from regrow.storage.pending import PendingParameter
from regrow.storage.rows import DenseRows
from regrow.storage.stored import Draft, Storage

Choice = Storage | Literal["auto"] | Mapping[str, Storage]
"""What can be asked for: one storage for all, whichever is faster for each, or by name or glob, masked elsewhere."""

_DENSE_NEEDS = {
    Need.DENSE_VALUES: "holds a value at every position during training",
    Need.EVERY_GRADIENT: "reads the gradient at every position at every step",
    Need.EXPLORED: "keeps a record of every position",
}


class Place(NamedTuple):
    """Where the values of one parameter are to be held."""

    found: Found
    optimizer: Optimizer
    storage: Storage


def place(storage: Storage | Mapping[str, Storage], found: Sequence[Found], owners: Sequence[Optimizer]) -> list[Place]:
    """The storage asked for, for each parameter found.

    Args:
        storage: one for all, or by name or glob: the first that fits counts, and where none does it is masked.
        found: the parameters to sparsify.
        owners: the optimizer of each.

    Raises:
        ValueError: for an unknown storage, or a glob that fits none of the parameters.
    """
    if not isinstance(storage, Mapping):
        require_choice("sparsify", "storage", storage, (*get_args(Storage), "auto"))
        return [Place(f, owner, storage) for f, owner in zip(found, owners, strict=True)]
    for pattern, held in storage.items():
        require_choice("sparsify", f"storage of {pattern!r}", held, get_args(Storage))
        if not any(_fits(pattern, f) for f in found):
            names = some([f.name for f in found])
            raise ValueError(f"sparsify: storage names {pattern!r}, which matches none of the weights: {names}")
    picked: list[Storage] = [
        next((held for pattern, held in storage.items() if _fits(pattern, f)), "masked") for f in found
    ]
    return [Place(*each) for each in zip(found, owners, picked, strict=True)]


def _fits(pattern: str, found: Found) -> bool:
    return any(matches(pattern, name) for name in (found.name, *found.names))


def drafts(places: Sequence[Place], method: Method, memory: Memory) -> list[Draft]:
    """Each parameter in the storage of its place, before it has topologies.

    Args:
        places: where values are to be held.
        method: that will work on them.
        memory: what compressed storage may keep at an update.

    Raises:
        ValueError: for a parameter or an optimizer that the storage cannot take.
    """
    for f, _, storage in places:
        if storage == "masked" and f.parameter.is_meta:
            raise ValueError(
                f'{f.name} lies on the meta device, where storage="masked" finds no values: build the model on a '
                "real device" + (', or use storage="compressed"' if method.latent is None else "")
            )
    if method.latent is not None:
        wanted = [(f.parameter, optimizer, f.names, f.out_axis, f.in_axis) for f, optimizer, _ in places]
        return list(latent_parameters(wanted, method.name, method.latent))
    return [_draft(f, optimizer, storage, memory) for f, optimizer, storage in places]


def _draft(found: Found, optimizer: Optimizer, storage: Storage, memory: Memory) -> Draft:
    held = found.parameter, optimizer, found.names, found.out_axis, found.in_axis
    match storage:
        case "masked":
            return MaskedParameter(*held)
        case "compressed":
            return PendingParameter(*held, found.holders, memory)


def divide(held: Sequence[Draft], method: Method) -> None:
    """Make every weight of the units that the method counts in.

    Raises:
        ValueError: when the method trains latent values, of which there are only single entries, or a unit does not fit
            a weight, naming it.
    """
    if method.units is None:
        return
    if method.latent is not None:
        raise ValueError(
            f"{method.name} computes weights from values that it trains at every position, and chooses single entries "
            "of them: leave out structure="
        )
    for parameter in held:
        for weight in parameter.weights:
            assert isinstance(weight, DenseRows)
            weight.divide(method.units)


def dense_reasons(method: Method, source: Source) -> list[str]:
    """What makes compressed storage as large as dense with `method`, as ends of a sentence about it."""
    reasons = [reason for need, reason in _DENSE_NEEDS.items() if need in method.needs]
    if method.latent is not None and not reasons:
        reasons.append("computes weights from values that it trains at every position")
    if isinstance(source, FirstStep):
        reasons.append("starts from a dense model's gradient, unless batches= and loss= are given")
    return reasons


def require_sparse(method: Method, places: Sequence[Place], source: Source, allow_dense: bool) -> None:
    """Raise ValueError when compressed storage would be dense with `method`, naming layer and bytes."""
    found = [p.found for p in places if p.storage == "compressed"]
    if found and method.latent is not None:
        raise ValueError(
            f"{method.name} computes weights from values that it trains at every position, which compressed storage "
            f'has no place for: leave {found[0].name} in storage="masked"'
        )
    reasons = dense_reasons(method, source)
    if reasons and found and not allow_dense:
        largest = max(found, key=lambda f: f.parameter.numel())
        size = largest.parameter.numel() * largest.parameter.element_size()
        raise ValueError(
            f"{method.name} {' and '.join(reasons)}, which compressed storage exists to avoid: {largest.name} alone "
            f'takes {size:,} bytes dense; pass allow_dense=True to accept that, or use storage="masked"'
        )
