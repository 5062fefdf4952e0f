"""Weights computed from latent values: what the model holds when, and how the optimizer gets at what it steps."""

from __future__ import annotations

import copy
import io
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow import methods, sparsify
from regrow.core.method import Latent, Method, Need
from regrow.parts.starts import dense
from support.loops import same
from support.pairs import Run, batch, loss_of, model_of
from support.table import METHODS, OPTIMIZERS

LEARNED = [name for name, row in METHODS.items() if row.make().latent is not None]
NOISY = ["l0", "variational_dropout"]
TRAINING = ["str", "movement", "soft_movement", *NOISY]
"""Methods that train something beside the latent values."""


class Case(Run):
    """A run in masked storage, of a method of the table or any other."""

    def __init__(
        self,
        method: str | Method,
        optimizer: str = "sgd",
        net: str = "linear",
        dtype: torch.dtype = torch.float64,
        storage: Any = "masked",
        **options: Any,
    ) -> None:
        recipe = METHODS[method]() if isinstance(method, str) else method
        super().__init__(storage, recipe, net, optimizer, dtype, **options)

    @property
    def sparse(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if id(p) in self.sparsifier.names}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.everything())

    def everything(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.model.state_dict().items():
            yield name, value.clone()
        for weight in self.sparsifier.weights:
            for key, value in weight.state.items():
                yield f"{weight.name}:{key}", value.clone()
        for i, group in enumerate(self.optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    yield f"{i}:{j}:{key}", torch.as_tensor(value).clone()


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance, msg=key)


def latents(case: Case) -> dict[str, Tensor]:
    return {w.name: w.state["latent"].clone() for w in case.sparsifier.weights}


# What the model holds


@pytest.mark.parametrize("net", ["conv", "gru", "attention"])
@pytest.mark.parametrize("method", LEARNED)
def test_between_steps_the_model_holds_the_weight_and_its_gradient(method: str, net: str):
    """Property 9, packed weights included; the gradient that a user sees is that of the weight, the same tensor."""
    if method == "sr_ste-pattern" and net != "conv":
        pytest.skip("inputs of 7 do not come in pairs")
    case = Case(method, net=net)
    for step in range(1, 6):
        case.optimizer.zero_grad()
        case.backward(step)
        seen = {n: (p.grad, p.grad.clone()) for n, p in case.sparse.items()}
        case.optimizer.step()
        active: dict[str, list[Tensor]] = {}
        for name, topology in case.sparsifier.topologies.items():
            active.setdefault(name.partition("[")[0], []).append(topology.mask)
        for name, parameter in case.sparse.items():
            assert parameter.grad is seen[name][0]
            mask = torch.cat(active[name])
            assert not parameter.detach()[~mask].any()
            if method.startswith(("top_kast", "str")) or step > 1:
                continue
            assert torch.equal(parameter.grad, seen[name][1])
    values = {w.name: w.values() for w in case.sparsifier.weights}
    for name, topology in case.sparsifier.topologies.items():
        parameter, block = case.sparse[name.partition("[")[0]], name.partition("[")[2].rstrip("]")
        rows = parameter.chunk(len(active[name.partition("[")[0]]))[int(block or 0)]
        assert torch.equal(values[name], rows.reshape(-1)[topology.indices])


def test_each_block_of_a_packed_weight_has_a_threshold_of_its_own():
    case = Case("str", net="attention").go(1, 4)
    thresholds = {w.name: float(w.state["threshold"]) for w in case.sparsifier.weights}
    assert len(thresholds) == 5 and len(set(thresholds.values())) == 5
    assert [len(g["params"]) for g in case.optimizer.param_groups[1:]] == [5]


def test_channels_last_weights_train_as_others():
    runs = []
    for format_ in (torch.contiguous_format, torch.channels_last):
        case = Case.__new__(Case)
        case.net, case.dtype = "conv", torch.float64
        case.model = model_of("conv").to(memory_format=format_)
        case.optimizer = OPTIMIZERS["sgd"](case.model.parameters())
        case.sparsifier = sparsify(case.model, case.optimizer, METHODS["movement"]())
        runs.append(case.go(1, 9))
    assert runs[0].sparsifier.topologies == runs[1].sparsifier.topologies
    close(runs[0].tensors(), runs[1].tensors(), 1e-9)
    assert runs[1].sparse["0.weight"].is_contiguous(memory_format=torch.channels_last)


# Noise


def evaluated(case: Case) -> dict[str, Tensor]:
    """The weights that are to be evaluated, computed from state alone."""
    found = {}
    for weight in case.sparsifier.weights:
        latent = weight.state["latent"]
        if "log_alpha" in weight.state:
            found[weight.name] = latent * (weight.state["log_alpha"].sigmoid() * 1.2 - 0.1).clamp(0, 1)
        else:
            ratio = weight.state["log_variance"] - (latent**2 + 1e-8).log()
            found[weight.name] = latent * (ratio < 3)
    return found


def held(case: Case) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in case.sparse.items()}


