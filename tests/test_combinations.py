"""Every drop with every growth and every redistribution: one update predicted in NumPy, all counts conserved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regrow
from regrow.app.vocabulary import DROPS, GROWTHS, REDISTRIBUTIONS
from regrow.core.draws import Stream
from regrow.core.method import Method, Need, Regrow
from regrow.core.topology import Topology
from regrow.core.weight import Weights
from regrow.parts.allocation import uniform
from regrow.parts.growth import at_random
from regrow.parts.observers import keep_momentum
from regrow.parts.schedules import constant
from regrow.parts.starts import random_topology
from regrow.parts.updates import drop_and_grow, every
from support.fakes import Fake
from support.paper import Array, batches, network, share_out, top

FRACTION, DECAY = 0.4, 0.9


@dataclass
class Layer:
    """What an update may read of one weight, dense and flat."""

    name: str
    shape: tuple[int, ...]
    w: Array
    active: Array
    g: Array
    ema: Array
    draws: Stream
    kept: Array = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def at(self) -> Array:
        return np.flatnonzero(self.active)

    @property
    def lost(self) -> int:
        return int(self.active.sum() - self.kept.sum())

    def keep(self, positions: Array) -> None:
        self.kept = np.isin(np.arange(self.w.size), positions)

    def keep_highest(self, score: Array, gone: int) -> None:
        self.keep(top(score, self.at.size - gone, self.at))


Layers = list[Layer]


def asked(layer: Layer) -> int:
    return int(np.floor(FRACTION * layer.at.size + 1e-9))


def per_sign(layers: Layers) -> None:
    for x in layers:
        signs = [x.at[x.w[x.at] > 0], x.at[x.w[x.at] < 0]]
        x.keep(np.concatenate([top(abs(x.w), s.size - int(np.ceil(FRACTION * s.size - 1e-9)), s) for s in signs]))


def threshold(layers: Layers) -> None:
    for x in layers:
        above = x.at[abs(x.w[x.at]) > 1e-3]
        x.keep(above if above.size else top(abs(x.w), 1, x.at))


def global_magnitude(layers: Layers) -> None:
    order = sorted((-abs(x.w[i]), place, i) for place, x in enumerate(layers) for i in x.at)
    stays = {min(e for e in order if e[1] == place) for place, x in enumerate(layers) if x.at.size}
    rest = [e for e in order if e not in stays]
    stays |= set(rest[: len(order) - sum(map(asked, layers)) - len(stays)])
    for place, x in enumerate(layers):
        x.keep(np.array([i for _, p, i in stays if p == place], dtype=int))


def random_drop(layers: Layers) -> None:
    for x in layers:
        score = np.zeros(x.w.size)
        score[x.at] = x.draws.uniform(x.at.size)
        x.keep_highest(score, asked(x))


def each(score: Callable[[Layer], Array]) -> Callable[[Layers], None]:
    def drop(layers: Layers) -> None:
        for x in layers:
            x.keep_highest(score(x), asked(x))

    return drop


DROP: dict[str, Callable[[Layers], None]] = {
    "magnitude": each(lambda x: abs(x.w)),
    "taylor": each(lambda x: (x.w * x.g) ** 2),
    "per_sign": per_sign,
    "threshold": threshold,
    "global_magnitude": global_magnitude,
    "random": random_drop,
}


def drawn(x: Layer, count: int, among: Array) -> Array:
    return among[x.draws.subset(among.size, count)]


def free(x: Layer, *taken: Array) -> Array:
    return np.setdiff1d(np.flatnonzero(~x.kept), np.concatenate([np.zeros(0, int), *taken]))


def unexplored_first(x: Layer, count: int) -> Array:
    never = np.flatnonzero(~x.active)
    chosen = drawn(x, min(count, never.size), never)
    return np.concatenate([chosen, drawn(x, count - chosen.size, free(x, chosen))]) if count > chosen.size else chosen


def half_by_gradient(x: Layer, count: int) -> Array:
    chosen = top(abs(x.g), count // 2, free(x))
    return np.concatenate([chosen, drawn(x, count - count // 2, free(x, chosen))])


def shared(shares: Sequence[float], total: int, room: Sequence[int]) -> list[int]:
    """By share; what those with a share cannot hold goes to the dead ones by their room."""
    alive = [s > 0 for s in shares]
    first = min(total, sum(r for r, a in zip(room, alive, strict=True) if a))
    counts = [0] * len(shares)
    for part, among, weight in ((first, True, shares), (total - first, False, room)):
        places = [i for i, a in enumerate(alive) if a == among]
        if part:
            found = share_out([float(weight[i]) for i in places], part, [room[i] for i in places])
            counts = [found[places.index(i)] if i in places else n for i, n in enumerate(counts)]
    return counts


def per_neuron(x: Layer, count: int) -> Array:
    neuron = np.arange(x.w.size) // (x.w.size // x.shape[0])
    groups = [free(x)[neuron[free(x)] == n] for n in range(x.shape[0])]
    means = [abs(x.ema[neuron == n]).mean() for n in range(x.shape[0])]
    quotas = shared(means, count, [g.size for g in groups])
    return np.concatenate([top(abs(x.ema), q, g) for q, g in zip(quotas, groups, strict=True)])


def sampled(x: Layer, count: int) -> Array:
    return top(abs(x.g), count, drawn(x, min(free(x).size, max(count, x.at.size)), free(x)))


GROW: dict[str, Callable[[Layer, int], Array]] = {
    "gradient": lambda x, count: top(abs(x.g), count, free(x)),
    "momentum": lambda x, count: top(abs(x.ema), count, free(x)),
    "random": lambda x, count: drawn(x, count, free(x)),
    "unexplored_first": unexplored_first,
    "mixed": half_by_gradient,
    "momentum_neuron": per_neuron,
    "sampled": sampled,
}

SHARE: dict[str, Callable[[Layer], float]] = {
    "momentum": lambda x: abs(x.ema[x.at]).mean(),
    "magnitude": lambda x: abs(x.w[x.at]).mean(),
    "nonzeros": lambda x: np.count_nonzero(x.w[x.at]),
    "survivors": lambda x: x.kept.sum(),
}


def predicted(layers: Layers, drop: str, grow: str, redistribute: str) -> list[Array]:
    DROP[drop](layers)
    counts = [x.lost for x in layers]
    if redistribute != "none" and sum(counts):
        room = [int((~x.kept).sum()) for x in layers]
        counts = shared([float(SHARE[redistribute](x)) for x in layers], sum(counts), room)
    return [
        np.sort(np.concatenate([np.flatnonzero(x.kept), GROW[grow](x, n)])) for x, n in zip(layers, counts, strict=True)
    ]


class Observed:
    """A small convolutional network, its method, and its dense gradients as autograd finds them from dense copies."""

    def __init__(self, drop: str, grow: str, redistribute: str, density: float, storage: Any) -> None:
        self.model = network("conv", 0)
        with torch.no_grad():
            # Some values must lie under the threshold.
            self.model[0].weight.mul_(0.01)
        self.bare = network("conv", 0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        update = drop_and_grow(constant(FRACTION), DROPS[drop], GROWTHS[grow], REDISTRIBUTIONS[redistribute])
        method = Method(
            "m",
            random_topology(density, uniform),
            every(2, update, until=9),
            observe=keep_momentum(DECAY),
            needs=Need.EVERY_GRADIENT | Need.EXPLORED | Need.ROOM,
        )
        self.sparsifier = regrow.sparsify(self.model, self.optimizer, method, storage=storage, allow_dense=True)
        self.ema = {w.name: np.zeros(w.topology.numel) for w in self.sparsifier.weights}

    def layers(self, batch: tuple[Tensor, Tensor], step: int) -> Layers:
        dense = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        for weight in self.sparsifier.weights:
            flat = torch.zeros(weight.topology.numel, dtype=torch.float64)
            flat[weight.topology.indices] = weight.values()
            dense[weight.name] = flat.view(weight.shape)
        leaves = {n: t.requires_grad_() for n, t in dense.items()}
        loss = F.cross_entropy(torch.func.functional_call(self.bare, leaves, (batch[0],)), batch[1])
        found = []
        for weight in self.sparsifier.weights:
            (grad,) = torch.autograd.grad(loss, leaves[weight.name], retain_graph=True)
            g = grad.numpy().ravel()
            self.ema[weight.name] = DECAY * self.ema[weight.name] + (1 - DECAY) * g
            w, active = dense[weight.name].detach().numpy().ravel(), weight.topology.mask.numpy().ravel()
            draws = Stream(0, weight.name, step)
            found.append(Layer(weight.name, weight.shape, w, active, g, self.ema[weight.name], draws))
        return found

    def step(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(batch[0]), batch[1]).backward()
        self.optimizer.step()
        return [w.topology.indices for w in self.sparsifier.weights]


@pytest.mark.parametrize(("storage", "density"), [("masked", 0.3), ("compressed", 0.85)])
@pytest.mark.parametrize(("drop", "grow", "redistribute"), list(product(DROPS, GROWTHS, REDISTRIBUTIONS)))
def test_every_combination_is_the_one_predicted_and_conserves_its_counts(
    drop: str, grow: str, redistribute: str, density: float, storage: str
) -> None:
    """Properties 1, 3, 4, 5, 8, 27 and 29; at density 0.85 weights fill up. A new word needs its NumPy line here."""
    run = Observed(drop, grow, redistribute, density, storage)
    before = [w.topology.indices for w in run.sparsifier.weights]
    for step, batch in enumerate(batches("conv", 0, 4), start=1):
        layers = run.layers(batch, step)
        after = run.step(batch)
        if step == 2:
            wanted = predicted(layers, drop, grow, redistribute)
            assert [a.tolist() for a in after] == [p.tolist() for p in wanted]
            assert any(x.lost for x in layers)
        assert sum(a.numel() for a in after) == sum(b.numel() for b in before)
        assert redistribute != "none" or [a.numel() for a in after] == [b.numel() for b in before]
        assert all(a.unique().numel() == a.numel() for a in after)
        before = after
    assert run.sparsifier.updates == 2


def test_every_word_has_its_line() -> None:
    assert (DROP.keys(), GROW.keys(), SHARE.keys() | {"none"}) == (
        DROPS.keys(),
        GROWTHS.keys(),
        REDISTRIBUTIONS.keys(),
    )


class Whole(Fake):
    """A weight that every growth and redistribution can read."""

    def __init__(self, name: str, numel: int, nnz: int, draw: np.random.Generator) -> None:
        at = np.sort(draw.permutation(numel)[:nnz]).tolist()
        super().__init__(draw.normal(size=numel).tolist(), at, draw.normal(size=numel).tolist(), name)
        self.state["momentum"] = torch.from_numpy(draw.normal(size=numel))
        self.state["explored"] = self.topology.mask.view(-1).clone()

    def grads_at(self, positions: Tensor) -> Tensor:
        assert self.grad is not None
        return self.grad[positions]


POLICIES: list[Regrow] = ["keep", "reset", "forbid"]


def test_totals_are_conserved_over_a_thousand_random_updates() -> None:
    """Property 28: any drop, growth, redistribution, policy and fraction; an empty, a full and a dead weight."""
    draw = np.random.default_rng(0)
    weights = [Whole(f"w{i}", n, k, draw) for i, (n, k) in enumerate([(17, 0), (9, 9), (40, 11), (23, 20), (31, 5)])]
    for step in range(1, 1001):
        for weight in weights:
            weight.generator = Stream(step, weight.name, step)
            weight.dense = torch.from_numpy(draw.normal(scale=0.01, size=weight.dense.numel()))
            weight.dense *= weight.topology.mask.view(-1) * (0 if draw.random() < 0.1 else 1)
            weight.state["momentum"] *= 0 if draw.random() < 0.1 else 1
            weight.state["explored"] |= weight.topology.mask.view(-1)
        words = [str(draw.choice(list(table))) for table in (DROPS, GROWTHS, REDISTRIBUTIONS)]
        (rule,) = drop_and_grow(
            constant(float(draw.random())),
            DROPS[words[0]],
            GROWTHS[words[1]],
            REDISTRIBUTIONS[words[2]],
            POLICIES[draw.integers(3)],
        )
        rule.apply(Weights(tuple(weights)), step)
        assert sum(w.topology.nnz for w in weights) == 45, (step, words)
        assert all(w.topology.nnz <= w.topology.numel for w in weights)


@pytest.mark.parametrize("word", [w for w in REDISTRIBUTIONS if w != "none"])
@pytest.mark.parametrize("full", [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)])
def test_full_weights_receive_nothing(word: str, full: tuple[int, int, int]) -> None:
    """Property 27, saturation patterns: with "forbid" a full weight neither loses nor gets anything."""
    draw = np.random.default_rng(1)
    weights = [Whole(f"w{i}", 20, 20 if f else 12, draw) for i, f in enumerate(full)]
    before = [w.topology for w in weights]
    (rule,) = drop_and_grow(
        constant(0.9), DROPS["magnitude"], GROWTHS["random"], REDISTRIBUTIONS[word], regrow_dropped="forbid"
    )
    rule.apply(Weights(tuple(weights)), 1)
    assert sum(w.topology.nnz for w in weights) == sum(t.nnz for t in before)
    for weight, topology, f in zip(weights, before, full, strict=True):
        assert (weight.topology == topology) == bool(f)


def test_set_grows_uniformly_whatever_the_gradient() -> None:
    """Property 25: every candidate as often as any other (chi-square), the just-dropped among them."""
    seen, rounds, count = np.zeros(30), 3000, 4
    for seed in range(rounds):
        weight = Fake(range(30, 0, -1), range(10), [1e6] * 15 + [0.0] * 15)
        weight.generator = Stream(seed, "w", 1)
        (rule,) = drop_and_grow(constant(0.4), DROPS["magnitude"], at_random)
        rule.apply(Weights((weight,)), 1)
        seen[weight.topology.indices.numpy()] += 1
    assert (seen[:6] == rounds).all()
    share = count / 24
    want = rounds * share
    assert ((seen[6:] - want) ** 2 / (want * (1 - share))).sum() < 23 + 4 * (2 * 23) ** 0.5


def test_topologies_are_those_of_the_modules() -> None:
    """The runs above read what is active from the tensors themselves."""
    run = Observed("magnitude", "random", "none", 0.3, "masked")
    for batch in batches("conv", 0, 2):
        run.step(batch)
    for name, parameter in run.model.named_parameters():
        if parameter.dim() > 1:
            inside = Topology(tuple(parameter.shape), parameter.view(-1).nonzero().view(-1))
            assert not inside.without(run.sparsifier.topologies[name]).numel()
