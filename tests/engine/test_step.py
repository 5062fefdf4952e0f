"""The training step as a state machine: a test for every arrow of the table in `regrow.engine.step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import Sparsifier, methods, sparsify
from regrow.core.method import Method, Rule
from regrow.engine.step import plan, reads_everywhere
from regrow.nn import SparseModule
from support.loops import data, loss_of

STORAGES = ["masked", "compressed"]


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).double()


class Sometimes(nn.Module):
    """One of its two branches is used in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 10).double()
        self.branches = nn.ModuleList(nn.Linear(10, 4).double() for _ in range(2))
        self.used = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.used](torch.tanh(self.first(x)))


def backward(model: nn.Module, step: int, keep: bool = False) -> Tensor:
    if not keep:
        model.zero_grad()
    loss = loss_of(model, data(step))
    loss.backward()
    return loss


def rigl(timing: str = "after", interval: int = 2, until: int = 100) -> Method:
    return methods.rigl(0.4, until=until, interval=interval, timing=timing)  # type: ignore[arg-type]


def halves(model: nn.Sequential, **options: Any) -> tuple[torch.optim.SGD, torch.optim.SGD]:
    """An optimizer for the first layer, and one for the others."""
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9, **options)
    return first, torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1, momentum=0.9, **options)


def snapshot(sparsifier: Sparsifier) -> dict[str, set[int]]:
    return {name: set(t.indices.tolist()) for name, t in sparsifier.topologies.items()}


def is_open(sparsifier: Sparsifier) -> bool:
    return sparsifier._stepper.open is not None


def test_the_kind_of_a_step_follows_from_method_start_and_number() -> None:
    instead, after = rigl("instead", 3, 8), rigl("after", 3, 8)
    assert [plan(instead, True, n) for n in range(1, 9)] == [*["ordinary"] * 2, "instead"] * 2 + ["ordinary"] * 2
    assert [plan(after, True, n) for n in (3, 4)] == ["after", "ordinary"]
    assert [plan(methods.snip(0.5), started, 1) for started in (False, True)] == ["start", "ordinary"]


def test_what_reads_the_gradient_at_inactive_positions() -> None:
    snfs, set_ = methods.snfs(0.4, until=200), methods.set_(0.4, until=200)
    assert [reads_everywhere(m, "ordinary") for m in (snfs, rigl(), set_)] == [True, False, False]
    assert [reads_everywhere(m, "after") for m in (snfs, rigl(), set_)] == [True, True, False]
    assert reads_everywhere(set_, "start")


