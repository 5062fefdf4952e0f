"""Every method, optimizer and storage in covering pairs: what must hold at each step, read from the tensors.

A method reads weights and gradients through `SparseWeight` and cannot see which optimizer steps them; the floors of the
library hold that. So the product of all methods with all optimizers says no more than its pairs do: every row of
`METHODS` runs with SGD and with AdamW, in each storage that takes it, and every row of `OPTIMIZERS` runs with one
method of each family, in each storage. What a method and an optimizer could do to each other goes through the storage
alone, and is of few kinds: the families differ in them (values that never move, that fall, that are exchanged after or
instead of a step, that are latent).
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow import Sparsifier, methods, sparsify
from regrow.parts.allocation import erk, globally, uniform
from regrow.parts.schedules import constant
from support import pairs
from support.loops import same
from support.table import DENSITY, IN_STORAGES, INTERVAL, METHODS, OPTIMIZERS, UNTIL, given

STEPS = 30
FAMILIES = ["static", "snip", "gmp", "rigl", "set", "str"]
"""A method of each: a topology that stays, a start, a ramp, an update instead of and after a step, latent values."""
PAIRS = [
    *((method, "sgd", storage) for method, storage in IN_STORAGES),
    *((method, "adamw", storage) for method, storage in IN_STORAGES),
    *((m, o, s) for (m, s), o in product(IN_STORAGES, OPTIMIZERS) if m in FAMILIES and o not in ("sgd", "adamw")),
]
"""(method, optimizer, storage)"""


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def conv() -> nn.Module:
    torch.manual_seed(1)
    features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
    return nn.Sequential(*features, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 4))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"mlp": (mlp, (8,)), "conv": (conv, (2, 6, 6))}


@cache
def batch(net: str, step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    shape = NETS[net][1]
    return torch.randn(6, *shape, generator=draw), torch.randint(0, 4, (6,), generator=draw)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, net: str, step: int) -> None:
    x, y = batch(net, step)
    optimizer.zero_grad()
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    optimizer.step()


class Run:
    """A model, its optimizer and its sparsifier, trained on batches that depend on the step alone."""

    def __init__(
        self,
        net: str,
        method: str,
        optimizer: str = "sgd",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        storage: Any = "masked",
    ):
        self.net, self.method, self.storage = net, method, storage
        self.model = NETS[net][0]().to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.weights = [(n, p) for n, p in self.model.named_parameters() if p.dim() > 1]
        self.numel = sum(p.numel() for _, p in self.weights)
        recipe = METHODS[method]()
        first = [(x.to(dtype), y) for x, y in (batch(net, step) for step in (0, -1))]
        self.sparsifier: Sparsifier = sparsify(
            self.model, self.optimizer, recipe, seed=seed, storage=storage, allow_dense=True, **given(recipe, first)
        )

    def step(self, step: int) -> None:
        train(self.model, self.optimizer, self.net, step)

    def go(self, first: int, last: int) -> Run:
        for step in range(first, last + 1):
            self.step(step)
        return self

    def masks(self) -> dict[str, Tensor]:
        masks = {name: t.mask for name, t in self.sparsifier.topologies.items()}
        for name, at in pairs.positions(self.model).items():
            assert torch.equal(masks[name].view(-1).nonzero().view(-1), at.sort().values)
        return masks

    def counts(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.masks().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of model, optimizer and observers, by name."""
        state = {
            f"{n}:{k}": torch.as_tensor(v)
            for n, p in self.model.named_parameters()
            for k, v in self.optimizer.state.get(p, {}).items()
        }
        seen = {f"{w.name}:{k}": v for w in self.sparsifier.weights for k, v in w.state.items()}
        return {k: v.detach().clone() for k, v in {**self.model.state_dict(), **state, **seen}.items()}


def require_zero_outside(run: Run) -> None:
    masks = run.masks()
    if run.storage == "compressed":
        pairs.require_inert_tails(run.model, run.optimizer)
        return
    for name, parameter in run.weights:
        state = {k: s for k, s in run.optimizer.state.get(parameter, {}).items() if s.shape == parameter.shape}
        if METHODS[run.method].dense_state:
            state = {}
        for kind, tensor in {"value": parameter.detach(), **state}.items():
            assert not tensor[~masks[name]].any(), f"{kind} of {name} outside its topology"


def require_active_mostly_nonzero(run: Run) -> None:
    """The masks are of this network: what they call active is, newcomers aside, not zero."""
    active = sum(run.counts().values())
    nonzero = sum(int((p != 0).sum()) for _, p in run.weights)
    assert nonzero >= 0.4 * active


