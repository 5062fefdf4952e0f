"""Small reference networks for the command line, built by name from an input shape and the classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.nn import SparseLinear

Shape = tuple[int, int, int]


class Model(NamedTuple):
    """A row of ``MODELS``: hidden widths in units, whether ``hidden`` may replace them, the constructor."""

    hidden: tuple[int, ...]
    free: bool
    make: Callable[[Shape, int, tuple[int, ...]], nn.Module]


def build(
    name: str,
    input_shape: Shape,
    classes: int,
    *,
    width: float = 1.0,
    hidden: Sequence[int] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a named model that maps images (n, c, h, w) to logits (n, classes), with He initialisation.

    ``input_shape`` is (c, h, w) in pixels. ``width`` multiplies every hidden width (truncated, at least 1)
    and leaves input and classes alone: a small dense baseline. ``hidden`` gives the widths of ``mlp`` and ``convnet``,
    before ``width``. With ``seed`` the values are the same on every device and the global random state is left as it
    was; without, they come from the global CPU state. Inside ``torch.device("meta")`` nothing is allocated.

    Raises ValueError for an unknown name, a shape or number of classes below 1, a ``width`` that is not
    positive and finite, and for ``hidden`` below 1 or where the model's widths are fixed.

    >>> model = build("lenet-300-100", (1, 28, 28), 10, seed=0)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.dim() > 1]
    [('fc1.weight', (300, 784)), ('fc2.weight', (100, 300)), ('fc3.weight', (10, 100))]
    """
    model = MODELS.get(name)
    if model is None:
        raise ValueError(f"there is no model {name!r}: choose {', '.join(MODELS)}.")
    if len(input_shape) != len("chw") or min(*input_shape, classes) < 1:
        given = f"{tuple(input_shape)} and {classes}"
        raise ValueError(f"{name} needs an input shape (c, h, w) and classes of at least 1, not {given}.")
    if not 0 < width < float("inf"):
        raise ValueError(f"{name} needs a width above 0 and finite, not {width}.")
    if hidden is not None and not model.free:
        free = ", ".join(other for other, row in MODELS.items() if row.free)
        raise ValueError(f"{name} has the hidden widths {model.hidden}: scale them by width, or take {free}.")
    widths = model.hidden if hidden is None else tuple(hidden)
    if min(widths, default=1) < 1:
        raise ValueError(f"{name} needs hidden widths of at least 1, not {widths}.")
    return _made(model, input_shape, classes, _scaled(widths, width), seed)


def vision_input_layer(model: nn.Module) -> str | None:
    """Name the Linear layer that reads the flattened image, or None where another kind of layer comes first.

    It is the first module in registration order that holds parameters of its own, if that is a Linear, dense or
    sparse: its weight is (out, c * h * w). A model that is itself a Linear has the name "". Raises nothing.

    >>> vision_input_layer(build("mlp", (1, 8, 8), 10)), vision_input_layer(build("wrn-22-2", (3, 8, 8), 10))
    ('fc1', None)
    """
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            return name if isinstance(module, (nn.Linear, SparseLinear)) else None
    return None


def _scaled(widths: Sequence[int], width: float) -> tuple[int, ...]:
    # 100 x 0.29 is 28.999999999999996 in binary; what was meant is 29.
    return tuple(max(1, int(size * width + 1e-9)) for size in widths)


def _made(model: Model, shape: Shape, classes: int, widths: tuple[int, ...], seed: int | None) -> nn.Module:
    target = torch.get_default_device()
    if target.type == "meta":
        return model.make(shape, classes, widths)
    # Made on the CPU wherever it is wanted, so that a seed means the same values on every device.
    with torch.device("cpu"), torch.random.fork_rng(devices=(), enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        made = model.make(shape, classes, widths)
        _initialise(made)
    return made.to(target)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


def _perceptron(shape: Shape, classes: int, widths: tuple[int, ...]) -> nn.Module:
    channels, height, wide = shape
    sizes = (channels * height * wide, *widths, classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers[f"fc{i}"] = nn.Linear(fan_in, fan_out)
        if i <= len(widths):
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def _wide_resnet(shape: Shape, classes: int, widths: tuple[int, ...]) -> nn.Module:
    return WideResNet(shape[0], classes, widths, blocks=3)


class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions, each after batch norm and ReLU, around which the input is carried unchanged.

    Maps (n, inputs, h, w) to (n, outputs, h / stride, w / stride), rounded up; where the shape changes, a
    1 x 1 convolution of the activated input takes the place of the identity. Raises RuntimeError for another
    number of channels.

    >>> PreActivationBlock(4, 8, stride=2)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        active = F.relu(self.bn1(x))
        carried = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = carried + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out


class WideResNet(nn.Module):
    """A pre-activation wide residual network (Zagoruyko and Komodakis, 2016) with the stem for small images.

    Maps images (n, channels, h, w) to logits (n, classes). ``widths`` are the channels of the stem and of the
    groups, which halve the resolution from the second on; each has ``blocks`` blocks of two convolutions, so
    three groups make a depth of ``6 * blocks + 4``. Raises RuntimeError for another number of channels.

    >>> WideResNet(3, 10, (4, 8, 16, 32), blocks=1)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        groups: OrderedDict[str, nn.Module] = OrderedDict()
        for g, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            for b in range(1, blocks + 1):
                stride = 2 if g > 1 and b == 1 else 1
                given = inputs if b == 1 else outputs
                groups[f"group{g}_block{b}"] = PreActivationBlock(given, outputs, stride)
        self.body = nn.Sequential(groups)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to logits (n, classes)."""
        x = F.relu(self.bn(self.body(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _plain_convolutions(shape: Shape, classes: int, widths: tuple[int, ...]) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (inputs, outputs) in enumerate(pairwise((shape[0], *widths)), start=1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, stride=1 if i == 1 else 2, padding=1, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(widths[-1], classes))
    return nn.Sequential(layers)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each before batch norm, around which the input is carried.

    Maps (n, inputs, h, w) to (n, outputs, h / stride, w / stride), rounded up; where the shape changes, a 1 x 1
    convolution and batch norm take the place of the identity. Raises RuntimeError for another number of channels.

    >>> Bottleneck(4, 2, 8, stride=2)(torch.zeros(2, 4, 6, 6)).shape
    torch.Size([2, 8, 3, 3])
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.shortcut is None else self.shortcut(x)))


def _resnet_50(shape: Shape, classes: int, widths: tuple[int, ...]) -> nn.Module:
    stem, *inner = widths
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(shape[0], stem, 3, padding=1, bias=False), bn=nn.BatchNorm2d(stem), relu=nn.ReLU()
    )
    inputs = stem
    for g, (width, depth) in enumerate(zip(inner, (3, 4, 6, 3), strict=True), start=1):
        for b in range(1, depth + 1):
            layers[f"group{g}_block{b}"] = Bottleneck(inputs, width, 4 * width, 2 if g > 1 and b == 1 else 1)
            inputs = 4 * width
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inputs, classes))
    return nn.Sequential(layers)


MODELS: dict[str, Model] = {
    "mlp": Model((256, 256), True, _perceptron),
    "lenet-300-100": Model((300, 100), False, _perceptron),
    "convnet": Model((32, 64, 128, 256), True, _plain_convolutions),
    "wrn-22-2": Model((16, 32, 64, 128), False, _wide_resnet),
    "resnet-50": Model((64, 64, 128, 256, 512), False, _resnet_50),
}
