"""A ticket taken from a model, put back into it, and looked at in it; all read from the tensors."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.core.method import Method
from regrow.core.topology import Topology
from regrow.parts.allocation import uniform
from regrow.parts.schedules import constant
from regrow.tickets import Snapshot, Ticket, installed
from support.pairs import Run, batch, loss_of, tensors
from support.table import OPTIMIZERS, STORAGES

MOMENTS = ("momentum_buffer", "exp_avg")


def rigl() -> Method:
    return methods.rigl(0.3, interval=3, until=30, anneal=constant, fraction=0.5)


def everything(run: Run) -> dict[str, Tensor]:
    """Values, gradients, optimizer state and buffers."""
    buffers = {f"{n}:buffer": b.clone() for n, b in run.model.named_buffers()}
    return {**run.tensors(), **buffers}


def require_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, t in one.items() if not torch.equal(t, other[name])] == []


def masks(run: Run) -> dict[str, Tensor]:
    """Of each sparsified parameter, flat, its blocks one after the other."""
    found: dict[str, list[Tensor]] = {}
    for name, topology in run.sparsifier.topologies.items():
        found.setdefault(name.partition("[")[0], []).append(topology.mask.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


CASES = [(s, o, n) for s in STORAGES for o in ("sgd", "adamw") for n in ("linear", "conv", "lstm", "attention")]


@pytest.mark.parametrize(("storage", "optimizer", "net"), CASES)
def test_installed_it_is_the_network_it_was_in_the_same_parameters(storage: str, optimizer: str, net: str):
    run = Run(storage, rigl(), net, optimizer).go(1, 4)
    objects = {n: id(p) for n, p in run.model.named_parameters()}
    then, old = everything(run), masks(run)
    ticket = Ticket.of(run.sparsifier)
    run.go(5, 13)
    before, now = run.tensors(), masks(run)
    assert any(bool((old[n] & ~now[n]).any()) for n in old), "no entry moved: the test shows nothing"
    ticket.install(run.sparsifier)

    assert {n: id(p) for n, p in run.model.named_parameters()} == objects
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == set(objects.values())
    require_same(masks(run), old)
    after = everything(run)
    for name, tensor in then.items():
        if name.endswith((":value", ":buffer")):
            assert torch.equal(after[name], tensor), name
    for name, mask in old.items():
        for key in MOMENTS:
            if f"{name}:{key}" in before:
                assert torch.equal(after[f"{name}:{key}"], before[f"{name}:{key}"] * (mask & now[name]))
        if f"{name}:exp_avg_sq" in before:
            assert not after[f"{name}:exp_avg_sq"][~mask].any()


@pytest.mark.parametrize(("storage", "optimizer"), [(s, o) for s in STORAGES for o in ("sgd", "adamw")])
def test_training_goes_on_from_it(storage: str, optimizer: str):
    """Property 40: one step after it changes the output of the model, through the parameters the optimizer holds."""
    run = Run(storage, rigl(), "linear", optimizer).go(1, 4)
    ticket = Ticket.of(run.sparsifier)
    run.go(5, 13)
    ticket.install(run.sparsifier)
    x = batch("linear", 0)[0]
    values = {name: v.clone() for name, v in ticket.values.items()}
    with torch.no_grad():
        before = run.model(x)
        run.optimizer.zero_grad()
    run.step(14)
    assert not torch.allclose(run.model(x), before, atol=1e-4)
    assert all(torch.equal(v, ticket.values[n]) for n, v in values.items()), "the ticket must have memory of its own"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("net", ["conv", "attention"])
def test_both_storages_go_on_alike(net: str, optimizer: str):
    runs = []
    for storage in STORAGES:
        run = Run(storage, rigl(), net, optimizer).go(1, 4)
        ticket = Ticket.of(run.sparsifier)
        run.go(5, 13)
        ticket.install(run.sparsifier)
        runs.append(run.go(14, 23))
    runs[0].require_equal(runs[1])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_ticket_of_the_other_storage_fits(storage: str):
    other = "masked" if storage == "compressed" else "compressed"
    source, target = Run(other, rigl(), "conv").go(1, 7), Run(storage, rigl(), "conv").go(1, 2)
    Ticket.of(source.sparsifier).install(target.sparsifier)
    theirs = source.tensors()
    for name, tensor in target.tensors().items():
        if name.endswith(":value"):
            assert torch.equal(tensor, theirs[name]), name


def moved_between_blocks(ticket: Ticket, count: int) -> Ticket:
    """`count` entries less in the last block of the packed projection, as many more in its first."""
    names = [n for n in ticket.topologies if "in_proj" in n]
    first, last = (ticket.topologies[names[i]] for i in (0, -1))
    more = first.add(first.inactive(torch.arange(count)))
    fewer = Topology(last.shape, last.indices[count:])
    topologies = {**ticket.topologies, names[0]: more, names[-1]: fewer}
    values = {n: torch.arange(1.0, t.nnz + 1, dtype=torch.float64) for n, t in topologies.items()}
    return replace(ticket, topologies=topologies, values=values)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_blocks_of_one_parameter_may_trade_entries(storage: str, looks: bool):
    run = Run(storage, methods.static(0.3), "attention").go(1, 2)
    name = next(n for n in run.sparsifier.topologies if "in_proj" in n).partition("[")[0]
    ticket = moved_between_blocks(Ticket.of(run.sparsifier), 5)
    expected = torch.cat(
        [
            torch.zeros(t.numel).double().index_put((t.indices,), ticket.values[n])
            for n, t in ticket.topologies.items()
            if n.startswith(name)
        ]
    )
    before = everything(run)
    if looks:
        with installed(run.sparsifier, ticket):
            assert torch.equal(run.tensors()[f"{name}:value"], expected)
        require_same(everything(run), before)
    else:
        ticket.install(run.sparsifier)
        assert torch.equal(run.tensors()[f"{name}:value"], expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_it_survives_a_file(storage: str):
    run = Run(storage, rigl(), "conv").go(1, 4)
    ticket = Ticket.of(run.sparsifier)
    file = io.BytesIO()
    torch.save(ticket.state_dict(), file)
    file.seek(0)
    again = Ticket.from_state_dict(torch.load(file, weights_only=True))
    then = run.tensors()
    run.go(5, 8)
    again.install(run.sparsifier)
    now = run.tensors()
    assert all(torch.equal(now[n], t) for n, t in then.items() if n.endswith(":value"))
    assert again.topologies == ticket.topologies and again.axes == ticket.axes and again.outside == ticket.outside
    assert (again.nnz, again.numel, again.density) == (ticket.nnz, ticket.numel, run.sparsifier.density)


def test_a_damaged_state_is_refused():
    state = Ticket.of(Run("masked", rigl()).sparsifier).state_dict()
    name = next(iter(state["values"]))
    with pytest.raises(ValueError, match=rf"ticket: {name} has \d+ positions and values of shape \(3,\)"):
        Ticket.from_state_dict({**state, "values": {**state["values"], name: torch.ones(3)}})
    with pytest.raises(ValueError, match="ticket: this state has version 7"):
        Ticket.from_state_dict({**state, "version": 7})


def dense_ticket(run: Run) -> Ticket:
    """All entries active."""
    ticket = Ticket.of(run.sparsifier)
    topologies = {n: Topology(t.shape) for n, t in ticket.topologies.items()}
    return replace(ticket, topologies=topologies, values={n: torch.ones(t.numel) for n, t in topologies.items()})


def test_what_does_not_fit_is_refused_and_nothing_changes():
    run = Run("compressed", rigl()).go(1, 4)
    room = next(p for _, p in run.model.named_parameters() if p.dim() == 1).numel()
    before = everything(run)
    message = rf"ticket: 0.weight would have 288 active entries, and its compressed storage has room for {room}: keep"
    with pytest.raises(ValueError, match=message):
        dense_ticket(run).install(run.sparsifier)
    with pytest.raises(ValueError, match=message), installed(run.sparsifier, dense_ticket(run)):
        raise AssertionError("never within")
    with pytest.raises(
        ValueError, match=r"ticket: \d of the 2 sparsified weights differ in name, shape or units \(0.weight"
    ):
        Ticket.of(Run("masked", rigl(), "conv").sparsifier).install(run.sparsifier)
    other = replace(Ticket.of(run.sparsifier), others={})
    with pytest.raises(
        ValueError, match=r"ticket: it is of another model, 2 of whose 2 dense tensors .*0.bias, 2.bias"
    ):
        other.install(run.sparsifier)
    require_same(everything(run), before)


def test_before_the_first_topologies_it_is_refused():
    run = Run("masked", methods.snip(0.3))
    ticket = Ticket.of(Run("masked", rigl()).sparsifier)
    with pytest.raises(ValueError, match="ticket: snip makes its first topologies in its first step"):
        ticket.install(run.sparsifier)
    run.step(1)
    ticket.install(run.sparsifier)
    assert run.sparsifier.topologies == ticket.topologies


def test_weights_that_are_computed_are_refused_until_they_are_hardened():
    run = Run("masked", methods.BY_NAME["str"](initial=-3.0)).go(1, 3)
    ticket = Ticket.of(run.sparsifier)
    before = everything(run)
    message = "ticket: str computes its weights from latent values, which no ticket holds: call"
    with pytest.raises(ValueError, match=message):
        ticket.install(run.sparsifier)
    with pytest.raises(ValueError, match=message), installed(run.sparsifier, ticket):
        raise AssertionError("never within")
    require_same(everything(run), before)
    run.sparsifier.harden()
    run.go(4, 6)
    ticket.install(run.sparsifier)
    assert run.sparsifier.topologies == ticket.topologies
    after = everything(run)
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.endswith(":value"))


def test_masked_storage_takes_a_denser_one():
    run = Run("masked", rigl()).go(1, 4)
    dense_ticket(run).install(run.sparsifier)
    assert all(bool((p == 1).all()) for p in run.model.parameters() if p.dim() > 1)
    run.step(5)
    assert all(bool((p != 1).any()) and bool(p.all()) for p in run.model.parameters() if p.dim() > 1)


def test_what_it_makes_active_counts_as_explored():
    run = Run("masked", methods.BY_NAME["itop_set"](0.3, interval=3, until=30)).go(1, 2)
    seen = {w.name: w.state["explored"].clone() for w in run.sparsifier.weights}
    other = Run("masked", methods.static(0.2), seed=5)
    Ticket.of(other.sparsifier).install(run.sparsifier)
    for weight in run.sparsifier.weights:
        mask = other.sparsifier.topologies[weight.name].mask.flatten()
        assert (mask & ~seen[weight.name]).any()
        assert torch.equal(weight.state["explored"], seen[weight.name] | mask)


@pytest.mark.parametrize(("storage", "optimizer", "net"), CASES)
@pytest.mark.parametrize("midway", [False, True])
def test_looking_at_a_ticket_leaves_no_trace(storage: str, optimizer: str, net: str, midway: bool):
    """Also between the backward and the step of an update, which grows by that gradient."""
    runs = [Run(storage, rigl(), net, optimizer).go(1, 4) for _ in range(2)]
    ticket = Ticket.of(runs[0].sparsifier)
    for step in range(5, 10):
        for run in runs:
            run.optimizer.zero_grad()
            run.backward(step)
            if midway:
                look(run, ticket, watched=run is runs[0])
            run.optimizer.step()
            if not midway:
                look(run, ticket, watched=run is runs[0])
        assert runs[0].sparsifier.topologies == runs[1].sparsifier.topologies
        require_same(everything(runs[0]), everything(runs[1]))


def look(run: Run, ticket: Ticket, watched: bool) -> None:
    if not watched:
        return
    before = everything(run)
    with installed(run.sparsifier, ticket):
        inside = Ticket.of(run.sparsifier)
        assert inside.topologies == ticket.topologies
        assert all(torch.equal(v, ticket.values[n]) for n, v in inside.values.items())
        assert all(torch.equal(v, ticket.others[n]) for n, v in inside.others.items())
        with torch.no_grad():
            run.model(batch(run.net, 3)[0])  # in training mode: BatchNorm's statistics move
    require_same(everything(run), before)


@pytest.mark.parametrize("storage", STORAGES)
def test_errors_within_and_steps_within_leave_no_trace(storage: str):
    run = Run(storage, rigl(), "conv").go(1, 4)
    ticket = Ticket.of(run.sparsifier)
    run.go(5, 8)
    run.backward(9)
    before, step = everything(run), run.sparsifier.step
    with pytest.raises(KeyError, match="mine"), installed(run.sparsifier, ticket):
        raise KeyError("mine")
    require_same(everything(run), before)
    with pytest.raises(RuntimeError, match="steps within installed"), installed(run.sparsifier, ticket):
        run.optimizer.step()
    require_same(everything(run), before)
    assert run.sparsifier.step == step
    other = nn.Linear(2, 2)
    with installed(run.sparsifier, ticket):
        OPTIMIZERS["sgd"](other.parameters()).step()
    run.optimizer.step()
    assert run.sparsifier.step == step + 1


def test_tied_weights_are_in_it_once():
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = sparsify(model, optimizer, methods.static(0.5, allocate=uniform))
    ticket = Ticket.of(sparsifier)
    assert list(ticket.values) == ["0.weight"] and list(ticket.others) == ["0.bias"]
    loss = model(torch.ones(2, 6)).square().sum()
    loss.backward()
    optimizer.step()
    ticket.install(sparsifier)
    assert model[2].weight is model[0].weight
    assert torch.equal(model[0].bias, ticket.others["0.bias"])


def test_names_do_not_depend_on_wrappers():
    run = Run("masked", rigl())
    plain = Ticket.of(run.sparsifier)
    wrapped = nn.Module()
    wrapped.module = Run("masked", rigl()).model
    sparsifier = sparsify(wrapped, OPTIMIZERS["sgd"](wrapped.parameters()), methods.static(0.2), seed=3)
    plain.install(sparsifier)
    assert torch.equal(wrapped.module[0].weight, run.model[0].weight)
    assert torch.equal(wrapped.module[0].bias, run.model[0].bias)


def test_a_snapshot_of_what_is_installed_is_a_whole_run():
    """A ticket is no run: after it, a snapshot holds its topologies with the optimizer's state of the survivors."""
    run = Run("compressed", rigl(), "linear", "adamw").go(1, 4)
    ticket = Ticket.of(run.sparsifier)
    run.go(5, 13)
    ticket.install(run.sparsifier)
    before = tensors(run.model, run.optimizer)
    snapshot = Snapshot.take(run.sparsifier)
    run.go(14, 17)
    snapshot.restore(run.sparsifier)
    after = tensors(run.model, run.optimizer)
    assert all(torch.equal(after[n], t) for n, t in before.items() if not n.endswith(":grad"))
    assert loss_of(run.model, batch("linear", 1)).isfinite()
