"""Lottery tickets: train, prune what is trained, go back to early values, train again; and the controls.

Source: Frankle and Carbin 2019, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks, section 2;
rewinding to a later step than the first after Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket
Hypothesis, section 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from regrow.core.checks import require_density
from regrow.core.draws import Stream
from regrow.core.method import Allocation, Score
from regrow.core.topology import Topology
from regrow.engine.meta import initializer
from regrow.engine.sparsifier import Sparsifier
from regrow.nn import SparseModule
from regrow.parts.allocation import globally
from regrow.parts.drops import keep_highest
from regrow.parts.scores import magnitude, unit_scores
from regrow.tickets.snapshot import Snapshot, Stateful
from regrow.tickets.ticket import parameters_of, require_topologies, rewire, topology_entries

Part = Literal["optimizer", "schedule", "step", "buffers", "dense"]
"""What `rewind` may leave as it is."""


def lottery(
    sparsifier: Sparsifier,
    train: Callable[[int, int], object],
    *others: Stateful,
    density: float,
    rounds: int,
    steps: int,
    rewind_to: int = 0,
    score: Score = magnitude,
    allocate: Allocation = globally,
    keep: Collection[Part] = (),
) -> dict[str, Topology]:
    """Iterative magnitude pruning: `rounds` times train, prune and rewind, then train the ticket.

    Args:
        sparsifier: before its first step, of a method that leaves topologies alone, as `methods.dense()`.
        train: called with the first and the last optimizer step to take, both included; the first of all is 1.
        others: learning-rate schedulers and the like, which are rewound too.
        density: of the ticket.
        rounds: how often is pruned, each time to the same share of what is left.
        steps: optimizer steps of each training.
        rewind_to: the step to whose values each round goes back; 0 is before the first.
        score: what is kept: `magnitude` of the trained values.
        allocate: how the entries are shared among the weights: `globally`, or `uniform` for the same in each layer.
        keep: parts that `rewind` leaves as they are.

    Returns:
        The topologies of the ticket, which the model then has, trained.

    Raises:
        ValueError: for numbers that contradict each other, or a sparsifier that has taken steps.

    Source: Frankle and Carbin 2019, section 2, iterative pruning strategy 1; Frankle et al. 2020, algorithm 2.

    Examples:
        >>> import regrow
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = regrow.sparsify(model, optimizer, regrow.methods.dense())
        >>> def train(first, last):
        ...     for step in range(first, last + 1):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(1, 20)).square().sum().backward()
        ...         optimizer.step()
        >>> ticket = lottery(sparsifier, train, density=0.25, rounds=2, steps=5, rewind_to=1)
        >>> ticket["weight"].nnz, int((model.weight != 0).sum())
        (50, 50)
    """
    if not 0 <= rewind_to < steps:
        raise ValueError(f"lottery: rewind_to must lie in [0, steps), got {rewind_to:,} of {steps:,} steps")
    if sparsifier.step:
        raise ValueError(f"lottery: it begins before the first step, and {sparsifier.step:,} are taken: start anew")
    densities = round_densities(density, rounds)
    _total(sparsifier, density)
    if rewind_to:
        train(1, rewind_to)
    origin = Snapshot.take(sparsifier, *others)
    for of_round in densities:
        train(rewind_to + 1, steps)
        rewind(sparsifier, origin, winning(sparsifier, of_round, score, allocate), *others, keep=keep)
    train(rewind_to + 1, steps)
    return sparsifier.topologies


def round_densities(density: float, rounds: int) -> list[float]:
    """The density after each round: density^(round / rounds), the last exactly `density`.

    Examples:
        >>> round_densities(0.125, 3)
        [0.5, 0.25, 0.125]
    """
    require_density("lottery", density)
    if rounds < 1:
        raise ValueError(f"lottery: rounds must be at least 1, got {rounds}")
    return [*(math.exp(math.log(density) * i / rounds) for i in range(1, rounds)), density]


def winning(
    sparsifier: Sparsifier, density: float, score: Score = magnitude, allocate: Allocation = globally
) -> dict[str, Topology]:
    """What of the trained model is kept: its active entries of highest `score`, exactly as many as `density` says.

    Nothing is changed.

    Raises:
        ValueError: when the model has fewer active entries than that, or a score is NaN.
    """
    total, weights = _total(sparsifier, density), sparsifier.weights
    with torch.no_grad():
        scores = [unit_scores(w, score) for w in weights]
        counts = allocate(weights, scores, total)
        return {w.name: keep_highest(w, s, n) for w, s, n in zip(weights, scores, counts, strict=True)}


def _total(sparsifier: Sparsifier, density: float) -> int:
    require_density("lottery", density)
    weights = sparsifier.weights
    weights.require(density)
    total = weights.total(density)
    if total > weights.nnz:
        raise ValueError(
            f"lottery: density {density:g} makes {total:,} active entries, and the model has {weights.nnz:,} left: ask "
            "for less, or begin denser"
        )
    return total


def rewind(
    sparsifier: Sparsifier,
    snapshot: Snapshot,
    topologies: Mapping[str, Topology],
    *others: Stateful,
    keep: Collection[Part] = (),
) -> None:
    """Go back to a snapshot, with `topologies` active only: all else of the weights is zero.

    Args:
        sparsifier: of the run.
        snapshot: whose values, optimizer state, learning rates and step counts return.
        topologies: one for each weight.
        others: as many as the snapshot was taken with.
        keep: what stays as it is instead. "optimizer": momentum and second moments of what is active. "schedule":
            learning rates and the other options of the optimizers, and `others`. "step": the sparsifier's steps, and
            what its method observes. "buffers": BatchNorm's statistics and other buffers. "dense": the parameters that
            are not sparsified, as biases and norms.

    Raises:
        ValueError: for a part that is none, or what does not fit together; nothing is changed then.
    """
    if isinstance(keep, str) or set(keep) - set(get_args(Part)):
        raise ValueError(f"lottery: keep is a tuple of some of {', '.join(get_args(Part))}, got {keep!r}")
    require_topologies("lottery", sparsifier, topologies)
    if "schedule" in keep:
        snapshot, others = replace(snapshot, others=()), ()
    snapshot.require_same(sparsifier, others)
    with torch.no_grad():
        if "optimizer" in keep:
            rewire(sparsifier, topologies)
        now = Snapshot.take(sparsifier) if keep else snapshot
        snapshot.restore(sparsifier, *others)
        rewire(sparsifier, topologies)
        _bring_back(sparsifier, now, keep)


def _bring_back(sparsifier: Sparsifier, now: Snapshot, keep: Collection[Part]) -> None:
    """Make some parts what they are in `now`."""
    model, tensors = sparsifier.model, sparsifier.model.state_dict()
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} - topology_entries(model)
    dense = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in sparsifier.names}
    for part, names in (("buffers", buffers), ("dense", dense)):
        for name in names & tensors.keys() if part in keep else ():
            tensors[name].copy_(now.model[name])
    fields = [f for part, f in (("optimizer", "state"), ("schedule", "param_groups")) if part in keep]
    if fields:
        for optimizer, state in zip(sparsifier.optimizers, now.optimizers, strict=True):
            mine = copy.deepcopy({field: state[field] for field in fields})
            optimizer.load_state_dict({**optimizer.state_dict(), **mine})
    if "step" in keep:
        clock = {key: now.sparsifier[key] for key in ("step", "updates", "state")}
        sparsifier.load_state_dict({**sparsifier.state_dict(), **clock})


def shuffled(topologies: Mapping[str, Topology], seed: int) -> dict[str, Topology]:
    """As many entries in each weight, at random positions: the control that keeps nothing but the counts.

    Examples:
        >>> shuffled({"fc": Topology((2, 4), torch.tensor([0, 1, 2]))}, seed=0)["fc"].positions.tolist()
        [1, 2, 4]
    """
    return {
        name: t
        if t.is_dense
        else t.at(torch.from_numpy(Stream(seed, f"shuffled {name}", 0).subset(t.places, t.active)))
        for name, t in topologies.items()
    }


def reinitialized(sparsifier: Sparsifier, seed: int) -> None:
    """Draw every value of the model anew, in place, as its modules do: the control that keeps the topology only.

    Biases, norms and running statistics begin anew too, and the optimizers forget their state. Torch's global random
    state is left alone. Modules in compressed storage draw active values only: other numbers of the same distribution.

    Args:
        sparsifier: of the run.
        seed: of the values.

    Raises:
        ValueError: for a module with parameters and no `reset_parameters`; nothing is changed then.
    """
    modules = [(path, m) for path, m in reversed(list(sparsifier.model.named_modules()))]
    for path, module in modules:
        _require_reset(path, module)
    with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        # Children first: what holds them may have the last word on them.
        for path, module in modules:
            if isinstance(module, SparseModule):
                own = [name for name, _ in module.named_parameters(recurse=False)]
                module.initialize({name: Stream(seed, f"reinitialized {path}.{name}", 0) for name in own})
            elif (draw := initializer(module)) is not None:
                draw()
        for parameter, weights in parameters_of(sparsifier):
            values = [w.values() for w in weights]
            parameter.zero_()
            for weight, value in zip(weights, values, strict=True):
                weight.set_values(value)
        for optimizer in sparsifier.optimizers:
            optimizer.state.clear()


def _require_reset(path: str, module: nn.Module) -> None:
    name = path or type(module).__name__
    own = [n for n, _ in module.named_parameters(recurse=False)]
    if own and not isinstance(module, SparseModule) and initializer(module) is None:
        raise ValueError(
            f"lottery: {name} has {', '.join(own)} and no reset_parameters to draw them anew: give its class one"
        )
    inner = [m for m in module.modules() if isinstance(m, SparseModule)]
    if inner and not isinstance(module, SparseModule) and initializer(module) is not None:
        raise ValueError(
            f"lottery: {name} initializes the modules it holds by itself, of which {len(inner)} are compressed: use "
            'storage="masked" to draw its values anew'
        )
