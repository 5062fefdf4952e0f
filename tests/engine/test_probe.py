"""Gradients, curvature and flow over batches: what they are, what they leave behind, and what they refuse."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import regrow
from regrow import methods
from regrow.core.topology import Topology
from regrow.engine.placement import Storage
from regrow.engine.probe import BatchProbe, mean_gradient
from support.ranks import as_rank, two_ranks

Batch = tuple[Tensor, Tensor]
Array = NDArray[Any]


def squares(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def batches(count: int, size: int = 4) -> list[Batch]:
    return [(torch.randn(size, 6), torch.randn(size, 3)) for _ in range(count)]


def doubles(count: int) -> list[Batch]:
    """Of different sizes: every batch has the same weight in the mean."""
    torch.manual_seed(7)
    return [(torch.randn(3 + i, 6).double(), torch.randn(3 + i, 3).double()) for i in range(count)]


def dense(*parameters: nn.Parameter) -> list[Topology]:
    return [Topology(tuple(p.shape)) for p in parameters]


def some(shape: tuple[int, ...], seed: int = 0) -> Topology:
    """About a third of a weight."""
    chosen = np.random.default_rng(seed).random(int(np.prod(shape))) < 0.35
    return Topology(shape, torch.from_numpy(np.flatnonzero(chosen)))


def test_the_mean_is_that_of_single_gradients_and_leaves_no_trace() -> None:
    model, data = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)), batches(3)
    model[0].weight.grad = torch.ones(5, 6)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    seed = torch.random.get_rng_state()
    with mean_gradient(model, [model[0].weight], data, squares):
        found = model[0].weight.grad
        assert model[1].num_batches_tracked == 3
    assert (model[0].weight.grad == 1).all() and model[3].weight.grad is None
    assert torch.equal(seed, torch.random.get_rng_state())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    expected = sum(torch.autograd.grad(squares(model, batch), model[0].weight)[0] for batch in data) / 3
    assert torch.allclose(found, expected)


def test_no_batch_is_an_error() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="batches= is empty"), mean_gradient(model, [model.weight], [], squares):
        pass
    probe = BatchProbe(model, [(model.weight, 1)], [], squares)
    for ask in QUESTIONS.values():
        with pytest.raises(ValueError, match="batches= is empty"):
            ask(probe, [model.weight])


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_batches_start_snip_the_same_in_either_storage(storage: Storage) -> None:
    model, data = nn.Linear(6, 3), batches(2)
    expected = sum(torch.autograd.grad(squares(model, batch), model.weight)[0] for batch in data)
    saliency = (expected * model.weight.detach()).abs().flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, methods.snip(0.5), storage=storage, batches=data, loss=squares)
    assert sparsifier.topologies["weight"].indices.tolist() == sorted(saliency.topk(9).indices.tolist())


@pytest.mark.parametrize("part", ["0", "1"])
@pytest.mark.parametrize("method", [methods.snip(0.5), methods.force(0.5)], ids=lambda m: m.name)
def test_a_model_without_values_is_refused_before_it_runs(method: Any, part: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    model.get_submodule(part).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"of the model's 7 tensors lie on the meta device.*\({part}\..*real device"):
        regrow.sparsify(model, optimizer, method, storage="compressed", batches=batches(1), loss=squares)


# A network of two layers by hand: y = V tanh(W x + b) + c, loss mean (y - t)^2.


def by_hand(p: dict[str, Array], x: Array, t: Array) -> dict[str, Array]:
    h = np.tanh(x @ p["0.weight"].T + p["0.bias"])
    dy = 2 * (h @ p["2.weight"].T + p["2.bias"] - t) / t.size
    dh = (dy @ p["2.weight"]) * (1 - h**2)
    return {"0.weight": dh.T @ x, "2.weight": dy.T @ h}


def mean_by_hand(p: dict[str, Array], data: list[Batch]) -> dict[str, Array]:
    each = [by_hand(p, x.numpy(), t.numpy()) for x, t in data]
    return {n: np.mean([g[n] for g in each], axis=0) for n in each[0]}


@pytest.fixture
def tanh() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def arrays(model: nn.Module) -> dict[str, Array]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_those_of_the_pruned_network_at_every_position(tanh: nn.Sequential, count: int) -> None:
    """Property 30: a network written out in NumPy, its weights zero outside the topologies that are asked about."""
    data, own = doubles(count), weights(tanh)
    probe = BatchProbe(tanh, [(p, 1) for p in own], data, squares)
    for topologies in (dense(*own), [some((5, 6)), some((3, 5), 1)], [Topology((5, 6)), some((3, 5), 2)]):
        p = arrays(tanh)
        for n, t in zip(("0.weight", "2.weight"), topologies, strict=True):
            p[n] = p[n] * t.mask.numpy()
        wanted = mean_by_hand(p, data)
        for found, n in zip(probe.gradients(topologies), wanted, strict=True):
            np.testing.assert_allclose(found.numpy(), wanted[n].ravel(), rtol=1e-12, atol=1e-15)


def test_curvature_is_the_difference_of_gradients(tanh: nn.Sequential) -> None:
    """Property 31: the Hessian-vector product, by central differences of gradients written out in NumPy."""
    data, own = doubles(3), weights(tanh)
    v = [torch.randn(p.numel()).double() for p in own]
    probe = BatchProbe(tanh, [(p, 1) for p in own], data, squares)
    p, h = arrays(tanh), 1e-5
    moved = []
    for sign in (h, -h):
        shift = {n: sign * u.numpy().reshape(p[n].shape) for n, u in zip(("0.weight", "2.weight"), v, strict=True)}
        moved.append(mean_by_hand({n: a + shift.get(n, 0) for n, a in p.items()}, data))
    for found, n in zip(probe.curvature(v), ("0.weight", "2.weight"), strict=True):
        wanted = (moved[0][n] - moved[1][n]).ravel() / (2 * h)
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-9)


def test_a_gradient_that_does_not_depend_on_the_weights_has_no_curvature() -> None:
    model = nn.Linear(6, 3, bias=False)
    probe = BatchProbe(model, [(model.weight, 1)], batches(2), lambda m, b: m(b[0]).sum())
    (found,) = probe.curvature([torch.ones(18)])
    assert found.shape == (18,) and not found.any()


class Attention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attend, self.need_weights = nn.MultiheadAttention(6, 2, batch_first=True), weights
        self.read = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (1, -1))
        return self.read(self.attend(x, x, x, need_weights=self.need_weights)[0]).squeeze(0)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.read = kind(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.cell(x)[0])


PACKED: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "attention": (lambda: Attention(True), {"attend.in_proj_weight": 3, "attend.out_proj.weight": 1, "read.weight": 1}),
    "fused attention": (lambda: Attention(False), {"attend.in_proj_weight": 3, "read.weight": 1}),
    "gru": (lambda: Recurrent(nn.GRU), {"cell.weight_ih_l0": 3, "cell.weight_hh_l0": 3, "read.weight": 1}),
    "lstm": (lambda: Recurrent(nn.LSTM), {"cell.weight_ih_l0": 4, "cell.weight_hh_l0": 4}),
}


def packed(kind: str, **changes: Any) -> tuple[nn.Module, list[tuple[nn.Parameter, int]], list[Topology]]:
    torch.manual_seed(3)
    make, blocks = PACKED[kind]
    model = make().double()
    own = [(model.get_parameter(n), b) for n, b in blocks.items()]
    shapes = [(p.shape[0] // b, p.shape[1]) for p, b in own for _ in range(b)]
    return model, own, [some(shape, i) for i, shape in enumerate(shapes)]


def pruned_copy(model: nn.Module, own: list[tuple[nn.Parameter, int]], topologies: list[Topology]) -> nn.Module:
    names = {id(p): n for n, p in model.named_parameters()}
    twin, rest = copy.deepcopy(model), iter(topologies)
    for p, blocks in own:
        mask = torch.cat([next(rest).mask for _ in range(blocks)])
        twin.get_parameter(names[id(p)]).data.mul_(mask)
    return twin


def cut(model: nn.Module, twin: nn.Module, own: list[tuple[nn.Parameter, int]], of: dict[str, Tensor]) -> list[Tensor]:
    """The tensors `of` the twin's parameters, block by block."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [part.flatten() for p, b in own for part in of[names[id(p)]].tensor_split(b)]


