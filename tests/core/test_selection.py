from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow.core.selection import highest, kth_largest

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]

few_values = st.lists(st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 1.0, 1.5, 3.0]), max_size=40)


def by_sorting(score: Tensor, count: int) -> list[int]:
    return sorted(np.argsort(-score.double().numpy(), kind="stable")[:count].tolist())


@given(few_values, st.floats(0, 1))
def test_highest_is_a_stable_descending_sort(values: list[float], fraction: float) -> None:
    """Properties 4 and 5: ties go to the lower position."""
    score = torch.tensor(values, dtype=torch.float64)
    count = round(fraction * len(values))
    assert highest(score, count).tolist() == by_sorting(score, count)


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=60), st.data())
def test_highest_of_any_floats(values: list[float], data: st.DataObject) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, len(values)))
    chosen = highest(score, count)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == by_sorting(score, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_ranked(dtype: torch.dtype) -> None:
    score = (torch.randn(200) * 3).to(dtype)
    for count in (1, 50, 199):
        assert highest(score, count).tolist() == by_sorting(score, count)


def test_the_input_is_left_alone() -> None:
    score = torch.randn(50)
    before = score.clone()
    highest(score, 20)
    assert torch.equal(score, before)


def test_a_strided_score_is_read_right() -> None:
    score = torch.randn(40)[::2]
    assert highest(score, 7).tolist() == by_sorting(score, 7)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.data())
def test_kth_largest(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    assert float(kth_largest(torch.tensor(values).double(), count)) == sorted(values, reverse=True)[count - 1]


def test_counts_are_exact_above_two_to_the_24() -> None:
    """Property 47."""
    n = 2**24 + 7
    score = torch.zeros(n)
    score[-1] = 1.0
    chosen = highest(score, 2**24 + 1)
    assert chosen.numel() == 2**24 + 1
    assert chosen[-2:].tolist() == [2**24 - 1, n - 1]


@pytest.mark.parametrize("count", [-1, 4])
def test_an_impossible_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot select {count} of 3 scores: ask for 0 to 3"):
        highest(torch.zeros(3), count)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_nan_is_refused(count: int) -> None:
    """Property 5: NaN is rejected, not selected."""
    with pytest.raises(ValueError, match=r"2 of 3 scores are NaN"):
        highest(torch.tensor([np.nan, 1.0, np.nan]), count)
