"""Drop, grow and redistribute in plain NumPy, by the words of the recipes' options, and what the library calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regrow import parts
from regrow.core.method import Method
from regrow.methods import BY_NAME
from support.paper import Array, Arrays, History, Program, batches, share_out, top
from support.plain import FRACTIONS, WORDS, sgd_step, shared, start, stream, total_of

VALUES: dict[str, dict[Any, Any]] = {
    "anneal": dict(WORDS["anneal"]),
    "allocate": {name: getattr(parts, name) for name in ("uniform", "er", "erk", "globally", "layer_adaptive")},
    "init_allocate": dict(WORDS["init_allocate"]),
    "drop": {
        "lowest": parts.smallest,
        "per_sign": parts.lowest_per_sign,
        "taylor": parts.lowest(parts.taylor),
        "global": parts.lowest_globally(parts.magnitude),
    },
    "grow": WORDS["grow"] | {"gradient": parts.by_gradient, "momentum": parts.by_momentum},
    "redistribute": {
        "momentum": parts.mean_momentum,
        "magnitude": parts.mean_magnitude,
        "nonzeros": parts.nonzeros,
        "survivors": parts.survivors,
        None: None,
    },
}
"""What the words of an option mean to the library."""

PLAIN: dict[str, Any] = {"drop": "lowest", "redistribute": None, "decay": None}
"""What recipes do that say nothing else."""


def library(name: str, options: dict[str, Any]) -> Method:
    """The recipe with words as values, and densities by name as an explicit allocation."""
    given = {}
    for key, value in options.items():
        words = VALUES.get(key, {})
        given[key] = parts.explicit(value) if isinstance(value, dict) else words.get(value, value)
    return BY_NAME[name](**given)


@dataclass
class Watch:
    """What a run remembers: running means of the gradient, and which positions were ever active."""

    decay: float
    ema: Arrays = field(default_factory=dict)
    fired: Arrays = field(default_factory=dict)

    def see(self, run: Program, g: Arrays) -> None:
        for n in run.sparse:
            self.ema[n] = self.decay * self.ema.get(n, np.zeros_like(g[n])) + (1 - self.decay) * g[n]

    def mark(self, run: Program) -> None:
        for n in run.sparse:
            self.fired[n] = self.fired.get(n, np.zeros_like(run.mask[n])) | run.mask[n]


Update = Callable[[Program, Arrays, Watch], None]


def history(
    run: Program, kind: str, due: Callable[[int], bool], update: Update, timing: str, decay: float | None = None
) -> History:
    """Train with `update` at the steps that are due, instead of or after the optimizer's step."""
    watch = Watch(0.9 if decay is None else decay)
    watch.mark(run)
    masks = [dict(run.mask)]
    for batch in batches(kind, run.seed):
        run.step += 1
        g = run.gradients(batch)
        watch.see(run, g)
        if not (due(run.step) and timing == "instead"):
            sgd_step(run, g)
        if due(run.step):
            update(run, g, watch)
            watch.mark(run)
        masks.append(dict(run.mask))
    return History(masks, run.w, run.v)


def only(run: Program, n: str, positions: Array) -> Array:
    mask = np.zeros_like(run.mask[n])
    mask[positions] = True
    return mask


def asked(run: Program, n: str, fraction: float, policy: str) -> int:
    active = int(run.mask[n].sum())
    gone = int(np.floor(fraction * active + 1e-9))
    return min(gone, run.mask[n].size - active) if policy == "forbid" else gone


def kept(run: Program, word: str, fraction: float, policy: str, g: Arrays) -> Arrays:
    """What stays of each weight; with "forbid" no more goes than can grow elsewhere."""
    if word == "global":
        order = sorted((-abs(run.w[n][i]), place, i) for place, n in enumerate(run.sparse) for i in active(run, n))
        stays = {min(e for e in order if e[1] == place) for place in range(len(run.sparse))}
        rest = [e for e in order if e not in stays]
        gone = sum(asked(run, n, fraction, policy) for n in run.sparse)
        stays |= set(rest[: len(rest) - gone])
        return {n: only(run, n, [i for _, p, i in stays if p == place]) for place, n in enumerate(run.sparse)}
    return {n: only(run, n, kept_of(run, n, word, fraction, policy, g[n])) for n in run.sparse}


def active(run: Program, n: str) -> Array:
    return np.flatnonzero(run.mask[n])


def kept_of(run: Program, n: str, word: str, fraction: float, policy: str, g: Array) -> Array:
    at, w = active(run, n), run.w[n]
    if word == "per_sign":
        signs = (at[w[at] > 0], at[w[at] < 0])
        return np.concatenate([top(abs(w), s.size - int(np.ceil(fraction * s.size - 1e-9)), s) for s in signs])
    score = abs(w) if word == "lowest" else (w * g * run.mask[n]) ** 2
    return top(score, at.size - asked(run, n, fraction, policy), at)


def grown(run: Program, n: str, word: str, count: int, free: Array, g: Array, watch: Watch) -> Array:
    """The positions among `free` that grow."""
    fired, draws = watch.fired[n], stream(run, n)
    if word == "random":
        return free[draws.subset(free.size, count)]
    if word in ("gradient", "momentum"):
        return top(abs(g if word == "gradient" else watch.ema[n]), count, free)
    if word == "mixed":
        some = top(abs(g), int(np.floor(0.4 * count + 1e-9)), free)
        rest = np.setdiff1d(free, some)
        return np.concatenate([some, grown(run, n, "unexplored_first", count - some.size, rest, g, watch)])
    if word == "per_neuron":
        return per_neuron(abs(g), run.shapes[n][0], count, free)
    assert word == "unexplored_first"
    new, old = free[~fired[free]], free[fired[free]]
    if count <= new.size:
        return new[draws.subset(new.size, count)]
    draws.subset(new.size, new.size)
    return np.concatenate([new, old[draws.subset(old.size, count - new.size)]])


