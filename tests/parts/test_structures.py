"""Each structure against a few loops over its groups, and by the laws that every one obeys."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import regrow
from regrow.core.method import Method, Need, Structure
from regrow.core.topology import Topology
from regrow.core.units import largest
from regrow.parts.allocation import uniform
from regrow.parts.schedules import cubic
from regrow.parts.scores import magnitude
from regrow.parts.starts import dense, random_topology
from regrow.parts.structures import (
    best_of_each,
    blocks,
    columns,
    constant_fan_in,
    evenly,
    fan_ins,
    groups,
    heads,
    n_of_m,
    rows,
    unstructured,
)
from regrow.parts.updates import every, prune

Array = NDArray[Any]
INF = math.inf


def weight(*shape: int, transposed: bool = False, name: str = "w") -> Any:
    return SimpleNamespace(name=name, shape=shape, out_axis=int(transposed), in_axis=int(not transposed))


def chosen(structure: Structure, w: Any, score: Array, count: int) -> Array:
    topology = structure(w, torch.from_numpy(score.ravel()), count)
    assert topology.shape == w.shape
    return topology.mask.numpy()


def ranked(entries: list[tuple[int, ...]], score: Array) -> list[tuple[int, ...]]:
    """Positions by falling score, equal ones in order, without those that are not allowed."""
    return sorted((p for p in sorted(entries) if score[p] > -INF), key=lambda p: -score[p])


def mask_of(positions: list[tuple[int, ...]], shape: tuple[int, ...]) -> Array:
    mask = np.zeros(shape, bool)
    for p in positions:
        mask[p] = True
    return mask


@st.composite
def scored(draw: st.DrawFn, forbidden: bool = True) -> tuple[Any, Array]:
    """A weight of odd shape, either way round, and scores with ties."""
    sides = draw(st.lists(st.integers(1, 7), min_size=2, max_size=2))
    shape = (*sides, *draw(st.lists(st.integers(1, 3), max_size=2)))
    values = [0.0, 0.5, 1.0, 2.0, 3.0] + [-INF] * forbidden
    numel = math.prod(shape)
    score = draw(st.lists(st.sampled_from(values), min_size=numel, max_size=numel))
    return weight(*shape, transposed=draw(st.booleans())), np.array(score).reshape(shape)


def positions(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*map(range, shape)))


@given(scored(), st.floats(0, 1))
def test_unstructured_takes_the_highest_anywhere(case: tuple[Any, Array], part: float) -> None:
    w, score = case
    count = int(part * (score > -INF).sum())
    best = ranked(positions(w.shape), score)[:count]
    assert (chosen(unstructured, w, score, count) == mask_of(best, w.shape)).all()


def nearest_groups(groups: list[list[tuple[int, ...]]], score: Array, count: int) -> list[tuple[int, ...]]:
    """Whole groups by falling mean of what is allowed, so many that their number of entries is nearest."""
    held = [[p for p in g if score[p] > -INF] for g in groups]
    held = sorted((g for g in held if g), key=lambda g: -np.mean([score[p] for p in g]))
    sizes = [abs(sum(map(len, held[: k + 1])) - count) for k in range(len(held))]
    taken = sizes.index(min(sizes)) + 1 if held else 0
    return [p for g in held[:taken] for p in g]


@given(scored(), st.floats(0, 1))
def test_rows_are_whole_outputs_of_highest_mean(case: tuple[Any, Array], part: float) -> None:
    w, score = case
    count = int(part * (score > -INF).sum())
    groups = [[p for p in positions(w.shape) if p[w.out_axis] == o] for o in range(w.shape[w.out_axis])]
    assert (chosen(rows, w, score, count) == mask_of(nearest_groups(groups, score, count), w.shape)).all()


@given(scored(), st.floats(0, 1))
def test_columns_are_whole_inputs_of_highest_mean(case: tuple[Any, Array], part: float) -> None:
    w, score = case
    count = int(part * (score > -INF).sum())
    groups = [[p for p in positions(w.shape) if p[w.in_axis] == i] for i in range(w.shape[w.in_axis])]
    assert (chosen(columns, w, score, count) == mask_of(nearest_groups(groups, score, count), w.shape)).all()


@given(scored(), st.floats(0, 1), st.data())
def test_heads_are_equal_parts_of_the_outputs(case: tuple[Any, Array], part: float, data: st.DataObject) -> None:
    w, score = case
    outputs = w.shape[w.out_axis]
    number = data.draw(st.sampled_from([n for n in range(1, outputs + 1) if outputs % n == 0]))
    count, size = int(part * (score > -INF).sum()), outputs // number
    groups = [[p for p in positions(w.shape) if p[w.out_axis] // size == h] for h in range(number)]
    assert (chosen(heads(number), w, score, count) == mask_of(nearest_groups(groups, score, count), w.shape)).all()
    with pytest.raises(ValueError, match=rf"heads\({outputs + 1}\): w has {outputs} outputs, which they do not divide"):
        heads(outputs + 1).box(w)


def test_structures_are_values() -> None:
    assert groups(8) == blocks(8, 1) and groups(8) != blocks(1, 8) and groups(8) != groups(8, largest)
    assert rows != columns and heads(4) == heads(4)


@pytest.mark.parametrize("make", [lambda: blocks(0, 1), lambda: groups(0), lambda: heads(0)])
def test_sizes_below_one_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        make()


@given(scored(), st.floats(0, 1), st.integers(1, 4), st.integers(1, 4))
def test_blocks_are_whole_tiles_of_the_largest_sizes_that_divide(
    case: tuple[Any, Array], part: float, height: int, width: int
) -> None:
    w, score = case
    count = int(part * (score > -INF).sum())
    tiles: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    tall, wide = (
        max(n for n in range(1, wanted + 1) if w.shape[axis] % n == 0)
        for wanted, axis in ((height, w.out_axis), (width, w.in_axis))
    )
    for p in positions(w.shape):
        corner = list(p)
        corner[w.out_axis] //= tall
        corner[w.in_axis] //= wide
        tiles.setdefault(tuple(corner), []).append(p)
    groups = [tiles[key] for key in sorted(tiles)]
    found = chosen(blocks(height, width), w, score, count)
    assert (found == mask_of(nearest_groups(groups, score, count), w.shape)).all()


def test_the_mean_and_not_the_sum_ranks_partly_allowed_outputs() -> None:
    score = np.array([[3.0, -INF, -INF], [1.0, 1.0, 1.0]])
    assert chosen(rows, weight(2, 3), score, 1).tolist() == [[True, False, False], [False] * 3]


@pytest.mark.parametrize(("count", "outputs"), [(0, 1), (1, 1), (6, 1), (7, 2), (10, 2), (11, 3), (12, 3)])
def test_rows_round_to_the_nearest_and_never_to_none(count: int, outputs: int) -> None:
    """Of two numbers equally near, 4 and 8 to 6, the smaller."""
    score = np.arange(12.0).reshape(3, 4)
    assert chosen(rows, weight(3, 4), score, count).sum(1).tolist() == [0] * (3 - outputs) + [4] * outputs


@given(scored(forbidden=False), st.integers(1, 5), st.data())
def test_n_of_m_keeps_the_best_of_each_group(case: tuple[Any, Array], m: int, data: st.DataObject) -> None:
    w, score = case
    n = data.draw(st.integers(1, m))
    inputs = w.shape[w.in_axis]
    whole, rest = divmod(inputs, m)
    lines = math.prod(w.shape) // inputs
    fixed, low = lines * whole * n, n * rest // m
    count = data.draw(st.integers(fixed + lines * low, fixed + lines * math.ceil(n * rest / m)))
    groups: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    for p in positions(w.shape):
        line = p[: w.in_axis] + p[w.in_axis + 1 :]
        groups.setdefault((line, p[w.in_axis] // m), []).append(p)
    best, waiting = [], []
    for (line, number), group in sorted(groups.items()):
        order = ranked(group, score)
        keep = n if number < whole else low
        best += order[:keep]
        waiting += [(line, order[keep])] if number == whole and keep < len(order) else []
    waiting.sort(key=lambda entry: -score[entry[1]])
    best += [p for _, p in waiting[: count - len(best)]]
    found = chosen(n_of_m(n, m), w, score, count)
    assert found.sum() == count
    assert (found == mask_of(best, w.shape)).all()


@given(scored(forbidden=False), st.integers(0, 10**6))
def test_constant_fan_in_is_the_best_of_its_counts(case: tuple[Any, Array], draw: int) -> None:
    w, score = case
    outputs, numel = w.shape[w.out_axis], math.prod(w.shape)
    count = outputs + draw % (numel - outputs + 1)
    each, surplus = divmod(count, outputs)
    best, waiting = [], []
    for o in range(outputs):
        order = ranked([p for p in positions(w.shape) if p[w.out_axis] == o], score)
        best += order[:each]
        waiting += order[each : each + 1]
    best += sorted(waiting, key=lambda p: (-score[p], p[w.out_axis]))[:surplus]
    found = chosen(constant_fan_in, w, score, count)
    assert found.sum() == count
    assert (found == mask_of(best, w.shape)).all()
    fan = fan_ins(Topology(w.shape, torch.from_numpy(np.flatnonzero(found))), w.out_axis)
    assert fan.tolist() == np.moveaxis(found, w.out_axis, 0).reshape(outputs, -1).sum(1).tolist()
    assert int(fan.max() - fan.min()) == bool(surplus)


@pytest.mark.parametrize("count", range(3, 10))
def test_no_equal_fan_in_has_a_larger_sum(count: int) -> None:
    """By trying all."""
    score = np.random.default_rng(count).normal(size=(3, 3))
    best = max(
        sum(score.ravel()[list(c)])
        for c in combinations(range(9), count)
        if np.ptp(np.bincount(np.array(c) // 3, minlength=3)) <= 1
    )
    assert score[chosen(constant_fan_in, weight(3, 3), score, count)].sum() == pytest.approx(best)


@given(scored(forbidden=False), st.data())
def test_the_best_of_each_row_in_order_of_score_then_position(case: tuple[Any, Array], data: st.DataObject) -> None:
    score = case[1].reshape(case[0].shape[0], -1)
    counts = data.draw(st.lists(st.integers(0, score.shape[1]), min_size=len(score), max_size=len(score)))
    expected = np.zeros_like(score, dtype=bool)
    for row, count in enumerate(counts):
        expected[row, np.argsort(-score[row], kind="stable")[:count]] = True
    assert (best_of_each(torch.from_numpy(score), torch.tensor(counts)).numpy() == expected).all()


def test_nothing_of_nothing() -> None:
    assert evenly(torch.empty(3, 0), 0).shape == (3, 0)
    assert best_of_each(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)).shape == (0, 4)


ALL: dict[str, Structure] = {
    "unstructured": unstructured,
    "rows": rows,
    "blocks": blocks(2, 4),
    "n_of_m": n_of_m(2, 4),
    "constant_fan_in": constant_fan_in,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_ranked(name: str, dtype: torch.dtype) -> None:
    score = torch.arange(48.0).flip(0).to(dtype)
    found = ALL[name](weight(6, 8), score, 24)
    assert found.nnz == 24
    assert found == ALL[name](weight(6, 8), score.float(), 24)


@pytest.mark.parametrize("name", ALL)
def test_all_that_there_is_costs_no_positions(name: str) -> None:
    structure = n_of_m(4, 4) if name == "n_of_m" else ALL[name]
    assert structure(weight(6, 8), torch.ones(48), 48).positions is None


@pytest.mark.parametrize("name", ALL)
def test_nan_is_refused_by_name(name: str) -> None:
    score = torch.ones(48)
    score[3] = math.nan
    with pytest.raises(ValueError, match=r"^fc: 1 of 48 scores are NaN: training has diverged$"):
        ALL[name](weight(6, 8, name="fc"), score, 24)


@pytest.mark.parametrize("name", ALL)
def test_more_than_is_allowed_is_refused(name: str) -> None:
    score = torch.ones(48)
    score[:30] = -INF
    with pytest.raises(ValueError, match=r"fc has 18 allowed entries, and 24 are asked for$"):
        ALL[name](weight(6, 8, name="fc"), score, 24)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: n_of_m(0, 4), r"n_of_m: n must lie in \[1, m\], got n = 0 and m = 4"),
    (lambda: n_of_m(5, 4), r"n_of_m: n must lie in \[1, m\], got n = 5 and m = 4"),
    (lambda: blocks(0, 2), "blocks: height and width must be at least 1, got 0 x 2"),
    (lambda: blocks(2, -1), "blocks: height and width must be at least 1, got 2 x -1"),
    (
        lambda: n_of_m(2, 4)(weight(6, 8, name="fc"), torch.ones(48), 23),
        r"n_of_m\(2, 4\): fc keeps 24 of its 48 entries, and 23 are asked for: give it the density 2/4",
    ),
    (
        lambda: n_of_m(2, 4)(weight(6, 9, name="fc"), torch.ones(54), 31),
        r"n_of_m\(2, 4\): fc keeps 24 to 30 of its 54 entries, and 31 are asked for",
    ),
    (
        lambda: constant_fan_in(weight(6, 8, name="fc"), torch.ones(48), 5),
        "constant_fan_in: fc has 6 outputs, and its 5 entries leave some without any: it takes a density of 0.125",
    ),
]


@pytest.mark.parametrize(("call", "told"), REFUSED, ids=[told[:24] for _, told in REFUSED])
def test_what_cannot_be_is_refused_with_its_numbers(call: Callable[[], object], told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=f"^{told}"):
        call()


def test_a_pattern_that_the_allowed_entries_cannot_have_is_refused() -> None:
    score = torch.ones(4, 8)
    score[2, 1:] = -INF
    with pytest.raises(ValueError, match=r"fc has 4 entries for each output, and output 2 has 1 that are allowed"):
        constant_fan_in(weight(4, 8, name="fc"), score.view(-1), 16)
    with pytest.raises(ValueError, match=r"n_of_m\(2, 4\): fc has groups with fewer than 2 allowed entries"):
        n_of_m(2, 4)(weight(4, 8, name="fc"), score.view(-1), 16)


class Net(nn.Module):
    """A weight with a kernel, where dense of the other orientation, and one without."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.axis = int(storage == "masked")
        self.up = nn.ConvTranspose1d(4, 6, 2) if self.axis else nn.Conv1d(4, 6, 2, padding=1)
        self.down = nn.Linear(6 * 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).flatten(1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 3 * 16).view(3, 4, 4)).square().sum().backward()
    optimizer.step()


