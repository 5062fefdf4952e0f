"""Compressed storage beside every kind of training loop: what it must keep, see, and leave alone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils import checkpoint

from regrow import Sparsifier, sparsify
from regrow.core.method import Method
from support import loops
from support.loops import Noisy
from support.pairs import Run, batch, held, loss_of, model_of, positions, require_inert_tails, tensors
from support.table import METHODS, OPTIMIZERS

BOTH = ("masked", "compressed")


def rigl(density: float = 0.3, **options: Any) -> Method:
    return loops.rigl(density, **options)


def set_(density: float = 0.3, **options: Any) -> Method:
    return loops.set_(density, **options)


@pytest.fixture
def frozen() -> Iterator[None]:
    """Leave what is there already out of `bytes_alive`, which then takes milliseconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def bytes_alive() -> int:
    """Of all tensors that Python knows."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def in_both(loop: Callable[[Run], object], make: Callable[[], Method] = rigl, *args: Any, **options: Any) -> list[Run]:
    """A masked and a compressed run after the same `loop`, which must have led them to the same place."""
    runs = [Run(storage, make(), *args, **options) for storage in BOTH]
    for run in runs:
        loop(run)
    assert runs[0].sparsifier.updates == runs[1].sparsifier.updates > 0
    runs[0].require_equal(runs[1])
    return runs


# What is held


ROOMY = ["snfs", "snfs-magnitude", "gmp", "gmp-global", "snip"]


WIDE: dict[str, Callable[[Any], Optimizer]] = {
    **{name: OPTIMIZERS[name] for name in ("nesterov", "adam-amsgrad", "adamw-fused")},
    "noisy": lambda p: Noisy(p, lr=0.1, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("optimizer", WIDE)
@pytest.mark.parametrize("method", ROOMY)
def test_the_room_beyond_the_active_entries_is_inert(method: str, optimizer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(OPTIMIZERS, "wide", WIDE[optimizer])
    run = Run("compressed", METHODS[method](), "linear", "wide")
    roomy = False
    for step in range(1, 27):
        run.step(step)
        require_inert_tails(run.model, run.optimizer)
        roomy |= any(run.model.get_parameter(n).numel() > at.numel() for n, at in positions(run.model).items())
    assert roomy
    assert all(tensor.isfinite().all() for _, _, tensor in held(run.model, run.optimizer))


def test_an_eps_of_zero_makes_no_nan_of_the_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(OPTIMIZERS, "wide", lambda p: torch.optim.Adam(p, lr=1e-3, eps=0))
    run = Run("compressed", METHODS["gmp"](), "linear", "wide", model=nn.Linear(12, 5).double())
    for step in range(1, 27):
        run.step(step)
        require_inert_tails(run.model, run.optimizer)
    assert run.sparsifier.nnz == 12 and run.model.weight.isfinite().all()


@pytest.mark.parametrize("method", ["rigl", "snfs", "set", "gmp"])
def test_a_parameter_stays_the_object_in_its_place_with_what_hangs_on_it(method: str):
    model = model_of("conv")
    before = dict(model.named_parameters())
    before["3.weight"].group = "late"
    seen: list[str] = []
    before["3.weight"].register_hook(lambda grad: seen.append("before"))
    before["3.weight"].register_post_accumulate_grad_hook(lambda parameter: seen.append("after"))
    run = Run("compressed", METHODS[method](), "conv", model=model)
    places = {n: (p, p.shape, p.data_ptr()) for n, p in run.model.named_parameters()}
    run.go(1, 10)
    assert run.sparsifier.updates == 2
    for name, parameter in run.model.named_parameters():
        assert parameter is before[name] and isinstance(parameter, nn.Parameter)
        assert places[name] == (parameter, parameter.shape, parameter.data_ptr())
    assert [p for g in run.optimizer.param_groups for p in g["params"]] == list(before.values())
    assert before["3.weight"].group == "late"
    assert seen == ["before", "after"] * 10


def test_masked_storage_may_have_been_there_before():
    model = model_of("linear")
    Run("masked", rigl(), model=model).sparsifier.remove()
    model.load_state_dict(model_of("linear").state_dict())
    Run("compressed", rigl(), model=model).go(1, 8).require_equal(Run("masked", rigl()).go(1, 8))


def test_memory_is_of_the_active_entries_alone():
    """Values, gradients and state, not views of something larger."""
    run = Run("compressed", rigl(0.1), "linear", "adam").go(1, 4)
    for name, at in positions(run.model).items():
        parameter = run.model.get_parameter(name)
        for tensor in (parameter, parameter.grad, *run.optimizer.state[parameter].values()):
            if tensor.dim():
                assert tensor.shape == (at.numel(),)
                assert tensor.untyped_storage().nbytes() == at.numel() * 8


@pytest.mark.parametrize("method", ["rigl", "snfs", "gmp"])
def test_norms_and_clipping_see_active_entries_only(method: str):
    """Also in the step of an update, with room to spare."""

    def norms(run: Run) -> list[Tensor]:
        found = []
        for step in range(1, 9):
            run.optimizer.zero_grad()
            run.backward(step)
            run.sparsifier.mask_gradients()
            found.append(nn.utils.clip_grad_norm_(run.model.parameters(), 0.1))
            run.optimizer.step()
            found += [p.detach().norm() for p in run.model.parameters()]
        return found

    expected, got = (norms(Run(s, METHODS[method](), "conv", "adamw")) for s in BOTH)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# Saving, loading, copying


def through_a_file(thing: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("net", ["linear", "conv", "gru", "attention"])
def test_a_state_dict_alone_brings_its_topology_into_another_sparse_model(net: str):
    run = Run("compressed", rigl(), net).go(1, 7)
    other = Run("compressed", rigl(), net, seed=5)
    before = other.sparsifier.topologies
    assert before != run.sparsifier.topologies
    other.model.load_state_dict(through_a_file(run.model.state_dict()))
    assert other.sparsifier.topologies == run.sparsifier.topologies != before
    x = batch(net, 0)[0]
    assert torch.equal(other.model.eval()(x), run.model.eval()(x))
    other.model.train()
    other.go(1, 7)
    assert other.sparsifier.updates == 2
    assert {n: t.nnz for n, t in other.sparsifier.topologies.items()} == {n: t.nnz for n, t in before.items()}


def test_a_state_with_more_entries_than_there_is_room_for_is_refused():
    run, other = Run("compressed", rigl(0.4)), Run("compressed", rigl(0.3))
    before = tensors(other.model)
    with pytest.raises(RuntimeError, match="room for"):
        other.model.load_state_dict(run.model.state_dict())
    assert {n for n, t in tensors(other.model).items() if not torch.equal(t, before[n])} <= {
        "0.bias:value",
        "2.bias:value",
    }


@pytest.mark.parametrize("lost", ["starts", "columns"])
def test_half_an_index_is_no_index(lost: str):
    """Read by itself it would send the kernels beyond the other half."""
    run, other = Run("compressed", rigl()).go(1, 7), Run("compressed", rigl(), seed=5)
    before = positions(other.model)
    state = run.model.state_dict()
    del state[f"2.weight_{lost}"]
    with pytest.raises(RuntimeError, match="belong together"):
        other.model.load_state_dict(state, strict=False)
    assert torch.equal(positions(other.model)["2.weight"], before["2.weight"])


def test_the_state_of_a_sparsifier_alone_brings_topologies_too():
    run, other = Run("compressed", rigl()).go(1, 7), Run("compressed", rigl(), seed=5)
    values = {n: p.detach().clone() for n, p in other.model.named_parameters()}
    other.sparsifier.load_state_dict(through_a_file(run.sparsifier.state_dict()))
    assert all(torch.equal(p, positions(run.model)[n]) for n, p in positions(other.model).items())
    assert all(torch.equal(p, values[n]) for n, p in other.model.named_parameters())


@pytest.mark.parametrize("method", ["rigl", "snfs", "gmp"])
@pytest.mark.parametrize("kind", ["deepcopy", "save"])
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.usefixtures("frozen")
def test_a_copied_model_is_a_plain_sparse_model(kind: str, method: str, at: int):
    """Also of the one whose coming step is an update."""
    run = Run("compressed", METHODS[method]()).go(1, at)
    twin = copy.deepcopy(run.model) if kind == "deepcopy" else through_a_file(run.model, weights_only=False)
    x = batch("linear", 9)[0]
    assert torch.equal(twin(x), run.model(x))
    before = tensors(run.model, run.optimizer)
    own = torch.optim.SGD(twin.parameters(), lr=0.1)
    own.zero_grad()
    held = bytes_alive()
    loss_of(twin, batch("linear", 2)).backward()
    own.step()
    own.zero_grad()
    assert bytes_alive() == held
    after = tensors(run.model, run.optimizer)
    assert all(torch.equal(t, before[n]) for n, t in after.items())
    alone = Run("compressed", METHODS[method]()).go(1, 6)
    run.go(at + 1, 6).require_equal(alone, 0)


def test_a_model_that_is_let_go_is_freed():
    run = Run("compressed", rigl()).go(1, 4)
    gone = weakref.ref(run.model), weakref.ref(run.optimizer), weakref.ref(run.sparsifier)
    del run
    gc.collect()
    assert [ref() is None for ref in gone] == [True, True, True]


def test_a_removed_sparsifier_leaves_a_sparse_model_that_trains_as_it_is():
    run = Run("compressed", rigl(interval=1)).go(1, 2)
    run.sparsifier.remove()
    at = positions(run.model)
    x, y = batch("linear", 0)
    for _ in range(30):
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
    assert all(torch.equal(p, at[n]) for n, p in positions(run.model).items())
    assert run.sparsifier.updates == 2 and loss < 0.8


# Loops


@pytest.mark.parametrize("net", ["linear", "conv", "gru"])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs", "set", "snip"])
def test_accumulation_equals_one_large_batch(method: str, net: str):
    runs = []
    for parts in (1, 4):
        run = Run("compressed", METHODS[method](), net, "adamw")
        for norm in (m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
        for step in range(1, 10):
            run.optimizer.zero_grad()
            x, y = batch(net, step)
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(run.model, (a, b)) / parts).backward()
            run.optimizer.step()
        runs.append(run)
    runs[0].require_equal(runs[1])


@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs"])
def test_accumulation_in_two_ways_is_that_of_masked_storage(method: str):
    """A loss that is a sum and two backward passes, of which the second reuses the graph of the first."""

    def loop(run: Run) -> None:
        for step in range(1, 9):
            run.optimizer.zero_grad()
            (loss_of(run.model, batch(run.net, step)) + loss_of(run.model, batch(run.net, step + 1))).backward()
            loss = loss_of(run.model, batch(run.net, step + 2))
            loss.backward(retain_graph=True)
            loss.backward()
            run.optimizer.step()

    in_both(loop, METHODS[method], "linear", "adamw")


@pytest.mark.parametrize("how", ["none", "zero", "each"])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs"])
def test_a_discarded_backward_leaves_no_trace(method: str, how: str):
    def discard(run: Run) -> None:
        if how == "each":
            for parameter in run.model.parameters():
                parameter.grad.zero_()
        else:
            run.optimizer.zero_grad(set_to_none=how == "none")

    def loop(run: Run) -> None:
        for step in range(1, 9):
            discard(run) if step > 1 else None
            for other in (50, 60):
                run.backward(other, 100.0)
                discard(run)
            run.backward(step)
            run.backward(step + 1)
            run.optimizer.step()

    in_both(loop, METHODS[method], "linear", "adamw")


def test_gradients_that_are_only_looked_at_leave_no_trace():
    """`torch.autograd.grad` puts nothing into `.grad`, so growth must not count what it computes."""

    def loop(run: Run) -> None:
        for step in range(1, 9):
            run.optimizer.zero_grad()
            run.backward(step)
            loss = loss_of(run.model, batch(run.net, 50)) * 100
            torch.autograd.grad(loss, list(run.model.parameters()))
            run.backward(step + 1)
            torch.autograd.grad(loss_of(run.model, batch(run.net, 51)) * 100, list(run.model.parameters()))
            run.optimizer.step()

    in_both(loop, rigl, "linear", "adamw")


def test_growth_sees_a_gradient_penalty():
    """A loss of gradients with respect to the input, as in Wasserstein GANs."""

    def loop(run: Run) -> None:
        for step in range(1, 9):
            run.optimizer.zero_grad()
            x, y = batch(run.net, step)
            x.requires_grad_()
            loss = loss_of(run.model, (x, y))
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + 100 * slope.square().sum()).backward()
            run.optimizer.step()

    in_both(loop, rigl, "linear", "adamw")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs", "set"])
def test_clipping_before_the_step_reaches_what_newcomers_start_with(method: str, optimizer: str):
    def loop(run: Run) -> None:
        for step in range(1, 9):
            run.optimizer.zero_grad()
            run.backward(step, 300.0)
            run.sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()

    in_both(loop, METHODS[method], "linear", optimizer)


def test_compressed_storage_needs_no_call_before_clipping():
    runs = []
    for masks in (False, True):
        run = Run("compressed", rigl(), "linear", "adamw")
        for step in range(1, 9):
            run.optimizer.zero_grad()
            run.backward(step, 300.0)
            if masks:
                run.sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
        runs.append(run)
    runs[0].require_equal(runs[1], 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sgd-fused", "adamw-fused"])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs", "set", "snip"])
def test_a_loss_scale_changes_nothing_and_an_overflow_does_not_count(method: str, optimizer: str):
    """The seventh loss overflows: that step is skipped, and the update that was due comes with the next one."""
    runs = []
    for storage, scale in (("masked", None), ("compressed", None), ("compressed", 1024.0)):
        run = Run(storage, METHODS[method](), "linear", optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0, growth_interval=3)
        for turn in (1, 2, 3, 4, 5, 6, 7, -1, 8, 9):
            if scale is None and turn < 0:
                continue
            run.optimizer.zero_grad()
            loss = loss_of(run.model, batch("linear", max(turn, 1))) * (torch.inf if turn < 0 else 1)
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()
        assert run.sparsifier.step == 9
        runs.append(run)
    runs[1].require_equal(runs[0])
    runs[2].require_equal(runs[0])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs", "gmp", "snip"])
def test_two_optimizers_make_one_step(method: str, order: int):
    runs = []
    for storage in BOTH:
        model = model_of("linear")
        adam = torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=0.01)
        opts = [torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9), adam]
        sparsifier = sparsify(model, opts, METHODS[method](), storage=storage, allow_dense=True)
        for step in range(1, 14):
            model.zero_grad()
            loss_of(model, batch("linear", step)).backward()
            for optimizer in opts[::order]:
                optimizer.step()
            assert sparsifier.step == step
            if storage == "compressed":
                require_inert_tails(model, *opts)
        runs.append((sparsifier.topologies, tensors(model, *opts)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-9, atol=1e-9)


SKIPPED = {name: METHODS[name] for name in ("rigl", "rigl-after", "set", "snfs")}
SKIPPED["always"] = lambda: rigl(interval=1, timing="after")


@pytest.mark.parametrize(
    ("method", "clips"), [*((name, False) for name in SKIPPED), ("rigl", True), ("rigl-after", True), ("set", True)]
)
def test_one_of_two_optimizers_may_skip_steps(method: str, clips: bool):
    """An update that waits for the other is done when the next step begins, with the gradients that it was due with.

    Newcomers have a gradient in that step already where the method reads it everywhere.
    """
    runs = []
    for storage in BOTH:
        model = model_of("linear")
        opts = [torch.optim.AdamW(model[i].parameters(), lr=0.01) for i in (0, 2)]
        sparsifier = sparsify(model, opts, SKIPPED[method](), storage=storage, allow_dense=True)
        for step in range(1, 25):
            model.zero_grad()
            (loss_of(model, batch("linear", step)) * 50).backward()
            if clips:
                sparsifier.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step not in (1, 2, 7):
                opts[0].step()
            if step % 2 == 0:
                opts[1].step()
            if storage == "compressed":
                require_inert_tails(model, *opts)
        assert sparsifier.updates >= 4
        runs.append((sparsifier.topologies, tensors(model, *opts)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("method", ["rigl-after", "set", "snfs", "gmp"])
def test_closures(method: str, evaluations: int, monkeypatch: pytest.MonkeyPatch):
    """Evaluated once, or twice by the optimizer: growth sees the last."""

    class Again(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(evaluations - 1):
                with torch.enable_grad():
                    closure()
            return super().step(closure)

    def closure_of(run: Run, step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            run.optimizer.zero_grad()
            loss = loss_of(run.model, batch("linear", step))
            loss.backward()
            return loss.detach()

        return closure

    def loop(run: Run) -> None:
        for step in range(1, 10):
            run.optimizer.step(closure_of(run, step))
        assert run.sparsifier.updates == 2

    monkeypatch.setitem(OPTIMIZERS, "again", lambda p: Again(p, lr=0.1, momentum=0.9))
    in_both(loop, METHODS[method], "linear", "again")


@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs", "set"])
def test_a_weight_that_is_frozen_on_the_way_stays(method: str, caplog: pytest.LogCaptureFixture):
    def loop(run: Run) -> None:
        run.go(1, 5)
        weight = run.model.get_parameter("0.weight")
        weight.requires_grad_(False)
        run.go(6, 9)
        weight.requires_grad_()
        run.go(10, 12)

    in_both(loop, METHODS[method])
    assert {r.getMessage() for r in caplog.records} == {
        "step 8: no gradient reached 0.weight: left as they are by the update"
    }


def test_weights_frozen_before_stay_dense():
    model = model_of("linear")
    model[0].weight.requires_grad_(False)
    run = Run("compressed", rigl(), model=model).go(1, 4)
    assert list(positions(model)) == ["2.weight"] and type(model[0]) is nn.Linear
    assert run.sparsifier.updates == 1


class Branches(nn.Module):
    """Three layers of which a forward uses those asked for, some of them several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.idle = nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(12, 5)
        self.path = "first"

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) if self.path == "first" else self.idle(x)
        for _ in range(3):
            y = self.again(y.tanh())
        return y


