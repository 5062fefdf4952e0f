from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from regrow.core.method import Allocation
from regrow.core.names import matches
from regrow.core.topology import Topology
from regrow.core.weight import Shaped, Weights
from regrow.parts.allocation import (
    apportion,
    at_least,
    by_flops,
    counts,
    er,
    erk,
    erk_power,
    explicit,
    globally,
    last_at_least,
    layer_adaptive,
    proportional,
    require_last,
    uniform,
    whole_units,
)
from support.networks import resnet50

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
TWO_ROUNDS = {"a": (4, 4), "b": (8, 4), "c": (64, 64), "d": (10, 64)}

shares_and_capacities = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(0, 200)), max_size=8
)
shapes = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda s: {f"w{i}": shape for i, shape in enumerate(s)}
)


def weight(name: str, shape: tuple[int, ...]) -> Shaped:
    return Shaped(name, shape, Topology(shape))


def shape_only(shape: Sequence[int]) -> list[Shaped]:
    return [weight(f"w{i}", (n,)) for i, n in enumerate(shape)]


def water_filling(shares: Sequence[float], total: float, capacity: Sequence[float]) -> list[float]:
    """min(capacity, scale x share) with the scale found by bisection."""
    low, high = 0.0, 1.0
    while sum(min(c, high * s) for s, c in zip(shares, capacity, strict=True)) < total * (1 - 1e-15):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        filled = sum(min(c, middle * s) for s, c in zip(shares, capacity, strict=True))
        low, high = (middle, high) if filled < total else (low, middle)
    return [min(c, high * s) for s, c in zip(shares, capacity, strict=True)]


