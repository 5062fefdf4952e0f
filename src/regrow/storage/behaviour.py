"""What an optimizer does with a sparse weight, found by trying it on a small one.

Hundreds of optimizers exist, and few say what their state is made of. Two facts matter here: which state belongs to the
entries of a weight one by one, so that it can be zeroed and moved with them, and whether active values by themselves
are stepped as they are within the whole weight, so that they can be stored alone. A matrix with a random mask, stepped
both ways with the same gradients, shows both.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_log = logging.getLogger("regrow")

SHAPE, STEPS, LR = (12, 10), 12, 1e-2
"""Steps enough for an optimizer that renews a basis every ten."""

KNOWN = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"}
)
"""Optimizers of torch.optim that work entry by entry."""


@dataclass(frozen=True)
class Behaviour:
    """What one kind of optimizer does with a sparse weight."""

    own: frozenset[str] | None
    """State that belongs to entries one by one; None is all that is floating point and of the weight's shape."""
    alone: bool
    """Whether active values by themselves are stepped as within the whole weight."""
    why: str = ""
    """What keeps them from it, as the end of a sentence."""


_found: weakref.WeakKeyDictionary[Optimizer, Behaviour] = weakref.WeakKeyDictionary()
_kinds: dict[tuple[type[Optimizer], str], Behaviour] = {}


def behaviour_of(optimizer: Optimizer) -> Behaviour:
    """What an optimizer does; tried once for each class and options, unless it is one of torch's that are known."""
    if optimizer not in _found:
        kind = type(optimizer), repr(_options(optimizer))
        if kind not in _kinds:
            _kinds[kind] = _behaviour(optimizer)
        _found[optimizer] = _kinds[kind]
    return _found[optimizer]


def _behaviour(optimizer: Optimizer) -> Behaviour:
    cls = type(optimizer)
    if cls.__module__.startswith("torch.optim.") and cls.__name__ in KNOWN:
        return Behaviour(None, True)
    if isinstance(optimizer, torch.optim.LBFGS):
        return Behaviour(frozenset(), False, "reads all parameters as one vector")
    mask, generator = _mask(), torch.Generator().manual_seed(1)
    first = torch.randn(SHAPE, generator=generator) * mask
    gradients = [torch.randn(SHAPE, generator=generator) * mask for _ in range(STEPS)]
    # Whatever somebody's optimizer raises where it is made or stepped is about the trial, and not about the run.
    try:
        whole = _train(optimizer, first, gradients, mask)
    except Exception as error:
        _log.warning(
            "%s could not be tried on a small weight (%s: %s): its floating-point state of the weight's shape is taken "
            "to belong to entries one by one",
            *(cls.__name__, type(error).__name__, error),
        )
        return Behaviour(None, False, "could not be tried on a small weight")
    shaped = {k: s for k, s in whole.state.items() if torch.is_tensor(s) and s.shape == mask.shape}
    own = frozenset(k for k, s in shaped.items() if s.is_floating_point() and _is_one_number(s[~mask]))
    try:
        alone = _train(optimizer, first[mask], [g[mask] for g in gradients], mask[mask])
    except Exception as error:
        return Behaviour(own, False, f"cannot step active values by themselves ({type(error).__name__})")
    if not torch.allclose(whole.values[mask], alone.values, rtol=1e-4, atol=1e-6):
        return Behaviour(own, False, "reads a weight as a matrix, or as a whole")
    return Behaviour(own, True)


@dataclass(frozen=True)
class _Trained:
    values: Tensor
    state: dict[str, Any]


def _mask() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5


def _train(optimizer: Optimizer, first: Tensor, gradients: list[Tensor], mask: Tensor) -> _Trained:
    parameter = nn.Parameter(first.clone())
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        twin = _remade(optimizer, parameter)
        # Some optimizers ask for a closure; this one leaves the gradient that is there.
        takes_closure = "closure" in inspect.signature(type(twin).step).parameters
        arguments: list[Any] = [lambda: torch.zeros(())] if takes_closure else []
        for gradient in gradients:
            parameter.grad = gradient.clone()
            twin.step(*arguments)
            parameter.data.masked_fill_(~mask, 0.0)
    return _Trained(parameter.detach(), dict(twin.state.get(parameter, {})))


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """The options of its first group; not the rate, which is zero at the start of a warm-up and would show nothing."""
    first = {**optimizer.defaults, **optimizer.param_groups[0]}
    return {key: value for key, value in first.items() if key not in ("params", "lr", "initial_lr")}


def _remade(optimizer: Optimizer, parameter: nn.Parameter) -> Optimizer:
    """An optimizer of the same class and options for another parameter."""
    options, known = _options(optimizer), inspect.signature(type(optimizer).__init__).parameters
    if "lr" in optimizer.defaults:
        options["lr"] = LR
    own = {key: value for key, value in options.items() if key in known}
    return type(optimizer)([{**options, "params": [parameter]}], **own)


def _is_one_number(values: Tensor) -> bool:
    """Whether all are equal: zero, or what an optimizer adds everywhere."""
    return bool((values == values[:1]).all())
