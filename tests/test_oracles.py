"""Whole runs against a plain NumPy program written from the papers: same topologies, values and momentum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import regrow
from regrow import allocation, drops, growth, redistribution, schedules, scores
from regrow.method import Method, Need, Regrow, Start
from regrow.methods import RECIPES
from regrow.streams import Stream
from regrow.topology import Topology
from regrow.updates import drop_and_grow, every

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


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("static", {}),
    ("rigl", {}),
    ("rigl", {"timing": "after"}),
    ("rigl", {"density": 0.8, "fraction": 0.9, "anneal": "constant", "regrow_dropped": "forbid"}),
    ("rigl", {"anneal": "linear", "regrow_dropped": "reset", "fraction": 0.7}),
    ("rigl", {"interval": 1, "begin": 2, "allocate": "uniform"}),
    ("set", {}),
    ("set", {"drop": "per_sign"}),
    ("set", {"timing": "instead", "anneal": "cosine"}),
    ("snfs", {}),
    ("snfs", {"redistribute": "magnitude"}),
    ("snfs", {"redistribute": "nonzeros", "density": 0.85}),
    ("snfs", {"redistribute": "momentum", "density": 0.85}),
    ("snfs", {"redistribute": None}),
    ("snfs", {"decay": 0.5, "timing": "instead"}),
    ("dst", {}),
    ("dst", {"grow": "momentum", "decay": 0.5, "drop": "per_sign"}),
    ("dst", {"grow": "random", "redistribute": "momentum", "density": 0.85}),
    ("snip", {}),
    ("snip", {"allocate": "uniform"}),
    ("gmp", {}),
    ("gmp", {"allocate": "erk"}),
    ("gmp", {"allocate": "globally", "timing": "instead"}),
    ("gmp", {"interval": 5, "begin": 2}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 1, 9, 10, 11, 22, 24, 26, 27, 30 and 34: topologies, values and momentum over a whole run."""
    options = SHORT[name] | options
    for seed in range(3):
        found = actual(library_method(name, options), kind, seed)
        assert_same(found, expected(replace(PAPERS[name], **options), kind, seed))


@pytest.mark.parametrize("policy", ["keep", "reset", "forbid"])
def test_the_published_drop_and_grow_example(policy: Regrow) -> None:
    """Property 7, reference vector, through a real optimizer; momentum follows the value."""
    w = torch.tensor([0.5, -0.1, 0, 0.3, 0, -0.9, 0.2, 0]).double()
    g = torch.tensor([0.1, -0.9, 0.4, 0.2, -0.7, 0.3, 0.05, 0.6]).double()
    model = nn.Linear(8, 1, bias=False).double()
    optimizer = sgd(model, weight_decay=0)
    update = drop_and_grow(
        schedules.constant(0.4), LIBRARY["drop"]["lowest"], growth.highest(growth.gradient), regrow_dropped=policy
    )
    start = Start(lambda weights, probe: weights[0].rewire(Topology((1, 8), torch.tensor([0, 1, 3, 5, 6]))))
    regrow.sparsify(model, optimizer, Method("m", start, every(2, update, until=3), needs=Need.GRADIENT))
    model(torch.ones(8).double()).backward()
    optimizer.step()
    with torch.no_grad():
        model.weight[0] = w
    optimizer.zero_grad()
    model(g).backward()
    optimizer.step()
    stays = {"keep": [0, 1, 3, 5], "reset": [0, 3, 5], "forbid": [0, 3, 5]}[policy]
    expected_w, expected_v = torch.zeros(8).double(), torch.zeros(8).double()
    expected_w[stays], expected_v[stays] = w[stays], 1.0
    active = {"forbid": [0, 3, 4, 5, 7]}.get(policy, [0, 1, 3, 4, 5])
    assert torch.equal(model.weight[0], expected_w)
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"][0], expected_v)
    assert torch.equal(model.weight.grad[0][stays], g[stays])
    model.zero_grad()
    model(g).backward()
    assert model.weight.grad[0].nonzero().view(-1).tolist() == active


def one_update(
    seed: int, timing: str = "instead", weight_decay: float = 0.0, scale: float = 1.0, clip: bool = False
) -> Arrays:
    model = network("mlp", seed)
    optimizer = sgd(model, weight_decay)
    method = RECIPES["rigl"](0.4, until=9, begin=1, fraction=0.5, timing=timing)
    sparsifier = regrow.sparsify(model, optimizer, method, seed=seed)
    backward(model, batches("mlp", seed)[0], scale)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return masks(sparsifier)


