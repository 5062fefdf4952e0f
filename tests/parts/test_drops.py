from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.core.draws import Stream
from regrow.core.method import Drop
from regrow.parts.drops import adaptive_threshold, lowest, lowest_globally, lowest_per_sign, share
from regrow.parts.scores import magnitude, magnitude_and_gradient, random, taylor
from support.fakes import Fake, fakes


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


DROPS = [lowest(magnitude), lowest_per_sign, lowest_globally(magnitude), adaptive_threshold()]


@pytest.mark.parametrize("drop", DROPS)
def test_a_fraction_of_zero_changes_nothing(drop: Drop) -> None:
    """Property 2; also for one weight among others."""
    weight, other = Fake([0, 0, 1, 2], [0, 1, 2]), Fake([5e-4, 0, 2, 9], [0, 2, 3])
    assert drop([weight], [0.0]) == [weight.topology]
    assert not weight.state
    kept = drop([weight, other], [0.0, 0.4])
    assert kept[0] == weight.topology
    assert kept[1].nnz < 3


def test_each_weight_loses_its_own_fraction() -> None:
    first, second = Fake([1, 2, 3, 4]), Fake([1, 2, 3, 4])
    assert [t.nnz for t in lowest(magnitude)([first, second], [0.25, 0.75])] == [3, 1]
    assert [t.nnz for t in lowest_per_sign([first, second], [0.25, 0.75])] == [3, 1]


@pytest.mark.parametrize("drop", DROPS)
def test_nan_is_refused(drop: Drop) -> None:
    """Property 5: a diverged weight is an error that names it, not something to drop quietly; nothing else changes."""
    weights = [Fake([1, 2, 3, 4]), Fake([1, math.nan, 3, 4], name="layer.weight")]
    with pytest.raises(ValueError, match=r"layer\.weight: .*NaN"):
        drop(weights, [0.5, 0.5])
    assert not weights[0].state


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


def active_of(weights: list[Fake]) -> list[tuple[float, int, int]]:
    return [(-abs(float(w.dense[i])), place, i) for place, w in enumerate(weights) for i in sorted(w.active())]


@given(st.lists(fakes(), min_size=1, max_size=4), st.floats(0, 0.99))
def test_one_threshold_keeps_a_stable_sort_of_all_entries(weights: list[Fake], fraction: float) -> None:
    """Properties 3, 4 and 23: exact in all, ties to the earlier weight and lower position, none emptied."""
    kept = lowest_globally(magnitude)(weights, [fraction] * len(weights))
    entries = sorted(active_of(weights))
    firsts = {next(e for e in entries if e[1] == place) for place in {e[1] for e in entries}}
    gone = sum(math.floor(fraction * len(w.active()) + 1e-9) for w in weights)
    others = [e for e in entries if e not in firsts]
    wanted = firsts | set(others[: len(entries) - gone - len(firsts)])
    assert {(p, i) for p, t in enumerate(kept) for i in t.indices.tolist()} == {(p, i) for _, p, i in wanted}


def test_one_threshold_by_hand() -> None:
    """A threshold for all differs from one for each; the last entry of a small weight stays, and 8 goes for it."""
    large, small, empty = Fake([9, 8, 7, 6]), Fake([3, 1, 2, 4]), Fake([1, 2], [])
    drop = lowest_globally(magnitude)
    assert [t.indices.tolist() for t in drop([large, small, empty], [0.5, 0.5, 0.5])] == [[0, 1, 2], [3], []]
    assert [t.indices.tolist() for t in drop([large, small, empty], [0.75, 0.75, 0.75])] == [[0], [3], []]


def test_one_threshold_that_would_empty_a_weight_is_refused() -> None:
    weights = [Fake([9, 8, 7, 6]), Fake([3, 1, 2, 4])]
    with pytest.raises(ValueError, match=r"dropping 8 of 8 active entries .* 2 weights empty: at most 6 can go"):
        lowest_globally(magnitude)(weights, [1.0, 1.0])


@given(st.lists(fakes(), min_size=1, max_size=4), st.floats(0.01, 1), st.sampled_from([0.25, 0.5, 0.75, 1.0, 3.0]))
def test_a_threshold_drops_all_and_only_what_is_not_above_it(
    weights: list[Fake], fraction: float, first: float
) -> None:
    """Property 29: |w| <= tau goes, whatever the fraction; the largest entry of a weight stays."""
    kept = adaptive_threshold(first)(weights, [fraction] * len(weights))
    for weight, topology in zip(weights, kept, strict=True):
        above = {i for i in weight.active() if abs(float(weight.dense[i])) > first}
        if weight.active() and not above:
            above = {min(weight.active(), key=lambda i: (-abs(float(weight.dense[i])), i))}
        assert set(topology.indices.tolist()) == above


