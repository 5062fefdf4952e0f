"""Whole runs in NumPy, written from the papers, and what compares the library with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import regrow
from regrow.core.draws import Stream
from regrow.core.method import Method
from regrow.methods import BY_NAME as RECIPES
from regrow.parts import allocation, drops, growth, redistribution, schedules, scores

Array = NDArray[Any]
Arrays = dict[str, Array]
Batch = tuple[Tensor, Tensor]

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-2
STEPS = 16

LIBRARY: dict[str, dict[Any, Any]] = {
    "anneal": {name: getattr(schedules, name) for name in ("constant", "linear", "cosine", "inverse_power")},
    "allocate": {name: getattr(allocation, name) for name in ("uniform", "er", "erk", "globally")},
    "drop": {"lowest": drops.lowest(scores.magnitude), "per_sign": drops.lowest_per_sign},
    "grow": {"random": growth.at_random, "gradient": growth.by_gradient, "momentum": growth.by_momentum},
    "redistribute": {
        "momentum": redistribution.mean_momentum,
        "magnitude": redistribution.mean_magnitude,
        "nonzeros": redistribution.nonzeros,
        None: None,
    },
}

ANNEAL: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + np.cos(np.pi * p)) / 2,
    "inverse_power": lambda p: (1 - p) ** 3,
}


@dataclass(frozen=True)
class Recipe:
    """What a paper fixes, under the names of the library's options."""

    method: str
    density: float | None = 0.3
    until: int = 0
    begin: int | None = None
    interval: int = 100
    fraction: float = 0.3
    anneal: str = "constant"
    decay: float = 0.9
    redistribute: str | None = None
    grow: str = ""
    allocate: Any = "uniform"
    drop: str = "lowest"
    regrow_dropped: str = "keep"
    timing: str = "after"

    def due(self, step: int) -> bool:
        first = self.begin or self.interval
        regular = first <= step < self.until and (step - first) % self.interval == 0
        return regular or (self.method == "gmp" and step == self.until)

    def progress(self, step: int) -> float:
        begin = self.begin or 0
        return float(np.clip((step - begin) / (self.until - begin), 0, 1))


PAPERS = {
    "dense": Recipe("dense", density=1.0),
    "static": Recipe("static", allocate="erk"),
    "set": Recipe("set", allocate="er"),
    "snfs": Recipe("snfs", fraction=0.5, anneal="cosine", redistribute="momentum"),
    "snip": Recipe("snip", allocate="globally"),
    "gmp": Recipe("gmp"),
    "rigl": Recipe("rigl", anneal="cosine", allocate="erk", timing="instead"),
    "dst": Recipe("dst", anneal="cosine", allocate="erk", grow="gradient"),
}

SHORT: dict[str, dict[str, Any]] = {
    "dense": {},
    "static": {"density": 0.3},
    "set": {"density": 0.3, "until": 13, "interval": 3},
    "snfs": {"density": 0.3, "until": 13, "interval": 3},
    "snip": {"density": 0.3},
    "gmp": {"density": 0.3, "until": 13, "interval": 3},
    "rigl": {"density": 0.3, "until": 13, "interval": 3},
    "dst": {"density": 0.3, "until": 13, "interval": 3},
}

GROWS = {"set": "random", "snfs": "momentum", "rigl": "gradient"}
"""How methods grow that do not say so."""


def library_method(name: str, options: dict[str, Any]) -> Method:
    given = {}
    for key, value in options.items():
        if isinstance(value, dict):
            given[key] = allocation.explicit(value)
        else:
            given[key] = LIBRARY[key][value] if key in LIBRARY else value
    return RECIPES[name](**given)


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


