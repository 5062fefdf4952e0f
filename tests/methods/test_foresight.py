"""SNIP-it, SNAP-it, GraSP, SynFlow and FORCE against procedures written out from their papers."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow import methods
from regrow.core.topology import Topology
from regrow.engine.probe import BatchProbe
from regrow.methods import BY_NAME
from regrow.parts.allocation import at_least, explicit, globally, uniform
from regrow.parts.rounds import synaptic_flow
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.loops import loss_of
from support.paper import (
    SHARES,
    Array,
    Arrays,
    Batch,
    History,
    actual,
    assert_same,
    backward,
    batches,
    history,
    library,
    masks,
    sgd,
    share_out,
    start,
    top,
    units_of,
)

DEFAULTS: dict[str, dict[str, Any]] = {
    "snip_it": {"rounds": 5, "allocate": "globally", "structure": None},
    "snap_it": {"rounds": 5, "prune_last": False},
    "grasp": {"allocate": "globally", "structure": None},
    "synflow": {"rounds": 100, "allocate": "globally", "structure": None},
    "force": {"rounds": 20, "allocate": "globally", "structure": None},
}

SHORT: dict[str, dict[str, Any]] = {
    "snip_it": {"density": 0.3, "rounds": 3},
    "snap_it": {"density": 0.6, "rounds": 3},
    "grasp": {"density": 0.3},
    "synflow": {"density": 0.3, "rounds": 4},
    "force": {"density": 0.3, "rounds": 3},
}

STRUCTURE: Changes = [({"structure": s}, 0) for s in ("fives", "tiles", "rows")]
ALLOCATE: Changes = [({"allocate": "uniform"}, 0), ({"allocate": "erk"}, 0)]
DENSITY: Changes = [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT, "rounds": 1}, 0)]
ROUNDS: Changes = [({"rounds": 1}, 0), ({"rounds": 2}, 0), ({"rounds": 7}, 0)]

CASES: dict[str, dict[str, Changes]] = {
    "snip_it": {"density": DENSITY, "rounds": ROUNDS, "allocate": ALLOCATE, "structure": STRUCTURE},
    "snap_it": {
        "density": [({"density": 0.45}, 0)],
        "rounds": [({"rounds": 1}, 0), ({"rounds": 2}, 0), ({"rounds": 7}, 0, {"density": 0.5})],
        "prune_last": [({"prune_last": True}, 0)],
    },
    "grasp": {
        "density": [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)],
        "allocate": ALLOCATE,
        "structure": STRUCTURE,
    },
    "synflow": {"density": DENSITY, "rounds": ROUNDS, "allocate": ALLOCATE, "structure": STRUCTURE},
    "force": {"density": DENSITY, "rounds": ROUNDS, "allocate": ALLOCATE, "structure": STRUCTURE},
}


# The papers, on plain functions of dense arrays. A network is a model that is copied, and its arrays, block by block.


class Net:
    """A model as functions of arrays: one for each weight, where packed parameters have several."""

    def __init__(self, model: nn.Module, data: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor] = loss_of):
        self.model, self.data, self.loss = copy.deepcopy(model), data, loss
        self.model.zero_grad()
        self.rows: dict[str, tuple[str, slice]] = {}
        for name, p in self.model.named_parameters():
            if p.dim() > 1:
                # Three gates or projections each.
                blocks = 3 if "in_proj" in name or "_ih_" in name or "_hh_" in name else 1
                size = len(p) // blocks
                for i in range(blocks):
                    key = f"{name}[{i}]" if blocks > 1 else name
                    self.rows[key] = name, slice(i * size, (i + 1) * size)
        self.w = {n: self.part(n).detach().numpy().ravel().copy() for n in self.rows}
        self.shapes = {n: tuple(self.part(n).shape) for n in self.rows}

    def part(self, n: str, model: nn.Module | None = None) -> Tensor:
        name, rows = self.rows[n]
        return (model or self.model).get_parameter(name)[rows]

    def with_values(self, values: Arrays) -> nn.Module:
        model = copy.deepcopy(self.model)
        for n, v in values.items():
            self.part(n, model).data.copy_(torch.from_numpy(v).view(self.shapes[n]))
        return model

    def gradient(self, values: Arrays) -> Arrays:
        """Of the mean loss over the batches, at every position."""
        model = self.with_values(values)
        for batch in self.data:
            self.loss(model, batch).backward()
        found = {}
        for n, (name, rows) in self.rows.items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            found[n] = grad[rows].numpy().ravel() / len(self.data)
        return found

    def hessian_times(self, v: Arrays) -> Arrays:
        """By central differences."""
        h = 1e-6 / max(np.abs(a).max() for a in v.values())
        plus, minus = (self.gradient({n: w + s * v[n] for n, w in self.w.items()}) for s in (h, -h))
        return {n: (plus[n] - minus[n]) / (2 * h) for n in v}

    def flow(self, values: Arrays) -> Arrays:
        """dR/d|w|, by one backward through the network of absolute values."""
        model = self.with_values(values).eval()
        for p in model.parameters():
            p.data.abs_()
        model(torch.ones_like(self.data[0][0])).sum().backward()
        return {n: model.get_parameter(name).grad[rows].numpy().ravel() for n, (name, rows) in self.rows.items()}

    def total(self, density: float) -> int:
        return int(np.floor(density * sum(w.size for w in self.w.values()) + 0.5))


def select(
    net: Net, score: Arrays, among: Arrays, total: int | None, allocate: Any, structure: str | None = None
) -> Arrays:
    """Masks of the highest scores, over all weights or within the counts of shapes."""
    if structure is not None:
        return select_units(net, score, among, total, allocate, structure)
    names, at = list(score), {n: np.flatnonzero(m) for n, m in among.items()}
    if isinstance(allocate, dict):
        counts = [int(allocate[n] * net.w[n].size + 0.5) for n in names]
    elif allocate == "globally":
        owner = np.repeat(names, [at[n].size for n in names])
        best = owner[np.argsort(-np.concatenate([score[n][at[n]] for n in names]), kind="stable")[:total]]
        counts = [int((best == n).sum()) for n in names]
    else:
        counts = share_out([SHARES[allocate](net.shapes[n]) for n in names], total, [at[n].size for n in names])
    found = {}
    for n, count in zip(names, counts, strict=True):
        found[n] = np.zeros(net.w[n].size, bool)
        found[n][top(score[n], count, at[n])] = True
    return found


def select_units(net: Net, score: Arrays, among: Arrays, total: int | None, allocate: str, structure: str) -> Arrays:
    """The same of whole units by their mean score: one ranking, of which those stay whose entries come nearest."""
    assert allocate == "globally" and total is not None
    of = {n: units_of(net.shapes[n], structure) for n in score}
    ranked = [
        (-score[n][of[n] == u].mean(), place, u, of[n].size / (of[n].max() + 1))
        for place, n in enumerate(score)
        for u in np.unique(of[n][among[n]])
    ]
    ranked.sort()
    stay = int(np.abs(np.cumsum([0, *(size for *_, size in ranked)]) - total).argmin())
    best = {(place, u) for _, place, u, _ in ranked[:stay]}
    return {n: np.array([(place, u) in best for u in of[n]]) for place, n in enumerate(score)}


def steps(density: float | None, rounds: int) -> list[float | None]:
    return [density] if density is None else [density ** (k / rounds) for k in range(1, rounds + 1)]


def masked(net: Net, mask: Arrays) -> Arrays:
    return {n: w * mask[n] for n, w in net.w.items()}


def everywhere(net: Net) -> Arrays:
    return {n: np.ones(w.size, bool) for n, w in net.w.items()}


def iterative(
    net: Net, density: float | None, o: dict[str, Any], score: Callable[[Arrays], Arrays], back: bool
) -> Arrays:
    mask = everywhere(net)
    for d in steps(density, o.get("rounds", 1)):
        mask = select(
            net,
            score(masked(net, mask)),
            everywhere(net) if back else mask,
            None if d is None else net.total(d),
            o["allocate"],
            o["structure"],
        )
    return mask


def of_outputs(net: Net, density: float, rounds: int, prune_last: bool) -> Arrays:
    """Greedily the best outputs, until one more would be further from the target."""
    mask = everywhere(net)
    last = next(reversed(net.rows.values()))[0]
    names = [n for n in net.w if prune_last or net.rows[n][0] != last]
    whole = sum(net.w[n].size for n in net.w if n not in names)
    for d in steps(density, rounds):
        g = net.gradient(masked(net, mask))
        gate = {n: np.abs((net.w[n] * mask[n] * g[n]).reshape(net.shapes[n][0], -1).sum(1)) for n in names}
        alive = {n: mask[n].reshape(net.shapes[n][0], -1)[:, 0] for n in names}
        best = {n: max(np.flatnonzero(alive[n]), key=lambda j: gate[n][j]) for n in names}
        rows = [(n, int(best[n])) for n in names]
        others = [(n, j) for n in names for j in np.flatnonzero(alive[n]) if j != best[n]]
        others.sort(key=lambda row: -gate[row[0]][row[1]])
        assert d is not None
        held = whole + sum(net.w[n].size // net.shapes[n][0] for n, _ in rows)
        options = [(abs(held - net.total(d)), list(rows))]
        for n, j in others:
            rows.append((n, int(j)))
            held += net.w[n].size // net.shapes[n][0]
            options.append((abs(held - net.total(d)), list(rows)))
        chosen = min(options, key=lambda option: option[0])[1]
        for n in names:
            stays = np.isin(np.arange(net.shapes[n][0]), [j for m, j in chosen if m == n])
            mask[n] = np.repeat(stays, net.w[n].size // net.shapes[n][0])
    return mask


def paper(name: str, options: dict[str, Any], net: Net) -> Arrays:
    o = DEFAULTS[name] | options
    if name == "snap_it":
        return of_outputs(net, o["density"], o["rounds"], o["prune_last"])
    sensitivity = lambda values: {n: np.abs(net.w[n] * g) for n, g in net.gradient(values).items()}  # noqa: E731

    def grasp(values: Arrays) -> Arrays:
        return {n: net.w[n] * h for n, h in net.hessian_times(net.gradient(net.w)).items()}

    def synflow(values: Arrays) -> Arrays:
        return {n: np.abs(values[n]) * f for n, f in net.flow(values).items()}

    score = {"grasp": grasp, "synflow": synflow}.get(name, sensitivity)
    return iterative(net, o["density"], o, score, back=name == "force")


def first(kind: str, seed: int) -> list[Batch]:
    return batches(kind, 100 + seed, steps=3)


def expected(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    run = start(kind, seed)
    run.mask = paper(name, options, Net(run.model, first(kind, seed)))
    run.w = {n: w * run.mask[n] if n in run.mask else w for n, w in run.w.items()}
    return history(run, kind, lambda step: False, lambda run, g: None, "after")


def found(name: str, options: dict[str, Any], kind: str, seed: int = 0) -> History:
    return actual(library(name, options), kind, seed, batches=first(kind, seed), loss=loss_of)


MORE: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SHORT),
    ("snip_it", {"density": 0.05, "rounds": 6}),
    ("snip_it", {"allocate": "erk"}),
    ("snap_it", {"density": 0.3, "prune_last": True}),
    ("snap_it", {"density": 0.5, "rounds": 1}),
    ("grasp", {"density": 0.6, "allocate": "uniform"}),
    ("synflow", {"density": 0.05, "rounds": 30}),
    ("force", {"density": 0.05, "rounds": 6}),
    ("force", {"allocate": "uniform"}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), MORE, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 9, 11, 30 and 31: topologies, then values and momentum of a whole run."""
    options = SHORT[name] | options
    for seed in range(3):
        assert_same(found(name, options, kind, seed), expected(name, options, kind, seed))


