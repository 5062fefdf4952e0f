"""What is known of each module type: one row, and the sparse class that the row names.

Discovery reads here what to sparsify, FLOPs what to count, compressed storage what a module becomes. A type of your own
gets its row by `register`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from regrow.core.topology import Topology
from regrow.nn.attention import SparseMultiheadAttention
from regrow.nn.base import SparseModule, nonzero, shape_of
from regrow.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from regrow.nn.conv_transpose import SparseConvTranspose1d, SparseConvTranspose2d, SparseConvTranspose3d
from regrow.nn.linear import SparseBilinear, SparseConv1D, SparseLinear
from regrow.nn.recurrent import SparseGRU, SparseGRUCell, SparseLSTM, SparseLSTMCell, SparseRNN, SparseRNNCell
from regrow.nn.uses import (
    Call,
    Use,
    Uses,
    attention_uses,
    cell_uses,
    convolution_uses,
    linear_uses,
    paper_uses,
    recurrent_uses,
    transposed_convolution_uses,
)

Blocks = Mapping[str, int]
"""The weights of a module, each with its number of equal blocks of leading rows, which are weights of their own."""


class Axes(NamedTuple):
    """How a parameter is read that no row knows: which axes count its outputs and its inputs.

    Examples:
        >>> Axes(), Axes(outputs=1, inputs=0)       # y = W x, y = x W
        (Axes(outputs=0, inputs=1, blocks=1), Axes(outputs=1, inputs=0, blocks=1))
        >>> Axes(outputs=1, inputs=2, blocks=None)  # a stack: each along the first axis is a weight
        Axes(outputs=1, inputs=2, blocks=None)
    """

    outputs: int = 0
    inputs: int = 1
    blocks: int | None = 1
    """Equal blocks of leading rows that are weights of their own; None is as many as there are rows."""

    def blocks_of(self, parameter: Tensor) -> int:
        """The number of blocks of a parameter."""
        return parameter.shape[0] if self.blocks is None else self.blocks


_ONE_WEIGHT = MappingProxyType({"weight": 1})
_COMPUTING = ("forward", "_conv_forward", "__call__")
"""Methods that a subclass may not override where the sparse class is to compute the same."""


def nothing(module: Any) -> None:
    """The default of a row: do nothing, return None."""


class Kind(NamedTuple):
    """One module type. A module is of the kind of its nearest base that has a row.

    Examples:
        >>> kind_of(nn.GRU).weights_of(nn.GRU(3, 2))
        {'weight_ih_l0': 3, 'weight_hh_l0': 3}
    """

    dense: type[nn.Module] | str
    """The class, or "package.Name" of one in a package that need not be installed."""
    sparse: type[SparseModule] | None = None
    """The class that stands for it in compressed storage. Without one, it can be masked only."""
    weights: Blocks | Callable[[Any], Blocks] = _ONE_WEIGHT
    """What is sparsified, or what finds that in a module."""
    out_axis: int = 0
    """Which axis of each weight counts the outputs."""
    in_axis: int = 1
    """Which axis of each weight counts the inputs."""
    uses: Uses = linear_uses
    """What a call multiplies, for FLOPs."""
    paper_uses: Callable[[Call, bool], dict[str, Use]] | None = None
    """A convolution's uses as the RigL paper's code counts them: (call, whether it is the model's first one)."""
    left_out: Callable[[Any], str | None] = nothing
    """Why a module stays dense unless it is asked for, or None."""
    reads: tuple[str, ...] = ()
    """Children by whose weight it multiplies without calling them, on inputs shaped like its first output."""
    release: Callable[[Any], None] = nothing
    """Drop what refers to its parameters beside the module itself: their memory cannot be exchanged before."""
    restore: Callable[[Any], None] = nothing
    """Make anew what `release` dropped."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.dense.rpartition(".")[2] if isinstance(self.dense, str) else self.dense.__name__

    def weights_of(self, module: nn.Module) -> Blocks:
        """The weights of a module of this kind, dense or sparse.

        Raises:
            ValueError: when the row names a weight that its own class does not have.
        """
        found = self.weights(module) if callable(self.weights) else self.weights
        missing = [name for name in found if not hasattr(module, name)]
        if missing and type(module) is self.dense:
            raise ValueError(f"{self.name} has no {', '.join(missing)}, which its row in regrow.nn says that it has")
        return {name: blocks for name, blocks in found.items() if name not in missing}


# The rows


def _depthwise(conv: Any) -> str | None:
    return "depthwise" if conv.groups == conv.in_channels > 1 else None


def _gates(layer: Any) -> Blocks:
    """Every weight of every layer, whose rows are those of one gate after the other; a projection has no gates."""
    names = [n for n, _ in layer.named_parameters(recurse=False) if n.startswith("weight_")]
    return {n: 1 if n.startswith("weight_hr") else shape_of(layer, n)[0] // layer.hidden_size for n in names}


def _cell_gates(cell: Any) -> Blocks:
    return dict.fromkeys(("weight_ih", "weight_hh"), shape_of(cell, "weight_ih")[0] // cell.hidden_size)


def _projections(attention: Any) -> Blocks:
    """The weights of queries, keys and values: one packed weight, or three separate ones."""
    blocks = {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    return {name: n for name, n in blocks.items() if getattr(attention, name, None) is not None}


def _forget_flat_weights(layer: Any) -> None:
    layer._flat_weight_refs = []


def _make_flat_weights(layer: Any) -> None:
    layer._init_flat_weights()


_conv = partial(Kind, uses=convolution_uses, paper_uses=paper_uses, left_out=_depthwise)
_transposed = partial(Kind, out_axis=1, in_axis=0, uses=transposed_convolution_uses, left_out=_depthwise)
_layer = partial(Kind, weights=_gates, uses=recurrent_uses, release=_forget_flat_weights, restore=_make_flat_weights)
_cell = partial(Kind, weights=_cell_gates, uses=cell_uses)

KINDS: dict[type[nn.Module] | str, Kind] = {
    row.dense: row
    for row in (
        Kind(nn.Linear, SparseLinear),
        Kind("transformers.Conv1D", SparseConv1D, out_axis=1, in_axis=0),
        Kind("torch_geometric.Linear"),
        Kind(nn.Bilinear, SparseBilinear),
        _conv(nn.Conv1d, SparseConv1d),
        _conv(nn.Conv2d, SparseConv2d),
        _conv(nn.Conv3d, SparseConv3d),
        _transposed(nn.ConvTranspose1d, SparseConvTranspose1d),
        _transposed(nn.ConvTranspose2d, SparseConvTranspose2d),
        _transposed(nn.ConvTranspose3d, SparseConvTranspose3d),
        _layer(nn.RNN, SparseRNN),
        _layer(nn.GRU, SparseGRU),
        _layer(nn.LSTM, SparseLSTM),
        _layer(nn.RNNBase),
        _cell(nn.RNNCell, SparseRNNCell),
        _cell(nn.GRUCell, SparseGRUCell),
        _cell(nn.LSTMCell, SparseLSTMCell),
        _cell(nn.RNNCellBase),
        Kind(
            nn.MultiheadAttention,
            SparseMultiheadAttention,
            weights=_projections,
            uses=attention_uses,
            reads=("out_proj",),
        ),
    )
}
"""The rows of all known module types; `register` adds to them."""


def register(kind: Kind) -> None:
    """Add the row of a module type of your own, from then on and everywhere in this process.

    Its weights are then sparsified and counted; with a sparse class, compressed storage takes it too. That class holds
    active entries and multiplies by them with `SparseModule.product` or `SparseModule.convolution`; it needs `initial`
    only where models are built on the meta device.

    Raises:
        ValueError: for a type that has a row already, or a row that makes no sense.
        TypeError: for what is no `Kind`.

    Examples:
        >>> import torch
        >>> from regrow.nn import Kind, SparseModule, from_dense, register
        >>> class Mixed(nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(inputs, outputs))
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> class SparseMixed(SparseModule):
        ...     def forward(self, x):
        ...         return self.product("weight", x, transposed=True)
        >>> register(Kind(Mixed, SparseMixed, out_axis=1, in_axis=0))
        >>> layer, x = Mixed(3, 2), torch.randn(5, 3)
        >>> torch.allclose(from_dense(layer)(x), layer(x), atol=1e-6)
        True
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"register takes a row, as regrow.nn.Kind(MyLayer, MySparseLayer), got {kind!r}")
    _require_sound(kind)
    if kind.dense in KINDS:
        raise ValueError(f"{kind.name} has a row already: give a subclass of it a row of its own instead")
    KINDS[kind.dense] = kind


