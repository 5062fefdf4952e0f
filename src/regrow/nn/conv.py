"""Sparse convolutions in one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from regrow.kernels import Geometry
from regrow.nn.base import Draw, Init, SparseModule, uniform

Size = int | tuple[int, ...]


class _SparseConv(SparseModule):
    """What both share; the weight is (out_channels, in_channels / groups, *kernel_size)."""

    DIMENSIONS: ClassVar[int]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(  # noqa: PLR0913 - those of torch's convolutions, and ours
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
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
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = map(self._each, (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        self.padding_mode = "zeros"
        for name in ("weight", "bias"):
            self.register_parameter(name, None)
        shapes = {"weight": (out_channels, in_channels // groups, *self.kernel_size)}
        self._draw(shapes, {"bias": out_channels} if bias else {}, density, seed, init, device, dtype)

    def _each(self, size: Size) -> tuple[int, ...]:
        return (size,) * self.DIMENSIONS if isinstance(size, int) else tuple(size)

    def initial(self, name: str) -> Draw:
        """As torch's convolutions draw weight and bias: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
        return uniform(1 / math.sqrt(max(1, self.in_channels // self.groups * math.prod(self.kernel_size))))

    def forward(self, input: Tensor) -> Tensor:
        """input (N, in_channels, *size), or without N -> (N, out_channels, *size), or without N."""
        batched = input if input.dim() == self.DIMENSIONS + 2 else input[None]
        before, padding = self._padding()
        if any(before):
            batched = nn.functional.pad(
                batched, before, "constant" if self.padding_mode == "zeros" else self.padding_mode
            )
        image = batched if self.DIMENSIONS == 2 else batched[:, :, None]
        kernel, stride, dilation = _pair(self.kernel_size), _pair(self.stride), _pair(self.dilation)
        geometry = Geometry(kernel, stride, _pair(padding, 0), dilation, self.groups)
        y = self.convolution("weight", image, self.bias, geometry)
        y = y if self.DIMENSIONS == 2 else y[:, :, 0]
        return y if input.dim() == self.DIMENSIONS + 2 else y[0]

    def _padding(self) -> tuple[list[int], Sequence[int]]:
        """What is added around the input beforehand, last dimension first, and what the kernel pads by itself."""
        none = (0,) * self.DIMENSIONS
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        elif self.padding == "valid":
            return [], none
        else:
            assert not isinstance(self.padding, str)
            sides = [p for p in reversed(self.padding) for _ in range(2)]
        symmetric = all(sides[i] == sides[i + 1] for i in range(0, len(sides), 2))
        if self.padding_mode == "zeros" and symmetric:
            return [], sides[::-2]
        return sides, none

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, groups={self.groups}, bias={self.bias is not None}, {self._describe()}"
        )


def _pair(size: Sequence[int], first: int = 1) -> tuple[int, int]:
    """Two numbers, the first of which stands for a dimension that is not there."""
    return (size[0], size[1]) if len(size) == 2 else (first, size[0])


class SparseConv2d(_SparseConv):
    """`nn.Conv2d` of whose weight only the active entries exist.

    Args as for `nn.Conv2d`, and `density`, `seed`, `init` as for `SparseLinear`.

    Raises:
        ValueError: when density lies outside [0, 1] or groups do not divide the channels.

    Examples:
        >>> SparseConv2d(16, 32, 3, padding=1, density=0.1, seed=0)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    dense_type = nn.Conv2d
    DIMENSIONS = 2


class SparseConv1d(_SparseConv):
    """`nn.Conv1d` of whose weight only the active entries exist; see `SparseConv2d`.

    Examples:
        >>> SparseConv1d(16, 32, 3, padding="same", density=0.1, seed=0)(torch.zeros(2, 16, 9)).shape
        torch.Size([2, 32, 9])
    """

    dense_type = nn.Conv1d
    DIMENSIONS = 1
