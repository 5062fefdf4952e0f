"""Ordered networks compute what they did, hold the same numbers, and have what is alike side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.app.models import build
from regrow.methods import static
from regrow.parts import groups

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _seeded_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(model: nn.Module) -> nn.Module:
    """Every parameter and statistic drawn, so that no two channels are the same."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if tensor.dim() == 1 else nn.init.normal_(tensor, std=0.2)
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, x: Any) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y[0]


def ordered(model: nn.Module, x: Any, size: int = 4, **options: Any) -> dict[str, Tensor]:
    """What moved, checked: equal outputs, in evaluation and for other inputs, and each moved weight's rows kept."""
    drawn(model)
    before, other = copy.deepcopy(model.state_dict()), torch.randn_like(x) if x.is_floating_point() else x
    expected = outputs(model, other)
    moved = regrow.order_outputs(model, x, size, **options)
    assert moved
    assert (outputs(model, other) - expected).abs().max() <= EXACT * expected.abs().max().clamp(min=1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.reshape(-1).sort().values, before[name].reshape(-1).sort().values)
    for name, order in moved.items():
        assert order.tolist() != list(range(len(order))), name
        assert sorted(order.tolist()) == list(range(len(order)))
    return moved


def perceptron(*sizes: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# What may change places


def test_hidden_neurons_of_a_perceptron_move_and_its_outputs_do_not():
    assert sorted(ordered(perceptron(7, 24, 12, 5), torch.randn(3, 7))) == ["0.weight", "2.weight"]


def test_a_weight_that_is_packed_the_other_way_round_moves_along_its_own_axis():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bias = nn.Parameter(torch.empty(6, 12)), nn.Parameter(torch.empty(12))
            self.second = nn.Parameter(torch.empty(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.first).tanh() @ self.second

    model = drawn(Transposed())
    columns = model.first.detach().clone()
    moved = regrow.order_outputs(model, torch.randn(2, 6), 4)
    assert list(moved) == ["first"]
    assert torch.equal(model.first, columns[:, moved["first"]])


def test_channels_norms_and_the_pixels_of_a_flattened_map_move_together():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2),
    )  # fmt: skip
    assert sorted(ordered(model, torch.randn(2, 3, 8, 8))) == ["0.weight", "4.weight", "7.weight"]


def test_several_pixels_of_a_channel_stay_together_behind_a_flatten():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 3))
    before = drawn(model)[3].weight.detach().clone()
    moved = regrow.order_outputs(model, torch.randn(2, 1, 6, 6), 4)
    assert torch.equal(model[3].weight.view(3, 8, 16), before.view(3, 8, 16)[:, moved["0.weight"]])


def test_channels_that_additions_tie_move_together_in_a_residual_network():
    moved = ordered(build("wrn-22-2", (3, 8, 8), 10).double(), torch.randn(2, 3, 8, 8), 8)
    tied: dict[tuple[int, ...], list[str]] = {}
    for name, order in moved.items():
        tied.setdefault(tuple(order.tolist()), []).append(name)
    # Each of three stages has one residual stream, which several convolutions write.
    assert sum(len(names) > 2 for names in tied.values()) == 3


def test_a_depthwise_convolution_moves_with_its_channels():
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv1d(8, 2, 1))
    assert list(ordered(model, torch.randn(2, 3, 9))) == ["0.weight"]


def test_both_halves_of_a_gate_move_together():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.up(x).chunk(2, -1)
            return x + self.down(value * gate.sigmoid())

    # The halves are outputs of one weight and stand there twice, which no group of outputs can follow.
    with pytest.raises(ValueError, match="none of 4 parameters"):
        regrow.order_outputs(drawn(Gated()), torch.randn(2, 5), 4)

    class Two(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(5, 8), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x) * self.gate(x).sigmoid())

    moved = ordered(Two(), torch.randn(2, 5))
    assert torch.equal(moved["up.weight"], moved["gate.weight"])


def test_a_hidden_layer_moves_behind_a_concatenation_and_a_transformer_keeps_its_stream():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([x, self.a(x).relu(), self.b(x)], 1))

    assert sorted(ordered(Skip(), torch.randn(2, 3))) == ["a.weight", "b.weight"]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    assert list(ordered(layer, torch.randn(2, 3, 8))) == ["linear1.weight"]


class Scaled(nn.Module):
    """Hidden neurons that meet a parameter."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor], size: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scale, self.meet = nn.Parameter(torch.empty(size)), meet

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.meet(self.first(x), self.scale).tanh())


@pytest.mark.parametrize(
    "meet",
    [lambda hidden, scale: hidden * scale, lambda hidden, scale: hidden + scale.expand(hidden.shape[0], -1)],
    ids=["neuron by neuron", "spread over the batch"],
)
def test_a_parameter_that_neurons_meet_moves_along(meet: Callable[[Tensor, Tensor], Tensor]):
    model = Scaled(meet)
    moved = ordered(model, torch.randn(2, 3))
    assert list(moved) == ["first.weight"]


def test_neurons_that_meet_a_parameter_along_another_axis_stay():
    model = Scaled(lambda hidden, scale: (hidden.view(-1, 4, 2) * scale).flatten(1), 2)
    with pytest.raises(ValueError, match="may change places"):
        regrow.order_outputs(drawn(model), torch.randn(2, 3), 2)


def test_a_layer_that_is_used_twice_moves_as_one():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.again(self.first(x).relu()).relu()).relu())

    moved = ordered(Twice(), torch.randn(2, 3))
    assert torch.equal(moved["first.weight"], moved["again.weight"])


class _Computed(nn.Module):
    """A weight that is read once as it is, and once after a function of it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.last, self.function = nn.Parameter(torch.empty(8, 8)), nn.Linear(8, 2), function

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.weight).relu()
        return self.last(hidden) + self.function(hidden, self.weight.tril())


