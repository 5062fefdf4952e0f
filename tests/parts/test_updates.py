from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import regrow
from regrow.core.method import Growth, Method, Need, Regrow, Rule, Start
from regrow.core.topology import Topology
from regrow.core.weight import Weights
from regrow.parts.allocation import globally, uniform
from regrow.parts.drops import lowest, lowest_per_sign
from regrow.parts.growth import at_random, gradient, highest
from regrow.parts.schedules import Schedule, constant, cubic
from regrow.parts.scores import magnitude
from regrow.parts.updates import chain, checked, drop_and_grow, every, prune
from support.fakes import POLICIES, Fake, fakes, run, together


@given(
    st.lists(fakes(), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from(POLICIES),
    st.sampled_from([at_random, highest(gradient)]),
)
def test_every_weight_gets_back_what_it_lost(
    weights: list[Fake], fraction: float, policy: Regrow, grow: Growth
) -> None:
    """Properties 1, 3, 4, 6, 7, 8 and 10."""
    before = [(w.topology, w.dense.clone()) for w in weights]
    run(drop_and_grow(constant(fraction), lowest(magnitude), grow, regrow_dropped=policy), together(*weights))
    for weight, (old, dense) in zip(weights, before, strict=True):
        was, now = set(old.indices.tolist()), weight.active()
        free = old.numel - old.nnz
        assert weight.topology.nnz == old.nnz
        assert all(weight.dense[i] == 0 for i in now - was)
        assert all(weight.dense[i] == dense[i] for i in now & was if policy != "reset")
        gone = [abs(float(dense[i])) for i in was - now]
        limit = int(fraction * old.nnz + 1e-9)
        assert len(gone) <= (min(limit, free) if policy == "forbid" else limit)
        if policy == "forbid":
            assert len(gone) == min(limit, free)
            assert all(abs(float(dense[i])) >= max(gone, default=0) for i in was & now)


@given(st.lists(fakes(), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(POLICIES), st.data())
def test_redistribution_conserves_the_total(
    weights: list[Fake], fraction: float, policy: Regrow, data: st.DataObject
) -> None:
    """Properties 8, 27 and 28: conserved for any saturation pattern and for dead statistics."""
    shares = {id(w): data.draw(st.sampled_from([0.0, 0.5, 3.0])) for w in weights}
    before = sum(w.topology.nnz for w in weights)
    update = drop_and_grow(
        constant(fraction), lowest(magnitude), at_random, lambda w, kept: shares[id(w)], regrow_dropped=policy
    )
    run(update, together(*weights))
    assert sum(w.topology.nnz for w in weights) == before


def test_what_full_weights_cannot_take_goes_to_those_with_room() -> None:
    """Property 27: full layers receive nothing beyond their room."""
    full = Fake([1, 2, 3, 4], None, [1, 1, 1, 1], "full")
    half = Fake([5, 6, 0, 0, 0, 0, 0, 0], [0, 1], range(8), "half")
    shares = {"full": 1000.0, "half": 1.0}
    update = drop_and_grow(constant(0.5), lowest(magnitude), highest(gradient), lambda w, kept: shares[w.name])
    run(update, together(full, half))
    assert full.active() == {0, 1, 2, 3}
    assert half.active() == {1, 7}


@pytest.mark.parametrize("policy", POLICIES)
def test_dropped_and_grown_at_once(policy: Regrow) -> None:
    """Property 7, reference vector of the drop/grow primitive."""
    signs = torch.tensor([1, -1, 1, -1, -1, 1, 1, -1])
    g = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.7, 0.3, 0.05, 0.6]) * signs
    weight = Fake([0.5, -0.1, 0, 0.3, 0, -0.9, 0.2, 0], [0, 1, 3, 5, 6], g)
    run(drop_and_grow(constant(0.4), lowest(magnitude), highest(gradient), regrow_dropped=policy), together(weight))
    assert weight.active() == ({0, 3, 4, 5, 7} if policy == "forbid" else {0, 1, 3, 4, 5})
    assert float(weight.dense[1]) == (-0.1 if policy == "keep" else 0)
    assert float(weight.dense[4]) == 0


def test_forbid_drops_no_more_than_can_be_grown() -> None:
    """Property 7: k' = min(k, number of inactive), and those kept are the larger ones."""
    weight = Fake([5, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4], [9, 9, 9, 9, 9, 1])
    run(drop_and_grow(constant(0.8), lowest(magnitude), highest(gradient), regrow_dropped="forbid"), together(weight))
    assert weight.active() == {0, 2, 3, 4, 5}


def test_forbid_takes_back_what_a_drop_removes_beyond_the_room() -> None:
    """Property 7: dropping by sign removes every zero, and here one entry is free: the lowest positions come back."""
    weight = Fake([5, 0, 0, 0, -4, 0], [0, 1, 2, 3, 4], [9, 9, 9, 9, 9, 1])
    run(drop_and_grow(constant(0.2), lowest_per_sign, highest(gradient), regrow_dropped="forbid"), together(weight))
    assert weight.active() == {0, 1, 2, 3, 5}


