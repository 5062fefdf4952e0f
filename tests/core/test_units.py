"""Units in a topology, against loops over the boxes that they are."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from regrow.core import units
from regrow.core.topology import Topology, fan_in_scale

Places = list[tuple[int, ...]]


def boxes(shape: tuple[int, ...], unit: tuple[int, ...]) -> list[Places]:
    """The coordinates of each unit's entries, the first axis fastest; units in the order of their grid."""
    corners = product(*(range(0, size, step) for size, step in zip(shape, unit, strict=True)))
    inside = [tuple(reversed(p)) for p in product(*(range(step) for step in reversed(unit)))]
    places = [[tuple(c + i for c, i in zip(corner, p, strict=True)) for p in inside] for corner in corners]
    return [[p for p in box if all(c < size for c, size in zip(p, shape, strict=True))] for box in places]


def flat(shape: tuple[int, ...], box: Places) -> list[int]:
    return [int(np.ravel_multi_index(p, shape)) for p in box]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    unit = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape = tuple(step * draw(st.integers(1, 3)) for step in unit)
    places = math.prod(-(-size // step) for size, step in zip(shape, unit, strict=True))
    bits = draw(st.lists(st.booleans(), min_size=places, max_size=places))
    return Topology(shape, torch.tensor(bits).nonzero().view(-1), unit)


def active_boxes(topology: Topology) -> list[Places]:
    every = boxes(topology.shape, topology.unit)
    return [every[i] for i in topology.indices.tolist()]


def mask_of(topology: Topology) -> NDArray[np.bool_]:
    mask = np.zeros(topology.shape, bool)
    for box in active_boxes(topology):
        for p in box:
            mask[p] = True
    return mask


@given(topologies())
def test_entries_mask_and_counts_are_those_of_the_boxes(topology: Topology) -> None:
    entries = [i for box in active_boxes(topology) for i in flat(topology.shape, box)]
    assert topology.entries.tolist() == entries
    assert (topology.mask.numpy() == mask_of(topology)).all()
    assert (topology.nnz, topology.numel) == (len(entries), math.prod(topology.shape))
    assert topology.places == math.prod(topology.grid) == len(boxes(topology.shape, topology.unit))
    assert topology.active == topology.indices.numel() and topology.density == topology.nnz / topology.numel
    assert topology.is_dense == bool(topology.mask.all())
    assert topology.entries_of(topology.indices).tolist() == entries


@given(topologies(), st.sampled_from([units.mean, units.root_mean_square, units.largest]))
def test_scores_of_a_unit_become_one(topology: Topology, pool: units.Pool) -> None:
    score = torch.from_numpy(np.random.default_rng(0).standard_normal(topology.nnz)).abs()
    of = {units.mean: np.mean, units.root_mean_square: lambda x: np.sqrt(np.mean(x**2)), units.largest: np.max}[pool]
    at, wanted = 0, []
    for box in active_boxes(topology):
        wanted.append(of(score[at : at + len(box)].numpy()))
        at += len(box)
    # An entry's score is itself, of its own type.
    found = topology.pooled(score.float() if topology.is_unstructured else score, pool)
    np.testing.assert_allclose(found.numpy(), np.array(wanted), rtol=1e-6 if topology.is_unstructured else 1e-12)


@given(topologies(), st.data())
def test_blocks_of_rows_come_unit_by_unit(topology: Topology, data: st.DataObject) -> None:
    """As growth reads a field: some whole rows of units at a time."""
    shape, unit = topology.shape, topology.unit
    values = torch.arange(topology.numel).view(shape)
    first = data.draw(st.integers(0, topology.rows - 1))
    last = data.draw(st.integers(first + 1, topology.rows))
    found = units.by_unit(shape, unit, values[first * unit[0] : last * unit[0]].reshape(-1))
    wanted = boxes(shape, unit)[first * topology.row_size : last * topology.row_size]
    assert found.tolist() == [flat(shape, box) for box in wanted]
    assert torch.equal(units.in_rows(shape, unit, units.by_unit(shape, unit, values.view(-1))), values)


@given(topologies(), st.data())
def test_entries_are_found_among_those_of_another(one: Topology, data: st.DataObject) -> None:
    other = one.at(
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=one.places, max_size=one.places))).nonzero().view(-1)
    )
    rank = {entry: i for i, entry in enumerate(other.entries.tolist())}
    assert one.entry_ranks_in(other).tolist() == [rank.get(entry, -1) for entry in one.entries.tolist()]
    assert one.at(one.without(other)).entries.tolist() == [e for e in one.entries.tolist() if e not in rank]


