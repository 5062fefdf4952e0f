"""What is sparsified, what is not and why, and how the entries of packed weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.core.method import Allocation, Method, Need
from regrow.core.names import canonical
from regrow.engine.discovery import find
from regrow.nn import Axes
from regrow.parts.allocation import erk, explicit, globally, uniform
from regrow.parts.schedules import constant
from regrow.parts.scores import magnitude
from regrow.parts.starts import by_score

Wanted = dict[str, tuple[int, int, int]]

MODULES: dict[str, tuple[Callable[[], nn.Module], Wanted]] = {
    "linear": (lambda: nn.Linear(6, 4), {"weight": (1, 0, 1)}),
    "bilinear": (lambda: nn.Bilinear(6, 5, 4), {"weight": (1, 0, 1)}),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), {"weight": (1, 0, 1)}),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3), {"weight": (1, 0, 1)}),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3), {"weight": (1, 0, 1)}),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), {"weight": (1, 0, 1)}),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 4, 3), {"weight": (1, 1, 0)}),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 4, 3), {"weight": (1, 1, 0)}),
    "transposed3d": (lambda: nn.ConvTranspose3d(6, 4, 3), {"weight": (1, 1, 0)}),
    "rnn": (lambda: nn.RNN(6, 4), {"weight_ih_l0": (1, 0, 1), "weight_hh_l0": (1, 0, 1)}),
    "gru": (lambda: nn.GRU(6, 4), {"weight_ih_l0": (3, 0, 1), "weight_hh_l0": (3, 0, 1)}),
    "lstm": (lambda: nn.LSTM(6, 4), {"weight_ih_l0": (4, 0, 1), "weight_hh_l0": (4, 0, 1)}),
    "projected lstm": (
        lambda: nn.LSTM(6, 4, proj_size=2),
        {"weight_ih_l0": (4, 0, 1), "weight_hh_l0": (4, 0, 1), "weight_hr_l0": (1, 0, 1)},
    ),
    "deep lstm": (
        lambda: nn.LSTM(6, 4, num_layers=2, bidirectional=True),
        {f"weight_{kind}_l{i}{back}": (4, 0, 1) for i in (0, 1) for back in ("", "_reverse") for kind in ("ih", "hh")},
    ),
    "no cell of torch's": (lambda: nn.RNNCellBase(6, 4, True, 3), {"weight_ih": (3, 0, 1), "weight_hh": (3, 0, 1)}),
    "no layer of torch's": (lambda: nn.RNNBase("GRU", 6, 4), {"weight_ih_l0": (3, 0, 1), "weight_hh_l0": (3, 0, 1)}),
    "rnn cell": (lambda: nn.RNNCell(6, 4), {"weight_ih": (1, 0, 1), "weight_hh": (1, 0, 1)}),
    "gru cell": (lambda: nn.GRUCell(6, 4), {"weight_ih": (3, 0, 1), "weight_hh": (3, 0, 1)}),
    "lstm cell": (lambda: nn.LSTMCell(6, 4), {"weight_ih": (4, 0, 1), "weight_hh": (4, 0, 1)}),
    "attention": (
        lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True),
        {"in_proj_weight": (3, 0, 1), "out_proj.weight": (1, 0, 1)},
    ),
    "cross attention": (
        lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=4),
        {f"{name}_proj{dot}weight": (1, 0, 1) for name, dot in (("q", "_"), ("k", "_"), ("v", "_"), ("out", "."))},
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_module_types(kind: str):
    """Property 13: weights alone, with their blocks and their output and input axes."""
    make, wanted = MODULES[kind]
    found, excluded = find(make())
    assert {f.name: (f.blocks, f.out_axis, f.in_axis) for f in found} == wanted
    assert not excluded
    assert all(f.parameter.shape[0] % f.blocks == 0 for f in found)


@pytest.mark.parametrize("kind", MODULES)
def test_subclasses_are_found_like_their_bases(kind: str):
    """Nothing is silently dense for having a class of its own."""
    module = MODULES[kind][0]()
    module.__class__ = type("Own", (type(module),), {})
    assert {f.name: (f.blocks, f.out_axis, f.in_axis) for f in find(module)[0]} == MODULES[kind][1]


def test_transformer_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    names = [f.name for f in find(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))[0]]
    parts = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert names == [f"layers.{i}.{part}" for i in (0, 1) for part in parts]


class Mixed(nn.Module):
    """A little of everything that stays dense, beside what does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.body = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.head = nn.Linear(8, 10, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 4))