def test_the_threshold_follows_what_is_expected() -> None:
    """Property 29: twice, half or the same tau, by a count of the whole network, whichever weight asks."""
    first, second = Fake([0.1 * i for i in range(1, 21)], name="a"), Fake([0.1 * i for i in range(1, 11)], name="b")
    drop = adaptive_threshold(0.25, 0.1)

    def dropped(fraction: float) -> int:
        kept = drop([first, second], [fraction, fraction])
        return 30 - sum(t.nnz for t in kept)

    assert dropped(0.5) == 4
    assert first.state["threshold"].tolist() == second.state["threshold"].tolist() == [0.5, 1]
    assert dropped(0.5) == 10
    assert first.state["threshold"].tolist() == [1.0, 2]
    assert dropped(0.7) == 19
    assert first.state["threshold"].tolist() == [1.0, 3]
    assert dropped(0.6) == 19
    assert first.state["threshold"].tolist() == [1.0, 4]
    assert dropped(0.5) == 19
    assert first.state["threshold"].tolist() == [0.5, 5]
    assert dropped(0.05) == 10
    assert second.state["threshold"].tolist() == [0.25, 6]


def test_a_weight_that_missed_an_update_does_not_set_the_threshold_back() -> None:
    first, second = Fake([0.1 * i for i in range(1, 21)], name="a"), Fake([0.1 * i for i in range(1, 11)], name="b")
    drop = adaptive_threshold(0.25)
    drop([first, second], [0.5, 0.5])
    drop([second], [0.5])
    assert (first.state["threshold"].tolist(), second.state["threshold"].tolist()) == ([0.5, 1], [0.5, 2])
    drop([second], [0.9])
    kept = drop([first, second], [0.5, 0.5])
    assert [t.nnz for t in kept] == [10, 1]


def test_a_threshold_finds_its_way_back() -> None:
    """However long nothing, or everything, was dropped."""
    zeros, ones = Fake([0.0] * 9 + [1.0]), Fake([1.0] * 10)
    drop = adaptive_threshold(1.0, 0.0)
    for _ in range(300):
        drop([zeros], [0.1])
        drop([ones], [1.0])
    assert zeros.state["threshold"].tolist() == [2.0**-100, 300]
    assert ones.state["threshold"].tolist() == [2.0**100, 300]


@pytest.mark.parametrize(
    ("first", "tolerance"), [(0.0, 0.1), (-1.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1.0, 1.0), (1.0, -0.1)]
)
def test_a_threshold_that_cannot_work_is_refused(first: float, tolerance: float) -> None:
    with pytest.raises(ValueError, match=f"got {first:g} and {tolerance:g}"):
        adaptive_threshold(first, tolerance)


def test_the_threshold_is_read_in_double_precision() -> None:
    """In half precision 0.1 is not 0.1, and what is above it by less than a rounding stays."""
    weight = Fake([1.0, 1.0])
    weight.dense = torch.tensor([0.10009765625, 0.0999755859375], dtype=torch.bfloat16)
    assert weight.dense.tolist() == [0.10009765625, 0.10009765625]
    (kept,) = adaptive_threshold(0.1)([weight], [0.5])
    assert kept.nnz == 2


def test_scores_by_hand() -> None:
    weight = Fake([2, -3, 0, 1], [0, 1, 3], [-5, 0.5, 9, 4])
    assert taylor(weight).tolist() == [100, 2.25, 16]
    assert magnitude_and_gradient(2.0)(weight).tolist() == [12, 4, 9]
    assert magnitude_and_gradient(0.0)(weight).tolist() == [2, 3, 1]
    weight.has_grad = False
    assert magnitude_and_gradient(2.0)(weight).tolist() == [2, 3, 1]


def test_taylor_tells_small_half_precision_products_apart() -> None:
    weight = Fake([1, 1], None, [1, 1])
    weight.dense, weight.grad = torch.tensor([1e-4, 2e-4]).bfloat16(), torch.tensor([1e-20, 1e-20]).bfloat16()
    low, high = taylor(weight).tolist()
    assert 0 < low < high


def test_random_scores_are_the_weight_s_own_draws() -> None:
    weight = Fake([1, 2, 3, 4], [0, 2, 3], name="a.b")
    assert random(weight).tolist() == Stream(0, "a.b", 1).uniform(3).tolist()