@pytest.mark.parametrize("kind", PACKED)
def test_blocks_of_a_packed_parameter_are_weights_of_their_own(kind: str) -> None:
    model, own, topologies = packed(kind)
    data = doubles(2)
    twin = pruned_copy(model, own, topologies)
    for batch in data:
        (squares(twin, batch) / 2).backward()
    wanted = cut(model, twin, own, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    found = BatchProbe(model, own, data, squares).gradients(topologies)
    assert len(found) == len(topologies)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", PACKED)
def test_curvature_of_packed_parameters(kind: str) -> None:
    """Property 31, also where attention is fused and has no second derivative of its own."""
    model, own, topologies = packed(kind)
    data = doubles(2)
    v = [torch.randn(t.numel).double() for t in topologies]
    names = {id(p): n for n, p in model.named_parameters()}
    sides = []
    for h in (1e-5, -1e-5):
        twin, rest = copy.deepcopy(model), iter(v)
        for p, b in own:
            twin.get_parameter(names[id(p)]).data += h * torch.cat([next(rest) for _ in range(b)]).view(p.shape)
        for batch in data:
            (squares(twin, batch) / 2).backward()
        sides.append(cut(model, twin, own, {n: p.grad for n, p in twin.named_parameters()}))
    for ours, plus, minus in zip(BatchProbe(model, own, data, squares).curvature(v), *sides, strict=True):
        torch.testing.assert_close(ours, (plus - minus) / 2e-5, rtol=1e-5, atol=1e-9)


# Flow: R = sum over outputs of the network of absolute values, for an input of ones.


def relu_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_flow_is_the_product_of_what_comes_in_and_what_goes_out(dtype: torch.dtype) -> None:
    model, data = relu_net(dtype), batches(2, size=4)
    own = [model[0].weight, model[3].weight]
    topologies = [some((5, 6)), some((3, 5), 1)]
    a, b, c = (np.abs(p.detach().double().numpy()) for p in (model[0].weight, model[0].bias, model[3].weight))
    a, c = a * topologies[0].mask.numpy(), c * topologies[1].mask.numpy()
    hidden = a.sum(1) + b
    wanted = 4 * np.outer(c.sum(0), np.ones(6)), 4 * np.outer(np.ones(3), hidden)
    probe = BatchProbe(model, [(p, 1) for p in own], data, squares)
    for found, expected in zip(probe.flow(topologies), wanted, strict=True):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected.ravel(), rtol=1e-12)


