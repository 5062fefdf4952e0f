"""The call: makes a model sparse and keeps it so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from regrow.core.checks import require_choice
from regrow.core.method import Method, Need
from regrow.engine import claims
from regrow.engine.discovery import Found, Selector, find
from regrow.engine.meta import (
    leave_meta_device,
    on_meta_device,
    require_initializers,
    spare_topologies_the_broadcast,
)
from regrow.engine.optimizers import holder_of
from regrow.engine.placement import Choice, divide, drafts, place, require_sparse
from regrow.engine.probe import FirstStep, Loss, Source, asking, source_of
from regrow.engine.race import Calls, contenders, faster
from regrow.engine.sparsifier import Sparsifier
from regrow.engine.step import begin, weights_of
from regrow.nn import Axes, Init, leave_fast_path
from regrow.parts.starts import scale_to_fan_in
from regrow.storage.memory import Memory
from regrow.storage.stored import Draft, Stored


def sparsify(  # noqa: PLR0913 - everything that can be said of a run, each by its name
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    method: Method,
    *,
    storage: Choice = "masked",
    example: Any = None,
    skip: Selector | Sequence[Selector] = (),
    only: Selector | Sequence[Selector] | None = None,
    also: Mapping[str, Axes] | None = None,
    budget: Literal["sparsified", "model"] = "sparsified",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    init: Init = "module",
    allow_dense: bool = False,
    update_memory: int | None = None,
    seed: int = 0,
) -> Sparsifier:
    """Make `model` sparse and keep it so while `optimizer` trains it; the training loop stays as it is.

    Call it last: after the optimizer is built, before the loop.

    Args:
        model: its parameters keep their identity, names and dtype.
        optimizer: any `torch.optim.Optimizer`, or a sequence of them that together hold the weights.
        method: a recipe of `regrow.methods`, or one composed of the same parts.
        storage: "masked" keeps dense tensors that are zero outside their topology. "compressed" holds active values
            only and runs on sparse kernels; the model's modules take their sparse form in place, and a model built
            under `torch.device("meta")` never has a dense one. "auto" takes for each layer whichever runs a training
            step faster on this machine, at the layer's own topology, and says so in the log `regrow`; on the meta
            device it is compressed. A dict, name or glob -> storage, decides layer by layer, masked where none fits:
            with `state_dict()["storages"]` a resumed run repeats what "auto" picked.
        example: what "auto" measures with: an input of the model with the batch of training, a tensor, or a tuple or
            dict of the model's arguments. The model runs on it once, without gradients, and is left as it was.
        skip: what stays dense: parameter or module names, globs, module types, or predicates of (name, module).
        only: what is sparsified at all; None means every weight of a known type.
        also: weights that no module type is known for, by name or glob, and which of their axes count outputs and
            inputs: `{"*.mixing": regrow.nn.Axes()}` for y = W x. They are masked.
        budget: "sparsified": the density holds among the sparsified weights. "model": among these and the weights
            that stay dense (those of unknown modules too; never biases, norms, embeddings), so the sparsified ones get
            sparser.
        batches: data from which a start that ranks gradients (SNIP) takes their mean at once; without it such a
            start takes the place of the first optimizer step.
        loss: (model, batch) -> scalar; required with `batches`.
        init: "module" leaves first values as the modules draw them; "fan_in" scales them to the connections that each
            output really has.
        allow_dense: accept a method that makes compressed storage as large as dense for a while or for good.
        update_memory: bytes of inputs and output gradients that compressed storage may keep in the step of an update;
            None means a quarter of the memory that is free now.
        seed: of every random draw; the same seed gives the same topologies on any rank, device or run.

    Returns:
        The `Sparsifier`, already hooked in.

    Raises:
        ValueError: nothing to sparsify, an infeasible budget, a weight in none or in two of the optimizers, an
            option that does not apply or is missing, a weight or optimizer that another sparsifier works on.
        TypeError: `method` is no Method, or `optimizer` no Optimizer.

    Examples:
        >>> from regrow import methods
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sparsify(model, optimizer, methods.rigl(density=0.1, until=1000))
        >>> sparsifier.nnz, int((model.weight != 0).sum())
        (20, 20)
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as methods.static(density=0.1), got {method!r}")
    require_choice("sparsify", "init", init, ("module", "fan_in"))
    require_choice("sparsify", "budget", budget, ("sparsified", "model"))
    _require_example_for_auto(storage, example)
    optimizers = _as_list(optimizer)
    found, excluded = find(model, skip, only, also)
    claims.require_free({id(f.parameter): f.name for f in found}, optimizers)
    owners = [holder_of(f.name, f.parameter, optimizers) for f in found]
    source = source_of(method, batches, loss)
    _require_init(init, method, source)
    calls: Calls | None = None
    if storage == "auto" and not on_meta_device(model):
        places, calls = contenders(model, example, found, owners, method, source=source, allow_dense=allow_dense)
    else:
        places = place("compressed" if storage == "auto" else storage, found, owners)
    require_sparse(method, places, source, allow_dense)
    memory = _memory(update_memory, storage)
    outside = sum(e.numel for e in excluded if e.in_budget) if budget == "model" else 0
    held = drafts(places, method, memory)
    with torch.no_grad(), _let_go_on_error(held):
        divide(held, method)
        _start(model, held, method, source, outside, seed)
        if calls is not None:
            held[:] = faster(held, calls)
        stored = _become(model, held, method, source, seed)
        if init == "fan_in":
            scale_to_fan_in(weights_of(stored, outside))
    started = not isinstance(source, FirstStep)
    return Sparsifier(model, optimizers, method, stored, _held(found, stored), excluded, outside, seed, started)