@pytest.mark.parametrize(("method", "optimizer", "storage"), PAIRS)
def test_counts_and_zeros_at_every_step(method: str, optimizer: str, storage: str):
    """Properties 1, 9, 11 and 22: exact counts, and zero weights and state outside the topology, at every step."""
    # Convolutions with SGD alone, since neither an optimizer nor a method sees what module a weight is of.
    run, row = Run("conv" if optimizer == "sgd" else "mlp", method, optimizer, storage=storage), METHODS[method]
    target = row.active(DENSITY, run.numel)
    before, first = run.numel, run.counts()
    for step in range(1, STEPS + 1):
        run.step(step)
        require_zero_outside(run)
        counts = run.counts()
        active = sum(counts.values())
        assert active <= before or not row.falling
        before = active
        assert active == target or not row.conserving
        assert counts == first or not row.own
        assert sum(int((p != 0).sum()) for _, p in run.weights) <= active
    if row.density is not None:
        assert before == row.active(row.density, run.numel)
    require_active_mostly_nonzero(run)


@pytest.mark.parametrize("timing", ["instead", "after"])
@pytest.mark.parametrize("allocate", [uniform, erk, globally])
def test_gmp_reaches_its_density_at_until_and_not_before(allocate: Any, timing: Any):
    """Property 22: the last pruning is forced where the interval does not divide the ramp."""
    model = mlp()
    opt = OPTIMIZERS["adamw"](model.parameters())
    sparsify(model, opt, methods.gmp(0.1, until=10, interval=7, allocate=allocate, timing=timing))
    counts = []
    for step in range(1, 13):
        train(model, opt, "mlp", step)
        counts.append(sum(int((p != 0).sum()) for p in model.parameters() if p.dim() > 1))
    ramp = [math.floor((0.1 + 0.9 * (1 - step / 10) ** 3) * 144 + 0.5) for step in (7, 10)]
    assert counts == [144] * 6 + [ramp[0]] * 3 + [ramp[1]] * 3


@pytest.mark.parametrize(("method", "storage"), [(m, s) for m, s in IN_STORAGES if METHODS[m].moving])
def test_updates_move_the_topology_at_the_right_steps_only(method: str, storage: str):
    """Property 21: never at step 0, every interval, not from `until` on."""
    run = Run("mlp", method, storage=storage)
    moved = []
    for step in range(1, STEPS + 1):
        before = run.masks()
        run.step(step)
        if not same(before, run.masks()):
            moved.append(step)
    assert moved and set(moved) <= set(range(INTERVAL, UNTIL, INTERVAL))
    assert moved[0] == INTERVAL


@pytest.mark.parametrize(("method", "storage"), IN_STORAGES)
def test_same_seed_same_run_another_seed_another_topology(method: str, storage: str):
    """Properties 18 and 45."""
    first, again = (Run("conv", method, storage=storage).go(1, 12) for _ in range(2))
    assert same(first.tensors(), again.tensors()) and same(first.masks(), again.masks())
    other = Run("conv", method, seed=1, storage=storage).go(1, 12)
    assert same(first.masks(), other.masks()) is not METHODS[method].draws


def saved(run: Run) -> io.BytesIO:
    file = io.BytesIO()
    parts = (run.model, run.optimizer, run.sparsifier)
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return file


def resumed(file: io.BytesIO, net: str, method: str, optimizer: str, storage: str = "masked") -> Run:
    model, state, sparse = torch.load(file, weights_only=True)
    run = Run(net, method, optimizer, seed=7, storage=storage)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(state)
    run.sparsifier.load_state_dict(sparse)
    return run


@pytest.mark.parametrize(("method", "optimizer", "storage"), PAIRS)
def test_resumed_run_equals_uninterrupted_to_the_bit(method: str, optimizer: str, storage: str):
    """Properties 14 and 21: at the start, right before and after updates, and between them."""
    run, last = Run("mlp", method, optimizer, storage=storage), 2 * INTERVAL + 1
    files: dict[int, io.BytesIO] = {}
    for step in range(last):
        if step in (0, INTERVAL - 1, INTERVAL, 2 * INTERVAL - 1):
            files[step] = saved(run)
        run.step(step + 1)
    for step, file in files.items():
        other = resumed(file, "mlp", method, optimizer, storage).go(step + 1, last)
        assert same(other.tensors(), run.tensors()), f"saved after step {step}"
        assert same(other.masks(), run.masks())
        assert (other.sparsifier.step, other.sparsifier.updates) == (run.sparsifier.step, run.sparsifier.updates)


@pytest.mark.parametrize(
    ("method", "storage", "step"),
    [*((m, "masked", 1) for m in FAMILIES), *((m, storage, UNTIL - 1) for m, storage in IN_STORAGES)],
)
def test_resumed_convolutional_run_ends_the_same(method: str, storage: str, step: int):
    """Property 14, with batch norm, to the end of a run."""
    run = Run("conv", method, "adam-amsgrad", storage=storage).go(1, step)
    other = resumed(saved(run), "conv", method, "adam-amsgrad", storage)
    assert same(run.go(step + 1, STEPS).tensors(), other.go(step + 1, STEPS).tensors())
    assert same(run.masks(), other.masks())


def others(run: Run) -> dict[str, Tensor]:
    """Parameters that are not sparsified, and buffers."""
    weights = {n for n, _ in run.weights}
    return {n: v.clone() for n, v in run.model.state_dict().items() if n not in weights}


