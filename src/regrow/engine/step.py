"""The training step as a state machine: what a method does before and after the arithmetic of the optimizers.

Between two training steps `Stepper.open` is None. A step is opened by the first optimizer that begins to step, and
closed when every optimizer has stepped. Its kind is known beforehand:

    ordinary   the optimizers step, with gradients of active entries only
    start      the first topologies are made from this gradient; the optimizers do nothing this time
    instead    an update takes the place of the step; the optimizers do nothing this time
    after      gradients are set aside, the optimizers step, then the update follows

| from     | what happens                                          | does                              | to    |
| -------- | ----------------------------------------------------- | --------------------------------- | ----- |
| None     | an optimizer begins to step                           | `_open`                           | OPEN  |
| None     | the same, and what is due cannot be done or raises    | nothing is counted                | None  |
| OPEN     | another optimizer begins, no backward in between      | joins the step                    | OPEN  |
| OPEN     | an optimizer begins after a new backward              | `_lapse`, `_open`                 | OPEN  |
| OPEN     | an optimizer begins that stepped already              | `_lapse`, `_open`                 | OPEN  |
| OPEN     | the same, and it raised: the step comes again         | `_lapse`, `_open`                 | OPEN  |
| OPEN     | an optimizer begins inside the same backward          | joins, its own gradients are read | OPEN  |
| OPEN     | an optimizer has stepped, others have not             | gives back what was hidden        | OPEN  |
| OPEN     | the last optimizer has stepped                        | `_close`                          | None  |
| OPEN     | the same, and its update raises: the step counts      | `_close`                          | None  |
| OPEN     | the backward ends that the optimizers step in         | `_close`                          | None  |
| OPEN     | that backward broke off, and the next one comes       | `_lapse`, `_open`                 | OPEN  |
| any      | a step is skipped by a gradient scaler, or is nested  | nothing                           | same  |
| any      | an optimizer's state is loaded                        | it is projected at the next step  | same  |
| any      | the sparsifier's state is loaded                      | `resume`                          | None  |

A step with a closure, or inside a backward, has its gradients late: `_close` reads them. Where an update takes the
place of a step with a closure, the closure is called before the step is opened, and the optimizer gets its loss.
`_lapse` applies an update that was set aside for optimizers that never stepped. A step in which none finished does not
count, unless an update took its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.draws import Stream
from regrow.core.method import Method, Need, Probe
from regrow.core.topology import Topology
from regrow.core.weight import Weights
from regrow.engine.optimizers import StepArguments, closure_of, is_nested, skips_step, with_closure
from regrow.engine.probe import NoProbe
from regrow.parts.observers import mark_explored
from regrow.storage.stored import Draft, Stored

_log = logging.getLogger("regrow")

StepKind = Literal["ordinary", "start", "instead", "after"]
"""What a training step does to topologies, and when."""

OUTSIDE = -1
"""What stands for the number of a backward where none is under way."""


def plan(method: Method, started: bool, number: int) -> StepKind:
    """What training step `number` (the first is 1) does.

    Examples:
        >>> from regrow import methods
        >>> [plan(methods.rigl(0.1, until=350), True, number) for number in (99, 100)]
        ['ordinary', 'instead']
    """
    if not started:
        return "start"
    return method.timing if method.due(number) else "ordinary"


def reads_everywhere(method: Method, kind: StepKind) -> bool:
    """Whether a step of this kind reads the gradient at inactive positions."""
    return (
        kind == "start" or Need.EVERY_GRADIENT in method.needs or (kind != "ordinary" and Need.GRADIENT in method.needs)
    )


def weights_of(parameters: Sequence[Draft], outside: int) -> Weights:
    """The weights of all parameters, with the entries outside that count in the budget, all of them active."""
    return Weights(tuple(w for p in parameters for w in p.weights), outside, outside)


def draw_for(weights: Weights, seed: int, step: int) -> None:
    """Give each weight the draws of a step."""
    for weight in weights:
        weight.generator = Stream(seed, weight.name, step)


def begin(method: Method, weights: Weights, seed: int, probe: Probe | None = None) -> None:
    """Make the first topologies."""
    draw_for(weights, seed, 0)
    method.start.make(weights, probe or NoProbe())
    _note_explored(method, weights, None)


def _note_explored(method: Method, weights: Weights, before: Sequence[Topology] | None) -> None:
    if Need.EXPLORED in method.needs:
        for i, weight in enumerate(weights):
            mark_explored(weight, None if before is None else before[i])


@dataclass
class Step:
    """A training step that is open."""

    number: int
    kind: StepKind
    late: bool
    """Whether gradients come while the optimizers step: from a closure, or from the backward that they step in."""
    backward: int = OUTSIDE
    """Which backward the optimizers step in."""
    begun: set[int] = field(default_factory=set)
    """Optimizers that began to step, by id."""
    stepped: set[int] = field(default_factory=set)
    """Those of them that finished: the others are at work, or raised."""
    hidden: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Gradients that are hidden from the optimizers."""
    waits: bool = False
    """Whether gradients were set aside for an update that is still to come."""

    @property
    def replaces(self) -> bool:
        """Whether it takes the place of the optimizers' step."""
        return self.kind in ("start", "instead")