class _Sliced(nn.Module):
    """Neurons of which the first half is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b(hidden) + self.c(hidden[:, :4])


def test_neurons_change_places_with_those_that_the_same_weights_read():
    moved = ordered(_Sliced(), torch.randn(2, 3), 2)
    assert sorted(moved["a.weight"][:4].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(4, 8), (2, 4)),
        (nn.GRU(3, 8, batch_first=True), (2, 5, 3)),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), (2, 4)),
        (nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2)), (2, 4)),
        (nn.Sequential(nn.Conv1d(2, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 1, 1)), (2, 2, 4)),
        (nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
    ],
    ids=["output", "gru", "layer norm", "softmax", "groups", "attention"],
)
def test_what_has_an_order_stays(model: nn.Module, x: tuple[int, ...]):
    drawn(model.double())
    before, example = copy.deepcopy(model.state_dict()), torch.randn(x)
    given: Any = (example, example, example) if isinstance(model, nn.MultiheadAttention) else example
    with pytest.raises(ValueError, match="has outputs that may change places"):
        regrow.order_outputs(model, given, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "function",
    [lambda hidden, weight: weight.sum(), lambda hidden, weight: F.linear(hidden, weight).mean()],
    ids=["alone", "with its outputs"],
)
def test_a_weight_that_is_read_in_other_ways_too_stays(function: Callable[[Tensor, Tensor], Tensor]):
    with pytest.raises(ValueError, match="may change places"):
        regrow.order_outputs(drawn(_Computed(function)), torch.randn(2, 8), 4)


def test_a_neuron_that_stands_in_another_order_elsewhere_leaves_the_model_as_it_was():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.cat([y[:, :4], y.tanh(), y[:, 4:]], 1))

    model = drawn(Mixed())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="order_outputs would change outputs"):
        regrow.order_outputs(model, torch.randn(2, 3), 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# In which order


def greedy(rows: np.ndarray, size: int) -> list[int]:
    """The longest row that is left, then the largest sums of cosines to those that are there."""
    free, order = list(range(len(rows))), []
    cos = lambda i, j: rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])  # noqa: E731
    while free:
        group: list[int] = []
        for _ in range(min(size, len(free))):
            score = [sum(cos(i, j) for j in group) if group else np.linalg.norm(rows[i]) for i in free]
            group.append(free.pop(int(np.argmax(score))))
        order += group
    return order


@pytest.mark.parametrize(("hidden", "size", "real"), [(24, 8, 8), (20, 8, 5), (13, 8, 1), (6, 16, 6)])
def test_groups_are_filled_greedily_by_the_cosine_of_magnitudes(hidden: int, size: int, real: int):
    model = drawn(perceptron(7, hidden, 3))
    rows = model[0].weight.detach().abs().numpy()
    if real == 1:
        expected = list(np.argsort(-np.linalg.norm(rows, axis=1)))
    else:
        expected = greedy(rows, real)
    assert regrow.order_outputs(model, torch.randn(2, 7), size)["0.weight"].tolist() == expected


def test_scores_take_the_place_of_magnitudes():
    model = drawn(perceptron(7, 16, 3))
    score = torch.rand(16, 7)
    moved = regrow.order_outputs(model, torch.randn(2, 7), 4, scores={"0.weight": score})
    assert moved["0.weight"].tolist() == greedy(score.numpy(), 4)


def test_neurons_that_share_their_inputs_come_to_stand_in_one_group():
    model = perceptron(16, 16, 3)
    kind = torch.randperm(16) % 4
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(16, 16) * (torch.arange(16) % 4 == kind[:, None]))
    moved = regrow.order_outputs(model, torch.randn(2, 16), 4)["0.weight"]
    assert all(len(set(group.tolist())) == 1 for group in kind[moved].view(4, 4))


# What else moves, and what is refused


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, 0.9), torch.optim.AdamW], ids=["sgd", "adamw"])
def test_training_goes_on_as_if_nothing_had_moved(make: Any):
    x, y = torch.randn(16, 7), torch.randint(3, (16,))

    plain, other = (drawn(perceptron(7, 16, 8, 3)) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    optimizers = make(plain.parameters()), make(other.parameters())
    for n in range(6):
        for model, optimizer in zip((plain, other), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
        if n == 2:
            moved = regrow.order_outputs(other, x, 4, optimizer=optimizers[1])
        for optimizer in optimizers:
            optimizer.step()
    assert (other(x) - plain(x)).abs().max() < EXACT
    assert torch.allclose(other[0].weight, plain[0].weight[moved["0.weight"]], atol=EXACT)


def test_a_sparse_model_is_refused():
    for storage, said in (("masked", "already sparsified by static"), ("compressed", "2 modules are sparse already")):
        model = perceptron(8, 16, 4)
        sparsifier = regrow.sparsify(
            model, torch.optim.SGD(model.parameters(), 0.1), static(0.5, structure=groups(4)), storage=storage
        )
        if storage == "compressed":
            del sparsifier
        with pytest.raises(ValueError, match=said):
            regrow.order_outputs(model, torch.randn(2, 8), 4)


def test_a_score_of_no_weight_or_of_another_shape_is_refused():
    model = perceptron(8, 16, 4)
    for scores, said in (
        ({"nothing": torch.ones(2)}, "not there"),
        ({"0.weight": torch.ones(2, 8)}, "of shape 16 x 8"),
    ):
        with pytest.raises(ValueError, match=said):
            regrow.order_outputs(model, torch.randn(2, 8), 4, scores=scores)
