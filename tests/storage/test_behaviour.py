"""What an unknown optimizer does with a sparse weight is found by trying it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.storage.behaviour import behaviour_of
from support.loops import data, loss_of, masks, mlp, rigl, set_, start, train


class Own(torch.optim.Optimizer):
    """Somebody's optimizer, which keeps a mean of gradients and something else."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["mean"] = group["beta"] * state.get("mean", torch.zeros_like(p)) + p.grad
                    p.sub_(group["lr"] * self.direction(state, p))

    def direction(self, state: dict[str, Any], p: Tensor) -> Tensor:
        return state["mean"]


class Rotated(Own):
    """Keeps squares in another basis, as SOAP does."""

    def direction(self, state: dict[str, Any], p: Tensor) -> Tensor:
        if "basis" not in state:
            state["basis"] = torch.linalg.qr(torch.randn(len(p), len(p), dtype=p.dtype))[0]
        turned = state["basis"].T @ p.grad
        state["squares"] = 0.9 * state.get("squares", torch.zeros_like(p)) + turned**2
        return state["basis"] @ (turned / (state["squares"].sqrt() + 1e-3))


class Factored(Own):
    """Keeps the squares of rows and columns, as Adafactor does."""

    def direction(self, state: dict[str, Any], p: Tensor) -> Tensor:
        if p.dim() < 2:
            return p.grad / (p.grad.square().mean().sqrt() + 1e-3)
        state["rows"] = 0.9 * state.get("rows", torch.zeros_like(p[:, 0])) + p.grad.square().mean(1)
        return p.grad / (state["rows"].sqrt()[:, None] + 1e-3)


class Codes(Own):
    """Keeps numbers as codes of 8 bits, of which 0 is none."""

    def direction(self, state: dict[str, Any], p: Tensor) -> Tensor:
        state["codes"] = torch.full_like(p, 127, dtype=torch.uint8)
        return state["mean"]


class Normed(Own):
    """Divides by the norm of the whole weight, which zeros do not change."""

    def direction(self, state: dict[str, Any], p: Tensor) -> Tensor:
        return state["mean"] / (state["mean"].norm() + 1e-3)


class Broken(Own):
    """Raises where it is tried."""

    def direction(self, state: dict[str, Any], p: Tensor) -> Tensor:
        if p.shape == (12, 10):
            raise OSError("no such device")
        return state["mean"]


WHAT = {
    Own: ({"mean"}, True),
    Normed: ({"mean"}, True),
    Rotated: ({"mean"}, False),
    Factored: ({"mean"}, False),
    Codes: ({"mean"}, True),
}


@pytest.mark.parametrize("cls", WHAT)
def test_which_state_belongs_to_entries_and_whether_values_can_stand_alone(cls: type[Own]):
    own, alone = WHAT[cls]
    # A rate of zero, as at the start of a warm-up, hides nothing.
    found = behaviour_of(cls([nn.Parameter(torch.randn(5, 4))], lr=0.0))
    assert (found.own, found.alone) == (own, alone)
    assert bool(found.why) != alone


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, torch.optim.Rprop])
def test_an_optimizer_of_torch_that_is_known_is_not_tried(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("regrow.storage.behaviour._train", None)
    assert behaviour_of(make([nn.Parameter(torch.randn(5, 4))], lr=0.1)).alone


@pytest.mark.parametrize("name", ["Adamax", "Adadelta", "ASGD", "RAdam", "NAdam", "Adagrad", "RMSprop"])
def test_what_is_known_of_torchs_optimizers_is_so(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("regrow.storage.behaviour.KNOWN", frozenset())
    monkeypatch.setattr("regrow.storage.behaviour._kinds", {})
    assert behaviour_of(getattr(torch.optim, name)([nn.Parameter(torch.randn(5, 4))])).alone


@pytest.mark.parametrize("cls", [Rotated, Factored, Codes])
@pytest.mark.parametrize("method", [rigl(interval=2), set_(0.2)])
def test_masked_storage_zeroes_the_state_of_entries_and_leaves_the_other(cls: type[Own], method: Any):
    torch.manual_seed(0)
    model = mlp()
    opt = cls([p for p in model.parameters() if p.dim() == 2], lr=0.01)
    sparsifier = sparsify(model, opt, method)
    for step in range(1, 8):
        train(model, opt, step)
        for name, mask in masks(sparsifier).items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any() and not opt.state[weight]["mean"][~mask].any()
            state = opt.state[weight]
            assert "squares" not in state or state["squares"][~mask].any()
            assert "rows" not in state or len(state["rows"]) == len(weight)
            assert "codes" not in state or bool((state["codes"] == 127).all())
    assert sparsifier.updates > 0


@pytest.mark.parametrize("cls", [Rotated, Factored, Broken])
def test_compressed_storage_refuses_what_would_be_another_algorithm(cls: type[Own]):
    model = mlp()
    with pytest.raises(ValueError, match=rf"{cls.__name__} cannot step 0\.weight compressed, since it \w.*masked"):
        sparsify(model, cls(model.parameters()), methods.static(0.2), storage="compressed")


def test_what_cannot_be_tried_is_masked_with_a_word(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("regrow.storage.behaviour._kinds", {})
    model = mlp()
    opt = Broken(model.parameters())
    with caplog.at_level(logging.WARNING, "regrow"):
        sparsifier = sparsify(model, opt, rigl(interval=2))
        for step in range(1, 4):
            train(model, opt, step)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "Broken could not be tried on a small weight (OSError"
    ]
    for name, mask in masks(sparsifier).items():
        assert not opt.state[model.get_parameter(name)]["mean"][~mask].any()


def test_a_trial_draws_nothing_and_leaves_the_optimizer_alone():
    model, opt, _ = start(methods.static(0.2))
    other = Own([nn.Parameter(torch.randn(5, 4))])
    state = torch.random.get_rng_state()
    behaviour_of(other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not other.state
    loss_of(model, data(1)).backward()
    opt.step()
