"""Single updates in detail: what grows, what stays, what both timings read, and what optimizer state becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow.core.method import Regrow
from regrow.methods import BY_NAME
from regrow.parts import (
    Method,
    Need,
    Start,
    Topology,
    constant,
    drop_and_grow,
    every,
    gradient,
    highest,
    lowest,
    magnitude,
)
from support.paper import (
    LR,
    WEIGHT_DECAY,
    Array,
    Arrays,
    Program,
    backward,
    batches,
    counts_of,
    library,
    masks,
    network,
    sgd,
    start,
    top,
)


def sparse_start(seed: int) -> Program:
    """What RigL starts from at a density of 0.4."""
    return start("mlp", seed, lambda run: counts_of(run, {"density": 0.4, "allocate": "erk"}))


@pytest.mark.parametrize("policy", ["keep", "reset", "forbid"])
def test_the_published_drop_and_grow_example(policy: Regrow) -> None:
    """Property 7, reference vector, through a real optimizer; momentum follows the value."""
    w = torch.tensor([0.5, -0.1, 0, 0.3, 0, -0.9, 0.2, 0]).double()
    g = torch.tensor([0.1, -0.9, 0.4, 0.2, -0.7, 0.3, 0.05, 0.6]).double()
    model = nn.Linear(8, 1, bias=False).double()
    optimizer = sgd(model, weight_decay=0)
    update = drop_and_grow(constant(0.4), lowest(magnitude), highest(gradient), regrow_dropped=policy)
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
    method = BY_NAME["rigl"](0.4, until=9, begin=1, fraction=0.5, timing=timing)
    sparsifier = regrow.sparsify(model, optimizer, method, seed=seed)
    backward(model, batches("mlp", seed)[0], scale)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return masks(sparsifier)


@pytest.mark.parametrize("seed", range(5))
def test_growth_ranks_finite_differences(seed: int) -> None:
    """Property 26: brute-force top-k of a dense gradient that no autograd has touched."""
    program = sparse_start(seed)
    batch = batches("mlp", seed)[0]

    def loss_with(name: str, values: Array) -> float:
        everything = {
            n: torch.from_numpy(values if n == name else w).view(program.shapes[n]) for n, w in program.w.items()
        }
        return float(
            nn.functional.cross_entropy(torch.func.functional_call(program.model, everything, (batch[0],)), batch[1])
        )

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
    method = library(name, {"density": 0.3, "until": 13, "interval": 3, "timing": "instead"})
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
    program = sparse_start(seed)
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
    method = BY_NAME[name](0.4, until=9, interval=5, fraction=0.5, timing="instead")
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
