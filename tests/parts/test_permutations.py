"""Permutations of inputs: the assignment against all permutations, and what penalty and projection promise."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow.core.method import Parts
from regrow.parts import assignment, make_doubly_stochastic, near_identity, permutation_distance, permuted


@given(st.integers(0, 6), st.integers(0, 10_000), st.booleans())
def test_the_assignment_has_the_largest_sum_of_all(size: int, seed: int, ties: bool) -> None:
    draw = np.random.default_rng(seed)
    score = draw.integers(-2, 3, (size, size)) if ties else draw.normal(size=(size, size))
    rows = assignment(torch.from_numpy(score.astype(float))).tolist()
    assert sorted(rows) == list(range(size))
    found = sum(score[row, column] for column, row in enumerate(rows))
    best = max(sum(score[row, column] for column, row in enumerate(p)) for p in permutations(range(size)))
    assert found == pytest.approx(best, abs=1e-9)


def test_a_permutation_is_found_again_under_noise() -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    noise = 0.4 * torch.rand(60, 60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(assignment(torch.eye(60)[:, order] + noise), order)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        assignment(torch.tensor([[1.0, bad], [0.0, 1.0]]))


def test_the_distance_is_zero_for_permutations_and_largest_where_all_is_mixed() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert float(permutation_distance(torch.eye(9)[order])) == 0
    mixed = [float(permutation_distance((1 - s) * torch.eye(9)[order].double() + s / 9)) for s in (0.1, 0.5, 1.0)]
    assert 0 < mixed[0] < mixed[1] < mixed[2] == pytest.approx(2 * 9 * (1 - 1 / 3))


def test_rows_are_divided_last_and_a_column_without_anything_stays() -> None:
    matrix = torch.tensor([[2.0, -1.0, 0.0], [2.0, 4.0, -3.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    make_doubly_stochastic(matrix)
    assert matrix.tolist() == [[1.0, 0, 0], [0.5, 0.5, 0], [0, 1.0, 0]]


@pytest.mark.parametrize("in_axis", [0, 1])
def test_inputs_are_mixed_along_their_axis_and_then_put_in_order(in_axis: int) -> None:
    draw = torch.Generator().manual_seed(0)
    v, pattern = torch.randn(4, 5, 3, generator=draw).double(), torch.rand(4, 5, 3, generator=draw) < 0.5
    inputs = v.shape[in_axis]
    held = Parts(v.requires_grad_(), pattern, {}, in_axis=in_axis)
    first = near_identity(0.3)(held)
    torch.testing.assert_close(first, 0.7 * torch.eye(inputs).double() + 0.3 / inputs)

    def weight(**state: Tensor) -> Tensor:
        return permuted(held._replace(state={"pattern": pattern, **state}))

    values = (v * pattern).detach().movedim(in_axis, 0)
    mixed = torch.einsum("k...,kj->j...", values, first).movedim(0, in_axis)
    torch.testing.assert_close(weight(permutation=first).detach(), mixed, rtol=1e-12, atol=1e-14)
    order = torch.randperm(inputs, generator=draw)
    hard = weight(permutation=first, order=order)
    assert torch.equal(hard.detach(), values[order].movedim(0, in_axis))
    # As a matrix, the order is a permutation that gives the same weight.
    matrix = torch.eye(inputs).double()[:, order]
    torch.testing.assert_close(weight(permutation=matrix).detach(), hard.detach(), rtol=0, atol=0)
    (soft,) = torch.autograd.grad(weight(permutation=first).sum(), v)
    (kept,) = torch.autograd.grad(hard.sum(), v)
    assert bool((soft != 0).all()) and torch.equal(kept != 0, pattern)
