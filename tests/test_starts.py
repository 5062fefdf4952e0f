from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.allocation import apportion, explicit, globally, uniform
from regrow.scores import magnitude, random, saliency
from regrow.starts import by_score, dense, random_topology
from regrow.streams import Stream
from test_updates import Fake, together


def fresh(*sizes: int, seed: int = 0) -> list[Fake]:
    weights = [Fake(torch.arange(1.0, n + 1), name=f"w{i}") for i, n in enumerate(sizes)]
    for weight in weights:
        weight.generator = Stream(seed, weight.name, 0)
    return weights


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 9))
def test_a_random_start_has_exact_counts_and_keeps_values(sizes: list[int], density: float, seed: int) -> None:
    """Properties 9 and 18."""
    weights = fresh(*sizes, seed=seed)
    random_topology(density, uniform).make(together(*weights))
    counts = apportion([float(n) for n in sizes], int(density * sum(sizes) + 0.5), sizes)
    assert [w.topology.nnz for w in weights] == counts
    for weight in weights:
        assert torch.equal(weight.dense, torch.arange(1.0, weight.topology.numel + 1) * weight.topology.mask.view(-1))


def test_a_random_start_is_the_subset_of_its_stream() -> None:
    (weight,) = fresh(50)
    random_topology(0.2, uniform).make(together(weight))
    assert weight.topology.indices.tolist() == Stream(0, "w0", 0).subset(50, 10).tolist()


def test_every_position_is_equally_likely() -> None:
    """Property 18: mean activity uniform by chi-square; two seeds give different topologies."""
    seen = np.zeros(20)
    for seed in range(1000):
        (weight,) = fresh(20, seed=seed)
        random_topology(0.3, uniform).make(together(weight))
        seen[weight.topology.indices.numpy()] += 1
    # Without replacement: each place has variance 1000 x 0.3 x 0.7, summing to a chi-square of 19 degrees of freedom.
    chi_square = ((seen - 300) ** 2 / 210).sum() * 19 / 20
    assert chi_square < 43.8


def test_dense_leaves_everything_active() -> None:
    weights = fresh(7, 3)
    dense().make(together(*weights))
    assert [w.topology.positions for w in weights] == [None, None]
    assert not dense().needs_gradient


def test_a_random_start_of_density_one_costs_no_positions() -> None:
    (weight,) = fresh(7)
    random_topology(1.0, uniform).make(together(weight))
    assert weight.topology.positions is None


def test_a_start_without_density_takes_the_explicit_ones() -> None:
    weights = fresh(10, 20)
    random_topology(None, explicit({"w0": 0.5, "w1": 0.1})).make(together(*weights))
    assert [w.topology.nnz for w in weights] == [5, 2]


def test_by_score_keeps_the_highest_in_each_and_anywhere() -> None:
    """Property 30: global and layer-wise options give exact K."""
    for allocate, expected in ((uniform, [[2, 3], [4, 5, 6, 7]]), (globally, [[], [2, 3, 4, 5, 6, 7]])):
        weights = [Fake([1, 2, 3, 4], name="a"), Fake(torch.arange(11.0, 19), name="b")]
        start = by_score(0.5, magnitude, allocate)
        assert not start.needs_gradient
        start.make(together(*weights))
        assert [w.topology.indices.tolist() for w in weights] == expected


def test_by_score_says_whether_it_needs_a_gradient() -> None:
    assert by_score(0.5, saliency, globally, needs_gradient=True).needs_gradient


def test_saliency_is_the_product_of_value_and_gradient() -> None:
    """Property 30: |w g|, at active entries."""
    weight = Fake([1, -2, 3, 0], [0, 1, 2], [5, 7, -1, 100])
    assert saliency(weight).tolist() == [5, 14, 3]
    assert magnitude(weight).tolist() == [1, 2, 3]


def test_saliency_of_half_precision_does_not_underflow() -> None:
    """Scores are float32 or wider: the product of two small halves must not become a tie at zero."""
    for dtype in (torch.float16, torch.bfloat16):
        weight = Fake([0.0, 0.0])
        weight.dense = torch.tensor([1e-3, 1e-3], dtype=dtype)
        weight.grad = torch.tensor([1e-5, 1.004e-5], dtype=torch.float32).to(dtype)
        small, large = saliency(weight).double().tolist()
        exact = (weight.dense.double() * weight.grad.double()).tolist()
        assert [small, large] == pytest.approx(exact, rel=1e-6)


def test_a_random_score_is_that_of_the_stream() -> None:
    (weight,) = fresh(6)
    assert random(weight).tolist() == Stream(0, "w0", 0).uniform(6).tolist()