def lines(sparsifier: regrow.Sparsifier, axis: int) -> dict[str, Tensor]:
    """What is active, as (outputs, inputs and kernel)."""
    masks = {n: t.mask for n, t in sparsifier.topologies.items()}
    return {"up": masks["up.weight"].movedim(axis, 0).flatten(1), "down": masks["down.weight"]}


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("name", ["constant_fan_in", "rows"])
def test_a_random_start_has_the_structure(name: str, storage: Any) -> None:
    def made(seed: int) -> dict[str, Tensor]:
        model = Net(storage)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = Method("m", random_topology(0.4, uniform, ALL[name]))
        return lines(regrow.sparsify(model, optimizer, method, storage=storage, seed=seed), model.axis)

    first = made(0)
    for key, mask in first.items():
        fan = mask.sum(1)
        counts = {"up": {3, 4}, "down": {12}} if name == "constant_fan_in" else {"up": {0, 8}, "down": {0, 30}}
        assert set(fan.tolist()) <= counts[key]
    assert sum(int(m.sum()) for m in first.values()) == (115 if name == "constant_fan_in" else 16 + 90)
    assert all(torch.equal(m, made(0)[key]) for key, m in first.items())
    assert any(not torch.equal(m, made(1)[key]) for key, m in first.items())


def test_a_random_structure_is_as_likely_at_every_position() -> None:
    """Property 18, with two outputs of which one has the surplus."""
    seen = np.zeros(10)
    for seed in range(600):
        model = nn.Linear(5, 2)
        start = random_topology(0.5, uniform, constant_fan_in)
        regrow.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), Method("m", start), seed=seed)
        seen += (model.weight != 0).numpy().ravel()
    assert ((seen - 300) ** 2 / 150).sum() < 27.9


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_a_ramp_prunes_whole_outputs(storage: Any) -> None:
    """`prune` with a structure: outputs go for good, the smallest first, at the counts nearest to the ramp."""
    model = Net(storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    update = every(1, prune(cubic(1.0, 0.2, 4), magnitude, uniform, rows), until=4)
    method = Method("m", dense(), update, timing="after", needs=Need.DENSE_VALUES)
    sparsifier = regrow.sparsify(model, optimizer, method, storage=storage, allow_dense=True)
    before, outputs = lines(sparsifier, model.axis), []
    for _ in range(5):
        step(model, optimizer)
        masks = lines(sparsifier, model.axis)
        assert all(not (masks[n] & ~before[n]).any() for n in masks)
        assert all(torch.equal(m, m.any(1, keepdim=True).expand_as(m)) for m in masks.values())
        outputs.append(tuple(int(m.any(1).sum()) for m in masks.values()))
        before = masks
    ramp = [0.2 + 0.8 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4, 4)]
    assert outputs == [(round(6 * d), round(8 * d)) for d in ramp]


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_a_method_prunes_to_two_of_four(storage: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    first = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    start = regrow.methods.gmp(0.5, until=2, interval=1)._replace(
        update=every(1, prune(cubic(1.0, 0.5, 1), magnitude, uniform, n_of_m(2, 4)), until=2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = regrow.sparsify(model, optimizer, start, storage=storage, allow_dense=True)
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    for name, topology in sparsifier.topologies.items():
        groups = topology.mask.view(-1, 4)
        assert (groups.sum(1) == 2).all()
        best = first[name].abs().view(-1, 4).sort(descending=True).indices[:, :2]
        assert groups.gather(1, best).all()
