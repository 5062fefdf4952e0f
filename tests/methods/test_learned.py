"""Methods that train latent values: whole runs against plain NumPy programs with gradients written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow.core.draws import Stream
from regrow.methods import BY_NAME
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.paper import (
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Array,
    Arrays,
    Batch,
    History,
    assert_same,
    backward,
    batches,
    in_pattern,
    library,
    masks,
    network,
    sgd,
    share_out,
    top,
    units_of,
)

STEPS = 12


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def cubic(first: float, last: float, begin: int, until: int, step: int) -> float:
    return last + (first - last) * (1 - min(max((step - begin) / (until - begin), 0), 1)) ** 3


class Program:
    """SGD with momentum and weight decay on latent values v, and on what a paper trains beside them.

    A paper says how `effective` weights come from v (`mask` is the present topology), and how the gradient with respect
    to these, G, reaches v (`pull`); both by hand.
    """

    lr: float | None = None
    decay: float | None = 0.0

    def __init__(self, options: dict[str, Any], model: nn.Module, seed: int) -> None:
        self.o = options
        self.model = model
        self.seed = seed
        self.t = 0
        self.shape = {n: tuple(p.shape) for n, p in model.named_parameters()}
        self.v = {n: p.detach().numpy().ravel().copy() for n, p in model.named_parameters()}
        self.sparse = [n for n, shape in self.shape.items() if len(shape) > 1]
        self.s = {n: self.first(n) for n in self.sparse}
        self.momentum: Arrays = {n: np.zeros_like(v) for n, v in self.v.items()}
        self.s_momentum: Arrays = {n: np.zeros_like(s) for n, s in self.s.items()}
        self.mask = {n: np.ones(self.v[n].size, bool) for n in self.sparse}
        self.lr = next((v for k, v in options.items() if k.endswith("_lr")), self.lr)
        self.decay = options.get("threshold_weight_decay", self.decay)
        self.choose()

    def first(self, n: str) -> Array:
        return np.zeros(0)

    def effective(self, n: str) -> Array:
        return self.v[n] * self.mask[n]

    def noisy(self, n: str) -> Array:
        return self.effective(n)

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        return G, np.zeros(0)

    def choose(self) -> None:
        raise NotImplementedError

    def stream(self, n: str) -> Stream:
        return Stream(self.seed, n, self.t)

    def train(self, batch: Batch) -> None:
        self.t += 1
        held = {n: self.noisy(n) if n in self.mask else v for n, v in self.v.items()}
        p = {n: torch.from_numpy(w).view(self.shape[n]).clone().requires_grad_() for n, w in held.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(self.model, p, (batch[0],)), batch[1])
        G = {n: g.numpy().ravel() for n, g in zip(p, torch.autograd.grad(loss, list(p.values())), strict=True)}
        for n in self.v:
            gv, gs = self.pull(n, G[n]) if n in self.mask else (G[n], np.zeros(0))
            self.momentum[n] = MOMENTUM * self.momentum[n] + gv + WEIGHT_DECAY * self.v[n]
            self.v[n] = self.v[n] - LR * self.momentum[n]
            if gs.size:
                decay = WEIGHT_DECAY if self.decay is None else self.decay
                self.s_momentum[n] = MOMENTUM * self.s_momentum[n] + gs + decay * self.s[n]
                self.s[n] = self.s[n] - (LR if self.lr is None else self.lr) * self.s_momentum[n]
        self.choose()

    def counts(self, density: float | None, score: Arrays) -> list[int]:
        sizes, allocate = [self.v[n].size for n in self.sparse], self.o.get("allocate", "uniform")
        if isinstance(allocate, dict):
            return [int(allocate[n] * self.v[n].size + 0.5) for n in self.sparse]
        assert density is not None
        total = int(np.floor(density * sum(sizes) + 0.5))
        if allocate == "globally":
            pooled = np.concatenate([score[n] for n in self.sparse])
            owner = np.repeat(self.sparse, sizes)[np.argsort(-pooled, kind="stable")[:total]]
            return [int((owner == n).sum()) for n in self.sparse]
        shares = [float(np.prod(self.shape[n]) if allocate == "uniform" else sum(self.shape[n])) for n in self.sparse]
        return share_out(shares, total, sizes)

    def highest(self, density: float | None, score: Arrays) -> Arrays:
        chosen = {}
        for n, count in zip(self.sparse, self.counts(density, score), strict=True):
            chosen[n] = np.isin(np.arange(score[n].size), top(score[n], count, np.arange(score[n].size)))
        return chosen

    def magnitudes(self) -> Arrays:
        return {n: np.abs(self.v[n]) for n in self.sparse}


class Straight(Program):
    """DNW and STE."""

    def choose(self) -> None:
        density, ramp = self.o["density"], self.o.get("ramp")
        self.mask = self.highest(density if ramp is None else cubic(1, density, 0, ramp, self.t), self.magnitudes())


class SrSte(Program):
    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        return G + self.o.get("decay", 2e-4) * self.v[n] * ~self.mask[n], np.zeros(0)

    def choose(self) -> None:
        if self.o.get("n") is None:
            self.mask = self.highest(self.o["density"], self.magnitudes())
            return
        for n in self.sparse:
            groups = np.abs(self.v[n]).reshape(-1, self.o["m"])
            best = np.argsort(-groups, axis=1, kind="stable")[:, : self.o["n"]]
            chosen = np.zeros(groups.shape, bool)
            np.put_along_axis(chosen, best, True, axis=1)
            self.mask[n] = chosen.ravel()


class SSte(Program):
    """The groups of a line end where its inputs do."""

    def groups(self, n: str) -> list[Array]:
        shape, m = self.shape[n], self.o.get("m", 4)
        lines = np.moveaxis(np.arange(self.v[n].size).reshape(shape), 1, -1).reshape(-1, shape[1])
        return [line[i : i + m] for line in lines for i in range(0, line.size, m)]

    def soft(self, n: str) -> Array:
        found = np.zeros(self.v[n].size)
        for group in self.groups(n):
            v, kept = self.v[n][group], self.mask[n][group]
            found[group] = np.sign(v) * np.maximum(np.abs(v) - max(np.abs(v[~kept]), default=0.0), 0)
        return found

    def effective(self, n: str) -> Array:
        return self.beta[n] * self.soft(n)

    def choose(self) -> None:
        of, m = self.o.get("n", 2), self.o.get("m", 4)
        for n, count in zip(self.sparse, self.counts(of / m, {}), strict=True):
            self.mask[n] = in_pattern(np.abs(self.v[n]), self.shape[n], count, of, m)
        if self.t == 0:
            soft = {n: self.soft(n) for n in self.sparse}
            self.beta = {n: self.v[n] @ s / (s @ s) for n, s in soft.items()}


class TopKast(Program):
    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        weight = self.mask[n] + (self.B[n] & ~self.mask[n]) / self.o["density"]
        return G * self.B[n] + self.o.get("penalty", 1e-4) * weight * np.sign(self.v[n]), np.zeros(0)

    def choose(self) -> None:
        if self.t % self.o.get("interval", 1) == 0:
            self.mask = self.highest(self.o["density"], self.magnitudes())
            self.B = self.highest(self.o["backward_density"], self.magnitudes())


class DynaDiag(Program):
    decay = None

    def diagonal(self, n: str) -> Array:
        shape = (self.shape[n][0], self.v[n].size // self.shape[n][0])
        i, j = np.indices(shape)
        return ((i - j) % shape[0] if shape[0] >= shape[1] else (j - i) % shape[1]).ravel()

    def first(self, n: str) -> Array:
        number = int(self.diagonal(n).max()) + 1
        return np.full(number, 1 / number)

    def chosen(self, n: str) -> int:
        counts = dict(zip(self.sparse, self.counts(self.o["density"], {}), strict=True))
        return math.ceil(counts[n] / (self.v[n].size / self.s[n].size))

    def shares(self, n: str) -> Array:
        power = np.exp(self.s[n] / self.T - (self.s[n] / self.T).max())
        return self.chosen(n) * power / power.sum()

    def effective(self, n: str) -> Array:
        if self.T == 0:
            return self.v[n] * self.mask[n]
        return self.v[n] * np.minimum(self.shares(n), 1)[self.diagonal(n)]

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        if self.T == 0:
            return G * self.mask[n], np.zeros(0)
        share, on = self.shares(n), self.diagonal(n)
        through = np.bincount(on, G * self.v[n]) * (share <= 1)
        # The softmax is s = share / K; of K s_p the derivative by alpha_q is K (s_p [p = q] - s_p s_q) / T.
        slope = (share * through - share * (share @ through) / self.chosen(n)) / self.T
        return G * np.minimum(share, 1)[on], slope

    def choose(self) -> None:
        high, low, until = self.o.get("temperature", 5.0), self.o.get("last_temperature", 0.05), self.o["until"]
        self.T = low + (high - low) * (1 + math.cos(math.pi * self.t / until)) / 2 if self.t < until else 0.0
        if self.t == until:
            for n in self.sparse:
                best = top(self.s[n], self.chosen(n), np.arange(self.s[n].size))
                self.mask[n] = np.isin(self.diagonal(n), best)


def best_rows(M: Array) -> Array:
    """The row of each column in the permutation of largest sum, from the best sums of all sets of rows."""
    sets = np.arange(2 ** len(M))
    size = sum(sets >> i & 1 for i in range(len(M)))
    best, last = np.where(sets == 0, 0.0, -np.inf), np.zeros(sets.size, int)
    for column in range(len(M)):
        of = sets[size == column + 1]
        for row in range(len(M)):
            held = of[of >> row & 1 == 1]
            total = best[held ^ 1 << row] + M[row, column]
            better = total > best[held]
            best[held[better]], last[held[better]] = total[better], row
    rows, left = np.zeros(len(M), int), int(sets[-1])
    for column in reversed(range(len(M))):
        rows[column] = last[left]
        left ^= 1 << last[left]
    return rows


class PaDst(DynaDiag):
    decay = 0.0

    def first(self, n: str) -> Array:
        inputs, spread = self.shape[n][1], self.o.get("spread", 0.5)
        return ((1 - spread) * np.eye(inputs) + spread / inputs).ravel()

    def matrix(self, n: str) -> Array:
        return self.s[n].reshape(self.shape[n][1], -1)

    def lines(self, n: str, flat: Array) -> Array:
        """By output and position of the kernel, along the inputs."""
        return np.moveaxis(flat.reshape(self.shape[n]), 1, -1)

    def flat(self, lines: Array) -> Array:
        return np.moveaxis(lines, -1, 1).ravel()

    def effective(self, n: str) -> Array:
        mixed = self.lines(n, self.v[n] * self.pattern[n])
        return self.flat(mixed[..., self.order[n]] if self.order else mixed @ self.matrix(n))

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        g = self.lines(n, G)
        if self.order:
            back = np.zeros_like(g)
            back[..., self.order[n]] = g
            return self.flat(back) * self.pattern[n], np.zeros(0)
        M, held = self.matrix(n), self.lines(n, self.v[n] * self.pattern[n])
        away = 2 * np.sign(M) - M / np.linalg.norm(M, axis=0) - M / np.linalg.norm(M, axis=1)[:, None]
        slope = np.tensordot(held, g, axes=(range(held.ndim - 1), range(g.ndim - 1)))
        return self.flat(g @ M.T), (slope + self.o.get("penalty", 1e-4) * away).ravel()

    def chosen_pattern(self, n: str, count: int) -> Array:
        score, structure = np.abs(self.v[n]), self.o.get("structure", "diagonals")
        if structure == "pairs":
            return in_pattern(score, self.shape[n], count, 1, 2)
        of = self.diagonal(n) if structure == "diagonals" else units_of(self.shape[n], structure)
        sizes = np.bincount(of)
        number = min(range(1, sizes.size + 1), key=lambda k: (abs(k * sizes[0] - count), k))
        return np.isin(of, top(np.bincount(of, score) / sizes, number, np.arange(sizes.size)))

    def choose(self) -> None:
        until = self.o["until"]
        if self.t == 0:
            self.pattern, self.order = {}, {}
        if self.t > until:
            return
        for n in self.sparse if self.t else ():
            M = np.maximum(self.matrix(n), 0)
            M = M / M.sum(0)
            self.s[n] = (M / M.sum(1, keepdims=True)).ravel()
        if self.t % self.o.get("interval", 100) == 0 or self.t == until:
            counts = self.counts(self.o["density"], self.magnitudes())
            self.pattern = {n: self.chosen_pattern(n, c) for n, c in zip(self.sparse, counts, strict=True)}
        if self.t == until:
            for n in self.sparse:
                M = self.matrix(n)
                self.order[n] = best_rows(M)
                self.mask[n] = self.flat(self.lines(n, self.pattern[n])[..., self.order[n]])


class Str(Program):
    decay = None

    def first(self, n: str) -> Array:
        return np.full(1, self.o.get("initial", -10.0))

    def g(self, s: Any) -> Any:
        return sigmoid(s) if self.o.get("threshold", "sigmoid") == "sigmoid" else np.exp(s)

    def effective(self, n: str) -> Array:
        return np.sign(self.v[n]) * np.maximum(np.abs(self.v[n]) - self.g(self.s[n]), 0)

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        slope = (self.g(self.s[n] + 1e-6) - self.g(self.s[n] - 1e-6)) / 2e-6
        seen = G * (np.abs(self.v[n]) > self.g(self.s[n]))
        return seen, -slope * (np.sign(self.v[n]) * seen).sum()

    def choose(self) -> None:
        self.mask = {n: np.abs(self.v[n]) > self.g(self.s[n]) for n in self.sparse}


class Movement(Program):
    def first(self, n: str) -> Array:
        return np.zeros(self.v[n].size)

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        return G * self.mask[n], G * self.v[n]

    def choose(self) -> None:
        density = cubic(1, self.o["density"], self.o.get("begin", 0), self.o["until"], self.t)
        self.mask = self.highest(density, self.s)


class SoftMovement(Movement):
    lr = 1e-2

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        penalty = cubic(0, self.o.get("penalty", 1e-5), self.o.get("begin", 0), self.o["until"], self.t)
        p = sigmoid(self.s[n])
        return G * self.mask[n], G * self.v[n] + penalty * p * (1 - p)

    def choose(self) -> None:
        self.mask = {n: sigmoid(self.s[n]) > self.o.get("threshold", 0.1) for n in self.sparse}


class L0(Program):
    def first(self, n: str) -> Array:
        p = self.o.get("droprate", 0.5)
        return np.full(self.v[n].size, math.log((1 - p) / p))

    @property
    def beta(self) -> float:
        return float(self.o.get("temperature", 2 / 3))

    def soft(self, n: str) -> Array:
        u = np.clip(self.stream(n).uniform(self.v[n].size), 1e-6, 1 - 1e-6)
        return sigmoid((np.log(u) - np.log(1 - u) + self.s[n]) / self.beta)

    def effective(self, n: str) -> Array:
        return self.v[n] * np.clip(sigmoid(self.s[n]) * 1.2 - 0.1, 0, 1)

    def noisy(self, n: str) -> Array:
        return self.v[n] * np.clip(self.soft(n) * 1.2 - 0.1, 0, 1)

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        soft = self.soft(n)
        stretched = soft * 1.2 - 0.1
        inside = (stretched > 0) & (stretched < 1)
        p = sigmoid(self.s[n] - self.beta * math.log(0.1 / 1.1))
        slope = G * self.v[n] * inside * 1.2 * soft * (1 - soft) / self.beta
        return G * np.clip(stretched, 0, 1), slope + self.o.get("penalty", 0.1 / 60_000) * p * (1 - p)

    def choose(self) -> None:
        self.mask = {n: sigmoid(self.s[n]) * 1.2 - 0.1 > 0 for n in self.sparse}


class VariationalDropout(Program):
    def first(self, n: str) -> Array:
        return np.full(self.v[n].size, self.o.get("log_variance", -10.0))

    def log_alpha(self, n: str) -> Array:
        return np.clip(self.s[n] - np.log(self.v[n] ** 2 + 1e-8), -8, 8)

    def noisy(self, n: str) -> Array:
        return self.v[n] + np.exp(self.s[n] / 2) * self.stream(n).normal(self.v[n].size)

    def pull(self, n: str, G: Array) -> tuple[Array, Array]:
        a = self.log_alpha(n)
        p = sigmoid(1.8732 + 1.48695 * a)
        # Of 0.5 log(1 + 1 / alpha) the derivative by log alpha is -0.5 / (1 + alpha).
        slope = (-0.63576 * 1.48695 * p * (1 - p) - 0.5 / (1 + np.exp(a))) * (np.abs(a) < 8)
        slope *= self.o.get("penalty", 1 / 60_000)
        noise = self.stream(n).normal(self.v[n].size)
        through = G * noise * np.exp(self.s[n] / 2) / 2
        return G - slope * 2 * self.v[n] / (self.v[n] ** 2 + 1e-8), through + slope

    def choose(self) -> None:
        self.mask = {n: self.log_alpha(n) < self.o.get("threshold", 3.0) for n in self.sparse}


PAPERS: dict[str, Callable[[dict[str, Any], nn.Module, int], Program]] = {
    "dnw": Straight,
    "ste": Straight,
    "sr_ste": SrSte,
    "s_ste": SSte,
    "top_kast": TopKast,
    "dynadiag": DynaDiag,
    "pa_dst": PaDst,
    "str": Str,
    "movement": Movement,
    "soft_movement": SoftMovement,
    "l0": L0,
    "variational_dropout": VariationalDropout,
}
TRAINED = {
    "pa_dst": "permutation",
    "dynadiag": "alpha",
    "str": "threshold",
    "movement": "scores",
    "soft_movement": "scores",
    "l0": "log_alpha",
    "variational_dropout": "log_variance",
}
"""What is trained beside the latent values, by its name in a weight's state."""


