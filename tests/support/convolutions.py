"""Convolutions of all kinds of sizes, and what they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    images: int
    channels: int
    height: int
    width: int
    filters: int
    kernel_height: int = 3
    kernel_width: int = 3
    stride_height: int = 1
    stride_width: int = 1
    padding_height: int = 1
    padding_width: int = 1
    dilation_height: int = 1
    dilation_width: int = 1
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.filters, self.channels // self.groups, self.kernel_height, self.kernel_width

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.channels, self.height, self.width

    @property
    def windows(self) -> tuple[list[int], list[int], list[int]]:
        return (
            [self.stride_height, self.stride_width],
            [self.padding_height, self.padding_width],
            [self.dilation_height, self.dilation_width],
        )

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = self.windows
        return F.conv2d(x, weight, bias, stride, padding, dilation, self.groups)

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stride, padding, dilation = self.windows
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0, 0], self.groups, [True, True, False]
        )
        return dx, dweight


GEOMETRIES = {
    "residual": Geometry(64, 8, 8, 8, 16),
    "strided": Geometry(33, 16, 17, 13, 12, stride_height=2, stride_width=2),
    "shortcut": Geometry(17, 6, 8, 8, 4, 1, 1, 2, 2, 0, 0),
    "pointwise": Geometry(20, 40, 5, 7, 33, 1, 1, padding_height=0, padding_width=0),
    "stride 3 beyond the kernel": Geometry(16, 3, 14, 11, 5, 1, 2, 3, 3),
    "dilated": Geometry(18, 7, 19, 16, 9, dilation_height=3, dilation_width=2, padding_height=3, padding_width=2),
    "dilated and strided": Geometry(16, 5, 20, 21, 6, 3, 3, 2, 3, 2, 0, 3, 2),
    "5x5": Geometry(16, 4, 9, 50, 6, 5, 5, padding_height=2, padding_width=2),
    "1x3": Geometry(40, 9, 6, 33, 10, 1, 3, padding_height=0),
    "one-dimensional": Geometry(19, 12, 1, 70, 8, 1, 5, padding_height=0, padding_width=4),
    "grouped": Geometry(16, 12, 8, 8, 18, groups=3),
    "depthwise": Geometry(21, 40, 6, 6, 80, groups=40),
    "many channels": Geometry(3, 300, 4, 4, 70),
    "many filters": Geometry(16, 3, 4, 4, 1100),
    "wide": Geometry(16, 2, 3, 150, 3),
    "one position": Geometry(100, 5, 1, 1, 7),
    "one image": Geometry(1, 6, 32, 32, 5),
    "three images": Geometry(3, 6, 10, 12, 5),
    "one connection": Geometry(1, 1, 1, 1, 1, 1, 1, padding_height=0, padding_width=0),
    "no image": Geometry(0, 4, 8, 8, 4),
    "stem": Geometry(16, 3, 40, 36, 8, 7, 7, 2, 2, 3, 3),
}
