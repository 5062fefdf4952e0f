"""Small-dense: the dense network as large, in bits, as a sparse one; the baseline that sparsity must beat.

One factor narrows all its channel counts, until its size is the nearest to the sparse network's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from regrow.nn import kind_of

# Channels are whole numbers, so sizes change in steps; a millionth resolves a million channels per layer.
_RESOLUTION = 1_000_000
_VALUE_BITS = 32


def small_dense(build: Callable[[float], nn.Module], bits: int) -> float:
    """The width factor in (0, 1] whose dense model has a size nearest to `bits`.

    A model's size is 32 bits for each entry of the weights and biases of its modules of known kinds (Linear,
    Bilinear, convolutions, recurrent and attention modules, transformers' `Conv1D`, registered ones); norms and
    embeddings are not counted, a tied parameter is once. The factor is a whole number of millionths. Many
    round to the same channel counts: of these it is the smallest where the nearest model is larger than `bits`,
    and the largest where it is smaller. Of two models equally near it takes the smaller; `bits` above the full
    width's give 1.0.

    Args:
        build: a width factor in (0, 1] to a model whose size does not fall as the width grows. It is
            called about twenty times under `torch.device("meta")`, so nothing is allocated. The usual
            builder truncates, `max(1, int(width * channels))`, and leaves the counts of the input and of
            the classes alone.
        bits: size of the sparse model, in bits: values, biases, and the bitmap that says where they belong.

    Raises:
        ValueError: `bits` is below 1, the model at full width has no counted entries, or the narrowest
            model is larger than `bits`.

    >>> def build(width):
    ...     hidden = max(1, int(300 * width))
    ...     return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    >>> width = small_dense(build, 32 * 80_000)
    >>> int(300 * width), 100 * 785 + 101 * 10, 101 * 785 + 102 * 10
    (101, 79510, 80305)

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), section 4, "Small-Dense". The bitmap is part of
    `bits`, so the small model has somewhat more weights than the sparse one. The paper gives every layer a
    bias and rounds the widths by hand; here the biases are the model's own and the width is the nearest.
    """
    if bits < 1:
        raise ValueError(f"small_dense: bits must be at least 1, got {bits}")

    def size(steps: int) -> int:
        with torch.device("meta"):
            return _model_bits(build(steps / _RESOLUTION))

    below, above = 0, _RESOLUTION
    size_below, size_above = 0, size(above)
    if size_above == 0:
        raise ValueError(
            "small_dense: the model at width 1.0 has no Linear, convolution, recurrent or attention weight"
        )
    if size_above <= bits:
        return 1.0
    while above - below > 1:
        middle = (below + above) // 2
        size_middle = size(middle)
        if size_middle <= bits:
            below, size_below = middle, size_middle
        else:
            above, size_above = middle, size_middle
    if below == 0:
        raise ValueError(
            f"small_dense: the narrowest model (width {above / _RESOLUTION}) has {size_above} bits, more "
            f"than the {bits} asked for; raise the sparse model's density or scale more by the width"
        )
    nearest = above if size_above - bits < bits - size_below else below
    return nearest / _RESOLUTION


def _model_bits(model: nn.Module) -> int:
    """32 bits for each entry of the parameters that the model's counted modules hold."""
    entries = {
        id(parameter): parameter.numel()
        for module in model.modules()
        if kind_of(type(module)) is not None
        for parameter in module.parameters(recurse=False)
    }
    return _VALUE_BITS * sum(entries.values())
