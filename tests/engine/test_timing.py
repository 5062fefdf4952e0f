"""Layers are timed side by side in rounds, as they are called in their model, and nothing of it is left behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from regrow.core.topology import Topology
from regrow.engine import timing
from regrow.engine.timing import (
    Call,
    CSRLinear,
    Race,
    alike,
    calls,
    compressed,
    interleave,
    masked,
    outputs,
    race,
    torch_sparse,
)
from support.twins import topology


class Clock:
    """What stands for `timeit.Timer`: a step takes as long as its name says, and all that runs is noted."""

    ran: list[tuple[str, int]]

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs, self.ran = costs, []

    def __call__(self, step: Callable[[], str]) -> Any:
        class Timer:
            @staticmethod
            def timeit(number: int) -> float:
                name = step()
                self.ran.append((name, number))
                return self.costs[name] * number

        return Timer


def test_rounds_rotate_and_short_steps_are_repeated(monkeypatch: pytest.MonkeyPatch):
    clock = Clock({"a": 0.25, "b": 0.003, "c": 1e-4})
    monkeypatch.setattr(timing, "Timer", clock)
    seconds = interleave({name: lambda name=name: name for name in "abc"}, rounds=7)
    assert seconds == {name: pytest.approx([cost] * 7) for name, cost in clock.costs.items()}
    repeats = {"a": 1, "b": 4, "c": 100}
    assert clock.ran[:6] == [(name, 1) for name in "aabbcc"]
    # Twice each: what is timed runs untimed directly before.
    order = [name for shift in range(7) for name in ("abc" * 2)[shift % 3 : shift % 3 + 3] for _ in range(2)]
    assert clock.ran[6:] == [(name, repeats[name]) for name in order]


def test_ratios_are_taken_round_by_round():
    result = Race({"dense": [1.0, 2.0, 30.0], "compressed": [0.5, 3.0, 3.0]})
    assert (result.time("dense"), result.time("compressed")) == (2.0, 3.0)
    assert result.ratio("compressed") == 0.5


# What a module is called with


class Net(nn.Module):
    """A shared layer that is called twice, an embedding, keywords, and a layer that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.idle = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.seen = self.seen + torch.rand(())
        y = self.drop(self.norm(self.first(x.view(-1, 6)))) * scale
        y = torch.cat([self.shared(y[:2]), self.shared(input=y)])
        mask = torch.zeros(len(y), len(y))
        return self.attention(y[None], y[None], value=y[None], attn_mask=mask, need_weights=False)[0]


def reached(example: Any, net: Net | None = None) -> tuple[Net, dict[nn.Module, Call]]:
    net = Net() if net is None else net
    return net, calls(net, example, [net.first, net.shared, net.idle, net.attention, net.attention.out_proj])


def test_modules_are_measured_with_what_reaches_them():
    net, found = reached(torch.randn(4, 3, 2))
    shapes = {m: tuple(call.args[0].shape) for m, call in found.items()}
    same = {net.attention: (1, 6, 8), net.attention.out_proj: (1, 6, 8)}
    assert shapes == {net.first: (4, 6), net.shared: (4, 8), **same}
    assert not found[net.shared].kwargs


@pytest.mark.parametrize("example", [(torch.ones(4, 6), 2.0), {"x": torch.ones(4, 6), "scale": 2.0}])
def test_an_example_may_be_several_arguments(example: Any):
    net, found = reached(example)
    once = reached(torch.ones(4, 6), net)[1]
    torch.testing.assert_close(found[net.shared].args[0], 2 * once[net.shared].args[0])


def test_gradients_go_where_they_go_in_training():
    net, found = reached(torch.randn(4, 3, 2))
    assert not found[net.first].args[0].requires_grad
    assert found[net.shared].args[0].requires_grad
    attention = arguments(net.attention, found[net.attention])
    assert {name: t.requires_grad for name, t in attention.items() if isinstance(t, Tensor)} == {
        **dict.fromkeys(("query", "key", "value"), True),
        "attn_mask": False,
    }
    assert reached(torch.randn(4, 6, requires_grad=True), net)[1][net.first].args[0].requires_grad


def arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    return inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments


def test_one_tensor_stays_one_and_packed_sequences_stay_packed():
    attention, gru = nn.MultiheadAttention(4, 1), nn.GRU(4, 3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.gru = attention, gru

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, x, x)[0]
            return self.gru(rnn.pack_padded_sequence(y, [3, 2], enforce_sorted=True))[0].data

    found = calls(Both(), torch.randn(3, 2, 4), [attention, gru])
    query, key, value = found[attention].args[:3]
    assert query is key and key is value
    packed = found[gru].args[0]
    assert isinstance(packed, rnn.PackedSequence) and packed.data.requires_grad and len(packed.data) == 5


def test_layouts_are_kept():
    conv = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    assert calls(conv, x, [conv[1]])[conv[1]].args[0].stride() == x.stride()


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken: bool):
    net = Net()
    net.norm.eval()
    seen = net.seen
    before = {name: b.clone() for name, b in net.named_buffers()}
    modes = [m.training for m in net.modules()]
    if broken:
        with pytest.raises(RuntimeError, match="shape"):
            reached(torch.randn(4, 7), net)
    else:
        reached(torch.randn(4, 6), net)
    assert net.seen is seen and [m.training for m in net.modules()] == modes
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_random_numbers_are_not_used_up():
    net, x = Net(), torch.randn(4, 6)
    layer, at = nn.LSTM(4, 3, 2, dropout=0.5), {"weight_hh_l0": topology((12, 3), 0.5)}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reached(x, net)
    race(layer, at, Call((torch.zeros(2, 2, 4),), {}), {"compressed": compressed}, rounds=1)
    assert torch.equal(torch.rand(3), expected)


