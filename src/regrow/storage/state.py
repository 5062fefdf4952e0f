"""What an optimizer keeps beside a weight, entry by entry: its state, its groups, its scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.storage.behaviour import behaviour_of

ZERO_PRESERVING = frozenset({"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop"})
"""Optimizers of torch.optim that leave an entry at zero whose value, gradient and state are zero."""


SECOND_MOMENTS = frozenset({"exp_avg_sq", "square_avg", "sum"})
"""State by which torch's optimizers divide: from zero, a newcomer's first steps would be far too long."""


def preserves_zeros(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether zeros need no second look after each step; any optimizer that is not known gets one.

    An eps that is zero, in half precision by rounding, makes 0 / 0 of an inactive entry.
    """
    cls = type(optimizer)
    if not cls.__module__.startswith("torch.optim.") or cls.__name__ not in ZERO_PRESERVING:
        return False
    least = torch.finfo(parameter.dtype).smallest_normal
    return all(group.get("eps", 1.0) >= least for group in optimizer.param_groups)


def weight_shaped_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state that belongs to the parameter's entries one by one, by name: it is zeroed and moved with them.

    What else an optimizer keeps is left as it is: factors of moments, a basis and what is written in it, codes.
    """
    state, own = optimizer.state.get(parameter, {}), behaviour_of(optimizer).own
    shaped = {key: s for key, s in state.items() if torch.is_tensor(s) and s.shape == parameter.shape}
    return {key: s for key, s in shaped.items() if s.is_floating_point() and (own is None or key in own)}


def forget_history(optimizer: Optimizer) -> None:
    """Clear what LBFGS keeps of earlier steps, which were those of another topology."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()


def second_moment_bias(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """What a constant squared gradient has become in the second moment by now: 1 - beta2^t in Adam's family, else 1."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    step = optimizer.state.get(parameter, {}).get("step")
    return 1.0 if "betas" not in group or step is None else 1 - float(group["betas"][1]) ** float(step)


def starting_moment(
    optimizer: Optimizer, parameter: nn.Parameter, active: Tensor, grown: Tensor | None, count: int
) -> Tensor:
    """The second moment that `count` newcomers of a weight start with, (count,).

    Zero would make Adam's steps several times the learning rate. The mean over the active entries is a typical size;
    the square of the newcomer's own gradient, where growth looked at one, is the size it will have.

    Args:
        optimizer: the one that holds `parameter`.
        parameter: the parameter that the weight is part of.
        active: second moments at the active entries, (nnz,).
        grown: gradients of the newcomers, (count,), or None.
        count: how many.
    """
    start = (active.mean() if active.numel() else active.new_zeros(())).expand(count)
    if grown is None:
        return start
    return torch.maximum(start, second_moment_bias(optimizer, parameter) * grown.to(active.dtype) ** 2)


def gradient_scale(optimizer: Optimizer) -> float:
    """By what a gradient scaler multiplied the gradients that a fused optimizer will divide inside."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def has_scheduler(optimizer: Optimizer) -> bool:
    """Whether a learning-rate scheduler of torch was built on this optimizer."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def add_beside(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    tensors: Sequence[nn.Parameter],
    lr: float | None,
    weight_decay: float | None,
) -> None:
    """Let an optimizer train `tensors` in a group of their own, with the options of `group` but for those given.

    Raises:
        ValueError: for a weight decay that the optimizer does not have.
    """
    options = {key: group[key] for key in optimizer.defaults if key in group}
    if lr is not None:
        options["lr"] = lr
    if "weight_decay" in options and weight_decay is not None:
        options["weight_decay"] = weight_decay
    elif weight_decay:
        raise ValueError(
            f"{type(optimizer).__name__} has no weight decay, and {weight_decay:g} is asked for: leave it out"
        )
    optimizer.add_param_group({**options, "params": list(tensors)})


def take_out(optimizer: Optimizer, tensors: Sequence[nn.Parameter]) -> None:
    """Let an optimizer forget `tensors`; a group that has none left goes, unless a scheduler counts it."""
    gone = {id(t) for t in tensors}
    emptied = []
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in gone]
        if len(kept) < len(group["params"]):
            group["params"] = kept
            emptied += [] if kept else [id(group)]
    for tensor in tensors:
        optimizer.state.pop(tensor, None)
    if not has_scheduler(optimizer):
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if id(g) not in emptied]
