"""Whole runs in NumPy, written from the papers, and the same runs by the library.

A method's test says what its paper fixes (`PAPERS`), small options (`SHORT`) and the cases of every option (`CASES`).
It writes `paper(name, options, kind, seed) -> History`, usually from a `start`, an update of (program, gradients) and
their `history`. Options are words and numbers: here they mean NumPy, and `library` makes the recipe of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import regrow
from regrow import parts
from regrow.core.draws import Stream
from regrow.core.method import Method
from regrow.methods import BY_NAME
from support.loops import loss_of

Array = NDArray[Any]
Shape = tuple[int, ...]
Arrays = dict[str, Array]
Batch = tuple[Tensor, Tensor]
Options = dict[str, Any]

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-2
STEPS = 16

# Words, in NumPy


COSINE = lambda p: (1 + np.cos(np.pi * p)) / 2  # noqa: E731
FRACTIONS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda f, p: f,
    "linear": lambda f, p: f * (1 - p),
    "cosine": lambda f, p: f * COSINE(p),
    "inverse_power": lambda f, p: f * (1 - p) ** 3,
    "cosine_to_0.005": lambda f, p: 0.005 + (f - 0.005) * COSINE(p),
}
"""(fraction at first, progress in [0, 1]) -> fraction."""
SHARES: dict[str, Callable[[tuple[int, ...]], float]] = {
    "uniform": lambda s: float(np.prod(s)),
    "er": lambda s: (s[0] + s[1]) / (s[0] * s[1]) * float(np.prod(s)),
    "erk": lambda s: float(sum(s)),
}


def at_most(wanted: int, size: int) -> int:
    """The largest divisor of `size` that is not above `wanted`."""
    return max(n for n in range(1, wanted + 1) if size % n == 0)


BOXES: dict[str | None, Callable[[Shape], Shape]] = {
    None: lambda s: (1,) * len(s),
    "fives": lambda s: (at_most(5, s[0]), *(1,) * (len(s) - 1)),
    "tiles": lambda s: (at_most(5, s[0]), at_most(2, s[1]), *(1,) * (len(s) - 2)),
    "fours": lambda s: (at_most(4, s[0]), *(1,) * (len(s) - 1)),
    "rows": lambda s: (1, *s[1:]),
    "thirty-twos": lambda s: (at_most(32, s[0]), *(1,) * (len(s) - 1)),
}
"""The shape of a weight, outputs first -> how far a unit reaches along each axis.

Not two of the last layer's four outputs: their gradients sum to zero, so that half of them would tie with the rest."""