def densities(allocate: Allocation, table: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    return {k: n / math.prod(table[k]) for k, n in counts(allocate, table, density).items()}


@given(shares_and_capacities, st.data())
def test_apportion_sums_exactly_within_capacity(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    """Property 8: never above capacity, total conserved."""
    shares, capacity = [s for s, _ in pairs], [c for _, c in pairs]
    total = data.draw(st.integers(0, sum(capacity)))
    given_out = apportion(shares, total, capacity)
    assert sum(given_out) == total
    assert all(0 <= n <= c and isinstance(n, int) for n, c in zip(given_out, capacity, strict=True))


@given(shares_and_capacities, st.data())
def test_apportion_is_within_one_of_water_filling(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    """Property 15: the clamped set is exactly the water-filling solution."""
    shares = [s or 1e-3 for s, _ in pairs]
    capacity = [c for _, c in pairs]
    total = data.draw(st.integers(0, sum(capacity)))
    exact = water_filling(shares, total, capacity)
    assert all(abs(n - x) < 1 + 1e-6 for n, x in zip(apportion(shares, total, capacity), exact, strict=True))


@given(shares_and_capacities, st.data())
def test_permuting_places_permutes_the_apportionment(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    """Property 16: invariant under layer order."""
    total = data.draw(st.integers(0, sum(c for _, c in pairs)))
    order = data.draw(st.permutations(range(len(pairs))))
    straight = apportion([s for s, _ in pairs], total, [c for _, c in pairs])
    permuted = apportion([pairs[i][0] for i in order], total, [pairs[i][1] for i in order])
    # Places alike in share and capacity may swap a single entry between them.
    assert sorted((*pairs[i], n) for i, n in zip(order, permuted, strict=True)) == sorted(
        (*pair, n) for pair, n in zip(pairs, straight, strict=True)
    )


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.data())
def test_no_share_at_all_means_proportional_to_capacity(capacity: list[int], data: st.DataObject) -> None:
    """Property 28: a dead network still redistributes."""
    total = data.draw(st.integers(0, sum(capacity)))
    assert apportion([0.0] * len(capacity), total, capacity) == apportion([float(c) for c in capacity], total, capacity)


@pytest.mark.parametrize(
    ("shares", "total", "capacity", "expected"),
    [
        ([1, 1, 2], 10, [2, 100, 100], [2, 3, 5]),
        ([1, 1, 1], 2, [5, 5, 5], [1, 1, 0]),
        ([1, 2, 2], 3, [9, 9, 9], [1, 1, 1]),
        ([1, 3], 2, [9, 9], [0, 2]),
        ([3, 3], 3, [4, 5], [1, 2]),
        ([10.9, 0.3, 8.8], 20, [10, 20, 20], [10, 0, 10]),
        ([0, 1], 5, [9, 3], [2, 3]),
        ([0, 0, 1], 6, [2, 4, 3], [1, 2, 3]),
        ([0.29, 0.71], 100, [1000, 1000], [29, 71]),
        ([], 0, [], []),
    ],
)
def test_apportion_by_hand(shares: list[float], total: int, capacity: list[int], expected: list[int]) -> None:
    """Largest remainder, then larger share, larger capacity, earlier place."""
    assert apportion(shares, total, capacity) == expected


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError("still running")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(2)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("share", [1e-310, 1e-300, 1e300])
def test_apportion_ends_for_shares_of_any_size(alarm: None, share: float) -> None:
    """Property 28: a layer whose running mean decayed for thousands of steps has such a share."""
    assert apportion([share, share], 5, [10, 10]) == [3, 2]
    assert apportion([1.0, 2.0, share], 25, [10, 10, 10]) == ([5, 10, 10] if share > 1 else [10, 10, 5])


def test_counts_are_exact_far_above_two_to_the_24() -> None:
    """Property 47."""
    n = 2**40 + 1
    assert apportion([1, 1], n, [n, n]) == [2**39 + 1, 2**39]
    assert counts(uniform, {"a": (2**20, 2**20), "b": (1, 3)}, 1.0) == {"a": 2**40, "b": 3}
    assert sum(counts(erk, {"a": (2**13, 2**13), "b": (2**12, 2**14 + 1)}, 0.5).values()) == (2**27 + 2**12 + 1) // 2


@given(shapes, st.floats(0, 1), st.sampled_from([uniform, er, erk, erk_power(0.5)]))
def test_every_allocation_gives_out_the_rounded_total(
    table: dict[str, tuple[int, ...]], density: float, allocate: Allocation
) -> None:
    """Property 15: the sum equals the integer target, densities within [0, 1]; property 16: at density 1 all is 1."""
    numel = sum(math.prod(s) for s in table.values())
    given_out = counts(allocate, table, density)
    assert sum(given_out.values()) == math.floor(density * numel + 0.5)
    assert all(0 <= given_out[k] <= math.prod(table[k]) for k in table)
    assert counts(allocate, table, 1.0) == {k: math.prod(s) for k, s in table.items()}


@given(shapes, st.floats(0, 1))
def test_erk_is_water_filling_of_its_formula(table: dict[str, tuple[int, ...]], density: float) -> None:
    """Property 15: layers that are not dense share one ratio of density to sum(shape) / prod(shape)."""
    numel = [math.prod(s) for s in table.values()]
    exact = water_filling([sum(s) for s in table.values()], math.floor(density * sum(numel) + 0.5), numel)
    assert all(abs(n - x) < 1 + 1e-6 for n, x in zip(counts(erk, table, density).values(), exact, strict=True))


@given(shapes, st.floats(0, 1))
def test_er_is_water_filling_of_its_formula(table: dict[str, tuple[int, ...]], density: float) -> None:
    """The first two axes are outputs and inputs."""
    numel = [math.prod(s) for s in table.values()]
    shares = [(s[0] + s[1]) / (s[0] * s[1]) * math.prod(s) for s in table.values()]
    exact = water_filling(shares, math.floor(density * sum(numel) + 0.5), numel)
    assert all(abs(n - x) < 1 + 1e-6 for n, x in zip(counts(er, table, density).values(), exact, strict=True))


@given(shapes, st.floats(0, 1))
def test_power_zero_is_uniform_and_one_is_erk(table: dict[str, tuple[int, ...]], density: float) -> None:
    """Property 16."""
    zero, one = erk_power(0), erk_power(1)
    assert counts(zero, table, density) == counts(uniform, table, density)
    near = zip(counts(one, table, density).values(), counts(erk, table, density).values(), strict=True)
    assert all(abs(a - b) <= 1 for a, b in near)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), st.floats(0, 1))
def test_er_equals_erk_for_fully_connected_layers(layers: list[tuple[int, int]], density: float) -> None:
    """Property 16."""
    table: dict[str, tuple[int, ...]] = {f"w{i}": s for i, s in enumerate(layers)}
    near = zip(counts(er, table, density).values(), counts(erk, table, density).values(), strict=True)
    assert all(abs(a - b) <= 1 for a, b in near)


def test_er_reads_the_declared_axes() -> None:
    """A transposed weight gets what its ordinary form gets."""
    ordinary = Shaped("a", (7, 3, 2, 5), Topology((7, 3, 2, 5)))
    moved = Shaped("a", (5, 2, 7, 3), Topology((5, 2, 7, 3)), out_axis=2, in_axis=3)
    other = weight("b", (9, 4))
    assert er([ordinary, other], None, 40) == er([moved, other], None, 40)


@given(shapes, st.floats(0, 1))
def test_uniform_gives_every_layer_the_density(table: dict[str, tuple[int, ...]], density: float) -> None:
    given_out = counts(uniform, table, density)
    slack = 1 + 0.5 / len(table)
    assert all(abs(given_out[k] - density * math.prod(s)) <= slack for k, s in table.items())


@pytest.mark.parametrize(
    ("density", "expected"),
    [(0.1, (0.07957, 0.23019, 1.0)), (0.05, (0.03848, 0.11133, 0.91851)), (0.02, (0.01539, 0.04453, 0.36740))],
)
def test_erk_of_lenet_300_100(density: float, expected: tuple[float, ...]) -> None:
    """Property 15, reference vectors: to 1e-4, or one entry of the small last layer."""
    for (name, found), wanted in zip(densities(erk, LENET, density).items(), expected, strict=True):
        assert abs(found - wanted) <= max(1e-4, 1 / math.prod(LENET[name]))


def test_erk_counts_of_lenet_300_100() -> None:
    assert counts(erk, LENET, 0.02) == {"fc1": 3621, "fc2": 1336, "fc3": 367}


def test_erk_clamps_in_two_rounds() -> None:
    """Property 15, reference vector: a, b and d saturate one after the other; c has sparsity 0.583984."""
    found = densities(erk, TWO_ROUNDS, 0.5)
    assert (found["a"], found["b"], found["d"]) == (1, 1, 1)
    assert 1 - found["c"] == pytest.approx(0.583984, abs=1e-4)


@pytest.mark.parametrize(
    ("density", "epsilon", "dense"),
    [
        (
            0.2,
            99.562,
            "layer1.0.conv1 layer1.0.conv3 layer1.0.downsample.0 layer1.1.conv1 layer1.1.conv3 layer1.2.conv1 "
            "layer1.2.conv3 layer2.0.conv1",
        ),
        (0.1, 48.787, "layer1.0.conv1"),
    ],
)
def test_erk_of_resnet_50(density: float, epsilon: float, dense: str) -> None:
    """Property 15, reference vectors: the dense set, and one ratio for all others."""
    with torch.device("meta"):
        modules = resnet50().named_modules()
        table = {n: tuple(m.weight.shape) for n, m in modules if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert sum(math.prod(s) for s in table.values()) == 25_502_912
    found = densities(erk, table, density)
    assert {name for name, d in found.items() if d == 1} == set(dense.split())
    for name in set(table) - set(dense.split()):
        ratio = sum(table[name]) / math.prod(table[name])
        assert abs(found[name] - epsilon * ratio) <= 1e-4 + 1 / math.prod(table[name])
    if density == 0.2:
        sparsities = {"conv1": 0.1428, "layer1.0.conv2": 0.6381, "layer4.0.conv2": 0.9565, "fc": 0.8518}
        assert {k: round(1 - found[k], 4) for k in sparsities} == pytest.approx(sparsities, abs=1.01e-4)


def test_globally_counts_the_highest_scores_anywhere() -> None:
    """Property 23: exact totals with ties, which go to the earlier weight."""
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 5.0]), torch.tensor([2.0, 0.0])]
    by_total = [globally(shape_only([3, 2, 2]), scores, total) for total in range(8)]
    assert by_total == [[0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 1, 0], [2, 2, 0], [2, 2, 1], [3, 2, 1], [3, 2, 2]]