def _held(found: Sequence[Found], stored: Sequence[Stored]) -> list[claims.Held]:
    """Where the model holds every parameter, with the shape that masks have."""
    shapes = [None if s.storage == "compressed" else tuple(s.parameter.shape) for s in stored]
    return [
        claims.Held(f.name, module, attribute, f.parameter, shape)
        for f, shape in zip(found, shapes, strict=True)
        for module, attribute in f.holders
    ]


@contextmanager
def _let_go_on_error(held: Sequence[Draft]) -> Iterator[None]:
    """Take hooks off the parameters that are `held` by then, when something raises."""
    try:
        yield
    except BaseException:
        for parameter in held:
            parameter.remove()
        raise


def _start(model: nn.Module, held: Sequence[Draft], method: Method, source: Source, outside: int, seed: int) -> None:
    """Make the first topologies, unless they wait for a first step."""
    weights = weights_of(held, outside)
    method.start.require(weights)
    for rule in method.update:
        rule.require(weights)
    if not isinstance(source, FirstStep):
        with asking(source, model, held) as probe:
            begin(method, weights, seed, probe)


def _become(model: nn.Module, held: list[Draft], method: Method, source: Source, seed: int) -> list[Stored]:
    """Give every parameter and module the form that its storage holds, and memory to what has none."""
    require_initializers(model)
    for parameter in held:
        parameter.require_free()
    nnz = sum(w.topology.nnz for p in held for w in p.weights)
    rooms = [_room(p, nnz, method, source) for p in held]
    stored: list[Stored] = []
    for i, room in enumerate(rooms):
        stored.append(held[i].become(room, seed))
        held[i] = stored[i]
    leave_fast_path(model)
    leave_meta_device(model, seed)
    spare_topologies_the_broadcast(model)
    return stored


def _room(parameter: Draft, nnz: int, method: Method, source: Source) -> int:
    """The most entries that a parameter will ever hold, of `nnz` in all."""
    numel = sum(w.topology.numel for w in parameter.weights)
    if isinstance(source, FirstStep) or Need.DENSE_VALUES in method.needs:
        return numel
    if Need.ROOM in method.needs:
        return min(numel, nnz)
    own = sum(w.topology.nnz for w in parameter.weights)
    return min(numel, 2 * own) if Need.OVERSHOOT in method.needs else own


def _memory(limit: int | None, storage: Choice) -> Memory:
    if limit is not None and storage == "masked":
        raise ValueError('update_memory= limits what storage="compressed" keeps: leave it out with storage="masked"')
    if limit is not None and limit < 1:
        raise ValueError(f"update_memory must be 1 byte or more, got {limit}")
    return Memory(limit)


def _require_init(init: Init, method: Method, source: Source) -> None:
    if init == "fan_in" and isinstance(source, FirstStep):
        raise ValueError(
            f'{method.name} has no connections to scale values to before its first step: with init="fan_in", '
            "give batches= and loss= to regrow.sparsify"
        )
    if init == "fan_in" and method.latent is not None:
        raise ValueError(
            f"{method.name} trains values at every position, which have no connections to be scaled to: "
            'leave out init="fan_in"'
        )


def _require_example_for_auto(storage: Choice, example: Any) -> None:
    if storage == "auto" and example is None:
        raise ValueError(
            'storage="auto" measures the layers on an input of the model: give one of the batch size of training as '
            "example="
        )
    if storage != "auto" and example is not None:
        raise ValueError(f'example= is what storage="auto" measures with, and storage is {storage!r}: leave it out')


def _as_list(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    if not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or a sequence of them, got {optimizer!r}")
    return optimizers
