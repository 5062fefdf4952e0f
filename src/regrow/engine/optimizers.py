"""What must be known of optimizers, in one place; all else treats them alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer


def skips_step(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip this step inside, because a gradient scaler found an overflow."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


StepArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of an optimizer's step, the optimizer itself first."""


def closure_of(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """The closure that a step is called with, if any: its gradients then come from inside the step."""
    return next((a for a in (*args, kwargs.get("closure")) if callable(a) and a is not optimizer), None)


def with_closure(
    closure: Callable[[], Any], optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StepArguments:
    """The arguments of a step with `closure` in the place of the one that they hold."""
    old = closure_of(optimizer, args, kwargs)
    return tuple(closure if a is old else a for a in args), {k: closure if v is old else v for k, v in kwargs.items()}


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is under way already: a subclass that calls its base's step hooks twice.

    Read from the call stack, since a step that failed half way would leave a counter behind.
    """
    return _steps_under_way(optimizer) > 1


def is_stepping(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is under way."""
    return _steps_under_way(optimizer) > 0


_STEP_CODE = Optimizer.profile_hook_step(lambda self: None).__code__
"""The code that torch wraps around every step, hooks included."""


def _steps_under_way(optimizer: Optimizer) -> int:
    count, frame = 0, sys._getframe()
    while frame is not None:
        if frame.f_code is _STEP_CODE and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = cast(FrameType, frame.f_back)
    return count


def holder_of(name: str, parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The one optimizer that holds `parameter`.

    Raises:
        ValueError: when none or several do.
    """
    holders = [o for o in optimizers if any(p is parameter for g in o.param_groups for p in g["params"])]
    if len(holders) != 1:
        raise ValueError(
            f"{name} is in {len(holders)} of the {len(optimizers)} optimizers given, and must be in exactly 1: "
            "add it to one, or name it in skip="
        )
    return holders[0]


def stranger(optimizer: Optimizer, names: Mapping[int, str]) -> str | None:
    """A sentence about an optimizer without our hooks that holds sparsified weights (id of parameter -> name)."""
    taken = [names[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in names]
    if not taken:
        return None
    return (
        f"a {type(optimizer).__name__} without regrow's hooks is stepping {len(taken)} sparsified weights "
        f"({taken[0]}, ...): it was copied or made after regrow.sparsify; pass it there, or call "
        "sparsifier.remove() first"
    )
