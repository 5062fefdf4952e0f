"""Sparse recurrent modules: layers that run over whole sequences, and cells that do one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from regrow.nn.base import Draw, Init, SparseModule, uniform

State = tuple[Tensor, ...]
"""(h,), or (h, c) in an LSTM."""

Step = Callable[[Tensor, Tensor, State], State]
"""One step of a recurrence: (W_ih x + b_ih, W_hh h + b_hh, the state before) -> the state after."""


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    x_reset, x_update, x_new = x.chunk(3, 1)
    h_reset, h_update, h_new = h.chunk(3, 1)
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return (new + (x_update + h_update).sigmoid() * (state[0] - new),)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    write, forget, new, out = (x + h).chunk(4, 1)
    c = forget.sigmoid() * state[1] + write.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


_STEPS: dict[str, Step] = {"RNN_TANH": _tanh, "RNN_RELU": _relu, "GRU": _gru, "LSTM": _lstm}
"""By the `mode` of torch's modules."""

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
"""Parameters of one direction of one layer, in torch's order."""


class _SparseRecurrent(SparseModule):
    """What layers and cells share; each of their weights may be sparse, or dense where `shapes` does not have it."""

    mode: str
    input_size: int
    hidden_size: int
    bias: bool

    def initial(self, name: str) -> Draw:
        """As torch draws every parameter of a recurrent module: U(-1 / sqrt(hidden_size), 1 / sqrt(hidden_size))."""
        return uniform(1 / math.sqrt(self.hidden_size))

    def _linear(self, name: str, x: Tensor, bias: str | None = None) -> Tensor:
        """x W^T + b with a weight, sparse or dense, and a bias, both by name."""
        b = getattr(self, bias) if bias is not None and self.bias else None
        return self.product(name, x, b)

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        kind = type(self).__name__
        if x.shape[-1] != self.input_size:
            raise ValueError(f"the input has {x.shape[-1]:,} features, this {kind} takes {self.input_size:,}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"the input is {x.dtype} and this {kind} {weight.dtype}: convert one with .to()")


class _SparseRNNBase(_SparseRecurrent):
    """What the layers share: every option of `nn.RNNBase`."""

    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    weight_ih_l0: nn.Parameter

    def _begin(self) -> None:
        super()._begin()
        # Torch keeps the parameters a second time in lists of its own, which would keep the dense ones alive.
        for name in ("_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights"):
            vars(self).pop(name, None)

    def to_dense(self) -> nn.Module:
        """A dense copy, with zeros where nothing is active."""
        module = cast(Any, super().to_dense())
        names = [[f"{kind}_{suffix}" for kind in _KINDS] for suffix in self._suffixes()]
        module._all_weights = [[name for name in layer if hasattr(module, name)] for layer in names]
        module._flat_weights_names = [name for layer in module._all_weights for name in layer]
        module._init_flat_weights()
        return cast(nn.Module, module)

    def flatten_parameters(self) -> None:
        """Nothing: sparse weights need not lie in one piece; for models that call it."""

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | State | None = None) -> tuple[Any, Any]:
        """As the dense module: (output, h_n), and (output, (h_n, c_n)) in an LSTM."""
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            sizes = batch_sizes.tolist()
            y, last = self._run(x, sizes, self._first(hx, x, sizes[0], order))
            return PackedSequence(y, batch_sizes, order, back), self._last(last, back)
        batched = input.dim() == 3
        x = input.transpose(0, 1) if batched and self.batch_first else input
        if input.dim() not in (2, 3) or not len(x):
            raise ValueError(
                f"the input has shape {tuple(input.shape)}, this {type(self).__name__} takes one step or more as "
                f"{'(batch, time, features)' if self.batch_first else '(time, batch, features)'} or (time, features)"
            )
        if not batched:
            x, hx = x[:, None], self._unbatched(hx)
        length, batch = x.shape[:2]
        # A padded sequence is a packed one all of whose steps are equally large.
        flat = x.reshape(length * batch, x.shape[2])
        y, last = self._run(flat, [batch] * length, self._first(hx, flat, batch, None))
        y = y.view(length, batch, y.shape[1])
        if not batched:
            return y[:, 0], self._last(tuple(s[:, 0] for s in last), None)
        return y.transpose(0, 1) if self.batch_first else y, self._last(last, None)

    def _suffixes(self) -> list[str]:
        """What the names of each layer's parameters end in; both directions of a layer are neighbours."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _unbatched(self, hx: Tensor | State | None) -> State | None:
        """The state given with an input without batch, with a batch of one."""
        given = (hx,) if isinstance(hx, Tensor) else hx
        if given is not None and any(s.dim() != 2 for s in given):
            shapes = ", ".join(str(tuple(s.shape)) for s in given)
            raise ValueError(f"the state of an input without batch is (layers, features), got {shapes}")
        return None if given is None else tuple(s[:, None] for s in given)

    def _first(self, hx: Tensor | State | None, x: Tensor, batch: int, order: Tensor | None) -> State:
        """The state before the first step, checked and in the order of the sequences: (layers, batch, ...) each."""
        self._check_input(x, self.weight_ih_l0)
        layers = len(self._suffixes())
        shapes = [(layers, batch, self.proj_size or self.hidden_size)]
        if self.mode == "LSTM":
            shapes.append((layers, batch, self.hidden_size))
        if hx is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        given = (hx,) if isinstance(hx, Tensor) else hx
        if [tuple(s.shape) for s in given] != shapes:
            got = ", ".join(str(tuple(s.shape)) for s in given)
            raise ValueError(
                f"the state of this {type(self).__name__} for a batch of {batch} is {', '.join(map(str, shapes))}, "
                f"got {got}"
            )
        return tuple(given) if order is None else tuple(s.index_select(1, order) for s in given)

    def _last(self, state: State, back: Tensor | None) -> Tensor | State:
        """The final state as the dense module gives it, in the caller's order of the sequences."""
        state = state if back is None else tuple(s.index_select(1, back) for s in state)
        return state if self.mode == "LSTM" else state[0]

    def _run(self, x: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """All layers over x (steps of `sizes` rows each, features): output and final state."""
        last = []
        suffixes = self._suffixes()
        directions = len(suffixes) // self.num_layers
        for first in range(0, len(suffixes), directions):
            if first:
                x = F.dropout(x, self.dropout, self.training)
            swept = [
                self._sweep(suffixes[i], x, sizes, tuple(s[i] for s in state)) for i in range(first, first + directions)
            ]
            x = torch.cat([y for y, _ in swept], 1) if directions > 1 else swept[0][0]
            last += [s for _, s in swept]
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _sweep(self, suffix: str, x: Tensor, sizes: list[int], first: State) -> tuple[Tensor, State]:
        """One direction of one layer: its output for every row of x, and its final state.

        Sequences are sorted from long to short, so those at work at a step are the first ones. Forwards some end at a
        step and are set aside; backwards some begin, from their own first state.
        """
        step = _STEPS[self.mode]
        inputs = torch.split(self._linear(f"weight_ih_{suffix}", x, f"bias_ih_{suffix}"), sizes)
        times = range(len(sizes))[:: -1 if suffix.endswith("_reverse") else 1]
        state = tuple(s[: sizes[times[0]]] for s in first)
        outputs, ended = [], []
        for t in times:
            size, before = sizes[t], state[0].shape[0]
            if size < before:
                ended.append(tuple(s[size:] for s in state))
                state = tuple(s[:size] for s in state)
            elif size > before:
                state = tuple(torch.cat([s, begun[before:size]]) for s, begun in zip(state, first, strict=True))
            state = step(inputs[t], self._linear(f"weight_hh_{suffix}", state[0], f"bias_hh_{suffix}"), state)
            if self.proj_size:
                state = (self._linear(f"weight_hr_{suffix}", state[0]), *state[1:])
            outputs.append(state[0])
        if ended:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
        return torch.cat(outputs[:: times.step]), state

    def extra_repr(self) -> str:
        return f"{nn.RNNBase.extra_repr(cast(Any, self))}, {self._describe()}"


class SparseRNN(_SparseRNNBase):
    """`nn.RNN` of whose weights only the active entries exist; see `SparseGRU`.

    Args as for `nn.RNN`, and `density`, `seed`, `init` as for `SparseLinear`.

    Examples:
        >>> output, h = SparseRNN(8, 16, nonlinearity="relu", density=0.1, seed=0)(torch.zeros(5, 2, 8))
        >>> output.shape, h.shape
        (torch.Size([5, 2, 16]), torch.Size([1, 2, 16]))
    """

    dense_type = nn.RNN
    nonlinearity: str

    def __init__(  # noqa: PLR0913 - those of torch's layer, and ours
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        dense = nn.RNN(*sizes, nonlinearity, bias, batch_first, dropout, bidirectional, device="meta")
        self._build(dense, density, seed, init, device, dtype)


class SparseGRU(_SparseRNNBase):
    """`nn.GRU` of whose weights only the active entries exist.

    The products with a layer's input are done for all steps at once; those with its state step by step. Each weight is
    sparse by itself; in a module that `regrow.sparsify` or `adopt` made, some may be dense.

    Args as for `nn.GRU`, and `density`, `seed`, `init` as for `SparseLinear`.

    Raises:
        ValueError: when density lies outside [0, 1], or `nn.GRU` does not take the other arguments.

    Examples:
        >>> output, h = SparseGRU(8, 16, num_layers=2, density=0.1, seed=0)(torch.zeros(5, 2, 8))
        >>> output.shape, h.shape
        (torch.Size([5, 2, 16]), torch.Size([2, 2, 16]))
    """

    dense_type = nn.GRU

    def __init__(  # noqa: PLR0913 - those of torch's layer, and ours
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dense = nn.GRU(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta")
        self._build(dense, density, seed, init, device, dtype)


class SparseLSTM(_SparseRNNBase):
    """`nn.LSTM` of whose weights only the active entries exist; see `SparseGRU`.

    Args as for `nn.LSTM`, and `density`, `seed`, `init` as for `SparseLinear`.

    Examples:
        >>> output, (h, c) = SparseLSTM(8, 16, proj_size=4, density=0.1, seed=0)(torch.zeros(5, 2, 8))
        >>> output.shape, h.shape, c.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), torch.Size([1, 2, 16]))
    """

    dense_type = nn.LSTM

    def __init__(  # noqa: PLR0913 - those of torch's layer, and ours
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        dense = nn.LSTM(*sizes, bias, batch_first, dropout, bidirectional, proj_size, device="meta")
        self._build(dense, density, seed, init, device, dtype)


class _SparseRNNCellBase(_SparseRecurrent):
    """What the cells share."""

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter

    def _advance(self, input: Tensor, hx: State | None) -> State:
        """The state after one step, (batch, hidden_size) each, or without batch."""
        if input.dim() not in (1, 2):
            raise ValueError(
                f"the input has shape {tuple(input.shape)}, this {type(self).__name__} takes (batch, features) or "
                "(features,)"
            )
        self._check_input(input, self.weight_ih)
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = (input.new_zeros(shape),) * (2 if self.mode == "LSTM" else 1)
        elif any(tuple(s.shape) != shape for s in hx):
            got = ", ".join(str(tuple(s.shape)) for s in hx)
            raise ValueError(f"the state of this {type(self).__name__} for such an input is {shape}, got {got}")
        x, state = (input, hx) if input.dim() == 2 else (input[None], tuple(s[None] for s in hx))
        gates = self._linear("weight_ih", x, "bias_ih"), self._linear("weight_hh", state[0], "bias_hh")
        after = _STEPS[self.mode](*gates, state)
        return after if input.dim() == 2 else tuple(s[0] for s in after)

    def extra_repr(self) -> str:
        return f"{nn.RNNCellBase.extra_repr(cast(Any, self))}, {self._describe()}"


class SparseRNNCell(_SparseRNNCellBase):
    """`nn.RNNCell` of whose weights only the active entries exist; see `SparseGRUCell`.

    Args as for `nn.RNNCell`, and `density`, `seed`, `init` as for `SparseLinear`.
    """

    dense_type = nn.RNNCell
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dense = nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device="meta")
        self._build(dense, density, seed, init, device, dtype)

    @property
    def mode(self) -> str:  # type: ignore[override]
        """Torch's name for the recurrence."""
        return f"RNN_{self.nonlinearity.upper()}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (batch, input_size), hx (batch, hidden_size) or zeros, or both without batch -> like hx."""
        return self._advance(input, None if hx is None else (hx,))[0]


class SparseGRUCell(_SparseRNNCellBase):
    """`nn.GRUCell` of whose weights only the active entries exist.

    Args as for `nn.GRUCell`, and `density`, `seed`, `init` as for `SparseLinear`.

    Examples:
        >>> SparseGRUCell(8, 16, density=0.1, seed=0)(torch.zeros(2, 8)).shape
        torch.Size([2, 16])
    """

    dense_type = nn.GRUCell
    mode = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._build(nn.GRUCell(input_size, hidden_size, bias, device="meta"), density, seed, init, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (batch, input_size), hx (batch, hidden_size) or zeros, or both without batch -> like hx."""
        return self._advance(input, None if hx is None else (hx,))[0]


class SparseLSTMCell(_SparseRNNCellBase):
    """`nn.LSTMCell` of whose weights only the active entries exist; see `SparseGRUCell`.

    Args as for `nn.LSTMCell`, and `density`, `seed`, `init` as for `SparseLinear`.
    """

    dense_type = nn.LSTMCell
    mode = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._build(nn.LSTMCell(input_size, hidden_size, bias, device="meta"), density, seed, init, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input (batch, input_size), hx two of (batch, hidden_size) or zeros, or all without batch -> like hx."""
        h, c = self._advance(input, hx)
        return h, c
