"""What a user holds of a run: facts, a table of the layers, and the state that is saved."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from regrow.core.method import Method, Need
from regrow.core.text import by, folded, table
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight, Weights
from regrow.engine import claims
from regrow.engine.discovery import Excluded
from regrow.engine.step import Stepper, draw_for, plan
from regrow.parts.observers import EXPLORATION, explored_entries
from regrow.parts.remembered import EXPLORED
from regrow.storage.stored import Storage, Stored

STATE_VERSION = 1
STATE_KEYS = (
    "version",
    "step",
    "updates",
    "started",
    "seed",
    "shapes",
    "units",
    "method",
    "storages",
    "topologies",
    "non_zeros",
    "state",
)
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
        parameters: Sequence[Stored],
        held: Sequence[claims.Held],
        excluded: Sequence[Excluded],
        outside: int,
        seed: int,
        started: bool,
    ) -> None:
        self.model = model
        self.excluded = list(excluded)
        self._stepper = Stepper(method, parameters, outside, optimizers, seed, started, keeps=self)
        self.names = {id(p.parameter): p.weights[0].name for p in parameters}
        """Sparsified parameters: id -> name."""
        self.held = list(held)
        """Where the model holds them."""
        self._shown: list[Any] = []
        if method.latent is not None and method.latent.noise is not None:
            self._shown.append(model.register_forward_pre_hook(_Shown(self)))
            saved = _Shown(self, evaluated=True)
            self._shown.append(model.register_state_dict_pre_hook(saved))  # type: ignore[no-untyped-call]
        self._told = model.register_load_state_dict_post_hook(_Told(self._stepper))  # type: ignore[no-untyped-call]
        claims.add(self)

    @property
    def method(self) -> Method:
        """The method at work."""
        return self._stepper.method

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that together hold the weights."""
        return self._stepper.optimizers

    @property
    def weights(self) -> Weights:
        """The sparsified weights in order, with the budget they share."""
        return self._stepper.weights

    @property
    def seed(self) -> int:
        """The seed of every random draw."""
        return self._stepper.seed

    @property
    def step(self) -> int:
        """Optimizer steps so far, updates that took the place of one included."""
        return self._stepper.number

    @property
    def updates(self) -> int:
        """Topology updates so far."""
        return self._stepper.updates

    @property
    def started(self) -> bool:
        """Whether the first topologies are made; until then the model is not yet sparse."""
        return self._stepper.started

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
        return {w.name: p.storage for p in self._stepper.parameters for w in p.weights}

    @property
    def explored(self) -> float | None:
        """R_s: the share of entries that were ever active; None unless the method keeps track (`Need.EXPLORED`)."""
        if Need.EXPLORED not in self.method.needs:
            return None
        return sum(explored_entries(w) if EXPLORED.known(w) else 0 for w in self.weights) / self.numel

    @property
    def due(self) -> bool:
        """Whether the coming optimizer step changes topologies."""
        return plan(self.method, self.started, self.step + 1) != "ordinary"

    def mask_gradients(self) -> None:
        """Zero inactive gradients now; for clipping, between the last backward and the optimizer step.

        Only a step that reads gradients at every position needs it: an update, or any step of a method that watches
        them (SNFS); on the others inactive gradients are zeroed as they accumulate. What is needed is set aside
        first, and follows the factor by which the gradient is clipped or unscaled afterwards.
        """
        self._stepper.set_gradients_aside()

    def remove(self) -> None:
        """Take all hooks out; the model keeps its values.

        A masked one trains densely from here on, a compressed one with the topology that it has.
        """
        self._stepper.remove()
        for handle in (*self._shown, self._told):
            handle.remove()
        for parameter in self._stepper.parameters:
            parameter.remove()
        claims.discard(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Sparsifier works through hooks of its model and optimizer, which copies do not have: keep its "
            "state_dict(), and load that into the sparsifier of the copies, which regrow.sparsify makes"
        )

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
        for handle in self._shown:
            handle.remove()
        with torch.no_grad():
            parameters = [p.hardened(EXPLORATION) for p in self._stepper.parameters]
        start, needs = self.method.start, self.method.needs & Need.EXPLORED
        self._stepper.take(Method(f"{self.method.name} hardened", start, needs=needs, timing="after"), parameters)

    def _show(self, training: bool) -> None:
        """Before the model runs: noisy weights for training, the same ones in all forwards of a step, or none."""
        with torch.inference_mode(False), torch.no_grad():
            parameters = self._stepper.parameters
            if all(p.shows(training) for p in parameters):
                return
            # A lower-precision copy of the weights may be kept for the whole of an autocast context.
            torch.clear_autocast_cache()
            draw_for(self.weights, self.seed, self.step + 1)
            for parameter in parameters:
                parameter.show(training)

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
            "units": self._units,
            "topologies": {w.name: None if (at := w.topology.positions) is None else at.cpu() for w in self.weights},
            "non_zeros": self._non_zeros(self.topologies),
            "state": {w.name: {key: value.cpu() for key, value in w.state.items()} for w in self.weights if w.state},
        }

    def _non_zeros(self, topologies: Mapping[str, Topology]) -> dict[str, int]:
        """How many values at the active entries of such topologies are not zero, where values are not computed."""
        counts: dict[str, int] = {}
        for parameter in self._stepper.parameters:
            names = [w.name for w in parameter.weights]
            found = parameter.non_zeros([topologies[name] for name in names])
            counts |= zip(names, found or (), strict=found is not None)
        return counts

    @property
    def _units(self) -> dict[str, list[int]]:
        """The size of a unit of each weight, where it is more than an entry."""
        return {w.name: list(w.topology.unit) for w in self.weights if not w.topology.is_unstructured}

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
        units, theirs = self._units, dict(state["units"] or {})
        if theirs != units:
            name = min((n for n in {*theirs, *units} if theirs.get(n) != units.get(n)), key=str)
            raise ValueError(
                f"this sparsifier state has other units ({name}: {theirs.get(name, 'entries')} there, "
                f"{units.get(name, 'entries')} here): give the method the same structure="
            )
        topologies = {w.name: w.topology.at(state["topologies"][w.name]) for w in self.weights}
        self._require_values(topologies, state["non_zeros"])
        with torch.no_grad():
            for parameter in self._stepper.parameters:
                for weight in parameter.weights:
                    weight.restore(topologies[weight.name])
                    kept = state["state"].get(weight.name, {})
                    weight.state = {k: v.clone().to(parameter.parameter.device) for k, v in kept.items()}
        self._stepper.resume(int(state["step"]), int(state["updates"]), bool(state["started"]), int(state["seed"]))

    def _require_values(self, topologies: Mapping[str, Topology], saved: Mapping[str, int]) -> None:
        """Raise ValueError unless the model holds as many values as were saved with these topologies."""
        now = self._non_zeros(topologies)
        lost = [name for name, count in now.items() if count < saved.get(name, 0)]
        if lost:
            name = lost[0]
            raise ValueError(
                f"the model has lost values that belong to this state: {name} holds {now[name]:,} of {saved[name]:,} "
                f"that are not zero, and {len(lost)} of {len(now)} weights hold too few; load the model's state after "
                "regrow.sparsify, which zeroes what it finds, and before this"
            )

    def __repr__(self) -> str:
        state = f"{self.density:.4%} of {self.numel:,} entries active" if self.started else "not yet sparse"
        head = f"{self.method.name}: {state}, step {self.step:,}, {self.updates:,} updates"
        storages = self.storages
        kinds = [(w.shape, w.topology.unit, storages[w.name]) for w in self.weights]
        rows = [
            _row(name, [self.weights[i] for i in at], storages)
            for name, at in folded([w.name for w in self.weights], kinds).items()
        ]
        left = [(e.shape, e.reason) for e in self.excluded]
        for name, at in folded([e.name for e in self.excluded], left).items():
            first = self.excluded[at[0]]
            numel = sum(self.excluded[i].numel for i in at)
            rows.append([name, _times(len(at), first.shape), "1", f"{numel:,}", f"dense: {first.reason}", ""])
        heads = ["layer", "shape", "density", "active", "storage", "explored"]
        return "\n".join([head, table(heads, rows), *self._sums()])

    def _sums(self) -> list[str]:
        """What is sparse and what is dense in all, where something stays dense."""
        reasons: dict[str, int] = {}
        for e in self.excluded:
            reasons[e.reason] = reasons.get(e.reason, 0) + e.numel
        if not reasons:
            return []
        dense = ", ".join(f"{numel:,} {reason}" for reason, numel in reasons.items())
        return [f"sparse: {self.nnz:,} of {self.numel:,} entries; dense: {sum(reasons.values()):,} ({dense})"]