@given(st.lists(st.lists(st.integers(0, 4), max_size=8), min_size=1, max_size=4), st.data())
def test_globally_equals_a_stable_sort_of_all(lists: list[list[int]], data: st.DataObject) -> None:
    """Property 23."""
    scores: list[Tensor] = [torch.tensor(values, dtype=torch.float32) for values in lists]
    total = data.draw(st.integers(0, sum(map(len, lists))))
    pooled = np.concatenate([s.numpy() for s in scores])
    owner = np.repeat(np.arange(len(lists)), [len(values) for values in lists])
    expected = np.bincount(owner[np.argsort(-pooled, kind="stable")[:total]], minlength=len(lists))
    assert globally(shape_only([len(values) for values in lists]), scores, total) == expected.tolist()


def test_globally_may_empty_a_layer_and_at_least_prevents_it() -> None:
    """Property 23: the minimum-per-layer guard."""
    scores = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5])]
    weights = shape_only([4, 3, 1])
    assert globally(weights, scores, 4) == [4, 0, 0]
    assert at_least(2, globally)(weights, scores, 5) == [2, 2, 1]
    assert at_least(1, globally)(weights, scores, 5) == [3, 1, 1]
    assert at_least(0, globally)(weights, scores, 4) == [4, 0, 0]


@given(shapes, st.integers(0, 30), st.floats(0, 1))
def test_at_least_keeps_the_total(table: dict[str, tuple[int, ...]], minimum: int, density: float) -> None:
    """Property 23."""
    floors = {k: min(minimum, math.prod(s)) for k, s in table.items()}
    total = math.floor(density * sum(math.prod(s) for s in table.values()) + 0.5)
    if total < sum(floors.values()):
        with pytest.raises(ValueError, match=rf"at_least\({minimum}\): {total:,} entries are too few"):
            counts(at_least(minimum, erk), table, density)
    else:
        given_out = counts(at_least(minimum, erk), table, density)
        assert sum(given_out.values()) == total
        assert all(given_out[k] >= floors[k] for k in table)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.19, 0.2, 0.21, 0.5, 1.0])