@pytest.mark.parametrize("method", NOISY)
def test_training_sees_one_draw_a_step_and_evaluation_none(method: str):
    case = Case(method).go(1, 3)
    model, x = case.model, batch("linear", 9)[0]
    rest = held(case)
    close(rest, evaluated(case), 1e-12)
    first = model(x)
    drawn = held(case)
    assert not any(torch.equal(drawn[n], rest[n]) for n in rest)
    assert torch.equal(model(x), first)
    model.eval()
    judged = model(x)
    assert same(held(case), rest) and not torch.equal(judged, first)
    functional = torch.func.functional_call(model, evaluated(case), (x,))
    torch.testing.assert_close(judged, functional, rtol=1e-12, atol=1e-12)
    model.train()
    assert torch.equal(model(x), first)
    case.step(4)
    close(held(case), evaluated(case), 1e-12)
    model(x)
    assert not any(torch.equal(held(case)[n], drawn[n]) for n in rest)


@pytest.mark.parametrize("method", NOISY)
def test_what_is_saved_counted_and_exported_has_no_noise(method: str, tmp_path: Any):
    case = Case(method).go(1, 3)
    rest = held(case)
    case.backward(4)
    values = {w.name: w.values() for w in case.sparsifier.weights}
    state = case.model.state_dict()
    assert all(torch.equal(state[n], rest[n]) for n in rest)
    assert all(torch.equal(values[n], rest[n].view(-1)[t.indices]) for n, t in case.sparsifier.topologies.items())
    case.model(batch("linear", 9)[0])
    regrow.save(case.sparsifier, tmp_path / "model.safetensors")
    loaded = model_of("linear")
    regrow.load(tmp_path / "model.safetensors", loaded)
    assert all(torch.equal(dict(loaded.named_parameters())[n], rest[n]) for n in rest)


@pytest.mark.parametrize("method", NOISY)
def test_looking_at_the_model_changes_no_run(method: str):
    """Evaluating between forward and step, saving, and training forwards without a step leave the run as it is."""
    plain, watched = Case(method), Case(method)
    for step in range(1, 6):
        plain.step(step)
        with torch.inference_mode():
            watched.model(batch("linear", 99)[0])
        watched.optimizer.zero_grad()
        watched.backward(step)
        watched.model.eval()
        with torch.inference_mode():
            watched.model(batch("linear", 98)[0])
        watched.model.train()
        with torch.inference_mode():
            watched.model(batch("linear", 98)[0])
        watched.model.state_dict()
        watched.optimizer.step()
    assert same(plain.tensors(), watched.tensors())


@pytest.mark.parametrize("method", NOISY)
def test_micro_batches_of_a_step_share_its_draw(method: str):
    """Property 44: two halves accumulated are one batch."""
    whole, halves = Case(method), Case(method)
    for step in range(1, 5):
        whole.step(step)
        x, y = batch("linear", step)
        halves.optimizer.zero_grad()
        for part in (slice(6), slice(6, 12)):
            (loss_of(halves.model, (x[part], y[part])) / 2).backward()
        halves.optimizer.step()
    close(whole.tensors(), halves.tensors(), 1e-9)


