"""Convolutions of one and of three dimensions as ones of two.

One dimension is an image of height 1. Of three, the depth goes into the channels: a weight (out, in, depth, height,
width) lies in memory as (out, in * depth, height, width), so each step along the depth is an image, whose channels are
those of all planes that the kernel sees there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(size: Sequence[int], first: int = 1) -> tuple[int, int]:
    """The last two numbers; `first` stands for a height that is not there."""
    return (size[-2], size[-1]) if len(size) > 1 else (first, size[0])


def unfold(x: Tensor, kernel: int, stride: int, dilation: int) -> tuple[Tensor, int]:
    """What each step along the depth sees, and how many steps: x (N, C, D, H, W) -> (N * steps, C * kernel, H, W).

    Raises:
        ValueError: when the depth is smaller than the kernel.
    """
    n, channels, depth, *plane = x.shape
    reach = dilation * (kernel - 1) + 1
    if depth < reach:
        raise ValueError(
            f"the input of depth {depth}, padding included, is smaller than the kernel of {kernel} with dilation "
            f"{dilation}: give a deeper one or more padding"
        )
    steps = (depth - reach) // stride + 1
    seen = x.index_select(2, _seen(steps, kernel, stride, dilation, x.device))
    split = seen.view(n, channels, steps, kernel, *plane).transpose(1, 2)
    return split.reshape(n * steps, channels * kernel, *plane), steps


def fold(y: Tensor, steps: int, kernel: int, stride: int, dilation: int, depth: int) -> Tensor:
    """The transpose of `unfold`: y (N * steps, C * kernel, H, W) -> (N, C, depth, H, W), summed over steps."""
    n, channels, plane = y.shape[0] // steps, y.shape[1] // kernel, y.shape[2:]
    split = y.view(n, steps, channels, kernel, *plane).transpose(1, 2)
    planes = split.reshape(n, channels, steps * kernel, *plane)
    blank = y.new_zeros(n, channels, depth, *plane)
    return blank.index_add(2, _seen(steps, kernel, stride, dilation, y.device), planes)


def _seen(steps: int, kernel: int, stride: int, dilation: int, device: torch.device) -> Tensor:
    """(steps * kernel,) the planes that each step sees."""
    first = torch.arange(steps, device=device) * stride
    return (first[:, None] + torch.arange(kernel, device=device) * dilation).flatten()