def test_the_last_layer_at_a_fifth_is_gales_rule(density: float) -> None:
    """s' = 1 - (P (1 - s) - 0.2 P_fc) / (P - P_fc) for the others from a sparsity of 0.8 on, the same for all below."""
    table = {"a": (300, 784), "b": (100, 300), "head": (10, 100)}
    found = counts(last_at_least(0.2, None, uniform), table, density)
    everything, last = 300 * 784 + 100 * 300 + 1000, 1000
    sparsity = 1 - density
    others = 1 - (everything * (1 - sparsity) - 0.2 * last) / (everything - last) if sparsity >= 0.8 else sparsity
    assert found["head"] == pytest.approx(max(0.2, density) * last, abs=1)
    for name in ("a", "b"):
        assert found[name] == pytest.approx((1 - others) * math.prod(table[name]), abs=1)
    assert sum(found.values()) == math.floor(density * everything + 0.5)


@given(shapes, st.floats(0, 1), st.floats(0.01, 1), st.sampled_from([uniform, erk, er, erk_power(0.5)]))
def test_the_last_layer_never_falls_below_and_the_total_stays(
    table: dict[str, tuple[int, ...]], least: float, density: float, allocate: Allocation
) -> None:
    sizes = {k: math.prod(s) for k, s in table.items()}
    last = list(table)[-1]
    total, floor = (math.floor(d * n + 0.5) for d, n in ((density, sum(sizes.values())), (least, sizes[last])))
    if floor > total or (floor == total and len(table) > 1):
        with pytest.raises(ValueError, match=f"makes {floor:,} entries of {total:,} in all"):
            counts(last_at_least(least, None, allocate), table, density)
        return
    free, found = (counts(a, table, density) for a in (allocate, last_at_least(least, None, allocate)))
    assert sum(found.values()) == total
    assert found[last] == max(floor, free[last])
    others = {k: s for k, s in table.items() if k != last}
    if free[last] >= floor:
        assert found == free
    elif others:
        assert list(found.values())[:-1] == allocate([weight(k, s) for k, s in others.items()], None, total - floor)


def test_any_layer_may_be_held_and_any_ranking_used() -> None:
    scores = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.5, 5.0])]
    weights = shape_only([4, 4, 2])
    assert last_at_least(0.5, "w1", globally)(weights, scores, 5) == [3, 2, 0]
    assert last_at_least(0.5, None, globally)(weights, scores, 4) == [3, 0, 1]
    assert last_at_least(0.5, "w[01]", globally)(weights, scores, 6) == [4, 2, 0]
    assert last_at_least(0.5, None, globally)(weights, scores, 8) == globally(weights, scores, 8)


