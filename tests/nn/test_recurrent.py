"""Sparse recurrent modules do what torch's do with the same zeros."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from regrow.nn import SparseGRU, SparseLSTM, SparseLSTMCell, SparseModule, SparseRNN, SparseRNNCell
from support.twins import assert_equal, sparsified

LAYERS = [nn.RNN, nn.GRU, nn.LSTM]
CELLS = [nn.RNNCell, nn.GRUCell, nn.LSTMCell]
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True, "bias": False},
]
KINDS = [(cls, options) for cls in LAYERS for options in OPTIONS]
KINDS += [(nn.RNN, {"nonlinearity": "relu", "num_layers": 2})]
KINDS += [(nn.LSTM, {"proj_size": 3, **options}) for options in OPTIONS]


def label(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else repr(value)


def make(cls: type[nn.Module], **options: Any) -> nn.Module:
    return cls(5, 4, **options).double()


def first_state(layer: nn.Module, *batch: int) -> Any:
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(layers, *batch, layer.proj_size or 4, dtype=torch.float64)
    return (h, torch.randn(layers, *batch, 4, dtype=torch.float64)) if isinstance(layer, nn.LSTM) else h


def ragged(*lengths: int) -> list[Tensor]:
    return [torch.randn(n, 5, dtype=torch.float64) for n in lengths]


@pytest.mark.parametrize(("cls", "options"), KINDS, ids=label)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_layers_equal_dense_ones(cls: type[nn.Module], options: dict[str, Any], density: float) -> None:
    dense = make(cls, **options)
    sparse = sparsified(dense, density, room=2)
    assert set(sparse.shapes) == {name for name, _ in dense.named_parameters() if name.startswith("weight")}
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    batch = x.shape[0 if dense.batch_first else 1]
    assert_equal(sparse, dense, x)
    assert_equal(sparse, dense, x, first_state(dense, batch))
    assert_equal(sparse, dense, x[0], first_state(dense))
    assert_equal(sparse, dense, x[:1, :1])
    got, expected = sparse(x)[0], dense(x)[0]
    assert got.shape == expected.shape and got.dtype == expected.dtype


@pytest.mark.parametrize(("cls", "options"), KINDS, ids=label)
@pytest.mark.parametrize("lengths", [(2, 6, 1, 6, 3), (5, 5), (4,), (6, 3, 1)], ids=str)
def test_packed_sequences(cls: type[nn.Module], options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    dense = make(cls, **options)
    sparse = sparsified(dense, 0.5)
    packed = pack_sequence(ragged(*lengths), enforce_sorted=False)
    state = first_state(dense, len(lengths))
    assert_equal(sparse, dense, packed, state)
    assert_equal(sparse, dense, packed)
    got, expected = sparse(packed, state)[0], dense(packed, state)[0]
    assert isinstance(got, PackedSequence)
    assert got.data.shape == expected.data.shape
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


def test_packed_sequences_that_are_sorted_already() -> None:
    dense = make(nn.LSTM, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([4, 3, 1]))
    assert packed.sorted_indices is None
    assert_equal(sparsified(dense, 0.5), dense, packed, first_state(dense, 3))


@pytest.mark.parametrize("cls", LAYERS, ids=label)
def test_some_weights_may_be_dense(cls: type[nn.Module]) -> None:
    dense = make(cls, num_layers=2)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for names in (["weight_hh_l1"], ["weight_ih_l0", "weight_hh_l0"], []):
        sparse = sparsified(dense, 0.5, names)
        assert list(sparse.shapes) == names
        assert_equal(sparse, dense, x)


@pytest.mark.parametrize("cls", LAYERS, ids=label)
def test_dropout_between_layers_draws_what_torch_draws(cls: type[nn.Module]) -> None:
    dense = make(cls, num_layers=3, dropout=0.5)
    sparse = sparsified(dense, 0.7)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    assert_equal(sparse, dense, x)
    trained = sparse(x)[0]
    assert_equal(sparse.eval(), dense.eval(), x)
    assert not torch.equal(trained, sparse(x)[0])


@pytest.mark.parametrize("cls", LAYERS, ids=label)
def test_an_empty_batch(cls: type[nn.Module]) -> None:
    dense = make(cls, bidirectional=True)
    got, expected = (m(torch.zeros(3, 0, 5, dtype=torch.float64))[0] for m in (sparsified(dense, 0.5), dense))
    assert got.shape == expected.shape


@pytest.mark.parametrize("cls", CELLS, ids=label)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_equal_dense_ones(cls: type[nn.Module], bias: bool) -> None:
    for options in [{}, {"nonlinearity": "relu"}] if cls is nn.RNNCell else [{}]:
        dense = make(cls, bias=bias, **options)
        x = torch.randn(3, 5, dtype=torch.float64)
        h = tuple(torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
        hx = h if cls is nn.LSTMCell else h[0]
        for names in (None, ["weight_hh"]):
            sparse = sparsified(dense, 0.5, names)
            assert_equal(sparse, dense, x)
            assert_equal(sparse, dense, x, hx)
            assert_equal(sparse, dense, x[0], tuple(s[0] for s in h) if cls is nn.LSTMCell else h[0][0])
            assert_equal(sparse, dense, x[0])


def test_the_input_product_is_done_once_per_layer_and_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = SparseLSTM(5, 4, num_layers=2, bidirectional=True, density=0.5, seed=0)
    calls: list[str] = []
    product = SparseModule.product

    def counted(self: SparseModule, name: str, *args: Any, **options: Any) -> Tensor:
        calls.append(name)
        return product(self, name, *args, **options)

    monkeypatch.setattr(SparseModule, "product", counted)
    sparse(torch.randn(6, 3, 5))
    assert sum("ih" in name for name in calls) == 4
    assert sum("hh" in name for name in calls) == 4 * 6


@pytest.mark.parametrize("cls", LAYERS, ids=label)
def test_torchs_own_lists_of_parameters(cls: type[nn.Module]) -> None:
    """They come back whole, and meanwhile hold no dense parameter."""
    dense = make(cls, num_layers=2, bidirectional=True)
    parameter = dense.weight_hh_l0
    sparse = sparsified(dense, 0.5)
    assert not [name for name in vars(sparse) if "flat_weight" in name or "all_weights" in name]
    assert not any("flat" in key for key in sparse.state_dict())
    sparse.flatten_parameters()
    twin = cls(5, 4).double()
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(twin.weight_hh_l0, nn.Parameter(torch.zeros(3)))
    back = sparse.to_dense()
    assert type(back) is cls
    assert back.all_weights[0][1] is back.weight_hh_l0
    assert back._flat_weights_names == dense._flat_weights_names
    assert back._all_weights == dense._all_weights
    assert torch.equal(back.weight_hh_l0, parameter)
    back.float().double().flatten_parameters()
    assert_equal(sparse, back, torch.randn(3, 2, 5, dtype=torch.float64))
    adopted = type(sparse).adopt(twin, {})
    torch.utils.swap_tensors(adopted.weight_hh_l0, nn.Parameter(torch.zeros(3)))
    assert adopted.weight_hh_l0.shape == (3,)


@pytest.mark.parametrize("proj_size", [0, 3])
def test_constructors_take_what_torch_takes(proj_size: int) -> None:
    dense = nn.LSTM(50, 40, 2, True, True, 0.1, True, proj_size).double()
    options = {"density": 0.1, "seed": 3, "dtype": torch.float64}
    sparse = SparseLSTM(50, 40, 2, True, True, 0.1, True, proj_size, **options)
    assert [name for name, _ in sparse.named_parameters()] == [name for name, _ in dense.named_parameters()]
    for name, shape in sparse.shapes.items():
        assert shape == getattr(dense, name).shape
        assert sparse.topology(name).nnz == round(0.1 * getattr(dense, name).numel())
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    again = SparseLSTM(50, 40, 2, True, True, 0.1, True, proj_size, **options).eval()
    assert torch.equal(sparse.eval()(x)[0], again(x)[0])
    sparse.to_dense().load_state_dict(dense.state_dict())
    torch.testing.assert_close(sparse(x)[0], sparse.to_dense()(x)[0])
    assert repr(sparse).startswith("SparseLSTM(50, 40")
    assert "weight_hh_l1_reverse: " in repr(sparse)


def test_constructors_of_the_others() -> None:
    rnn = SparseRNN(5, 4, 1, "relu", density=0.5, dtype=torch.float64)
    assert rnn.mode == "RNN_RELU"
    assert rnn.weight_ih_l0.dtype == torch.float64
    cell = SparseRNNCell(5, 4, nonlinearity="relu", density=0.5)
    assert cell.to_dense().nonlinearity == "relu"
    assert SparseLSTMCell(5, 4, False, density=1).bias_ih is None


@pytest.mark.parametrize("cls", [SparseGRU, SparseLSTMCell], ids=label)
def test_values_are_drawn_as_torch_draws_them(cls: type[SparseModule]) -> None:
    sparse = cls(300, 100, density=0.5, seed=0)
    for _, parameter in sparse.named_parameters():
        assert parameter.abs().max() <= 0.1
        assert parameter.abs().max() > 0.098
        assert abs(parameter.std().item() - 0.1 / 3**0.5) < 0.004


def test_no_draws_from_the_global_generator_with_a_seed() -> None:
    before = torch.get_rng_state()
    SparseGRU(5, 4, density=0.5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cls", LAYERS, ids=label)
def test_second_derivatives(cls: type[nn.Module]) -> None:
    sparse = sparsified(cls(2, 2).double(), 0.6)
    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    values = [p for name, p in sparse.named_parameters() if name in sparse.shapes]
    assert torch.autograd.gradgradcheck(lambda *a: sparse(a[0])[0], (x, *values))


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS], ids=label)
def test_compiles_to_one_graph(cls: type[nn.Module]) -> None:
    sparse = sparsified(cls(5, 4), 0.5)
    x = torch.randn(*([3] if cls in LAYERS else []), 2, 5)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for got, expected in itertools.zip_longest(*(map(_flat, (compiled(x), sparse(x))))):
        torch.testing.assert_close(got, expected)


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in _flat(v)]


def test_errors_say_what_is_wrong() -> None:
    gru, lstm = SparseGRU(5, 4, density=0.5), SparseLSTM(5, 4, batch_first=True, density=0.5)
    with pytest.raises(ValueError, match="the input has 6 features, this SparseGRU takes 5"):
        gru(torch.zeros(3, 2, 6))
    with pytest.raises(ValueError, match=r"the input is torch.float64 and this SparseGRU torch.float32"):
        gru(torch.zeros(3, 2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \(5,\), .* \(time, batch, features\)"):
        gru(torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape \(0, 2, 5\), .* takes one step or more"):
        gru(torch.zeros(0, 2, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 0, 5\), .* \(batch, time, features\)"):
        lstm(torch.zeros(2, 0, 5))
    with pytest.raises(ValueError, match=r"for a batch of 2 is \(1, 2, 4\), got \(1, 3, 4\)"):
        gru(torch.zeros(3, 2, 5), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"is \(1, 3, 4\), \(1, 3, 4\), got \(1, 3, 4\)"):
        lstm(torch.zeros(3, 2, 5), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"without batch is \(layers, features\), got \(1, 1, 4\)"):
        gru(torch.zeros(3, 5), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got 2"):
        SparseGRU(5, 4, density=2)
    cell = SparseRNNCell(5, 4, density=0.5)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 5\), this SparseRNNCell takes"):
        cell(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"is \(2, 4\), got \(3, 4\)"):
        cell(torch.zeros(2, 5), torch.zeros(3, 4))