@given(topologies(), st.data())
def test_keep_add_and_pick_move_whole_units(topology: Topology, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, topology.active))
    kept = topology.keep(torch.rand(topology.active), count)
    assert kept.unit == topology.unit and kept.active == count
    free = sorted(set(range(topology.places)) - set(kept.indices.tolist()))
    added = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
    grown = kept.add(torch.tensor(added, dtype=torch.int64))
    assert set(grown.indices.tolist()) == set(kept.indices.tolist()) | set(added)
    assert (grown.mask.numpy() == mask_of(grown)).all() and (grown.unit, grown.shape) == (topology.unit, topology.shape)
    assert grown.inactive(torch.arange(grown.places - grown.active)).tolist() == [
        i for i in range(grown.places) if i not in set(grown.indices.tolist())
    ]


@given(topologies(), st.integers(1, 3))
def test_blocks_stack_and_come_apart(topology: Topology, copies: int) -> None:
    whole = Topology.stack([topology] * copies)
    assert (whole.mask == torch.cat([topology.mask] * copies)).all()
    rows = topology.rows
    for i in range(copies):
        assert whole.block(i * rows, (i + 1) * rows) == topology
        assert whole.first_entry(i * rows) == i * topology.nnz


@given(topologies())
def test_rows_say_where_the_entries_of_a_block_begin(topology: Topology) -> None:
    for row in range(topology.rows + 1):
        held = [box for i, box in zip(topology.indices.tolist(), active_boxes(topology), strict=True)]
        before = [i for i in topology.indices.tolist() if i < row * topology.row_size]
        assert topology.first_entry(row) == sum(len(box) for box in held[: len(before)])


def test_equality_and_repr_see_the_unit() -> None:
    pairs, entries = Topology((4, 3), unit=(2, 1)), Topology((4, 3))
    assert pairs != entries and pairs == Topology((4, 3), torch.arange(6), (2, 1))
    assert "unit=(2, 1)" in repr(pairs) and "unit" not in repr(entries)
    assert pairs.to(torch.device("cpu")).unit == (2, 1)


def test_fan_ins_are_of_entries() -> None:
    pairs = Topology((4, 3), torch.tensor([0, 4]), (2, 1))
    entries = Topology((4, 3), pairs.entries.sort().values)
    by_entry = dict(zip(entries.entries.tolist(), fan_in_scale(entries).tolist(), strict=True))
    assert fan_in_scale(pairs).tolist() == [by_entry[e] for e in pairs.entries.tolist()]


@pytest.mark.parametrize("unit", [(0, 1), (2,), (2, 1, 1), (-1, 2), (3, 1), (8, 1)])
def test_a_unit_divides_each_axis(unit: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a unit of a weight of shape \(4, 3\) has 2 sizes of at least 1 that divide"):
        Topology((4, 3), unit=unit)


def test_positions_beyond_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must ascend strictly within \[0, 6\)"):
        Topology((4, 3), torch.tensor([6]), (2, 1))
    with pytest.raises(ValueError, match=r"each of its 2 rows of 3 units"):
        Topology.from_rows((4, 3), torch.tensor([0, 1, 1]), torch.tensor([3]), (2, 1))
