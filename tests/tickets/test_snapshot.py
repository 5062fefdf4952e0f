"""Coming back to a step: the run goes on from it as it did the first time, to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, StepLR

from regrow import methods
from regrow.core.method import Method
from regrow.parts.schedules import constant
from regrow.tickets import Snapshot
from support.pairs import Run
from support.table import STORAGES

MAKE: dict[str, Callable[[], Method]] = {
    "rigl": lambda: methods.rigl(0.3, interval=3, until=30, anneal=constant),
    "snfs": lambda: methods.snfs(0.3, interval=3, until=30),
    "gmp": lambda: methods.gmp(0.2, interval=3, until=12),
    "dense": methods.dense,
    "str": lambda: methods.str_(initial=-3.0),
    "l0": lambda: methods.l0(penalty=0.005, droprate=0.9),
}
LATENT = ("str", "l0")
"""Masked only."""


class Scheduled(Run):
    """A run whose learning rate is lowered every 4 steps."""

    def __init__(self, storage: Any, method: str, *rest: Any) -> None:
        super().__init__(storage, MAKE[method](), *rest)
        self.schedule: LRScheduler = StepLR(self.optimizer, 4, 0.5)

    def step(self, step: int) -> float:
        loss = super().step(step)
        self.schedule.step()
        return loss

    def history(self, first: int, last: int) -> list[dict[str, Tensor]]:
        """Everything there is after each step, and the learning rate."""
        log = []
        for step in range(first, last + 1):
            loss = self.step(step)
            masks = {f"{n}:mask": t.mask for n, t in self.sparsifier.topologies.items()}
            seen = {f"{w.name}:{k}": v.clone() for w in self.sparsifier.weights for k, v in w.state.items()}
            buffers = {n: b.clone() for n, b in self.model.named_buffers()}
            rate = torch.tensor([loss, self.optimizer.param_groups[0]["lr"], self.sparsifier.step])
            log.append({**self.tensors(), **masks, **seen, **buffers, "rate": rate})
        return log


def require_same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert [name for name, t in a.items() if not torch.equal(t, b[name])] == []


KINDS = [(s, m) for s in STORAGES for m in MAKE if s == "masked" or m not in LATENT]
CASES = [(*kind, o, n) for kind in KINDS for o in ("sgd", "adamw") for n in ("linear", "conv")]


@pytest.mark.parametrize(("storage", "method", "optimizer", "net"), CASES)
def test_the_run_repeats_itself_as_often_as_one_likes(storage: str, method: str, optimizer: str, net: str):
    run = Scheduled(storage, method, net, optimizer)
    run.history(1, 4)
    objects = [*map(id, run.model.parameters())]
    snapshot = Snapshot.take(run.sparsifier, run.schedule)
    first = run.history(5, 14)
    for _ in range(2):
        snapshot.restore(run.sparsifier, run.schedule)
        require_same(first, run.history(5, 14))
    assert [*map(id, run.model.parameters())] == objects


@pytest.mark.parametrize("storage", STORAGES)
def test_it_survives_a_file_and_another_process_builds_on_it(storage: str):
    run = Scheduled(storage, "rigl", "conv", "adamw")
    run.history(1, 4)
    file = io.BytesIO()
    torch.save(Snapshot.take(run.sparsifier, run.schedule).state_dict(), file)
    first = run.history(5, 10)
    file.seek(0)
    again = Scheduled(storage, "rigl", "conv", "adamw")
    Snapshot.from_state_dict(torch.load(file, weights_only=True)).restore(again.sparsifier, again.schedule)
    require_same(first, again.history(5, 10))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_denser_topology_returns(storage: str):
    """Of a ramp, which has lowered the density since."""
    run = Scheduled(storage, "gmp")
    run.history(1, 2)
    full = run.tensors()
    snapshot = Snapshot.take(run.sparsifier, run.schedule)
    run.history(3, 14)
    assert run.sparsifier.nnz < 0.3 * run.sparsifier.numel
    snapshot.restore(run.sparsifier, run.schedule)
    assert run.sparsifier.nnz == run.sparsifier.numel
    assert [n for n, t in run.tensors().items() if not torch.equal(t, full[n])] == []


def test_gradients_are_forgotten():
    run = Scheduled("masked", "rigl")
    run.history(1, 2)
    snapshot = Snapshot.take(run.sparsifier, run.schedule)
    run.backward(3)
    snapshot.restore(run.sparsifier, run.schedule)
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("storage", STORAGES)
def test_of_another_run_it_is_refused_and_nothing_changes(storage: str):
    run = Scheduled(storage, "rigl", "conv")
    run.history(1, 4)
    before, rate = run.tensors(), run.schedule.state_dict()
    snapshot = Snapshot.take(run.sparsifier, run.schedule)
    run.history(5, 6)
    other = Scheduled(storage, "snfs", "conv")
    cases = {
        "taken with 1 other objects and is restored with 0": (snapshot, []),
        "had method 'snfs', and this one has 'rigl'": (Snapshot.take(other.sparsifier), []),
        r"had shapes \{'0.weight': \[24, 12\]": (Snapshot.take(Scheduled(storage, "rigl").sparsifier), []),
        "had storages": (Snapshot.take(Scheduled({"3.weight": "masked"}, "rigl", "conv").sparsifier), []),
        r"parameters by group, and these have \[\[8\]\]": (
            Snapshot(snapshot.model, [{"state": {}, "param_groups": []}], snapshot.sparsifier),
            [],
        ),
        "1 tensors of the model differ in name or shape .0.bias.": (
            Snapshot(
                {n: t for n, t in snapshot.model.items() if n != "0.bias"}, snapshot.optimizers, snapshot.sparsifier
            ),
            [],
        ),
    }
    if storage == "masked":
        del cases["had storages"]
    now, later = run.tensors(), run.schedule.state_dict()
    for message, (wrong, others) in cases.items():
        with pytest.raises(ValueError, match=f"snapshot: .*{message}"):
            wrong.restore(run.sparsifier, *others)
    assert [n for n, t in run.tensors().items() if not torch.equal(t, now[n])] == []
    assert run.schedule.state_dict() == later != rate
    assert any(not torch.equal(t, before[n]) for n, t in now.items())
    with pytest.raises(ValueError, match="snapshot: this state has version None"):
        Snapshot.from_state_dict({})