class Stepper:
    """Opens and closes the training steps of one run, from the hooks of its optimizers.

    Args:
        method: what is due when.
        parameters: as their storages hold them.
        outside: entries outside that count in the budget.
        optimizers: those that together hold the parameters.
        seed: of the draws.
        started: whether the first topologies are made.
        keeps: what lives as long as the optimizers' hooks do: a sparsifier that nobody else holds goes on working.
    """

    def __init__(
        self,
        method: Method,
        parameters: Sequence[Stored],
        outside: int,
        optimizers: Sequence[Optimizer],
        seed: int,
        started: bool,
        keeps: object = None,
    ) -> None:
        self.keeps = keeps
        self.optimizers = list(optimizers)
        self.seed = seed
        self.number = 0
        """Steps so far, updates that took the place of one included."""
        self.updates = 0
        """Topology updates so far."""
        self.started = started
        self.open: Step | None = None
        self.weights_loaded = False
        """Whether the model's weights were loaded and not looked at since."""
        self._outside = outside
        self._arrivals = 0
        """Backward passes that belong to steps so far."""
        self._loaded: set[int] = set()
        """Optimizers whose state was loaded and not projected since, by id."""
        self._handles: list[Any] = []
        self.take(method, parameters)
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
            self._handles.append(optimizer.register_load_state_dict_post_hook(self._noticed))

    def take(self, method: Method, parameters: Sequence[Stored]) -> None:
        """Go on with this method and these parameters."""
        self.method = method
        self.parameters = list(parameters)
        self.weights = weights_of(self.parameters, self._outside)
        self._watch()

    def remove(self) -> None:
        """Take all hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.keeps = None

    def resume(self, number: int, updates: int, started: bool, seed: int) -> None:
        """Go on between two steps where another run stopped; topologies and state are already those of that run."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.closed(complete=False)
                parameter.project(state=True)
        self.number, self.updates, self.started, self.seed = number, updates, started, seed
        self.open = None
        self.weights_loaded = False
        self._watch()

    def set_gradients_aside(self) -> None:
        """Leave gradients of active entries only, and keep what the coming step reads of the others."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.set_aside()

    # Transitions

    def _noticed(self, optimizer: Optimizer) -> None:
        # State may come from a dense run, and topologies are loaded after it.
        self._loaded.add(id(optimizer))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepArguments | None:
        if skips_step(optimizer) or is_nested(optimizer):
            return None
        closure = closure_of(optimizer, args, kwargs)
        backward = torch._C._current_graph_task_id()
        with torch.no_grad():
            step, given = self.open, None
            if step is None or not self._joins(step, optimizer, backward):
                if step is not None:
                    self._lapse(step)
                if closure is not None and self._replaces_next(backward):
                    given = self._evaluated(closure)
                step = self._open(optimizer, closure is not None and given is None, backward)
            elif backward != OUTSIDE:
                self._open_own(step, optimizer)
            elif closure is not None and step.replaces:
                given = self._evaluated(closure)
            step.begun.add(id(optimizer))
            if step.replaces:
                _hide(step, optimizer)
            else:
                for parameter in self._of(optimizer):
                    parameter.stepping(step.number)
        if closure is None:
            return None
        return with_closure(given or self._watched(closure), optimizer, args, kwargs)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if skips_step(optimizer) or is_nested(optimizer):
            return
        with torch.no_grad():
            step = self.open
            if step is not None:
                step.stepped.add(id(optimizer))
                _give_back(step, [p for g in optimizer.param_groups for p in g["params"]])
            for parameter in self._of(optimizer):
                parameter.stepped()
            self._arrivals = self._arrived()
            if step is not None and step.backward != OUTSIDE:
                # What the backward still brings belongs to this step, which ends with it.
                return
            if step is not None and len(step.stepped) == len(self.optimizers):
                self._close(step)
            else:
                self._watch()

    def _after_backward(self) -> None:
        """The backward that optimizers stepped in has ended."""
        step = self.open
        if step is not None and step.backward != OUTSIDE:
            with torch.no_grad():
                self._close(step)

    def _joins(self, step: Step, optimizer: Optimizer, backward: int) -> bool:
        """Whether the optimizer takes part in the open step."""
        if id(optimizer) in step.begun:
            return False
        return backward == step.backward if backward != OUTSIDE else self._arrived() == self._arrivals

    def _open(self, optimizer: Optimizer, has_closure: bool, backward: int) -> Step:
        number = self.number + 1
        step = Step(number, plan(self.method, self.started, number), has_closure or backward != OUTSIDE, backward)
        self._require_possible(step, has_closure)
        self._require_own_weights()
        draw_for(self.weights, self.seed, number)
        if backward != OUTSIDE:
            # Other weights are still to be read by the backward that is under way.
            self._open_own(step, optimizer)
            # Not when the last optimizer has stepped, since some may hold what this backward does not reach.
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        else:
            self._open_all(step)
        self._arrivals = self._arrived()
        self.open, self.number = step, number
        if not step.late:
            # Here and not only when it is closed, since an optimizer that raises never closes it; the step comes again.
            self._watch(again=step.kind)
        return step

    def _open_all(self, step: Step) -> None:
        for parameter in self.parameters:
            parameter.opened(id(parameter.optimizer) in self._loaded)
        self._loaded.clear()
        if not step.late:
            self._read(step)
        if step.kind == "start":
            begin(self.method, self.weights, self.seed)
            self.started = True
        elif step.kind == "instead":
            self._update(step.number)
        for parameter in self.parameters:
            parameter.mask()

    def _open_own(self, step: Step, optimizer: Optimizer) -> None:
        """Open the parameters of one optimizer: their gradients have arrived, those of others perhaps not."""
        loaded = id(optimizer) in self._loaded
        is_read = step.kind != "ordinary" or self.method.observe is not None
        for parameter in self._of(optimizer):
            parameter.opened(loaded)
            parameter.set_aside(lasting=is_read)
            if is_read:
                # Whoever steps inside a backward forgets the gradient at once, to save its memory.
                parameter.gradient.hold()
        self._loaded.discard(id(optimizer))

    def _lapse(self, step: Step) -> None:
        """End a step some of whose optimizers never stepped or raised; if none finished, it does not count."""
        _give_back(step, list(step.hidden))
        self.open = None
        comes_again = not step.stepped and not step.replaces
        if comes_again:
            self.number = step.number - 1
        if comes_again and self._arrived() == self._arrivals:
            # With the same gradient, of which only what is held knows the inactive entries.
            return
        try:
            if step.waits and not comes_again:
                self._update(step.number)
        finally:
            if step.waits or step.backward != OUTSIDE:
                for parameter in self.parameters:
                    parameter.closed(complete=False)

    def _close(self, step: Step) -> None:
        """End a step whose optimizers have all stepped, also where its update raises."""
        try:
            if step.late:
                self._read(step)
            if step.waits:
                self._update(step.number)
        finally:
            self.open = None
            for parameter in self.parameters:
                parameter.closed(complete=True)
                if step.kind != "ordinary":
                    parameter.mask()
            self._watch()

    # What transitions do

    def _require_possible(self, step: Step, has_closure: bool) -> None:
        """Raise ValueError for a step whose gradients come too late for what is due."""
        if not step.late:
            return
        where = "a step with a closure" if has_closure else "an optimizer that steps inside of the backward pass"
        if step.replaces:
            way_out = (
                'pass timing="after" to the method' if self.started else "give batches= and loss= to regrow.sparsify"
            )
            raise ValueError(
                f"{self.method.name} takes the place of optimizer step {step.number}, which {where} does not allow: "
                f"{way_out}"
            )
        if has_closure and self.method.latent is not None:
            raise ValueError(
                f"{self.method.name} puts latent values in the places of the weights while the optimizer steps, where "
                "a closure would compute with them: call loss.backward() before optimizer.step(), without a closure"
            )

    def _require_own_weights(self) -> None:
        """Look once at weights that were loaded: the first projection would zero what lies outside the topologies.

        Raises:
            RuntimeError: when they are sparse at other positions, so that they belong to another sparsifier's state.
        """
        if not self.weights_loaded:
            return
        strays = sum(p.strays() for p in self.parameters)
        masked = [p for p in self.parameters if p.strays()]
        zeros = sum(int((p.parameter.detach() == 0).sum()) for p in masked)
        inactive = sum(w.topology.numel - w.topology.nnz for p in masked for w in p.weights)
        # Dense weights have hardly a zero; those of a sparse run have as many as this one, or nearly.
        if strays and 2 * zeros > inactive:
            raise RuntimeError(
                f"the weights that were loaded are sparse, and {strays:,} of their values lie where this sparsifier "
                "has no connections: load its state too, with sparsifier.load_state_dict, before the next step"
            )
        if strays:
            _log.warning("%s values that were loaded lie outside the topologies and are zeroed", f"{strays:,}")
        self.weights_loaded = False

    def _read(self, step: Step) -> None:
        """Show gradients to the observer, and set them aside for an update."""
        observe = self.method.observe if self.started else None
        if step.kind == "ordinary" and observe is None:
            return
        for parameter in self.parameters:
            parameter.reading(update=step.kind != "ordinary")
        if observe is not None:
            for weight in self.weights:
                if weight.has_grad:
                    observe(weight)
        if step.kind in ("instead", "after"):
            step.waits = step.kind == "after"
            for parameter in self.parameters:
                parameter.set_aside(lasting=step.waits)

    def _update(self, number: int) -> None:
        """Apply the rules that are due at step `number`."""
        before = [w.topology for w in self.weights] if Need.EXPLORED in self.method.needs else None
        for rule in self.method.update:
            if rule.due(number):
                rule.apply(self.weights, number)
        self.updates += 1
        _note_explored(self.method, self.weights, before)

    def _watch(self, again: StepKind = "ordinary") -> None:
        """Tell storages whether the coming backward passes keep gradients at inactive positions.

        Args:
            again: the kind of a step that may come again.
        """
        coming = plan(self.method, self.started, self.number + 1)
        everywhere = any(reads_everywhere(self.method, kind) for kind in (coming, again))
        for parameter in self.parameters:
            parameter.watch(everywhere)

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure after which gradients are masked, and set aside where an update or the observer reads them."""

        def watched() -> Any:
            for parameter in self.parameters:
                parameter.closed(complete=False)
            loss = closure()
            self.set_gradients_aside()
            return loss

        return watched

    def _replaces_next(self, backward: int) -> bool:
        """Whether the next step's optimizers do nothing, so that a closure's gradients are for the method alone."""
        next_kind = plan(self.method, self.started, self.number + 1)
        return backward == OUTSIDE and next_kind in ("start", "instead") and self.method.latent is None

    def _evaluated(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Call a closure now, for its gradients; what stands for it in the optimizer's step gives the same loss."""
        for parameter in self.parameters:
            parameter.closed(complete=False)
        with torch.enable_grad():
            loss = closure()
        return lambda: loss

    def _of(self, optimizer: Optimizer) -> list[Stored]:
        return [p for p in self.parameters if p.optimizer is optimizer]

    def _arrived(self) -> int:
        return sum(p.gradient.arrivals for p in self.parameters)


def _hide(step: Step, optimizer: Optimizer) -> None:
    """Leave the optimizer nothing to do, so that parameters, state and step counts stay as they are."""
    for parameter in (p for g in optimizer.param_groups for p in g["params"]):
        if parameter.grad is not None:
            step.hidden[parameter] = parameter.grad
            parameter.grad = None


def _give_back(step: Step, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        hidden = step.hidden.pop(parameter, None)
        # A gradient that came since belongs to the next step.
        if hidden is not None and parameter.grad is None:
            parameter.grad = hidden