def test_zero_gradients_still_conserve_the_count() -> None:
    """Property 6."""
    weight = Fake([3, 2, 1, 0, 0, 0], [0, 1, 2], [0, 0, 0, 0, 0, 0])
    run(drop_and_grow(constant(0.7), lowest(magnitude), highest(gradient), regrow_dropped="forbid"), together(weight))
    assert weight.active() == {0, 3, 4}


def test_active_zeros_do_not_let_inactive_entries_survive() -> None:
    """Property 3: no phantom swap."""
    weight = Fake([0, 0, 0, 0, 0, 0, 1, 0], [3, 4, 5, 6], [0, 8, 7, 0, 0, 0, 0, 0])
    run(drop_and_grow(constant(0.5), lowest(magnitude), highest(gradient)), together(weight))
    assert weight.active() == {1, 2, 3, 6}


def test_a_weight_without_a_gradient_is_left_as_it_is() -> None:
    idle, live = Fake([1, 2, 0, 0], [0, 1], [9, 9, 9, 9], "idle"), Fake([1, 2, 0, 0], [0, 1], [0, 0, 1, 9], "live")
    idle.has_grad = False
    run(drop_and_grow(constant(0.5), lowest(magnitude), highest(gradient)), together(idle, live))
    assert (idle.active(), idle.rewired) == ({0, 1}, 0)
    assert live.active() == {1, 3}


def test_the_fraction_is_read_at_the_step() -> None:
    weight = Fake([1, 2, 3, 4, 0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0, 1, 2, 3, 4])
    fraction = Schedule(lambda step: {3: 0.25, 4: 0.75}[step])
    rules = drop_and_grow(fraction, lowest(magnitude), highest(gradient))
    run(rules, together(weight), step=3)
    assert weight.active() == {1, 2, 3, 7}


def test_an_error_leaves_every_weight_as_it_was() -> None:
    good, bad = Fake([1, 2, 0], [0, 1], [1, 1, 1], "good"), Fake([1, 2, 0], [0, 1], [1, 1, float("nan")], "bad")
    with pytest.raises(ValueError, match="bad: 1 of 3 growth scores are not finite"):
        run(drop_and_grow(constant(0.5), lowest(magnitude), highest(gradient)), together(good, bad))
    assert good.active() == bad.active() == {0, 1}
    assert good.rewired == bad.rewired == 0


@pytest.mark.parametrize("share", [float("nan"), float("-inf"), -1.0, float("inf")])
def test_a_share_that_is_no_share_names_its_weight(share: float) -> None:
    """Property 28: NaN is refused rather than spread."""
    rules = drop_and_grow(constant(0.5), lowest(magnitude), at_random, lambda w, kept: share)
    with pytest.raises(ValueError, match=rf"layer\.weight: .* {share}"):
        run(rules, together(Fake([1, 2, 0], [0, 1], name="layer.weight")))