def test_the_last_layer_holds_at_most_what_is_active_there() -> None:
    sparse = Shaped("head", (4, 5), Topology((4, 5), torch.arange(3)))
    assert last_at_least(0.5, None, uniform)([weight("a", (4, 5)), sparse], None, 12) == [9, 3]


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_the_last_density_must_be_one(density: float) -> None:
    with pytest.raises(ValueError, match=rf"density of the last layer must lie in \[0, 1\], got {density:g}"):
        last_at_least(density, None, uniform)


def test_a_last_layer_that_does_not_exist_or_takes_all_is_refused() -> None:
    weights = shape_only([10, 4])
    with pytest.raises(ValueError, match="'head' matches none of the weights w0, w1"):
        require_last(0.1, "head", weights, 5)
    with pytest.raises(ValueError, match="density 1 of w1 makes 4 entries of 4 in all, which leaves none for the"):
        require_last(1.0, None, weights, 4)
    with pytest.raises(ValueError, match="density 1 of w0, w1 makes 14 entries of 13 in all: lower it"):
        require_last(1.0, "w*", weights, 13)
    require_last(1.0, "w*", weights, 14)
    require_last(1.0, None, weights, 5)


def test_ten_thousand_places_are_apportioned_at_once(alarm: None) -> None:
    """Growth per neuron shares among as many places as a layer has neurons, one after another full."""
    shares = [1.0 + (i * 7919 % 1000) for i in range(10_000)]
    found = apportion(shares, 300_000, [40 + i % 3 for i in range(10_000)])
    assert sum(found) == 300_000


def test_explicit_gives_what_it_says_and_rest_shares_the_remainder() -> None:
    """Property 17: a given layer changes the others, the total stays."""
    found = counts(explicit({"fc1": 0.02, "fc3": 1.0}, rest=uniform), LENET, 0.05)
    assert found == {"fc1": 4704, "fc2": 7606, "fc3": 1000}
    assert counts(explicit({"fc1": 0.02, "fc2": 0.1, "fc3": 1}), LENET, None) == {"fc1": 4704, "fc2": 3000, "fc3": 1000}


def test_the_first_matching_glob_counts() -> None:
    found = counts(explicit({"fc1": 0.5, "fc*": 0.25}), {"fc1": (4, 4), "fc2": (4, 4)}, None)
    assert found == {"fc1": 8, "fc2": 4}


