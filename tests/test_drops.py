from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.drops import lowest, lowest_per_sign, share
from regrow.scores import magnitude
from test_updates import Fake, fakes


@given(st.lists(fakes(), min_size=1, max_size=4), st.floats(0, 1))
def test_lowest_keeps_a_stable_sort(weights: list[Fake], fraction: float) -> None:
    """Properties 3 and 4: ties drop the higher position."""
    kept = lowest(magnitude)(weights, [fraction] * len(weights))
    for weight, topology in zip(weights, kept, strict=True):
        active = weight.topology.indices.numpy()
        count = len(active) - math.floor(fraction * len(active) + 1e-9)
        order = np.argsort(-weight.dense.abs().numpy()[active], kind="stable")[:count]
        assert topology.indices.tolist() == sorted(active[order].tolist())


@given(st.lists(fakes(), min_size=1, max_size=4), st.floats(0.01, 1))
def test_per_sign_removes_the_smallest_of_each_sign(weights: list[Fake], fraction: float) -> None:
    """Property 25: ceil(zeta n+) and ceil(zeta n-) smallest magnitudes, every zero; one sign alone is fine."""
    for weight, topology in zip(weights, lowest_per_sign(weights, [fraction] * len(weights)), strict=True):
        values = {i: float(weight.dense[i]) for i in weight.active()}
        kept = topology.indices.tolist()
        for sign in (1, -1):
            mine = sorted((i for i, v in values.items() if v * sign > 0), key=lambda i: (-values[i] * sign, i))
            stays = len(mine) - math.ceil(fraction * len(mine) - 1e-9)
            assert sorted(i for i in kept if values[i] * sign > 0) == sorted(mine[:stays])
        assert all(values[i] != 0 for i in kept)


def test_per_sign_by_hand() -> None:
    """Property 25."""
    weight = Fake([5, -4, 0, 3, -2, 1, 0, -1, 2, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8])
    (kept,) = lowest_per_sign([weight], [0.3])
    assert kept.indices.tolist() == [0, 1, 3, 4]
    (kept,) = lowest_per_sign([weight], [1.0])
    assert kept.nnz == 0
    assert Fake([2, 3, 4]).topology.nnz - lowest_per_sign([Fake([2, 3, 4])], [0.3])[0].nnz == 1


@pytest.mark.parametrize("drop", [lowest(magnitude), lowest_per_sign])
def test_a_fraction_of_zero_changes_nothing(drop: object) -> None:
    """Property 2."""
    weight = Fake([0, 0, 1, 2], [0, 1, 2])
    assert drop([weight], [0.0]) == [weight.topology]  # type: ignore[operator]


def test_each_weight_loses_its_own_fraction() -> None:
    first, second = Fake([1, 2, 3, 4]), Fake([1, 2, 3, 4])
    assert [t.nnz for t in lowest(magnitude)([first, second], [0.25, 0.75])] == [3, 1]
    assert [t.nnz for t in lowest_per_sign([first, second], [0.25, 0.75])] == [3, 1]


@pytest.mark.parametrize("drop", [lowest(magnitude), lowest_per_sign])
def test_nan_is_refused(drop: object) -> None:
    """Property 5: a diverged weight is an error, not something to drop quietly."""
    with pytest.raises(ValueError, match="NaN"):
        drop([Fake([1, math.nan, 3, 4])], [0.5])  # type: ignore[operator]


@given(st.integers(0, 100), st.integers(0, 10**6))
def test_share_of_hundredths_is_exact(percent: int, nnz: int) -> None:
    assert share(percent / 100, nnz) == percent * nnz // 100


@pytest.mark.parametrize("nnz", [10**7, 10**8, 10**9])
def test_share_is_exact_above_two_to_the_24(nnz: int) -> None:
    """Property 47."""
    assert [share(p / 100, nnz) for p in range(101)] == [p * nnz // 100 for p in range(101)]


def test_lowest_reads_its_score() -> None:
    weight = Fake([1, 2, 3, 4])
    (kept,) = lowest(lambda w: -w.values())([weight], [0.5])
    assert kept.indices.tolist() == [0, 1]
    assert torch.equal(weight.dense, torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