# The race


def steps_of(
    module: nn.Module, at: dict[str, Topology], call: Call, makers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What each candidate's step returns."""
    with monkeypatch.context() as patch:
        patch.setattr(timing, "interleave", lambda steps, rounds: {name: [step()] for name, step in steps.items()})
        found = race(module, at, call, makers).seconds
    return {name: results[0] for name, results in found.items()}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 5)),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), (2, 5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_candidate_takes_the_same_training_step(kind: str, monkeypatch: pytest.MonkeyPatch):
    module, shape = LAYERS[kind][0]().double(), LAYERS[kind][1]
    at = {n: topology(tuple(p.shape), 0.4) for n, p in module.named_parameters() if p.dim() > 1}
    module = masked(module, at)
    call = Call((torch.randn(shape, dtype=torch.float64, requires_grad=True),), {})
    makers: dict[str, Any] = {"compressed": compressed, **({"torch.sparse": torch_sparse} if kind == "linear" else {})}
    found = steps_of(module, at, call, makers, monkeypatch)
    assert list(found) == ["dense", *makers]
    dense = dict(zip(["input", *dict(module.named_parameters())], found["dense"], strict=True))
    for name, gradients in found.items():
        torch.testing.assert_close(gradients[0], dense["input"])
        if name != "dense":
            sizes = sorted(g.numel() for g in gradients[1:])
            assert sizes == sorted(at[n].nnz if n in at else p.numel() for n, p in module.named_parameters())
    assert call.args[0].grad is None and all(p.grad is None for p in module.parameters())


def test_a_first_layer_computes_no_input_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(CSRLinear, "transposed")
    found = steps_of(
        nn.Linear(3, 2), {"weight": topology((2, 3), 0.5)}, Call((torch.ones(4, 3),), {}),
        {"compressed": compressed, "torch.sparse": torch_sparse}, monkeypatch,
    )  # fmt: skip
    assert {name: len(gradients) for name, gradients in found.items()} == dict.fromkeys(found, 2)


def test_hooks_of_the_module_see_nothing():
    class Recorder:
        def __init__(self) -> None:
            self.seen = 0

        def __call__(self, *args: Any) -> None:
            self.seen += 1

        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError

    module, recorder = nn.Linear(3, 2), Recorder()
    module.register_forward_hook(recorder)
    module.register_full_backward_hook(recorder)
    race(module, {"weight": Topology((2, 3))}, Call((torch.ones(4, 3),), {}), {"compressed": compressed}, rounds=1)
    assert recorder.seen == 0 and module._forward_hooks


def test_dropout_is_on_as_in_training():
    module = nn.LSTM(4, 3, 2, dropout=0.5).eval()
    at = {"weight_ih_l0": topology((12, 4), 0.5)}
    made = []

    def noting(dense: nn.Module, topologies: Any) -> nn.Module:
        made.append(compressed(dense, topologies))
        return made[-1]

    race(module, at, Call((torch.zeros(2, 2, 4),), {}), {"compressed": noting}, rounds=1)
    assert made[0].training and not module.training


# What is compared


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_sparse_computes_the_same(density: float, bias: bool, dtype: torch.dtype):
    module = nn.Linear(9, 7, bias=bias, dtype=dtype)
    at = {"weight": topology((7, 9), density)}
    dense, layer = masked(module, at), torch_sparse(module, at)
    x = torch.randn(2, 3, 9, dtype=dtype, requires_grad=True)
    y, expected = layer(x), dense(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    weights = [[x, layer.values, *([layer.bias] if bias else [])], [x, *dense.parameters()]]
    ours = torch.autograd.grad(y, weights[0], dy)
    theirs = list(torch.autograd.grad(expected, weights[1], dy))
    theirs[1] = theirs[1].view(-1)[at["weight"].indices]
    torch.testing.assert_close(list(ours), theirs)


def test_masked_twins_are_zero_outside():
    module, at = nn.Linear(9, 7), {"weight": topology((7, 9), 0.3)}
    before = module.weight.detach().clone()
    assert torch.equal(masked(module, at).weight, before * at["weight"].mask)
    assert torch.equal(module.weight, before)
    assert torch.equal(outputs(module, Call((torch.ones(2, 9),), {})), module(torch.ones(2, 9)))


def test_equal_layers_are_alike_and_others_are_not():
    def key(module: nn.Module, nnz: int = 3, **options: Any) -> Any:
        x = torch.zeros(2, 8, 5, 5, requires_grad=True)
        shape = tuple(module.weight.shape)
        call = Call((options.get("x", x),), {})
        return alike(module, {"weight": Topology(shape, torch.arange(nnz))}, call)

    def conv(**options: Any) -> nn.Module:
        return nn.Conv2d(8, 8, 3, **options)

    same = key(conv())
    assert key(conv()) == same
    others = [
        *(key(conv(**o)) for o in ({"stride": 2}, {"groups": 2}, {"bias": False}, {"padding": 1}, {"dilation": 2})),
        *(key(conv(), **o) for o in ({"nnz": 4}, {"x": torch.zeros(2, 8, 5, 5)}, {"x": torch.zeros(3, 8, 5, 5)})),
        key(conv(dtype=torch.float64)),
        key(nn.Conv2d(8, 9, 3)),
    ]
    assert same not in others and len(set(others)) == len(others)
