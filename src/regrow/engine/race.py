"""Compressed or masked, layer by layer: whichever runs faster on this machine at the layer's own topology."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from regrow.core.method import Method
from regrow.core.text import some
from regrow.engine.discovery import Found
from regrow.engine.placement import Place, dense_reasons
from regrow.engine.probe import FirstStep, Source
from regrow.engine.timing import Call, Race, Topologies, alike, calls, compressed, race
from regrow.nn import sparse_class
from regrow.storage.behaviour import behaviour_of
from regrow.storage.masked import masked_twin
from regrow.storage.pending import PendingParameter
from regrow.storage.stored import Draft

_log = logging.getLogger("regrow")

Calls = Mapping[nn.Module, Call]
"""What each module is called with."""


def contenders(
    model: nn.Module,
    example: Any,
    found: Sequence[Found],
    owners: Sequence[Optimizer],
    method: Method,
    *,
    source: Source,
    allow_dense: bool,
) -> tuple[list[Place], Calls]:
    """Compressed for each parameter that a race is to decide about, masked for the others, and what to race with.

    Args:
        model: on a real device; it runs once on `example` and is left as it was.
        example: a tensor, or a tuple or dict of the model's arguments.
        found: the parameters to sparsify.
        owners: the optimizer of each.
        method: that will work on them.
        source: where its start gets its gradients.
        allow_dense: race even where compressed storage would be as large as dense.
    """
    reasons = dense_reasons(method, source)
    never = isinstance(source, FirstStep) or method.latent is not None or not allow_dense
    everywhere = f"{method.name} {' and '.join(reasons)}" if reasons and never else None
    obstacles = [everywhere or _obstacle(f, owner) for f, owner in zip(found, owners, strict=True)]
    for f, obstacle in zip(found, obstacles, strict=True):
        if obstacle is not None:
            _log.info("%s: masked, since %s", f.name, obstacle)
    racing = [m for f, o in zip(found, obstacles, strict=True) if o is None for m, _ in f.holders]
    places = [
        Place(f, owner, "compressed" if o is None else "masked")
        for f, owner, o in zip(found, owners, obstacles, strict=True)
    ]
    return places, calls(model, example, racing) if racing else {}


def _obstacle(found: Found, owner: Optimizer) -> str | None:
    """Why a parameter cannot be compressed here, or None."""
    if any(sparse_class(module) is None for module, _ in found.holders):
        return f"there is no sparse form of {type(found.module).__name__}"
    if not (behaviour := behaviour_of(owner)).alone:
        return f"{type(owner).__name__} {behaviour.why}"
    if found.parameter.device.type != "cpu":
        return f"sparse kernels run on the CPU, and it lies on {found.parameter.device}"
    return None


class _Times(NamedTuple):
    """Seconds of a training step of some layers together."""

    dense: float
    compressed: float


def faster(parameters: Sequence[Draft], inputs: Calls) -> list[Draft]:
    """The parameters; those whose layers are not faster compressed become masked. What is picked is logged.

    Time is that of forward and backward. Of several ranks the first one measures, for all of them.

    Args:
        parameters: masked ones, and pending ones that have noted their topology.
        inputs: what modules are called with; parameters of modules that are missing here become masked.
    """
    groups = _groups([p for p in parameters if isinstance(p, PendingParameter)])
    slow: set[int] = set()
    for group, times in zip(groups, _measured(groups, inputs), strict=True):
        names = some([w.name for p in group for w in p.weights])
        if times is None:
            _log.info("%s: masked, since the example does not reach it", names)
        else:
            wins = times.compressed < times.dense
            topologies = [p.whole for p in group]
            density = sum(t.nnz for t in topologies) / sum(t.numel for t in topologies)
            _log.info(
                "%s: %s, since a training step takes %.3g ms compressed and %.3g ms dense at density %.3g",
                *(names, "compressed" if wins else "masked", 1e3 * times.compressed, 1e3 * times.dense, density),
            )
        if times is None or not wins:
            slow |= {id(p) for p in group}
    return [
        masked_twin(p, [w.topology for w in p.weights], [w.state for w in p.weights]) if id(p) in slow else p
        for p in parameters
    ]


def _groups(parameters: Sequence[PendingParameter]) -> list[list[PendingParameter]]:
    """Parameters in groups that share modules, as the weights of a recurrent layer do, or a tied one's layers."""
    groups: list[list[PendingParameter]] = []
    for parameter in parameters:
        modules = {module for module, _ in parameter.holders}
        joined = [g for g in groups if any(module in modules for p in g for module, _ in p.holders)]
        groups = [g for g in groups if g not in joined] + [[*(p for g in joined for p in g), parameter]]
    return groups


def _measured(groups: Sequence[Sequence[PendingParameter]], inputs: Calls) -> list[_Times | None]:
    distributed = torch.distributed
    ranks = distributed.is_available() and distributed.is_initialized()
    times: list[_Times | None] = [None] * len(groups)
    if not ranks or distributed.get_rank() == 0:
        # Equal layers are raced once.
        known: dict[Hashable, Race] = {}
        times = [_times(group, inputs, known) for group in groups]
    if ranks:
        distributed.broadcast_object_list(times)
    return times


def _times(group: Sequence[PendingParameter], inputs: Calls, known: dict[Hashable, Race]) -> _Times | None:
    races = []
    modules: dict[nn.Module, Topologies] = {}
    for parameter in group:
        for module, name in parameter.holders:
            modules[module] = {**modules.get(module, {}), name: parameter.whole}
    for module, active in modules.items():
        if module in inputs:
            key = alike(module, active, inputs[module])
            if key not in known:
                known[key] = race(module, active, inputs[module], {"compressed": compressed})
            races.append(known[key])
    return _Times(sum(r.time("dense") for r in races), sum(r.time("compressed") for r in races)) if races else None