def branches() -> nn.Module:
    torch.manual_seed(1)
    return Branches().double()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs", "set"])
def test_a_layer_used_thrice_and_one_that_no_gradient_reaches(
    method: str, set_to_none: bool, caplog: pytest.LogCaptureFixture
):
    """Masked storage says the same of both, also of one whose gradient is there and zero."""
    runs = []
    for storage in BOTH:
        run = Run(storage, METHODS[method](), model=branches())
        before = run.sparsifier.topologies
        for step in range(1, 12):
            run.model.path = "idle" if step in (2, 8) else "first"
            run.optimizer.zero_grad(set_to_none=set_to_none)
            run.backward(step)
            run.optimizer.step()
        assert run.sparsifier.updates == 2
        assert run.sparsifier.topologies["again.weight"] != before["again.weight"]
        runs.append(run)
    runs[0].require_equal(runs[1])
    assert [r.getMessage() for r in caplog.records] == 2 * [
        "step 4: no gradient reached idle.weight: left as they are by the update",
        "step 8: no gradient reached first.weight: left as they are by the update",
    ]


@pytest.mark.parametrize("method", ["rigl", "snfs", "set"])
def test_tied_weights_stay_one_weight(method: str):
    def tied() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)).double()
        model[2].weight = model[0].weight
        return model

    runs = [Run(s, METHODS[method](), model=tied()).go(1, 9) for s in BOTH]
    runs[0].require_equal(runs[1])
    model = runs[1].model
    assert list(runs[1].sparsifier.topologies) == ["0.weight", "4.weight"]
    assert model[2].weight is model[0].weight
    assert model[0].topology() == model[2].topology() == runs[0].sparsifier.topologies["0.weight"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_activations_changes_nothing(reentrant: bool):
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](checkpoint.checkpoint(lambda y: self[1](self[0](y)), x, use_reentrant=reentrant))

    def loop(run: Run) -> None:
        for step in range(1, 9):
            x, y = batch("linear", step)
            for part in (slice(0, 6), slice(6, 12)):
                loss_of(run.model, (x[part].requires_grad_(reentrant), y[part])).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    model = model_of("linear")
    in_both(loop, rigl, "linear", "adamw")
    plain = Run("compressed", rigl(), model=model)
    other = Run("compressed", rigl(), model=Checkpointed(*model_of("linear")))
    loop(plain), loop(other)
    plain.require_equal(other)


