"""The mean of tickets against NumPy over dense arrays, and all of Sup-tickets against a program from the paper."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import regrow
from regrow import methods, sparsify
from regrow.core.topology import Topology
from regrow.parts.allocation import erk, globally, uniform
from regrow.parts.schedules import constant
from regrow.tickets import Superposition, Ticket, ensemble, layer_preserving, plan, reexploring, triangular
from support.dynamics import PLAIN, Watch, grow, magnitudes, without_lowest
from support.pairs import Run, batch, tensors
from support.paper import LR, Array, Program, only, sgd, stream
from support.table import OPTIMIZERS, STORAGES

SHAPES = {"a": (5, 7), "b": (3, 4, 2), "c": (11,)}


def random_ticket(seed: int, density: float = 0.4, dtype: torch.dtype = torch.float32, ties: bool = False) -> Ticket:
    """A ticket of three weights, a bias, running statistics and a counter."""
    draw = np.random.default_rng(seed)
    topologies, values = {}, {}
    for name, shape in SHAPES.items():
        numel = int(np.prod(shape))
        at = np.sort(draw.choice(numel, max(1, int(density * numel)), replace=False))
        topologies[name] = Topology(shape, torch.from_numpy(at))
        drawn = draw.integers(-2, 3, len(at)) if ties else draw.normal(size=len(at))
        values[name] = torch.from_numpy(drawn).to(dtype)
    others = {
        "bias": torch.from_numpy(draw.normal(size=5)).to(dtype),
        "running_var": torch.from_numpy(draw.uniform(size=4)).to(dtype),
        "num_batches_tracked": torch.tensor(seed * 1000 + 7),
    }
    return Ticket(topologies, values, others, dict.fromkeys(SHAPES, (0, 0)))


def dense(ticket: Ticket) -> dict[str, Array]:
    """Values with their zeros, and the floating tensors beside them, flat, in float64."""
    found = {}
    for name, topology in ticket.topologies.items():
        found[name] = np.zeros(topology.numel)
        found[name][topology.indices.numpy()] = ticket.values[name].double().numpy()
    return found | {n: t.double().numpy() for n, t in ticket.others.items() if t.is_floating_point()}


def superposed(tickets: Sequence[Ticket], *options: Any) -> Superposition:
    mean = Superposition(*options)
    for ticket in tickets:
        mean.add(ticket)
    return mean


def union(tickets: Sequence[Ticket]) -> dict[str, Array]:
    return {n: np.any([t.topologies[n].mask.numpy().ravel() for t in tickets], axis=0) for n in SHAPES}


@given(st.integers(1, 12), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 50))
def test_the_constant_average_is_the_mean_of_all(count: int, dtype: torch.dtype, seed: int):
    """Property 36, for any number of tickets."""
    tickets = [random_ticket(seed + i, 0.1 + 0.07 * i, dtype) for i in range(count)]
    mean = superposed(tickets)
    found = mean.ticket()
    for name, array in dense(found).items():
        np.testing.assert_allclose(array, np.mean([dense(t)[name] for t in tickets], 0), rtol=1e-6, atol=1e-6)
    for name, mask in union(tickets).items():
        np.testing.assert_array_equal(found.topologies[name].mask.numpy().ravel(), mask)
        assert found.values[name].dtype == dtype
    assert mean.count == count


@given(st.integers(1, 8), st.floats(0.01, 1), st.integers(0, 50))
def test_the_moving_average_is_the_recursion(count: int, factor: float, seed: int):
    """Property 36: W <- factor T + (1 - factor) W, from the first ticket on."""
    tickets = [random_ticket(seed + i, dtype=torch.float64) for i in range(count)]
    expected = dense(tickets[0])
    for ticket in tickets[1:]:
        expected = {n: factor * t + (1 - factor) * expected[n] for n, t in dense(ticket).items()}
    found = dense(superposed(tickets, "cima", factor).ticket())
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [("caa", None), ("cima", 0.3)])
def test_the_mean_of_one_ticket_many_times_is_that_ticket(dtype: torch.dtype, options: tuple[Any, ...]):
    ticket = random_ticket(3, dtype=dtype)
    found = superposed([ticket] * 7, *options).ticket()
    assert found.topologies == ticket.topologies
    for name, value in (*ticket.values.items(), *ticket.others.items()):
        assert torch.equal({**found.values, **found.others}[name], value)


def test_counters_are_those_of_the_newest_ticket():
    found = superposed([random_ticket(i) for i in (4, 2, 3)]).ticket().others["num_batches_tracked"]
    assert found.dtype == torch.int64 and int(found) == 3007


def largest(arrays: dict[str, Array], masks: dict[str, Array], total: int) -> dict[str, Array]:
    """The `total` largest magnitudes over all weights, equal ones in order."""
    score = np.concatenate([np.where(masks[n], np.abs(arrays[n]), -1) for n in masks])
    kept = np.isin(np.arange(score.size), np.argsort(-score, kind="stable")[:total])
    return dict(zip(masks, np.split(kept, np.cumsum([m.size for m in masks.values()])[:-1]), strict=True))


@given(st.integers(1, 6), st.floats(0.02, 1), st.integers(0, 50), st.booleans())
def test_pruned_back_it_has_exactly_the_largest(count: int, density: float, seed: int, ties: bool):
    """Property 37."""
    tickets = [random_ticket(seed + i, 0.3, ties=ties) for i in range(count)]
    mean, masks = superposed(tickets), union(tickets)
    numel, nnz = sum(m.size for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    total = int(np.floor(density * numel + 0.5))
    if total > nnz:
        with pytest.raises(
            ValueError, match=f"makes {total} active entries, and the {count} tickets have {nnz} together"
        ):
            mean.ticket(density)
        return
    full, found = dense(mean.ticket()), mean.ticket(density)
    exact = {n: np.mean([dense(t)[n] for t in tickets], 0) for n in masks}
    if ties and count in (1, 2, 4):  # where means are exact
        for name, mask in largest(exact, masks, total).items():
            np.testing.assert_array_equal(found.topologies[name].mask.numpy().ravel(), mask)
    assert found.nnz == total == sum(v.numel() for v in found.values.values())
    kept = {n: t.mask.numpy().ravel() for n, t in found.topologies.items()}
    assert all(not (kept[n] & ~masks[n]).any() for n in masks)
    rest = [np.abs(full[n][masks[n] & ~kept[n]]) for n in masks]
    least = min(np.abs(full[n][kept[n]]).min(initial=np.inf) for n in masks)
    assert max(r.max(initial=0) for r in rest) <= least
    for name, array in dense(found).items():
        np.testing.assert_array_equal(array, full[name] * kept.get(name, True))


@pytest.mark.parametrize("density", [None, 0.3])
def test_layer_preserving_keeps_the_counts_of_the_newest(density: float | None):
    tickets = [random_ticket(i, d) for i, d in enumerate((0.9, 0.5, 0.3))]
    numel = sum(t.numel for t in tickets[0].topologies.values())
    if density is not None:
        density = tickets[-1].nnz / numel
    mean = superposed(tickets)
    full, found, masks = dense(mean.ticket()), mean.ticket(density, layer_preserving), union(tickets)
    for name, topology in found.topologies.items():
        assert topology.nnz == tickets[-1].topologies[name].nnz
        expected = largest({name: full[name]}, {name: masks[name]}, topology.nnz)[name]
        np.testing.assert_array_equal(topology.mask.numpy().ravel(), expected)
    assert {n: t.nnz for n, t in mean.ticket(density, globally).topologies.items()} != {
        n: t.nnz for n, t in found.topologies.items()
    }
    assert mean.ticket(allocate=globally).nnz == tickets[-1].nnz


def test_the_mean_is_never_pruned_in_between():
    """The reference cut its mean after each ticket: what was small at first never returned."""
    values = ([1.0, 0.9, 0.0], [1.0, 0.9, 0.0], [-2.0, 0.9, 0.5])
    tickets = [
        Ticket({"w": Topology((3,), torch.arange(3))}, {"w": torch.tensor(v)}, {}, {"w": (0, 0)}) for v in values
    ]
    mean = Superposition()
    for ticket in tickets:
        mean.add(ticket)
        found = mean.ticket(density=1 / 3)
    assert found.topologies["w"].indices.tolist() == [1] and found.values["w"].item() == pytest.approx(0.9)


def test_other_allocations_share_out_too():
    mean = superposed([random_ticket(i, 0.6) for i in range(3)])
    found = mean.ticket(0.5, uniform)
    assert {n: t.nnz for n, t in found.topologies.items()} == {"a": 18, "b": 12, "c": 5}


def test_the_density_is_counted_within_the_budget_of_the_run():
    """With S sparsified and E other entries: round(density (S + E)) - E."""
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = sparsify(model, optimizer, methods.static(0.5), skip="1", budget="model")
    assert sparsifier.nnz == 50
    ticket = superposed([Ticket.of(sparsifier)]).ticket(0.4)
    assert ticket.nnz == 20
    assert superposed([Ticket.of(sparsifier)]).ticket(allocate=globally).nnz == 50


def test_it_goes_on_from_a_file():
    tickets = [random_ticket(i) for i in range(5)]
    for options in (("caa", None), ("cima", 0.4)):
        whole, first = superposed(tickets, *options), superposed(tickets[:3], *options)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        again = Superposition(*options)
        again.load_state_dict(torch.load(file, weights_only=True))
        for ticket in tickets[3:]:
            again.add(ticket)
        for density, allocate in ((None, None), (0.3, None), (None, layer_preserving)):
            one, other = whole.ticket(density, allocate), again.ticket(density, allocate)
            assert one.topologies == other.topologies and again.count == 5
            assert all(torch.equal(v, other.values[n]) for n, v in one.values.items())
            assert all(torch.equal(v, other.others[n]) for n, v in one.others.items())
    empty = Superposition()
    empty.load_state_dict(Superposition().state_dict())
    assert empty.count == 0
    with pytest.raises(ValueError, match=r"state is of average caa with factor None, and this is cima with factor 0.5"):
        Superposition("cima", 0.5).load_state_dict(Superposition().state_dict())
    with pytest.raises(ValueError, match="state has version None"):
        empty.load_state_dict({})


def test_what_makes_no_sense_is_refused():
    cases: dict[str, Any] = {
        "caa weighs all tickets alike, so leave out the factor 0.5": lambda: Superposition("caa", 0.5),
        r"cima needs the weight .* in \(0, 1\], got None": lambda: Superposition("cima"),
        r"cima needs the weight .* in \(0, 1\], got 0": lambda: Superposition("cima", 0),
        r"cima needs the weight .* in \(0, 1\], got 1.5": lambda: Superposition("cima", 1.5),
        "average must be one of caa, cima, got 'mean'": lambda: Superposition("mean"),  # type: ignore[arg-type]
        "no ticket was added yet": lambda: Superposition().ticket(),
        r"density must lie in \(0, 1\], got 0": lambda: superposed([random_ticket(0)]).ticket(0),
    }
    for message, make in cases.items():
        with pytest.raises(ValueError, match=f"superposition: {message}"):
            make()
    mean = superposed([random_ticket(0)])
    nnz = random_ticket(0).nnz
    with pytest.raises(ValueError, match=f"layer_preserving keeps the {nnz} active .* and the density asks for 7:"):
        mean.ticket(0.1, layer_preserving)
    with pytest.raises(ValueError, match="layer_preserving shares out superposed tickets only"):
        layer_preserving(Run("masked", methods.dense()).sparsifier.weights, None, None)


def test_tickets_that_do_not_belong_are_refused_and_the_mean_stays():
    mean, ticket = superposed([random_ticket(0)]), random_ticket(1)
    before = dense(mean.ticket())
    broken = {**ticket.values, "b": ticket.values["b"] * torch.inf}
    strange = {n: Topology((7, 5)) if n == "a" else t for n, t in ticket.topologies.items()}
    cases = {
        r"8 of 9 entries of b are not finite|9 of 9 entries of b are not finite": replace(ticket, values=broken),
        r"2 tensors of the ticket differ .*bias, running_var": replace(
            ticket, others={"num_batches_tracked": ticket.others["num_batches_tracked"]}
        ),
        r"1 tensors of the ticket differ in name, shape or units from those before \(a\)": replace(
            ticket, topologies=strange, values={**ticket.values, "a": torch.ones(35)}
        ),
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=f"superposition: ({message})"):
            mean.add(wrong)
    assert mean.count == 1
    assert all(np.array_equal(a, before[n]) for n, a in dense(mean.ticket()).items())


@pytest.mark.parametrize(("storage", "optimizer"), [(s, o) for s in STORAGES for o in ("sgd", "adamw")])
def test_training_goes_on_in_the_same_parameters(storage: str, optimizer: str):
    """Property 40: the reference put a new model where its optimizer held the old one."""
    rigl = methods.rigl(0.3, interval=3, until=30, anneal=constant, fraction=0.5)
    run, mean = Run(storage, rigl, "conv", optimizer), Superposition()
    objects = {n: id(p) for n, p in run.model.named_parameters()}
    for step in range(1, 13):
        run.step(step)
        if step % 4 == 0:
            mean.add(Ticket.of(run.sparsifier))
    mean.ticket(allocate=layer_preserving).install(run.sparsifier)
    assert {n: id(p) for n, p in run.model.named_parameters()} == objects
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == set(objects.values())
    x = batch("conv", 0)[0]
    run.model.eval()
    before = run.model(x).detach()
    run.model.train()
    run.step(13)
    run.model.eval()
    assert not torch.allclose(run.model(x), before, atol=1e-4)
    nnz = sum(t.nnz for t in run.sparsifier.topologies.values())
    assert run.model.train() and nnz == Run("masked", rigl, "conv").sparsifier.nnz
    for step in range(14, 24):
        run.step(step)
    assert sum(t.nnz for t in run.sparsifier.topologies.values()) == nnz


@pytest.mark.parametrize("storage", STORAGES)
def test_storages_have_the_same_mean(storage: str):
    found = []
    for kind in (storage, "masked"):
        run = Run(kind, methods.set_(0.3, interval=2, until=30), "attention", "adamw")
        tickets = []
        for step in range(1, 10):
            run.step(step)
            tickets += [Ticket.of(run.sparsifier)] if step % 3 == 0 else []
        found.append(superposed(tickets).ticket(0.2))
    one, other = found
    assert one.topologies == other.topologies and one.nnz == other.nnz
    for name, value in one.values.items():
        torch.testing.assert_close(value, other.values[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("storage", STORAGES)
def test_an_ensemble_is_the_mean_of_predictions_and_leaves_no_trace(storage: str):
    rigl = methods.rigl(0.3, interval=3, until=30, anneal=constant, fraction=0.5)
    run, x = Run(storage, rigl), batch("linear", 0)[0]
    tickets, outputs = [], []
    for step in range(1, 10):
        run.step(step)
        if step % 3 == 1:
            tickets.append(Ticket.of(run.sparsifier))
            outputs.append(run.model(x).softmax(1).detach())
    before = {n: t.clone() for n, t in {**tensors(run.model, run.optimizer)}.items()}
    found = ensemble(run.sparsifier, tickets, lambda: run.model(x).softmax(1))
    torch.testing.assert_close(found, torch.stack(outputs).mean(0))
    assert not found.requires_grad
    with pytest.raises(ValueError, match="ensemble: there is no ticket"):
        ensemble(run.sparsifier, [], lambda: x)
    with pytest.raises(ValueError, match=r"ensemble: predict returned torch.int64, of which there is no mean"):
        ensemble(run.sparsifier, tickets, lambda: run.model(x).argmax(1))
    after = tensors(run.model, run.optimizer)
    assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())


LOW, HIGH, STEPS, SHARE, CYCLE, FRACTION = 0.01, 0.06, 30, 0.5, 4, 0.5


class Superposed(Program):
    """Sup-tickets: a random topology, explored anew in each cycle, the mean of all tickets pruned back."""

    def __init__(self, model: nn.Module, seed: int, average: str) -> None:
        super().__init__(model, seed)
        self.average = average
        self.tickets: list[tuple[dict[str, Array], dict[str, Array]]] = []
        for n in self.sparse:
            self.mask[n] = only(self, n, stream(self, n).subset(self.w[n].size, self.w[n].size // 4))
            self.w[n] = self.w[n] * self.mask[n]

    def rate(self, step: int, pretrain: int) -> float:
        if step <= pretrain:
            return LR
        u = ((step - pretrain) % CYCLE) / CYCLE
        return LOW + (HIGH - LOW) * (2 * u if u < 0.5 else 2 - 2 * u)

    def train(self, step: int, pretrain: int, data: tuple[Tensor, Tensor]) -> None:
        g = self.gradients(data)
        if step > pretrain and (step - pretrain - 1) % CYCLE == 0:
            kept = without_lowest(self, magnitudes(self), FRACTION, "keep")
            grow(self, g, kept, PLAIN | {"grow": "gradient", "regrow_dropped": "keep"}, Watch())
        else:
            self.descend(g, self.rate(step, pretrain))
        if step >= pretrain and (step - pretrain) % CYCLE == 0:
            self.tickets.append((dict(self.w), dict(self.mask)))

    def superposed(self) -> dict[str, Array]:
        if self.average == "caa":
            mean = {n: np.mean([w[n] for w, _ in self.tickets], 0) for n in self.w}
        else:
            mean = dict(self.tickets[0][0])
            for w, _ in self.tickets[1:]:
                mean = {n: 0.4 * w[n] + 0.6 * mean[n] for n in w}
        masks = {n: np.any([m[n] for _, m in self.tickets], axis=0) for n in self.sparse}
        kept = largest(mean, masks, sum(int(m.sum()) for m in self.mask.values()))
        return {n: m * kept.get(n, 1) for n, m in mean.items()}


@pytest.mark.parametrize("average", ["caa", "cima"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_whole_procedure_is_that_of_the_paper(storage: str, seed: int, average: Any):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 11), nn.Tanh(), nn.Linear(11, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    program = Superposed(model, seed, average)
    phases = plan(STEPS, SHARE, CYCLE)
    assert (phases.pretrain, phases.cycles) == (18, 3)
    rate = triangular(LOW, HIGH, phases.cycle, phases.pretrain)
    optimizer = sgd(model)
    method = reexploring(methods.static(0.25, allocate=uniform), phases, FRACTION)
    sparsifier = regrow.sparsify(model, optimizer, method, storage=storage, seed=seed)  # type: ignore[arg-type]
    mean = Superposition(average, 0.4 if average == "cima" else None)
    draw = torch.Generator().manual_seed(100 + seed)
    for step in range(1, phases.total + 1):
        data = torch.randn(6, 8, generator=draw).double(), torch.randint(0, 5, (6,), generator=draw)
        program.train(step, phases.pretrain, data)
        for group in optimizer.param_groups if step > phases.pretrain else ():
            group["lr"] = rate(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
        if phases.collects_at(step):
            mean.add(Ticket.of(sparsifier))
        now = tensors(model, optimizer)
        for name in program.sparse:
            mask = sparsifier.topologies[name].mask.numpy().ravel()
            np.testing.assert_array_equal(mask, program.mask[name])
        for name, w in program.w.items():
            np.testing.assert_allclose(now[f"{name}:value"].numpy(), w, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(now[f"{name}:momentum_buffer"].numpy(), program.v[name], rtol=1e-9, atol=1e-12)
    assert mean.count == len(program.tickets) == 4
    found = mean.ticket(0.25)
    for name, array in program.superposed().items():
        mine = dense(found)[name]
        np.testing.assert_allclose(mine, array, rtol=1e-9, atol=1e-12)
    if storage == "masked":
        found.install(sparsifier)
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(parameter.detach().numpy().ravel(), program.superposed()[name], atol=1e-12)


def test_erk_reads_the_axes_of_a_ticket():
    run = Run("masked", methods.static(0.5)).go(1, 2)
    found = superposed([Ticket.of(run.sparsifier)]).ticket(0.2, erk)
    assert {n: t.nnz for n, t in found.topologies.items()} == {
        n: t.nnz for n, t in Run("masked", methods.static(0.2)).sparsifier.topologies.items()
    }