def _row(name: str, weights: Sequence[SparseWeight], storages: Mapping[str, Storage]) -> list[str]:
    """The line of a weight, or of some that are alike."""
    first = weights[0].topology
    densities = sorted(w.topology.density for w in weights)
    ends = dict.fromkeys(f"{density:.4f}" for density in (densities[0], densities[-1]))
    shape = _times(len(weights), first.shape) + ("" if first.is_unstructured else f" in {by(first.unit)}")
    known = [w for w in weights if EXPLORED.known(w)]
    numel = sum(w.topology.numel for w in known)
    rate = f"{sum(explored_entries(w) for w in known) / max(1, numel):.3f}" if known else ""
    active = f"{sum(w.topology.nnz for w in weights):,}"
    return [name, shape, "-".join(ends), active, storages[weights[0].name], rate]


def _times(number: int, shape: Sequence[int]) -> str:
    return by(shape) if number == 1 else f"{number} of {by(shape)}"


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


class _Told:
    """A hook of a model that tells its stepper of loaded weights; of a copied model it does nothing."""

    def __init__(self, stepper: Stepper | None = None) -> None:
        self._stepper = (lambda: None) if stepper is None else weakref.ref(stepper)

    def __call__(self, model: nn.Module, incompatible: Any) -> None:
        stepper = self._stepper()
        if stepper is not None:
            stepper.weights_loaded = True

    def __reduce__(self) -> tuple[type[_Told], tuple[()]]:
        return _Told, ()