@pytest.mark.parametrize("seed", range(5))
def test_growth_ranks_finite_differences(seed: int) -> None:
    """Property 26: brute-force top-k of a dense gradient that no autograd has touched."""
    program = Program(replace(PAPERS["rigl"], density=0.4), network("mlp", seed), seed)
    batch = batches("mlp", seed)[0]
    model = copy.deepcopy(program.model)

    def loss_with(name: str, values: Array) -> float:
        everything = {
            n: torch.from_numpy(values if n == name else w).view(program.shapes[n]) for n, w in program.w.items()
        }
        return float(nn.functional.cross_entropy(torch.func.functional_call(model, everything, (batch[0],)), batch[1]))

    found = one_update(seed)
    for n in program.sparse:
        h = 1e-6
        shifts = np.eye(program.w[n].size) * h
        slope = [(loss_with(n, program.w[n] + s) - loss_with(n, program.w[n] - s)) / (2 * h) for s in shifts]
        active = np.flatnonzero(program.mask[n])
        kept = top(np.abs(program.w[n]), active.size - active.size // 2, active)
        grown = top(np.abs(slope), active.size // 2, np.setdiff1d(np.arange(program.w[n].size), kept))
        assert set(np.flatnonzero(found[n])) == set(kept) | set(grown)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changed", [{"weight_decay": 0.5}, {"scale": 2.0**12}, {"scale": 2.0**-12}, {"clip": True}], ids=str
)
def test_decay_scale_and_clipping_do_not_change_the_choice(changed: dict[str, Any], seed: int) -> None:
    """Property 26."""
    plain, other = one_update(seed), one_update(seed, **changed)
    assert all((plain[n] == other[n]).all() for n in plain)


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "gmp"])
def test_instead_leaves_everything_but_the_topology(name: str) -> None:
    """Property 24: survivors, biases and their momentum are as before the step; the clock goes on."""
    model = network("mlp", 0)
    optimizer = sgd(model)
    method = library_method(name, SHORT[name] | {"timing": "instead"})
    sparsifier = regrow.sparsify(model, optimizer, method)
    for step, batch in enumerate(batches("mlp", 0)[:3], start=1):
        old, before = masks(sparsifier), {n: p.detach().clone() for n, p in model.named_parameters()}
        momentum = {n: s["momentum_buffer"].clone() for n, p in model.named_parameters() if (s := optimizer.state[p])}
        backward(model, batch)
        optimizer.step()
        assert sparsifier.step == step
    for n, p in model.named_parameters():
        stays = torch.from_numpy(old[n] & masks(sparsifier)[n]).view(p.shape) if n in old else torch.ones_like(p)
        assert torch.equal(p, before[n] * stays)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum[n] * stays)


@pytest.mark.parametrize("seed", range(3))
def test_after_drops_stepped_weights_and_grows_by_the_gradient_before(seed: int) -> None:
    """Property 24: the two timings read different weights and the same gradient."""
    program = Program(replace(PAPERS["rigl"], density=0.4), network("mlp", seed), seed)
    batch = batches("mlp", seed)[0]
    g = program.gradients(batch)
    found = one_update(seed, timing="after", weight_decay=WEIGHT_DECAY)
    for n in program.sparse:
        stepped = program.w[n] - LR * (g[n] * program.mask[n] + WEIGHT_DECAY * program.w[n])
        active = np.flatnonzero(program.mask[n])
        kept = top(np.abs(stepped), active.size - active.size // 2, active)
        grown = top(np.abs(g[n]), active.size // 2, np.setdiff1d(np.arange(g[n].size), kept))
        assert set(np.flatnonzero(found[n])) == set(kept) | set(grown)


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_adam_newcomers_start_with_a_second_moment(name: str) -> None:
    """Properties 11 and 12: first moment 0, second the layer's mean or the (biased) square of its gradient."""
    model = network("mlp", 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    method = RECIPES[name](0.4, until=9, interval=5, fraction=0.5, timing="instead")
    sparsifier = regrow.sparsify(model, optimizer, method)
    for batch in batches("mlp", 0)[:5]:
        old = masks(sparsifier)
        state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
        backward(model, batch)
        g = {n: p.grad.clone().numpy().ravel() for n, p in model.named_parameters()}
        optimizer.step()
    for n, p in ((n, p) for n, p in model.named_parameters() if n in old):
        new = masks(sparsifier)[n]
        first, second = (optimizer.state[p][k].numpy().ravel() for k in ("exp_avg", "exp_avg_sq"))
        before = {k: v.numpy().ravel() for k, v in state[n].items() if v.dim()}
        stay, fresh = new & old[n], new & ~old[n]
        assert fresh.any()
        assert (first[stay] == before["exp_avg"][stay]).all()
        assert (second[stay] == before["exp_avg_sq"][stay]).all()
        assert not first[~stay].any()
        assert not second[~new].any()
        typical = before["exp_avg_sq"][old[n]].mean()
        biased = (1 - 0.999 ** float(state[n]["step"])) * g[n][fresh] ** 2
        start = np.maximum(typical, biased) if name == "rigl" else typical
        np.testing.assert_allclose(second[fresh], start, rtol=1e-12)


def test_snip_leaves_values_and_step_counts_alone() -> None:
    """Property 30: survivors keep the initial values, and no optimizer step has happened."""
    model = network("mlp", 1)
    optimizer = sgd(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier = regrow.sparsify(model, optimizer, RECIPES["snip"](0.25))
    assert not sparsifier.started
    backward(model, batches("mlp", 1)[0])
    optimizer.step()
    kept = masks(sparsifier)
    total = sum(m.size for m in kept.values())
    assert sum(int(m.sum()) for m in kept.values()) == int(0.25 * total + 0.5)
    assert not any(optimizer.state[p] for p in model.parameters())
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n] * torch.from_numpy(kept[n]).view(p.shape) if n in kept else before[n])


def test_snip_of_several_batches_ranks_their_mean_gradient() -> None:
    """Property 30: the order of batches is irrelevant, weight decay is not in the score."""
    data = batches("mlp", 2)[:3]
    program = Program(PAPERS["snip"], network("mlp", 2), 2)
    sums = [program.gradients(batch) for batch in data]
    score = {n: np.abs(program.w[n] * sum(g[n] for g in sums)) for n in program.sparse}
    program.prune(score, 0.3)
    for order in (data, data[::-1]):
        model = network("mlp", 2)
        loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
        sparsifier = regrow.sparsify(model, sgd(model), RECIPES["snip"](0.3), batches=order, loss=loss)
        assert all((m == program.mask[n]).all() for n, m in masks(sparsifier).items())
        assert all(p.grad is None for p in model.parameters())
