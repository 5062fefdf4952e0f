"""Whole runs against a plain NumPy program written from the papers: same topologies, values and momentum."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow.core.method import Method, Need, Regrow, Start
from regrow.core.topology import Topology
from regrow.methods import BY_NAME as RECIPES
from regrow.parts import growth, schedules
from regrow.parts.updates import drop_and_grow, every
from support.paper import (
    LIBRARY,
    LR,
    PAPERS,
    SHORT,
    WEIGHT_DECAY,
    Array,
    Arrays,
    Program,
    actual,
    assert_same,
    backward,
    batches,
    expected,
    library_method,
    masks,
    network,
    sgd,
    top,
)

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
