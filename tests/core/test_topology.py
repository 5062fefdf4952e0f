from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.core.topology import Topology


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    bits = draw(st.lists(st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return Topology(shape, torch.tensor(bits).nonzero().view(-1))


def active(topology: Topology) -> set[int]:
    return set(np.flatnonzero(topology.mask.numpy()).tolist())


@given(topologies())
def test_counts_mask_and_indices_agree(topology: Topology) -> None:
    mask = topology.mask
    assert mask.shape == topology.shape
    assert topology.nnz == int(mask.sum()) == topology.indices.numel()
    assert topology.numel == mask.numel()
    assert topology.density == topology.nnz / topology.numel
    assert topology.is_dense == bool(mask.all())
    assert mask.view(-1).nonzero().view(-1).tolist() == topology.indices.tolist()


@given(topologies(), st.data())
def test_keep_is_a_stable_sort_of_the_active_entries(topology: Topology, data: st.DataObject) -> None:
    """Properties 3 and 4: the kept are active, and none that is dropped scores higher."""
    score = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=topology.nnz, max_size=topology.nnz))).float()
    count = data.draw(st.integers(0, topology.nnz))
    order = np.argsort(-score.numpy(), kind="stable")[:count]
    assert active(topology.keep(score, count)) == set(topology.indices.numpy()[order].tolist())


@given(topologies(), st.data())
def test_keep_and_add_are_disjoint_and_restore_the_count(topology: Topology, data: st.DataObject) -> None:
    """Property 5: grown and kept are disjoint."""
    kept = topology.keep(torch.rand(topology.nnz), data.draw(st.integers(0, topology.nnz)))
    free = sorted(set(range(topology.numel)) - active(kept))
    added = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
    grown = kept.add(torch.tensor(added, dtype=torch.int64))
    assert active(grown) == active(kept) | set(added)
    assert grown.nnz == kept.nnz + len(added)


@given(topologies())
def test_inactive_equals_brute_force(topology: Topology) -> None:
    listed = np.flatnonzero(~topology.mask.numpy().reshape(-1))
    ranks = torch.randperm(len(listed))
    assert topology.inactive(ranks).tolist() == listed[ranks.numpy()].tolist()


@given(topologies(), st.data())
def test_contains_equals_the_mask(topology: Topology, data: st.DataObject) -> None:
    at = data.draw(st.lists(st.integers(0, topology.numel - 1), max_size=20))
    positions = torch.tensor(at, dtype=torch.int64)
    assert topology.contains(positions).tolist() == topology.mask.view(-1)[positions].tolist()


@given(st.integers(1, 12), st.data())
def test_without_is_the_set_difference(numel: int, data: st.DataObject) -> None:
    subsets = st.sets(st.integers(0, numel - 1))
    mine, other = data.draw(subsets), data.draw(subsets)
    one, two = (Topology((numel,), torch.tensor(sorted(s), dtype=torch.int64)) for s in (mine, other))
    assert one.without(two).tolist() == sorted(mine - other)
    assert Topology((numel,)).without(two).tolist() == sorted(set(range(numel)) - other)
    assert one.without(Topology((numel,))).tolist() == []


def test_a_dense_topology_holds_no_positions() -> None:
    dense = Topology((2, 3))
    assert (dense.nnz, dense.numel, dense.density, dense.is_dense) == (6, 6, 1.0, True)
    assert dense.indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert bool(dense.mask.all())
    assert dense.contains(torch.tensor([0, 5])).tolist() == [True, True]


def test_equality_reads_shape_and_positions() -> None:
    one = Topology((2, 3), torch.tensor([0, 4]))
    assert one == Topology((2, 3), torch.tensor([0, 4]))
    assert one != Topology((2, 3), torch.tensor([0, 5]))
    assert one != Topology((3, 2), torch.tensor([0, 4]))
    assert one != Topology((2, 3), torch.tensor([0]))
    assert Topology((2, 3)) == Topology((2, 3), torch.arange(6))
    assert one != "something else"


def test_keeping_everything_and_adding_nothing_return_the_same_topology() -> None:
    """Property 2, for one weight: no change, no copy."""
    one = Topology((2, 3), torch.tensor([0, 4]))
    assert one.keep(torch.rand(2), 2) is one
    assert one.add(torch.empty(0, dtype=torch.int64)) is one


