from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow.core.draws import Stream
from regrow.core.method import Field, Growth, Need
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.parts.allocation import apportion
from regrow.parts.growth import (
    READS,
    Reading,
    at_random,
    by_gradient,
    by_momentum,
    by_momentum_per_neuron,
    gradient,
    half_by_gradient,
    highest,
    highest_per_neuron,
    mixed,
    momentum,
    needs_of,
    unexplored_first,
)
from regrow.parts.redistribution import mean_momentum, survivors
from regrow.parts.remembered import MOMENTUM
from support.fakes import Fake, fakes


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


def shaped(shape: tuple[int, ...], active: Sequence[int], field: Sequence[float], out_axis: int = 0) -> Fake:
    weight = Fake([0.0] * len(field), [], field, "layer.weight")
    weight.shape, weight.out_axis = shape, out_axis
    weight.topology = Topology(shape, torch.tensor(active, dtype=torch.int64))
    return weight


def explored(weight: Fake, positions: Sequence[int]) -> Fake:
    weight.state["explored"] = weight.topology.mask.view(-1).clone()
    weight.state["explored"][list(positions)] = True
    return weight


@given(fakes(), st.data())
def test_unexplored_positions_come_first_and_counts_are_exact(weight: Fake, data: st.DataObject) -> None:
    """Property 33: never a visited position while there are others, all of them where there are too few."""
    numel = weight.topology.numel
    visited = weight.active() | data.draw(st.sets(st.integers(0, numel - 1)))
    # What a mixture's first growth took is not in the record yet.
    held = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    taken = Topology((1, numel), torch.tensor(held, dtype=torch.int64))
    free = set(range(numel)) - set(held)
    count = data.draw(st.integers(0, len(free)))
    grown = unexplored_first(explored(weight, sorted(visited)), taken, count).tolist()
    fresh = free - visited
    assert len(set(grown)) == len(grown) == count
    assert set(grown) <= free
    assert len(set(grown) & fresh) == min(count, len(fresh))


@pytest.mark.parametrize(("count", "certain"), [(2, 0), (4, 3)])
def test_unexplored_first_is_uniform_among_what_it_may_choose(count: int, certain: int) -> None:
    """Property 33: chi-square, among the unexplored and, when these are used up, among the others."""
    weight = explored(Fake([0] * 8, [0], [0, 0, 99, 0, 0, 0, 0, 0]), [2, 3, 5, 6])
    seen = dict.fromkeys([1, 4, 7] if certain == 0 else [2, 3, 5, 6], 0)
    for seed in range(1500):
        weight.generator = Stream(seed, "w", 1)
        grown = unexplored_first(weight, weight.topology, count).tolist()
        assert len({1, 4, 7} & set(grown)) == (certain or count)
        for position in set(grown) & set(seen):
            seen[position] += 1
    mean = 1500 * (count - certain) / len(seen)
    spread = 1 - (count - certain) / len(seen)
    assert sum((n - mean) ** 2 / (mean * spread) for n in seen.values()) < 20


def test_a_position_dropped_a_moment_ago_is_no_discovery() -> None:
    weight = explored(Fake([1, 2, 0, 0], [0, 1], [0] * 4), [])
    kept = Topology((1, 4), torch.tensor([1]))
    assert {tuple(unexplored_first(weight, kept, 2).tolist()) for _ in range(20)} == {(2, 3)}


def test_unexplored_first_needs_the_record() -> None:
    with pytest.raises(ValueError, match=r"layer\.weight has no record of explored positions: add Need\.EXPLORED"):
        unexplored_first(Fake([0] * 4, [], [0] * 4, "layer.weight"), Topology((1, 4), torch.tensor([0])), 1)


@given(fakes(), st.floats(0, 1), st.floats(0, 1))
def test_a_mixture_gives_the_first_its_share_and_the_second_the_rest(
    weight: Fake, fraction: float, share: float
) -> None:
    assert weight.grad is not None
    free = np.flatnonzero(~weight.topology.mask.numpy().reshape(-1))
    count = round(fraction * len(free))
    some = math.floor(share * count + 1e-9)
    order = free[np.argsort(-weight.grad.abs().numpy()[free], kind="stable")]
    grown = mixed(by_gradient, at_random, share)(weight, weight.topology, count).tolist()
    assert grown[:some] == sorted(order[:some].tolist())
    rest = np.setdiff1d(free, order[:some])
    assert grown[some:] == rest[Stream(0, weight.name, 1).subset(rest.size, count - some)].tolist() or some == count
    weight.generator = Stream(0, weight.name, 1)
    assert len(set(grown)) == len(grown) == count


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"mixed: the first growth's share must lie in \[0, 1\], got {share:g}"):
        mixed(at_random, by_gradient, share)