def per_neuron(g: Array, neurons: int, count: int, free: Array) -> Array:
    """Largest remainders of the neurons' mean gradients, those that are full out of the game."""
    if count == free.size:
        return free
    of = np.arange(g.size) // (g.size // neurons)
    room = np.bincount(of[free], minlength=neurons)
    quota, left, open_ = np.zeros(neurons), float(count), np.ones(neurons, bool)
    mean = np.bincount(of, g) / (g.size // neurons)
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
    return np.concatenate([top(g, whole[i], free[of[free] == i]) for i in range(neurons)])


def share(run: Program, n: str, word: str, stays: Array, watch: Watch) -> float:
    """A weight's share of what is redistributed, before anything changes."""
    here = run.mask[n]
    return {
        "momentum": lambda: float(abs(watch.ema[n][here]).mean()),
        "magnitude": lambda: float(abs(run.w[n][here]).mean()),
        "nonzeros": lambda: float(np.count_nonzero(run.w[n][here])),
        "survivors": lambda: float(stays.sum()),
    }[word]()


def regrow_entries(
    run: Program, stays: Arrays, grow: str, redistribute: str | None, policy: str, g: Arrays, watch: Watch
) -> None:
    """As many entries grow as were dropped, among what is outside of `stays`, or of all that was active ("forbid")."""
    free = {n: np.flatnonzero(~(run.mask[n] if policy == "forbid" else stays[n])) for n in run.sparse}
    counts = [int(run.mask[n].sum() - stays[n].sum()) for n in run.sparse]
    if redistribute is not None and sum(counts):
        shares = [share(run, n, redistribute, stays[n], watch) for n in run.sparse]
        counts = share_out(shares, sum(counts), [free[n].size for n in run.sparse])
    place(run, stays, free, counts, grow, g, watch)


def place(run: Program, stays: Arrays, free: Arrays, counts: Sequence[int], grow: str, g: Arrays, watch: Watch) -> None:
    chosen = {n: grown(run, n, grow, k, free[n], g[n], watch) for n, k in zip(run.sparse, counts, strict=True)}
    for n in run.sparse:
        run.change(n, stays[n], only(run, n, chosen[n]))


def annealed(run: Program, o: dict[str, Any]) -> float:
    begin = o["begin"] or 0
    progress = min(max(run.step - begin, 0) / (o["until"] - begin), 1)
    return FRACTIONS[o["anneal"]](o["fraction"], progress)


def drop_and_grow(o: dict[str, Any]) -> Update:
    """The update that a recipe's options say."""

    def update(run: Program, g: Arrays, watch: Watch) -> None:
        stays = kept(run, o["drop"], annealed(run, o), o["regrow_dropped"], g)
        regrow_entries(run, stays, o["grow"], o["redistribute"], o["regrow_dropped"], g, watch)

    return update


def lamp(w: Array) -> Array:
    """Lee et al. 2021, equation 4: w^2 over the sum of the squares that follow, magnitudes ascending."""
    order = np.argsort(abs(w), kind="stable")
    score = np.zeros(w.size)
    for rank, at in enumerate(order):
        score[at] = w[at] ** 2 / (w[order[rank:]] ** 2).sum()
    return score


def allocated(run: Program, allocate: str, total: int, names: Sequence[str]) -> list[int]:
    """Entries of `names`, which hold what is active there now."""
    if allocate != "layer_adaptive":
        return shared(run, allocate, total, names)
    scores = [lamp(run.w[n][active(run, n)]) for n in names]
    owner = np.repeat(names, [s.size for s in scores])
    best = owner[np.argsort(-np.concatenate(scores), kind="stable")[:total]]
    return [int((best == n).sum()) for n in names]


def with_last(run: Program, o: dict[str, Any], allocate: str, total: int) -> list[int]:
    """As `allocated`, the last layer held at a density where it would fall below."""
    counts = dict(zip(run.sparse, allocated(run, allocate, total, run.sparse), strict=True))
    last, density = o["last_layer"], o["last_density"]
    name = next((n for n in run.sparse if last in (n, n.removesuffix(".weight"))), run.sparse[-1])
    if density is not None:
        floor = min(int(density * run.w[name].size + 0.5), int(run.mask[name].sum()))
        if counts[name] < floor:
            others = [n for n in run.sparse if n != name]
            counts = {name: floor, **dict(zip(others, allocated(run, allocate, total - floor, others), strict=True))}
    return [counts[n] for n in run.sparse]


def counts_of(run: Program, o: dict[str, Any]) -> list[int]:
    """Entries of the random start."""
    if isinstance(o["allocate"], dict):
        return [int(o["allocate"][n] * run.w[n].size + 0.5) for n in run.sparse]
    return shared(run, o["allocate"], total_of(run, o["density"]), run.sparse)


def regular(o: dict[str, Any]) -> Callable[[int], bool]:
    """Whether an update is due at a step."""
    first = o["begin"] or o["interval"]
    return lambda step: first <= step < o["until"] and (step - first) % o["interval"] == 0


def dynamic_run(o: dict[str, Any], kind: str, seed: int) -> History:
    """A random start, then drop and grow at every interval."""
    run = start(kind, seed, lambda run: counts_of(run, o), o["regrow_dropped"])
    return history(run, kind, regular(o), drop_and_grow(o), o["timing"], o["decay"])