@pytest.mark.parametrize("method", NOISY)
def test_a_model_trained_in_evaluation_mode_is_trained_without_noise(method: str):
    """The gradient goes back through the map that made the weights it was taken at."""
    case = Case(method, optimizer="sgd")
    case.model.eval()
    weight = case.sparsifier.weights[0]
    key = "log_alpha" if method == "l0" else "log_variance"
    leaves = [weight.state["latent"].clone().requires_grad_(), weight.state[key].clone().requires_grad_()]
    case.backward(1)
    given = case.sparse[weight.name].grad
    if method == "l0":
        made = leaves[0] * (leaves[1].sigmoid() * 1.2 - 0.1).clamp(0, 1)
        cost = 0.005 * (leaves[1] - 2 / 3 * torch.tensor(1 / 11).double().log()).sigmoid().sum()
        wanted = torch.autograd.grad((made * given).sum() + cost, leaves)[0]
    else:
        ratio = (leaves[1] - (leaves[0] ** 2 + 1e-8).log()).clamp(-8, 8)
        divergence = 0.63576 * (1 - (1.8732 + 1.48695 * ratio).sigmoid()) + (1 + (-ratio).exp()).log() / 2
        wanted = torch.autograd.grad((leaves[0] * given).sum() + 0.05 * divergence.sum(), leaves)[0]
    case.optimizer.step()
    moved = (leaves[0].detach() - weight.state["latent"]) / 0.05
    torch.testing.assert_close(moved, wanted + 1e-3 * leaves[0].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", NOISY)
def test_a_copied_or_pickled_model_is_an_ordinary_one(method: str):
    case = Case(method).go(1, 2)
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    for other in (copy.deepcopy(case.model), torch.load(file, weights_only=False)):
        before = {n: v.clone() for n, v in other.state_dict().items()}
        mine = held(case)
        other(batch("linear", 5)[0])
        assert same(dict(other.state_dict()), before) and same(held(case), mine)


@pytest.mark.parametrize("method", NOISY)
def test_a_compiled_model_sees_what_the_plain_one_sees(method: str):
    plain, other = Case(method), Case(method)
    compiled = torch.compile(other.model, backend="eager")
    for step in range(1, 4):
        plain.step(step)
        other.optimizer.zero_grad()
        loss_of(compiled, batch("linear", step)).backward()
        other.optimizer.step()
    assert same(plain.tensors(), other.tensors())
    plain.model.eval()
    compiled.eval()
    assert torch.equal(plain.model(batch("linear", 7)[0]), compiled(batch("linear", 7)[0]))


def test_an_autocast_context_sees_evaluation_and_training():
    case = Case("variational_dropout", dtype=torch.float32)
    x = batch("linear", 1, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        noisy = case.model(x)
        case.model.eval()
        within = case.model(x)
    with torch.autocast("cpu", torch.bfloat16):
        alone = case.model(x)
    assert torch.equal(within, alone) and not torch.equal(noisy, within)


def test_the_hooks_of_a_model_keep_no_sparsifier_alive():
    case = Case("l0")
    model, gone = case.model, weakref.ref(case.sparsifier)
    case.sparsifier.remove()
    del case
    model(batch("linear", 1)[0])
    assert gone() is None


# What the optimizer steps


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sgd-fused", "adamw-fused"])
@pytest.mark.parametrize("method", ["dnw", "top_kast", "sr_ste", *TRAINING])
def test_a_loss_scale_changes_nothing(method: str, optimizer: str):
    """Property 26: neither what the loss contributes nor what a penalty does, also where the optimizer unscales."""
    runs = []
    for scale in (None, 1024.0):
        case = Case(method, optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for step in range(1, 8):
            case.optimizer.zero_grad()
            scaler.scale(loss_of(case.model, batch("linear", step))).backward()
            scaler.step(case.optimizer)
            scaler.update()
        runs.append(case)
    assert runs[0].sparsifier.topologies == runs[1].sparsifier.topologies
    close(runs[0].tensors(), runs[1].tensors(), 1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-fused", "adamw-fused"])
@pytest.mark.parametrize("method", ["dnw", "top_kast", *TRAINING])
def test_a_step_that_a_scaler_skips_changes_nothing(method: str, optimizer: str):
    case, plain = Case(method, optimizer), Case(method, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(1, 5):
        plain.step(step)
        # Torch's fused SGD leaves its momentum uninitialized where it skips the very first step.
        for factor in (float("inf"), 1.0) if step > 1 else (1.0,):
            before = case.tensors()
            case.optimizer.zero_grad()
            scaler.scale(loss_of(case.model, batch("linear", step)) * factor).backward()
            scaler.step(case.optimizer)
            scaler.update()
            if factor != 1:
                assert same(case.tensors(), before)
        assert case.sparsifier.step == step
    close(plain.tensors(), case.tensors(), 1e-7)


@pytest.mark.parametrize("method", ["dnw", "l0"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(method: str):
    case = Case(method).go(1, 2)
    before = case.tensors()
    case.optimizer.zero_grad()
    (loss_of(case.model, batch("linear", 3)) * float("inf")).backward()
    with pytest.raises(ValueError, match=r"0\.weight: 288 of 288 gradients are not finite at an update"):
        case.optimizer.step()
    assert same(case.tensors(), before)
    case.step(3)
    assert case.sparsifier.step == 3


def test_a_closure_is_refused():
    for optimizer in (lambda p: torch.optim.SGD(p, lr=0.1), torch.optim.LBFGS):
        model = model_of("linear")
        opt = optimizer(model.parameters())
        sparsify(model, opt, METHODS["dnw"]())
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"^dnw puts latent values .* call loss\.backward\(\) before"):
            opt.step(lambda model=model: loss_of(model, batch("linear", 1)))
        assert same(dict(model.state_dict()), before)


@pytest.mark.parametrize("method", ["dnw", *TRAINING])
def test_several_optimizers_do_what_one_does(method: str):
    one = Case(method).go(1, 6)
    model = model_of("linear")
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model[0], model[2])]
    sparsifier = sparsify(model, optimizers, METHODS[method]())
    for step in range(1, 7):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, batch("linear", step)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert sparsifier.topologies == one.sparsifier.topologies and sparsifier.step == 6
    close(dict(model.state_dict()), dict(one.model.state_dict()), 1e-12)


def test_a_weight_without_a_gradient_stays():
    case = Case("l0").go(1, 2)
    before = {w.name: {k: v.clone() for k, v in w.state.items()} for w in case.sparsifier.weights}
    case.model.zero_grad()
    case.model(batch("linear", 1)[0])
    case.model[2].weight.grad = torch.ones_like(case.model[2].weight)
    case.optimizer.step()
    first, second = case.sparsifier.weights
    assert same(first.state, before[first.name]) and not same(second.state, before[second.name])


@pytest.mark.parametrize(("method", "lr", "decay"), [("str", 0.3, 0.2), ("l0", 0.05, 0.0), ("movement", 0.05, 0.0)])
def test_what_is_trained_beside_has_a_group_of_its_own(method: str, lr: float, decay: float):
    """One for each group of the weights, with its options but for those that the recipe says."""
    model = model_of("linear")
    groups = [
        {"params": model[0].parameters(), "momentum": 0.5},
        {"params": model[2].parameters(), "lr": 0.01 if method == "str" else 0.05},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3)
    recipe = methods.str_(threshold_lr=0.3, threshold_weight_decay=0.2) if method == "str" else METHODS[method]()
    sparsifier = sparsify(model, optimizer, recipe)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2, 1, 1]
    for weight, group, momentum in zip(sparsifier.weights, optimizer.param_groups[2:], (0.5, 0.9), strict=True):
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (lr, decay, momentum)
        assert group["params"][0].shape == ((1,) if method == "str" else weight.shape)


def test_a_weight_decay_that_the_optimizer_lacks_is_refused_and_nothing_stays():
    model = model_of("linear")
    optimizer, other = torch.optim.Rprop(model[2].parameters()), torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert "weight_decay" not in optimizer.defaults
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Rprop has no weight decay, and 0.5 is asked for"):
        sparsify(model, [other, optimizer], methods.str_(threshold_weight_decay=0.5))
    assert len(optimizer.param_groups) == len(other.param_groups) == 1 and same(dict(model.state_dict()), before)
    sparsify(model, [other, optimizer], methods.l0())
    assert len(optimizer.param_groups) == len(other.param_groups) == 2


def test_a_scheduler_that_would_not_know_is_refused_and_a_later_one_works():
    model = model_of("linear")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.raises(ValueError, match=r"^l0: trains log_alpha beside the weights.* build it after regrow.sparsify"):
        sparsify(model, optimizer, methods.l0())
    assert len(optimizer.param_groups) == 1
    sparsify(model, optimizer, METHODS["dnw"]()).remove()

    case = Case("soft_movement")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(case.optimizer, 0.5)
    case.step(1)
    scheduler.step()
    assert [g["lr"] for g in case.optimizer.param_groups] == [0.025, 0.025]
    case.sparsifier.harden()
    case.step(2)
    scheduler.step()
    assert [len(g["params"]) for g in case.optimizer.param_groups] == [4, 0]


def test_the_method_of_a_user_may_penalize_and_pull_as_it_likes():
    """A weight 3 v, with 10 sum(v) added to the loss: dL/dv = 3 G + 10."""
    latent = Latent(lambda parts: 3 * parts.latent, penalty=lambda parts, step: 10.0 * step * parts.latent.sum())
    case = Case(Method("mine", dense(), needs=Need.DENSE_VALUES, latent=latent), dtype=torch.float64)
    before = latents(case)
    assert all(torch.equal(3 * before[n], p.detach()) for n, p in case.sparse.items())
    case.backward(1)
    given = {n: p.grad.clone() for n, p in case.sparse.items()}
    case.optimizer.step()
    for name, value in latents(case).items():
        wanted = before[name] - 0.05 * (3 * given[name] + 10 + 1e-3 * before[name])
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


# Values from outside


def test_values_written_over_the_weight_are_refused():
    case = Case("dnw").go(1, 2)
    other = model_of("linear").state_dict()
    case.model.load_state_dict({n: v + 1 for n, v in other.items()})
    before = latents(case)
    with pytest.raises(ValueError, match=r"^0\.weight was written to from outside.*load or change weights before"):
        case.step(3)
    assert same(latents(case), before)


@pytest.mark.parametrize("method", ["dnw", "l0"])
def test_weights_that_come_back_as_they_were_are_no_change(method: str):
    """An average that is shown for a while and taken out again."""
    plain, other = Case(method).go(1, 4), Case(method).go(1, 2)
    kept = {n: v.clone() for n, v in other.model.state_dict().items()}
    other.model.load_state_dict({n: v * 0.5 for n, v in kept.items()})
    other.model.load_state_dict(kept)
    other.go(3, 4)
    assert same(plain.tensors(), other.tensors())


def test_a_weight_cannot_be_set():
    weight = Case("str").sparsifier.weights[0]
    with pytest.raises(ValueError, match=r"0\.weight is computed from latent values and cannot be set"):
        weight.set_values(weight.values())


@pytest.mark.parametrize("storage", ["compressed", {"0": "compressed"}])
@pytest.mark.parametrize("allow_dense", [False, True])
def test_compressed_storage_refuses_by_name(storage: Any, allow_dense: bool):
    with pytest.raises(ValueError, match=r'^dnw computes weights from values .* leave 0\.weight in storage="masked"'):
        Case("dnw", storage=storage, allow_dense=allow_dense)


def test_auto_takes_masked(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "regrow")
    case = Case("str", storage="auto", allow_dense=True, example=batch("linear", 1)[0])
    assert set(case.sparsifier.storages.values()) == {"masked"}
    assert "0.weight: masked, since str holds a value at every position during training" in caplog.messages


def test_what_does_not_go_with_latent_values_is_refused():
    with pytest.raises(ValueError, match=r'^dnw trains values at every position.*leave out init="fan_in"'):
        Case("dnw", init="fan_in")
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"on the meta device.*build the model on a real device$"):
        sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), METHODS["dnw"]())


