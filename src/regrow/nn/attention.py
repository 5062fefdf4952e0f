"""Sparse multi-head attention, and torch's transformer layers around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow import kernels
from regrow.core.draws import Stream
from regrow.nn.base import Draw, SparseModule, normal, uniform, zeros

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class SparseMultiheadAttention(SparseModule):
    """`nn.MultiheadAttention` of whose input projections only the active entries exist.

    Made from a dense one by `regrow.nn.from_dense` or `regrow.sparsify`. Projections that `shapes` does not have are
    dense. Its child `out_proj` may be dense or sparse: it is called as the module that it is, where the dense attention
    reads its weight. So an attention with a sparse `out_proj` must be of this class, even if nothing else in it is.
    """

    dense_type = nn.MultiheadAttention
    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    out_proj: nn.Module
    _qkv_same_embed_dim: bool

    def initial(self, name: str) -> Draw:
        """As `nn.MultiheadAttention` draws them: weights Xavier-uniform, bias_k and bias_v Xavier-normal, else zero."""
        fans = dict(zip(_SEPARATE, (self.embed_dim, self.kdim, self.vdim), strict=True))
        if name in ("bias_k", "bias_v"):
            return normal(math.sqrt(1 / self.embed_dim))
        if name == "in_proj_weight":
            return uniform(math.sqrt(6 / (4 * self.embed_dim)))
        return uniform(math.sqrt(6 / (self.embed_dim + fans[name]))) if name in fans else zeros

    def initialize(self, streams: Mapping[str, Stream]) -> None:
        """Draw its own parameters anew, and zero the bias of `out_proj`, on which attention has the last word."""
        super().initialize(streams)
        if isinstance(self.out_proj.bias, Tensor):
            nn.init.zeros_(self.out_proj.bias)

    def to_dense(self) -> nn.Module:
        """A dense copy, `out_proj` included, with zeros where nothing is active."""
        module = super().to_dense()
        if isinstance(self.out_proj, SparseModule):
            module.out_proj = self.out_proj.to_dense()
        return module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the dense module: (output, weights), the weights None unless `need_weights`."""
        self._check(query, key, value, attn_mask, is_causal)
        q, k, v = (self._batch_first(t) for t in self._project(query, key, value))
        # With padding or weights the whole mask is needed; otherwise the hint that it is causal says it all.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, k.shape[:2], query)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([t, b.expand(len(t), 1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        heads = (self.num_heads, self.embed_dim // self.num_heads)
        q, k, v = (t.view(*t.shape[:2], *heads).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            return self.out_proj(y[0]), None if weights is None else weights[0]
        return self.out_proj(y if self.batch_first else y.transpose(0, 1)), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        if any(t.is_nested for t in (query, key, value)):
            raise ValueError("sparse attention takes padded tensors and a key_padding_mask, got a nested tensor")
        dims = [t.dim() for t in (query, key, value)]
        features, expected = [t.shape[-1] for t in (query, key, value)], [self.embed_dim, self.kdim, self.vdim]
        batch = 0 if self.batch_first else 1
        fits = dims in ([2] * 3, [3] * 3) and features == expected and key.shape[:-1] == value.shape[:-1]
        if not fits or (dims[0] == 3 and query.shape[batch] != key.shape[batch]):
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise ValueError(
                f"query, key and value, of shapes {shapes}, must all have the same batch or none, key and value "
                f"equally many positions, and {', '.join(f'{n:,}' for n in expected)} features"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal only says that attn_mask is causal: attn_mask is needed too")

    def _batch_first(self, t: Tensor) -> Tensor:
        if t.dim() == 2:
            return t[None]
        return t if self.batch_first else t.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """q, k and v, (..., embed_dim) each; neighbours among the inputs that are one tensor take one product."""
        inputs, size = (query, key, value), self.embed_dim
        if not self._qkv_same_embed_dim:
            blocks = [slice(low, low + size) for low in range(0, 3 * size, size)]
            biases = [None if self.in_proj_bias is None else self.in_proj_bias[rows] for rows in blocks]
            return [self.product(*of) for of in zip(_SEPARATE, inputs, biases, strict=True)]
        projected: list[Tensor] = []
        while len(projected) < 3:
            first = len(projected)
            last = next((i for i in range(first, 3) if inputs[i] is not inputs[first]), 3)
            projected += self._packed(inputs[first], first * size, last * size).chunk(last - first, -1)
        return projected

    def _packed(self, x: Tensor, low: int, high: int) -> Tensor:
        """x times rows [low, high) of the packed projection, plus their bias."""
        name, values = "in_proj_weight", self.in_proj_weight
        bias = None if self.in_proj_bias is None else self.in_proj_bias[low:high]
        if name not in self.shapes:
            return F.linear(x, values[low:high], bias)
        # A keeper takes gradients of all rows; a compiled program cannot have sizes that depend on where blocks begin.
        if high - low == self.shapes[name][0] or self.keys.get(name) or torch.compiler.is_compiling():
            return self.product(name, x, self.in_proj_bias)[..., low:high]
        whole = self.topology(name)
        if not whole.is_unstructured:
            return self.product(name, x, self.in_proj_bias)[..., low:high]
        block, (first, last) = whole.block(low, high), whole.starts[[low, high]].tolist()
        if block.is_dense:
            return F.linear(x, values[first:last].view(block.shape), bias)
        # Its transposed index is made anew, in the time of a few more positions in the product, and not kept: it would
        # be as large as that of the whole, which self-attention uses.
        return kernels.linear(x, values[first:last], bias, kernels.index(block))

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, keys: Sequence[int], query: Tensor
    ) -> Tensor | None:
        """Both masks as one to add to scores (batch, heads, queries, keys), with axes of 1 where it says nothing."""
        batch, length = keys
        queries = query.shape[1 if query.dim() == 3 and self.batch_first else 0]
        total = None
        if attn_mask is not None:
            full = (batch * self.num_heads, queries, length)
            if tuple(attn_mask.shape) not in (full, full[1:]):
                raise ValueError(f"attn_mask must have shape {full[1:]} or {full}, got {tuple(attn_mask.shape)}")
            heads = attn_mask.dim() == 3
            total = _added(attn_mask, query).view(-1 if heads else 1, self.num_heads if heads else 1, *full[1:])
        if key_padding_mask is not None:
            expected = (batch, length) if query.dim() == 3 else (length,)
            if tuple(key_padding_mask.shape) != expected:
                raise ValueError(f"key_padding_mask must have shape {expected}, got {tuple(key_padding_mask.shape)}")
            padding = _added(key_padding_mask, query).view(batch, 1, 1, length)
            total = padding if total is None else total + padding
        return total

    def extra_repr(self) -> str:
        described = self._describe()
        return f"{self.embed_dim}, {self.num_heads} heads" + (f", {described}" if described else "")


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as numbers to add to scores: minus infinity where a bool one is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf)


def leave_fast_path(model: nn.Module) -> None:
    """Make torch's own modules in `model` call children that are sparse, where they would read weights themselves.

    To be called after modules of `model` became sparse; once more does no harm. What reads its children's weights is

    * `nn.MultiheadAttention`, always: one with a sparse `out_proj` becomes a `SparseMultiheadAttention`;
    * `nn.TransformerEncoderLayer` in evaluation: its switch `activation_relu_or_gelu` is turned off;
    * `nn.TransformerEncoder` in evaluation with padding: it hands its layers nested tensors, which only they take that
      read weights, and which make the output zero at padded positions. `use_nested_tensor` is turned off, so those
      positions hold what they hold in training.
    """
    for module in list(model.modules()):
        ours = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
        if ours and isinstance(module.out_proj, SparseModule):
            SparseMultiheadAttention.adopt(module, {})
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_sparse(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _is_sparse(module):
            module.use_nested_tensor = False


def _is_sparse(module: nn.Module) -> bool:
    return any(isinstance(child, SparseModule) for child in module.modules())
