from __future__ import annotations

import pytest
import torch
from hypothesis import given

from regrow.core.method import Statistic
from regrow.core.topology import Topology
from regrow.parts.observers import keep_momentum
from regrow.parts.redistribution import mean_magnitude, mean_momentum, nonzeros, survivors
from support.fakes import Fake, fakes


def with_momentum(weight: Fake, values: list[float]) -> Fake:
    weight.state["momentum"] = torch.tensor(values)
    return weight


def test_each_statistic_reads_active_entries() -> None:
    """Property 27."""
    weight = with_momentum(Fake([3, -1, 0, 7, 0], [0, 1, 2]), [1, -2, 6, 100, -100])
    kept = Topology((1, 5), torch.tensor([0]))
    assert mean_magnitude(weight, kept) == pytest.approx(4 / 3)
    assert mean_momentum(weight, kept) == 3.0
    assert nonzeros(weight, kept) == 2.0


def test_survivors_are_what_is_kept() -> None:
    """Mostafa and Wang 2019, Algorithm 1: l_i is counted after the drop."""
    weight = Fake([3, -1, 0, 7, 0], [0, 1, 2])
    assert [survivors(weight, Topology((1, 5), torch.tensor(p))) for p in ([0], [0, 2], [0, 1, 2])] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("statistic", [mean_magnitude, mean_momentum, nonzeros, survivors])
def test_an_empty_weight_has_a_share_of_zero(statistic: Statistic) -> None:
    """Property 28: finite for empty layers."""
    weight = with_momentum(Fake([3, 1], []), [1, 1])
    assert statistic(weight, weight.topology) == 0.0


@given(fakes())
def test_shares_are_finite_and_not_negative(weight: Fake) -> None:
    """Property 28."""
    with_momentum(weight, weight.dense.tolist())
    kept = weight.topology
    assert 0 <= mean_magnitude(weight, kept) < 10
    assert mean_momentum(weight, kept) == pytest.approx(mean_magnitude(weight, kept))
    assert nonzeros(weight, kept) == int((weight.dense != 0).sum())
    assert survivors(weight, kept) == len(weight.active())


def test_a_mean_of_half_precision_does_not_saturate() -> None:
    weight = Fake([0.0] * 70_000)
    weight.dense = torch.full((70_000,), 2.0, dtype=torch.float16)
    assert mean_magnitude(weight, weight.topology) == 2.0
    weight.state["momentum"] = torch.full((70_000,), 3.0, dtype=torch.bfloat16)
    assert mean_momentum(weight, weight.topology) == 3.0


def test_momentum_is_the_recursion_at_every_position() -> None:
    """Property 27: v <- decay v + (1 - decay) g, at inactive positions too."""
    weight = Fake([1, 0, 0, 0, 0, 0, 0], [0], [0.0] * 7)
    expected = torch.zeros(7, dtype=torch.float64)
    for _ in range(5):
        weight.grad = torch.randn(7, dtype=torch.float64)
        expected = 0.9 * expected + 0.1 * weight.grad
        keep_momentum(0.9)(weight)
    torch.testing.assert_close(weight.state["momentum"], expected, rtol=1e-14, atol=0)


def test_momentum_without_decay_is_the_last_gradient() -> None:
    weight = Fake([1, 0, 0], [0], [1, 2, 3])
    keep_momentum(0.0)(weight)
    weight.grad = torch.tensor([4.0, 5, 6], dtype=torch.float64)
    keep_momentum(0.0)(weight)
    assert weight.state["momentum"].tolist() == [4, 5, 6]
