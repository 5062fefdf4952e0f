"""Which sparsifiers are at work, so that no two meet in one weight, no unhooked optimizer steps one, and none works on
parameters that its model no longer holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regrow.core.method import Method
from regrow.engine.optimizers import is_stepping, stranger


class Held(NamedTuple):
    """Where a model holds a sparsified parameter."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    shape: tuple[int, ...] | None
    """What its shape must stay; None where the storage changes it."""


class AtWork(Protocol):
    """As much of a sparsifier as is read here."""

    names: dict[int, str]
    held: list[Held]

    @property
    def method(self) -> Method: ...
    @property
    def optimizers(self) -> list[Optimizer]: ...


_at_work: weakref.WeakSet[AtWork] = weakref.WeakSet()


def add(sparsifier: AtWork) -> None:
    """From now on `sparsifier` is at work, until it is discarded or let go."""
    _at_work.add(sparsifier)


def discard(sparsifier: AtWork) -> None:
    """From now on `sparsifier` is not at work."""
    _at_work.discard(sparsifier)


def require_free(names: Mapping[int, str], optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError when a sparsifier is at work on a parameter (id -> name) or in an optimizer."""
    if _conflict(names, optimizers) is not None:
        # It may belong to a model that was let go, as when a notebook's cell is run again.
        gc.collect()
    conflict = _conflict(names, optimizers)
    if conflict is not None:
        raise ValueError(conflict)


def _conflict(names: Mapping[int, str], optimizers: Sequence[Optimizer]) -> str | None:
    for other in _at_work:
        taken = [name for key, name in names.items() if key in other.names]
        if taken:
            return f"{taken[0]} is already sparsified by {other.method.name}: call remove() on its sparsifier first"
        if any(o is theirs for o in optimizers for theirs in other.optimizers):
            return (
                f"the optimizer is already hooked by {other.method.name}: sparsify all of its weights in one call, or "
                "call remove() on that sparsifier first"
            )
    return None


def _replaced(sparsifier: AtWork, optimizer: Optimizer) -> str | None:
    """A sentence about a parameter that was sparsified and is no longer the model's, where the optimizer is concerned.

    It is where it holds what has come in its place, or belongs to the sparsifier.
    """
    own = any(optimizer is o for o in sparsifier.optimizers)
    for name, module, attribute, parameter, shape in sparsifier.held:
        now = vars(module)["_parameters"].get(attribute)
        if now is parameter:
            if own and shape is not None and tuple(parameter.shape) != shape:
                return (
                    f"{name} was sparsified with shape {shape} and has shape {tuple(parameter.shape)} now: sparsify "
                    "after the model has its shapes"
                )
        elif own or any(p is now for group in optimizer.param_groups for p in group["params"]):
            return (
                f"{name} is no longer the parameter that {sparsifier.method.name} sparsified: another stands in its "
                "place, as after load_state_dict(assign=True), fully_shard or a reparametrization; do that before "
                "regrow.sparsify, or call sparsifier.remove() first"
            )
    return None


def _refuse_strangers(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a step by an optimizer that holds sparsified weights without our hooks, as a copied one does.

    Refused too is one after the model's parameters were replaced, since it would train them densely.
    """
    for sparsifier in list(_at_work):
        replaced = _replaced(sparsifier, optimizer)
        if replaced is not None:
            raise RuntimeError(replaced)
        if any(optimizer is o for o in sparsifier.optimizers):
            continue
        fault = stranger(optimizer, sparsifier.names)
        if fault is not None and not any(is_stepping(o) for o in sparsifier.optimizers):
            raise RuntimeError(fault)


# One hook for good: adding and removing hooks while an optimizer runs through them would break its step.
register_optimizer_step_pre_hook(_refuse_strangers)