@pytest.mark.parametrize("storage", STORAGES)
def test_the_first_optimizer_opens_a_step_and_the_last_one_closes_it(storage: Any) -> None:
    model = mlp()
    optimizers = halves(model)
    sparsifier = sparsify(model, optimizers, rigl(), storage=storage)
    for step in (1, 2):
        backward(model, step)
        before = snapshot(sparsifier)
        assert (sparsifier.step, is_open(sparsifier)) == (step - 1, False)
        optimizers[0].step()
        assert (sparsifier.step, is_open(sparsifier), sparsifier.updates) == (step, True, 0)
        assert snapshot(sparsifier) == before
        optimizers[1].step()
        assert (sparsifier.step, is_open(sparsifier), sparsifier.updates) == (step, False, step // 2)
    assert all(snapshot(sparsifier)[name] != before[name] for name in before)


def test_a_gradient_is_given_back_when_its_own_optimizer_has_not_stepped() -> None:
    model = mlp()
    optimizers = halves(model)
    sparsifier = sparsify(model, optimizers, rigl("instead", 1))
    backward(model, 1)
    values = [p.detach().clone() for p in model.parameters()]
    biases = [model[i].bias.grad.clone() for i in (0, 2, 4)]
    optimizers[0].step()
    assert is_open(sparsifier) and sparsifier.updates == 1
    assert torch.equal(model[0].bias.grad, biases[0])
    optimizers[1].step()
    assert not is_open(sparsifier)
    for bias, layer in zip(biases, (0, 2, 4), strict=True):
        assert torch.equal(model[layer].bias.grad, bias)
        grad = model[layer].weight.grad
        assert not grad[~sparsifier.topologies[f"{layer}.weight"].mask].any()
    kept = [old == new for old, new in zip(values, model.parameters(), strict=True)]
    assert all(bool((same | (new == 0)).all()) for same, new in zip(kept, model.parameters(), strict=True))
    assert not any(optimizer.state for optimizer in optimizers)


@pytest.mark.parametrize("timing", ["instead", "after"])
def test_what_cannot_be_done_counts_nothing(timing: str) -> None:
    """A gradient that is not finite: the same step comes again, with the gradient of a new backward."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, rigl(timing, 1))
    backward(model, 1)
    before = snapshot(sparsifier)
    values = [p.detach().clone() for p in model.parameters()]
    model[2].weight.grad[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (0, 0, False)
    assert snapshot(sparsifier) == before
    assert all(torch.equal(old, new) for old, new in zip(values, model.parameters(), strict=True))
    backward(model, 1)
    optimizer.step()
    assert (sparsifier.step, sparsifier.updates) == (1, 1)
    fresh = mlp()
    other = torch.optim.SGD(fresh.parameters(), lr=0.1)
    twin = sparsify(fresh, other, rigl(timing, 1))
    backward(fresh, 1)
    other.step()
    assert snapshot(twin) == snapshot(sparsifier)


@pytest.mark.parametrize("storage", STORAGES)
def test_an_update_is_made_up_for_when_a_new_backward_comes_first(storage: Any) -> None:
    """As in adversarial training: the other optimizer never steps in this step."""
    model = mlp()
    optimizers = halves(model)
    sparsifier = sparsify(model, optimizers, rigl(interval=2), storage=storage)
    for step in (1, 2):
        backward(model, step)
        optimizers[0].step()
        assert sparsifier.step == step
    before = snapshot(sparsifier)
    ranked = {name: model.get_parameter(name).grad for name in before} if storage == "masked" else {}
    assert not any(g[~sparsifier.topologies[name].mask].any() for name, g in ranked.items())
    backward(model, 3)
    assert snapshot(sparsifier) == before and sparsifier.updates == 0
    optimizers[0].step()
    assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (3, 1, True)
    assert all(snapshot(sparsifier)[name] != before[name] for name in before)


def test_updates_made_up_for_read_the_gradient_of_their_own_step() -> None:
    """Every newcomer outranks, in the gradient of the step that the update belongs to, all that stayed inactive."""
    runs = []
    for storage in STORAGES:
        model = mlp()
        optimizers = halves(model)
        sparsifier = sparsify(model, optimizers, rigl(interval=2), storage=storage)  # type: ignore[arg-type]
        seen, ranked, grown = [snapshot(sparsifier)], {}, dict.fromkeys((3, 5, 7), 0)
        for step in range(1, 8):
            if storage == "masked" and step % 2 == 0:
                names = list(sparsifier.topologies)
                grads = torch.autograd.grad(loss_of(model, data(step)), [model.get_parameter(n) for n in names])
                ranked = {n: g.abs() for n, g in zip(names, grads, strict=True)}
            backward(model, step)
            optimizers[0].step()
            seen.append(snapshot(sparsifier))
            if storage == "masked" and step > 1 and step % 2:
                grown[step] = sum(newcomers_that_outrank(g, seen[-2][n], seen[-1][n]) for n, g in ranked.items())
        assert sparsifier.updates == 3
        assert all(grown.values()) or storage == "compressed"
        runs.append(seen)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("storage", STORAGES)
def test_what_only_an_abandoned_step_reached_is_not_reached(storage: Any) -> None:
    """A gradient of zeros is looked at by whether its own step's backward made it."""
    model = Sometimes()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.first, model.branches)]
    sparsifier = sparsify(model, optimizers, rigl("instead", 2), storage=storage)
    for step, used in ((1, 0), (2, 1)):
        model.used = used
        model.zero_grad(set_to_none=False)
        before = snapshot(sparsifier)
        loss_of(model, data(step)).backward()
        optimizers[0].step()
    changed = {name for name, active in snapshot(sparsifier).items() if active != before[name]}
    assert (sparsifier.step, sparsifier.updates) == (2, 1)
    assert changed == {"first.weight", "branches.1.weight"}