@pytest.mark.parametrize("kind", PACKED)
def test_flow_through_attention_and_recurrence(kind: str) -> None:
    """By differences of the network of absolute values; a recurrent module's list of its parameters is as before."""
    model, own, topologies = packed(kind)
    twin = pruned_copy(model, own, topologies).eval()
    for p in twin.parameters():
        p.data.abs_()
    names = {id(p): n for n, p in model.named_parameters()}
    found = iter(BatchProbe(model.float(), own, batches(1, 3), squares).flow(topologies))
    for p, blocks in own:
        flow = torch.cat([next(found) for _ in range(blocks)])
        values = twin.get_parameter(names[id(p)]).data.view(-1)
        for at in range(0, p.numel(), 5):
            old, sides = values[at].item(), []
            for h in (1e-5, -1e-5):
                values[at] = old + h
                with torch.no_grad():
                    sides.append(twin(torch.ones(3, 6).double()).sum().item())
            values[at] = old
            assert flow[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-6), (p.shape, at)
    for module in model.modules():
        listed = getattr(module, "_flat_weights", [])
        assert [id(p) for p in listed] == [id(p) for p in module.parameters()][: len(listed)]


def test_flow_reads_running_statistics_and_no_batch_ones() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    model[1].running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    probe = BatchProbe(model, [(model[0].weight, 1)], [torch.randn(1, 2, 3, 3)], lambda m, b: m(b).sum())
    (found,) = probe.flow([Topology((3, 2, 2, 2))])
    out = model[3].weight.detach().double().abs().sum(0).view(3, 4).sum(1)
    scale = out / (torch.tensor([1.0, 4.0, 9.0]).double() + 1e-5).sqrt()
    torch.testing.assert_close(found.view(3, 8), scale[:, None].expand(3, 8), rtol=1e-6, atol=0)


