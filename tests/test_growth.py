from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow.growth import at_random, gradient, highest, momentum
from regrow.method import Field
from regrow.streams import Stream
from regrow.topology import Topology
from regrow.weight import SparseWeight
from test_updates import Fake, fakes


def blocks_of(size: int) -> Field:
    def field(weight: SparseWeight) -> Iterator[tuple[int, Tensor]]:
        (dense,) = [torch.cat([block for _, block in weight.grad_blocks()])]
        yield from ((i, dense[i : i + size]) for i in range(0, dense.numel(), size))

    return field


@given(fakes(), st.integers(1, 40), st.floats(0, 1))
def test_highest_is_a_stable_sort_of_the_free_positions(weight: Fake, size: int, fraction: float) -> None:
    """Properties 5 and 6: whatever the blocks; ties to the lower position, never an active one."""
    assert weight.grad is not None
    free = np.flatnonzero(~weight.topology.mask.numpy().reshape(-1))
    count = round(fraction * len(free))
    order = np.argsort(-weight.grad.abs().numpy()[free], kind="stable")[:count]
    grown = highest(blocks_of(size))(weight, weight.topology, count)
    assert sorted(grown.tolist()) == sorted(free[order].tolist())


def test_highest_ranks_absolute_values() -> None:
    weight = Fake([0] * 4, [], [-3, 2, 1, -4])
    assert sorted(highest(gradient)(weight, weight.topology, 2).tolist()) == [0, 3]


def test_highest_looks_outside_the_taken_not_the_active() -> None:
    weight = Fake([1, 1, 0, 0], [0, 1], [9, 8, 7, 6])
    assert highest(gradient)(weight, Topology((1, 4), torch.tensor([0])), 1).tolist() == [1]
    assert highest(gradient)(weight, weight.topology, 1).tolist() == [2]


def test_highest_tells_apart_what_half_precision_holds() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = Fake([0] * 3, [], [0] * 3)
        weight.grad = torch.tensor([1.0, -1.5, 1.25], dtype=dtype)
        assert sorted(highest(gradient)(weight, weight.topology, 2).tolist()) == [1, 2]


def test_highest_tells_doubles_apart() -> None:
    weight = Fake([0] * 3, [], [1.0, 1.0 + 1e-12, 1.0])
    assert highest(gradient)(weight, weight.topology, 1).tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 6])
def test_highest_refuses_what_is_not_finite(value: float, place: int) -> None:
    """Property 5: also at active positions and in later blocks."""
    weight = Fake([1] + [0] * 7, [0], [0.0] * 8, "layer.weight")
    assert weight.grad is not None
    weight.grad[place] = value
    with pytest.raises(ValueError, match=r"layer\.weight: 1 of \d growth scores are not finite"):
        highest(gradient)(weight, weight.topology, 1)


def test_highest_refuses_more_than_is_free() -> None:
    weight = Fake([1, 1, 0], [0, 1], [1, 1, 1], "layer.weight")
    with pytest.raises(ValueError, match=r"layer\.weight: cannot grow 2 entries, only 1 are free"):
        highest(gradient)(weight, weight.topology, 2)
    with pytest.raises(ValueError, match="cannot grow 1 entries, only 0 are free"):
        highest(gradient)(weight, Topology((1, 3)), 1)


def test_momentum_is_the_observed_state() -> None:
    """Property 27: growth by momentum differs from growth by gradient."""
    weight = Fake([0] * 4, [], [9, 0, 0, 0])
    weight.state["momentum"] = torch.tensor([0.0, 1, -5, 2])
    assert highest(momentum)(weight, weight.topology, 1).tolist() == [2]
    assert highest(gradient)(weight, weight.topology, 1).tolist() == [0]


@given(fakes(), st.floats(0, 1))
def test_random_growth_is_exact_and_outside(weight: Fake, fraction: float) -> None:
    """Properties 1 and 5."""
    free = set(range(weight.topology.numel)) - weight.active()
    count = round(fraction * len(free))
    grown = at_random(weight, weight.topology, count).tolist()
    assert len(set(grown)) == len(grown) == count
    assert set(grown) <= free


def test_random_growth_is_uniform_and_blind_to_gradients() -> None:
    """Property 25: chi-square over all pairs of free positions."""
    seen = dict.fromkeys(combinations([0, 2, 3, 5, 7], 2), 0)
    weight = Fake([0, 1, 0, 0, 1, 0, 1, 0], [1, 4, 6], [0, 0, 99, 0, 0, 0, 0, 0])
    for seed in range(2000):
        weight.generator = Stream(seed, "w", 1)
        seen[tuple(sorted(at_random(weight, weight.topology, 2).tolist()))] += 1
    chi_square = sum((n - 200) ** 2 / 200 for n in seen.values())
    assert chi_square < 27.9


def test_random_growth_refuses_more_than_is_free() -> None:
    weight = Fake([1, 1, 0], [0, 1])
    with pytest.raises(ValueError, match="a subset of 1 members cannot have 2"):
        at_random(weight, weight.topology, 2)
