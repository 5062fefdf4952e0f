"""FLOPs against the RigL paper's printed figures, against naive counts, and at the limits of the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow import methods, metrics
from regrow.engine.placement import Storage
from regrow.metrics.flops import Flops, flops, pruning_training_flops, training_flops
from regrow.nn import SparseConv2d, SparseLinear, SparseModule
from support.networks import mobilenet_v1, resnet50
from support.twins import sparsified

Shapes = dict[str, tuple[int, ...]]


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Water-filling written from the paper: the weight with the highest share fills up first."""
    share = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    budget = sum(math.ceil(density * math.prod(shape) - 1e-9) for shape in shapes.values())
    result: dict[str, float] = {}
    for name in sorted(shapes, key=lambda n: -share[n]):
        rest = [n for n in shapes if n not in result]
        scale = (budget - sum(math.prod(shapes[n]) for n in result)) / sum(sum(shapes[n]) for n in rest)
        if scale * share[name] <= 1:
            return {**result, **{n: scale * share[n] for n in rest}}
        result[name] = 1.0
    return result


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def image() -> Tensor:
    return torch.empty(1, 3, 224, 224, device="meta")


def resnet_flops(densities: Mapping[str, float] | None = None, *, paper_quirks: bool = True) -> Flops:
    return flops(on_meta(resnet50), image(), densities, paper_quirks=paper_quirks)


@pytest.fixture(scope="module")
def resnet_shapes() -> Shapes:
    return {row.name: row.shape for row in resnet_flops().layers}


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    return {name: density for name in shapes if name != "conv1.weight"}


def test_resnet50_has_the_papers_weights_and_dense_flops(resnet_shapes: Shapes) -> None:
    assert sum(math.prod(shape) for shape in resnet_shapes.values()) == 25_502_912
    assert resnet_flops(paper_quirks=False).dense == 8_189_483_496
    assert resnet_flops().dense == 8_202_340_776
    assert round(resnet_flops().dense / 1e9, 4) == 8.2023
    assert round(resnet_flops(paper_quirks=False).dense / 1e9, 4) == 8.1895
    assert f"{training_flops(resnet_flops().dense, 0) * 4096 * 32_000:.1e}" == "3.2e+18"


@pytest.mark.parametrize(
    ("allocate", "density", "ratio", "train", "train_5x"),
    [
        (erk, 0.2, 0.4153, 0.417, 2.09),
        (erk, 0.1, 0.2431, 0.246, 1.23),
        (uniform, 0.2, 0.2254, 0.228, 1.14),
        (uniform, 0.1, 0.1285, 0.131, 0.66),
    ],
)
def test_resnet50_test_and_rigl_training_ratios_are_the_printed_ones(
    resnet_shapes: Shapes,
    allocate: Callable[[Shapes, float], dict[str, float]],
    density: float,
    ratio: float,
    train: float,
    train_5x: float,
) -> None:
    count = resnet_flops(allocate(resnet_shapes, density))
    cost = training_flops(count.sparse, count.dense, gradient_interval=100)
    relative = cost / training_flops(count.dense, count.dense)
    assert round(count.ratio, 4) == ratio
    assert round(relative, 3) == train
    assert round(5 * relative, 2) == train_5x


def test_resnet50_at_99_percent_with_a_dense_stem(resnet_shapes: Shapes) -> None:
    rest = {name: shape for name, shape in resnet_shapes.items() if name != "conv1.weight"}
    count = resnet_flops(erk(rest, 0.01))
    cost = training_flops(count.sparse, count.dense, gradient_interval=100)
    assert round(count.ratio, 4) == 0.0548
    assert round(5 * cost / training_flops(count.dense, count.dense), 2) == 0.29


def test_snfs_with_erk_costs_the_printed_share(resnet_shapes: Shapes) -> None:
    count = resnet_flops(erk(resnet_shapes, 0.2))
    cost = training_flops(count.sparse, count.dense, gradient_interval=0)
    assert round(cost / (3 * count.dense), 3) == 0.610