def test_explicit_passes_the_scores_of_the_others_on() -> None:
    scores = [torch.tensor([9.0, 9.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    allocate = explicit({"w0": 0.5}, rest=globally)
    assert allocate(shape_only([2, 2, 2]), scores, 3) == [1, 0, 2]


def test_explicit_densities_that_agree_with_the_density_are_accepted() -> None:
    """Rounding every layer by itself must not turn an agreement into a contradiction."""
    found = counts(explicit({"*": 0.5}), {"a": (3, 3), "b": (3, 3)}, 0.5)
    assert all(n in (4, 5) for n in found.values())


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("fc.weight", "fc.weight", True),
        ("fc", "fc.weight", True),
        ("f*", "fc.weight", True),
        ("block.*.fc", "block.3.fc.weight", True),
        ("attn.in_proj_weight", "attn.in_proj_weight[1]", True),
        ("attn", "attn.in_proj_weight[1]", True),
        ("attn.in_proj_weight[1]", "attn.in_proj_weight[1]", True),
        ("attn.in_proj_weight[1]", "attn.in_proj_weight[2]", False),
        ("c", "fc.weight", False),
        ("FC", "fc.weight", False),
    ],
)
def test_a_glob_fits_a_weight_its_block_or_its_module(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


def test_total_is_the_rounded_density_of_the_budget() -> None:
    """Property 17: entries outside are charged to the budget."""
    assert [Weights((weight("a", (1, 100)),)).total(d) for d in (0.29, 0.125, 1.0)] == [29, 13, 100]  # type: ignore[arg-type]
    assert Weights((weight("a", (1, 100)),), 50, 50).total(0.5) == 25  # type: ignore[arg-type]
    assert Weights((weight("a", (1, 100)),), 50, 0).total(0.5) == 75  # type: ignore[arg-type]
    assert Weights((weight("a", (1, 100)),), 50, 0).total(1.0) == 100  # type: ignore[arg-type]


def test_an_infeasible_budget_states_its_numbers() -> None:
    """Property 16: infeasible budgets raise a clear error."""
    told = (
        "density 0.1 of 150 entries leaves no room beside the 50 .* the 100 sparsified .* feasible density is 0.333333"
    )
    with pytest.raises(ValueError, match=told):
        Weights((weight("a", (1, 100)),), 50, 50).total(0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_share_must_be_finite_and_positive(value: float) -> None:
    with pytest.raises(ValueError, match=rf"share number 1 of 3 is {value}: shares must be finite"):
        apportion([1.0, value, 1.0], 1, [1, 1, 1])


@pytest.mark.parametrize("total", [-1, 7])
def test_a_total_must_fit(total: int) -> None:
    with pytest.raises(ValueError, match=f"2 weights hold at most 6 entries, so {total} cannot be placed"):
        apportion([1.0, 1.0], total, [3, 3])


@pytest.mark.parametrize("allocate", [uniform, er, erk, proportional(lambda w: 1.0), explicit({"fc1": 1}, rest=erk)])
def test_a_shared_total_must_be_given(allocate: Allocation) -> None:
    with pytest.raises(ValueError, match="this allocation shares out a total: give a density"):
        counts(allocate, LENET, None)


def test_globally_needs_scores() -> None:
    with pytest.raises(ValueError, match="a random start has none: allocate by uniform, er or erk"):
        counts(globally, LENET, 0.1)


def test_globally_names_the_weight_with_nan() -> None:
    scores = [torch.tensor([1.0]), torch.tensor([math.nan, 2.0])]
    with pytest.raises(ValueError, match="w1: 1 of 2 scores are NaN"):
        globally(shape_only([1, 2]), scores, 1)


@pytest.mark.parametrize(
    ("allocate", "density", "told"),
    [
        (explicit({"fc9": 0.1}, rest=erk), 0.1, "'fc9' matches none of the weights fc1, fc2, fc3"),
        (explicit({"fc1": 0.1}), None, "no density for fc2, fc3: add globs, or rest="),
        (explicit({"fc1": 0.9}, rest=erk), 0.1, "make 211,680 active entries, the density asks for 26,620"),
        (explicit({"fc*": 0.1}), 0.5, "make 26,620 active entries, the density asks for 133,100"),
    ],
)
def test_explicit_refuses_what_does_not_fit(allocate: Allocation, density: float | None, told: str) -> None:
    """Property 48: nothing is silently ignored."""
    with pytest.raises(ValueError, match=told):
        counts(allocate, LENET, density)


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_an_explicit_density_must_be_one(density: float) -> None:
    with pytest.raises(ValueError, match=r"the density of 'fc1' must lie in \[0, 1\]"):
        explicit({"fc1": density})


def lamp(score: np.ndarray) -> np.ndarray:
    """Lee et al. 2021, equation 4, by hand: over the squares that come at or after it when magnitudes ascend."""
    order = sorted(range(score.size), key=lambda i: (score[i], -i))
    found = np.zeros(score.size)
    for rank, i in enumerate(order):
        rest = sum(score[j] ** 2 for j in order[rank:])
        found[i] = score[i] ** 2 / rest if rest else 0.0
    return found


magnitudes = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 7.0]), min_size=1, max_size=7), min_size=1, max_size=4
)


@given(magnitudes, st.data())
def test_layer_adaptive_ranks_the_papers_score_globally(lists: list[list[float]], data: st.DataObject) -> None:
    """With ties and zeros; sums and capacity are those of a ranking."""
    scores, total = [torch.tensor(v) for v in lists], data.draw(st.integers(0, sum(map(len, lists))))
    pooled = np.concatenate([lamp(np.array(v)) for v in lists])
    owner = np.repeat(np.arange(len(lists)), [len(v) for v in lists])
    expected = np.bincount(owner[np.argsort(-pooled.round(12), kind="stable")[:total]], minlength=len(lists))
    assert layer_adaptive(shape_only([len(v) for v in lists]), scores, total) == expected.tolist()


def test_layer_adaptive_by_numbers() -> None:
    """1, 2, 3 have 1/14, 4/13 and 1; 4 and 3 have 1 and 9/25; what is first of a weight is never first to go."""
    scores, weights = [torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 3]), torch.tensor([1e-6])], shape_only([3, 2, 1])
    found = [layer_adaptive(weights, scores, total) for total in range(7)]
    assert found == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 2, 1], [2, 2, 1], [3, 2, 1]]