class Several(nn.Module):
    """Two inputs of which one says how much, a scalar beside the outputs, a tied weight and a loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, times: Tensor, *, x: Tensor) -> dict[str, Any]:
        y = self.b(self.a(x)) * times
        return {"loss": y.square().sum(), "out": (y[:, :2], y[:, 2:]), "index": torch.tensor([1])}


def test_flow_of_keywords_integers_several_outputs_and_tied_weights() -> None:
    model = Several().double()
    ask = lambda m, b: m(torch.tensor(3), x=b[0])["loss"]  # noqa: E731
    (found,) = BatchProbe(model, [(model.a.weight, 1)], doubles(1), ask).flow([Topology((6, 6))])
    w = model.a.weight.detach().abs()
    wanted = 9 * (w.sum(0)[:, None].expand(6, 6) + (w @ torch.ones(6, 6).double()).T.mean(0)[None, :].expand(6, 6))
    torch.testing.assert_close(found.view(6, 6), wanted)


class Twice(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.alias = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T @ self.alias.T


def test_flow_of_a_parameter_that_has_two_names() -> None:
    model = Twice()
    (found,) = BatchProbe(model, [(model.weight, 1)], batches(1, 1), squares).flow([Topology((6, 6))])
    w = model.weight.detach().double().abs()
    wanted = w.sum(0)[:, None].expand(6, 6) + w.sum(1)[None, :].expand(6, 6)
    torch.testing.assert_close(found.view(6, 6), wanted)
    assert model.alias is model.weight


def test_weights_may_share_their_gradient() -> None:
    """Where two are added autograd gives both the same tensor."""
    model, data = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]), batches(3)
    loss = lambda m, b: squares(lambda x: x @ (m[0].weight + m[1].weight).T, b)  # noqa: E731
    own = weights(model)
    wanted = sum(torch.autograd.grad(loss(model, b), own[0])[0] for b in data) / 3
    for found in BatchProbe(model, [(p, 1) for p in own], data, loss).gradients(dense(*own)):
        torch.testing.assert_close(found, wanted.flatten())


def test_flow_leaves_the_loss_at_the_model_and_reads_one_batch_once() -> None:
    model, read = relu_net(), []

    class Data:
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(batches(3)):
                read.append(number)
                yield batch

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        m(batch[0])
        raise AssertionError("the loss went on")

    probe = BatchProbe(model, [(model[0].weight, 1)], Data(), loss)
    first = probe.flow(dense(model[0].weight))
    assert torch.equal(first[0], probe.flow(dense(model[0].weight))[0])
    assert read == [0]


@pytest.mark.parametrize("question", ["gradients", "curvature", "flow"])
def test_a_compiled_model_is_asked_as_it_was_written(question: str) -> None:
    model, data = relu_net().eval(), batches(2)
    own = weights(model)
    twice = [
        QUESTIONS[question](BatchProbe(m, [(p, 1) for p in own], data, squares), own)
        for m in (model, torch.compile(model, backend="aot_eager"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


# What is left behind.

QUESTIONS: dict[str, Callable[[BatchProbe, list[nn.Parameter]], list[Tensor]]] = {
    "gradients": lambda probe, own: probe.gradients([some(tuple(p.shape), i) for i, p in enumerate(own)]),
    "curvature": lambda probe, own: probe.curvature([torch.ones(p.numel(), dtype=p.dtype) for p in own]),
    "flow": lambda probe, own: probe.flow([some(tuple(p.shape), i) for i, p in enumerate(own)]),
}


class Breaks(nn.Module):
    """Raises at one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise RuntimeError("broken")
        return x


