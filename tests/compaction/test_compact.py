"""Compacted networks compute what the sparse ones do, are as small as NumPy says, and hold nothing dead unsaid."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.app.models import MODELS, build
from regrow.methods import l0, static
from regrow.parts import rows, uniform

EXACT = 1e-9


@pytest.fixture(autouse=True)
def _seeded_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def alive_of_chain(weights: Sequence[np.ndarray]) -> list[int]:
    """How many outputs of each layer live: a path from an input ends there, and one from there leads to an output."""
    there = [np.ones(weights[0].shape[1], bool)]
    for w in weights:
        there.append((w != 0) @ there[-1] > 0)
    used = [np.ones(weights[-1].shape[0], bool)]
    for w in reversed(weights[1:]):
        used.insert(0, (w != 0).T @ used[0] > 0)
    return [int((a & b).sum()) for a, b in zip(there[1:], used, strict=True)]


def halved(model: nn.Module, *, storage: str = "masked", skip: Any = ()) -> nn.Module:
    """Half of the rows of every weight removed at random, norms and biases drawn."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif "weight" in name:
            nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow.sparsify(model, optimizer, static(0.5, structure=rows, allocate=uniform), storage=storage, skip=skip)
    return model.eval()


def checked(model: nn.Module, example: Any, other: Any = None, *, to: float = EXACT, **options: Any) -> Any:
    """The compacted model, checked against the original, which must be as it was, and against a second compaction."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    small = regrow.compact(model, example, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = example if other is None else other
    for one, two in zip(outputs(model, other), outputs(small, other), strict=True):
        assert (one - two).abs().max() <= to * one.abs().max().clamp(min=1)
    again = regrow.compact(small, example, **options)
    assert again.report.before == again.report.after == small.report.after
    assert sum(p.numel() for p in small.parameters()) == small.report.parameters[1]
    return small


@torch.no_grad()
def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    y = model(**x) if isinstance(x, dict) else model(x)
    return [y] if isinstance(y, Tensor) else [t for t in (y if isinstance(y, tuple) else y.values()) if t is not None]


def shape(small: Any, name: str) -> tuple[int, ...]:
    return tuple(small.get_parameter(name).shape)


# Chains


@pytest.mark.parametrize(
    "model, x",
    [
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 2, 1)), (4, 3, 9)),
        (nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 2, 1)), (4, 3, 2, 5, 6)),
    ],
    ids=["1d", "3d"],
)
def test_channels_of_one_and_three_dimensions_go(model: nn.Module, x: tuple[int, ...]):
    small = checked(halved(model.double()), torch.randn(x))
    assert shape(small, "0.weight")[0] == 4


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_neurons_without_inputs_or_outputs_go_until_none_is_left(storage: str):
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    halved(model, storage=storage, skip="6")
    dense = [getattr(m, "to_dense", lambda m=m: m)() for m in model[::2]]
    with torch.no_grad():
        model[6].weight[:, :3] = 0
        dense[3].weight[:, :3] = 0
    small = checked(model, torch.randn(2, 6), torch.randn(7, 6))
    live = alive_of_chain([m.weight.detach().numpy() for m in dense])
    assert [shape(small, f"{i}.weight")[0] for i in (0, 2, 4, 6)] == live
    assert [shape(small, f"{i}.bias") for i in (0, 2, 4, 6)] == [(n,) for n in live]
    assert live[0] < 16 and live[1] <= 6 and live[2] <= 4
    assert small.report.kept == ()


def test_what_unused_neurons_alone_use_goes_too():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        model[4].weight[:, :9] = 0
        model[2].weight[9, 2:] = 0
    small = checked(model, torch.randn(2, 4))
    assert [shape(small, f"{i}.weight") for i in (0, 2, 4)] == [(2, 4), (1, 2), (2, 1)]


def test_a_network_without_inputs_keeps_one_neuron_of_each_layer_and_says_so():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.zeros_(model[0].weight)
    small = checked(model, torch.randn(2, 4))
    assert [shape(small, f"{i}.weight") for i in (0, 2)] == [(1, 4), (3, 1)]
    (first, last) = small.report.kept
    assert (first.name, first.dead, first.outputs, first.reason) == (
        "0.weight",
        1,
        1,
        "linear in 0 would have nothing left",
    )
    assert (last.name, last.dead, last.reason) == ("2.weight", 3, "it is an output of the model")


def test_convolutions_norms_pools_and_a_flattened_head():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(),
        nn.Conv2d(8, 10, 2, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(10 * 4, 6), nn.SiLU(), nn.Linear(6, 5),
    )  # fmt: skip
    halved(model, skip="12")
    small = checked(model, torch.randn(2, 3, 14, 14), torch.randn(5, 3, 14, 14))
    flat = model[10].weight.detach().numpy().reshape(6, 10, 4).any(2)
    chain = [model[0].weight.detach().numpy().any((2, 3)), model[5].weight.detach().numpy().any((2, 3)), flat]
    live = alive_of_chain([*chain, model[12].weight.detach().numpy()])
    assert [shape(small, f"{i}.weight")[0] for i in (0, 1, 5, 6, 10, 12)] == [live[i] for i in (0, 0, 1, 1, 2, 3)]
    assert shape(small, "10.weight") == (live[2], 4 * live[1])
    assert small.get_buffer("1.running_mean").shape == (live[0],)
    assert shape(small, "5.bias") == (live[1],), "what constant channels add had no bias to go to"


@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_a_constant_before_padding_stays_and_is_listed_unless_it_is_zero(constant: float):
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = constant
    small = checked(model, torch.randn(2, 2, 5, 5))
    assert shape(small, "0.weight")[0] == (6 if constant else 3)
    assert [(k.name, k.dead, k.reason) for k in small.report.kept] == (
        [("0.weight", 3, "it is a constant that conv2d in 2 pads with zeros")] if constant else []
    )


def test_a_constant_that_only_constants_read_is_not_lost_at_the_border():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(5), nn.Flatten(), nn.Linear(4, 3)
    )
    nn.init.zeros_(model[0].weight)
    checked(model, torch.randn(2, 2, 5, 5))


def test_padding_that_repeats_keeps_a_constant_constant():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"))
    with torch.no_grad():
        model[0].weight[:3] = 0
    assert shape(checked(model, torch.randn(2, 2, 5, 5)), "0.weight")[0] == 3


def test_depthwise_grouped_and_transposed_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1),
        nn.Conv2d(8, 12, 3, groups=4), nn.PReLU(12), nn.ConvTranspose2d(12, 6, 2, bias=False), nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[[1, 4, 6]] = 0
        model[4].weight[[0, 1, 4]] = 0
        model[4].bias[:2] = model[5].bias[:3] = 0
        model[7].weight[:, :2] = 0
        model[7].weight[3:6] = 0
    small = checked(model, torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8))
    sizes = [shape(small, f"{i}.weight") for i in (0, 2, 4, 5, 6, 7, 9)]
    # Of 8 depthwise groups the 3 without input go; of 4 groups of 2 inputs, the one without inputs and the one unused.
    assert sizes == [(5, 3, 1, 1), (10, 1, 3, 3), (4, 10, 1, 1), (6, 2, 3, 3), (6,), (6, 4, 2, 2), (2, 4, 1, 1)]


def test_group_norm_loses_whole_groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model[0].weight[[0, 1, 2]] = 0
    small = checked(model, torch.randn(2, 3, 4, 4))
    assert shape(small, "0.weight")[0] == shape(small, "1.weight")[0] == 6
    assert [(k.name, k.dead, k.reason) for k in small.report.kept] == [
        ("0.weight", 1, "group_norm in 1 runs over its group")
    ]


def test_layer_norm_keeps_its_features():
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[:5] = 0
    small = checked(model, torch.randn(2, 3))
    assert small.report.before == small.report.after
    assert [(k.name, k.dead, k.reason) for k in small.report.kept] == [("0.weight", 5, "layer_norm in 1 runs over it")]


def test_a_concatenation_with_parameters_and_padded_channels():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(3, 4), nn.Linear(14, 2)
            self.token = nn.Parameter(torch.randn(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            token = self.token.expand(x.shape[0], -1)
            return self.out(F.pad(torch.cat([self.a(x), token, self.b(x).relu()], 1), (1, 1)))

    model = Net()
    with torch.no_grad():
        model.a.weight[[0, 2]] = 0
        model.out.weight[:, [8, 9]] = 0
    small = checked(model, torch.randn(2, 3), torch.randn(5, 3))
    # Tokens are constant, so one stays, since nothing is left of them else; padded zeros go.
    assert (shape(small, "a.weight"), shape(small, "b.weight")) == ((4, 3), (3, 3))
    assert shape(small, "token") == (1, 1) and shape(small, "out.weight") == (2, 8)


# Residuals


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


def test_a_channel_of_a_residual_stream_goes_if_it_is_dead_in_all_that_add_to_it():
    model = nn.Sequential(Basic(6, 12, 2), Basic(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
    halved(model, skip="4")
    small = checked(model, torch.randn(2, 6, 8, 8), torch.randn(3, 6, 8, 8))
    dead = {n: ~p.detach().numpy().any((1, 2, 3)) for n, p in model.named_parameters() if "conv" in n or "down.0" in n}
    stream = (~(dead["0.conv2.weight"] & dead["0.down.0.weight"] & dead["1.conv2.weight"])).sum()
    assert 6 < stream < 12
    for name in ("0.conv2.weight", "0.down.0.weight", "1.conv2.weight"):
        assert shape(small, name)[0] == stream
    assert [shape(small, f"{i}.conv1.weight")[0] for i in range(2)] == [6, 6]
    assert shape(small, "4.weight") == (3, stream)
    said = {k.name: k.dead for k in small.report.kept}
    assert said == {n: 6 - (12 - stream) for n in ("0.conv2.weight", "0.down.0.weight", "1.conv2.weight")}
    assert all("add in" in k.reason for k in small.report.kept)


def test_a_branch_without_active_weights_becomes_one_addition():
    model = nn.Sequential(Basic(6, 6, 1), nn.Conv2d(6, 2, 1))
    nn.init.zeros_(model[0].conv2.weight)
    nn.init.normal_(model[0].bn2.bias)
    small = checked(model, torch.randn(2, 6, 4, 4))
    assert set(small.report.after) == {"0.bn2.constant", "1.weight", "1.bias"}
    assert shape(small, "0.bn2.constant") == (1, 6, 1, 1)


# Attention


class Attends(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.need_weights = nn.LayerNorm(16), need_weights

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=self.need_weights)
        return self.norm(x + y)


@pytest.mark.parametrize("need_weights", [True, False])
def test_heads_go_whole(need_weights: bool):
    model = Attends(need_weights)
    nn.init.normal_(model.attention.in_proj_bias)
    with torch.no_grad():
        model.attention.in_proj_weight[32:36] = 0  # the values of head 0: a constant
        model.attention.out_proj.weight[:, 8:12] = 0  # what head 2 gives
        model.attention.in_proj_weight[44:46] = 0  # two features of head 3
    small = checked(model, torch.randn(2, 5, 16), torch.randn(3, 5, 16))
    assert shape(small, "attention.in_proj_weight") == (24, 16)
    assert shape(small, "attention.out_proj.weight") == (16, 8)
    (kept,) = small.report.kept
    assert (kept.name, kept.dead) == ("attention.in_proj_weight", 2) and "uneven" in kept.reason


def test_transformer_encoder_layers_of_torch():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    halved(model, skip="*.self_attn*")
    small = checked(model, torch.randn(2, 5, 16), torch.randn(3, 5, 16))
    assert [shape(small, f"layers.{i}.linear1.weight") for i in range(2)] == [(12, 16)] * 2
    assert [shape(small, f"layers.{i}.linear2.weight") for i in range(2)] == [(16, 12)] * 2


def _half_of_each_head_and_layer(pairs: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> None:
    """Zero half of the rows of values, head by head, and of first layers, and a few columns of second ones."""
    with torch.no_grad():
        for rows_of_values in values:
            rows_of_values[4:12] = 0
        for first, second in pairs:
            first[::2] = 0
            second[:, :4] = 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vision_transformers(attention: str):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4,
        attn_implementation=attention,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    layers = model.vit.layers
    _half_of_each_head_and_layer(
        [(layer.mlp.fc1.weight, layer.mlp.fc2.weight) for layer in layers],
        [layer.attention.v_proj.weight for layer in layers],
    )
    # The eager one takes its softmax in float32.
    small = checked(
        model, {"pixel_values": torch.randn(2, 3, 8, 8)}, {"pixel_values": torch.randn(3, 3, 8, 8)},
        to=EXACT if attention == "sdpa" else 1e-6,
    )  # fmt: skip
    for i in range(2):
        at = f"vit.layers.{i}"
        assert [shape(small, f"{at}.attention.{n}_proj.weight") for n in "qkv"] == [(8, 16)] * 3
        assert shape(small, f"{at}.attention.o_proj.weight") == (16, 8)
        assert shape(small, f"{at}.mlp.fc1.weight") == (14, 16)
        assert shape(small, f"{at}.mlp.fc2.weight") == (16, 14)
    assert small.report.kept == ()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_language_models_at_any_length(attention: str):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=11, n_positions=16, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    blocks = model.transformer.h
    _half_of_each_head_and_layer(
        [(block.mlp.c_fc.weight.t(), block.mlp.c_proj.weight.t()) for block in blocks],
        [block.attn.c_attn.weight.t()[32:] for block in blocks],
    )
    auto = torch.export.Dim.AUTO
    small = checked(
        model, {"input_ids": torch.randint(11, (2, 5)), "use_cache": False},
        {"input_ids": torch.randint(11, (3, 9)), "use_cache": False},
        dynamic_shapes={"input_ids": {0: auto, 1: auto}, "use_cache": None},
    )  # fmt: skip
    for i in range(2):
        at = f"transformer.h.{i}"
        assert (shape(small, f"{at}.attn.c_attn.weight"), shape(small, f"{at}.attn.c_proj.weight")) == (
            (16, 24),
            (8, 16),
        )
        assert (shape(small, f"{at}.mlp.c_fc.weight"), shape(small, f"{at}.mlp.c_proj.weight")) == ((16, 30), (30, 16))
    assert "transformer.wte.weight" in small.report.after, "a tied parameter keeps its first name"


# The library's own


@pytest.mark.parametrize("name", [n for n in MODELS if n != "resnet-50"])
def test_the_models_of_the_command_line(name: str):
    model = build(name, (3, 8, 8), 10, width=0.5, seed=0).double()
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    small = checked(halved(model, skip=last), torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8))
    before, after = small.report.parameters
    assert after < 0.95 * before


def test_latent_weights_are_read_as_they_are_evaluated():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    regrow.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), l0(), skip="2")
    with torch.no_grad():
        model[2].weight[:, :5] = 0
    small = checked(model, torch.randn(2, 6))
    assert shape(small, "2.weight") == (3, 11)


# What it says


def test_the_model_keeps_its_mode_and_its_modules():
    model = halved(
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)), storage="compressed", skip="2"
    ).train()
    parts = list(model.modules())
    small = regrow.compact(model, torch.randn(2, 6))
    assert all(a is b for a, b in zip(model.modules(), parts, strict=True)) and all(m.training for m in parts)
    with torch.no_grad():
        small.get_parameter("2.weight").zero_()
    assert model[2].weight.any()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, of its own copying
def test_the_result_trains_and_copies():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    small = copy.deepcopy(regrow.compact(model, torch.randn(2, 6))).train()
    small(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert small.report.parameters == (83, 83)


def test_a_model_that_cannot_be_traced_is_an_error_that_names_the_module():
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(3, 3), Asks())
    with pytest.raises(ValueError, match=r"^compact cannot trace 1 \(Asks\) by torch.export, which says: .+"):
        regrow.compact(model, torch.randn(2, 3))
    assert model.training


def test_an_operator_without_a_rule_keeps_what_it_is_given():
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1).values

    model = nn.Sequential(nn.Linear(3, 6), Sorts(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
    small = checked(model, torch.randn(2, 3))
    assert [tuple(k) for k in small.report.kept] == [("0.weight", 2, 6, "sort in 1 needs all of it")]


def test_an_operator_that_does_not_what_it_declares_is_an_error():
    class Rolls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rolled(x)

    model = nn.Sequential(nn.Linear(3, 6), Rolls(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
    with pytest.raises(
        ValueError, match=r"^compact would change outputs of up to .* by up to .*: leave out the module"
    ):
        regrow.compact(model, torch.randn(2, 3))


@torch.library.custom_op("regrow_tests::rolled", mutates_args=(), tags=(torch.Tag.pointwise,))
def rolled(x: Tensor) -> Tensor:
    """Anything but pointwise, whatever its tag says."""
    return x.roll(1, -1)


@rolled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
