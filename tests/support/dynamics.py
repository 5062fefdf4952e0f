"""Drop, grow and redistribute in plain NumPy, by the words of the recipes' options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from support.paper import (
    Array,
    Arrays,
    History,
    Options,
    Program,
    Train,
    annealed,
    counts_of,
    floor,
    history,
    only,
    regular,
    share_out,
    start,
    stream,
    top,
)

PLAIN: Options = {"drop": "lowest", "redistribute": None, "decay": None, "structure": None}
"""What recipes do that say nothing else."""


@dataclass
class Watch:
    """What is watched at every step: running means of gradients, and which positions were ever active."""

    decay: float | None = None
    """None means 0.9."""
    ema: Arrays = field(default_factory=dict)
    fired: Arrays = field(default_factory=dict)

    def __call__(self, run: Program, g: Arrays) -> None:
        decay = 0.9 if self.decay is None else self.decay
        for n in run.sparse:
            self.ema[n] = decay * self.ema.get(n, np.zeros_like(g[n])) + (1 - decay) * g[n]
            self.fired[n] = self.fired.get(n, np.zeros_like(run.mask[n])) | run.mask[n]


# Drops


def asked(run: Program, n: str, fraction: float, policy: str) -> int:
    """floor(fraction n); where regrowth is forbidden, no more than can grow elsewhere."""
    active = int(run.mask[n].sum())
    count = floor(fraction * active)
    return min(count, run.mask[n].size - active) if policy == "forbid" else count


def magnitudes(run: Program) -> Arrays:
    return {n: run.pooled(n, np.abs(run.w[n])) for n in run.sparse}


def taylor(run: Program, g: Arrays) -> Arrays:
    return {n: run.pooled(n, (run.w[n] * g[n] * run.wide(n)) ** 2) for n in run.sparse}


def without_lowest(run: Program, score: Arrays, fraction: float, policy: str) -> Arrays:
    """What stays when each weight loses its lowest scores."""
    stays = {n: int(run.mask[n].sum()) - asked(run, n, fraction, policy) for n in run.sparse}
    return {n: only(run, n, top(score[n], stays[n], run.active(n))) for n in run.sparse}


def without_lowest_of_each_sign(run: Program, fraction: float) -> Arrays:
    def stays(n: str) -> Array:
        active = run.active(n)
        signs = (active[run.w[n][active] > 0], active[run.w[n][active] < 0])
        return np.concatenate(
            [top(np.abs(run.w[n]), at.size - int(np.ceil(fraction * at.size - 1e-9)), at) for at in signs]
        )

    return {n: only(run, n, stays(n)) for n in run.sparse}


def without_lowest_of_all(run: Program, fraction: float, policy: str) -> Arrays:
    """One ranking of all magnitudes, in which each weight keeps its largest."""
    score = magnitudes(run)
    order = sorted((-score[n][i], place, i) for place, n in enumerate(run.sparse) for i in run.active(n))
    stays = {min(entry for entry in order if entry[1] == place) for place in range(len(run.sparse))}
    rest = [entry for entry in order if entry not in stays]
    gone = sum(asked(run, n, fraction, policy) for n in run.sparse)
    stays |= set(rest[: len(rest) - gone])
    return {n: only(run, n, np.array([i for _, p, i in stays if p == place])) for place, n in enumerate(run.sparse)}


DROPS: dict[str, Callable[[Program, Arrays, float, str], Arrays]] = {
    "lowest": lambda run, g, fraction, policy: without_lowest(run, magnitudes(run), fraction, policy),
    "per_sign": lambda run, g, fraction, policy: without_lowest_of_each_sign(run, fraction),
    "taylor": lambda run, g, fraction, policy: without_lowest(run, taylor(run, g), fraction, policy),
    "global": lambda run, g, fraction, policy: without_lowest_of_all(run, fraction, policy),
}
"""(program, gradients, fraction, what becomes of what is dropped and grown at once) -> what stays."""


# Growths

Pick = Callable[[str, Array, int], Array]
"""(weight, candidates, count) -> the candidates that grow."""


def at_random(run: Program) -> Pick:
    return lambda n, free, count: free[stream(run, n).subset(free.size, count)]


def highest(run: Program, field: Arrays) -> Pick:
    return lambda n, free, count: top(run.pooled(n, np.abs(field[n])), count, free)


def unexplored_first(run: Program, fired: Arrays) -> Pick:
    def pick(n: str, free: Array, count: int) -> Array:
        draws, new, old = stream(run, n), free[~fired[n][free]], free[fired[n][free]]
        if count <= new.size:
            return new[draws.subset(new.size, count)]
        draws.subset(new.size, new.size)
        return np.concatenate([new, old[draws.subset(old.size, count - new.size)]])

    return pick


def two_fifths(first: Pick, then: Pick) -> Pick:
    def pick(n: str, free: Array, count: int) -> Array:
        some = first(n, free, floor(0.4 * count))
        return np.concatenate([some, then(n, np.setdiff1d(free, some), count - some.size)])

    return pick


def per_neuron(run: Program, field: Arrays) -> Pick:
    """Largest remainders of the neurons' mean gradients, those that are full out of the game."""

    def pick(n: str, free: Array, count: int) -> Array:
        size, neurons = np.abs(field[n]), run.shapes[n][0]
        if count == free.size:
            return free
        of = np.arange(size.size) // (size.size // neurons)
        room = np.bincount(of[free], minlength=neurons)
        quota, left, open_ = np.zeros(neurons), float(count), np.ones(neurons, bool)
        mean = np.bincount(of, size) / (size.size // neurons)
        while True:
            exact = np.where(open_, left * mean / mean[open_].sum(), 0)
            full = open_ & (exact >= room)
            if not full.any():
                quota[open_] = exact[open_]
                break
            quota[full], left, open_ = room[full], left - room[full].sum(), open_ & ~full
        whole = np.floor(quota + 1e-9).astype(int)
        for i in np.argsort(whole - quota, kind="stable")[: count - whole.sum()]:
            whole[i] += 1
        return np.concatenate([top(size, whole[i], free[of[free] == i]) for i in range(neurons)])

    return pick


GROWTHS: dict[str, Callable[[Program, Arrays, Watch], Pick]] = {
    "random": lambda run, g, watch: at_random(run),
    "gradient": lambda run, g, watch: highest(run, g),
    "momentum": lambda run, g, watch: highest(run, watch.ema),
    "unexplored_first": lambda run, g, watch: unexplored_first(run, watch.fired),
    "mixed": lambda run, g, watch: two_fifths(highest(run, g), unexplored_first(run, watch.fired)),
    "per_neuron": lambda run, g, watch: per_neuron(run, g),
}


# Counts

STATISTICS: dict[str, Callable[[Program, Watch, str, Array], float]] = {
    "momentum": lambda run, watch, n, kept: float(np.abs(watch.ema[n][run.wide(n)]).mean()),
    "magnitude": lambda run, watch, n, kept: float(np.abs(run.w[n][run.wide(n)]).mean()),
    "nonzeros": lambda run, watch, n, kept: float(np.count_nonzero(run.w[n][run.wide(n)])),
    "survivors": lambda run, watch, n, kept: float(kept.sum()),
}
"""A weight's share of what is redistributed, before anything changes."""


def free(run: Program, n: str, kept: Array, policy: str) -> Array:
    """Where entries may grow: outside what is kept, or outside what was active where regrowth is forbidden."""
    return np.flatnonzero(~(run.mask[n] if policy == "forbid" else kept))


def counts_to_grow(run: Program, kept: Arrays, redistribute: str | None, policy: str, watch: Watch) -> list[int]:
    """As many as each weight lost, or each weight's share of all."""
    lost = [int(run.mask[n].sum() - kept[n].sum()) for n in run.sparse]
    if redistribute is None or not sum(lost):
        return lost
    shares = [STATISTICS[redistribute](run, watch, n, kept[n]) for n in run.sparse]
    return share_out(shares, sum(lost), [free(run, n, kept[n], policy).size for n in run.sparse])


# Updates


def place(run: Program, kept: Arrays, policy: str, counts: Sequence[int], pick: Pick) -> None:
    """Grow so many in each weight."""
    for n, count in zip(run.sparse, counts, strict=True):
        run.change(n, kept[n], only(run, n, pick(n, free(run, n, kept[n], policy), count)))


def grow(run: Program, g: Arrays, kept: Arrays, o: Options, watch: Watch) -> None:
    """As many entries grow as are dropped."""
    policy = o["regrow_dropped"]
    counts = counts_to_grow(run, kept, o["redistribute"], policy, watch)
    place(run, kept, policy, counts, GROWTHS[o["grow"]](run, g, watch))


def drop_and_grow(o: Options, watch: Watch) -> Train:
    """The update that a recipe's options say."""

    def update(run: Program, g: Arrays) -> None:
        kept = DROPS[o["drop"]](run, g, annealed(o, run.step), o["regrow_dropped"])
        grow(run, g, kept, o, watch)

    return update


def dynamic_run(o: Options, kind: str, seed: int) -> History:
    """A random start, then drop and grow at every interval."""
    run = start(kind, seed, lambda run: counts_of(run, o), o["regrow_dropped"], o["structure"])
    watch = Watch(o["decay"])
    return history(run, kind, lambda step: regular(o, step), drop_and_grow(o, watch), o["timing"], watch)
