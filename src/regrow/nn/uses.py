"""How often one call of a layer multiplies each entry of its weights, and how much comes out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regrow.nn.base import SparseModule, shape_of


class Use(NamedTuple):
    """What one call of a module does with one weight."""

    times: tuple[int, ...]
    """How often one entry is multiplied, for each equal block of leading rows."""
    outputs: int
    """How many numbers come out."""


class Call(NamedTuple):
    """One call of a module, dense or sparse."""

    module: Any
    weights: Mapping[str, int]
    """The weights that it holds, each with its number of equal blocks of leading rows."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def input(self) -> Tensor:
        """The one tensor that a convolution was called with."""
        tensor = self.args[0] if self.args else self.kwargs["input"]
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def first(self) -> Tensor:
        """The first tensor that came out, (..., features)."""
        found = self.output
        while not isinstance(found, Tensor):
            found = found.data if isinstance(found, PackedSequence) else found[0]
        return found


Uses = Callable[[Call], dict[str, Use]]
"""What a call does with each weight that it multiplies by; names may lead into children, as "out_proj.weight"."""


def linear_uses(call: Call) -> dict[str, Use]:
    """Every weight makes the whole output (..., features), each entry multiplied once for each vector of features."""
    outputs = call.first.numel()
    return {name: Use((outputs // call.first.shape[-1],) * blocks, outputs) for name, blocks in call.weights.items()}


def convolution_uses(call: Call) -> dict[str, Use]:
    """Each entry is multiplied once for each output position, those included where it meets padding."""
    outputs = call.output.numel()
    return {"weight": Use((outputs // call.module.out_channels,), outputs)}


def transposed_convolution_uses(call: Call) -> dict[str, Use]:
    """Each entry is multiplied once for each input position, those included whose output is cropped."""
    return {"weight": Use((call.input.numel() // call.module.in_channels,), call.output.numel())}


def recurrent_uses(call: Call) -> dict[str, Use]:
    """Each entry is multiplied once for each step of each sequence."""
    module = call.module
    return _steps(call, (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1))


def cell_uses(call: Call) -> dict[str, Use]:
    """Each entry is multiplied once for each state (..., hidden_size) that comes out."""
    return _steps(call, call.module.hidden_size)


def _steps(call: Call, width: int) -> dict[str, Use]:
    steps = call.first.numel() // width
    return {name: Use((steps,) * n, steps * shape_of(call.module, name)[0]) for name, n in call.weights.items()}


def attention_uses(call: Call) -> dict[str, Use]:
    """The projections of queries, keys and values, each for as many tokens as there are."""
    module = call.module
    given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *call.args, **call.kwargs).arguments
    width = module.embed_dim
    features = {"query": width, "key": module.kdim, "value": module.vdim}
    tokens = tuple(given[name].numel() // size for name, size in features.items())
    if "in_proj_weight" in call.weights:
        found = {"in_proj_weight": Use(tokens, sum(tokens) * width)}
    else:
        found = {name: Use((n,), n * width) for name, n in zip(call.weights, tokens, strict=True)}
    if not isinstance(module, SparseModule):
        # Dense attention multiplies by the output projection's weight without calling that module: no hook of it fires.
        found["out_proj.weight"] = Use((tokens[0],), call.first.numel())
    return found


def paper_uses(call: Call, is_first: bool) -> dict[str, Use]:
    """What a convolution (batch, channels, *sizes) does by the code of the RigL paper, which differs in two points.

    A strided one that is the model's first or depthwise gets its padding twice; a depthwise one has one output channel.
    """
    conv = call.module
    is_depthwise = conv.groups == conv.in_channels > 1
    (positions,) = convolution_uses(call)["weight"].times
    is_strided = any(stride > 1 for stride in conv.stride)
    if (is_first or is_depthwise) and is_strided and not isinstance(conv.padding, str) and any(conv.padding):
        sizes = call.input.shape[-len(conv.stride) :]
        positions = call.input.numel() // (conv.in_channels * math.prod(sizes))
        axes = zip(sizes, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        for size, kernel, stride, pad, step in axes:
            reach = step * (kernel - 1) + 1
            positions *= math.ceil((size + 2 * pad - reach + 1 + 2 * (reach // 2)) / stride)
    outputs = conv.out_channels // conv.in_channels if is_depthwise else conv.out_channels
    return {"weight": Use((positions,), positions * outputs)}