# The end of a method


@pytest.mark.parametrize("method", LEARNED)
def test_remove_leaves_the_weights_that_are_evaluated(method: str):
    case = Case(method).go(1, 4)
    rest = {n: v.clone() for n, v in case.model.state_dict().items()}
    case.model(batch("linear", 5)[0])
    case.sparsifier.remove()
    assert same(dict(case.model.state_dict()), rest)
    assert len(case.optimizer.param_groups) == 1
    assert set(case.optimizer.state) <= set(case.model.parameters())
    case.step(5)
    assert all(bool((p != 0).all()) for p in case.sparse.values())
    sparsify(case.model, case.optimizer, METHODS[method]())


@pytest.mark.parametrize("optimizer", ["sgd", "adam-amsgrad", "adamw-fused"])
@pytest.mark.parametrize("method", LEARNED)
def test_a_hardened_run_trains_on_as_an_ordinary_sparse_one(method: str, optimizer: str):
    case = Case(method, optimizer).go(1, 5)
    rest, active = {n: v.clone() for n, v in case.model.state_dict().items()}, dict(case.sparsifier.topologies)
    state = {n: {k: v.clone() for k, v in case.optimizer.state[p].items() if v.dim()} for n, p in case.sparse.items()}
    case.backward(6)
    case.sparsifier.harden()
    assert same(dict(case.model.state_dict()), rest) and len(case.optimizer.param_groups) == 1
    assert not any(w.state for w in case.sparsifier.weights) and not case.model._forward_pre_hooks
    assert set(case.optimizer.state) <= set(case.model.parameters())
    for name, parameter in case.sparse.items():
        mask = active[name].mask
        assert not parameter.grad[~mask].any()
        for key, tensor in state[name].items():
            assert torch.equal(case.optimizer.state[parameter][key], tensor * mask), key

    twin = nn.Sequential(*copy.deepcopy(list(case.model)))
    other = OPTIMIZERS[optimizer](twin.parameters())
    other.load_state_dict(copy.deepcopy(case.optimizer.state_dict()))
    for step in range(7, 12):
        case.step(step)
        other.zero_grad()
        loss_of(twin, batch("linear", step)).backward()
        for name, parameter in twin.named_parameters():
            if name in active:
                parameter.grad *= active[name].mask
        other.step()
        assert case.sparsifier.topologies == active
        for name, parameter in case.sparse.items():
            assert not parameter.detach()[~active[name].mask].any()
            assert (
                bool((parameter.detach()[active[name].mask] != rest[name][active[name].mask]).any())
                or not active[name].nnz
            )
    close(dict(case.model.state_dict()), dict(twin.state_dict()), 1e-9)
    with pytest.raises(ValueError, match="hardened trains the weights themselves"):
        case.sparsifier.harden()


