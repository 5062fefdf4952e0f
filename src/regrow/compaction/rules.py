"""The rule of each operator; one without a row keeps all that it is given."""

from __future__ import annotations

import torch

from regrow.compaction.attention import Attention, MatMul
from regrow.compaction.elements import (
    Channelwise,
    GroupNorm,
    Lookup,
    Pointwise,
    Reduction,
    Together,
    Window,
    normalized,
    one_axis,
)
from regrow.compaction.moves import Move, Pad, Resize, Select, Slice, Squeeze
from regrow.compaction.products import Product
from regrow.compaction.rule import Rule, Rules

aten = torch.ops.aten

_ROWS: list[tuple[Rule, list[str]]] = [
    (Pointwise(), ["_to_copy", "to"]),
    (Channelwise(), ["batch_norm", "prelu"]),
    (Together(normalized), ["layer_norm", "rms_norm"]),
    (Together(one_axis), ["softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"]),
    (GroupNorm(), ["group_norm"]),
    (Reduction(), ["mean", "sum", "amax", "amin"]),
    (Window(1), ["max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_linear1d"]),
    (Window(2), ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d"]),
    (Window(3), ["max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "upsample_nearest3d", "upsample_trilinear3d"]),
    (Lookup(), ["embedding"]),
    (Move(), ["permute", "transpose", "t", "unsqueeze", "cat", "stack", "clone", "contiguous", "detach"]),
    (Move(), ["alias", "dropout"]),
    (Squeeze(), ["squeeze"]),
    (Resize(), ["view", "_unsafe_view", "reshape", "expand"]),
    (Slice(), ["slice"]),
    (Select(), ["select"]),
    (Pad(), ["pad", "constant_pad_nd"]),
    (Product(), ["linear", "addmm", "conv1d", "conv2d", "conv3d"]),
    (Product(), ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]),
    (Product(MatMul()), ["mm", "matmul", "bmm"]),
    (Attention(), ["scaled_dot_product_attention"]),
]

RULES = Rules({getattr(aten, name): rule for rule, names in _ROWS for name in names}, Pointwise(), Rule())
"""All rules: by operator, of pointwise operators, and of all others."""