UNKNOWN = 16
"""Entries of Mixed.scale, which count in the budget of the model."""

SIZES = {"stem": 216, "depthwise": 72, "body.0": 128, "body.1": 128, "head": 80}


def names(model: nn.Module, **options: Any) -> list[str]:
    return [f.name.removesuffix(".weight") for f in find(model, **options)[0]]


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {e.name.removesuffix(".weight"): e.reason for e in find(model, **options)[1]}


def test_what_stays_dense_by_default():
    """Properties 13 and 19: biases, norms, embeddings and depthwise convolutions, by type and not by name."""
    assert names(Mixed()) == ["stem", "body.0", "body.1", "head"]
    assert reasons(Mixed()) == {"depthwise": "depthwise", "embed": "embedding", "scale": "in an unknown Mixed"}


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_depthwise_convolutions(conv: Any):
    model = nn.ModuleList([conv(4, 4, 3, groups=4), conv(4, 8, 3, groups=4), conv(4, 4, 3, groups=2), conv(1, 4, 3)])
    assert names(model) == ["2", "3"]
    assert reasons(model) == {"0": "depthwise", "1": "depthwise"}


def test_frozen_weights():
    model = Mixed()
    model.body[0].weight.requires_grad_(False)
    assert names(model) == ["stem", "body.1", "head"]
    assert reasons(model)["body.0"] == "frozen"


def test_a_lazy_module_must_have_seen_a_batch():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        find(model)
    model(torch.randn(2, 3))
    assert names(model) == ["0"]