def test_pruning_costs_the_printed_share_of_dense_training(resnet_shapes: Shapes) -> None:
    costs = []
    for step in range(0, 32_001, 1000):
        done = min(max((step - 10_000) / 15_000, 0), 1)
        density = 0.2 + 0.8 * (1 - done) ** 3
        costs.append(resnet_flops({**uniform(resnet_shapes, density), "fc.weight": 0.2}).sparse)
    assert len(costs) == 33
    assert round(pruning_training_flops(costs) / (3 * resnet_flops().dense), 3) == 0.560


def test_mobilenet_v1_has_the_printed_flops_and_the_proper_depthwise_count() -> None:
    model = on_meta(mobilenet_v1)
    printed = flops(model, image(), paper_quirks=True)
    assert round(printed.dense / 1e6, 3) == 1141.544
    # What the quirk leaves out: all but one of the outputs of every depthwise position.
    missing = sum((row.shape[0] - 1) * row.outputs for row in printed.layers if row.shape[1:] == (1, 3, 3))
    assert round((printed.dense + missing) / 1e6, 3) == 1143.483
    assert flops(model, image()).dense == 1_142_524_392


def test_quirks_leave_same_padding_and_unstrided_convolutions_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Flatten())
    x = torch.zeros(2, 3, 9, 9)
    assert flops(model, x, paper_quirks=True) == flops(model, x)


@pytest.mark.parametrize("seed", range(6))
def test_convolutions_match_a_count_of_every_product(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    groups, per_in, per_out = draw(1, 3), draw(1, 3), draw(1, 3)
    kernel, stride, padding, size = draw(1, 3), draw(1, 3), draw(0, 1), draw(5, 8)
    conv = nn.Conv2d(groups * per_in, groups * per_out, kernel, stride, padding, groups=groups)
    x = torch.zeros(3, groups * per_in, size, size + 1)
    products = outputs = 0
    for _ in range(groups * per_out):
        for top in range(-padding, size + padding - kernel + 1, stride):
            for _left in range(-padding, size + 1 + padding - kernel + 1, stride):
                assert top + kernel <= size + padding
                outputs += 1
                products += per_in * kernel * kernel
    (row,) = flops(conv, x, {"weight": 0.25}).layers
    assert (row.outputs, row.dense, row.sparse) == (outputs, 2 * products + outputs, products / 2 + outputs)


def test_a_transposed_convolution_spreads_every_input_over_its_kernel() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    row = flops(conv, torch.zeros(5, 4, 7, 8)).layers[0]
    assert row.outputs == 6 * 14 * 16
    assert row.dense == 2 * (4 * 7 * 8) * (3 * 3 * 3) + 6 * 14 * 16
    assert row.kind == "ConvTranspose2d"


@pytest.mark.parametrize("ndim", [1, 3])
def test_depthwise_convolutions_have_a_fan_in_of_one_channel(ndim: int) -> None:
    conv = (nn.Conv1d if ndim == 1 else nn.Conv3d)(5, 10, 3, padding=1, groups=5)
    positions = 6**ndim
    row = flops(conv, torch.zeros(2, 5, *[6] * ndim)).layers[0]
    assert row.dense == 10 * positions * (2 * 3**ndim + 1)
    quirky = flops(conv, torch.zeros(2, 5, *[6] * ndim), paper_quirks=True).layers[0]
    assert quirky.dense == positions * (2 * 10 * 3**ndim + 2)


def test_linear_counts_every_token_and_every_call() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, shared)
    count = flops(model, torch.zeros(2, 7, 4), {"0.weight": 0.5})
    assert len(count.layers) == 1
    assert count.dense == 3 * 7 * 4 * (2 * 4 + 1)
    assert count.sparse == 3 * 7 * 4 * (2 * 2 + 1)


