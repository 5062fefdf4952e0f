"""What backward passes leave in one parameter."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from regrow.storage.gradient import Gradient


class Owner:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.gradient = Gradient(parameter, "fc.weight")
        self.seen: list[Tensor] = []
        self.gradient.watch(self.arrived)

    def arrived(self, grad: Tensor) -> None:
        self.seen.append(grad.clone())


def arrive(parameter: nn.Parameter, times: float = 1.0) -> None:
    (parameter * times).sum().backward()


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=torch.float64))


def test_arrivals_are_counted_and_handed_on(parameter: nn.Parameter) -> None:
    owner = Owner(parameter)
    arrive(parameter)
    arrive(parameter, 2.0)
    assert owner.gradient.arrivals == 2
    assert [g[0].item() for g in owner.seen] == [1.0, 3.0]
    owner.gradient.remove()
    arrive(parameter)
    assert owner.gradient.arrivals == 2


def test_zeros_are_reached_when_a_backward_of_this_step_made_them(parameter: nn.Parameter) -> None:
    owner = Owner(parameter)
    gradient = owner.gradient
    assert not gradient.reached
    arrive(parameter, 0.0)
    assert gradient.reached
    gradient.opened()
    assert gradient.reached
    gradient.closed(complete=True)
    assert not gradient.reached
    parameter.grad = torch.ones_like(parameter)
    assert gradient.reached


def test_what_is_held_is_read_until_the_step_is_closed(parameter: nn.Parameter) -> None:
    owner = Owner(parameter)
    gradient = owner.gradient
    arrive(parameter, 4.0)
    gradient.hold()
    gradient.divide(2.0)
    parameter.grad = None
    assert gradient.reached
    assert gradient.read().tolist() == [2.0, 2.0, 2.0]
    gradient.closed(complete=False)
    assert (gradient.held, gradient.scale, gradient.reached) == (None, 1.0, False)
    with pytest.raises(ValueError, match=r"^fc\.weight has no gradient: call loss\.backward\(\)"):
        gradient.read()
    arrive(parameter, 4.0)
    assert gradient.read().tolist() == [4.0, 4.0, 4.0]


def test_holding_again_keeps_what_was_held_first(parameter: nn.Parameter) -> None:
    owner = Owner(parameter)
    arrive(parameter, 4.0)
    owner.gradient.hold()
    parameter.grad.zero_()
    owner.gradient.hold()
    assert owner.gradient.read().tolist() == [4.0, 4.0, 4.0]
    owner.gradient.let_go()
    assert owner.gradient.read().tolist() == [0.0, 0.0, 0.0]


def test_what_is_read_must_be_finite(parameter: nn.Parameter) -> None:
    owner = Owner(parameter)
    owner.gradient.require_finite()
    arrive(parameter)
    parameter.grad[1] = torch.nan
    owner.gradient.hold()
    parameter.grad.zero_()
    with pytest.raises(ValueError, match=r"fc\.weight: 1 of 3 gradients are not finite"):
        owner.gradient.require_finite()


def test_a_parameter_does_not_keep_its_owner_alive(parameter: nn.Parameter) -> None:
    owner = Owner(parameter)
    weak = weakref.ref(owner)
    del owner
    gc.collect()
    assert weak() is None
    arrive(parameter)
