"""Sparse convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.core.topology import Topology
from regrow.kernels import Geometry
from regrow.nn.base import Draw, Init, SparseModule, uniform
from regrow.nn.planes import pair, unfold

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class SparseConvolution(SparseModule):
    """What convolutions and transposed ones share: the options of torch's, with their names."""

    DIMENSIONS: ClassVar[int]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def fan_in(self) -> int:
        """Entries of the weight behind its first axis."""
        raise NotImplementedError

    def initial(self, name: str) -> Draw:
        """As torch's convolutions draw weight and bias: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
        return uniform(1 / math.sqrt(max(1, self.fan_in)))

    def _batched(self, input: Tensor) -> Tensor:
        """`input` with a batch of one where it has none: (N, in_channels, *size).

        Raises:
            ValueError: when its axes or channels do not fit.
        """
        dims = self.DIMENSIONS
        if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != self.in_channels:
            raise ValueError(
                f"the input has shape {tuple(input.shape)}, this {type(self).__name__} takes (N, {self.in_channels:,}, "
                f"{', '.join('DHW'[-dims:])})"
            )
        return input if input.dim() == dims + 2 else input[None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, groups={self.groups}, bias={self.bias is not None}, {self._describe()}"
        )


def require_groups(groups: int, in_channels: int, out_channels: int) -> None:
    """Raise ValueError unless `groups` divides both numbers of channels."""
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")


class _SparseConv(SparseConvolution):
    """What all dimensions share; the weight is (out_channels, in_channels / groups, *kernel_size)."""

    padding: str | tuple[int, ...]
    padding_mode: str

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
        padding_mode: PaddingMode = "zeros",
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_groups(groups, in_channels, out_channels)
        make: Any = self.dense_type
        options = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        dense = make(in_channels, out_channels, *options, device="meta")
        self._build(dense, density, seed, init, device, dtype)

    @property
    def fan_in(self) -> int:
        """Inputs of one output position."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def runs_on_units(self, topology: Topology) -> bool:
        return kernels.has_kernels(topology, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """input (N, in_channels, *size), or without N -> (N, out_channels, *size), or without N."""
        x = self._batched(input)
        before, padding = self._padding()
        if any(before):
            x = nn.functional.pad(x, before, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        kernel, stride, dilation = pair(self.kernel_size), pair(self.stride), pair(self.dilation)
        geometry = Geometry(kernel, stride, pair(padding, 0), dilation, self.groups)
        y = self._convolve(x, geometry)
        return y if input.dim() == self.DIMENSIONS + 2 else y[0]

    def _convolve(self, x: Tensor, geometry: Geometry) -> Tensor:
        """The convolution of x (N, C, *size), of which `geometry` holds the last two dimensions."""
        if self.DIMENSIONS == 1:
            return self.convolution("weight", x[:, :, None], self.bias, geometry)[:, :, 0]
        if self.DIMENSIONS == 2:
            return self.convolution("weight", x, self.bias, geometry)
        image, steps = unfold(x, self.kernel_size[0], self.stride[0], self.dilation[0])
        y = self.convolution("weight", image, self.bias, geometry)
        return y.view(x.shape[0], steps, *y.shape[1:]).transpose(1, 2).contiguous()

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
        if self.padding_mode != "zeros" or not symmetric:
            return sides, none
        # The kernel pads height and width; the depth is unfolded before it sees anything.
        depth = self.DIMENSIONS - 2
        return ([0, 0, 0, 0, *sides[4:]] if depth > 0 else []), sides[::-2]


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


class SparseConv3d(_SparseConv):
    """`nn.Conv3d` of whose weight only the active entries exist; see `SparseConv2d`.

    It is computed as a two-dimensional convolution of the input unfolded along its depth, which takes as many times the
    memory of the input as the kernel is deep.

    Examples:
        >>> SparseConv3d(4, 8, 3, padding=1, density=0.1, seed=0)(torch.zeros(2, 4, 5, 6, 7)).shape
        torch.Size([2, 8, 5, 6, 7])
    """

    dense_type = nn.Conv3d
    DIMENSIONS = 3
