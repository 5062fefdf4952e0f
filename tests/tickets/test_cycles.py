"""The phases of Sup-tickets: their arithmetic, their learning rates, and when topologies change."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow import methods
from regrow.core.method import Need
from regrow.parts.schedules import constant
from regrow.tickets import Plan, plan, reexploring, triangular, without_updates_from
from support.pairs import Run, positions
from support.table import STORAGES


@pytest.mark.parametrize(
    ("steps", "share", "cycle", "expected"),
    [
        (250, 0.1, 8, (226, 8, 3)),
        (250, 0.1, 25, (225, 25, 1)),
        (100, 0.29, 29, (71, 29, 1)),
        (100, 1.0, 30, (10, 30, 3)),
        (100, 1.0, 25, (0, 25, 4)),
        (7, 0.5, 1, (4, 1, 3)),
    ],
)
def test_the_budget_is_split_as_published(steps: int, share: float, cycle: int, expected: tuple[int, int, int]):
    found = plan(steps, share, cycle)
    assert (found.pretrain, found.cycle, found.cycles) == expected
    assert found.total == steps


@given(st.integers(1, 300), st.floats(0.01, 1), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_phases_add_up_and_tickets_are_collected_at_the_lowest_rate(
    steps: int, share: float, cycle: int, low: float, more: float
):
    """Property 39."""
    if cycle > int(steps * share + 1e-9):
        with pytest.raises(ValueError, match=f"a cycle of {cycle} steps does not fit"):
            plan(steps, share, cycle)
        return
    found = plan(steps, share, cycle)
    assert found.pretrain + found.cycles * cycle == steps and steps - found.pretrain <= share * steps + 1e-6
    assert steps - found.pretrain > share * steps - cycle - 1
    rate = triangular(low, low + more, cycle, found.pretrain)
    tickets = [step for step in range(steps + 2 * cycle) if found.collects_at(step)]
    assert tickets == [found.pretrain + i * cycle for i in range(found.cycles + 1)] and tickets[-1] == steps
    assert all(rate(step) == low for step in tickets)
    rates = [rate(step) for step in range(found.pretrain, steps + 1)]
    assert min(rates) == low and max(rates) <= low + more + 1e-12
    if cycle % 2 == 0:
        assert rates[cycle // 2] == pytest.approx(low + more)
    if more:
        assert rates == pytest.approx(rates[::-1])


def test_the_rate_is_that_of_the_reference():
    rate = triangular(0.001, 0.005, 8, 226)
    assert [1000 * rate(s) for s in range(226, 235)] == pytest.approx([1, 2, 3, 4, 5, 4, 3, 2, 1])
    assert triangular(0.1, 0.1, 3)(2) == 0.1


def test_numbers_that_contradict_each_other_are_refused():
    cases = {
        "a cycle of 8 steps does not fit into a share of 0.02 of 250 steps, which is 5": lambda: plan(250, 0.02, 8),
        "share of steps that cycles take must lie in (0, 1], got 0": lambda: plan(250, 0, 8),
        "must lie in (0, 1], got 1.5": lambda: plan(250, 1.5, 8),
        "a cycle must have at least 1 step, got 0": lambda: plan(250, 0.1, 0),
        "got -1 steps and 3 cycles of 8": lambda: Plan(-1, 8, 3),
        "got 2 steps and 0 cycles of 8": lambda: Plan(2, 8, 0),
        "got 2 steps and 3 cycles of 0": lambda: Plan(2, 0, 3),
        "got 0.05 and 0.0001: exchange them": lambda: triangular(0.05, 0.0001, 8),
        "got -0.1 and 0.1": lambda: triangular(-0.1, 0.1, 8),
        "begins at 0 or later, got 0 and 3": lambda: triangular(0.1, 0.2, 0, 3),
        "begins at 0 or later, got 2 and -3": lambda: triangular(0.1, 0.2, 2, -3),
        "cycles begin after step 10, and step 9 is before": lambda: triangular(0.1, 0.2, 4, 10)(9),
        "the fraction that is dropped must lie in (0, 1], got 0": lambda: reexploring(
            methods.static(0.1), Plan(2, 4, 2), 0
        ),
        "a cycle of 1 step has none to train": lambda: reexploring(methods.static(0.1), Plan(2, 1, 2), 0.5),
        "gmp reaches its density at step 20, and its updates stop before step 20": lambda: without_updates_from(
            methods.gmp(0.1, until=20, interval=3), 20
        ),
    }
    for message, make in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            make()
        assert str(caught.value).startswith("sup-tickets: ")


def moves(run: Run, steps: int) -> list[int]:
    """The steps at which the topologies change."""
    found = []
    for step in range(1, steps + 1):
        before = run.sparsifier.topologies
        run.step(step)
        if run.sparsifier.topologies != before:
            found.append(step)
    return found


@pytest.mark.parametrize("storage", STORAGES)
def test_when_topologies_change(storage: str):
    rigl = methods.rigl(0.3, interval=3, until=30, anneal=constant, fraction=0.5)
    at = Plan(8, 4, 3)
    assert moves(Run(storage, rigl), 22) == [3, 6, 9, 12, 15, 18, 21]
    assert moves(Run(storage, without_updates_from(rigl, 9)), 22) == [3, 6]
    assert moves(Run(storage, without_updates_from(rigl, 10)), 22) == [3, 6, 9]
    assert moves(Run(storage, reexploring(methods.static(0.3), at, 0.5)), 26) == [9, 13, 17]
    assert moves(Run(storage, reexploring(without_updates_from(rigl, 9), at, 0.5)), 26) == [3, 6, 9, 13, 17]
    assert moves(Run(storage, reexploring(rigl, at, 0.5)), 17) == [3, 6, 9, 12, 13, 15, 17]
    gmp = without_updates_from(methods.gmp(0.3, until=7, interval=3), 8)
    assert moves(Run(storage, reexploring(gmp, at, 0.5)), 26) == [3, 6, 7, 9, 13, 17]


def test_what_a_method_needs_is_added_and_all_else_stays():
    static = methods.static(0.3)
    changed = reexploring(static, Plan(8, 4, 3), 0.5)
    assert changed.needs == static.needs | Need.GRADIENT
    assert changed._replace(update=(), needs=static.needs) == static
    assert len(static.update) == 0
    rigl = methods.rigl(0.3, until=30, interval=3)
    assert without_updates_from(rigl, 9)._replace(update=()) == rigl._replace(update=())


@pytest.mark.parametrize("fraction", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("storage", STORAGES)
def test_exploration_is_by_the_gradient_of_its_own_step(storage: str, fraction: float):
    """The reference used what the batch before had left."""
    run = Run(storage, reexploring(methods.static(0.3), Plan(4, 3, 2), fraction)).go(1, 4)
    twin = Run("masked", methods.dense())
    values = {n: t for n, t in run.tensors().items() if n.endswith(":value")}
    for name, parameter in twin.model.named_parameters():
        parameter.data.copy_(values[f"{name}:value"].view(parameter.shape))
    twin.backward(5)
    old = {n: t.mask.flatten() for n, t in run.sparsifier.topologies.items()}
    run.step(5)
    for name, mask in old.items():
        w, g = values[f"{name}:value"].abs(), twin.model.get_parameter(name).grad.flatten().abs()
        active = mask.nonzero().view(-1)
        dropped = int(fraction * active.numel() + 1e-9)
        kept = active[w[active].argsort(descending=True, stable=True)[: active.numel() - dropped]]
        free = torch.ones_like(mask).index_put((kept,), torch.tensor(False)).nonzero().view(-1)
        grown = free[g[free].argsort(descending=True, stable=True)[:dropped]]
        expected = torch.cat([kept, grown]).sort().values
        assert torch.equal(run.sparsifier.topologies[name].indices, expected)
        if storage == "compressed":
            assert torch.equal(positions(run.model)[name], expected)
