"""Floor 3, how: modules that hold only the active entries of their weights; `kinds` has a row for each module type."""

from regrow.nn.attention import SparseMultiheadAttention as SparseMultiheadAttention
from regrow.nn.attention import leave_fast_path as leave_fast_path
from regrow.nn.base import Init as Init
from regrow.nn.base import SparseModule as SparseModule
from regrow.nn.conv import SparseConv1d as SparseConv1d
from regrow.nn.conv import SparseConv2d as SparseConv2d
from regrow.nn.conv import SparseConv3d as SparseConv3d
from regrow.nn.conv_transpose import SparseConvTranspose1d as SparseConvTranspose1d
from regrow.nn.conv_transpose import SparseConvTranspose2d as SparseConvTranspose2d
from regrow.nn.conv_transpose import SparseConvTranspose3d as SparseConvTranspose3d
from regrow.nn.kinds import Kind as Kind
from regrow.nn.kinds import from_dense as from_dense
from regrow.nn.kinds import kind_of as kind_of
from regrow.nn.kinds import register as register
from regrow.nn.kinds import sparse_class as sparse_class
from regrow.nn.linear import SparseBilinear as SparseBilinear
from regrow.nn.linear import SparseConv1D as SparseConv1D
from regrow.nn.linear import SparseLinear as SparseLinear
from regrow.nn.recurrent import SparseGRU as SparseGRU
from regrow.nn.recurrent import SparseGRUCell as SparseGRUCell
from regrow.nn.recurrent import SparseLSTM as SparseLSTM
from regrow.nn.recurrent import SparseLSTMCell as SparseLSTMCell
from regrow.nn.recurrent import SparseRNN as SparseRNN
from regrow.nn.recurrent import SparseRNNCell as SparseRNNCell
from regrow.nn.uses import Call as Call
from regrow.nn.uses import Use as Use
