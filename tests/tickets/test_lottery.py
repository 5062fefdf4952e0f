"""Lottery tickets against a NumPy program written from the papers, and what the controls keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import regrow
from regrow import methods
from regrow.core.topology import Topology
from regrow.parts.allocation import uniform
from regrow.parts.scores import random
from regrow.tickets import Snapshot, Ticket, lottery, reinitialized, rewind, round_densities, shuffled, winning
from support.pairs import Run, positions, tensors
from support.paper import LR, Arrays, Batch, Program, keep_largest, meant, sgd, shared, total_of
from support.table import OPTIMIZERS, STORAGES


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: dict[str, list[nn.Module]] = {
        "mlp": [nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 4)],
        "conv": [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)],
    }
    return nn.Sequential(*layers[kind]).double()


def batch_of(kind: str, seed: int, step: int) -> Batch:
    draw = torch.Generator().manual_seed(1000 * seed + step)
    shape = {"mlp": (7,), "conv": (2, 5, 5)}[kind]
    return torch.randn(6, *shape, generator=draw).double(), torch.randint(0, 4, (6,), generator=draw)


@dataclass
class Winning(Program):
    """Iterative magnitude pruning, with a learning rate that halves every 3 steps."""

    log: list[tuple[Arrays, Arrays, Arrays]] = field(default_factory=list)

    def train(self, batches: Callable[[int], Batch], first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.descend(self.gradients(batches(step)), LR * 0.5 ** ((step - 1) // 3))
            self.log.append((dict(self.mask), dict(self.w), dict(self.v)))

    def run(self, batches: Callable[[int], Batch], density: float, rounds: int, steps: int, to: int, allocate: str):
        self.train(batches, 1, to)
        w, v = dict(self.w), dict(self.v)
        for i in range(rounds):
            self.train(batches, to + 1, steps)
            total = total_of(self, density ** ((i + 1) / rounds))
            keep_largest(self, shared(self, allocate, total, self.sparse))
            self.w = {n: w[n] * self.mask.get(n, 1) for n in w}
            self.v = {n: v[n] * self.mask.get(n, 1) for n in v}
        self.train(batches, to + 1, steps)


def dense_view(model: nn.Module, optimizer: Any) -> tuple[Arrays, Arrays]:
    """Values and momentum with their zeros, flat."""
    found = {n: t.numpy() for n, t in tensors(model, optimizer).items()}
    return tuple(
        {n: found[f"{n}:{kind}"] for n, _ in model.named_parameters()} for kind in ("value", "momentum_buffer")
    )  # type: ignore[return-value]


ORACLE = [
    (storage, kind, seed, to, allocate)
    for storage in STORAGES
    for kind, seed, to, allocate in (
        ("mlp", 0, 0, "globally"),
        ("mlp", 1, 4, "globally"),
        ("conv", 2, 3, "globally"),
        ("conv", 3, 0, "globally"),
        ("mlp", 4, 2, "uniform"),
    )
]


@pytest.mark.parametrize(("storage", "kind", "seed", "to", "allocate"), ORACLE)
def test_the_whole_procedure_is_that_of_the_papers(storage: Any, kind: str, seed: int, to: int, allocate: str):
    density, rounds, steps = (0.0625, 2, 8) if allocate == "uniform" else (0.1, 3, 8)
    if allocate == "uniform":
        torch.manual_seed(seed)
        model: nn.Module = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    else:
        model = network(kind, seed)
    optimizer = sgd(model)
    program = Winning(model, seed)
    program.run(lambda step: batch_of(kind, seed, step), density, rounds, steps, to, allocate)
    sparsifier = regrow.sparsify(model, optimizer, methods.dense(), storage=storage, allow_dense=True)
    schedule = StepLR(optimizer, 3, 0.5)
    log = iter(program.log)

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            x, y = batch_of(kind, seed, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            assert sparsifier.step == step
            masks, w, v = next(log)
            for name, mask in masks.items():
                np.testing.assert_array_equal(sparsifier.topologies[name].mask.numpy().ravel(), mask)
                if storage == "compressed":
                    np.testing.assert_array_equal(positions(model)[name].numpy(), np.flatnonzero(mask))
            values, momentum = dense_view(model, optimizer)
            for name, expected in w.items():
                np.testing.assert_allclose(values[name], expected, rtol=1e-9, atol=1e-12)
                np.testing.assert_allclose(momentum[name], v[name], rtol=1e-9, atol=1e-12)
                assert not np.any(values[name][~masks.get(name, np.ones(expected.size, bool))])

    options: dict[str, Any] = {
        "density": density,
        "rounds": rounds,
        "steps": steps,
        "allocate": meant("allocate", allocate),
    }
    ticket = lottery(sparsifier, train, schedule, rewind_to=to, **options)
    assert next(log, None) is None
    assert ticket == sparsifier.topologies
    numel = sum(t.numel for t in ticket.values())
    assert sum(t.nnz for t in ticket.values()) == int(density * numel + 0.5)


@given(st.floats(1e-4, 1), st.integers(1, 30))
def test_rounds_leave_the_same_share_each(density: float, rounds: int):
    found = round_densities(density, rounds)
    assert len(found) == rounds and found[-1] == density
    ratios = [b / a for a, b in zip([1.0, *found], found, strict=False)]
    assert ratios == pytest.approx([density ** (1 / rounds)] * rounds)


def late(storage: Any, optimizer: str = "sgd", net: str = "conv") -> tuple[Run, StepLR, Snapshot, dict[str, Tensor]]:
    """A run at step 9, with the snapshot and the tensors of step 3."""
    run = Run(storage, methods.dense(), net, optimizer)
    schedule = StepLR(run.optimizer, 2, 0.5)
    for step in range(1, 10):
        if step == 4:
            snapshot, then = Snapshot.take(run.sparsifier, schedule), everything(run)
        run.step(step)
        schedule.step()
    return run, schedule, snapshot, then


def everything(run: Run) -> dict[str, Tensor]:
    return {**run.tensors(), **{f"{n}:buffer": b.clone() for n, b in run.model.named_buffers()}}


def parts_of(run: Run, names: Any) -> dict[str, set[str]]:
    """The names of tensors by the part of a run that they are."""
    sparse = {n.partition("[")[0] for n in run.sparsifier.topologies}
    return {
        "values": {n for n in names if n.endswith(":value") and n.partition(":")[0] in sparse},
        "dense": {n for n in names if n.endswith(":value") and n.partition(":")[0] not in sparse},
        "optimizer": {n for n in names if n.endswith(("momentum_buffer", "exp_avg", ":step"))},
        "buffers": {n for n in names if n.endswith(":buffer") and ("running" in n or "num_batches" in n)},
    }


KEEP = [
    (),
    ("optimizer",),
    ("schedule",),
    ("step",),
    ("buffers",),
    ("dense",),
    ("buffers", "optimizer"),
    ("dense", "step"),
]


@pytest.mark.parametrize("keep", KEEP, ids="+".join)
@pytest.mark.parametrize(("storage", "optimizer"), [(s, o) for s in STORAGES for o in ("sgd", "adamw")])
def test_rewound_parts_are_the_snapshots_and_kept_ones_are_not(storage: str, optimizer: str, keep: Any):
    """Property 35: exactly the snapshot on active positions, zero elsewhere."""
    run, schedule, snapshot, then = late(storage, optimizer)
    topologies = winning(run.sparsifier, 0.3)
    now, rate = everything(run), run.optimizer.param_groups[0]["lr"]
    rewind(run.sparsifier, snapshot, topologies, schedule, keep=keep)
    after = everything(run)
    assert run.sparsifier.topologies == topologies
    for part, names in parts_of(run, now).items():
        assert names
        for name in names:
            source = (now if part in keep else then)[name]
            mask = topologies[n].mask.flatten() if (n := name.partition(":")[0]) in topologies else True
            expected = source * mask if source.dim() and source.numel() > 1 else source
            assert torch.equal(after[name], expected), (part, name)
        assert any(not torch.equal(now[n], then[n]) for n in names), f"{part} never moved: the test shows nothing"
    kept = "schedule" in keep
    assert (run.optimizer.param_groups[0]["lr"], schedule.last_epoch) == ((rate, 9) if kept else (rate * 8, 3))
    assert run.sparsifier.step == (9 if "step" in keep else 3)
    run.go(10, 11)
    outside = {n: ~t.mask.flatten() for n, t in topologies.items()}
    assert all(not run.tensors()[f"{n}:value"][mask].any() for n, mask in outside.items())


def test_the_step_of_an_update_follows_the_clock_that_is_kept():
    """A method whose next update is due at step 12 has it in the third step from step 9, the ninth from step 3."""
    for keep, expected in (((), {12: 9}), (("step",), {12: 3})):
        run = Run("masked", methods.rigl(0.3, interval=12, until=30))
        snapshot = None
        for step in range(1, 10):
            run.step(step)
            snapshot = Snapshot.take(run.sparsifier) if step == 3 else snapshot
        assert snapshot is not None
        rewind(run.sparsifier, snapshot, run.sparsifier.topologies, keep=keep)
        moved = []
        for step in range(1, 12):
            before = run.sparsifier.topologies
            run.step(step)
            if run.sparsifier.topologies != before:
                moved.append(step)
        assert moved == list(expected.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("net", ["linear", "attention", "lstm"])
def test_storages_and_packed_weights_rewind_alike(storage: str, net: str):
    run, schedule, snapshot, then = late(storage, "adamw", net)
    topologies = winning(run.sparsifier, 0.2)
    rewind(run.sparsifier, snapshot, topologies, schedule)
    after, blocks = run.tensors(), {}
    for name, topology in topologies.items():
        blocks.setdefault(name.partition("[")[0], []).append(topology.mask.flatten())
    for name, masks in blocks.items():
        assert torch.equal(after[f"{name}:value"], then[f"{name}:value"] * torch.cat(masks))


def test_winning_changes_nothing_and_counts_exactly():
    run = Run("masked", methods.rigl(0.5, interval=2, until=9)).go(1, 5)
    before, numel = everything(run), run.sparsifier.numel
    for density in (0.5, 0.31, 0.011):
        found = winning(run.sparsifier, density)
        assert sum(t.nnz for t in found.values()) == int(density * numel + 0.5)
        assert all(t.without(run.sparsifier.topologies[n]).numel() == 0 for n, t in found.items())
        pooled = torch.cat([run.tensors()[f"{n}:value"].abs() for n in found])
        kept = torch.cat([t.mask.flatten() for t in found.values()])
        assert pooled[kept].min() >= pooled[~kept].max()
    same = winning(run.sparsifier, 0.25, allocate=uniform)
    assert {n: t.density for n, t in same.items()} == dict.fromkeys(same, 0.25)
    assert winning(run.sparsifier, 0.25, score=random) != winning(run.sparsifier, 0.25)
    assert everything(run).keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in everything(run).items())


def test_numbers_that_contradict_each_other_are_refused():
    run = Run("masked", methods.rigl(0.5, interval=2, until=9), "conv").go(1, 3)
    before, snapshot, topologies = everything(run), Snapshot.take(run.sparsifier), run.sparsifier.topologies
    numel, step = run.sparsifier.numel, run.sparsifier.step
    with pytest.raises(
        ValueError, match=f"density 0.7 makes {int(0.7 * numel + 0.5)} active .* {run.sparsifier.nnz} left"
    ):
        winning(run.sparsifier, 0.7)
    with pytest.raises(ValueError, match=r"lottery: density must lie in .0, 1., got 0"):
        winning(run.sparsifier, 0)
    with pytest.raises(ValueError, match=r"makes none of the .* active"):
        winning(run.sparsifier, 1e-9)
    with pytest.raises(ValueError, match="lottery: rounds must be at least 1, got 0"):
        round_densities(0.5, 0)
    with pytest.raises(ValueError, match=r"lottery: keep is a tuple .* got \('bufers',\)"):
        rewind(run.sparsifier, snapshot, topologies, keep=("bufers",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lottery: keep is a tuple .* got 'step'"):
        rewind(run.sparsifier, snapshot, topologies, keep="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lottery: 1 of the \d sparsified weights differ"):
        rewind(run.sparsifier, snapshot, dict(list(topologies.items())[1:]))
    with pytest.raises(ValueError, match="taken with 0 other objects and is restored with 1"):
        rewind(run.sparsifier, snapshot, topologies, run.optimizer)
    options: dict[str, Any] = {"density": 0.1, "rounds": 1, "steps": 4}
    with pytest.raises(ValueError, match="lottery: it begins before the first step, and 3 are taken"):
        lottery(run.sparsifier, lambda first, last: None, **options)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=f"lottery: rewind_to must lie in .0, steps., got {wrong} of 4 steps"):
            lottery(run.sparsifier, lambda first, last: None, **options, rewind_to=wrong)
    fresh = Run("masked", methods.static(0.2))
    with pytest.raises(ValueError, match=r"lottery: density 0.5 makes .*begin denser"):
        lottery(fresh.sparsifier, lambda first, last: None, density=0.5, rounds=2, steps=4)
    assert all(torch.equal(t, before[n]) for n, t in everything(run).items()) and run.sparsifier.step == step


def test_compressed_storage_without_room_is_refused_before_anything_changes():
    run = Run("compressed", methods.static(0.2)).go(1, 3)
    snapshot = Snapshot.take(run.sparsifier)
    run.go(4, 5)
    before = everything(run)
    full = {n: Topology(t.shape) for n, t in run.sparsifier.topologies.items()}
    for keep in ((), ("optimizer",)):
        with pytest.raises(ValueError, match=r"lottery: 0.weight would have 288 active entries, .* room for \d+"):
            rewind(run.sparsifier, snapshot, full, keep=keep)  # type: ignore[arg-type]
    assert all(torch.equal(t, before[n]) for n, t in everything(run).items())


def test_shuffled_keeps_counts_and_nothing_else():
    topologies = {"a": Topology((9, 7), torch.arange(20)), "b": Topology((9, 7), torch.arange(20)), "c": Topology((3,))}
    drawn = [shuffled(topologies, seed) for seed in range(200)]
    assert drawn[0] == shuffled(topologies, 0) != drawn[1]
    assert drawn[0]["a"] != drawn[0]["b"] and drawn[0]["c"].is_dense
    assert all(t[n].nnz == topologies[n].nnz and t[n].shape == topologies[n].shape for t in drawn for n in t)
    often = sum(t["a"].mask.double() for t in drawn)
    expected, spread = 200 * 20 / 63, (200 * (20 / 63) * (43 / 63)) ** 0.5
    assert ((often - expected).abs() < 4.5 * spread).all()


BOUNDS = {"linear": {"0": 12**-0.5, "2": 24**-0.5}, "lstm": {"body": 7**-0.5, "head": 7**-0.5}}


@pytest.mark.parametrize("net", ["linear", "conv", "lstm", "attention"])
@pytest.mark.parametrize("storage", STORAGES)
def test_reinitialized_keeps_the_topology_and_nothing_else(storage: str, net: str):
    run = Run(storage, methods.rigl(0.5, interval=2, until=9), net, "adamw").go(1, 5)
    objects = [*map(id, run.model.parameters())]
    topologies, old = run.sparsifier.topologies, everything(run)
    state = torch.get_rng_state()
    reinitialized(run.sparsifier, 7)
    assert torch.equal(torch.get_rng_state(), state)
    first = everything(run)
    reinitialized(run.sparsifier, 7)
    assert all(torch.equal(t, everything(run)[n]) for n, t in first.items())
    reinitialized(run.sparsifier, 8)
    assert [*map(id, run.model.parameters())] == objects
    assert run.sparsifier.topologies == topologies and not run.optimizer.state
    new = everything(run)
    for name in run.sparsifier.names.values():
        key = f"{name.partition('[')[0]}:value"
        alike = (first[key] == old[key]) | (first[key] == new[key])
        zero = old[key] == 0
        assert torch.equal(alike, zero) and torch.equal(first[key] == 0, zero)
    for prefix, bound in BOUNDS.get(net, {}).items():
        drawn = torch.cat([t[t != 0].flatten() for n, t in new.items() if n.startswith(prefix) and n.endswith("value")])
        assert drawn.abs().max() <= bound and drawn.std() == pytest.approx(bound / 3**0.5, rel=0.25)
    if net == "conv":
        assert not new["1.running_mean:buffer"].any() and bool((new["1.weight:value"] == 1).all())
    if net == "attention":
        assert not new["body.out_proj.bias:value"].any() and not new["body.in_proj_bias:value"].any()
    run.go(6, 7)
    assert Ticket.of(run.sparsifier).nnz == sum(t.nnz for t in topologies.values())


def test_masked_values_are_those_of_a_fresh_model_of_that_seed():
    """With one layer, whose draws come in the order in which the model was built."""
    model = nn.Linear(9, 5)
    sparsifier = regrow.sparsify(model, OPTIMIZERS["sgd"](model.parameters()), methods.static(0.4))
    reinitialized(sparsifier, 11)
    torch.manual_seed(11)
    fresh = nn.Linear(9, 5)
    assert torch.equal(model.weight, fresh.weight * sparsifier.topologies["weight"].mask)
    assert torch.equal(model.bias, fresh.bias)


class Scaled(nn.Module):
    """A parameter of its own that nobody initializes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.body = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


class Initialized(Scaled):
    """The same, which says how."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 3)
        nn.init.constant_(self.body.bias, 2)


def test_who_holds_the_modules_has_the_last_word():
    model = Initialized()
    sparsifier = regrow.sparsify(model, OPTIMIZERS["sgd"](model.parameters()), methods.static(0.4))
    reinitialized(sparsifier, 0)
    assert bool((model.scale == 3).all()) and bool((model.body.bias == 2).all())


def test_values_that_cannot_be_drawn_anew_are_refused_and_nothing_changes():
    model: nn.Module = Scaled()
    sparsifier = regrow.sparsify(model, OPTIMIZERS["sgd"](model.parameters()), methods.static(0.4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="lottery: Scaled has scale and no reset_parameters"):
        reinitialized(sparsifier, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model = Initialized()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = regrow.sparsify(model, optimizer, methods.static(0.4), storage="compressed")
    with pytest.raises(ValueError, match="Initialized initializes the modules it holds by itself, of which 1 are"):
        reinitialized(sparsifier, 0)