def test_it_cannot_be_changed_or_hashed() -> None:
    one = Topology((2, 3), torch.tensor([0, 4]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.shape = (6,)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_to_moves_positions_and_nothing_else() -> None:
    one = Topology((2, 3), torch.tensor([0, 4]))
    assert one.to(torch.device("cpu")) is one
    assert Topology((2, 3)).to(torch.device("meta")).positions is None
    moved = Topology((2, 3), torch.tensor([], dtype=torch.int64)).to(torch.device("meta"))
    assert moved.device.type == "meta"


def test_a_weight_without_entries_counts_as_dense() -> None:
    assert Topology((0, 3)).density == 1.0


def test_its_text_states_shape_and_count() -> None:
    assert repr(Topology((2, 3), torch.tensor([0, 4, 5]))) == "Topology(shape=(2, 3), nnz=3, density=0.5)"


@pytest.mark.parametrize("at", [[3, 1], [1, 1], [-1, 2], [0, 6]])
def test_positions_must_ascend_within_the_weight(at: list[int]) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) must ascend strictly within \[0, 6\)"):
        Topology((2, 3), torch.tensor(at))


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        (torch.tensor([0.0]), r"got torch.float32 of shape \(1,\)"),
        (torch.tensor([0], dtype=torch.int32), r"got torch.int32 of shape \(1,\)"),
        (torch.tensor([[0]]), r"got torch.int64 of shape \(1, 1\)"),
    ],
)
def test_positions_must_be_a_vector_of_int64(positions: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match="positions must be int64 of shape .nnz,., " + told):
        Topology((2, 3), positions)


def test_an_active_position_cannot_be_added() -> None:
    """Property 5."""
    with pytest.raises(ValueError, match="must be distinct and inactive"):
        Topology((2, 3), torch.tensor([0, 4])).add(torch.tensor([4]))


def test_keep_needs_one_score_for_each_active_entry() -> None:
    with pytest.raises(ValueError, match="one score for each of the 2 active entries, got 6"):
        Topology((2, 3), torch.tensor([0, 4])).keep(torch.rand(6), 1)


def test_more_than_the_active_entries_cannot_be_kept() -> None:
    """Property 3: no inactive position survives the drop."""
    with pytest.raises(ValueError, match="cannot select 3 of 2"):
        Topology((2, 3), torch.tensor([0, 4])).keep(torch.rand(2), 3)


def test_counts_are_exact_above_two_to_the_24() -> None:
    """Property 47."""
    n = 2**24 + 1
    topology = Topology((1, n + 8), torch.arange(1, n + 1))
    assert topology.nnz == n
    assert topology.contains(torch.tensor([0, n, n + 1])).tolist() == [False, True, False]
    assert topology.inactive(torch.tensor([0, 1])).tolist() == [0, n + 1]


WILD = 2**63 - 1


@pytest.mark.parametrize(
    "positions",
    [
        [0, WILD],
        [-1, 3],
        [3, 3],
        [5, 2],
        # The differences of these wrap around to positive numbers.
        [300, WILD, -(2**62), -(2**62) + 1, 511],
        [0, WILD, -2, 7],
    ],
)
def test_positions_that_do_not_ascend_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend strictly within"):
        Topology((8, 64), torch.tensor(positions))


@pytest.mark.parametrize(
    ("starts", "columns"),
    [
        # Without any column the starts count too: a kernel reads what lies between them.
        (torch.tensor([0, 10**6, 0, 0]), torch.zeros(0, dtype=torch.int32)),
        (torch.tensor([0, -5, 0, 0]), torch.zeros(0, dtype=torch.int32)),
        (torch.tensor([0, WILD, -2, 4]), torch.arange(4, dtype=torch.int32)),
        (torch.tensor([0, 2, 4]), torch.arange(4, dtype=torch.int32)),
        (torch.tensor([0, 4, 4, 4]), torch.tensor([3, 1, 0, 2], dtype=torch.uint8)),
        (torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, 6], dtype=torch.int32)),
        (torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, -1], dtype=torch.int32)),
    ],
    ids=range(7),
)
def test_rows_that_do_not_hold_together_are_refused(starts: torch.Tensor, columns: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must ascend within each of its 3 rows of 6 entries"):
        Topology.from_rows((3, 6), starts, columns)


@pytest.mark.parametrize(
    ("starts", "columns"),
    [
        (torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0])),
        (torch.tensor([0, 1, 1, 1]), torch.tensor([0.1])),
        (torch.tensor([[0, 1, 1, 1]]), torch.tensor([0])),
        (torch.tensor([0, 1, 1, 1]), torch.tensor([[0]])),
        (torch.tensor([0, 1, 1, 1]), torch.tensor([True])),
    ],
    ids=range(5),
)
def test_rows_of_another_type_or_dimension_are_refused(starts: torch.Tensor, columns: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="are one-dimensional integers"):
        Topology.from_rows((3, 6), starts, columns)


def test_strided_rows_are_made_dense() -> None:
    """Kernels read them through a bare pointer."""
    sound = Topology((3, 6), torch.tensor([1, 4, 8, 17]))
    starts, columns = (torch.stack([t, t + 1], -1)[:, 0] for t in (sound.starts, sound.columns))
    assert not starts.is_contiguous() and not columns.is_contiguous()
    found = Topology.from_rows((3, 6), starts, columns)
    assert found == sound
    assert found.starts.is_contiguous() and found.columns.is_contiguous()
    spread = torch.stack([sound.indices, sound.indices], -1)[:, 0]
    assert Topology((3, 6), spread) == sound