@pytest.mark.parametrize("method", METHODS)
def test_biases_and_norms_are_never_masked(method: str):
    """Property 13: their gradients arrive in full and every entry of them trains."""
    run = Run("conv", method)
    before = others(run)
    assert set(run.sparsifier.topologies) == {n for n, _ in run.weights}
    run.go(1, 3)
    small = {n for n, p in run.model.named_parameters() if p.dim() == 1 and p.requires_grad}
    after = others(run)
    assert len(small) == 7
    for name in small - {"0.bias", "3.bias"}:
        trained = after[name] != before[name]
        assert trained.any() if METHODS[method].severs else trained.all(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rigl", "set-instead", "gmp-global"])
def test_an_update_instead_of_a_step_leaves_all_else_untouched(method: str, optimizer: str):
    """Property 24: other parameters, surviving values and state, and the optimizer's own step counts stay."""
    interval = 7 if method == "gmp-global" else INTERVAL
    run = Run("mlp", method, optimizer).go(1, interval - 1)
    before, old = run.tensors(), run.masks()
    run.step(interval)
    after, new = run.tensors(), run.masks()
    assert not same(old, new)
    weights = {n for n, _ in run.weights}
    for key, tensor in after.items():
        name = key.partition(":")[0]
        stays = old[name] & new[name] if name in weights and tensor.dim() else ...
        assert torch.equal(tensor[stays], before[key][stays]), key
    assert run.sparsifier.step == interval
    assert all(p.grad is not None and p.grad.any() for p in run.model.parameters())


@pytest.mark.parametrize("method", ["rigl", "set-instead", "snip"])
def test_a_step_of_an_update_instead_counts_for_the_clock_only(method: str):
    """Property 24: the optimizer has stepped once less for each."""
    run = Run("mlp", method, "adam").go(1, STEPS)
    skipped = 1 if method == "snip" else len(range(INTERVAL, UNTIL, INTERVAL))
    assert run.sparsifier.step == STEPS
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {STEPS - skipped}


FRACTIONS = {
    "set": lambda f, **more: methods.set_(DENSITY, until=9, interval=3, fraction=f, **more),
    "rigl": lambda f, **more: methods.rigl(DENSITY, until=9, interval=3, fraction=f, anneal=constant, **more),
    "snfs": lambda f, **more: methods.snfs(
        DENSITY, until=9, interval=3, fraction=f, anneal=constant, redistribute=None, **more
    ),
}
MORE_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **OPTIMIZERS,
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("optimizer", MORE_OPTIMIZERS)
@pytest.mark.parametrize(
    ("method", "regrow_dropped"), [*product(FRACTIONS, ["keep"]), ("rigl", "reset"), ("rigl", "forbid")]
)
def test_a_fraction_of_zero_changes_nothing(method: str, regrow_dropped: str, optimizer: str):
    """Property 2: an update that drops nothing leaves topology, weights and optimizer state bit-identical."""
    model = mlp()
    opt = MORE_OPTIMIZERS[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, FRACTIONS[method](0.0, timing="instead", regrow_dropped=regrow_dropped))
    for step in (1, 2, 3):
        before = copy.deepcopy([model.state_dict(), opt.state_dict(), sparsifier.topologies])
        train(model, opt, "mlp", step)
    assert sparsifier.updates == 1
    assert sparsifier.topologies == before[2]
    assert same(model.state_dict(), before[0])
    after = opt.state_dict()["state"]
    assert after.keys() == before[1]["state"].keys()
    assert all(same({k: torch.as_tensor(v) for k, v in after[i].items()}, before[1]["state"][i]) for i in after)


def test_lbfgs_keeps_its_history_when_nothing_is_dropped():
    """Property 2, for the optimizer whose history a rewire clears."""

    def losses(method: Any) -> list[float]:
        model = mlp()
        opt = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
        sparsify(model, opt, method)
        x, y = batch("mlp", 1)

        def closure() -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return [opt.step(closure).item() for _ in range(8)]

    kept = FRACTIONS["set"](0.0, timing="after", allocate=erk)
    assert losses(kept) == losses(methods.static(DENSITY))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "optimizer", "storage"),
    [
        *((method, "adamw-fused", storage) for method, storage in IN_STORAGES),
        *((method, "sgd", "masked") for method in FAMILIES),
    ],
)
def test_other_dtypes(method: str, optimizer: str, storage: str, dtype: torch.dtype):
    """Properties 1 and 9 in double precision and in bfloat16."""
    run = Run("mlp", method, optimizer, dtype=dtype, storage=storage)
    for step in range(1, UNTIL + 1):
        run.step(step)
        require_zero_outside(run)
    assert all(p.dtype == dtype for p in run.model.parameters())
    active, row = sum(run.counts().values()), METHODS[method]
    assert row.density is None or active == row.active(row.density, run.sparsifier.numel)


def test_dense_is_plain_training():
    """The dense method changes nothing about a run, whatever the optimizer."""
    for optimizer in OPTIMIZERS:
        run = Run("conv", "dense", optimizer).go(1, 5)
        model = conv()
        opt = OPTIMIZERS[optimizer](model.parameters())
        for step in range(1, 6):
            train(model, opt, "conv", step)
        assert same(run.model.state_dict(), model.state_dict())