@given(magnitudes, st.data())
def test_layer_adaptive_does_not_see_the_scale_of_a_weight(lists: list[list[float]], data: st.DataObject) -> None:
    scores, total = [torch.tensor(v) for v in lists], data.draw(st.integers(0, sum(map(len, lists))))
    scaled = [s * 2.0 ** data.draw(st.integers(-20, 20)) for s in scores]
    weights = shape_only([len(v) for v in lists])
    assert layer_adaptive(weights, scaled, total) == layer_adaptive(weights, scores, total)


def test_layer_adaptive_refuses_what_it_cannot_rank() -> None:
    with pytest.raises(ValueError, match="layer_adaptive ranks scores, and a random start has none"):
        counts(layer_adaptive, LENET, 0.1)
    with pytest.raises(ValueError, match="w1: 1 of 2 scores are negative, and layer_adaptive squares them"):
        layer_adaptive(shape_only([1, 2]), [torch.tensor([1.0]), torch.tensor([-1.0, 2.0])], 1)
    with pytest.raises(ValueError, match="w1: 1 of 2 scores are NaN"):
        layer_adaptive(shape_only([1, 2]), [torch.tensor([1.0]), torch.tensor([math.nan, 2.0])], 1)


tables = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3, 7.5, 49])), min_size=1, max_size=5
)


def cost(found: dict[str, int], uses: dict[str, float]) -> float:
    return sum(uses[n] * k for n, k in found.items())


@given(tables, st.floats(0, 1))
@pytest.mark.parametrize("base", [uniform, erk, at_least(1, erk)])
def test_by_flops_meets_its_budget(base: Allocation, rows: list[tuple[int, int, float]], density: float) -> None:
    """Never above its share of the dense multiplications; one entry more, shared out alike, would be."""
    table, uses = (
        {f"w{i}": (a, b) for i, (a, b, _) in enumerate(rows)},
        {f"w{i}": u for i, (_, _, u) in enumerate(rows)},
    )
    numel = sum(a * b for a, b, _ in rows)
    total = math.floor(density * numel + 0.5)
    if base not in (uniform, erk) and total < len(rows):
        return
    weights = [weight(n, s) for n, s in table.items()]
    found = dict(zip(table, by_flops(uses, base)(weights, None, total), strict=True))
    budget = total / numel * sum(u * a * b for a, b, u in rows)
    assert cost(found, uses) <= budget * (1 + 1e-12)
    assert all(0 <= k <= math.prod(table[n]) for n, k in found.items())
    assert found == dict(zip(table, base(weights, None, sum(found.values())), strict=True))
    if (more := sum(found.values()) + 1) <= numel:
        assert cost(dict(zip(table, base(weights, None, more), strict=True)), uses) > budget * (1 - 1e-12)


@given(shapes, st.floats(0, 1), st.sampled_from([1, 2.5, 1000]))
@pytest.mark.parametrize("base", [uniform, er, erk])
def test_by_flops_of_equal_uses_is_the_allocation_itself(
    base: Allocation, table: dict[str, tuple[int, ...]], density: float, use: float
) -> None:
    assert counts(by_flops({"*": use}, base), table, density) == counts(base, table, density)


@given(st.permutations(range(4)))
def test_by_flops_does_not_see_the_order_of_weights(order: list[int]) -> None:
    table, uses = {"a": (9, 40), "b": (30, 30), "c": (10, 100), "d": (7, 5)}, {"a": 25, "b": 9, "c": 1, "d": 4}
    names = [list(table)[i] for i in order]
    turned = counts(by_flops(uses, erk), {n: table[n] for n in names}, 0.2)
    assert turned == counts(by_flops(uses, erk), table, 0.2)


def test_by_flops_of_scores_keeps_the_best_that_the_budget_pays() -> None:
    """`globally` around: 1 multiplication each in the first weight, 10 in the second; a half of 26 pays 3 + 1."""
    scores = [torch.tensor([9.0, 7, 5, 3, 2, 1]), torch.tensor([8.0, 6.0])]
    allocate = by_flops({"w0": 1, "w1": 10}, globally)
    assert allocate(shape_only([6, 2]), scores, 4) == [2, 1]
    assert allocate(shape_only([6, 2]), scores, 8) == [6, 2]
    assert allocate(shape_only([6, 2]), scores, 0) == [0, 0]


