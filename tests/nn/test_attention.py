"""Sparse attention does what torch's does with the same zeros, alone and within torch's transformer layers."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.core.draws import Stream
from regrow.nn import SparseLinear, SparseModule, SparseMultiheadAttention, from_dense, leave_fast_path
from support.twins import assert_equal, sparsified

E = 6
OPTIONS = [
    {},
    {"batch_first": True, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 5, "vdim": 4},
    {"kdim": 5, "vdim": 4, "bias": False, "batch_first": True, "add_bias_kv": True},
    {"vdim": 4, "add_zero_attn": True, "batch_first": True},
]
PACKED = [o for o in OPTIONS if not {"kdim", "vdim"} & set(o)]


def label(value: Any) -> str:
    return ("-".join(f"{k}={v}" for k, v in value.items()) or "plain") if isinstance(value, dict) else repr(value)


def make(heads: int = 2, **options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, heads, **options).double()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def inputs(module: nn.MultiheadAttention, batch: int | None = 3) -> list[Tensor]:
    """Query of 4 positions, key and value of 5."""
    shapes = [(4, module.embed_dim), (5, module.kdim), (5, module.vdim)]
    if batch is None:
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    sizes = [(batch, n, f) if module.batch_first else (n, batch, f) for n, f in shapes]
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def both_projections(dense: nn.Module, density: float, room: int = 0) -> SparseModule:
    """The input projections sparse, and those of the output too."""
    out = sparsified(dense.out_proj, density)
    sparse = sparsified(dense, density, room=room)
    sparse.out_proj = out
    return sparse


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_equals_the_dense_one(options: dict[str, Any], density: float) -> None:
    dense = make(**options)
    sparse = both_projections(dense, density, room=3)
    assert set(sparse.shapes) == {n for n, _ in dense.named_parameters() if n.endswith("proj_weight")}
    for need_weights, average in [(True, True), (True, False), (False, True)]:
        flags = {"need_weights": need_weights, "average_attn_weights": average}
        assert_equal(sparse, dense, *inputs(dense), **flags)
        assert_equal(sparse, dense, *inputs(dense, None), **flags)
        assert_equal(sparse, dense, *inputs(dense, 1), **flags)
    for batch in (3, None):
        ours, theirs = (m(*inputs(dense, batch)) for m in (sparse, dense))
        assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert sparse(*inputs(dense), need_weights=False)[1] is None


@pytest.mark.parametrize("options", PACKED, ids=label)
@pytest.mark.parametrize("same", ["qkv", "kv", "qk", "qv", ""])
def test_inputs_that_are_one_tensor(options: dict[str, Any], same: str) -> None:
    dense = make(**options)
    sparse = both_projections(dense, 0.4, room=2)
    tensors = {name: torch.randn(4, 4, E, dtype=torch.float64) for name in "qkv"}
    tensors |= {name: tensors[same[0]] for name in same}
    assert_equal(sparse, dense, *tensors.values())
    assert_equal(sparse, dense, *tensors.values(), need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_masks(options: dict[str, Any], need_weights: bool) -> None:
    dense = make(**options)
    sparse = both_projections(dense, 0.5)
    for batch in (3, None):
        padding = torch.zeros(*([3] if batch else []), 5, dtype=torch.bool)
        padding[..., -2:] = True
        per_head = torch.randn((batch or 1) * 2, 4, 5, dtype=torch.float64)
        causal = torch.ones(4, 5).triu(1).bool()
        for attn_mask, key_padding_mask in [
            (causal, None),
            (None, padding),
            (causal, padding),
            (per_head > 1, padding),
            (per_head, None),
            (per_head[0], torch.zeros_like(padding, dtype=torch.float64).masked_fill(padding, -math.inf)),
        ]:
            masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
            assert_equal(sparse, dense, *inputs(dense, batch), **masks, need_weights=need_weights)
        for hint in ({"attn_mask": causal}, {"attn_mask": causal, "key_padding_mask": padding}):
            flags = {**hint, "is_causal": True, "need_weights": need_weights}
            assert_equal(sparse, dense, *inputs(dense, batch), **flags)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_torch_draws(need_weights: bool) -> None:
    dense = make(dropout=0.5)
    sparse = both_projections(dense, 0.5)
    x = inputs(dense)
    assert_equal(sparse, dense, *x, need_weights=need_weights)
    dropped = sparse(*x)[0]
    assert_equal(sparse.eval(), dense.eval(), *x, need_weights=need_weights)
    assert not torch.equal(dropped, sparse(*x)[0])


def test_some_weights_may_be_dense() -> None:
    dense = make(kdim=5, vdim=4)
    sparse = sparsified(dense, 0.5, ["k_proj_weight"])
    assert_equal(sparse, dense, *inputs(dense))
    dense = make()
    sparse = sparsified(dense, 0.5, [])
    sparse.out_proj = sparsified(dense.out_proj, 0.5)
    assert_equal(sparse, dense, *inputs(dense))
    x = inputs(dense)[0]
    assert_equal(sparse, dense, x, x, x)


@pytest.mark.parametrize(
    ("same", "rows"),
    [("qkv", [18]), ("kv", [6, 12]), ("qk", [12, 6]), ("", [6, 6, 6])],
    ids=["qkv", "kv", "qk", "none"],
)
def test_each_input_takes_only_its_rows(same: str, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = sparsified(make(), 0.5)
    tensors = {name: torch.randn(4, 3, E, dtype=torch.float64) for name in "qkv"}
    tensors |= {name: tensors[same[0]] for name in same}
    seen: list[int] = []
    linear = kernels.linear

    def watched(x: Tensor, values: Tensor, bias: Tensor | None, index: kernels.Index, **options: Any) -> Tensor:
        seen.append(index.rows)
        return linear(x, values, bias, index, **options)

    monkeypatch.setattr(kernels, "linear", watched)
    sparse(*tensors.values())
    assert seen == rows
    seen.clear()
    sparsified(make(), 1.0)(*tensors.values())
    assert not seen, "a block without zeros is a dense product"


def test_a_keeper_sees_every_row() -> None:
    """The gradient at every position of the packed weight, from what its products leave behind."""
    dense = make()
    sparse = sparsified(dense, 0.4)
    keeper = kernels.Keeper(lambda n: None)
    sparse.keys["in_proj_weight"] = keeper.key
    x = inputs(dense)
    assert_equal(sparse, dense, *x)
    torch.testing.assert_close(keeper.rows(0, 3 * E, E), dense.in_proj_weight.grad)


def test_to_dense_and_back() -> None:
    dense = make()
    sparse = both_projections(dense, 0.4)
    back = sparse.to_dense()
    assert type(back) is nn.MultiheadAttention
    assert type(back.out_proj) is type(dense.out_proj)
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert isinstance(sparse.out_proj, SparseLinear)


@pytest.mark.parametrize("kdim", [None, 200])
def test_values_are_drawn_as_torch_draws_them(kdim: int | None) -> None:
    dense = nn.MultiheadAttention(100, 2, add_bias_kv=True, kdim=kdim)
    sparse = from_dense(dense)
    for name, parameter in dense.named_parameters(recurse=False):
        drawn = sparse.initial(name)(Stream(0, name, 0), 100_000)
        if name == "in_proj_bias":
            assert not drawn.any() and not parameter.any()
        elif name in ("bias_k", "bias_v"):
            # Xavier: variance 2 / (fan_in + fan_out), of which torch takes both as 100.
            assert abs(drawn.std().item() - 0.1) < 0.002
            assert abs(parameter.std().item() - 0.1) < 0.025
        else:
            assert abs(drawn.abs().max().item() / parameter.abs().max().item() - 1) < 0.002


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 4}], ids=label)
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    dense = make(**options)
    sparse = both_projections(dense, 0.5)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = inputs(dense)
    for case, need_weights in [(x, False)] if options else [(x, True), ([x[0]] * 3, False)]:
        ours, theirs = (m(*case, need_weights=need_weights) for m in (compiled, dense))
        torch.testing.assert_close(ours[0], theirs[0])
        sparse.zero_grad()
        dense.zero_grad()
        ours[0].square().sum().backward()
        theirs[0].square().sum().backward()
        torch.testing.assert_close(sparse.out_proj.bias.grad, dense.out_proj.bias.grad)
        for name, shape in sparse.shapes.items():
            at = sparse.topology(name)
            assert shape == at.shape
            expected = getattr(dense, name).grad.view(-1)[at.indices]
            torch.testing.assert_close(getattr(sparse, name).grad, expected)


def transformer(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, 2, 8, dropout=0.0, batch_first=True, **options)
    nested = not options.get("norm_first", False)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double()
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    return encoder


def convert(model: nn.Module, kinds: tuple[type[nn.Module], ...], last: bool = False) -> nn.Module:
    """A copy of a dense `model` in which modules of `kinds` (of its last layer only) are sparse, zeros in both."""
    places = [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
    twin = copy.deepcopy(model)
    for path, dense in places:
        if not last or path.startswith("layers.1"):
            sparse = sparsified(dense, 0.5)
            if hasattr(sparse, "out_proj"):
                sparse.out_proj = twin.get_submodule(path).out_proj
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, sparse)
    leave_fast_path(twin)
    return twin


# nn.Linear includes attention's output projection, which is visited after the attention. Dense, nested tensors warn.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kinds", [(nn.MultiheadAttention,), (nn.Linear,), (nn.MultiheadAttention, nn.Linear)], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=label)
def test_transformers_in_evaluation(kinds: Any, last: bool, options: dict[str, Any]) -> None:
    dense = transformer(**options)
    sparse = convert(dense, kinds, last)
    x = torch.randn(3, 5, E, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2, 1:] = True
    causal = torch.ones(5, 5).triu(1).bool()
    for mode, gradients in itertools.product((True, False), repeat=2):
        dense.train(mode)
        sparse.train(mode)
        with torch.set_grad_enabled(gradients), pytest.MonkeyPatch.context() as patch:
            if not gradients and not mode and not last:
                # Torch's own fast path must not be taken, as it would read values as if they were dense.
                patch.setattr(torch, "_transformer_encoder_layer_fwd", None)
                patch.setattr(torch, "_native_multi_head_attention", None)
            ours = [
                sparse(x),
                sparse(x, mask=causal),
                sparse(x, src_key_padding_mask=padding)[~padding],
                sparse(x, mask=causal, src_key_padding_mask=padding)[~padding],
            ]
        with torch.set_grad_enabled(gradients):
            theirs = [
                dense(x),
                dense(x, mask=causal),
                dense(x, src_key_padding_mask=padding)[~padding],
                dense(x, mask=causal, src_key_padding_mask=padding)[~padding],
            ]
        torch.testing.assert_close(ours, theirs)


def test_padded_positions_hold_in_evaluation_what_they_hold_in_training() -> None:
    sparse = convert(transformer(), (nn.Linear,))
    x, padding = torch.randn(2, 4, E, dtype=torch.float64), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        torch.testing.assert_close(
            sparse.eval()(x, src_key_padding_mask=padding), sparse.train()(x, src_key_padding_mask=padding)
        )


def test_a_whole_transformer() -> None:
    dense = nn.Transformer(E, 2, 2, 2, 8, dropout=0.0, batch_first=True).double().eval()
    sparse = convert(dense, (nn.MultiheadAttention, nn.Linear))
    source, target = torch.randn(2, 5, E, dtype=torch.float64), torch.randn(2, 4, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (m(source, target, tgt_mask=causal, tgt_is_causal=True) for m in (sparse, dense))
    torch.testing.assert_close(ours, theirs)


def test_what_is_dense_keeps_its_fast_path() -> None:
    model = nn.ModuleList([transformer(), transformer()])
    model[1].layers[1].linear1 = SparseLinear(E, 8, density=0.5, dtype=torch.float64)
    leave_fast_path(model)
    leave_fast_path(model)
    assert [layer.activation_relu_or_gelu for encoder in model for layer in encoder.layers] == [1, 1, 1, 0]
    assert [encoder.use_nested_tensor for encoder in model] == [True, False]
    assert all(type(layer.self_attn) is nn.MultiheadAttention for encoder in model for layer in encoder.layers)


def test_attention_with_a_sparse_output_projection_calls_it() -> None:
    dense = make()
    sparse = copy.deepcopy(dense)
    sparse.out_proj = sparsified(dense.out_proj, 0.5)
    leave_fast_path(sparse)
    assert type(sparse) is SparseMultiheadAttention
    assert not sparse.shapes
    assert_equal(sparse, dense, *inputs(dense))
    assert type(sparse.to_dense()) is nn.MultiheadAttention


def test_errors_say_what_is_wrong() -> None:
    sparse = sparsified(nn.MultiheadAttention(E, 2, kdim=5), 0.5)
    q, k, v = torch.zeros(4, 2, 6), torch.zeros(5, 2, 5), torch.zeros(5, 2, 6)
    with pytest.raises(ValueError, match="and 6, 5, 6 features"):
        sparse(q, q, v)
    with pytest.raises(ValueError, match=r"of shapes \(4, 2, 6\), \(5, 2, 5\), \(4, 2, 6\), must all have"):
        sparse(q, k, q)
    with pytest.raises(ValueError, match="must all have the same batch or none"):
        sparse(q, k[:, 0], v[:, 0])
    with pytest.raises(ValueError, match="must all have the same batch or none"):
        sparse(q[:, :1], k, v)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(4, 5\) or \(4, 4, 5\), got \(5, 4\)"):
        sparse(q, k, v, attn_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 5\), got \(5, 2\)"):
        sparse(q, k, v, key_padding_mask=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="attn_mask is needed too"):
        sparse(q, k, v, is_causal=True)