def _require_sound(kind: Kind) -> None:
    """Raise ValueError with the first thing that makes no sense in a row."""
    dense, sparse = kind.dense, kind.sparse
    if isinstance(dense, str):
        package, _, name = dense.partition(".")
        if not package.isidentifier() or not name.isidentifier():
            raise ValueError(f'a type goes by its class or by "package.Name", got {dense!r}')
    elif not isinstance(dense, type) or not issubclass(dense, nn.Module) or dense is nn.Module:
        raise ValueError(f"a row is about a class of modules, got {dense!r}")
    elif issubclass(dense, SparseModule):
        raise ValueError(f"{kind.name} is sparse already: a row is about a dense class")
    if sparse is not None and not (isinstance(sparse, type) and issubclass(sparse, SparseModule)):
        raise ValueError(f"the sparse class of {kind.name} must be a regrow.nn.SparseModule, got {sparse!r}")
    if sparse is not None and sparse.forward is nn.Module.forward:
        raise ValueError(f"{sparse.__name__}, the sparse class of {kind.name}, has no forward")
    if kind.out_axis == kind.in_axis or min(kind.out_axis, kind.in_axis) < 0:
        raise ValueError(
            f"two axes count the outputs and the inputs of {kind.name}, from 0 on: got out_axis={kind.out_axis} and "
            f"in_axis={kind.in_axis}"
        )
    if callable(kind.weights):
        return
    if not kind.weights or min(kind.weights.values()) < 1:
        raise ValueError(
            f'{kind.name} needs weights, each with 1 block or more, as {{"weight": 1}}, got {kind.weights!r}'
        )
    if max(kind.weights.values()) > 1 and kind.out_axis != 0:
        raise ValueError(f"blocks of leading rows are blocks of outputs: {kind.name} must have out_axis=0 to have some")


