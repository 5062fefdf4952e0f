"""Runs in plain NumPy, to which a paper adds a start and an update; and the same runs by the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from regrow.core.draws import Stream
from regrow.core.method import Method
from regrow.methods import BY_NAME as RECIPES
from regrow.parts import allocation, growth, schedules
from support.paper import (
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Array,
    Arrays,
    History,
    Program,
    Recipe,
    actual,
    assert_same,
    batches,
    network,
    share_out,
    top,
)

ALLOCATIONS = {name: getattr(allocation, name) for name in ("uniform", "er", "erk", "globally")}
WORDS: dict[str, Mapping[str, Any]] = {
    "anneal": {name: getattr(schedules, name) for name in ("constant", "linear", "cosine", "inverse_power")}
    | {"cosine_to_0.005": schedules.cosine_to(0.005)},
    "allocate": ALLOCATIONS,
    "init_allocate": ALLOCATIONS,
    "grow": {
        "random": growth.at_random,
        "gradient": growth.highest(growth.gradient),
        "unexplored_first": growth.unexplored_first,
        "mixed": growth.mixed(growth.highest(growth.gradient), growth.unexplored_first, 0.4),
        "per_neuron": growth.highest_per_neuron(growth.gradient),
    },
}
SHARES: dict[str, Callable[[tuple[int, ...]], float]] = {
    "uniform": lambda s: float(np.prod(s)),
    "er": lambda s: (s[0] + s[1]) / (s[0] * s[1]) * float(np.prod(s)),
    "erk": lambda s: float(sum(s)),
}
COSINE = lambda p: (1 + np.cos(np.pi * p)) / 2  # noqa: E731
FRACTIONS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda f, p: f,
    "linear": lambda f, p: f * (1 - p),
    "cosine": lambda f, p: f * COSINE(p),
    "inverse_power": lambda f, p: f * (1 - p) ** 3,
    "cosine_to_0.005": lambda f, p: 0.005 + (f - 0.005) * COSINE(p),
}
"""(fraction at first, progress in [0, 1]) -> fraction."""

Changes = list[tuple[Any, ...]]
"""(options, the step after which topologies differ, options that both runs have)"""


def library(name: str, options: dict[str, Any]) -> Method:
    """The recipe with words as values, and densities by name as an explicit allocation."""
    explicit = {k: allocation.explicit(v) for k, v in options.items() if isinstance(v, dict)}
    words = {k: WORDS[k][v] if k in WORDS else v for k, v in options.items() if k not in explicit}
    return RECIPES[name](**words, **explicit)


def start(kind: str, seed: int, counts: Callable[[Program], list[int]] | None = None, keep: str = "keep") -> Program:
    """A network with random topologies of these counts, or a dense one."""
    run = Program(Recipe("dense", density=1.0, regrow_dropped=keep), network(kind, seed), seed)
    for n, count in zip(run.sparse, counts(run), strict=True) if counts else ():
        chosen = stream(run, n).subset(run.w[n].size, count)
        run.mask[n] = np.isin(np.arange(run.w[n].size), chosen)
        run.w[n] = run.w[n] * run.mask[n]
    return run


def stream(run: Program, n: str) -> Stream:
    return Stream(run.seed, n, run.step)


def sgd_step(run: Program, g: Arrays) -> None:
    for n in run.w:
        seen = g[n] * run.mask[n] if n in run.mask else g[n]
        run.v[n] = MOMENTUM * run.v[n] + seen + WEIGHT_DECAY * run.w[n]
        run.w[n] = run.w[n] - LR * run.v[n]


def history(
    run: Program, kind: str, due: Callable[[int], bool], update: Callable[[Program, Arrays], None], timing: str
) -> History:
    """Train with `update(run, gradients)` at the steps that are due, instead of or after the optimizer's step."""
    masks = [dict(run.mask)]
    for batch in batches(kind, run.seed):
        run.step += 1
        g = run.gradients(batch)
        if not (due(run.step) and timing == "instead"):
            sgd_step(run, g)
        if due(run.step):
            update(run, g)
        masks.append(dict(run.mask))
    return History(masks, run.w, run.v)


def total_of(run: Program, density: float) -> int:
    return int(np.floor(density * sum(run.sizes()) + 0.5))


def shared(run: Program, allocate: str, total: int, names: Sequence[str]) -> list[int]:
    """Entries of `names`, which hold what is active there now, from shapes or from a ranking of all magnitudes."""
    active = {n: np.flatnonzero(run.mask[n]) for n in names}
    if allocate != "globally":
        capacity = [active[n].size for n in names]
        return share_out([SHARES[allocate](run.shapes[n]) for n in names], total, capacity)
    pooled = np.concatenate([np.abs(run.w[n][active[n]]) for n in names])
    owner = np.repeat(names, [active[n].size for n in names])
    best = owner[np.argsort(-pooled, kind="stable")[:total]]
    return [int((best == n).sum()) for n in names]


def with_last(run: Program, allocate: str, total: int, last: str | None, density: float | None) -> list[int]:
    """As `shared`, the last layer held at a density where it would fall below."""
    counts = dict(zip(run.sparse, shared(run, allocate, total, run.sparse), strict=True))
    name = next((n for n in run.sparse if last in (n, n.removesuffix(".weight"))), run.sparse[-1])
    if density is not None:
        floor = min(int(density * run.w[name].size + 0.5), int(run.mask[name].sum()))
        if counts[name] < floor:
            others = [n for n in run.sparse if n != name]
            counts = {name: floor, **dict(zip(others, shared(run, allocate, total - floor, others), strict=True))}
    return [counts[n] for n in run.sparse]


def keep_largest(run: Program, counts: Sequence[int]) -> None:
    for n, count in zip(run.sparse, counts, strict=True):
        kept = np.zeros_like(run.mask[n])
        kept[top(np.abs(run.w[n]), count, np.flatnonzero(run.mask[n]))] = True
        run.change(n, kept, np.zeros_like(kept))


Pick = Callable[[str, Array, int], Array]
"""(weight, candidates, count) -> the candidates that grow."""


def exchange(run: Program, fraction: float, policy: str, pick: Pick) -> None:
    """Per layer: floor(fraction n) smallest magnitudes out, as many in."""
    for n in run.sparse:
        active = np.flatnonzero(run.mask[n])
        count = int(np.floor(fraction * active.size + 1e-9))
        if policy == "forbid":
            count = min(count, run.mask[n].size - active.size)
        kept, grown = np.zeros_like(run.mask[n]), np.zeros_like(run.mask[n])
        kept[top(np.abs(run.w[n]), active.size - count, active)] = True
        candidates = np.flatnonzero(~(run.mask[n] if policy == "forbid" else kept))
        grown[pick(n, candidates, count)] = True
        run.change(n, kept, grown)


def cases(table: dict[str, dict[str, Changes]]) -> list[Any]:
    return [
        pytest.param(
            name, *case, *[{}] * (3 - len(case)), id=f"{name}-{'-'.join(f'{k}={v}' for k, v in case[0].items())}"
        )
        for name, options in table.items()
        for changes in options.values()
        for case in changes
    ]


def require_predicted_difference(
    name: str,
    expected: Callable[..., History],
    short: dict[str, Any],
    change: dict[str, Any],
    first: int,
    both: dict[str, Any],
) -> None:
    """The default and the changed run part at a known step, and the library does both."""
    plain, changed = short | both, short | both | change
    default, other = expected(name, plain, "conv", 0), expected(name, changed, "conv", 0)
    found = actual(library(name, changed), "conv")
    assert default.first_difference(other) == first
    assert found.first_difference(default) == first
    assert_same(found, other)