@dataclass
class Program:
    """A sparse training run in NumPy: SGD with momentum and weight decay, and a recipe's updates."""

    recipe: Recipe
    model: nn.Module
    seed: int
    w: Arrays = field(default_factory=dict)
    v: Arrays = field(default_factory=dict)
    mask: Arrays = field(default_factory=dict)
    ema: Arrays = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        self.shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        self.w = {n: p.detach().numpy().ravel().copy() for n, p in self.model.named_parameters()}
        self.v = {n: np.zeros_like(w) for n, w in self.w.items()}
        self.sparse = [n for n, shape in self.shapes.items() if len(shape) > 1]
        self.ema = {n: np.zeros_like(self.w[n]) for n in self.sparse}
        self.mask = {n: np.ones(self.w[n].size, bool) for n in self.sparse}
        if self.recipe.method in ("static", "set", "snfs", "rigl", "dst"):
            for n, count in zip(self.sparse, self.counts(self.recipe.density, self.sizes()), strict=True):
                self.mask[n][:] = False
                self.mask[n][Stream(self.seed, n, 0).subset(self.w[n].size, count)] = True
                self.w[n] *= self.mask[n]

    def sizes(self) -> list[int]:
        return [self.w[n].size for n in self.sparse]

    def counts(self, density: float | None, capacity: list[int]) -> list[int]:
        if isinstance(self.recipe.allocate, dict):
            return [int(self.recipe.allocate[n] * self.w[n].size + 0.5) for n in self.sparse]
        assert density is not None
        shares = {
            "uniform": np.prod,
            "er": lambda s: (s[0] + s[1]) / (s[0] * s[1]) * np.prod(s),
            "erk": sum,
        }[self.recipe.allocate]
        total = min(int(np.floor(density * sum(self.sizes()) + 0.5)), sum(capacity))
        return share_out([float(shares(self.shapes[n])) for n in self.sparse], total, capacity)

    def gradients(self, batch: Batch) -> Arrays:
        """Of the loss alone with respect to the effective weights, at every position."""
        p = {n: torch.from_numpy(w).view(self.shapes[n]).clone().requires_grad_() for n, w in self.w.items()}
        value = nn.functional.cross_entropy(torch.func.functional_call(self.model, p, (batch[0],)), batch[1])
        return {n: g.numpy().ravel() for n, g in zip(p, torch.autograd.grad(value, list(p.values())), strict=True)}

    def train(self, batch: Batch) -> None:
        self.step += 1
        g = self.gradients(batch)
        if self.recipe.method == "snip" and self.step == 1:
            self.prune({n: np.abs(self.w[n] * g[n]) for n in self.sparse}, self.recipe.density)
            return
        for n in self.sparse:
            self.ema[n] = self.recipe.decay * self.ema[n] + (1 - self.recipe.decay) * g[n]
        due = self.recipe.due(self.step)
        if not (due and self.recipe.timing == "instead"):
            for n in self.w:
                seen = g[n] * self.mask[n] if n in self.mask else g[n]
                self.v[n] = MOMENTUM * self.v[n] + seen + WEIGHT_DECAY * self.w[n]
                self.w[n] = self.w[n] - LR * self.v[n]
        if due and self.recipe.method == "gmp":
            final = self.recipe.density
            assert final is not None
            density = final + (1 - final) * (1 - self.recipe.progress(self.step)) ** 3
            self.prune({n: np.abs(self.w[n]) for n in self.sparse}, density)
        elif due:
            self.drop_and_grow(g)

    def prune(self, score: Arrays, density: float | None) -> None:
        active = {n: np.flatnonzero(self.mask[n]) for n in self.sparse}
        if self.recipe.allocate == "globally":
            assert density is not None
            pooled = np.concatenate([score[n][active[n]] for n in self.sparse])
            owner = np.repeat(self.sparse, [active[n].size for n in self.sparse])
            total = min(int(np.floor(density * sum(self.sizes()) + 0.5)), pooled.size)
            best = owner[np.argsort(-pooled, kind="stable")[:total]]
            counts = [int((best == n).sum()) for n in self.sparse]
        else:
            counts = self.counts(density, [active[n].size for n in self.sparse])
        for n, count in zip(self.sparse, counts, strict=True):
            kept = np.zeros_like(self.mask[n])
            kept[top(score[n], count, active[n])] = True
            self.change(n, kept, np.zeros_like(kept))

    def drop_and_grow(self, g: Arrays) -> None:
        r = self.recipe
        fraction = r.fraction * ANNEAL[r.anneal](r.progress(self.step))
        statistic = {
            "momentum": lambda n: np.abs(self.ema[n][self.mask[n]]).mean(),
            "magnitude": lambda n: np.abs(self.w[n][self.mask[n]]).mean(),
            "nonzeros": lambda n: np.count_nonzero(self.w[n][self.mask[n]]),
        }
        kept, candidates, lost = {}, {}, []
        for n in self.sparse:
            kept[n] = self.kept(n, fraction)
            candidates[n] = np.flatnonzero(~(self.mask[n] if r.regrow_dropped == "forbid" else kept[n]))
            lost.append(int(self.mask[n].sum() - kept[n].sum()))
        counts = lost
        if r.redistribute is not None:
            shares = [float(statistic[r.redistribute](n)) for n in self.sparse]
            counts = share_out(shares, sum(lost), [candidates[n].size for n in self.sparse])
        for n, count in zip(self.sparse, counts, strict=True):
            grow = r.grow or GROWS[r.method]
            if grow == "random":
                chosen = candidates[n][Stream(self.seed, n, self.step).subset(candidates[n].size, count)]
            else:
                chosen = top(np.abs(g[n] if grow == "gradient" else self.ema[n]), count, candidates[n])
            grown = np.zeros_like(kept[n])
            grown[chosen] = True
            self.change(n, kept[n], grown)

    def kept(self, n: str, fraction: float) -> Array:
        active = np.flatnonzero(self.mask[n])
        if self.recipe.drop == "lowest":
            k = int(np.floor(fraction * active.size + 1e-9))
            if self.recipe.regrow_dropped == "forbid":
                k = min(k, self.mask[n].size - active.size)
            chosen = [top(np.abs(self.w[n]), active.size - k, active)]
        else:
            chosen = []
            for of_sign in (active[self.w[n][active] > 0], active[self.w[n][active] < 0]):
                k = int(np.ceil(fraction * of_sign.size - 1e-9))
                chosen.append(top(np.abs(self.w[n]), of_sign.size - k, of_sign))
        kept = np.zeros_like(self.mask[n])
        kept[np.concatenate(chosen)] = True
        return kept

    def change(self, n: str, kept: Array, grown: Array) -> None:
        survives = kept if self.recipe.regrow_dropped == "reset" else self.mask[n]
        self.mask[n] = kept | grown
        self.w[n] = self.w[n] * (survives & self.mask[n])
        self.v[n] = self.v[n] * (survives & self.mask[n])


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: dict[str, list[nn.Module]] = {
        "mlp": [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)],
        "conv": [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)],
    }
    return nn.Sequential(*layers[kind]).double()