@pytest.mark.parametrize(("name", "change", "step", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], step: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    require_predicted_difference(name, expected, SHORT[name], change, step, both, found=found)


@pytest.mark.parametrize("name", SHORT)
def test_what_is_not_given_is_the_default(name: str) -> None:
    """Property 48: a default is an option value too."""
    parameters = inspect.signature(BY_NAME[name]).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    assert defaults == DEFAULTS[name] | ({"allocate": globally} if "allocate" in defaults else {})
    density = {"density": SHORT[name]["density"]}
    assert_same(found(name, density, "mlp", 3), expected(name, density, "mlp", 3))


# Networks with norms, with packed parameters, and with a bend at zero.


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(5, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.cell, self.read = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        x = self.attend(x, x, x, need_weights=False)[0]
        return self.read(self.cell(x)[0].sum(1))


def norms() -> nn.Module:
    features = [nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 3, 2), nn.BatchNorm2d(3)]
    return nn.Sequential(*features, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "norms": (norms, (2, 5, 5)),
    "packed": (Packed, (4, 5)),
}


def other(kind: str, seed: int) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(seed)
    make, shape = OTHERS[kind]
    data = [(torch.randn(7, *shape).double(), torch.randint(0, 3, (7,))) for _ in range(3)]
    return make().double(), data


def sparse(model: nn.Module, method: Any, data: Any, **options: Any) -> regrow.Sparsifier:
    return regrow.sparsify(model, sgd(model), method, batches=data, loss=loss_of, **options)


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", SHORT)
def test_norms_and_packed_parameters(name: str, kind: str, storage: Any) -> None:
    """Properties 30 and 31: batch norm in training mode, gates and projections as weights of their own."""
    for seed in range(2):
        model, data = other(kind, seed)
        wanted = paper(name, SHORT[name], Net(model, data))
        found = masks(sparse(model, library(name, SHORT[name]), data, storage=storage))
        assert found.keys() == wanted.keys()
        assert all((found[n] == wanted[n]).all() for n in wanted)


@pytest.mark.parametrize("name", SHORT)
def test_the_model_stays_as_it_was_but_for_what_is_pruned(name: str) -> None:
    """Properties 30 and 31: values, norms, requires_grad, modes, gradients and random state; bugs 32 and 33."""
    model, data = other("norms", 0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[7].bias.requires_grad_(False)
    model[4].eval()
    before, seed = copy.deepcopy(model), torch.random.get_rng_state()
    sparsifier = sparse(model, library(name, SHORT[name]), data)
    assert torch.equal(seed, torch.random.get_rng_state())
    assert (model[0].weight.grad == 1).all() and model[3].weight.grad is None
    kept = masks(sparsifier)
    for (n, p), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        mask = torch.from_numpy(kept[n]).view(p.shape) if n in kept else torch.ones_like(p)
        assert torch.equal(p, old * mask), n
        assert p.requires_grad == old.requires_grad
    for b, old in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(b, old)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    optimizer = sparsifier.optimizers[0]
    backward(model, data[0])
    optimizer.step()
    assert all((p != old).any() for p, old in zip(model.parameters(), before.parameters(), strict=True) if p.dim() > 1)


@pytest.mark.parametrize("name", SHORT)
def test_the_order_of_batches_and_weight_decay_do_not_matter(name: str) -> None:
    """Properties 30 and 31: not even where every batch holds one class; bugs 18 and 33."""
    model, data = other("norms", 1)
    sorted_ = [(x, torch.full_like(y, label)) for label, (x, y) in enumerate(data)]
    found = []
    for order, decay in ((sorted_, 0.0), (sorted_[::-1], 0.0), (sorted_, 0.5)):
        twin = copy.deepcopy(model)
        method = library(name, SHORT[name])
        options: dict[str, Any] = {"batches": order, "loss": loss_of}
        found.append(masks(regrow.sparsify(twin, sgd(twin, decay), method, **options)))
    assert all((m[n] == found[0][n]).all() for m in found for n in m)


def test_grasp_removes_what_would_raise_the_gradient_most() -> None:
    """Property 31: no entry that stays has a larger -w (H g) than one that is removed; the Hessian by autograd."""
    model, data = other("norms", 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    own = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    bias = {n: p.detach() for n, p in model.named_parameters() if p.dim() == 1}

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(own, flat.split([p.numel() for p in own.values()]), strict=True))
        values = {n: part.view(own[n].shape) for n, part in parts.items()} | bias
        return torch.stack(
            [F.cross_entropy(torch.func.functional_call(model, values, (x,)), y) for x, y in data]
        ).mean()

    w = torch.cat([p.detach().flatten() for p in own.values()])
    hessian, g = torch.autograd.functional.hessian(loss, w), torch.autograd.functional.jacobian(loss, w)
    score = -w * (hessian @ g)
    found = np.concatenate(list(masks(sparse(model, methods.grasp(0.37), data)).values()))
    assert found.sum() == int(0.37 * 212 + 0.5)
    assert score[torch.from_numpy(found)].max() <= score[torch.from_numpy(~found)].min()
    assert score[torch.from_numpy(found)].max() < 0 < score[torch.from_numpy(~found)].max()


@pytest.mark.parametrize("name", ["snip_it", "force"])
def test_one_round_is_snip(name: str) -> None:
    model, data = other("norms", 3)
    twin = copy.deepcopy(model)
    ours = masks(sparse(model, BY_NAME[name](0.2, rounds=1), data))
    theirs = masks(sparse(twin, methods.snip(0.2), data))
    assert all((ours[n] == theirs[n]).all() for n in theirs)


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("name", ["snip_it", "force"])
def test_dead_entries_are_counted_like_others(name: str, storage: Any) -> None:
    """A layer that never fires leaves all scores behind it zero, and the threshold too: still exactly as many stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
        model[0].bias[0] = 5.0
    data = [(torch.randn(7, 6).double(), torch.randint(0, 3, (7,)))]
    alive = 6 + 3
    found = masks(sparse(model, BY_NAME[name](0.5, rounds=3), data, storage=storage))
    assert sum(int(m.sum()) for m in found.values()) == 36 > alive
    assert found["0.weight"][:6].all() and found["2.weight"].reshape(3, 8)[:, 0].all()


def asked(name: str, **options: Any) -> list[Array]:
    """What is active when each round asks, and at last, over all weights."""
    model, data = other("norms", 4)
    seen: list[Array] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        parts = [p.detach().numpy().ravel() != 0 for p in model.parameters() if p.dim() > 1]
        seen.append(np.concatenate(parts))
        return loss_of(model, batch)

    method = BY_NAME[name](0.1, **options)
    sparsifier = regrow.sparsify(model, sgd(model), method, batches=data[:1], loss=loss)
    return [*seen, np.concatenate(list(masks(sparsifier).values()))]


@pytest.mark.parametrize("name", ["snip_it", "force"])
def test_rounds_fall_exponentially_and_only_force_takes_entries_back(name: str) -> None:
    """Property 1: every round has an exact count, 1, 0.1^(1/4), ..., 0.1."""
    rounds = asked(name, rounds=4)
    assert [int(m.sum()) for m in rounds] == [int(186 * 0.1 ** (k / 4) + 0.5) for k in range(5)]
    back = [int((after & ~before).sum()) for before, after in pairwise(rounds)]
    assert any(back) == (name == "force")


# Whole outputs.


@pytest.mark.parametrize("prune_last", [False, True])
@pytest.mark.parametrize("density", [0.45, 0.5, 0.77, 1.0])
def test_whole_outputs_nearest_to_the_density(density: float, prune_last: bool) -> None:
    for kind in OTHERS:
        model, data = other(kind, 5)
        sparsifier = sparse(model, methods.snap_it(density, rounds=2, prune_last=prune_last), data)
        net = Net(model, data)
        found = {n: m.reshape(net.shapes[n][0], -1) for n, m in masks(sparsifier).items()}
        assert all((m.any(1) == m.all(1)).all() and m.any() for m in found.values())
        assert prune_last or found[list(found)[-1]].all()
        active = sum(int(m.sum()) for m in found.values())
        largest = max(m.shape[1] for m in found.values())
        assert abs(active - net.total(density)) <= largest / 2


def test_the_blocks_of_a_last_parameter_all_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.GRU(30, 4)).double()
    data = [torch.randn(6, 2, 5).double()]
    loss = lambda m, x: m(x)[0].square().mean()  # noqa: E731
    sparsifier = regrow.sparsify(
        model, sgd(model), methods.snap_it(0.8), batches=data, loss=loss, skip="1.weight_ih_l0"
    )
    found = masks(sparsifier)
    assert set(found) == {"0.weight", *(f"1.weight_hh_l0[{i}]" for i in range(3))}
    assert all(found[f"1.weight_hh_l0[{i}]"].all() for i in range(3))
    assert int(found["0.weight"].sum()) == 110


def test_what_whole_outputs_cannot_give_is_refused() -> None:
    model, data = other("norms", 0)
    before = copy.deepcopy(model.state_dict())
    told = (
        r"^snap_it: one output of each weight and all of 7.weight take 74 of 186 entries, and density 0.3 leaves 56: "
        r"raise the density, or give prune_last=True$"
    )
    with pytest.raises(ValueError, match=told):
        sparse(model, methods.snap_it(0.3), data)
    told = r"^snap_it: one output of each weight take 50 of 186 entries, and density 0.2 leaves 37: raise the density$"
    with pytest.raises(ValueError, match=told):
        sparse(model, methods.snap_it(0.2, prune_last=True), data)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert sparse(model, methods.snap_it(0.3, prune_last=True), data).nnz == 50


# Collapse.


def deep() -> tuple[nn.Module, list[Batch]]:
    """Layers of very different size, without biases, as in the theorem of SynFlow."""
    torch.manual_seed(0)
    sizes = [30, 60, 60, 60, 60, 4]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double(), [(torch.randn(20, 30).double(), torch.randint(0, 4, (20,)))]


def test_snip_empties_layers_where_synflow_leaves_a_path(caplog: pytest.LogCaptureFixture) -> None:
    """At 12 of 12,840 entries, of which a path takes five."""
    density = 12 / 12840
    emptied = {}
    for name in ("snip", "snip_it", "force", "grasp", "synflow"):
        model, data = deep()
        with caplog.at_level(logging.WARNING, "regrow"):
            caplog.clear()
            found = masks(sparse(model, BY_NAME[name](density), data))
        assert sum(int(m.sum()) for m in found.values()) == 12
        emptied[name] = [n for n, m in found.items() if not m.any()]
        if name == "synflow":
            assert not caplog.records
            reach = torch.ones(30).double()
            for n in found:
                reach = model.get_parameter(n).detach().abs() @ reach
            assert reach.any()
        elif name != "snip" and emptied[name]:
            assert f"{name}: {len(emptied[name])} of 5 weights are left without any entry" in caplog.text
            assert all(n in caplog.text for n in emptied[name])
    assert emptied["snip"] and emptied["grasp"] and not emptied["synflow"]


def test_the_flow_of_all_layers_is_the_same() -> None:
    """The law of conservation on which SynFlow rests: scores of each layer sum to R."""
    model, data = deep()
    own = list(model.parameters())
    topologies = [Topology(tuple(p.shape)) for p in own]
    values = [p.detach().flatten() for p in own]
    sums = [
        float(s.sum())
        for s in synaptic_flow(BatchProbe(model, [(p, 1) for p in own], data, loss_of), values, topologies)
    ]
    assert sums == pytest.approx([sums[0]] * 5, rel=1e-12)


@pytest.mark.parametrize("name", ["snip_it", "grasp", "force", "synflow"])
def test_a_guarded_allocation_keeps_every_layer(name: str) -> None:
    model, data = deep()
    found = masks(sparse(model, BY_NAME[name](12 / 12840, allocate=at_least(1, globally)), data))
    assert all(m.any() for m in found.values()) and sum(int(m.sum()) for m in found.values()) == 12


# What is refused.

REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (list(SHORT), {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    (list(SHORT), {"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    (["snip_it", "snap_it", "synflow", "force"], {"rounds": 0}, "rounds must be at least 1, got 0"),
    (["snip_it", "synflow", "force"], {"density": None, "rounds": 3}, "3 rounds lower one density.*and None is given"),
    (["snap_it"], {"density": None}, "give a density"),
]


@pytest.mark.parametrize(("name", "change", "told"), [(n, c, told) for names, c, told in REFUSED for n in names])
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        BY_NAME[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", SHORT)
def test_batches_are_required_and_may_not_run_out(name: str) -> None:
    model, data = other("norms", 0)
    before = copy.deepcopy(model.state_dict())
    method = library(name, SHORT[name])
    with pytest.raises(ValueError, match=f"^{name} asks for several gradients before training: give batches="):
        regrow.sparsify(model, sgd(model), method)
    with pytest.raises(ValueError, match="belong together"):
        regrow.sparsify(model, sgd(model), method, batches=data)
    with pytest.raises(ValueError, match="an iterator can be read once"):
        sparse(model, method, iter(data))
    with pytest.raises(ValueError, match="batches= is empty"):
        sparse(model, method, [])
    with pytest.raises(ValueError, match="makes none of the 186 sparsified ones active"):
        sparse(model, BY_NAME[name](0.001), data)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert sparse(model, method, data).started


def test_densities_that_contradict_a_round_are_refused_with_both_numbers() -> None:
    model, data = other("norms", 0)
    allocate = explicit({"*": 0.5})
    told = r"^force: in round 1 of 2: explicit: .* make 93 active entries, the density asks for 132"
    with pytest.raises(ValueError, match=told):
        sparse(model, methods.force(0.5, rounds=2, allocate=allocate), data)
    assert sparse(model, methods.force(0.5, rounds=1, allocate=allocate), data).nnz == 93


def test_integers_have_no_flow() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randint(0, 9, (4, 2)), torch.randint(0, 3, (4,)))]
    with pytest.raises(ValueError, match=r"takes floating-point inputs.*int64 tensors: token ids.*snip or force"):
        sparse(model, methods.synflow(0.5), data)
    assert sparse(model, methods.force(0.5), data).nnz == 18


@pytest.mark.parametrize("name", SHORT)
def test_a_budget_that_dense_weights_share(name: str) -> None:
    """Counts of all rounds come from the budget: exactly so many stay, dense ones included."""
    model, data = other("norms", 0)
    method = library(name, SHORT[name] | {"density": 0.7} | ({"prune_last": True} if name == "snap_it" else {}))
    sparsifier = sparse(model, method, data, budget="model", skip="0.weight")
    exact = int(0.7 * 186 + 0.5) - 90
    found = sum(int(m.sum()) for m in masks(sparsifier).values())
    assert found == exact if name != "snap_it" else abs(found - exact) <= 10


def test_uniform_gives_every_layer_its_share() -> None:
    """Property 30: the layer-wise option has exact counts."""
    for name in ("snip_it", "grasp", "synflow", "force"):
        model, data = other("norms", 0)
        found = masks(sparse(model, BY_NAME[name](0.5, allocate=uniform), data))
        assert [int(m.sum()) for m in found.values()] == [45, 30, 18]
