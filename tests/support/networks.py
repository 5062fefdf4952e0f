"""Plain networks of the papers, for tests that need a published figure: buildable on the meta device."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, truncated, never less than one."""
    return max(1, int(channels * width))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride: version 1.5), 1x1, and a projection where the shape changes."""

    def __init__(self, n_in: int, n_mid: int, n_out: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_mid, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(n_mid)
        self.conv2 = nn.Conv2d(n_mid, n_mid, 3, stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(n_mid)
        self.conv3 = nn.Conv2d(n_mid, n_out, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            project = nn.Conv2d(n_in, n_out, 1, stride, bias=bias)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n_in, h, w) to (batch, n_out, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet50(width: float = 1.0, *, classes: int = 1000, bias: bool = False) -> nn.Sequential:
    """ResNet-50 v1.5 under torchvision's names; `width` scales all channels but the image's and the classes'.

    `bias=True` gives every convolution the bias that the RigL paper's accounting assumes.
    """
    stem = scaled(64, width)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, stem, 7, 2, padding=3, bias=bias),
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, padding=1),
    )
    n_in = stem
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        n_mid, n_out = scaled(32 * 2**stage, width), scaled(128 * 2**stage, width)
        blocks = []
        for index in range(depth):
            stride = 2 if stage > 1 and index == 0 else 1
            blocks.append(Bottleneck(n_in, n_mid, n_out, stride, bias))
            n_in = n_out
        parts[f"layer{stage}"] = nn.Sequential(*blocks)
    parts.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(n_in, classes))
    return nn.Sequential(parts)


def mobilenet_v1(width: float = 1.0, *, classes: int = 1000, bias: bool = False) -> nn.Sequential:
    """MobileNet-v1; `width` scales all channels but the image's and the classes'."""
    plan = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    reducing = {2, 4, 6, 12}
    channels = [scaled(c, width) for c in plan]

    def unit(conv: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), relu=nn.ReLU6()))

    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=unit(nn.Conv2d(3, channels[0], 3, 2, padding=1, bias=bias)))
    for index, (n_in, n_out) in enumerate(pairwise(channels), start=1):
        stride = 2 if index in reducing else 1
        depthwise = nn.Conv2d(n_in, n_in, 3, stride, padding=1, groups=n_in, bias=bias)
        parts[f"depthwise{index}"] = unit(depthwise)
        parts[f"pointwise{index}"] = unit(nn.Conv2d(n_in, n_out, 1, bias=bias))
    parts.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels[-1], classes))
    return nn.Sequential(parts)
