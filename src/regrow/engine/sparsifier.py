"""Hooks a method into a model and its optimizers; knows clock, budget and state, and no particular method."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.draws import Stream
from regrow.core.method import Method, Need, Probe
from regrow.core.text import table
from regrow.core.topology import Topology
from regrow.core.weight import StoredParameter, Weights
from regrow.engine import claims
from regrow.engine.discovery import Excluded
from regrow.engine.meta import leave_meta_device, require_initializers, spare_topologies_the_broadcast
from regrow.engine.optimizers import StepArguments, closure_of, is_nested, skips_step, with_closure
from regrow.engine.placement import (
    Storage,
    hardened,
    storage_of,
)
from regrow.engine.probe import BatchProbe, Loss, NoProbe, mean_gradient
from regrow.engine.race import Calls, faster
from regrow.nn import Init, leave_fast_path
from regrow.parts.observers import mark_explored
from regrow.parts.starts import scale_to_fan_in
from regrow.storage.latent import LatentParameter
from regrow.storage.state import gradient_scale

STATE_VERSION = 1
STATE_KEYS = ("version", "step", "updates", "started", "seed", "shapes", "method", "storages", "topologies", "state")
"""What a state dict of a `Sparsifier` holds."""


class Sparsifier:
    """A method at work on a model; made by `regrow.sparsify`.

    `print(sparsifier)` shows a table of the layers. Steps are optimizer steps, the first of which is 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        method: Method,
        parameters: Sequence[StoredParameter],
        excluded: Sequence[Excluded],
        outside: int,
        seed: int,
    ) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.method = method
        self._outside = outside
        self.excluded = list(excluded)
        self.seed = seed
        self.step = 0
        """Optimizer steps so far, updates that took the place of one included."""
        self.updates = 0
        """Topology updates so far."""
        self.started = False
        """Whether the first topologies are made; until then the model is not yet sparse."""
        self._hold(parameters)
        self.names = {id(p.parameter): p.weights[0].name for p in self._parameters}
        """Sparsified parameters: id -> name."""
        self._stepped: set[int] = set()
        self._pending = False
        self._late = False
        self._state_loaded = False
        self._replaced = False
        self._hidden: dict[nn.Parameter, Tensor] = {}
        self._handles: list[Any] = []
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
            self._handles.append(optimizer.register_load_state_dict_post_hook(self._loaded))
        self._shown: list[Any] = []
        if method.latent is not None and method.latent.noise is not None:
            self._shown.append(model.register_forward_pre_hook(_Shown(self)))
            saved = _Shown(self, evaluated=True)
            self._shown.append(model.register_state_dict_pre_hook(saved))  # type: ignore[no-untyped-call]
        claims.add(self)

    def _hold(self, parameters: Sequence[StoredParameter]) -> None:
        self._parameters = list(parameters)
        items = tuple(w for p in self._parameters for w in p.weights)
        self.weights = Weights(items, self._outside, self._outside)

    @property
    def nnz(self) -> int:
        """Active entries among the sparsified weights."""
        return self.weights.nnz

    @property
    def numel(self) -> int:
        """Entries of the sparsified weights, active or not."""
        return self.weights.numel

    @property
    def density(self) -> float:
        """nnz / numel over the sparsified weights."""
        return self.nnz / self.numel

    @property
    def topologies(self) -> dict[str, Topology]:
        """The topology of each sparsified weight by canonical name; blocks of packed weights end in [0], [1], ..."""
        return {w.name: w.topology for w in self.weights}

    @property
    def storages(self) -> dict[str, Storage]:
        """How the values of each sparsified weight are held, by canonical name."""
        return {w.name: storage_of(p) for p in self._parameters for w in p.weights}

    @property
    def explored(self) -> float | None:
        """R_s: the share of entries that were ever active; None unless the method keeps track (`Need.EXPLORED`)."""
        if Need.EXPLORED not in self.method.needs:
            return None
        return sum(int(w.state["explored"].sum()) if "explored" in w.state else 0 for w in self.weights) / self.numel

    @property
    def due(self) -> bool:
        """Whether the coming optimizer step changes topologies."""
        return not self.started or self.method.due(self.step + 1)

    def mask_gradients(self) -> None:
        """Zero inactive gradients now; for clipping, between the last backward and the optimizer step.

        Only a step that reads gradients at every position needs it: an update, or any step of a method that watches
        them (SNFS); on the others inactive gradients are zeroed as they accumulate. What is needed is set aside
        first, and follows the factor by which the gradient is clipped or unscaled afterwards.
        """
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.keep_dense:
                    parameter.set_aside()
                else:
                    parameter.mask_gradient()

    def remove(self) -> None:
        """Take all hooks out; the model keeps its values.

        A masked one trains densely from here on, a compressed one with the topology that it has.
        """
        for handle in (*self._handles, *self._shown):
            handle.remove()
        for parameter in self._parameters:
            parameter.remove()
        self._handles.clear()
        claims.discard(self)

    def harden(self) -> None:
        """Make the weights that are evaluated now ordinary ones, whose topology stays fixed while they train on.

        The latent values of the method, what it trains beside them and its penalty are gone; optimizer state stays at
        active entries. A run that is resumed after it is hardened before its states are loaded.

        Raises:
            ValueError: for a method without latent values.
        """
        if self.method.latent is None:
            raise ValueError(
                f"{self.method.name} trains the weights themselves, so that there is nothing to harden: leave it out"
            )
        with torch.no_grad():
            for handle in self._shown:
                handle.remove()
            self._hold([hardened(p) if isinstance(p, LatentParameter) else p for p in self._parameters])
        self.method = Method(
            f"{self.method.name} hardened", self.method.start, needs=self.method.needs & Need.EXPLORED, timing="after"
        )
        self._prepare_next()

    def _show(self, training: bool) -> None:
        """Before the model runs: noisy weights for training, the same ones in all forwards of a step, or none."""
        with torch.inference_mode(False), torch.no_grad():
            latents = [p for p in self._parameters if isinstance(p, LatentParameter)]
            if all(p.drawn == training for p in latents):
                return
            # A lower-precision copy of the weights may be kept for the whole of an autocast context.
            torch.clear_autocast_cache()
            self._draw_for(self.step + 1)
            for parameter in latents:
                parameter.show(training)

    def _require_applicable(self, batches: Iterable[Any] | None, loss: Loss | None, init: Init) -> None:
        """Raise ValueError for options that do not go with the method, or weights that it cannot work on."""
        needs_gradient, needs_batches = self.method.start.needs_gradient, self.method.start.needs_batches
        if (batches is None) != (loss is None):
            raise ValueError("batches= and loss= belong together: give both or neither")
        if needs_batches and batches is None:
            raise ValueError(
                f"{self.method.name} asks for several gradients before training: give batches= and loss= to "
                "regrow.sparsify"
            )
        if batches is not None and not (needs_gradient or needs_batches):
            raise ValueError(f"{self.method.name} reads no gradient at its start: leave out batches= and loss=")
        if init == "fan_in" and needs_gradient and batches is None:
            raise ValueError(
                f'{self.method.name} has no connections to scale values to before its first step: with init="fan_in", '
                "give batches= and loss= to regrow.sparsify"
            )
        if init == "fan_in" and self.method.latent is not None:
            raise ValueError(
                f"{self.method.name} trains values at every position, which have no connections to be scaled to: "
                'leave out init="fan_in"'
            )
        self.method.start.require(self.weights)
        for rule in self.method.update:
            rule.require(self.weights)

    def _begin(self, batches: Iterable[Any] | None, loss: Loss | None, init: Init, inputs: Calls | None) -> None:
        """Make the first topologies, choose storages where there are `inputs` to race with, and become sparse."""
        self._require_applicable(batches, loss, init)
        # The gradient of batches is wanted at every position, like that of a first step.
        self._prepare_next()
        needs_gradient, needs_batches = self.method.start.needs_gradient, self.method.start.needs_batches
        if needs_batches and batches is not None and loss is not None:
            blocks = [(p.parameter, len(p.weights)) for p in self._parameters]
            self._start(BatchProbe(self.model, blocks, batches, loss))
        elif batches is not None and loss is not None:
            with mean_gradient(self.model, [p.parameter for p in self._parameters], batches, loss):
                self._start()
        elif not needs_gradient:
            self._start()
        if inputs is not None:
            self._hold(faster(self._parameters, inputs))
        require_initializers(self.model)
        for parameter in self._parameters:
            parameter.require_free()
        for parameter in self._parameters:
            parameter.materialize(self._room(parameter), self.seed)
        leave_fast_path(self.model)
        leave_meta_device(self.model, self.seed)
        spare_topologies_the_broadcast(self.model)
        if init == "fan_in":
            scale_to_fan_in(self.weights)
        self._prepare_next()

    def _room(self, parameter: StoredParameter) -> int:
        """The most entries that a parameter will ever hold."""
        numel = sum(w.topology.numel for w in parameter.weights)
        if not self.started or Need.DENSE_VALUES in self.method.needs:
            return numel
        if Need.ROOM in self.method.needs:
            return min(numel, self.nnz)
        own = sum(w.topology.nnz for w in parameter.weights)
        return min(numel, 2 * own) if Need.OVERSHOOT in self.method.needs else own

    def _start(self, probe: Probe | None = None) -> None:
        self._draw_for(0)
        if self.method.start.needs_gradient:
            for parameter in self._parameters:
                parameter.require_finite_gradient()
        self.method.start.make(self.weights, probe or NoProbe())
        self.started = True
        self._note_explored(None)

    def _loaded(self, optimizer: Optimizer) -> None:
        """State may come from a dense run; it is projected when all state dicts are loaded, at the next step."""
        self._state_loaded = True

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepArguments | None:
        if skips_step(optimizer) or is_nested(optimizer):
            return None
        closure = closure_of(optimizer, args, kwargs)
        with torch.no_grad():
            # A backward since the last step begins a new one, also where a scaler made one optimizer skip.
            fresh = any(parameter.fresh for parameter in self._parameters)
            if fresh or not self._stepped or id(optimizer) in self._stepped:
                self._open_step(late=closure is not None)
            self._stepped.add(id(optimizer))
            if self._replaced:
                self._hide_gradients(optimizer)
            else:
                for parameter in self._parameters:
                    if parameter.optimizer is optimizer:
                        parameter.stepping(self.step)
        return None if closure is None else with_closure(self._watched(closure), optimizer, args, kwargs)

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure after which gradients are masked, and set aside where an update or the observer reads them."""

        def watched() -> Any:
            for parameter in self._parameters:
                parameter.release()
            loss = closure()
            with torch.no_grad():
                self.mask_gradients()
            return loss

        return watched

    def _open_step(self, late: bool) -> None:
        """Begin a training step; `late` when its gradients come from a closure inside the optimizer's step."""
        if self._pending:
            self._finish(self.step)
            for parameter in self._parameters:
                parameter.release()
        self._stepped = set()
        self._hidden = {}
        self._replaced = False
        step = self.step + 1
        self._draw_for(step)
        instead = not self.started or (self.method.timing == "instead" and self.method.due(step))
        if late and instead:
            way_out = (
                'pass timing="after" to the method' if self.started else "give batches= and loss= to regrow.sparsify"
            )
            raise ValueError(
                f"{self.method.name} takes the place of optimizer step {step}, which a step with a closure does not "
                f"allow: {way_out}"
            )
        if late and self.method.latent is not None:
            raise ValueError(
                f"{self.method.name} puts latent values in the places of the weights while the optimizer steps, where "
                "a closure would compute with them: call loss.backward() before optimizer.step(), without a closure"
            )
        for parameter in self._parameters:
            parameter.fresh = False
            parameter.project()
            if self._state_loaded:
                parameter.project_state()
            parameter.settle()
        self._state_loaded = False
        self._late = late
        if not late:
            self._read(step)
        if instead:
            self._finish(step) if self.started else self._start()
            self._replaced = True
        for parameter in self._parameters:
            parameter.mask_gradient()
        self.step = step

    def _read(self, step: int) -> None:
        """Show the gradients of this step to the observer, and set them aside for an update that is due."""
        if not self.started:
            return
        due = self.method.due(step)
        if due or self.method.observe is not None:
            self._use_scales()
        if due:
            for parameter in self._parameters:
                parameter.require_finite_gradient()
        if self.method.observe is not None:
            for weight in self.weights:
                if weight.has_grad:
                    self.method.observe(weight)
        if due:
            for parameter in self._parameters:
                if parameter.keep_dense:
                    parameter.set_aside()
            self._pending = self.method.timing == "after"
            for parameter in self._parameters:
                parameter.holding = self._pending

    def _use_scales(self) -> None:
        """Read gradients without the factor that a gradient scaler leaves to a fused optimizer."""
        scales = {id(optimizer): gradient_scale(optimizer) for optimizer in self.optimizers}
        for parameter in self._parameters:
            parameter.use_scale(scales[id(parameter.optimizer)])

    def _finish(self, step: int) -> None:
        """Apply the update that is due at `step`."""
        self._pending = False
        before = [w.topology for w in self.weights] if Need.EXPLORED in self.method.needs else None
        for rule in self.method.update:
            if rule.due(step):
                rule.apply(self.weights, step)
        self.updates += 1
        self._note_explored(before)

    def _note_explored(self, before: Sequence[Topology] | None) -> None:
        if Need.EXPLORED in self.method.needs:
            for i, weight in enumerate(self.weights):
                mark_explored(weight, None if before is None else before[i])

    def _hide_gradients(self, optimizer: Optimizer) -> None:
        """Leave the optimizer nothing to do, so that parameters, state and step counts stay as they are."""
        for parameter in (p for g in optimizer.param_groups for p in g["params"]):
            if parameter.grad is not None:
                self._hidden[parameter] = parameter.grad
                parameter.grad = None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if skips_step(optimizer) or is_nested(optimizer):
            return
        with torch.no_grad():
            for parameter in (p for g in optimizer.param_groups for p in g["params"]):
                if parameter in self._hidden:
                    parameter.grad = self._hidden.pop(parameter)
            for stored in self._parameters:
                stored.fresh = False
                if stored.optimizer is optimizer:
                    stored.stepped()
            if len(self._stepped) == len(self.optimizers):
                self._close_step()
            self._prepare_next()

    def _close_step(self) -> None:
        """End a training step, every optimizer having stepped."""
        if self._late:
            self._read(self.step)
        changes = self._pending or self._replaced
        if self._pending:
            self._finish(self.step)
        for parameter in self._parameters:
            parameter.reached = False
            parameter.release()
            if changes:
                parameter.mask_gradient()

    def _prepare_next(self) -> None:
        """Decide whether the backward passes of the coming step keep gradients at inactive positions."""
        needs = self.method.needs
        keep = (
            not self.started
            or Need.EVERY_GRADIENT in needs
            or (Need.GRADIENT in needs and self.method.due(self.step + 1))
        )
        for parameter in self._parameters:
            parameter.keep_dense = keep

    def _draw_for(self, step: int) -> None:
        for weight in self.weights:
            weight.generator = Stream(self.seed, weight.name, step)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the model's and the optimizers' state dicts do not hold, as tensors and numbers.

        Restore in the order sparsify, model, optimizer, sparsifier: the run goes on as if uninterrupted.
        """
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "updates": self.updates,
            "started": self.started,
            "seed": self.seed,
            "shapes": {w.name: list(w.shape) for w in self.weights},
            "method": self.method.name,
            "storages": self.storages,
            "topologies": {w.name: None if (at := w.topology.positions) is None else at.cpu() for w in self.weights},
            "state": {w.name: {key: value.cpu() for key, value in w.state.items()} for w in self.weights if w.state},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run where `state_dict` left it; model and optimizer states must be loaded before.

        Raises:
            ValueError: when the state is of another model or version; nothing is changed then.
        """
        missing = [key for key in STATE_KEYS if key not in state]
        if missing or state["version"] != STATE_VERSION or state["method"] != self.method.name:
            raise ValueError(
                f"this is no state of a {self.method.name} sparsifier: it lacks {', '.join(missing) or 'nothing'}, "
                f"is of method {state.get('method')} and has version {state.get('version')} (this regrow reads "
                f"{STATE_VERSION})"
            )
        shapes = {w.name: w.shape for w in self.weights}
        given = {name: tuple(shape) for name, shape in state["shapes"].items()}
        if given != shapes:
            differing = sorted({name for name, _ in given.items() ^ shapes.items()})
            raise ValueError(
                f"this sparsifier state is of another model: {len(differing)} weights differ in name or shape "
                f"({', '.join(differing[:3])}); sparsify the same model with the same skip= and only= first"
            )
        storages = self.storages
        others = [name for name, storage in storages.items() if state["storages"].get(name) != storage]
        if others:
            name = others[0]
            raise ValueError(
                f"this sparsifier state has {len(others)} of {len(storages)} weights in another storage ({name}: "
                f'{state["storages"].get(name)} there, {storages[name]} here): pass its "storages" as storage= to '
                "regrow.sparsify"
            )
        if set(state["topologies"]) != set(shapes):
            raise ValueError(
                f"this sparsifier state has {len(state['topologies'])} topologies for {len(shapes)} weights"
            )
        topologies = {name: Topology(shape, state["topologies"][name]) for name, shape in shapes.items()}
        with torch.no_grad():
            for parameter in self._parameters:
                for weight in parameter.weights:
                    weight.restore(topologies[weight.name])
                    kept = state["state"].get(weight.name, {})
                    weight.state = {k: v.clone().to(parameter.parameter.device) for k, v in kept.items()}
                parameter.release()
                parameter.project()
                parameter.project_state()
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.started, self.seed = bool(state["started"]), int(state["seed"])
        self._pending, self._late, self._replaced, self._stepped, self._hidden = False, False, False, set(), {}
        self._prepare_next()

    def __repr__(self) -> str:
        state = f"{self.density:.4%} of {self.numel:,} entries active" if self.started else "not yet sparse"
        head = f"{self.method.name}: {state}, step {self.step:,}, {self.updates:,} updates"
        rows, storages = [], self.storages
        for weight in self.weights:
            explored = weight.state.get("explored")
            rate = "" if explored is None else f"{float(explored.double().mean()):.3f}"
            t = weight.topology
            counts = [f"{t.density:.4f}", f"{t.nnz:,}"]
            rows.append([weight.name, _shape(weight.shape), *counts, storages[weight.name], rate])
        rows += [[e.name, _shape(e.shape), "1", f"{e.numel:,}", "", e.reason] for e in self.excluded]
        return head + "\n" + table(["layer", "shape", "density", "active", "storage", "explored"], rows)


class _Shown:
    """A hook of a model that says which weights its sparsifier is to show; of a copied model it does nothing."""

    def __init__(self, sparsifier: Sparsifier | None = None, evaluated: bool = False) -> None:
        self._sparsifier = (lambda: None) if sparsifier is None else weakref.ref(sparsifier)
        self._evaluated = evaluated
        # Not as a decorator, which would load the compiler with this module.
        self._uncompiled = torch.compiler.disable(self._look)  # type: ignore[no-untyped-call]

    def __call__(self, model: nn.Module, *arguments: Any) -> None:
        self._uncompiled(model)

    def _look(self, model: nn.Module) -> None:
        sparsifier = self._sparsifier()
        if sparsifier is not None:
            sparsifier._show(model.training and not self._evaluated)

    def __reduce__(self) -> tuple[type[_Shown], tuple[()]]:
        return _Shown, ()


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
