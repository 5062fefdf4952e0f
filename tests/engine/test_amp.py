"""Mixed precision: steps that a gradient scaler skips, and gradients that it has scaled."""

from __future__ import annotations

import copy

import pytest
import torch

from regrow import sparsify
from regrow.core.method import Method
from support.loops import (
    MAKE,
    data,
    loss_of,
    masks,
    mlp,
    require_zero_outside,
    rigl,
    same,
    set_,
)
from support.table import METHODS

FUSED = ["sgd-fused", "adam-fused"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", *FUSED])
@pytest.mark.parametrize("method", [rigl(), rigl(timing="after"), set_()])
@pytest.mark.parametrize("overflow_at", [2, 3, 4])
def test_an_overflow_neither_counts_nor_updates(method: Method, optimizer: str, overflow_at: int):
    model = mlp(torch.float32)
    opt = MAKE[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for turn in range(1, 6):
        before = copy.deepcopy(model.state_dict()), masks(sparsifier), sparsifier.step
        overflow = turn == overflow_at
        opt.zero_grad()
        loss = loss_of(model, data(turn, dtype=torch.float32)) * (float("inf") if overflow else 1)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        if overflow:
            assert same(model.state_dict(), before[0]) and same(masks(sparsifier), before[1])
        assert sparsifier.step == before[2] + (not overflow)
        assert sparsifier.updates == (sparsifier.step >= 3)
        require_zero_outside(model, opt, sparsifier)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", *FUSED])
def test_an_overflow_at_an_update_with_masked_gradients_is_forgotten(optimizer: str, set_to_none: bool):
    model = mlp(torch.float32)
    opt = MAKE[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, rigl(interval=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (float("inf"), 1.0):
        opt.zero_grad(set_to_none=set_to_none)
        scaler.scale(loss_of(model, data(1, dtype=torch.float32)) * factor).backward()
        scaler.unscale_(opt)
        sparsifier.mask_gradients()
        scaler.step(opt)
        scaler.update()
    assert sparsifier.updates == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam", *FUSED])
@pytest.mark.parametrize("method", ["snfs", "rigl", "rigl-after", "snip", "set"])
def test_a_loss_scale_changes_nothing(method: str, optimizer: str):
    """Property 26; SNFS's mean and the newcomers' second moments are those of unscaled gradients."""
    runs = []
    for scale in (None, 1.0, 1024.0):
        model = mlp(torch.float32)
        opt = MAKE[optimizer](model.parameters())
        sparsifier = sparsify(model, opt, METHODS[method]())
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for step in range(1, 10):
            opt.zero_grad()
            scaler.scale(loss_of(model, data(step, dtype=torch.float32))).backward()
            scaler.step(opt)
            scaler.update()
        means = {w.name: w.state["momentum"] for w in sparsifier.weights if w.state}
        assert bool(means) == (method == "snfs")
        runs.append((masks(sparsifier), dict(model.state_dict()), means))
    for run in runs[1:]:
        assert same(run[0], runs[0][0])
        for kind in (1, 2):
            for name, value in runs[0][kind].items():
                torch.testing.assert_close(run[kind][name], value, rtol=1e-4, atol=1e-6)
