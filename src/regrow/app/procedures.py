"""What goes on around a training run: Sup-tickets' cycles, a lottery's rounds, where values come from, or nothing.

A procedure says how many steps a run has, what the method becomes, what the learning rate is, what happens after a
step, and which model is reported in the end; the loop knows no particular one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from regrow.core.method import Method
from regrow.engine.sparsifier import Sparsifier
from regrow.parts.allocation import globally
from regrow.parts.drops import share
from regrow.tickets import (
    Plan,
    Snapshot,
    Superposition,
    Ticket,
    ensemble,
    layer_preserving,
    plan,
    reestimate_batchnorm,
    reexploring,
    reinitialized,
    rewind,
    round_densities,
    shuffled,
    triangular,
    winning,
    without_updates_from,
)
from regrow.tickets.superpose import Average


class Judge(Protocol):
    """Reads the test set."""

    def probabilities(self) -> Tensor:
        """What the model as it is makes of the test set, (n, classes)."""
        ...

    def accuracy(self, probabilities: Tensor) -> float:
        """The share of the test set that `probabilities` (n, classes) get right."""
        ...


@dataclass(frozen=True)
class Around:
    """Options that go around any method, as `around` checks them."""

    start: str
    start_batches: int | None
    superpose: Literal["none", "caa", "cima"]
    cima_factor: float
    cycle_share: float
    cycles: int
    lr_min: float
    lr_max: float
    re_explore: float
    updates_in_cycles: bool
    superpose_allocate: str
    update_bn: bool
    ensemble: bool


def around(  # noqa: PLR0913 - each is an option of the command line
    *,
    start: Literal[
        "method",
        "file",
        "prune_uniform",
        "prune_global",
        "prune_and_grow_uniform",
        "prune_and_grow_global",
        "prune_structured",
        "prune_and_grow_structured",
    ] = "method",
    start_batches: int | None = None,
    superpose: Literal["none", "caa", "cima"] = "none",
    cima_factor: float = 0.5,
    cycle_share: float = 0.2,
    cycles: int = 4,
    lr_min: float = 0.001,
    lr_max: float = 0.005,
    re_explore: float = 0.0,
    updates_in_cycles: bool = False,
    superpose_allocate: Literal["globally", "layer_preserving"] = "globally",
    update_bn: bool = True,
    ensemble: bool = False,
) -> Around:
    """Options that go around any method.

    Args:
        start: the first topologies: the "method"'s own, those of the "file" given as --weights, or made by pruning the
            values that the model has (with --weights, those of a trained model): over the whole model or layer by
            layer, to whole outputs with "structured", and with "grow" regrown in part by the gradient.
        start_batches: training batches from which a start that reads gradients takes their mean; default the first
            step's for those that need one gradient, 10 for those that need several.
        superpose: Sup-tickets: collect a ticket after pretraining and after each cycle, and report their mean ("caa")
            or moving average ("cima"), pruned back to the density.
        cima_factor: weight of the newest ticket in the moving average, in (0, 1).
        cycle_share: share of the steps that the cycles take, at the end of the run.
        cycles: how many cycles there are.
        lr_min: learning rate at both ends of a cycle, where tickets are collected.
        lr_max: learning rate in the middle of a cycle.
        re_explore: share of active entries dropped and grown anew by gradient when a cycle begins; 0 for none.
        updates_in_cycles: whether the method's own updates go on in the cycles.
        superpose_allocate: prune the mean back over the whole model, or to the count of each layer.
        update_bn: estimate BatchNorm statistics of the mean anew from the training set.
        ensemble: also report the mean prediction of all tickets.

    Source: Yin et al. 2022, Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network
    Training, Algorithm 1. The published code swaps the two learning rates' names and prunes in between; see the docs.
    """
    given = locals()
    used = [name for name in _SUPERPOSING if given[name] != _default(name)]
    if superpose == "none" and used:
        raise ValueError(f"{used[0]} is of superposing, which is off: give superpose caa or cima, or leave it out")
    if superpose == "caa" and cima_factor != _default("cima_factor"):
        raise ValueError(f"cima_factor is of the moving average, and superpose is caa: leave out {cima_factor:g}")
    if not 0 < cima_factor < 1:
        raise ValueError(f"cima_factor must lie in (0, 1), got {cima_factor:g}")
    if not 0 < cycle_share < 1:
        raise ValueError(f"cycle_share must lie in (0, 1), got {cycle_share:g}")
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    if not 0 <= lr_min <= lr_max:
        raise ValueError(f"lr_min must lie between 0 and lr_max, got {lr_min:g} and {lr_max:g}")
    if not 0 <= re_explore <= 1:
        raise ValueError(f"re_explore must lie in [0, 1], got {re_explore:g}")
    if start_batches is not None and start_batches < 1:
        raise ValueError(f"start_batches must be at least 1, got {start_batches}")
    return Around(**given)


_SUPERPOSING = (
    "cima_factor",
    "cycle_share",
    "cycles",
    "lr_min",
    "lr_max",
    "re_explore",
    "updates_in_cycles",
    "superpose_allocate",
    "update_bn",
    "ensemble",
)


def _default(name: str) -> Any:
    return (around.__kwdefaults__ or {})[name]


@dataclass(frozen=True)
class Lottery:
    """The options of a lottery, as `regrow.app.vocabulary.lottery` has checked them."""

    density: float
    rounds: int = 5
    rewind_to: int = 0
    control: str = "none"


class Procedure(Protocol):
    """What the loop asks."""

    steps: int
    """Optimizer steps of the whole run."""

    @property
    def span(self) -> int:
        """Steps over which the run's learning-rate schedule extends."""
        ...

    @property
    def horizon(self) -> int:
        """Steps of which the method's updates take a share by default."""
        ...

    def method(self, method: Method) -> Method:
        """What the method becomes."""
        ...

    def lr(self, step: int) -> float | None:
        """The learning rate of optimizer step `step` (the first is 1), or None where the run's schedule holds."""
        ...

    def place(self, done: int) -> int:
        """How many steps lie before the next one in its training, after `done` steps: fewer, where it was rewound."""
        ...

    def after(self, done: int, sparsifier: Sparsifier, scheduler: LRScheduler) -> None:
        """Act before the first step and after each: `done` steps are over."""
        ...

    def conclude(self, sparsifier: Sparsifier, images: Iterable[Tensor], judge: Judge) -> dict[str, float]:
        """Leave the model that is reported, given batches of training images; the accuracy of others by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


@dataclass
class Plain:
    """Nothing goes on around the run."""

    steps: int

    @property
    def span(self) -> int:
        """The whole run."""
        return self.steps

    @property
    def horizon(self) -> int:
        """That of the schedule."""
        return self.span

    def method(self, method: Method) -> Method:
        """As it is."""
        return method

    def lr(self, step: int) -> float | None:
        """As the run has it."""
        return None

    def place(self, done: int) -> int:
        """Never rewound."""
        return done

    def after(self, done: int, sparsifier: Sparsifier, scheduler: LRScheduler) -> None:
        """Nothing."""

    def conclude(self, sparsifier: Sparsifier, images: Iterable[Tensor], judge: Judge) -> dict[str, float]:
        """The model of the last step, and no other."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class Superposing(Plain):
    """Sup-tickets: the last part of the run is cycles, after each of which a ticket is collected."""

    def __init__(self, steps: int, options: Around, average: Average) -> None:
        super().__init__(steps)
        self.options = options
        room = share(options.cycle_share, steps)
        if room < options.cycles:
            raise ValueError(
                f"{options.cycles} cycles do not fit into a share of {options.cycle_share:g} of {steps:,} steps, which "
                f"is {room}: take fewer cycles or a larger cycle_share"
            )
        self.plan: Plan = plan(steps, options.cycle_share, room // options.cycles)
        self.rate = triangular(options.lr_min, options.lr_max, self.plan.cycle, self.plan.pretrain)
        self.mean = Superposition(average, options.cima_factor if average == "cima" else None)
        self.tickets: list[Ticket] = []

    @property
    def span(self) -> int:
        """The steps before the first cycle."""
        return self.plan.pretrain

    @property
    def horizon(self) -> int:
        """The same, or the whole run where updates go on in the cycles."""
        return self.steps if self.options.updates_in_cycles else self.plan.pretrain

    def method(self, method: Method) -> Method:
        """Without updates in the cycles, or with one large drop and growth where each begins.

        Raises:
            ValueError: for a method whose weights are computed from others, which a mean of weights says nothing of.
        """
        if method.latent is not None:
            raise ValueError(
                f"{method.name} computes its weights from latent values, which superposed weights cannot be turned "
                "back into: leave out superpose"
            )
        if not self.options.updates_in_cycles:
            method = without_updates_from(method, self.plan.pretrain + 1)
        return reexploring(method, self.plan, self.options.re_explore) if self.options.re_explore else method

    def lr(self, step: int) -> float | None:
        """Triangular within cycles."""
        return None if step <= self.plan.pretrain else self.rate(step)

    def after(self, done: int, sparsifier: Sparsifier, scheduler: LRScheduler) -> None:
        """Collect a ticket where one is due."""
        if self.plan.collects_at(done):
            ticket = Ticket.of(sparsifier)
            self.mean.add(ticket)
            if self.options.ensemble:
                self.tickets.append(ticket)

    def conclude(self, sparsifier: Sparsifier, images: Iterable[Tensor], judge: Judge) -> dict[str, float]:
        """Leave the superposed model; the accuracies of the last ticket alone and of the ensemble."""
        also = {"last ticket": judge.accuracy(judge.probabilities())}
        if self.options.ensemble:
            also["ensemble"] = judge.accuracy(ensemble(sparsifier, self.tickets, judge.probabilities))
        allocate = {"globally": globally, "layer_preserving": layer_preserving}[self.options.superpose_allocate]
        self.mean.ticket(sparsifier.density, allocate).install(sparsifier)
        if self.options.update_bn:
            reestimate_batchnorm(sparsifier.model, images)
        return also

    def state_dict(self) -> dict[str, Any]:
        """The mean so far, and the tickets where they are kept."""
        return {"mean": self.mean.state_dict(), "tickets": [t.state_dict() for t in self.tickets]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.mean.load_state_dict(state["mean"])
        self.tickets = [Ticket.from_state_dict(t) for t in state["tickets"]]


class Rounds(Plain):
    """A lottery: as many trainings as there are rounds and one, each but the first from the rewound ticket."""

    def __init__(self, each: int, options: Lottery, seed: int) -> None:
        if options.rewind_to >= each:
            raise ValueError(
                f"lottery: rewind_to must lie before the end of a training, got {options.rewind_to:,} of {each:,} steps"
            )
        super().__init__(each + options.rounds * (each - options.rewind_to))
        self.each = each
        self.options = options
        self.seed = seed
        self.densities = round_densities(options.density, options.rounds)
        self.origin: Snapshot | None = None
        self.round = 0

    @property
    def span(self) -> int:
        """One training."""
        return self.each

    def _again(self, done: int) -> int:
        """Steps since the last rewinding, after the first training."""
        return (done - self.each) % (self.each - self.options.rewind_to)

    def place(self, done: int) -> int:
        """Steps since the origin of the round, counted on from there."""
        return done if done < self.each else self.options.rewind_to + self._again(done)

    def after(self, done: int, sparsifier: Sparsifier, scheduler: LRScheduler) -> None:
        """Remember the origin; at the end of a training prune, and go back to it."""
        if done == self.options.rewind_to:
            self.origin = Snapshot.take(sparsifier, scheduler)
        if done >= self.each and self._again(done) == 0 and self.round < self.options.rounds:
            assert self.origin is not None
            self.round += 1
            topologies = winning(sparsifier, self.densities[self.round - 1])
            last = self.round == self.options.rounds
            if last and self.options.control == "shuffled":
                topologies = shuffled(topologies, self.seed)
            rewind(sparsifier, self.origin, topologies, scheduler)
            if last and self.options.control == "reinitialized":
                reinitialized(sparsifier, self.seed + 1)

    def state_dict(self) -> dict[str, Any]:
        """The origin and the round."""
        return {"origin": None if self.origin is None else self.origin.state_dict(), "round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.origin = None if state["origin"] is None else Snapshot.from_state_dict(state["origin"])
        self.round = state["round"]


def procedure(method: str, options: Mapping[str, Any], outer: Around, steps: int, seed: int) -> Procedure:
    """The procedure that the options of a run ask for.

    Args:
        method: its name.
        options: its parsed options.
        outer: the options around it.
        steps: of a training.
        seed: of the run.

    Raises:
        ValueError: for two procedures at once, or lengths that do not fit together.
    """
    if method == "lottery":
        if outer.superpose != "none":
            raise ValueError(f"lottery goes around a training, and so does superpose {outer.superpose}: leave out one")
        return Rounds(steps, Lottery(**options), seed)
    return Plain(steps) if outer.superpose == "none" else Superposing(steps, outer, outer.superpose)
