"""Weights made of units in both storages: packed ones, odd sizes, files, states, tickets, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow import Topology, methods, metrics, sparsify
from regrow import nn as sparse_nn
from regrow.core.method import Method, Units
from regrow.nn import from_dense
from regrow.parts import (
    blocks,
    columns,
    explicit,
    globally,
    groups,
    heads,
    highest,
    largest,
    lowest_globally,
    lowest_per_sign,
    magnitude,
    n_of_m,
    prune,
    prune_global,
    rows,
    uniform,
)
from regrow.parts.schedules import cubic
from regrow.parts.starts import dense
from regrow.tickets import Superposition, Ticket, layer_preserving, shuffled
from support.pairs import NETS, Run, of_units

STORAGES = ("masked", "compressed")


def rigl(structure: Units | None, density: float = 0.4, **options: Any) -> Method:
    return methods.rigl(density, until=40, interval=3, structure=structure, **options)


EVEN = {"linear": groups(8), "conv": groups(3), "attention": groups(2), "volume": groups(2), "bilinear": groups(3)}
WHOLE = {"linear": rows, "conv": columns}
ODD = {"linear": groups(7), "conv": blocks(4, 4), "gru": groups(7), "lstm": blocks(1, 4), "decoder": groups(4)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("net", "structure"), [*EVEN.items(), *ODD.items(), *WHOLE.items()])
def test_both_storages_make_the_same_run(net: str, structure: Units, optimizer: str) -> None:
    """Also packed weights, weights whose sizes the unit does not divide, and those without kernels for units."""
    masked, compressed = (Run(s, rigl(structure), net, optimizer) for s in STORAGES)
    first = masked.sparsifier.topologies
    assert sum(t.active for t in first.values()) < sum(t.places for t in first.values())
    for step in range(1, 25):
        assert compressed.step(step) == pytest.approx(masked.step(step), rel=1e-9), step
        assert compressed.sparsifier.topologies == masked.sparsifier.topologies, step
    masked.require_equal(compressed)
    assert first != masked.sparsifier.topologies
    assert any(not t.is_unstructured for t in first.values())


@pytest.mark.parametrize("storage", STORAGES)
def test_heads_come_and_go_whole(storage: str) -> None:
    run = Run(storage, methods.gmp(0.5, until=9, interval=3, structure=heads(2)), "attention", skip="head").go(1, 10)
    for name, topology in run.sparsifier.topologies.items():
        assert topology.mask.view(2, -1).float().mean(1).unique().tolist() in ([0.0, 1.0], [0.0], [1.0]), name
    assert run.sparsifier.density == 0.5


def test_which_layers_run_on_kernels_of_units() -> None:
    image = [nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 8, 3), nn.ConvTranspose1d(8, 8, 3)]
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 5), *image)
    sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), rigl(groups(8)), storage="compressed")
    kinds = [type(layer.index()).__name__ for layer in model if isinstance(layer, sparse_nn.SparseModule)]
    assert kinds == ["UnitIndex", "UnitIndex", "UnitIndex", "Index"]


def test_values_stand_unit_by_unit() -> None:
    """A layer by itself, and the dense weight that it stands for."""
    layer = sparse_nn.SparseLinear(6, 8, density=0.5, structure=blocks(4, 3), seed=1)
    topology = layer.topology()
    assert (topology.unit, topology.active, layer.weight.shape) == ((4, 3), 2, (24,))
    at = of_units(topology.indices, (8, 6), (4, 3))
    assert torch.equal(layer.dense().view(-1)[at], layer.weight)
    again = from_dense(layer.to_dense(), {"weight": topology})
    assert torch.equal(again.weight, layer.weight)
    x = torch.randn(5, 6)
    torch.testing.assert_close(again(x), nn.functional.linear(x, layer.dense(), layer.bias))


def test_a_whole_weight_of_units_is_the_dense_one() -> None:
    layer = sparse_nn.SparseLinear(6, 8, density=1, structure=groups(4), seed=1)
    x = torch.randn(5, 6, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.dense(), layer.bias))
    (grad,) = torch.autograd.grad(y.square().sum(), layer.weight)
    full = layer.dense().detach().requires_grad_()
    (wanted,) = torch.autograd.grad(nn.functional.linear(x, full, layer.bias).square().sum(), full)
    torch.testing.assert_close(grad, wanted.view(-1)[layer.topology().entries])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("net", "structure"), [("linear", groups(8)), ("conv", blocks(4, 4)), ("gru", groups(7))])
def test_files_hold_units(net: str, structure: Units, storage: str, tmp_path: Path) -> None:
    run = Run(storage, rigl(structure), net).go(1, 8)
    regrow.save(run.sparsifier, tmp_path / "model.safetensors")
    for other in (NETS[net][0]().double(), Run(storage, rigl(structure), net, seed=3).model):
        found = regrow.load(tmp_path / "model.safetensors", other)
        assert found == run.sparsifier.topologies
        x = torch.randn(3, *NETS[net][1], dtype=torch.float64)
        torch.testing.assert_close(other(x), run.model(x))


def test_a_file_of_other_units_is_refused_by_a_sparse_model_and_changes_nothing(tmp_path: Path) -> None:
    run = Run("compressed", rigl(groups(8)))
    regrow.save(run.sparsifier, tmp_path / "model.safetensors")
    other = Run("compressed", rigl(None))
    before = other.tensors()
    with pytest.raises(ValueError, match=r"0\.weight in units of 8 x 1 entries, and .* sparse module in units of 1"):
        regrow.load(tmp_path / "model.safetensors", other.model)
    assert all(torch.equal(t, before[n]) for n, t in other.tensors().items())


def test_a_state_dict_of_other_units_is_refused() -> None:
    one, other = (Run("compressed", rigl(s)) for s in (groups(8), groups(4)))
    with pytest.raises(RuntimeError, match=r"units of 4 x 1 entries, which a topology of units of 8 x 1 does not"):
        other.model.load_state_dict(one.model.state_dict())
    with pytest.raises(ValueError, match=r"other units \(0.weight: \[8, 1\] there, \[4, 1\] here\): give"):
        other.sparsifier.load_state_dict(one.sparsifier.state_dict())
    with pytest.raises(ValueError, match=r"0.weight: entries there, \[4, 1\] here"):
        other.sparsifier.load_state_dict(Run("compressed", rigl(None)).sparsifier.state_dict())


def test_tickets_are_of_units_too() -> None:
    run = Run("masked", rigl(groups(4)), "linear").go(1, 4)
    ticket = Ticket.from_state_dict(Ticket.of(run.sparsifier).state_dict())
    before = run.tensors()
    run.go(5, 12)
    assert run.sparsifier.topologies != ticket.topologies
    ticket.install(run.sparsifier)
    assert run.sparsifier.topologies == ticket.topologies
    assert torch.equal(run.tensors()["0.weight:value"], before["0.weight:value"])
    with pytest.raises(ValueError, match="differ in name, shape or units"):
        ticket.install(Run("masked", rigl(None), "linear").sparsifier)


def test_tickets_of_units_are_superposed_and_shuffled_unit_by_unit() -> None:
    run, mean = Run("masked", rigl(groups(4), 0.3), "linear", only="0"), Superposition()
    full: dict[str, list[Tensor]] = {}
    for step in (1, 7, 13):
        run.go(step, step + 5)
        mean.add(Ticket.of(run.sparsifier))
        for weight in run.sparsifier.weights:
            flat = torch.zeros(weight.topology.numel, dtype=torch.float64)
            flat[weight.topology.entries] = weight.values()
            full.setdefault(weight.name, []).append(flat)
    ticket = mean.ticket()
    for name, topology in ticket.topologies.items():
        expected = torch.stack(full[name]).mean(0)
        assert topology.unit == (4, 1) and topology.active > run.sparsifier.topologies[name].active
        torch.testing.assert_close(ticket.values[name], expected[topology.entries])
        assert not expected[~topology.mask.view(-1)].any()
    pruned = mean.ticket(density=0.3)
    assert pruned.nnz == run.sparsifier.nnz
    for name, topology in pruned.topologies.items():
        torch.testing.assert_close(pruned.values[name], torch.stack(full[name]).mean(0)[topology.entries])
    again = Superposition()
    again.load_state_dict(mean.state_dict())
    assert again.ticket().topologies == ticket.topologies
    for name, topology in shuffled(ticket.topologies, seed=1).items():
        assert (topology.unit, topology.active) == ((4, 1), ticket.topologies[name].active)


def test_units_that_would_span_two_gates_are_refused() -> None:
    model = nn.GRU(6, 7)
    own = Units(lambda weight: (3, 1), regrow.parts.mean)
    with pytest.raises(ValueError, match=r"weight_ih_l0\[0\] is one of 3 blocks of 7 rows, and units of 3"):
        sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), rigl(own))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_density_below_half_a_unit_is_refused() -> None:
    refused(
        methods.gmp(0.01, until=3, interval=1, structure=rows, allocate=globally), "fewer than half of the smallest"
    )
    run = Run("masked", methods.static(None, allocate=explicit({"0": 0.5, "2": 0.01}), structure=rows), "linear")
    assert run.sparsifier.topologies["2.weight"].active == 1


def test_distances_are_of_entries() -> None:
    one, two = (Topology((8, 4), torch.tensor(at), (4, 1)) for at in ([0, 1], [1, 2]))
    assert metrics.distance({"w": one}, {"w": two}) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="different models have no distance"):
        metrics.distance({"w": one}, {"w": Topology((8, 4))})


def test_tickets_keep_the_units_of_each_layer() -> None:
    run, mean = Run("masked", rigl(groups(4), 0.3), "linear", only="0"), Superposition()
    for step in (1, 7):
        mean.add(Ticket.of(run.go(step, step + 5).sparsifier))
    kept = mean.ticket(allocate=layer_preserving)
    assert {n: t.nnz for n, t in kept.topologies.items()} == {n: t.nnz for n, t in run.sparsifier.topologies.items()}


@pytest.mark.parametrize("units", [{"other": [8, 1]}, None, {"0.weight": [4, 1]}])
def test_a_crafted_state_is_refused_in_one_sentence(units: Any) -> None:
    run = Run("masked", rigl(groups(8)))
    with pytest.raises(ValueError, match="other units"):
        run.sparsifier.load_state_dict({**run.sparsifier.state_dict(), "units": units})


def test_a_crafted_module_state_is_refused_in_one_sentence() -> None:
    layer = sparse_nn.SparseLinear(6, 8, density=0.5, structure=groups(4), seed=1)
    state = layer.state_dict()
    for unit in (torch.tensor([torch.inf, 1.0]), torch.tensor([3, 1]), torch.tensor([2**40, 1])):
        with pytest.raises(RuntimeError, match=r"weight"):
            layer.load_state_dict({**state, "weight_unit": unit})
    with pytest.raises(RuntimeError, match="belong together"):
        layer.load_state_dict({"weight_unit": torch.tensor([2, 1])}, strict=False)


def test_a_field_comes_in_whole_rows_of_units() -> None:
    def torn(weight: Any) -> Iterator[tuple[int, Tensor]]:
        for first, block in weight.grad_blocks():
            yield first, block[:12]

    refused(rigl(groups(8), grow=highest(torn)), "a field came in a block of 12 numbers, and a row of units has 96")


def test_a_unit_that_does_not_fit_gives_way_to_the_largest_that_does() -> None:
    model = nn.Sequential(nn.Linear(12, 300), nn.Linear(300, 10), nn.Linear(10, 13))
    sparsifier = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), methods.static(0.3, structure=groups(8)))
    assert [t.unit for t in sparsifier.topologies.values()] == [(6, 1), (5, 1), (1, 1)]
    assert sparsifier.nnz == 2020  # Of 6,730 entries 2,019 are asked for, in units of 6, 5 and 1.
    assert "300 x 12 in 6 x 1" in str(sparsifier) and "13 x 10 " in str(sparsifier)


def refused(method: Method, match: str, net: str = "linear", steps: int = 6) -> None:
    with pytest.raises(ValueError, match=match):
        Run("masked", method, net).go(1, steps)


def test_what_does_not_go_with_units_is_refused() -> None:
    refused(rigl(groups(8), drop=lowest_per_sign), "0.weight has units of 8 x 1 entries, which have no one sign")
    pattern = Method("own", dense(), prune(cubic(1.0, 0.5, until=2), magnitude, uniform, n_of_m(1, 2)), units=groups(8))
    refused(pattern, "0.weight is made of units of 8 x 1 entries, and what is asked for chooses single entries")
    refused(methods.dnw(0.5)._replace(units=groups(8)), "dnw computes weights from values .*: leave out structure=")
    given = {"0.weight": Topology((24, 12)), "2.weight": Topology((5, 24))}
    start = methods.static(0.5)._replace(start=regrow.parts.given(given), units=groups(8))
    refused(start, "given: 0.weight is made of units of 8 x 1 entries, and its topology of 1 x 1: give .* structure=")
    refused(methods.static(0.5)._replace(start=prune_global(0.2), units=groups(8)), "leave out the method's structure=")


def test_units_of_different_sizes_are_not_traded_between_weights() -> None:
    for options in ({"redistribute": regrow.parts.nonzeros}, {"drop": lowest_globally(magnitude)}):
        refused(rigl(rows, **options), r"moves units .* to another, and they differ in size \(0.weight of 12")


def test_pools_choose_differently() -> None:
    found = {}
    for name, pool in (("mean", regrow.parts.mean), ("largest", largest), ("rms", regrow.parts.root_mean_square)):
        run = Run("masked", methods.gmp(0.3, until=9, interval=3, structure=groups(8, pool)), "linear").go(1, 9)
        found[name] = run.sparsifier.topologies["0.weight"]
        assert found[name].active == found["mean"].active
    assert found["mean"] != found["largest"]


def test_exploration_counts_units() -> None:
    run = Run("masked", methods.itop_set(0.4, until=30, interval=3, structure=groups(8)), "linear").go(1, 12)
    explored = run.sparsifier.weights[0].state["explored"]
    topology = run.sparsifier.topologies["0.weight"]
    assert explored.shape == (topology.places,) and explored[topology.indices].all()
    assert float(explored.double().mean()) > topology.active / topology.places
    known = metrics.exploration(run.sparsifier)
    assert known.layers["0.weight"] == float(explored.double().mean())
    assert run.sparsifier.density < known.overall <= known.bound <= 1
    placed = int(run.sparsifier.weights[0].state["placed"])
    assert known.bounds["0.weight"] == min(1, placed / topology.places)


def test_a_model_on_the_meta_device_gets_units_without_a_dense_form() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(400, 800), nn.ReLU(), nn.Linear(800, 80))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, rigl(groups(8), 0.05), storage="compressed")
    x, y = torch.randn(16, 400), torch.randint(80, (16,))
    for _ in range(7):
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    weight = model[0].weight
    assert weight.numel() == sparsifier.topologies["0.weight"].nnz and bool((weight != 0).float().mean() > 0.5)