def units_of(shape: Shape, structure: str | None) -> Array:
    """(numel,) the number of the unit that each entry belongs to."""
    steps = BOXES[structure](shape)
    grid = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
    along = [index // step for index, step in zip(np.indices(shape), steps, strict=True)]
    return np.ravel_multi_index(along, grid).ravel()


def in_units(counts: Sequence[int], size: Sequence[int], places: Sequence[int], active: Sequence[int]) -> list[int]:
    """Units for these counts of entries, in all as near to their sum as whole units come; `size` is of whole weights.

    No more than are active. Each is rounded down, but not to nothing; then those that lost most get one more while
    that brings the sum nearer.

    """
    each = np.asarray(size) / np.asarray(places)
    exact = np.asarray(counts) / each
    found = np.minimum(np.maximum(np.floor(exact + 1e-9), exact > 0).astype(int), active)
    for i in np.argsort(np.round(found - exact, 9), kind="stable"):
        missing = sum(counts) - float((found * each).sum())
        found[i] += found[i] < active[i] and abs(missing - each[i]) < abs(missing) - 1e-9
    return found.tolist()


def floor(x: float) -> int:
    return int(np.floor(x + 1e-9))


def progress(o: Options, step: int) -> float:
    begin = o["begin"] or 0
    return float(np.clip((step - begin) / (o["until"] - begin), 0, 1))


def annealed(o: Options, step: int) -> float:
    return FRACTIONS[o["anneal"]](o["fraction"], progress(o, step))


def regular(o: Options, step: int) -> bool:
    """Updates come at begin, which is the interval unless given, begin + interval, ... below until."""
    first = o["begin"] or o["interval"]
    return bool(first <= step < o["until"] and (step - first) % o["interval"] == 0)


def top(score: Array, count: int, among: Array) -> Array:
    """The `count` positions of highest score, equal ones in ascending position."""
    return among[np.argsort(-score[among], kind="stable")[:count]]


def share_out(shares: Sequence[float], total: int, capacity: Sequence[int]) -> list[int]:
    """Clamp the most saturated place, one per round, then the largest remainders."""
    exact = np.zeros(len(shares))
    room, open_ = float(total), set(range(len(shares)))
    while open_:
        scale = room / sum(shares[i] for i in open_)
        worst = max(open_, key=lambda i: shares[i] * scale - capacity[i])
        if shares[worst] * scale <= capacity[worst]:
            exact[list(open_)] = [shares[i] * scale for i in open_]
            break
        exact[worst] = capacity[worst]
        room -= capacity[worst]
        open_.remove(worst)
    counts = np.floor(exact + 1e-9).astype(int)
    # Equal remainders differ by rounding noise, so they are compared to nine digits.
    order = np.lexsort((-np.asarray(capacity), -np.asarray(shares, dtype=float), np.round(counts - exact, 9)))
    for i in order[: total - counts.sum()]:
        counts[i] += 1
    return counts.tolist()


# Programs


@dataclass
class Program:
    """A model's parameters as flat arrays, by name: values, momentum and masks, which a paper's run changes."""

    model: nn.Module
    seed: int
    keep: str = "keep"
    """What becomes of a dropped entry that grows again at once."""
    step: int = 0
    structure: str | None = None
    """What is active or inactive together."""
    mask: Arrays = field(init=False)
    """Which units are active."""

    def __post_init__(self) -> None:
        # The library may make the model sparse in place.
        self.model = copy.deepcopy(self.model)
        self.shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        self.w = {n: p.detach().numpy().ravel().copy() for n, p in self.model.named_parameters()}
        self.v = {n: np.zeros_like(w) for n, w in self.w.items()}
        self.sparse = [n for n, shape in self.shapes.items() if len(shape) > 1]
        self.unit_of = {n: units_of(self.shapes[n], self.structure) for n in self.sparse}
        self.mask = {n: np.ones(int(of.max()) + 1, bool) for n, of in self.unit_of.items()}

    def sizes(self) -> list[int]:
        return [self.w[n].size for n in self.sparse]

    def active(self, n: str) -> Array:
        return np.flatnonzero(self.mask[n])

    def wide(self, n: str, units: Array | None = None) -> Array:
        """A mask of units, the present one unless given, as one of entries."""
        return (self.mask[n] if units is None else units)[self.unit_of[n]]

    def pooled(self, n: str, score: Array) -> Array:
        """The mean score of each unit."""
        of = self.unit_of[n]
        return score if self.structure is None else np.bincount(of, score) / np.bincount(of)

    def nnz(self) -> int:
        return sum(int(self.wide(n).sum()) for n in self.sparse)

    def gradients(self, batch: Batch) -> Arrays:
        """Of the loss alone with respect to the effective weights, at every position."""
        p = {n: torch.from_numpy(w).view(self.shapes[n]).clone().requires_grad_() for n, w in self.w.items()}
        value = nn.functional.cross_entropy(torch.func.functional_call(self.model, p, (batch[0],)), batch[1])
        return {n: g.numpy().ravel() for n, g in zip(p, torch.autograd.grad(value, list(p.values())), strict=True)}

    def descend(self, g: Arrays, lr: float = LR) -> None:
        """A step of SGD with momentum and weight decay, of active entries."""
        for n in self.w:
            seen = g[n] * self.wide(n) if n in self.mask else g[n]
            self.v[n] = MOMENTUM * self.v[n] + seen + WEIGHT_DECAY * self.w[n]
            self.w[n] = self.w[n] - lr * self.v[n]

    def change(self, n: str, kept: Array, grown: Array) -> None:
        """Survivors keep value and momentum, and newcomers start at zero."""
        survives = kept if self.keep == "reset" else self.mask[n]
        self.mask[n] = kept | grown
        self.w[n] = self.w[n] * self.wide(n, survives & self.mask[n])
        self.v[n] = self.v[n] * self.wide(n, survives & self.mask[n])


def stream(run: Program, n: str) -> Stream:
    return Stream(run.seed, n, run.step)


def only(run: Program, n: str, positions: Array) -> Array:
    """A mask of one weight."""
    return np.isin(np.arange(run.mask[n].size), positions)


def start(
    kind: str,
    seed: int,
    counts: Callable[[Program], list[int]] | None = None,
    keep: str = "keep",
    structure: str | None = None,
) -> Program:
    """A network with random topologies of these counts, or a dense one."""
    run = Program(network(kind, seed), seed, keep, structure=structure)
    for n, count in zip(run.sparse, counts(run), strict=True) if counts else ():
        run.mask[n] = only(run, n, stream(run, n).subset(run.mask[n].size, count))
        run.w[n] = run.w[n] * run.wide(n)
    return run


# Counts


def total_of(run: Program, density: float) -> int:
    return int(np.floor(density * sum(run.sizes()) + 0.5))


def counts_of(run: Program, o: Options) -> list[int]:
    """Units of each weight, by densities of its own or by a rule."""
    if isinstance(o["allocate"], dict):
        return [int(o["allocate"][n] * run.mask[n].size + 0.5) for n in run.sparse]
    return shared(run, o["allocate"], total_of(run, o["density"]), run.sparse)


def shared(run: Program, allocate: str, total: int, names: Sequence[str], score: Arrays | None = None) -> list[int]:
    """Units of `names`, which hold what is active there now, from shapes or from a ranking of all scores.

    The score is the magnitude unless given.
    """
    active = {n: run.active(n) for n in names}
    ranked = {n: run.pooled(n, np.abs(run.w[n])) if score is None else score[n] for n in names}
    each = {n: run.w[n].size / run.mask[n].size for n in names}
    if allocate == "layer_adaptive":
        allocate, ranked = "globally", {n: lamp(ranked[n], active[n]) for n in names}
    if allocate != "globally":
        capacity = [int(run.wide(n).sum()) for n in names]
        entries = share_out([SHARES[allocate](run.shapes[n]) for n in names], min(total, sum(capacity)), capacity)
        sizes = [[run.w[n].size, run.mask[n].size, active[n].size] for n in names]
        return in_units(entries, *zip(*sizes, strict=True))
    together = np.concatenate([ranked[n][active[n]] for n in names])
    owner = np.repeat(names, [active[n].size for n in names])
    order = np.argsort(-together, kind="stable")
    reached = np.cumsum([0, *(each[n] for n in owner[order])])
    best = owner[order[: int(np.abs(reached - total).argmin())]]
    return [int((best == n).sum()) for n in names]


def lamp(score: Array, active: Array) -> Array:
    """Lee et al. 2021, equation 4: s^2 over the sum of the squares that follow, scores ascending."""
    order = active[np.argsort(score[active], kind="stable")]
    share = np.zeros(score.size)
    for rank, at in enumerate(order):
        share[at] = score[at] ** 2 / (score[order[rank:]] ** 2).sum()
    return share


def in_pattern(score: Array, shape: Shape, count: int, n: int, m: int) -> Array:
    """The n highest of each m consecutive inputs; of what is left over as many in each line, or one more where best."""
    lines = np.moveaxis(np.arange(score.size).reshape(shape), 1, -1).reshape(-1, shape[1])
    whole = shape[1] // m * m
    chosen = [top(score, n, group) for line in lines for group in line[:whole].reshape(-1, m)]
    rests = [line[whole:] for line in lines]
    each, surplus = divmod(count - sum(c.size for c in chosen), len(rests))
    chosen += [top(score, each, rest) for rest in rests]
    if surplus:
        chosen.append(top(score, surplus, np.concatenate([top(score, each + 1, rest)[-1:] for rest in rests])))
    return np.isin(np.arange(score.size), np.concatenate(chosen))


def with_last(run: Program, allocate: str, total: int, last: str | None, density: float | None) -> list[int]:
    """As `shared`, but the last layer is held at a density where it would fall below."""
    counts = dict(zip(run.sparse, shared(run, allocate, total, run.sparse), strict=True))
    name = next((n for n in run.sparse if last in (n, n.removesuffix(".weight"))), run.sparse[-1])
    if density is not None:
        each = run.w[name].size / run.mask[name].size
        least = min(int(density * run.mask[name].size + 0.5), int(run.mask[name].sum()))
        if counts[name] < least:
            others = [n for n in run.sparse if n != name]
            left = shared(run, allocate, total - round(least * each), others)
            counts = {name: least, **dict(zip(others, left, strict=True))}
    return [counts[n] for n in run.sparse]


# Updates


def keep_largest(run: Program, counts: Sequence[int], score: Arrays | None = None) -> None:
    """Keep these counts of the active entries, by magnitude unless a score of units is given."""
    for n, count in zip(run.sparse, counts, strict=True):
        ranked = run.pooled(n, np.abs(run.w[n])) if score is None else score[n]
        kept = only(run, n, top(ranked, count, run.active(n)))
        run.change(n, kept, np.zeros_like(kept))


# What a run was


@dataclass
class History:
    """Masks at the start and after every step, then what was trained, by kind and name."""

    masks: list[Arrays]
    trained: Mapping[str, Arrays]

    def first_difference(self, other: History) -> int | None:
        """The step after which the topologies are no longer the same."""
        pairs = enumerate(zip(self.masks, other.masks, strict=True))
        return next((t for t, (a, b) in pairs if any((a[n] != b[n]).any() for n in a)), None)


Train = Callable[[Program, Arrays], None]


def history(
    run: Program, kind: str, due: Callable[[int], bool], update: Train, timing: str, observe: Train | None = None
) -> History:
    """Train with `update(run, gradients)` at the steps that are due, instead of or after the optimizer's step."""
    kept = [{n: run.wide(n) for n in run.sparse}]
    for batch in batches(kind, run.seed):
        run.step += 1
        g = run.gradients(batch)
        if observe is not None:
            observe(run, g)
        if not (due(run.step) and timing == "instead"):
            run.descend(g)
        if due(run.step):
            update(run, g)
        kept.append({n: run.wide(n) for n in run.sparse})
    return History(kept, {"value": run.w, "momentum": run.v})


FEW = 5


def differences(found: History, wanted: History, rtol: float, atol: float) -> Iterator[str]:
    """What the first wrong step has wrong in each weight, or what was trained to something else."""
    step = found.first_difference(wanted)
    if step is not None:
        for n, theirs in wanted.masks[step].items():
            ours = found.masks[step][n]
            more, fewer = np.flatnonzero(ours & ~theirs), np.flatnonzero(theirs & ~ours)
            if more.size or fewer.size:
                yield (
                    f"{n} after step {step}: {more.size + fewer.size} of {ours.size} entries differ; active are "
                    f"{more[:FEW].tolist()}, wanted were {fewer[:FEW].tolist()}"
                )
        return
    for kind, arrays in wanted.trained.items():
        for n, array in arrays.items():
            ours = found.trained[kind][n]
            # What is exactly zero in the paper is so here, or it would be active.
            wrong = np.flatnonzero(~np.isclose(ours, array, rtol=rtol, atol=atol) | (array == 0) & (ours != 0))
            if wrong.size:
                at = wrong[:FEW]
                yield (
                    f"{kind} of {n}: {wrong.size} of {array.size} entries differ; at {at.tolist()} are "
                    f"{ours[at].tolist()}, wanted were {array[at].tolist()}"
                )


def assert_same(found: History, wanted: History, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Topologies are equal at every step, and what was trained is equal up to rounding."""
    assert {kind: set(of) for kind, of in found.trained.items()} == {k: set(of) for k, of in wanted.trained.items()}
    told = "\n".join(differences(found, wanted, rtol, atol))
    assert not told, told


# The same by the library


ALLOCATIONS = {name: getattr(parts, name) for name in ("uniform", "er", "erk", "globally", "layer_adaptive")}
WORDS: dict[str, Mapping[str, Any]] = {
    "structure": {
        "fives": parts.groups(5),
        "tiles": parts.blocks(5, 2),
        "fours": parts.groups(4),
        "rows": parts.rows,
        "thirty-twos": parts.groups(32),
        "diagonals": parts.diagonals,
        "pairs": parts.n_of_m(1, 2),
    },
    "anneal": {name: getattr(parts, name) for name in ("constant", "linear", "cosine", "inverse_power")}
    | {"cosine_to_0.005": parts.cosine_to_half_percent},
    "allocate": ALLOCATIONS,
    "init_allocate": ALLOCATIONS,
    "drop": {
        "lowest": parts.smallest,
        "per_sign": parts.lowest_per_sign,
        "taylor": parts.lowest(parts.taylor),
        "global": parts.lowest_globally(parts.magnitude),
    },
    "grow": {
        "random": parts.at_random,
        "gradient": parts.by_gradient,
        "momentum": parts.by_momentum,
        "unexplored_first": parts.unexplored_first,
        "mixed": parts.mixed(parts.by_gradient, parts.unexplored_first, 0.4),
        "per_neuron": parts.highest_per_neuron(parts.gradient),
    },
    "redistribute": {
        "momentum": parts.mean_momentum,
        "magnitude": parts.mean_magnitude,
        "nonzeros": parts.nonzeros,
        "survivors": parts.survivors,
    },
}


def meant(option: str, value: Any) -> Any:
    """A word as the library's value, and densities by name as an explicit allocation."""
    if isinstance(value, dict):
        return parts.explicit(value)
    return WORDS[option][value] if option in WORDS and isinstance(value, str) else value


def library(name: str, options: Options) -> Method:
    return BY_NAME[name](**{option: meant(option, value) for option, value in options.items()})


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: dict[str, list[nn.Module]] = {
        "mlp": [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)],
        "conv": [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)],
        "fours": [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)],
    }
    return nn.Sequential(*layers[kind]).double()