def careless(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that changes whatever it can."""
    for module in model.modules():
        module.training = not module.training
    model[1].train()
    model[4].bias.requires_grad_(not model[4].bias.requires_grad)
    torch.randn(3)
    return squares(model, batch)


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("question", QUESTIONS)
def test_nothing_is_changed_by_asking_or_by_an_error(question: str, broken: int) -> None:
    """Property 30: values, gradients, buffers, modes, requires_grad, random state, hooks; all to the bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), Breaks(broken), nn.Linear(5, 3))
    model[2].eval()
    model[0].weight.grad = torch.ones(5, 6)
    model[0].bias.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([-0.0, 1e-42, 3.0])
    own, calls = weights(model), []
    for p in own:
        p.register_post_accumulate_grad_hook(calls.append)

    def everything() -> list[Any]:
        tensors = (*model.parameters(), *model.buffers())
        return [
            [id(t) for t in tensors],
            [t.detach().view(torch.int32 if t.element_size() == 4 else torch.int64).tolist() for t in tensors],
            [(id(p.grad), p.requires_grad) for p in model.parameters()],
            [m.training for m in model.modules()],
            [len(m._forward_pre_hooks) for m in model.modules()],
            torch.random.get_rng_state().tolist(),
            model[0].weight.grad.tolist(),
        ]

    before = everything()
    probe = BatchProbe(model, [(p, 1) for p in own], batches(3), careless)
    before[5] = torch.random.get_rng_state().tolist()
    if broken and not (question == "flow" and broken > 1):
        with pytest.raises(RuntimeError, match="broken"):
            QUESTIONS[question](probe, own)
    else:
        QUESTIONS[question](probe, own)
    assert everything() == before
    assert calls == []


@pytest.mark.parametrize("question", ["gradients", "curvature"])
def test_there_is_one_graph_at_a_time(question: str) -> None:
    """Memory does not grow with the number of batches."""
    model, alive = relu_net(), []

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        assert not [ref for ref in alive if ref() is not None]
        y = m(batch[0])
        alive.append(weakref.ref(y))
        return y.square().mean()

    own = weights(model)
    QUESTIONS[question](BatchProbe(model, [(p, 1) for p in own], batches(5), loss), own)
    assert len(alive) == 5