def test_an_optimizer_that_steps_again_begins_the_next_step() -> None:
    model = mlp()
    optimizers = halves(model)
    sparsifier = sparsify(model, optimizers, rigl(interval=50))
    backward(model, 1)
    optimizers[0].step()
    optimizers[0].step()
    assert (sparsifier.step, is_open(sparsifier)) == (2, True)
    optimizers[1].step()
    assert (sparsifier.step, is_open(sparsifier)) == (2, False)


class Failing(torch.optim.SGD):
    """Raises in the middle of its step when told to."""

    fails = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if self.fails:
            raise RuntimeError("broken")
        return super().step(closure)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("timing", ["instead", "after"])
def test_a_step_in_which_the_optimizer_raised_comes_again(timing: str, storage: Any, fails_at: int) -> None:
    """The run is the one in which nothing was raised: before, in, and after the step of an update."""
    runs = []
    for fails in (False, True):
        model = mlp()
        optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = sparsify(model, optimizer, rigl(timing, 2), storage=storage)
        for step in range(1, 7):
            if fails and step == fails_at and not (timing == "instead" and step == 2):
                optimizer.fails = True
                backward(model, 50)
                with pytest.raises(RuntimeError, match="broken"):
                    optimizer.step()
                optimizer.fails = False
            backward(model, step)
            optimizer.step()
            assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (step, step // 2, False)
        runs.append((sparsifier, [p.detach().clone() for p in model.parameters()]))
    assert snapshot(runs[0][0]) == snapshot(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_that_comes_again_with_the_same_gradient_reads_all_of_it(storage: Any) -> None:
    """Without a new backward: what was set aside is all that knows the gradient of inactive entries."""
    runs = []
    for fails in (False, True):
        model = mlp()
        optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = sparsify(model, optimizer, rigl(interval=2), storage=storage)
        for step in range(1, 5):
            backward(model, step)
            if fails:
                optimizer.fails = True
                with pytest.raises(RuntimeError, match="broken"):
                    optimizer.step()
                optimizer.fails = False
            optimizer.step()
            assert (sparsifier.step, sparsifier.updates) == (step, step // 2)
        runs.append((sparsifier, [p.detach().clone() for p in model.parameters()]))
    assert snapshot(runs[0][0]) == snapshot(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("storage", STORAGES)
def test_an_update_that_raises_is_over(storage: Any, optimizers: int) -> None:
    """The optimizers have stepped: the step counts, and training goes on without that update, until the next one."""

    def raises_once(weights: Any, step: int) -> None:
        if step == 2:
            raise RuntimeError("broken")

    method = rigl(interval=2)
    model = mlp()
    held = halves(model)
    sparsifier = sparsify(model, held, method._replace(update=(Rule(raises_once), *method.update)), storage=storage)
    for step in range(1, 6):
        backward(model, step)
        held[0].step()
        if optimizers == 2 and step == 2:
            with pytest.raises(RuntimeError, match="broken"):
                held[1].step()
        elif optimizers == 2:
            held[1].step()
        if optimizers == 1 and step == 2:
            backward(model, 50)
            with pytest.raises(RuntimeError, match="broken"):
                held[0].step()
        assert sparsifier.step == step
    assert sparsifier.updates == (3 if optimizers == 1 else 4)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_closure_that_raises_loses_no_update(storage: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, rigl(interval=2), storage=storage)

    def broken() -> Tensor:
        backward(model, 50)
        raise RuntimeError("broken")

    for step in range(1, 5):
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step(broken)
        optimizer.step(partial(backward, model, step))
        assert (sparsifier.step, sparsifier.updates) == (step, step // 2)


def test_a_step_that_one_of_two_optimizers_finished_counts() -> None:
    model = mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = Failing([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    sparsifier = sparsify(model, (first, second), rigl(interval=2))
    for step in (1, 2):
        backward(model, step)
        first.step()
        second.fails = True
        with pytest.raises(RuntimeError, match="broken"):
            second.step()
        assert sparsifier.step == step
    backward(model, 3)
    first.step()
    assert (sparsifier.step, sparsifier.updates) == (3, 1)


def test_gradients_hidden_when_an_optimizer_raised_come_back() -> None:
    model = mlp()
    optimizer = Failing(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, rigl("instead", 1))
    backward(model, 1)
    bias = model[0].bias.grad.clone()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert sparsifier.step == 2
    assert torch.equal(model[0].bias.grad, bias)


def test_a_gradient_that_came_since_is_not_replaced_by_a_hidden_one() -> None:
    model = mlp()
    optimizer = Failing(model.parameters(), lr=0.1)
    sparsify(model, optimizer, rigl("instead", 2))
    backward(model, 1)
    optimizer.step()
    backward(model, 2)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    optimizer.fails = False
    backward(model, 3)
    expected = model[0].bias.detach() - 0.1 * model[0].bias.grad
    optimizer.step()
    assert torch.equal(model[0].bias, expected)


def each_its_own(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    """An optimizer for every parameter."""
    optimizers: list[torch.optim.Optimizer] = []
    for parameter in model.parameters():
        optimizers.append(torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.01, **options))
    return optimizers


def step_inside(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    for parameter, optimizer in zip(model.parameters(), optimizers, strict=True):

        def hook(parameter: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("name", ["rigl", "snfs", "set"])
@pytest.mark.parametrize("storage", STORAGES)
def test_optimizers_that_step_inside_a_backward_share_one_step(storage: Any, name: str, hooked: str) -> None:
    """The same run as with optimizers that step after the backward: topologies, values and steps."""
    method = {
        "rigl": rigl(interval=2),
        "snfs": methods.snfs(0.4, until=100, interval=2),
        "set": methods.set_(0.4, until=100, interval=2),
    }[name]
    runs = []
    for inside in (False, True):
        model = mlp()
        optimizers = each_its_own(model)
        if inside and hooked == "before":
            step_inside(model, optimizers)
        sparsifier = sparsify(model, optimizers, method, storage=storage, allow_dense=True)
        if inside and hooked == "after":
            step_inside(model, optimizers)
        for step in range(1, 8):
            backward(model, step)
            if not inside:
                for optimizer in reversed(optimizers):
                    optimizer.step()
            assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (step, step // 2, False)
        runs.append((sparsifier, [p.detach().clone() for p in model.parameters()]))
    assert snapshot(runs[0][0]) == snapshot(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_inside_a_backward_ends_with_it(storage: Any) -> None:
    """Also when some optimizers hold what it does not reach: no update is lost, none reads another step's gradient."""
    runs = []
    for inside in (False, True):
        model = Sometimes()
        optimizers = each_its_own(model)
        sparsifier = sparsify(model, optimizers, rigl(interval=2), storage=storage)
        if inside:
            step_inside(model, optimizers)
        for step in range(1, 9):
            model.used = step % 3 % 2
            backward(model, step)
            if not inside:
                for optimizer in optimizers:
                    optimizer.step()
            assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (step, step // 2, False)
        runs.append((sparsifier, [p.detach().clone() for p in model.parameters()]))
    assert snapshot(runs[0][0]) == snapshot(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def newcomers_that_outrank(score: Tensor, before: set[int], after: set[int]) -> int:
    """How many entries grew, each of them ranked above everything that stayed inactive."""
    never = list(set(range(score.numel())) - before - after)
    assert all(score.view(-1)[i] >= max(score.view(-1)[never]) for i in after - before)
    return len(after - before)


def test_a_backward_that_broke_off_leaves_nothing_to_the_next() -> None:
    """Some optimizers have stepped in it and some not; what was held for its update is not read by the next one."""
    model = mlp()
    optimizers = each_its_own(model)
    sparsifier = sparsify(model, optimizers, rigl(interval=1))
    step_inside(model, optimizers)
    broken = [False]

    def breaks(grad: Tensor) -> None:
        if broken[0]:
            raise RuntimeError("broken")

    model[0].weight.register_hook(breaks)
    backward(model, 1)
    broken[0] = True
    with pytest.raises(RuntimeError, match="broken"):
        backward(model, 50)
    broken[0] = False
    before, names = snapshot(sparsifier), list(sparsifier.topologies)
    grads = torch.autograd.grad(loss_of(model, data(2)), [model.get_parameter(n) for n in names])
    backward(model, 2)
    after = snapshot(sparsifier)
    assert not is_open(sparsifier)
    assert all(newcomers_that_outrank(g.abs(), before[n], after[n]) for n, g in zip(names, grads, strict=True))


def test_an_update_in_place_of_a_step_inside_a_backward_is_refused() -> None:
    model = mlp()
    optimizers = each_its_own(model)
    sparsifier = sparsify(model, optimizers, rigl("instead", 1))
    step_inside(model, optimizers)
    with pytest.raises(ValueError, match='inside of the backward pass does not allow: pass timing="after"'):
        backward(model, 1)
    assert (sparsifier.step, is_open(sparsifier)) == (0, False)


class Nested(torch.optim.SGD):
    """Its step is one that torch wraps once more around its base's."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_a_nested_step_is_one() -> None:
    model = mlp()
    optimizer = Nested(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, rigl(interval=1))
    backward(model, 1)
    optimizer.step()
    assert (sparsifier.step, sparsifier.updates) == (1, 1)


def test_a_step_that_a_scaler_skips_inside_is_none() -> None:
    model = mlp().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    sparsifier = sparsify(model, optimizer, rigl(interval=1))
    before = snapshot(sparsifier)
    model.zero_grad()
    loss_of(model, data(1, dtype=torch.float32)).backward()
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert (sparsifier.step, is_open(sparsifier)) == (0, False)
    assert snapshot(sparsifier) == before


def test_loaded_optimizer_state_is_projected_at_the_next_step() -> None:
    dense = mlp()
    trained = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    backward(dense, 1)
    trained.step()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sparsify(model, optimizer, rigl(interval=50))
    backward(model, 1)
    optimizer.load_state_dict(trained.state_dict())
    held = [optimizer.state[p]["momentum_buffer"] for p in model.parameters() if p.dim() > 1]
    masks = [t.mask for t in sparsifier.topologies.values()]
    assert all(bool(buffer[~mask].any()) for buffer, mask in zip(held, masks, strict=True))
    optimizer.step()
    held = [optimizer.state[p]["momentum_buffer"] for p in model.parameters() if p.dim() > 1]
    assert not any(bool(buffer[~mask].any()) for buffer, mask in zip(held, masks, strict=True))


@pytest.mark.parametrize("storage", STORAGES)
def test_loading_the_state_of_a_sparsifier_ends_the_open_step(storage: Any) -> None:
    """What was set aside for its update is forgotten, and the next optimizer begins a step of its own."""
    model = mlp()
    optimizers = halves(model)
    sparsifier = sparsify(model, optimizers, rigl(interval=2), storage=storage)
    backward(model, 1)
    for optimizer in optimizers:
        optimizer.step()
    saved = sparsifier.state_dict()
    backward(model, 2)
    optimizers[0].step()
    assert is_open(sparsifier)
    sparsifier.load_state_dict(saved)
    assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (1, 0, False)
    before = snapshot(sparsifier)
    dense = [m.to_dense() if isinstance(m, SparseModule) else m for m in model]
    weights = [dense[i].weight for i in (0, 2, 4)]
    grads = torch.autograd.grad(loss_of(nn.Sequential(*dense), data(4)), weights)
    backward(model, 4)
    for optimizer in optimizers:
        optimizer.step()
    assert (sparsifier.step, sparsifier.updates) == (2, 1)
    after = snapshot(sparsifier)
    assert all(newcomers_that_outrank(g.abs(), before[n], after[n]) for n, g in zip(before, grads, strict=True))


class Twice(torch.optim.SGD):
    """Evaluates its closure twice, as line searches do."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        return super().step(closure)


@pytest.mark.parametrize("name", ["rigl", "snfs"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_with_a_closure_reads_its_last_gradient(storage: Any, name: str) -> None:
    method = rigl(interval=2) if name == "rigl" else methods.snfs(0.4, until=100, interval=2)
    runs = []
    for kind in (torch.optim.SGD, Twice):
        model = mlp()
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = sparsify(model, optimizer, method, storage=storage, allow_dense=True)
        for step in range(1, 6):
            if kind is Twice:
                optimizer.step(partial(backward, model, step))
            else:
                backward(model, step)
                optimizer.step()
            assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (step, step // 2, False)
        runs.append((sparsifier, [p.detach().clone() for p in model.parameters()]))
    assert snapshot(runs[0][0]) == snapshot(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_an_update_in_place_of_a_step_with_a_closure_reads_its_gradient() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, rigl("instead", 2))
    optimizer.step(lambda: backward(model, 1))
    before = sparsifier.topologies
    optimizer.step(lambda: backward(model, 2))
    assert (sparsifier.step, sparsifier.updates, is_open(sparsifier)) == (2, 1, False)
    assert sparsifier.topologies != before
