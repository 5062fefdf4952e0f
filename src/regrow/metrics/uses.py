"""How often one call of a layer multiplies each entry of its weights, and how much comes out."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence

from regrow.nn import SparseModule

_KINDS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.MultiheadAttention),
)


class Use(NamedTuple):
    """What one call of a module does with one weight.

    `times` says, for each equal block of leading rows, how often one of its entries is multiplied; `outputs`
    how many numbers come out.
    """

    times: tuple[int, ...]
    outputs: int


def dense_type(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or the dense class that a sparse module stands for."""
    return module.dense_type if isinstance(module, SparseModule) else type(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution that is not transposed."""
    return issubclass(dense_type(module), _ConvNd) and not issubclass(dense_type(module), _ConvTransposeNd)


def _is_conv1d(module: nn.Module) -> bool:
    # By name, because transformers is not a dependency.
    return any(cls.__name__ == "Conv1D" for cls in dense_type(module).__mro__)


def _is_recurrent(module: nn.Module) -> bool:
    return issubclass(dense_type(module), (nn.RNNBase, nn.RNNCellBase))


def _is_attention(module: nn.Module) -> bool:
    return issubclass(dense_type(module), nn.MultiheadAttention)


def kind(module: nn.Module) -> str:
    """The torch class that `module` is counted as, or the name of its own."""
    for cls in _KINDS:
        if issubclass(dense_type(module), cls):
            return cls.__name__
    return "Conv1D" if _is_conv1d(module) else dense_type(module).__name__


def shape(module: nn.Module, weight: str) -> tuple[int, ...]:
    """The shape of a weight that `module` holds; of a sparse one, the shape with its zeros."""
    if isinstance(module, SparseModule) and weight in module.shapes:
        return module.shapes[weight]
    return tuple(getattr(module, weight).shape)


def densities(module: nn.Module, weight: str, count: int) -> list[float]:
    """The density of each of `count` equal blocks of leading rows, which is 1 in a dense weight."""
    if not isinstance(module, SparseModule) or weight not in module.shapes:
        return [1.0] * count
    topology = module.topology(weight)
    rows = topology.rows // count
    return [topology.block(i * rows, (i + 1) * rows).density for i in range(count)]


def blocks(module: nn.Module) -> dict[str, int]:
    """The counted weights that `module` itself holds, each with its number of blocks of leading rows."""
    own: Any = module
    if _is_recurrent(module):
        return {
            name: 1 if name.startswith("weight_hr") else shape(module, name)[0] // own.hidden_size
            for name, _ in module.named_parameters(recurse=False)
            if name.startswith("weight_")
        }
    if _is_attention(module):
        if own.in_proj_weight is not None:
            return {"in_proj_weight": 3}
        return {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    return {"weight": 1} if issubclass(dense_type(module), (nn.Linear, _ConvNd)) or _is_conv1d(module) else {}


def uses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Use]:
    """What one call of `module` does with each of its counted weights."""
    own: Any = module
    if _is_attention(module):
        return _attention_uses(own, args, kwargs, output)
    if _is_recurrent(module):
        return _recurrent_uses(own, output)
    if is_convolution(module):
        return {"weight": Use((output.numel() // own.out_channels,), output.numel())}
    if issubclass(dense_type(module), _ConvTransposeNd):
        return {"weight": Use((input_of(args, kwargs).numel() // own.in_channels,), output.numel())}
    return {"weight": Use((output.numel() // output.shape[-1],), output.numel())}


def _recurrent_uses(module: Any, output: Any) -> dict[str, Use]:
    first = output[0] if isinstance(output, tuple) else output
    states = first.data if isinstance(first, PackedSequence) else first
    width = module.hidden_size
    if issubclass(dense_type(module), nn.RNNBase):
        width = (module.proj_size or width) * (2 if module.bidirectional else 1)
    steps = states.numel() // width
    return {name: Use((steps,) * count, steps * shape(module, name)[0]) for name, count in blocks(module).items()}


def _attention_uses(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Use]:
    call = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
    width = module.embed_dim
    tokens = (
        call["query"].numel() // width,
        call["key"].numel() // module.kdim,
        call["value"].numel() // module.vdim,
    )
    if module.in_proj_weight is not None:
        projections = {"in_proj_weight": Use(tokens, sum(tokens) * width)}
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        projections = {name: Use((n,), n * width) for name, n in zip(names, tokens, strict=True)}
    if isinstance(module, SparseModule):
        return projections
    # Dense attention multiplies by the output projection's weight without calling that module: no hook of it fires.
    return {**projections, "out_proj.weight": Use((tokens[0],), output[0].numel())}


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a linear or convolutional module was called with."""
    tensor = args[0] if args else kwargs["input"]
    assert isinstance(tensor, Tensor)
    return tensor


def paper_use(module: nn.Module, tensor: Tensor, use: Use, is_first: bool) -> Use:
    """`use` as the paper's code has it, for a convolution of `tensor` (batch, channels, *sizes)."""
    conv: Any = module
    is_depthwise = conv.groups == conv.in_channels > 1
    (positions,) = use.times
    is_strided = any(stride > 1 for stride in conv.stride)
    if (is_first or is_depthwise) and is_strided and not isinstance(conv.padding, str) and any(conv.padding):
        sizes = tensor.shape[-len(conv.stride) :]
        positions = tensor.numel() // (conv.in_channels * math.prod(sizes))
        axes = zip(sizes, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        for size, kernel, stride, pad, step in axes:
            reach = step * (kernel - 1) + 1
            positions *= math.ceil((size + 2 * pad - reach + 1 + 2 * (reach // 2)) / stride)
    outputs = conv.out_channels // conv.in_channels if is_depthwise else conv.out_channels
    return Use((positions,), positions * outputs)