def batches(kind: str, seed: int, steps: int = STEPS) -> list[Batch]:
    torch.manual_seed(1000 + seed)
    shape = {"mlp": (8,), "conv": (2, 5, 5), "fours": (8,)}[kind]
    return [(torch.randn(6, *shape).double(), torch.randint(0, 4, (6,))) for _ in range(steps)]


def sgd(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=weight_decay)


def backward(model: nn.Module, batch: Batch, scale: float = 1.0) -> None:
    model.zero_grad()
    (scale * loss_of(model, batch)).backward()


def masks(sparsifier: regrow.Sparsifier) -> Arrays:
    return {n: t.mask.numpy().ravel() for n, t in sparsifier.topologies.items()}


def actual(method: Method, kind: str = "mlp", seed: int = 0, **options: Any) -> History:
    """A run by the library; `options` are those of `sparsify`."""
    model = network(kind, seed)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, method, seed=seed, **options)
    kept = [masks(sparsifier)]
    for batch in batches(kind, seed):
        backward(model, batch)
        optimizer.step()
        kept.append(masks(sparsifier))
    w = {n: p.detach().numpy().ravel() for n, p in model.named_parameters()}
    v = {n: optimizer.state[p]["momentum_buffer"].numpy().ravel() for n, p in model.named_parameters()}
    return History(kept, {"value": w, "momentum": v})
