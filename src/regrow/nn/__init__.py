"""Modules that hold only the active entries of their weights."""

from torch import nn
from torch.nn.utils import parametrize

from regrow.core.topology import fan_in_scale as fan_in_scale
from regrow.nn.attention import SparseMultiheadAttention as SparseMultiheadAttention
from regrow.nn.attention import leave_fast_path as leave_fast_path
from regrow.nn.base import Init as Init
from regrow.nn.base import SparseModule as SparseModule
from regrow.nn.conv import SparseConv1d as SparseConv1d
from regrow.nn.conv import SparseConv2d as SparseConv2d
from regrow.nn.linear import SparseConv1D as SparseConv1D
from regrow.nn.linear import SparseLinear as SparseLinear
from regrow.nn.recurrent import SparseGRU as SparseGRU
from regrow.nn.recurrent import SparseGRUCell as SparseGRUCell
from regrow.nn.recurrent import SparseLSTM as SparseLSTM
from regrow.nn.recurrent import SparseLSTMCell as SparseLSTMCell
from regrow.nn.recurrent import SparseRNN as SparseRNN
from regrow.nn.recurrent import SparseRNNCell as SparseRNNCell

SPARSE: dict[type[nn.Module], type[SparseModule]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.RNN: SparseRNN,
    nn.GRU: SparseGRU,
    nn.LSTM: SparseLSTM,
    nn.RNNCell: SparseRNNCell,
    nn.GRUCell: SparseGRUCell,
    nn.LSTMCell: SparseLSTMCell,
    nn.MultiheadAttention: SparseMultiheadAttention,
}
"""Dense classes and the sparse ones that stand for them."""


def sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """The class that stands for a dense `module`, or None where there is none.

    There is none for a module that overrides its class's forward, since it could compute anything, nor for one whose
    parameters are computed from others.

    Examples:
        >>> sparse_class(nn.Linear(2, 3)).__name__
        'SparseLinear'
        >>> sparse_class(nn.BatchNorm1d(3))
    """
    kind = type(module)
    base = next((c for c in kind.__mro__ if c in SPARSE or _is_conv1d_of_transformers(c)), None)
    if base is None or parametrize.is_parametrized(module):
        return None
    computing = ("forward", "_conv_forward", "__call__")
    if any(name in vars(module) or getattr(kind, name, None) is not getattr(base, name, None) for name in computing):
        return None
    return SPARSE.get(base, SparseConv1D)


def _is_conv1d_of_transformers(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
