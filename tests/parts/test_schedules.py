from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.parts.schedules import Schedule, constant, cosine, cosine_to, cubic, inverse_power, linear

spans = st.tuples(st.integers(0, 1000), st.integers(1, 2000)).map(lambda t: (t[0], t[0] + t[1]))
FALLING: list[Callable[[float, int, int], Schedule]] = [cosine, linear, inverse_power]


@pytest.mark.parametrize("make", FALLING)
@given(st.floats(0.01, 1), spans)
def test_a_fraction_falls_from_its_value_to_zero(
    make: Callable[[float, int, int], Schedule], value: float, span: tuple[int, int]
) -> None:
    """Property 20: f(begin) = alpha, f(end) = 0, monotone, with any begin."""
    begin, until = span
    schedule = make(value, until, begin)
    values = [schedule(step) for step in range(begin, until + 1, max(1, (until - begin) // 50))]
    assert schedule(begin) == pytest.approx(value, rel=1e-15)
    assert schedule(until) == 0
    assert schedule(until + 77) == 0
    assert schedule(0) == schedule(begin)
    assert all(a >= b for a, b in pairwise(values))
    assert schedule.until == until


@given(st.floats(0, 1), spans, st.floats(0, 1))
def test_each_shape_is_its_formula(value: float, span: tuple[int, int], where: float) -> None:
    begin, until = span
    step = begin + round(where * (until - begin))
    p = (step - begin) / (until - begin)
    assert cosine(value, until, begin)(step) == pytest.approx(value * math.cos(math.pi * p / 2) ** 2, abs=1e-15)
    assert linear(value, until, begin)(step) == pytest.approx(value - value * p, abs=1e-15)
    assert inverse_power(value, until, begin)(step) == pytest.approx(value * (1 - p) ** 3, abs=1e-15)
    assert inverse_power(value, until, begin, power=2)(step) == pytest.approx(value * (1 - p) ** 2, abs=1e-15)


@given(st.floats(0, 1), st.floats(0, 1), spans)
def test_a_cosine_may_end_above_zero_and_never_rises(value: float, last: float, span: tuple[int, int]) -> None:
    """Property 20: f(begin) = alpha, f(end) = the last value, monotone; a value below it stays."""
    begin, until = span
    schedule = cosine_to(last)(value, until, begin)
    values = [schedule(step) for step in range(begin, until + 1, max(1, (until - begin) // 50))]
    assert schedule(begin) == pytest.approx(value, abs=1e-15)
    assert schedule(until) == schedule(until + 99) == min(last, value)
    assert all(a >= b for a, b in pairwise(values))
    assert schedule.until == until


@pytest.mark.parametrize(("share", "value"), [(0.25, 0.4275), (0.5, 0.2525), (0.75, 0.0775), (1.0, 0.005)])
def test_cosine_to_is_that_of_the_codes(share: float, value: float) -> None:
    """torch's CosineAnnealingLR from 0.5 with eta_min 0.005, and the published numbers."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400, eta_min=0.005)
    for _ in range(round(share * 400)):
        optimizer.step()
        theirs.step()
    ours = cosine_to(0.005)(0.5, 400, 0)(round(share * 400))
    assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
    assert round(ours, 4) == pytest.approx(value, abs=1.01e-4)


@pytest.mark.parametrize("last", [-0.1, float("nan")])
def test_a_cosine_to_less_than_nothing_is_refused(last: float) -> None:
    with pytest.raises(ValueError, match=f"cosine_to: the last value must be at least 0, got {last:g}"):
        cosine_to(last)


@pytest.mark.parametrize(("step", "value"), [(0, 0.3), (12_500, 0.15), (25_000, 0.0)])
def test_cosine_of_the_published_run(step: int, value: float) -> None:
    assert cosine(0.3, until=25_000)(step) == pytest.approx(value, abs=1e-16)


@given(st.floats(0.01, 1), st.floats(0.01, 1), spans)
def test_the_ramp_reaches_both_ends_exactly(first: float, last: float, span: tuple[int, int]) -> None:
    """Property 22: s(t0) = s_i, s(t1) = s_f, monotone."""
    begin, until = span
    ramp = cubic(first, last, until, begin)
    assert ramp(until) == ramp(until + 1) == last
    assert ramp(begin) == pytest.approx(first, rel=1e-15)
    values = [ramp(step) for step in range(begin, until + 1, max(1, (until - begin) // 50))]
    assert values == sorted(values, reverse=first >= last)


def test_the_ramp_is_zhu_and_guptas() -> None:
    """Equation 1 with s_i = 0.5, s_f = 0.9, t0 = 10, n dt = 40, at t = 20."""
    sparsity = 0.9 + (0.5 - 0.9) * (1 - (20 - 10) / 40) ** 3
    assert cubic(0.5, 0.1, until=50, begin=10)(20) == pytest.approx(1 - sparsity, abs=1e-15)


def test_constant_never_changes() -> None:
    assert {constant(0.3, until=100)(step) for step in (0, 50, 100, 10**9)} == {0.3}
    assert constant(0.3).until is None
    assert constant(0.3, 100, 7).until == 100


def test_a_schedule_calls_its_value() -> None:
    assert Schedule(lambda step: step / 2)(5) == 2.5


@pytest.mark.parametrize("make", [constant, *FALLING, cosine_to(0.1), lambda v, u, b: cubic(1.0, v, u, b)])
@pytest.mark.parametrize(("begin", "until"), [(-1, 5), (5, 5), (6, 5)])
def test_a_span_must_be_positive(make: Callable[[float, int, int], Schedule], begin: int, until: int) -> None:
    with pytest.raises(ValueError, match=rf"must end after it begins.*begin is {begin}, until is {until}"):
        make(0.3, until, begin)