def test_every_question_draws_the_same_noise() -> None:
    """Dropout of the gradient and of its curvature is the same."""
    model = relu_net()
    own = weights(model)
    probe = BatchProbe(model, [(p, 1) for p in own], batches(2), squares)
    first, second = (probe.gradients(dense(*own)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_precision_is_summed_in_single() -> None:
    model = nn.Linear(2, 1, bias=False).bfloat16()
    data = [torch.tensor([[256.0, 1.0]]).bfloat16()] + [torch.tensor([[1.0, 1.0]]).bfloat16()] * 3
    probe = BatchProbe(model, [(model.weight, 1)], data, lambda m, b: m(b).sum())
    (found,) = probe.gradients(dense(model.weight))
    assert found.dtype == torch.float32
    assert found.tolist() == [259 / 4, 1]


# What is refused.


def test_an_iterator_is_refused() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"batches= is read several times here.*give a list"):
        BatchProbe(model, [(model.weight, 1)], iter(batches(2)), squares)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_result_that_is_not_finite_names_the_weight(question: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    own = weights(model)
    if question == "flow":
        model[0].weight.data[0, 0] = torch.inf
        model[2].weight.data.fill_(1)
    data = [tuple(torch.full((2, n), 1e200, dtype=torch.float64) for n in (6, 3))] if question != "flow" else batches(1)
    probe = BatchProbe(model, [(p, 1) for p in own], data, squares)
    ask = QUESTIONS[question] if question != "flow" else lambda probe, own: probe.flow(dense(*own))
    with pytest.raises(ValueError, match=r"^[02]\.weight: \d+ of (30|15) entries of the .* are not finite"):
        ask(probe, own)


def test_a_block_that_is_not_finite_is_named() -> None:
    model = nn.GRU(6, 2)
    model.bias_ih_l0.data[4] = torch.nan
    probe = BatchProbe(model, [(model.weight_ih_l0, 3)], batches(1), lambda m, b: m(b[0])[0][:, :1].nan_to_num(0).sum())
    with pytest.raises(ValueError, match=r"^weight_ih_l0\[\d\]: "):
        probe.gradients([Topology((2, 6))] * 3)


@pytest.mark.parametrize("question", ["gradients", "flow"])
def test_a_weight_that_nothing_reaches_is_named(question: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    model.add_module("idle", nn.Linear(4, 2))
    model.forward = model[0].forward
    own = weights(model)
    probe = BatchProbe(model, [(p, 1) for p in own], batches(1), squares)
    with pytest.raises(ValueError, match=r"^idle\.weight: no .* reaches it.*skip="):
        QUESTIONS[question](probe, own)


def test_inputs_without_ones_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 3))
    tokens = [(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 3))]
    probe = BatchProbe(model, [(model[2].weight, 1)], tokens, squares)
    with pytest.raises(ValueError, match="takes floating-point inputs, and loss= gives the model int64 tensors: token"):
        probe.flow(dense(model[2].weight))
    probe = BatchProbe(model, [(model[2].weight, 1)], tokens, lambda m, b: m[2].weight.sum())
    with pytest.raises(ValueError, match="loss= never calls the model"):
        probe.flow(dense(model[2].weight))
    assert not model._forward_pre_hooks


# Two ranks.


def answers(rank: int) -> dict[str, Any]:
    data = doubles(3)[rank::2]
    found: dict[str, Any] = {}
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        net = DistributedDataParallel(model) if wrapped else model
        own = weights(model)
        probe = BatchProbe(net, [(p, 1) for p in own], data, squares)
        found[f"{wrapped} gradients"] = probe.gradients([some((5, 6)), some((3, 5), 1)])
        found[f"{wrapped} curvature"] = probe.curvature([torch.ones(p.numel()).double() for p in own])
        found[f"{wrapped} flow"] = probe.flow(dense(*own))
        with mean_gradient(net, own, data, squares):
            found[f"{wrapped} mean"] = [p.grad.flatten().clone() for p in own]
        if wrapped:
            # Training goes on, with gradients that both ranks share.
            for _ in range(2):
                squares(net, data[0]).backward()
            found["trained"] = own[0].grad.clone()
    return found


def test_ranks_share_their_batches(tmp_path: Path) -> None:
    """Every rank gets the mean over the batches of all, of which the first has two and the second one."""
    ranks = two_ranks(__file__, tmp_path)
    assert torch.equal(ranks[0].pop("trained"), ranks[1].pop("trained"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    own = weights(model)
    probe = BatchProbe(model, [(p, 1) for p in own], doubles(3), squares)
    alone = {
        "gradients": probe.gradients([some((5, 6)), some((3, 5), 1)]),
        "curvature": probe.curvature([torch.ones(p.numel()).double() for p in own]),
        "flow": probe.flow(dense(*own)),
        "mean": probe.gradients(dense(*own)),
    }
    for key, found in ranks[0].items():
        # Their first batches have three and four examples, which add up in the flow.
        scale = 3.5 / 3 if "flow" in key else 1
        for ours, theirs, other in zip(found, ranks[1][key], alone[key.split()[1]], strict=True):
            assert torch.equal(ours, theirs), key
            torch.testing.assert_close(ours, scale * other, rtol=1e-10, atol=1e-12, msg=key)


if __name__ == "__main__":
    as_rank(answers)