def traced(kept: list[Arrays], weights: list[Arrays], **trained: Arrays) -> History:
    """Masks and evaluated weights at the start and after every step; then all that is trained, and its momentum."""
    evaluated = {f"weight after step {t}": w for t, w in enumerate(weights)}
    return History(kept, evaluated | {kind: arrays for kind, arrays in trained.items()})


def expected(name: str, options: dict[str, Any], kind: str, seed: int = 0) -> History:
    run = PAPERS[name](options, network(kind, seed), seed)
    shown = lambda: {n: run.effective(n) * run.mask[n] for n in run.sparse}  # noqa: E731
    kept, weights = [dict(run.mask)], [shown()]
    for batch in batches(kind, seed, STEPS):
        run.train(batch)
        kept.append(dict(run.mask))
        weights.append(shown())
    beside, pushed = ({n: a for n, a in arrays.items() if a.size} for arrays in (run.s, run.s_momentum))
    return traced(kept, weights, latent=run.v, momentum=run.momentum, beside=beside, momentum_beside=pushed)


def actual(name: str, options: dict[str, Any], kind: str, seed: int = 0) -> History:
    model = network(kind, seed)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, library(name, options), seed=seed)
    named = dict(model.named_parameters())
    shown = lambda: {w.name: named[w.name].detach().numpy().ravel().copy() for w in sparsifier.weights}  # noqa: E731
    kept, weights = [masks(sparsifier)], [shown()]
    for batch in batches(kind, seed, STEPS):
        backward(model, batch)
        optimizer.step()
        kept.append(masks(sparsifier))
        weights.append(shown())
    pushed = lambda p: optimizer.state[p]["momentum_buffer"].numpy().ravel()  # noqa: E731
    latent = {n: p.detach().numpy().ravel() for n, p in named.items()}
    latent |= {w.name: w.state["latent"].numpy().ravel() for w in sparsifier.weights}
    beside = {w.name: w.state[TRAINED[name]].numpy().ravel() for w in sparsifier.weights if name in TRAINED}
    own = [p for group in optimizer.param_groups[1:] for p in group["params"]]
    return traced(
        kept,
        weights,
        latent=latent,
        momentum={n: pushed(p) for n, p in named.items()},
        beside=beside,
        momentum_beside={n: pushed(p) for n, p in zip(beside, own, strict=True)},
    )