# What others ask


def kind_of(dense: type[nn.Module]) -> Kind | None:
    """The row of a dense class or of its nearest base that has one.

    Examples:
        >>> kind_of(nn.LazyLinear).name, kind_of(nn.ConvTranspose2d).out_axis, kind_of(nn.LayerNorm)
        ('Linear', 1, None)
    """
    found = _nearest(dense)
    return None if found is None else found[1]


def stacked_experts(module: nn.Module) -> dict[str, Axes]:
    """The weights of a module of transformers that holds all experts of a layer in stacks, (experts, ..., ...).

    Its models mark such modules: `is_transposed` says whether an expert is (inputs, outputs).
    """
    if not type(module).__module__.startswith("transformers.") or not hasattr(module, "is_transposed"):
        return {}
    outputs, inputs = (2, 1) if module.is_transposed else (1, 2)
    stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return {name: Axes(outputs, inputs, blocks=None) for name in stacks}


def _nearest(dense: type[nn.Module]) -> tuple[type, Kind] | None:
    """The nearest base that has a row, and the row."""
    for base in dense.__mro__:
        row = KINDS.get(base) or KINDS.get(f"{base.__module__.partition('.')[0]}.{base.__name__}")
        if row is not None:
            return base, row
    return None


def sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """The class that stands for a dense `module`, or None where there is none.

    There is none for a module that overrides its class's forward, since it could compute anything, nor for one whose
    parameters are computed from others.

    Examples:
        >>> sparse_class(nn.Linear(2, 3)).__name__
        'SparseLinear'
        >>> sparse_class(nn.BatchNorm1d(3))
    """
    found = _nearest(type(module))
    if found is None or parametrize.is_parametrized(module):
        return None
    base, row = found
    same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in _COMPUTING)
    return row.sparse if same and not any(name in vars(module) for name in _COMPUTING) else None


def from_dense(module: nn.Module, topologies: Mapping[str, Topology] | None = None) -> SparseModule:
    """A sparse copy of a dense `module`, which is left as it is; its `to_dense()` leads back.

    Args:
        module: of a kind that has a sparse class.
        topologies: what is active, by parameter; where none is given, the entries that are not zero.

    Raises:
        ValueError: when there is no sparse form of the module.

    Examples:
        >>> dense = nn.Linear(4, 3)
        >>> bool((from_dense(dense).to_dense().weight == dense.weight).all())
        True
    """
    cls, kind = sparse_class(module), kind_of(type(module))
    if cls is None or kind is None:
        raise ValueError(
            f"there is no sparse form of {type(module).__name__}: regrow.nn.register adds one for a type of your own"
        )
    weights = {}
    for name in kind.weights_of(module):
        parameter = getattr(module, name)
        at = (topologies or {}).get(name) or nonzero(parameter)
        values = parameter.detach().reshape(-1)[at.entries.to(parameter.device)]
        weights[name] = nn.Parameter(values, parameter.requires_grad), at
    return cls.adopt(copy.deepcopy(module), weights)


def read_children(module: nn.Module) -> list[nn.Module]:
    """The children by whose weight a dense `module` multiplies without calling them."""
    kind = kind_of(type(module))
    return [] if kind is None else [module.get_submodule(name) for name in kind.reads]


def release(module: nn.Module) -> None:
    """Let a dense `module` drop the references to its parameters that it keeps beside them."""
    kind = kind_of(type(module))
    if kind is not None:
        kind.release(module)


def restore(module: nn.Module) -> None:
    """Let a dense `module` make anew what it dropped at `release`."""
    kind = kind_of(type(module))
    if kind is not None:
        kind.restore(module)
