"""Bits and bytes of sparse weights on disk or on the wire, from shapes and numbers of active entries.

Three forms: `bitmap` (the values of the active entries and one bit per entry, the RigL paper's account),
`csr` (the values, a column for each, and a pointer per row), and `dense` (every entry, active or not).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

Form = Literal["bitmap", "csr", "dense"]

_BIAS_BITS = 32
_INDEX_BITS = 32
_LARGEST_INDEX = 2**31 - 1


def weight_bits(shape: Sequence[int], nnz: int, *, form: Form = "bitmap", value_bits: int = 32) -> int:
    """Bits of one weight of `numel = prod(shape)` entries, `nnz` of them active.

        bitmap:  value_bits * nnz + numel, without the numel where all entries are active
        csr:     (value_bits + 32) * nnz + 32 * (rows + 1), with int32 columns and row pointers
        dense:   value_bits * numel

    In `csr` the first dimension makes the rows and all others together the columns: a convolution's weight
    (out, in / groups, kh, kw) is a matrix of `out` rows and `in / groups * kh * kw` columns.

    Args:
        shape: the weight's shape.
        nnz: active entries, between 0 and numel.
        form: how it is stored.
        value_bits: bits of one value: 32, 16, 8, ...

    Raises:
        ValueError: `nnz` outside [0, numel], value bits below 1, an unknown form, or a `csr` whose columns or
            entries do not fit int32.

    >>> weight_bits((300, 784), 4704)
    385728
    >>> weight_bits((300, 784), 4704, form="csr")
    310688

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), appendix "Calculating FLOPs of models and
    methods" and its code, for `bitmap` at 32 bits.
    """
    numel = math.prod(shape)
    if not 0 <= nnz <= numel:
        raise ValueError(f"weight_bits: nnz must lie in [0, {numel}] for shape {tuple(shape)}, got {nnz}")
    if value_bits < 1:
        raise ValueError(f"weight_bits: value_bits must be at least 1, got {value_bits}")
    if form == "bitmap":
        return value_bits * nnz + (numel if nnz < numel else 0)
    if form == "csr":
        rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
        if max(nnz, columns - 1) > _LARGEST_INDEX:
            raise ValueError(
                f"weight_bits: {nnz} entries in {columns} columns do not fit the int32 indices of csr, "
                f'which end at {_LARGEST_INDEX}; use form="bitmap"'
            )
        return (value_bits + _INDEX_BITS) * nnz + _INDEX_BITS * (rows + 1)
    if form == "dense":
        return value_bits * numel
    raise ValueError(f'weight_bits: form must be "bitmap", "csr" or "dense", got {form!r}')


def model_bits(
    weights: Iterable[tuple[Sequence[int], int]],
    *,
    form: Form = "bitmap",
    value_bits: int = 32,
    n_biases: int | None = None,
) -> int:
    """Bits of a model: the sum of its weights' bits, and 32 for each entry of a bias.

    Args:
        weights: (shape, nnz) of every weight, dense ones too.
        form: how each weight is stored.
        value_bits: bits of one weight's value; biases always take 32.
        n_biases: entries of all biases. By default one for each leading row of each weight, as the paper
            counts, which gives a bias to convolutions that have none.

    Raises:
        ValueError: a negative `n_biases`, or what `weight_bits` refuses.

    >>> model_bits([((300, 784), 4704), ((10, 300), 3000)])
    491648
    >>> model_bits([((300, 784), 4704), ((10, 300), 3000)], form="dense", n_biases=0)
    7622400

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), and its code, which counts one bias for a whole
    depthwise convolution (one output channel, as Keras shapes the kernel): pass `n_biases` to do the same.
    """
    pairs = [(tuple(shape), nnz) for shape, nnz in weights]
    if n_biases is None:
        n_biases = sum(shape[0] for shape, _ in pairs if shape)
    if n_biases < 0:
        raise ValueError(f"model_bits: n_biases must not be negative, got {n_biases}")
    of_weights = sum(weight_bits(shape, nnz, form=form, value_bits=value_bits) for shape, nnz in pairs)
    return of_weights + _BIAS_BITS * n_biases


def to_bytes(bits: int) -> int:
    """The whole bytes that hold `bits` bits.

    >>> to_bytes(491648), to_bytes(9)
    (61456, 2)
    """
    return -(-bits // 8)