def require_same(found: History, wanted: History) -> None:
    assert_same(found, wanted, rtol=1e-7, atol=1e-11)


SHORT: dict[str, dict[str, Any]] = {
    "dnw": {"density": 0.3},
    "ste": {"density": 0.3},
    "sr_ste": {"density": 0.3},
    "s_ste": {},
    "top_kast": {"density": 0.3, "backward_density": 0.6},
    "dynadiag": {"density": 0.3, "until": 9, "temperature": 0.02, "last_temperature": 0.01},
    "pa_dst": {"density": 0.3, "until": 9, "interval": 3},
    "str": {"initial": -3.0},
    "movement": {"density": 0.3, "until": 9},
    "soft_movement": {"until": 9, "threshold": 0.4999, "penalty": 0.01},
    "l0": {"droprate": 0.9166, "penalty": 0.005},
    "variational_dropout": {"log_variance": -3.0, "penalty": 0.01},
}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("dnw", {}),
    ("dnw", {"allocate": "globally"}),
    ("ste", {}),
    ("ste", {"ramp": 9, "allocate": "erk"}),
    ("ste", {"ramp": 5, "allocate": "globally"}),
    ("sr_ste", {}),
    ("sr_ste", {"decay": 0.03}),
    ("s_ste", {}),
    ("s_ste", {"n": 1}),
    ("s_ste", {"n": 3, "m": 5}),
    ("top_kast", {}),
    ("top_kast", {"penalty": 0.02, "interval": 3, "allocate": "globally"}),
    ("top_kast", {"backward_density": 1.0, "allocate": "erk"}),
    ("dynadiag", {}),
    ("dynadiag", {"alpha_lr": 0.02, "allocate": "erk"}),
    ("dynadiag", {"temperature": 5.0, "last_temperature": 0.05, "until": 4, "density": 0.05}),
    ("pa_dst", {}),
    ("pa_dst", {"spread": 0.9, "penalty": 0.05, "permutation_lr": 0.5}),
    ("pa_dst", {"structure": "fives", "density": 0.5, "allocate": "erk"}),
    ("pa_dst", {"structure": "pairs", "density": 0.5, "until": 5}),
    ("str", {}),
    ("str", {"threshold": "exp", "threshold_lr": 0.05, "threshold_weight_decay": 0.3}),
    ("movement", {}),
    ("movement", {"begin": 2, "allocate": "globally"}),
    ("soft_movement", {}),
    ("soft_movement", {"begin": 3, "score_lr": None, "threshold": 0.5}),
    ("l0", {}),
    ("l0", {"droprate": 0.9, "temperature": 0.9, "gate_lr": 0.5, "penalty": 0.05}),
    ("variational_dropout", {}),
    ("variational_dropout", {"penalty": 0.1, "threshold": 1.0, "variance_lr": 0.5}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Property 1 and section 6.6: topologies, weights, latent values, what is beside them, and momentum."""
    for seed in range(3):
        wanted = expected(name, SHORT[name] | options, kind, seed)
        require_same(actual(name, SHORT[name] | options, kind, seed), wanted)
        # What is compared moves, and what is inactive comes back.
        first, last = wanted.masks[0], wanted.masks[-1]
        assert any((first[n] != last[n]).any() for n in first)


@pytest.mark.parametrize("options", [{"n": 2, "m": 4}, {"n": 1, "m": 4, "decay": 0.3}, {"n": 3, "m": 4}])
def test_a_pattern_run_is_that_of_the_paper(options: dict[str, Any]) -> None:
    for seed in range(3):
        wanted = expected("sr_ste", options, "fours", seed)
        require_same(actual("sr_ste", options, "fours", seed), wanted)
        for n, mask in wanted.masks[-1].items():
            assert (mask.reshape(-1, 4).sum(1) == options["n"]).all(), n


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(6, 5, 2), nn.Linear(6, 5), nn.Conv1d(6, 5, 3)])
def test_what_a_pattern_loses_is_continuous_and_its_factor_stays(layer: nn.Module) -> None:
    """S-STE: where an entry takes the place of another, both are zero; beta is that of the first values."""
    model = nn.Sequential(copy.deepcopy(layer)).double()
    first, axis = model[0].weight.detach().clone(), int(not isinstance(layer, nn.ConvTranspose2d))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME["s_ste"](n=1, m=3))
    groups = lambda t: t.movedim(axis, -1).reshape(-1, 3)  # noqa: E731
    dense = groups(first)
    large, middle, _ = dense.abs().sort(1, descending=True).values.T
    soft = torch.zeros_like(dense).scatter(1, dense.abs().argmax(1)[:, None], (large - middle)[:, None]) * dense.sign()
    beta = float((dense * soft).sum() / soft.square().sum())
    torch.testing.assert_close(groups(model[0].weight.detach()), beta * soft, rtol=1e-12, atol=1e-14)
    moved = False
    for _ in range(30):
        optimizer.zero_grad()
        old, topology = model[0].weight.detach().clone(), sparsifier.weights[0].topology
        (model[0].weight * torch.randn(first.shape).double()).sum().backward()
        step = 0.05 * float(model[0].weight.grad.abs().max())
        optimizer.step()
        # Neither a value nor a threshold moves by more than a step.
        assert float((model[0].weight - old).detach().abs().max()) <= beta * 2 * step * (1 + 1e-9)
        moved |= topology != sparsifier.weights[0].topology
    assert moved
    assert float(sparsifier.weights[0].state["scale"]) == pytest.approx(beta, rel=1e-12)


def test_a_weight_of_zeros_begins_with_a_factor_of_one() -> None:
    """S-STE: as last layers of residual branches begin; <v, w> / <w, w> would be 0 / 0."""
    model = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME["s_ste"]())
    assert float(sparsifier.weights[0].state["scale"]) == 1
    (model.weight * torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert int((model.weight != 0).sum()) == sparsifier.nnz == 16


NEEDED: dict[str, dict[str, Any]] = {
    "dnw": {"density": 0.3},
    "ste": {"density": 0.3},
    "sr_ste": {"density": 0.3},
    "top_kast": {"density": 0.3, "backward_density": 0.6},
    "dynadiag": {"density": 0.3, "until": 9},
    "pa_dst": {"density": 0.3, "until": 9},
    "movement": {"density": 0.3, "until": 9},
    "soft_movement": {"until": 9},
}


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_not_given_is_the_papers(name: str) -> None:
    """Property 48: a default is an option value too."""
    options = NEEDED.get(name, {})
    wanted = expected(name, options, "mlp")
    require_same(actual(name, options, "mlp"), wanted)
    assert not np.array_equal(
        wanted.trained["latent"]["0.weight"], network("mlp", 0)[0].weight.detach().numpy().ravel()
    )


FOURS = {"n": 2, "m": 4, "density": None}
DENSITY: Changes = [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)]
ALLOCATE: Changes = [({"allocate": "erk"}, 0), ({"allocate": "globally"}, 0)]
CASES: dict[str, dict[str, Changes]] = {
    "dnw": {"density": DENSITY, "allocate": ALLOCATE},
    "ste": {"density": DENSITY, "ramp": [({"ramp": 9}, 0), ({"ramp": 5}, 1, {"ramp": 9})], "allocate": ALLOCATE},
    "sr_ste": {
        "density": DENSITY,
        "n": [({"n": 1}, 0, FOURS)],
        "m": [({"m": 2}, 0, FOURS | {"n": 1})],
        "decay": [({"decay": 0.0}, 6), ({"decay": 0.03}, 1)],
        "allocate": ALLOCATE,
    },
    "s_ste": {"n": [({"n": 1}, 0)], "m": [({"m": 3}, 0)]},
    "top_kast": {
        "density": DENSITY[:1],
        "backward_density": [({"backward_density": 1.0}, 11), ({"backward_density": 0.3}, 1)],
        "penalty": [({"penalty": 0.0}, 6), ({"penalty": 0.02}, 1)],
        "interval": [({"interval": 3}, 1)],
        "allocate": ALLOCATE,
    },
    "dynadiag": {
        "density": [({"density": 0.5}, 9), ({"density": None, "allocate": EXPLICIT}, 9)],
        "until": [({"until": 5}, 5)],
        "temperature": [({"temperature": 0.5}, 9)],
        "last_temperature": [({"last_temperature": 0.001}, 9)],
        "alpha_lr": [({"alpha_lr": 0.01}, 9)],
        "allocate": [({"allocate": "erk"}, 9)],
    },
    "pa_dst": {
        "density": [({"density": 0.5}, 9), ({"density": None, "allocate": EXPLICIT}, 9)],
        "until": [({"until": 5}, 5)],
        "interval": [({"interval": 1}, 9, {"structure": "pairs", "density": 0.5})],
        "penalty": [({"penalty": 1.0}, 9)],
        "spread": [({"spread": 0.9}, 9)],
        "permutation_lr": [({"permutation_lr": 1.0}, 9)],
        "allocate": [({"allocate": "erk"}, 9)],
        "structure": [({"structure": "fives"}, 9), ({"structure": "pairs"}, 9, {"density": 0.5})],
    },
    "str": {
        "initial": [({"initial": -2.0}, 0)],
        "threshold": [({"threshold": "exp"}, 0)],
        "threshold_lr": [({"threshold_lr": 0.5}, 2), ({"threshold_lr": 0.0}, 7)],
        "threshold_weight_decay": [({"threshold_weight_decay": 0.3}, 2), ({"threshold_weight_decay": 0.0}, 7)],
    },
    "movement": {
        "density": [({"density": 0.2}, 1)],
        "until": [({"until": 7}, 1)],
        "begin": [({"begin": 3}, 1)],
        "allocate": [({"allocate": "erk"}, 1), ({"allocate": "globally"}, 1)],
    },
    "soft_movement": {
        "until": [({"until": 5}, 2)],
        "begin": [({"begin": 3}, 2)],
        "threshold": [({"threshold": 0.4995}, 2), ({"threshold": 0.5}, 0)],
        "penalty": [({"penalty": 0.0}, 2), ({"penalty": 0.1}, 2)],
        "score_lr": [({"score_lr": None}, 1), ({"score_lr": 0.001}, 2)],
    },
    "l0": {
        "penalty": [({"penalty": 0.0}, 3), ({"penalty": 0.05}, 1)],
        "droprate": [({"droprate": 0.9}, 2), ({"droprate": 0.93}, 0)],
        "temperature": [({"temperature": 0.9}, 3)],
        "gate_lr": [({"gate_lr": 0.5}, 1), ({"gate_lr": 0.0}, 2)],
    },
    "variational_dropout": {
        "penalty": [({"penalty": 0.0}, 2), ({"penalty": 0.1}, 1)],
        "threshold": [({"threshold": 1.0}, 0)],
        "log_variance": [({"log_variance": -4.0}, 0)],
        "variance_lr": [({"variance_lr": 0.5}, 7), ({"variance_lr": 0.0}, 5)],
    },
}


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    kind = "fours" if "m" in both else "conv"
    require_predicted_difference(name, expected, SHORT[name], change, first, both, kind, actual)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (name, {"density": d}, rf"density must lie in \(0, 1\], got {d:g}")
        for name in list(NEEDED)[:3]
        for d in (0.0, 1.5)
    ),
    ("movement", {"density": -1.0}, r"density must lie in \(0, 1\], got -1"),
    ("top_kast", {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    ("ste", {"ramp": 0}, "the ramp must take 1 step or more, got 0"),
    ("ste", {"ramp": 7, "density": None}, "a ramp of 7 steps needs a density to end at, and density is None"),
    ("sr_ste", {"n": 2}, "n and m belong together, got n = 2 and m = None"),
    ("sr_ste", {"m": 4}, "n and m belong together, got n = None and m = 4"),
    ("sr_ste", {"n": 2, "m": 4}, "the pattern 2:4 is a density already, and density is 0.3: give one"),
    ("sr_ste", {"decay": -1.0}, "decay must be at least 0, got -1"),
    ("top_kast", {"backward_density": 0.2}, "backward_density must lie from the density, 0.3, to 1, got 0.2"),
    ("top_kast", {"backward_density": 1.2}, "backward_density must lie from the density, 0.3, to 1, got 1.2"),
    ("top_kast", {"penalty": -1.0}, "penalty must be at least 0, got -1"),
    ("top_kast", {"interval": 0}, "choices must be at least 1 step apart, got interval 0"),
    ("dynadiag", {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    ("dynadiag", {"until": 0}, "until must be step 1 or later, got 0"),
    ("dynadiag", {"last_temperature": 0.0}, "T must fall and stay above 0, got temperature 0.02 and last_tem.* 0"),
    ("dynadiag", {"last_temperature": 9.0}, "T must fall and stay above 0, got temperature 0.02 and last_tem.* 9"),
    ("dynadiag", {"alpha_lr": -1.0}, "alpha_lr must be at least 0, got -1"),
    ("pa_dst", {"density": 2.0}, r"density must lie in \(0, 1\], got 2"),
    ("pa_dst", {"until": 0}, "until and interval must be at least 1 step, got 0 and 3"),
    ("pa_dst", {"interval": 0}, "until and interval must be at least 1 step, got 9 and 0"),
    ("pa_dst", {"spread": 1.5}, r"spread must lie in \[0, 1\], got 1.5"),
    ("pa_dst", {"penalty": -1.0}, "penalty must be at least 0, got -1"),
    ("pa_dst", {"permutation_lr": -1.0}, "permutation_lr must be at least 0, got -1"),
    ("str", {"threshold": "relu"}, "threshold must be one of sigmoid, exp, got 'relu'"),
    ("str", {"threshold_lr": -1.0}, "threshold_lr must be at least 0, got -1"),
    ("str", {"threshold_weight_decay": -1.0}, "threshold_weight_decay must be at least 0, got -1"),
    ("soft_movement", {"threshold": 1.0}, r"threshold must lie in \(0, 1\), got 1"),
    ("soft_movement", {"penalty": -1.0}, "penalty must be at least 0, got -1"),
    ("soft_movement", {"score_lr": -1.0}, "score_lr must be at least 0, got -1"),
    ("l0", {"penalty": math.nan}, "penalty must be at least 0, got nan"),
    ("l0", {"droprate": 0.0}, r"droprate must lie in \(0, 1\), got 0"),
    ("l0", {"temperature": 0.0}, "temperature must be above 0, got 0"),
    ("l0", {"gate_lr": -1.0}, "gate_lr must be at least 0, got -1"),
    ("variational_dropout", {"penalty": -1.0}, "penalty must be at least 0, got -1"),
    ("variational_dropout", {"variance_lr": -1.0}, "variance_lr must be at least 0, got -1"),
]


@pytest.mark.parametrize(("name", "change", "told"), REFUSED)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        BY_NAME[name](**(SHORT[name] | change))


def test_a_pattern_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^n_of_m: n must lie in \[1, m\], got n = 5 and m = 4"):
        BY_NAME["s_ste"](n=5, m=4)


@pytest.mark.parametrize("name", ["movement", "soft_movement"])
def test_a_ramp_that_ends_before_it_begins_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="begin is 9, until is 9"):
        BY_NAME[name](**(SHORT[name] | {"begin": 9}))


def test_a_density_that_leaves_nothing_is_refused_before_anything_changes() -> None:
    for method in (BY_NAME["dnw"](0.001), BY_NAME["top_kast"](0.001, backward_density=0.5)):
        model = network("mlp", 0)
        optimizer, before = sgd(model), {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="makes none of the 240 sparsified ones active"):
            regrow.sparsify(model, optimizer, method)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("threshold", ["sigmoid", "exp"])
def test_the_gradient_of_a_soft_threshold_is_that_of_finite_differences(threshold: str) -> None:
    """The first step of s, without momentum or decay, is -lr dL/ds of the loss of a network that autograd never saw."""
    model, batch = network("mlp", 3), batches("mlp", 3)[0]
    v = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = torch.sigmoid if threshold == "sigmoid" else torch.exp

    def loss(s: dict[str, float]) -> float:
        w = {
            n: t.sign() * (t.abs() - float(g(torch.tensor(s[n], dtype=torch.float64)))).clamp(min=0) if n in s else t
            for n, t in v.items()
        }
        return float(nn.functional.cross_entropy(torch.func.functional_call(model, w, (batch[0],)), batch[1]))

    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    at = dict.fromkeys(names, -2.5)
    slopes = {n: (loss(at | {n: -2.5 + 1e-5}) - loss(at | {n: -2.5 - 1e-5})) / 2e-5 for n in names}
    sparsifier = regrow.sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1), BY_NAME["str"](initial=-2.5, threshold=threshold)
    )
    backward(model, batch)
    sparsifier.optimizers[0].step()
    for weight in sparsifier.weights:
        moved = float(weight.state["threshold"]) + 2.5
        assert moved == pytest.approx(-0.1 * slopes[weight.name], rel=1e-4)
        assert abs(moved) > 1e-6


@pytest.mark.parametrize("name", ["dnw", "ste", "sr_ste", "movement", "top_kast"])
def test_a_constant_gradient_brings_an_inactive_entry_back(name: str) -> None:
    """Section 6.6: what reaches an inactive entry is the gradient with respect to the weight that is used."""
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight[:] = torch.tensor([[1.0, -0.9, 0.2, 0.1]])
    options = {"movement": {"until": 1}, "top_kast": {"backward_density": 0.75, "penalty": 0.0}}.get(name, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME[name](0.5, **options))
    direction = torch.tensor([0.0, 0.0, -1.0, -1.0]).double()
    for _ in range(12):
        optimizer.zero_grad()
        model(direction).sum().backward()
        optimizer.step()
    wanted = {"top_kast": [0, 2], "movement": [2, 3]}.get(name, [2, 3])
    assert sparsifier.topologies["weight"].indices.tolist() == wanted
    assert model.weight[0].nonzero().view(-1).tolist() == wanted


def test_outside_the_backward_set_nothing_is_trained() -> None:
    """Top-KAST: neither loss nor penalty moves what lies outside B, and a clipped norm does not count it."""
    model, batch = network("mlp", 0), batches("mlp", 0)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME["top_kast"](0.2, backward_density=0.5, penalty=0.1))
    for weight in sparsifier.weights:
        assert int(weight.state["backward"].sum()) == pytest.approx(0.5 * weight.topology.numel, abs=1)
        assert bool(weight.state["backward"][weight.topology.mask].all())
    reached = {w.name: w.state["backward"].clone() for w in sparsifier.weights}
    before = {w.name: w.state["latent"].clone() for w in sparsifier.weights}
    backward(model, batch)
    for name, parameter in model.named_parameters():
        if name in reached:
            assert not parameter.grad[~reached[name]].any()
            assert parameter.grad[reached[name]].any()
    optimizer.step()
    for weight in sparsifier.weights:
        assert torch.equal(weight.state["latent"] != before[weight.name], reached[weight.name])


def test_the_backward_set_holds_all_that_is_used_even_where_rounding_gives_it_fewer() -> None:
    """Top-KAST: of 6, 6 and 2 entries 10 are 4, 4 and 2, and 11 are 5, 5 and 1: the last B gets those of A."""
    layers = [nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = BY_NAME["top_kast"](10 / 14, backward_density=11 / 14)
    sparsifier = regrow.sparsify(model, optimizer, method)
    assert [w.topology.nnz for w in sparsifier.weights] == [4, 4, 2]
    assert [int(w.state["backward"].sum()) for w in sparsifier.weights] == [5, 5, 2]
    assert all(bool(w.state["backward"][w.topology.mask].all()) for w in sparsifier.weights)


def test_a_soft_threshold_reads_no_gradient_of_what_it_hides() -> None:
    """So that a clipped norm is that of the entries that train."""
    model = network("mlp", 0)
    sparsifier = regrow.sparsify(model, sgd(model), BY_NAME["str"](initial=-2.0))
    backward(model, batches("mlp", 0)[0])
    for name, topology in sparsifier.topologies.items():
        grad = dict(model.named_parameters())[name].grad
        assert 0 < topology.nnz < topology.numel
        assert not grad[~topology.mask].any() and grad[topology.mask].any()


def test_a_weight_that_loses_its_last_entry_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = network("mlp", 0)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME["str"](initial=-8.0, threshold="exp", threshold_lr=0.0))
    with torch.no_grad():
        for group in optimizer.param_groups[1:]:
            for tensor in group["params"][:1]:
                tensor.fill_(3.0)
    backward(model, batches("mlp", 0)[0])
    optimizer.step()
    assert sparsifier.topologies["0.weight"].nnz == 0
    assert caplog.messages == ["step 1: the last of the 96 entries of 0.weight went"]


def test_diverged_values_are_named() -> None:
    for name in ("dnw", "str", "soft_movement"):
        model = network("mlp", 0)
        optimizer = sgd(model)
        sparsifier = regrow.sparsify(model, optimizer, BY_NAME[name](**SHORT[name]))
        sparsifier.weights[1].state["latent"][0, 0] = math.nan
        backward(model, batches("mlp", 0)[0])
        with pytest.raises(ValueError, match=r"2\.weight: 1 of 108 (scores|values) are NaN"):
            optimizer.step()