SELECTORS: dict[str, tuple[Any, list[str]]] = {
    "module name": ("body.0", ["body.0"]),
    "parameter name": ("body.0.weight", ["body.0"]),
    "glob": ("body.*", ["body.0", "body.1"]),
    "glob with classes": ("body.[!1]", ["body.0"]),
    "type": (nn.Linear, ["body.0", "body.1", "head"]),
    "predicate of the name": (lambda name, module: name == "head.weight", ["head"]),
    "predicate of the module": (lambda name, module: getattr(module, "in_features", 0) == 16, ["body.1"]),
    "list": (["head", nn.Conv2d], ["stem", "head"]),
    "tuple": (("head", "body.1"), ["body.1", "head"]),
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_selectors(kind: str):
    """Property 17."""
    selector, chosen = SELECTORS[kind]
    everything = ["stem", "body.0", "body.1", "head"]
    assert names(Mixed(), only=selector) == chosen
    assert names(Mixed(), skip=selector) == [n for n in everything if n not in chosen]
    assert {n for n, why in reasons(Mixed(), skip=selector).items() if why == "skipped"} >= set(chosen)
    rest = {n for n, why in reasons(Mixed(), only=selector).items() if why == "not among only="}
    assert rest == {*everything, "depthwise"} - set(chosen) - ({"depthwise"} if kind == "list" else set())


def test_what_no_row_knows_can_be_skipped_and_is_not_chosen():
    assert reasons(Mixed(), skip=["scale", nn.Embedding])["scale"] == "skipped"
    with pytest.raises(ValueError, match=r"'scale' in only= .*: stem\.weight.*; declare how it is read with also="):
        find(Mixed(), only="scale")


def test_every_matrix_is_accounted_for():
    """None is silently dense: each is sparsified or listed, once, also where a module is of no known type."""
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.self_attn = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    model = nn.ModuleDict({"mixed": Mixed(), "layer": layer, "norm": nn.LayerNorm((3, 4)), "lstm": nn.LSTM(6, 4)})
    model["again"] = model["mixed"].body
    model["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    found, excluded = find(model)
    told = [f.name for f in found] + [e.name for e in excluded]
    assert sorted(told) == sorted(set(told))
    matrices = {canonical(n) for n, p in model.named_parameters() if sum(size > 1 for size in p.shape) > 1}
    matrices -= {"normed.parametrizations.weight.original1"}
    assert set(told) == matrices | {"normed.weight"}
    assert {e.reason for e in excluded} == {
        "depthwise",
        "embedding",
        "norm",
        "in an unknown Mixed",
        "reparametrized",
    }


def test_a_parameter_of_an_unknown_module_is_declared():
    found, excluded = find(Mixed(), also={"sca*": Axes(outputs=1, inputs=0)})
    declared = {f.name: f for f in found}["scale"]
    assert (declared.blocks, declared.out_axis, declared.in_axis) == (1, 1, 0)
    assert "scale" not in {e.name for e in excluded}
    assert [h[1] for h in declared.holders] == ["scale"]


class Experts(nn.Module):
    """All experts of a layer in one parameter, as (experts, outputs, inputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        """x (experts, batch, inputs)."""
        return x @ self.up.mT


def test_stacked_experts_are_weights_of_their_own():
    model = Experts()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    method = methods.rigl(0.25, until=20, interval=2, allocate=uniform)
    sparsifier = sparsify(model, opt, method, also={"up": Axes(outputs=1, inputs=2, blocks=None)})
    before = {name: t.mask.clone() for name, t in sparsifier.topologies.items()}
    assert list(before) == ["up[0]", "up[1]", "up[2]"]
    for _ in range(4):
        model(torch.randn(3, 7, 5)).square().sum().backward()
        opt.step()
    for i, (name, topology) in enumerate(sparsifier.topologies.items()):
        assert (topology.nnz, topology.shape) == (10, (1, 8, 5))
        assert torch.equal(topology.mask[0], topology.mask[0] | (model.up[i] != 0))
        assert not torch.equal(topology.mask, before[name])


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ({"nowhere": Axes()}, "'nowhere' in also= matches no parameter that is not known already: scale, embed.weight"),
        ({"head.weight": Axes()}, "'head.weight' in also= matches no parameter"),
        ({"scale": Axes(0, 2)}, r"scale has shape \(4, 4\), .* axis 0 counts outputs and axis 2 inputs"),
        ({"scale": Axes(1, 1)}, "axis 1 counts outputs and axis 1 inputs"),
        ({"scale": Axes(0, 1, blocks=3)}, "3 blocks"),
        ({"scale": Axes(0, 1, blocks=None)}, "stacked"),
    ],
)
def test_a_declaration_that_does_not_fit_is_an_error(also: dict[str, Axes], message: str):
    with pytest.raises(ValueError, match=message):
        find(Mixed(), also=also)


def test_skip_wins_over_only():
    assert names(Mixed(), only="body.*", skip="body.1") == ["body.0"]


@pytest.mark.parametrize("option", ["skip", "only"])
@pytest.mark.parametrize("selector", ["bodies.*", "norm", nn.GRU, lambda name, module: False])
def test_a_selector_that_matches_nothing_is_an_error(selector: Any, option: str):
    """Property 48."""
    with pytest.raises(ValueError, match=r"matches none of the .*weights: stem\.weight, depthwise\.weight"):
        find(Mixed(), **{option: selector})
    with pytest.raises(ValueError, match="matches none"):
        find(Mixed(), **{option: ["stem", selector]})


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), {}),
        (nn.Conv2d(4, 4, 3, groups=4), {}),
        (nn.Linear(3, 4).requires_grad_(False), {}),
        (nn.Linear(3, 4), {"skip": nn.Linear}),
        (nn.Linear(3, 4), {"only": []}),
    ],
)
def test_nothing_to_sparsify_is_an_error(model: nn.Module, options: dict[str, Any]):
    """Property 48: never a silent dense run."""
    with pytest.raises(ValueError, match="nothing to sparsify"):
        find(model, **options)


# Names


class Wrapper(nn.Module):
    def __init__(self, attribute: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(attribute, inner)


def test_canonical_names_drop_the_prefixes_of_wrappers():
    assert canonical("module._orig_mod.layers.0.weight") == "layers.0.weight"
    assert canonical("layers.module_list.0.weight") == "layers.module_list.0.weight"
    assert canonical("modules.weight") == "modules.weight"


@pytest.mark.parametrize("prefixes", [["module"], ["_orig_mod"], ["module", "_orig_mod"], ["_orig_mod", "module"]])
def test_wrapped_models_get_the_same_topologies(prefixes: list[str]):
    """Property 14."""
    plain, inner = Mixed(), Mixed()
    wrapped: nn.Module = inner
    for prefix in prefixes:
        wrapped = Wrapper(prefix, wrapped)
    found = [
        sparsify(m, torch.optim.SGD(m.parameters(), lr=0.1), methods.static(0.3)).topologies for m in (plain, wrapped)
    ]
    assert found[0] == found[1]


def test_data_parallel_and_compiled_models():
    for wrapped in (nn.DataParallel(Mixed()), torch.compile(Mixed(), backend="eager")):
        assert names(wrapped) == names(Mixed())


class Inner(nn.Module):
    """A model of which one part is called `module`, beside another of the same name inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.module = nn.ModuleDict({"fc": nn.Linear(6, 6)})


def test_names_are_distinct():
    """Property 14: names key draws and saved topologies, so two weights of one name would share both."""
    model = Inner()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, methods.static(0.5, allocate=uniform))
    assert len(sparsifier.topologies) == 2
    first, second = sparsifier.topologies.values()
    assert first != second


# Tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def test_a_weight_shared_with_an_embedding_is_left_out():
    """Property 13."""
    assert names(Tied()) == ["body"]
    assert reasons(Tied()) == {"head": "shared with embed.weight"}


def test_a_weight_tied_between_two_linears_is_found_once():
    """Property 14."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert names(model) == ["0", "1"]


# Budgets


def nnz(model: nn.Module, density: float, allocate: Allocation = erk, **options: Any) -> int:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, methods.static(density, allocate=allocate), **options)
    assert sum(int(t.mask.sum()) for t in sparsifier.topologies.values()) == sparsifier.nnz
    return sparsifier.nnz


@pytest.mark.parametrize("density", [0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("skip", [[], ["stem"], ["head"]])
def test_budget_of_the_model(skip: list[str], density: float):
    """Property 17: active = round(density (S + E)) - E, with E the weights that stay dense."""
    outside = UNKNOWN + SIZES["depthwise"] + sum(SIZES[n] for n in skip)
    total = UNKNOWN + sum(SIZES.values())
    wanted = math.floor(density * total + 0.5) - outside
    if wanted < 0:
        with pytest.raises(ValueError, match=f"{outside / total:.6g}"):
            nnz(Mixed(), density, skip=skip, budget="model")
    else:
        assert nnz(Mixed(), density, skip=skip, budget="model") == wanted
    assert nnz(Mixed(), density, skip=skip) == math.floor(density * (total - outside) + 0.5)


def test_an_infeasible_budget_names_the_numbers():
    """Property 16."""
    with pytest.raises(ValueError, match=r"(?s)0\.1 of 640.*304.*336.*0\.475"):
        nnz(Mixed(), 0.1, skip=["stem"], budget="model")


def test_frozen_weights_count_in_the_budget_of_the_model():
    model = Mixed()
    model.head.weight.requires_grad_(False)
    assert nnz(model, 0.5, budget="model") == 320 - UNKNOWN - 72 - 80


@pytest.mark.parametrize("options", [{}, {"skip": "head"}, {"only": "body"}])
def test_a_shared_embedding_never_counts_in_the_budget(options: dict[str, Any]):
    """Property 13: however it came to be left out."""
    assert nnz(Tied(), 0.5, budget="model", **options) == 32


# Packed weights


def attention(packed: bool) -> nn.MultiheadAttention:
    """Attention whose three projections are one parameter or three, computed by the same function."""
    torch.manual_seed(5)
    module = nn.MultiheadAttention(8, 2, batch_first=True).double()
    nn.init.normal_(module.in_proj_bias)
    if not packed:
        parts = module.in_proj_weight.detach().chunk(3)
        module._qkv_same_embed_dim = False
        module.in_proj_weight = None
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight = (nn.Parameter(p.clone()) for p in parts)
    return module


PACKED = ["in_proj_weight[0]", "in_proj_weight[1]", "in_proj_weight[2]", "out_proj.weight"]
SEPARATE = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def rigl_from(allocate: Allocation, **options: Any) -> Method:
    method = methods.rigl(0.4, until=12, interval=2, anneal=constant, **options)
    return method._replace(start=by_score(0.4, magnitude, allocate), needs=method.needs | Need.EXPLORED)


@pytest.mark.parametrize("timing", ["instead", "after"])
@pytest.mark.parametrize("allocate", [erk, uniform, globally])
def test_packed_attention_gets_the_topologies_of_separate_projections(allocate: Allocation, timing: str):
    """Decided block by block: the same network has the same topology however it is packed."""
    logs = []
    for packed, wanted in ((True, PACKED), (False, SEPARATE)):
        model = attention(packed)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier = sparsify(model, opt, rigl_from(allocate, timing=timing))
        assert list(sparsifier.topologies) in (wanted, [wanted[-1], *wanted[:-1]])
        log = []
        for step in range(1, 11):
            x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            opt.zero_grad()
            model(x, x, x)[0].square().mean().backward()
            opt.step()
            log.append([sparsifier.topologies[name] for name in wanted])
        assert sparsifier.updates == 5
        logs.append(log)
    assert logs[0] == logs[1]
    assert logs[0][0] != logs[0][-1]


def run_lstm(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 3, 6))[0]


GATED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int]] = {
    "gru": (lambda: nn.GRU(6, 5), run_lstm, 3),
    "lstm": (lambda: nn.LSTM(6, 5), run_lstm, 4),
    "gru cell": (lambda: nn.GRUCell(6, 5), lambda m: m(torch.randn(3, 6)), 3),
    "lstm cell": (lambda: nn.LSTMCell(6, 5), lambda m: m(torch.randn(3, 6))[0], 4),
}


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("kind", GATED)
def test_drop_and_grow_stay_within_a_gate(kind: str, method: str):
    """Property 1, gate by gate; the weights are read as rows of the parameter itself."""
    make, forward, blocks = GATED[kind]
    model = make()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recipe = {"rigl": methods.rigl, "set": methods.set_}[method]
    sparsifier = sparsify(model, opt, recipe(0.3, until=20, interval=2, allocate=uniform))
    packed = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert len(sparsifier.topologies) == 2 * blocks
    start = sparsifier.topologies
    for _ in range(15):
        opt.zero_grad()
        forward(model).square().mean().backward()
        opt.step()
        for name, parameter in packed.items():
            for i, block in enumerate(parameter.detach().chunk(blocks)):
                topology = sparsifier.topologies[f"{name}[{i}]"]
                assert topology.nnz == start[f"{name}[{i}]"].nnz
                assert not block[~topology.mask].any()
    assert any(sparsifier.topologies[name] != start[name] for name in start)


def test_gates_draw_different_random_topologies():
    model = nn.LSTM(20, 20)
    sparsifier = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), methods.static(0.3, allocate=uniform))
    found = [t.indices.tolist() for t in sparsifier.topologies.values()]
    assert len({tuple(f) for f in found}) == 8


def test_an_explicit_allocation_may_name_a_block():
    """As the table prints it, though as a glob that would be a class of characters."""
    model = attention(True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, methods.static(0.5, allocate=explicit({"in_proj_weight[1]": 1.0}, rest=uniform)))
    assert sparsifier.topologies["in_proj_weight[1]"].is_dense
    assert {t.nnz for n, t in sparsifier.topologies.items() if n != "in_proj_weight[1]"} <= {21, 22}


def test_transposed_convolutions_read_their_axes():
    """Erdos-Renyi density counts the outputs and inputs of a transposed convolution the right way round."""
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(6, 4, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, methods.static(0.3, allocate=erk))
    assert {t.nnz for t in sparsifier.topologies.values()} == {65}
    first, second = sparsifier.weights
    assert (first.shape[first.out_axis], first.shape[first.in_axis]) == (4, 6)
    assert (second.shape[second.out_axis], second.shape[second.in_axis]) == (4, 6)


def test_reparametrized_weights_are_listed_and_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4))
    found, excluded = find(model)
    assert [f.name for f in found] == ["1.weight"]
    assert [(e.name, e.numel, e.reason) for e in excluded] == [("0.weight", 30, "reparametrized")]


def test_a_model_is_not_sparsified_twice():
    model = nn.Linear(6, 6)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    first = sparsify(model, opt, methods.static(0.5))
    with pytest.raises(ValueError, match=r"weight is already sparsified by static: call remove\(\)"):
        sparsify(model, opt, methods.static(0.5))
    first.remove()
    assert sparsify(model, opt, methods.static(0.5)).nnz == 18


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_under_old_style_hooks_are_listed():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 4), nn.Linear(4, 0))
    found, excluded = find(model)
    assert [f.name for f in found] == ["1.weight"]
    assert {(e.name, e.reason) for e in excluded} == {("0.weight", "reparametrized"), ("2.weight", "empty")}