@pytest.mark.parametrize(
    ("uses", "told"),
    [
        ({"fc1": 2.0, "fc2": 1.0}, "by_flops: no uses for fc3: add globs"),
        ({"*": 0.0}, "by_flops: no entry of fc1, fc2, fc3 is ever multiplied"),
    ],
)
def test_by_flops_refuses_what_it_cannot_count(uses: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        counts(by_flops(uses, erk), LENET, 0.1)
    with pytest.raises(ValueError, match="by_flops: give a density, which is the share"):
        counts(by_flops({"*": 1.0}, erk), LENET, None)


@pytest.mark.parametrize("use", [-1.0, math.inf, math.nan])
def test_uses_must_be_numbers(use: float) -> None:
    with pytest.raises(ValueError, match="the uses of 'fc1' must be finite and at least 0"):
        by_flops({"fc1": use}, erk)


@pytest.mark.parametrize("allocate", [uniform, erk, globally, layer_adaptive])
def test_more_than_there_is_means_all_there_is(allocate: Allocation) -> None:
    """A budget in FLOPs may hold fewer entries than its density says, and the next pruning asks for more than these."""
    weights = [Shaped("a", (4, 4), Topology((4, 4), torch.arange(5))), weight("b", (3, 2))]
    assert allocate(weights, [torch.rand(5), torch.rand(6)], 20) == [5, 6]


def of_units(*places: int, unit: int) -> list[Shaped]:
    return [Shaped(f"w{i}", (unit, n), Topology((unit, n), unit=(unit, 1))) for i, n in enumerate(places)]


@given(st.integers(0, 200), st.integers(1, 6))
def test_one_ranking_of_units_comes_as_near_to_the_total_as_they_can(total: int, unit: int) -> None:
    """Of two equally near numbers of units it is the smaller."""
    weights = of_units(9, 4, 7, unit=unit)
    scores = [torch.from_numpy(np.random.default_rng(i).permutation(w.topology.places)) for i, w in enumerate(weights)]
    found = globally(weights, scores, total)
    assert sum(found) == min(range(21), key=lambda n: abs(n * unit - min(total, 20 * unit)))
    ranked = sorted(((-int(s), i, at) for i, score in enumerate(scores) for at, s in enumerate(score)))[: sum(found)]
    assert found == [sum(i == place for _, i, _ in ranked) for place in range(3)]


@given(st.integers(0, 500))
def test_units_of_different_sizes_are_ranked_together_by_what_they_hold(total: int) -> None:
    weights = [*of_units(9, unit=4), *of_units(30, unit=1), *of_units(5, unit=6)]
    scores = [torch.from_numpy(np.random.default_rng(i).random(w.topology.places)) for i, w in enumerate(weights)]
    found = globally(weights, scores, total)
    ranked = sorted((-float(s), i, at) for i, score in enumerate(scores) for at, s in enumerate(score))
    held = np.cumsum([0, *([4, 1, 6][i] for _, i, _ in ranked)])
    assert sum(found) == int(np.abs(held - min(total, 96)).argmin())
    assert found == [sum(i == place for _, i, _ in ranked[: sum(found)]) for place in range(3)]


@given(st.lists(st.integers(0, 12), min_size=3, max_size=3), st.integers(1, 6))
def test_whole_units_are_rounded_and_their_sum_is_as_near_as_it_can(entries: list[int], unit: int) -> None:
    weights = of_units(12, 12, 12, unit=unit)
    found = whole_units(entries, weights)
    assert all(n >= (e > 0) and abs(n - e / unit) <= 1 for n, e in zip(found, entries, strict=True))
    if all(e >= unit for e in entries):
        assert abs(sum(found) * unit - sum(entries)) <= unit / 2


def test_floors_and_densities_of_layers_are_of_units_too() -> None:
    weights = of_units(10, 20, unit=4)
    assert explicit({"w0": 0.5}, rest=uniform)(weights, None, 60) == [5, 10]
    assert last_at_least(0.5, "w0", uniform)(weights, None, 40) == [5, 5]
    assert at_least(9, uniform)(weights, None, 24) == [3, 3]
    assert by_flops({"w0": 3, "w1": 1}, uniform)(weights, None, 60) == [5, 10]
