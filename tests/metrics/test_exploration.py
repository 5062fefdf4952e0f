"""R_s and its bound against the union of all masks that a run went through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import regrow
from regrow import methods
from regrow.core.method import Method, Need
from regrow.metrics import Exploration, exploration
from regrow.parts import growth
from regrow.parts.schedules import constant
from support.paper import Arrays, backward, batches, masks, network, sgd

EXPLORING: dict[str, Callable[[], Method]] = {
    "itop_set": lambda: methods.itop_set(0.3, until=99, interval=2),
    "itop_rigl": lambda: methods.itop_rigl(0.3, until=99, interval=2),
    "unexplored": lambda: methods.itop_set(0.2, until=99, interval=2, grow=growth.unexplored_first, anneal=constant),
    "mixed": lambda: methods.itop_rigl(0.3, until=99, interval=2, grow=growth.half_by_gradient),
    "forbid": lambda: methods.itop_rigl(0.6, until=99, interval=3, regrow_dropped="forbid"),
    "reset": lambda: methods.itop_set(0.6, until=99, interval=1, regrow_dropped="reset"),
    "instead": lambda: methods.itop_rigl(0.3, until=99, interval=2, timing="instead"),
    "granet": lambda: exploring(methods.granet(0.2, until=99, prune_until=9, interval=2)),
    "ac_dc": lambda: exploring(methods.ac_dc(0.2, until=99, begin=2, phase=3)),
    "set": lambda: exploring(methods.set_(0.3, until=99, interval=3)),
}


def exploring(method: Method) -> Method:
    return method._replace(needs=method.needs | Need.EXPLORED)


def run(method: Method, kind: str = "mlp", storage: Any = "masked") -> Iterator[tuple[Exploration, Arrays]]:
    """Exploration and masks at the start and after every step."""
    model = network(kind, 0)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, method, storage=storage, allow_dense=True)
    yield exploration(sparsifier), masks(sparsifier)
    for batch in batches(kind, 0, 40):
        backward(model, batch)
        optimizer.step()
        yield exploration(sparsifier), masks(sparsifier)


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", EXPLORING)
def test_r_s_is_the_union_of_all_masks_and_its_bound_counts_what_grew(name: str, kind: str, storage: Any) -> None:
    """Property 33: R_s by brute force, monotone, at most (nnz at the start + entries grown) / N at any time."""
    union: Arrays = {}
    grown: dict[str, int] = {}
    before: Arrays = {}
    rates = []
    for found, now in run(EXPLORING[name](), kind, storage):
        union = {n: m | union.get(n, m) for n, m in now.items()}
        grown = {n: grown.get(n, 0) + int((m & ~before.get(n, ~m)).sum()) for n, m in now.items()}
        numel = sum(m.size for m in now.values())
        assert found.overall == pytest.approx(sum(int(m.sum()) for m in union.values()) / numel, abs=1e-15)
        assert found.layers == pytest.approx({n: m.mean() for n, m in union.items()}, abs=1e-15)
        assert found.bounds == pytest.approx({n: min(1, grown[n] / m.size) for n, m in now.items()}, abs=1e-15)
        assert found.bound == pytest.approx(sum(min(grown[n], m.size) for n, m in now.items()) / numel, abs=1e-15)
        assert found.overall <= found.bound and all(found.layers[n] <= found.bounds[n] for n in now)
        rates.append(found.overall)
        before = now
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(sum(int(m.sum()) for m in first_masks(name, kind).values()) / numel)
    assert rates[-1] > rates[0] or name == "ac_dc"


def first_masks(name: str, kind: str) -> Arrays:
    return next(run(EXPLORING[name](), kind))[1]


def test_unexplored_first_meets_the_bound_until_all_is_visited_and_not_before() -> None:
    """Property 33: no position is visited twice while there are others, and R_s = 1 is reached, with all visited."""
    union: Arrays = {}
    complete = False
    for found, now in run(EXPLORING["unexplored"]()):
        union = {n: m | union.get(n, m) for n, m in now.items()}
        everything = all(m.all() for m in union.values())
        assert (found.overall == 1.0) == everything
        for n, m in union.items():
            assert found.layers[n] == found.bounds[n] or m.all()
        complete |= everything
    assert complete


def test_growth_by_chance_stays_below_the_bound() -> None:
    """The bound is not met by a growth that revisits: the two are not the same number."""
    *_, (found, _) = run(methods.itop_set(0.3, until=99, interval=2, anneal=constant))
    assert found.overall < found.bound == 1.0


def test_a_resumed_run_remembers_what_it_explored() -> None:
    """Property 14: the record and the count of what grew are in the sparsifier's state."""

    def begin() -> tuple[Any, Any, regrow.Sparsifier]:
        model = network("mlp", 0)
        optimizer = sgd(model)
        return model, optimizer, regrow.sparsify(model, optimizer, EXPLORING["unexplored"]())

    def go(model: Any, optimizer: Any, first: int, last: int) -> None:
        for batch in batches("mlp", 0)[first:last]:
            backward(model, batch)
            optimizer.step()

    model, optimizer, sparsifier = begin()
    go(model, optimizer, 0, 7)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, sparsifier)])
    go(model, optimizer, 7, 16)
    other, its_optimizer, again = begin()
    for part, state in zip((other, its_optimizer, again), states, strict=True):
        part.load_state_dict(state)
    go(other, its_optimizer, 7, 16)
    assert all(np.array_equal(m, masks(sparsifier)[n]) for n, m in masks(again).items())
    assert exploration(again) == exploration(sparsifier)


def test_what_is_not_recorded_is_refused_with_the_way_out() -> None:
    model = network("mlp", 0)
    sparsifier = regrow.sparsify(model, sgd(model), methods.rigl(0.3, until=999))
    with pytest.raises(ValueError, match=r"rigl keeps no explored positions: use method\._replace\(needs="):
        exploration(sparsifier)