def test_neurons_share_by_their_mean_field_and_grow_their_highest() -> None:
    """Neurons weigh 6, 3 and 1: of 10 entries 5, as many as there is room for, leave 3.75 and 1.25 of the others."""
    field = [-2.0, 1, 1, 1, 1, 0, 0.75, -0.25, 1, 0.5, 0.5, 0, 0, 0, 0, 0.5, -0.25, 0.25]
    weight = shaped((3, 6), [3], field)
    assert sorted(highest_per_neuron(gradient)(weight, weight.topology, 10).tolist()) == [
        *(0, 1, 2, 4, 5),
        *(6, 8, 9, 10),
        15,
    ]
    assert sorted(highest_per_neuron(gradient)(weight, weight.topology, 3).tolist()) == [0, 1, 8]


@pytest.mark.parametrize("out_axis", [0, 1])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    blocks=st.integers(1, 9),
    data=st.data(),
)
def test_growth_per_neuron_is_exact_for_any_layout(
    out_axis: int, shape: tuple[int, ...], blocks: int, data: st.DataObject
) -> None:
    """Property 1: the total always; each neuron within one of its share, its highest first, ties to the lower."""
    numel = math.prod(shape)
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    field = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5]), min_size=numel, max_size=numel))
    weight = shaped(shape, active, field, out_axis)
    count = data.draw(st.integers(0, numel - len(active)))
    grown = highest_per_neuron(blocks_of(blocks))(weight, weight.topology, count)
    chosen = np.zeros(shape, bool)
    chosen.reshape(-1)[grown.numpy()] = True
    rows = [np.moveaxis(a.reshape(shape), out_axis, 0) for a in (chosen, np.abs(field), weight.topology.mask.numpy())]
    assert len(set(grown.tolist())) == grown.numel() == int(chosen.sum()) == count
    means = [row.mean() for row in rows[1]]
    quotas = apportion(means, count, [int((~row).sum()) for row in rows[2]])
    for neuron, score, taken, quota in zip(*rows, quotas, strict=True):
        free = np.flatnonzero(~taken.reshape(-1))
        order = free[np.argsort(-score.reshape(-1)[free], kind="stable")]
        assert sorted(np.flatnonzero(neuron.reshape(-1))) == sorted(order[:quota])


@pytest.mark.parametrize("grow", [by_gradient, highest_per_neuron(gradient)])
def test_what_is_not_finite_or_has_no_room_is_refused(grow: Growth) -> None:
    weight = shaped((2, 2), [0], [1.0, float("nan"), 2, 3])
    with pytest.raises(ValueError, match=r"layer\.weight: 1 of 4 growth scores are not finite"):
        grow(weight, weight.topology, 1)
    with pytest.raises(ValueError, match=r"layer\.weight: cannot grow 4 entries, only 3 are free"):
        grow(weight, weight.topology, 4)


def test_a_growth_says_what_it_reads() -> None:
    own: Field = lambda weight: iter([])  # noqa: E731
    reads = {
        at_random: Need.NOTHING,
        unexplored_first: Need.EXPLORED,
        by_gradient: Need.GRADIENT,
        highest(own): Need.GRADIENT,
        by_momentum: Need.EVERY_GRADIENT,
        by_momentum_per_neuron: Need.EVERY_GRADIENT,
        half_by_gradient: Need.GRADIENT,
        mixed(by_momentum, unexplored_first, 0.1): Need.EVERY_GRADIENT | Need.EXPLORED,
        Reading(at_random, Need.DENSE_VALUES): Need.DENSE_VALUES,
    }
    assert {g: needs_of(g) for g in reads} == reads
    assert {g: READS[g] for g in (gradient, momentum)} == {gradient: Need.GRADIENT, momentum: Need.EVERY_GRADIENT}


def test_a_statistic_says_what_it_reads() -> None:
    assert needs_of(at_random, None) == Need.NOTHING
    assert needs_of(at_random, survivors) == Need.NOTHING
    assert needs_of(by_gradient, mean_momentum) == Need.GRADIENT | Need.EVERY_GRADIENT
    own: Reading[[SparseWeight, Topology], float] = Reading(lambda weight, kept: 1.0, Need.EVERY_GRADIENT)
    assert needs_of(at_random, own) == Need.EVERY_GRADIENT


def test_momentum_that_nobody_observes_is_refused() -> None:
    """Bug 8: growth by momentum without momentum would be growth at random."""
    weight = Fake([1, 2, 3, 0, 0, 0], [0, 1, 2])
    for grow in (by_momentum, by_momentum_per_neuron, mixed(at_random, by_momentum, 0.5)):
        with pytest.raises(ValueError, match=r"^w has no running mean of gradients: .* observe=keep_momentum\(decay\)"):
            grow(weight, weight.topology, 2)
    weight.state[MOMENTUM.key] = torch.tensor([9.0, 9, 9, 1, 3, 2])
    assert by_momentum(weight, weight.topology, 2).tolist() == [4, 5]