@pytest.mark.parametrize("method", ["dnw", "l0"])
def test_a_hardened_run_resumes_to_the_bit(method: str):
    case = Case(method).go(1, 4)
    case.sparsifier.harden()
    case.go(5, 6)
    parts = copy.deepcopy([p.state_dict() for p in (case.model, case.optimizer, case.sparsifier)])
    other = Case(method)
    with pytest.raises(ValueError, match=f"is of method {method} hardened"):
        other.sparsifier.load_state_dict(parts[2])
    other.sparsifier.harden()
    for part, state in zip((other.model, other.optimizer, other.sparsifier), parts, strict=True):
        part.load_state_dict(state)
    assert same(case.go(7, 9).tensors(), other.go(7, 9).tensors())
    assert case.sparsifier.topologies == other.sparsifier.topologies and other.sparsifier.step == 9


def test_only_latent_values_can_be_hardened():
    case = Case("rigl")
    with pytest.raises(ValueError, match=r"^rigl trains the weights themselves, so that there is nothing to harden"):
        case.sparsifier.harden()


def test_a_hardened_run_keeps_its_record_of_explored_positions():
    method = methods.dnw(0.2)
    case = Case(method._replace(needs=method.needs | Need.EXPLORED)).go(1, 6)
    explored = case.sparsifier.explored
    assert explored is not None and explored > 0.2
    case.sparsifier.harden()
    assert case.go(7, 9).sparsifier.explored == explored
