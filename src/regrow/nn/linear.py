"""Sparse linear maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regrow.nn.base import Draw, Init, SparseModule, normal, uniform, zeros


class SparseLinear(SparseModule):
    """y = x W^T + b where only the active entries of W exist.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: whether there is a b.
        density: active share of W, in [0, 1]; positions are drawn uniformly, in time and memory of their number.
        seed: of positions and values; None takes one from torch's global generator.
        init: values as `nn.Linear` draws its own ("module"), or those scaled to each row's own fan-in ("fan_in").
        device: of values and topology.
        dtype: float32, bfloat16 or float64.

    Raises:
        ValueError: when density lies outside [0, 1].

    Examples:
        >>> layer = SparseLinear(1000, 500, density=0.01, seed=0)
        >>> layer
        SparseLinear(in_features=1000, out_features=500, bias=True, 5,000 of 500,000 active)
        >>> layer(torch.zeros(2, 3, 1000)).shape, layer.weight.shape
        (torch.Size([2, 3, 500]), torch.Size([5000]))
    """

    dense_type = nn.Linear
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._begin()
        self.in_features, self.out_features = in_features, out_features
        for name in ("weight", "bias"):
            self.register_parameter(name, None)
        shapes = {"weight": (out_features, in_features)}
        self._draw(shapes, {"bias": out_features} if bias else {}, density, seed, init, device, dtype)

    def initial(self, name: str) -> Draw:
        """As `nn.Linear` draws weight and bias: U(-1 / sqrt(in_features), 1 / sqrt(in_features))."""
        return uniform(1 / math.sqrt(max(1, self.in_features)))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return self.product("weight", input, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._describe()}"
        )


class SparseConv1D(SparseModule):
    """y = x W + b with W (n_in, n_out) of which only the active entries exist: transformers' `Conv1D`.

    Made from a dense one by `from_dense` or `regrow.sparsify`.
    """

    nf: int
    weight: nn.Parameter
    bias: nn.Parameter

    def initial(self, name: str) -> Draw:
        """As transformers draws them: N(0, 0.02^2), the bias zero."""
        return zeros if name == "bias" else normal(0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_in) -> (..., n_out)."""
        return self.product("weight", x, self.bias, transposed=True)

    def extra_repr(self) -> str:
        n_in, n_out = self.shapes["weight"]
        return f"{n_in}, {n_out}, {self._describe()}"