@given(st.lists(fakes(), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from([uniform, globally]))
def test_prune_reaches_the_total_and_keeps_the_largest(weights: list[Fake], density: float, allocate: object) -> None:
    """Properties 22 and 23: nnz never increases, exact K with ties."""
    before = [(w.active(), w.topology.nnz, w.dense.clone()) for w in weights]
    numel = sum(w.topology.numel for w in weights)
    had = sum(w.topology.nnz for w in weights)
    run(prune(constant(density), magnitude, allocate), together(*weights))  # type: ignore[arg-type]
    assert sum(w.topology.nnz for w in weights) == min(had, int(density * numel + 0.5))
    for weight, (was, _, dense) in zip(weights, before, strict=True):
        now = weight.active()
        assert now <= was
        assert max((abs(dense[i]) for i in was - now), default=0) <= min((abs(dense[i]) for i in now), default=9)


def test_prune_by_one_threshold() -> None:
    """Property 23: a global threshold differs from one for each layer."""
    values = ([9.0, 8, 7, 6], [4.0, 3, 2, 1])
    by_layer, at_once = (together(Fake(values[0]), Fake(values[1])) for _ in range(2))
    run(prune(constant(0.5), magnitude, uniform), by_layer)
    run(prune(constant(0.5), magnitude, globally), at_once)
    assert [w.topology.indices.tolist() for w in by_layer] == [[0, 1], [0, 1]]
    assert [w.topology.indices.tolist() for w in at_once] == [[0, 1, 2, 3], []]


def test_prune_names_the_weight_with_nan_scores() -> None:
    bad = Fake([1, float("nan"), 3], name="layer.weight")
    with pytest.raises(ValueError, match=r"layer\.weight: 1 of 3 scores are NaN"):
        run(prune(constant(0.5), magnitude, uniform), together(Fake([1, 2, 3]), bad))


def noted(log: list[str], name: str, due: range = range(10**6)) -> tuple[Rule, ...]:
    return (Rule(lambda weights, step: log.append(f"{name}{step}"), lambda step: step in due),)


def test_chain_applies_in_order_what_is_due() -> None:
    log: list[str] = []
    rules = chain(noted(log, "a"), noted(log, "b", range(2, 3)), noted(log, "c"))
    for step in (1, 2):
        run(rules, together(), step)
    assert log == ["a1", "c1", "a2", "b2", "c2"]
    assert chain() == ()


@given(st.integers(1, 40), st.integers(0, 60) | st.none(), st.integers(1, 200))
def test_the_steps_of_every(interval: int, begin: int | None, until: int) -> None:
    """Properties 20 and 21: never at step 0, begin, begin + interval, ... strictly below until; the closed form."""
    first = begin or interval
    if until <= first:
        return
    (rule,) = every(interval, (Rule(lambda weights, step: None),), until=until, begin=begin)
    due = [step for step in range(300) if rule.due(step)]
    assert due == list(range(first, until, interval))
    assert len(due) == -(-(until - first) // interval)
    assert 0 not in due


def test_every_respects_the_rule_that_it_gates() -> None:
    (rule,) = every(5, noted([], "a", range(12)), until=30)
    assert [step for step in range(40) if rule.due(step)] == [5, 10]


@given(st.integers(1, 40), st.integers(2, 200))
def test_a_ramp_runs_once_more_at_its_own_end(interval: int, until: int) -> None:
    """Property 22: a final update is forced where interval does not divide the ramp."""
    if until <= interval:
        return
    weight = Fake(torch.arange(1.0, 101))
    (rule,) = every(interval, prune(cubic(1.0, 0.07, until), magnitude, uniform), until=until)
    counts = []
    for step in range(1, until + interval + 1):
        run((rule,), together(weight), step)
        counts.append(weight.topology.nnz)
    assert rule.due(until)
    assert not rule.due(until + interval)
    assert counts == sorted(counts, reverse=True)
    assert counts[until - 1] == 7


def test_a_gate_around_a_gate_still_runs_the_end_of_a_ramp() -> None:
    (rule,) = every(4, every(3, prune(cubic(1.0, 0.1, 17), magnitude, uniform), until=17), until=30)
    assert [step for step in range(40) if rule.due(step)] == [12, 17]


@pytest.mark.parametrize(
    ("interval", "begin", "until", "told"),
    [
        (0, None, 9, "at least 1 step apart .* got interval 0, begin None"),
        (-2, 3, 9, "at least 1 step apart .* got interval -2, begin 3"),
        (2, -1, 9, "at least 1 step apart .* got interval 2, begin -1"),
        (5, None, 5, "no update would ever happen: the first is due at step 5, and until is 5"),
        (2, 9, 9, "no update would ever happen: the first is due at step 9, and until is 9"),
    ],
)
def test_every_refuses_what_never_happens(interval: int, begin: int | None, until: int, told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=told):
        every(interval, (Rule(lambda weights, step: None),), until=until, begin=begin)


def adafactor_state(fraction: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = nn.Linear(8, 6)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    update = every(2, drop_and_grow(constant(fraction), lowest(magnitude), highest(gradient)), until=3)
    start = Start(lambda weights, probe: weights[0].rewire(Topology((6, 8), torch.arange(0, 48, 2))))
    regrow.sparsify(model, optimizer, Method("m", start, update, timing="instead", needs=Need.GRADIENT))
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        seen.append({k: v.clone() for k, v in optimizer.state[model.weight].items()})
    return seen[0], seen[1]


def test_an_update_that_changes_nothing_leaves_factored_state() -> None:
    """Property 2: k = 0 leaves topology, weights and optimizer state bit-identical."""
    before, after = adafactor_state(0.0)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_an_update_leaves_factored_state() -> None:
    """Factors of moments belong to rows and columns, not to the entries that fall and grow."""
    before, after = adafactor_state(0.5)
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_checked_update_requires_what_it_did_and_more() -> None:
    """What the update requires by itself comes first; acts and times are those of the update."""
    asked: list[str] = []

    def refuse(weights: Weights) -> None:
        raise ValueError("too few")

    first = Rule(
        lambda weights, step: asked.append("act"),
        due=lambda step: step == 3,
        require=lambda weights: asked.append("own"),
    )
    second = Rule(lambda weights, step: None)
    update = checked((first, second), refuse)
    assert (update[0].apply, update[0].due, update[1]) == (first.apply, first.due, second)
    with pytest.raises(ValueError, match="too few"):
        update[0].require(together())
    assert asked == ["own"]
