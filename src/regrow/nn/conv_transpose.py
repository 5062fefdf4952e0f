"""Sparse transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regrow.core.topology import Topology
from regrow.kernels import Geometry
from regrow.nn.base import Init
from regrow.nn.conv import Size, SparseConvolution, require_groups
from regrow.nn.planes import fold, pair


class _SparseConvTranspose(SparseConvolution):
    """What all dimensions share; the weight is (in_channels, out_channels / groups, *kernel_size)."""

    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    def __init__(  # noqa: PLR0913 - those of torch's convolutions, and ours
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: Literal["zeros"] = "zeros",
        *,
        density: float,
        seed: int | None = None,
        init: Init = "module",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_groups(groups, in_channels, out_channels)
        make: Any = self.dense_type
        options = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        dense = make(in_channels, out_channels, *options, device="meta")
        self._build(dense, density, seed, init, device, dtype, out_axis=1)

    @property
    def fan_in(self) -> int:
        """Outputs of one input position, which torch takes for the number of inputs."""
        return self.out_channels // self.groups * math.prod(self.kernel_size)

    def runs_on_units(self, topology: Topology) -> bool:
        # Rows are inputs here.
        return False

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """input (N, in_channels, *size), or without N -> (N, out_channels, *output_size), or without N.

        Args:
            input: to be spread over the kernel.
            output_size: of the output, with or without its leading axes; None takes `output_padding`.
        """
        x = self._batched(input)
        extra = self._output_padding(x, output_size)
        # A whole stride more of output belongs to one more position of the input, of zeros.
        more = [e // s for e, s in zip(extra, self.stride, strict=True)]
        if any(more):
            x = nn.functional.pad(x, [side for n in reversed(more) for side in (0, n)])
        y = self._spread(x, [e % s for e, s in zip(extra, self.stride, strict=True)])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).view(-1, *[1] * self.DIMENSIONS)
        return y if input.dim() == self.DIMENSIONS + 2 else y[0]

    def _output_padding(self, x: Tensor, output_size: Sequence[int] | None) -> list[int]:
        """What each dimension of the output has beyond the least that x (N, C, *size) asks for."""
        make: Any = self.dense_type
        asked = None if output_size is None else list(output_size)
        options = (self.stride, self.padding, self.kernel_size, self.DIMENSIONS, self.dilation)
        extra = list(make._output_padding(self, x, asked, *options))
        if any(e >= max(s, d) for e, s, d in zip(extra, self.stride, self.dilation, strict=True)):
            raise ValueError(
                f"output_padding={tuple(extra)} must be smaller than stride={self.stride} or dilation={self.dilation}"
            )
        return extra

    def _spread(self, x: Tensor, extra: Sequence[int]) -> Tensor:
        """The product with x (N, C, *size), with `extra` positions at the end of each dimension: (N, O, *size)."""
        kernel, stride, dilation = pair(self.kernel_size), pair(self.stride), pair(self.dilation)
        geometry = Geometry(kernel, stride, pair(self.padding, 0), dilation, self.groups)
        image = (
            x if self.DIMENSIONS == 2 else x[:, :, None] if self.DIMENSIONS == 1 else x.transpose(1, 2).flatten(0, 1)
        )
        least = geometry.smallest(image.shape[2], image.shape[3])
        below, beside = pair(extra, 0)
        y = self.transposed_convolution("weight", image, geometry, (least[0] + below, least[1] + beside))
        if self.DIMENSIONS < 3:
            return y if self.DIMENSIONS == 2 else y[:, :, 0]
        steps, padding = x.shape[2], self.padding[0]
        depth = (steps - 1) * self.stride[0] + self.dilation[0] * (self.kernel_size[0] - 1) + 1 + extra[0]
        if depth <= 2 * padding:
            raise ValueError(f"an input of depth {steps} leaves nothing of an output padded by {padding}: pad it less")
        whole = fold(y, steps, self.kernel_size[0], self.stride[0], self.dilation[0], depth)
        return whole[:, :, padding : depth - padding].contiguous()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output_padding={self.output_padding}"


class SparseConvTranspose2d(_SparseConvTranspose):
    """`nn.ConvTranspose2d` of whose weight only the active entries exist.

    Args as for `nn.ConvTranspose2d`, and `density`, `seed`, `init` as for `SparseLinear`.

    Raises:
        ValueError: when density lies outside [0, 1] or groups do not divide the channels.

    Examples:
        >>> layer = SparseConvTranspose2d(16, 8, 4, stride=2, padding=1, density=0.1, seed=0)
        >>> layer(torch.zeros(2, 16, 7, 7)).shape
        torch.Size([2, 8, 14, 14])
    """

    dense_type = nn.ConvTranspose2d
    DIMENSIONS = 2


class SparseConvTranspose1d(_SparseConvTranspose):
    """`nn.ConvTranspose1d` of whose weight only the active entries exist; see `SparseConvTranspose2d`.

    Examples:
        >>> SparseConvTranspose1d(16, 8, 3, density=0.1, seed=0)(torch.zeros(2, 16, 9)).shape
        torch.Size([2, 8, 11])
    """

    dense_type = nn.ConvTranspose1d
    DIMENSIONS = 1


class SparseConvTranspose3d(_SparseConvTranspose):
    """`nn.ConvTranspose3d` of whose weight only the active entries exist; see `SparseConvTranspose2d`.

    Examples:
        >>> SparseConvTranspose3d(4, 8, 2, stride=2, density=0.1, seed=0)(torch.zeros(2, 4, 3, 4, 5)).shape
        torch.Size([2, 8, 6, 8, 10])
    """

    dense_type = nn.ConvTranspose3d
    DIMENSIONS = 3