def test_gradients_accumulate_as_exactly_as_the_parameter_does():
    """Under autocast each part of the gradient is rounded to bfloat16, their sum is not."""

    def one(storage: str) -> tuple[Sparsifier, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Linear(64, 48, bias=False)
        opt = torch.optim.AdamW(model.parameters(), lr=2**-9)
        sparsifier = sparsify(model, opt, rigl(interval=2), storage=storage)
        for step in (1, 2):
            opt.zero_grad()
            for part in range(8):
                draw = torch.Generator().manual_seed(10 * step + part)
                with torch.autocast("cpu", torch.bfloat16):
                    y = model(torch.eye(64))
                (y.float() * torch.randn(y.shape, generator=draw).bfloat16()).sum().backward()
            opt.step()
        return sparsifier, tensors(model, opt)

    (masked, expected), (compressed, found) = one("masked"), one("compressed")
    assert masked.topologies == compressed.topologies
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_trains(dtype: torch.dtype):
    run = Run("compressed", rigl(0.5, interval=10, until=100), "linear", "adamw", dtype)
    losses = []
    for step in range(1, 121):
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(run.model, batch("linear", step % 4, dtype))
        loss.backward()
        run.optimizer.step()
        losses.append(loss.item())
    assert run.sparsifier.updates == 9
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


# Updates and the bytes that they keep


@pytest.mark.usefixtures("frozen")
def test_nothing_is_kept_between_updates():
    """An update's step holds inputs and output gradients of both layers, at 12 examples; the others nothing of them."""
    run = Run("compressed", rigl()).go(1, 3)
    run.optimizer.zero_grad()
    between, extra = bytes_alive(), {}
    for step in range(4, 10):
        run.backward(step)
        gradients = sum(p.grad.nbytes for p in run.model.parameters())
        extra[step] = bytes_alive() - between - gradients
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert bytes_alive() == between
    assert extra == {step: 0 if step % 3 else 12 * (12 + 24 + 24 + 5) * 8 for step in range(4, 10)}


@pytest.mark.parametrize("twice", [False, True])
def test_too_much_for_an_update_stops_the_run_and_a_smaller_batch_goes_on(twice: bool):
    """12 examples need 12 x (12 + 24 + 24 + 5) numbers of 8 bytes; each layer may run once or twice in a forward."""
    need = 12 * (12 + 24 + 24 + 5) * 8
    run = Run("compressed", rigl(), update_memory=need - 1)
    calm = Run("compressed", rigl(), update_memory=need)
    run.go(1, 2), calm.go(1, 2)
    x, y = batch("linear", 3)
    parts = [x[:6], x[6:]] if twice else [x]
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=rf"{need:,} bytes .* limit of {need - 1:,}: raise update_memory="):
        F.cross_entropy(torch.cat([run.model(part) for part in parts]), y).backward()
    for other in (run, calm):
        other.optimizer.zero_grad()
        loss_of(other.model, (x[:11], y[:11])).backward()
        other.optimizer.step()
        assert other.sparsifier.updates == 1
        other.go(4, 5)
    run.require_equal(calm, 0)