@pytest.mark.parametrize(("cls", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_count_steps_layers_and_directions(cls: Callable[..., nn.RNNBase], gates: int) -> None:
    model = cls(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    count = flops(model, torch.zeros(3, 11, 5))
    per_step = sum(2 * p.numel() + p.shape[0] for name, p in model.named_parameters() if "weight" in name)
    assert count.dense == 11 * per_step
    assert {row.shape[0] for row in count.layers} == {gates * 6}
    time_major = cls(5, 6, num_layers=2, bidirectional=True)
    assert flops(time_major, torch.zeros(11, 3, 5), batch_size=3).dense == count.dense


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_lstm_projection_and_packed_sequences() -> None:
    model = nn.LSTM(5, 6, proj_size=2, batch_first=True)
    count = flops(model, torch.zeros(1, 4, 5))
    assert count.dense == 4 * (24 * (2 * 5 + 1) + 24 * (2 * 2 + 1) + 2 * (2 * 6 + 1))
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 4, 5), torch.tensor([4, 2]), batch_first=True)
    assert flops(model, packed).dense == count.dense * 3 / 4
    projection = flops(model, torch.zeros(1, 4, 5), {"weight_hr_l0": 0.5, "weight_ih_l0[3]": 0.0})
    assert [row.density for row in projection.layers] == [0.75, 1.0, 0.5]


@pytest.mark.parametrize(("cls", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_recurrent_cells(cls: type[nn.Module], gates: int) -> None:
    count = flops(cls(5, 6), torch.zeros(3, 5))
    assert count.dense == gates * 6 * (2 * 5 + 1) + gates * 6 * (2 * 6 + 1)


def test_attention_counts_projections_of_queries_keys_values_and_outputs() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    arguments = {"query": torch.zeros(2, 3, 8), "key": torch.zeros(2, 5, 8), "value": torch.zeros(2, 5, 8)}
    count = flops(model, arguments)
    per_token = 8 * (2 * 8 + 1)
    assert {row.name: row.dense for row in count.layers} == {
        "in_proj_weight": (3 + 5 + 5) * per_token,
        "out_proj.weight": 3 * per_token,
    }
    sparse = flops(model, arguments, {"in_proj_weight[0]": 0.5, "in_proj_weight[2]": 0.0})
    assert sparse.sparse == count.dense - 2 * 64 * (3 * 0.5 + 5)
    assert sparse.layers[0].density == 0.5
    assert flops(model, arguments, {"in_proj_weight": 0.0, "out_proj.weight": 0.0}).sparse == 8 * (13 + 3)


def test_attention_with_separate_projections_matches_linear_layers() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
    x = (torch.zeros(2, 3, 8), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6))
    count = flops(model, x, {"k_proj_weight": 0.25})
    pairs = [(8, 3), (4, 5), (6, 5), (8, 3)]
    assert sorted(row.dense for row in count.layers) == sorted(8 * n * (2 * f + 1) for f, n in pairs)
    assert count.dense - count.sparse == 0.75 * 2 * 8 * 4 * 5


def test_a_fused_encoder_layer_is_counted_through_its_parts() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    count = flops(layer, torch.zeros(2, 5, 8))
    assert count.dense == 5 * (4 * 8 * (2 * 8 + 1) + 16 * (2 * 8 + 1) + 8 * (2 * 16 + 1))
    assert torch.backends.mha.get_fastpath_enabled()
    assert not layer.training


def test_a_padded_encoder_is_counted_at_full_length() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    arguments = {"src": torch.zeros(2, 5, 8), "src_key_padding_mask": padding}
    assert flops(model, arguments).dense == 2 * flops(layer, torch.zeros(2, 5, 8)).dense


class Conv1D(nn.Module):
    """The layer of GPT-2, a transposed linear one, as transformers defines it."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


def test_the_conv1d_of_transformers_counts_as_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by package and name, and one of another package is not counted."""
    assert not flops(Conv1D(7, 4), torch.zeros(2, 3, 4)).layers
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    row = flops(Conv1D(7, 4), torch.zeros(2, 3, 4), {"weight": 0.5}).layers[0]
    assert (row.kind, row.shape, row.dense, row.sparse) == ("Conv1D", (4, 7), 3 * 7 * 9, 3 * 7 * 5)


def test_a_bilinear_layer_multiplies_each_entry_once_for_each_pair_of_inputs() -> None:
    layer = nn.Bilinear(4, 3, 7)
    row = flops(layer, (torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)), {"weight": 0.5}).layers[0]
    assert (row.kind, row.shape, row.dense, row.sparse) == ("Bilinear", (7, 4, 3), 5 * 7 * 25, 5 * 7 * 13)


class Odd(nn.Module):
    """A layer that is called, one that is not, a tied head, an embedding and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight
        self.own = nn.Parameter(torch.zeros(4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.used(self.embed(tokens)) @ self.own
        return torch.as_tensor(self.head(hidden))


def odd_tokens() -> Tensor:
    return torch.zeros(2, 3, dtype=torch.long)


def test_weights_that_are_not_called_or_not_counted_have_rows_of_zeros() -> None:
    rows = {r.name: r for r in flops(Odd(), odd_tokens(), {"unused.weight": 0.5, "own": 0.25}).layers}
    assert [rows["unused.weight"].density, rows["own"].density] == [0.5, 0.25]
    assert [c for name in ("unused.weight", "own") for c in (rows[name].dense, rows[name].sparse)] == [0.0] * 4
    assert rows["own"][1:4] == ("Odd", (4, 4), 0.0)
    assert list(rows) == ["used.weight", "unused.weight", "head.weight", "own"]


def test_a_tied_weight_goes_by_any_of_its_names() -> None:
    by_first = flops(Odd(), odd_tokens(), {"embed.weight": 0.5})
    assert by_first.sparse == by_first.dense - 3 * 4 * 9
    assert by_first == flops(Odd(), odd_tokens(), {"head.weight": 0.5})
    with pytest.raises(ValueError, match="second density"):
        flops(Odd(), odd_tokens(), {"head.weight": 0.5, "embed.weight": 0.4})


@pytest.mark.parametrize("name", ["fc.weight", "used.bias", "used.weight[0]", "used", "", "own[1]"])
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match="names no weight"):
        flops(Odd(), odd_tokens(), {name: 0.5})


def test_blocks_out_of_range_and_blocks_beside_the_whole_are_errors() -> None:
    model, x = nn.GRUCell(2, 3), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"'weight_ih\[3\]'.*weight_ih\[0\.\.2\]"):
        flops(model, x, {"weight_ih[3]": 0.5})
    with pytest.raises(ValueError, match="second density"):
        flops(model, x, {"weight_ih": 0.5, "weight_ih[0]": 0.5})


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_densities_outside_the_unit_interval_are_errors(density: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        flops(nn.Linear(2, 2), torch.zeros(1, 2), {"weight": density})


@pytest.mark.parametrize("example", [torch.tensor(1.0), torch.zeros(0, 2), ("text",), {}])
def test_an_input_without_a_batch_is_an_error(example: object) -> None:
    with pytest.raises(ValueError, match="flops: "):
        flops(nn.Linear(2, 2), example)


def test_wrappers_and_compilation_do_not_change_names_or_counts() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    x = torch.zeros(3, 4)
    plain = flops(inner, x, {"0.weight": 0.5})
    compiled = cast("nn.Module", torch.compile(inner, backend="eager"))
    for model in (nn.DataParallel(inner), compiled):
        assert flops(model, x, {"0.weight": 0.5}) == plain
    assert flops(inner, x, {"module._orig_mod.0.weight": 0.5}) == plain


def test_counting_leaves_the_model_as_it_was_and_ignores_batch_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2))
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    count = flops(model, torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(seed, torch.random.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert count == flops(model.to("meta"), torch.empty(1, 3, 5, 5, device="meta"))


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        flops(model, torch.zeros(1, 4))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_table_names_every_weight_the_totals_and_what_is_left_out() -> None:
    text = str(resnet_flops({"fc.weight": 0.5}))
    assert "layer4.0.downsample.0.weight" in text
    assert "8.202 G" in text
    assert "0.5000" in text
    assert "64x3x7x7" in text
    assert "not counted" in text
    assert math.isnan(flops(nn.ReLU(), torch.zeros(1, 1)).ratio)


@pytest.mark.parametrize(("timing", "least"), [("instead", 0), ("after", 1)])
def test_training_cost_lies_between_static_and_dense_gradients_every_step(timing: str, least: int) -> None:
    sparse, dense = 3.0, 50.0
    costs = [
        training_flops(sparse, dense, gradient_interval=t, timing=timing)  # type: ignore[arg-type]
        for t in (least, 1 + least, 10, 1e3, 1e9, math.inf)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 2 * sparse + dense
    assert costs[-1] == 3 * sparse == training_flops(sparse, dense)
    assert costs[-2] == pytest.approx(3 * sparse, rel=1e-7)


@pytest.mark.parametrize("interval", [1, 7, 100])
def test_training_cost_is_the_mean_over_a_simulated_run(interval: int) -> None:
    sparse, dense = 3.0, 50.0
    update = 2 * sparse + dense
    instead = [3 * sparse] * interval + [update]
    after = [3 * sparse] * (interval - 1) + [update]
    assert training_flops(sparse, dense, gradient_interval=interval) == pytest.approx(sum(instead) / len(instead))
    mean = sum(after) / len(after)
    assert training_flops(sparse, dense, gradient_interval=interval, timing="after") == pytest.approx(mean)
    assert training_flops(dense, dense, gradient_interval=interval) == 3 * dense


def test_training_cost_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="must not be negative, got sparse -1"):
        training_flops(-1, 1)
    with pytest.raises(ValueError, match="at least 0"):
        training_flops(1, 1, gradient_interval=-1)
    with pytest.raises(ValueError, match="at least 1"):
        training_flops(1, 1, gradient_interval=0, timing="after")
    with pytest.raises(ValueError, match="at least 0"):
        training_flops(1, 1, gradient_interval=math.nan)
    with pytest.raises(ValueError, match="timing"):
        training_flops(1, 1, timing="before")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        pruning_training_flops([])


def dense_densities(sparse: SparseModule) -> dict[str, float]:
    """Densities as counted from the dense weights with their zeros, block by block where there are blocks."""
    found = {}
    for name, shape in sparse.shapes.items():
        gates = shape[0] // sparse.hidden_size if hasattr(sparse, "hidden_size") and "_hr" not in name else 1
        count = 3 if name == "in_proj_weight" else gates
        for i, block in enumerate(sparse.topology(name).mask.double().chunk(count)):
            found[f"{name}[{i}]" if count > 1 else name] = float(block.sum()) / block.numel()
    return found


IMAGE = torch.zeros(2, 4, 7, 8)
LAYERS: list[tuple[nn.Module, object]] = [
    (nn.Linear(6, 5), torch.zeros(2, 3, 6)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), IMAGE),
    (nn.Conv1d(4, 6, 3, padding="same"), IMAGE[:, :, 0]),
    (nn.Conv3d(4, 6, 3, stride=2, padding=1, groups=2), IMAGE[:, :, None]),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), IMAGE),
    (nn.ConvTranspose3d(4, 6, 3), IMAGE[:, :, None]),
    (nn.Bilinear(6, 4, 5), (torch.zeros(2, 3, 6), torch.zeros(2, 3, 4))),
    (nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True), torch.zeros(3, 11, 5)),
    (nn.LSTM(5, 6, proj_size=2, batch_first=True), torch.zeros(3, 11, 5)),
    (nn.LSTMCell(5, 6), torch.zeros(3, 5)),
    (nn.MultiheadAttention(8, 2, batch_first=True), (torch.zeros(2, 3, 8), torch.zeros(2, 5, 8), torch.zeros(2, 5, 8))),
    (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True),
        (torch.zeros(2, 3, 8), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6)),
    ),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("dense", "x"), LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_a_sparse_module_counts_as_the_dense_one_at_its_densities(dense: nn.Module, x: object) -> None:
    sparse = sparsified(dense, 0.4, room=3)
    expected = flops(dense, x, dense_densities(sparse))
    count = flops(sparse, x)
    assert count == expected
    assert count.sparse < count.dense == flops(dense, x).dense
    assert not any(layer.density == 1.0 for layer in count.layers if not layer.name.startswith("out_proj"))
    given = {name: 0.5 for name in sparse.shapes}
    assert flops(sparse, x, given) == flops(dense, x, given) == count.at(given)
    assert flops(sparse, x, paper_quirks=True) == flops(dense, x, dense_densities(sparse), paper_quirks=True)


def test_the_sparse_conv1d_of_transformers_counts_as_linear() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    dense = pytorch_utils.Conv1D(7, 4)
    sparse = sparsified(dense, 0.5)
    x = torch.zeros(2, 3, 4)
    assert flops(sparse, x) == flops(dense, x, dense_densities(sparse))
    assert flops(sparse, x).layers[0].kind == "Conv1D"


class Small(nn.Module):
    """Attention, a convolution, tied weights, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, steps) to (batch, steps, 8)."""
        return torch.as_tensor(self.b(self.a(self.encoder(self.norm(self.conv(x)).transpose(1, 2)))))


def small(storage: Storage) -> tuple[Small, regrow.Sparsifier]:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, regrow.sparsify(model, optimizer, methods.static(0.3), storage=storage)


def test_a_compressed_model_counts_as_the_masked_one() -> None:
    x = torch.zeros(2, 4, 9)
    (masked, one), (compressed, other) = small("masked"), small("compressed")
    density = metrics.densities(one)
    assert {"encoder.self_attn.in_proj_weight[1]", "a.weight"} <= set(density)
    assert density == metrics.densities(other)
    count = flops(masked, x, density)
    assert count == flops(Small(), x).at(density)
    assert count == flops(compressed, x) == flops(compressed, x, density)
    rows = {row.name: row for row in count.layers}
    # A tied weight is as sparse under its second name as under its first.
    assert rows["b.weight"].density == rows["a.weight"].density == density["a.weight"] < 1
    assert metrics.distance(one.topologies, other.topologies) == 0
    bits = [metrics.model_bits([(w.shape, w.topology.nnz) for w in s.weights]) for s in (one, other)]
    assert bits[0] == bits[1] < metrics.model_bits([(w.shape, w.topology.numel) for w in one.weights])


def test_the_same_pass_at_other_densities() -> None:
    model, keys = nn.MultiheadAttention(8, 2, batch_first=True), torch.zeros(2, 5, 8)
    x = (torch.zeros(2, 3, 8), keys, keys)
    count = flops(model, x)
    once = count.at({"in_proj_weight[0]": 0.5})
    assert once == flops(model, x, {"in_proj_weight[0]": 0.5})
    assert once.at({"in_proj_weight[1]": 0.25}).layers[0].densities == (0.5, 0.25, 1.0)
    assert once.at({}) == once and once.dense == count.dense == count.sparse
    with pytest.raises(ValueError, match="names no weight"):
        count.at({"in_proj": 0.5})
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        count.at({"in_proj_weight": 1.5})


def test_counts_are_values() -> None:
    assert len({flops(nn.Linear(2, 2), torch.zeros(n, 2)) for n in (1, 3)}) == 1


def test_a_standalone_sparse_module_needs_no_densities() -> None:
    model = nn.Sequential(SparseConv2d(3, 8, 3, density=0.25, seed=0), nn.Flatten(), SparseLinear(72, 2, density=0.5))
    count = flops(model, torch.zeros(2, 3, 5, 5))
    assert count.sparse == 2 * 9 * 54 + 72 + 2 * 72 + 2
    assert [row.kind for row in count.layers] == ["Conv2d", "Linear"]
