"""Sparse linear and bilinear maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regrow.core.method import Units
from regrow.nn.base import Draw, Init, SparseModule, normal, uniform, zeros


class SparseLinear(SparseModule):
    """y = x W^T + b where only the active entries of W exist.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: whether there is a b.
        density: active share of W, in [0, 1]; positions are drawn uniformly, in time and memory of their number.
        structure: what is active or inactive together, as `regrow.parts.groups(8)`; None is every entry by itself.
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
        >>> from regrow.parts import groups
        >>> SparseLinear(1000, 400, density=0.01, structure=groups(8), seed=0)
        SparseLinear(in_features=1000, out_features=400, bias=True, 4,000 of 400,000 active in units of 8 x 1)
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
        structure: Units | None = None,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias, device="meta")
        self._build(dense, density, seed, init, device, dtype, structure=structure)

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

    Made from a dense one by `regrow.nn.from_dense` or `regrow.sparsify`.
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


class SparseBilinear(SparseModule):
    """y_o = sum_ij x_i A_oij z_j + b_o where only the active entries of A (out, in1, in2) exist.

    It multiplies A, as the matrix (out, in1 in2), by the outer products of its inputs, which take batch x in1 x in2
    numbers.

    Args as for `nn.Bilinear`, and `density`, `seed`, `init` as for `SparseLinear`.

    Raises:
        ValueError: when density lies outside [0, 1].

    Examples:
        >>> layer = SparseBilinear(20, 30, 10, density=0.1, seed=0)
        >>> layer
        SparseBilinear(in1_features=20, in2_features=30, out_features=10, bias=True, 600 of 6,000 active)
        >>> layer(torch.zeros(2, 20), torch.zeros(2, 30)).shape
        torch.Size([2, 10])
    """

    dense_type = nn.Bilinear
    in1_features: int
    in2_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dense = nn.Bilinear(in1_features, in2_features, out_features, bias, device="meta")
        self._build(dense, density, seed, init, device, dtype)

    def initial(self, name: str) -> Draw:
        """As `nn.Bilinear` draws weight and bias: U(-1 / sqrt(in1_features), 1 / sqrt(in1_features))."""
        return uniform(1 / math.sqrt(self.in1_features))

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """input1 (..., in1_features) and input2 (..., in2_features) -> (..., out_features)."""
        expected = (self.in1_features, self.in2_features)
        if input1.shape[:-1] != input2.shape[:-1] or (input1.shape[-1], input2.shape[-1]) != expected:
            raise ValueError(
                f"the inputs have shapes {tuple(input1.shape)} and {tuple(input2.shape)}, this SparseBilinear takes "
                f"(..., {expected[0]:,}) and (..., {expected[1]:,}) with the same axes before"
            )
        outer = (input1[..., :, None] * input2[..., None, :]).flatten(-2)
        return self.product("weight", outer, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._describe()}"
        )