def test_a_batch_that_fails_in_the_middle_of_a_backward_leaves_no_trace():
    runs = []
    for stumble in (False, True):
        run = Run("compressed", rigl(interval=1), model=branches())
        if stumble:
            x, y = batch("linear", 50)
            h = run.model.first(x)
            h.register_hook(lambda grad: 1 / 0)
            out = run.model.again(run.model.again(h).tanh()) + run.model.idle(x)
            with pytest.raises(ZeroDivisionError):
                (F.cross_entropy(out, y) * 100).backward()
            run.optimizer.zero_grad()
        runs.append(run.go(1, 3))
    runs[0].require_equal(runs[1], 0)


def test_gradients_that_are_not_finite_stop_an_update_and_change_nothing():
    run = Run("compressed", rigl(interval=3), "linear", "adam").go(1, 2)
    for value in (torch.inf, torch.nan):
        run.optimizer.zero_grad()
        run.backward(3)
        before = tensors(run.model, run.optimizer), run.sparsifier.topologies
        run.model[2].weight.grad[:2] = value
        with pytest.raises(ValueError, match=r"2\.weight: 2 of 54 gradients are not finite"):
            run.optimizer.step()
        run.optimizer.zero_grad()
        run.backward(3)
        after = tensors(run.model, run.optimizer)
        assert all(torch.equal(t, before[0][n]) for n, t in after.items())
        assert (run.sparsifier.topologies, run.sparsifier.step) == (before[1], 2)
    run.go(3, 4)
    assert run.sparsifier.updates == 1


def test_a_gradient_that_is_infinite_at_an_inactive_entry_alone_stops_the_update_too():
    model = nn.Linear(4, 3, bias=False).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, rigl(0.5, interval=1, fraction=1.0), storage="compressed")
    before = sparsifier.topologies["weight"]
    idle = int((~before.mask).any(0).nonzero()[0])
    x = torch.ones(2, 4, dtype=torch.float64)
    x[0, idle], x[1, idle] = 1e308, 1e308
    active = before.mask[:, idle]
    weight = torch.where(active, 0.0, 10.0).double()
    (model(x) * weight).sum().backward()
    with pytest.raises(ValueError, match="growth scores are not finite"):
        opt.step()
    assert sparsifier.topologies["weight"] == before