def batches(kind: str, seed: int, steps: int = STEPS) -> list[Batch]:
    torch.manual_seed(1000 + seed)
    shape = {"mlp": (8,), "conv": (2, 5, 5)}[kind]
    return [(torch.randn(6, *shape).double(), torch.randint(0, 4, (6,))) for _ in range(steps)]


def sgd(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=weight_decay)


def backward(model: nn.Module, batch: Batch, scale: float = 1.0) -> None:
    model.zero_grad()
    (scale * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()


def masks(sparsifier: regrow.Sparsifier) -> Arrays:
    return {n: t.mask.numpy().ravel() for n, t in sparsifier.topologies.items()}


@dataclass
class History:
    """Masks at the start and after every step, then the last values and momentum."""

    masks: list[Arrays]
    w: Arrays
    v: Arrays

    def first_difference(self, other: History) -> int | None:
        """The step after which the topologies are no longer the same."""
        pairs = enumerate(zip(self.masks, other.masks, strict=True))
        return next((t for t, (a, b) in pairs if any((a[n] != b[n]).any() for n in a)), None)


def expected(recipe: Recipe, kind: str = "mlp", seed: int = 0) -> History:
    program = Program(recipe, network(kind, seed), seed)
    history = [dict(program.mask)]
    for batch in batches(kind, seed):
        program.train(batch)
        history.append(dict(program.mask))
    return History(history, program.w, program.v)


def actual(method: Method, kind: str = "mlp", seed: int = 0) -> History:
    model = network(kind, seed)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, method, seed=seed)
    history = [masks(sparsifier)]
    for batch in batches(kind, seed):
        backward(model, batch)
        optimizer.step()
        history.append(masks(sparsifier))
    w = {n: p.detach().numpy().ravel() for n, p in model.named_parameters()}
    v = {n: optimizer.state[p]["momentum_buffer"].numpy().ravel() for n, p in model.named_parameters()}
    return History(history, w, v)


def assert_same(found: History, wanted: History) -> None:
    assert found.first_difference(wanted) is None
    for n in wanted.w:
        np.testing.assert_allclose(found.w[n], wanted.w[n], rtol=1e-9, atol=1e-12, err_msg=n)
        np.testing.assert_allclose(found.v[n], wanted.v[n], rtol=1e-9, atol=1e-12, err_msg=n)
        if n in wanted.masks[-1]:
            assert not found.w[n][~wanted.masks[-1][n]].any()
            assert not found.v[n][~wanted.masks[-1][n]].any()
