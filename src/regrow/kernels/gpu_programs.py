"""The programs that `gpu` launches, in Triton: products with weights made of units, on tensor cores.

Activations are feature-major: (features, batch), contiguous. The entries of a unit stand with its outputs fastest, so
a row of units is one matrix (inputs of its units, outputs), contiguous. Each of its inputs is a term of the sums: it
names a row of the activations, which is read whole from there. No two programs write to one place, and each sums in the
order of the terms: the same numbers come out every time.

Sizes in capitals are known when a program is compiled: G outputs and K inputs of a unit, the powers of 2 of a tile's
terms (TERMS), outputs (WIDTH) and batch (BATCH), the type of sums (SUM), and how float32 is multiplied (PRECISION).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gathered(
    x,
    values,
    bias,
    starts,
    columns,
    order,
    out,
    batch,
    rows,
    out_feature,
    out_batch,
    PER: tl.constexpr,
    MADE: tl.constexpr,
    STEP_PER: tl.constexpr,
    STEP_MADE: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS_FIRST: tl.constexpr,
) -> None:
    """out[row MADE + m, b] = bias + the sum over units u of a row and p < PER of v(u, p, m) x[column(u) PER + p, b].

    Forward, PER is K and MADE is G; for the input gradient they change places, `starts` and `columns` are those of the
    transposed weight, and `order` says where its units stand. v(u, p, m) lies STEP_PER p + STEP_MADE m into unit u.
    """
    program = tl.program_id(0)
    row = program % rows
    lanes = (program // rows) * BATCH + tl.arange(0, BATCH)
    made = tl.arange(0, WIDTH)
    first = tl.load(starts + row)
    terms = ((tl.load(starts + row + 1) - first) * PER).to(tl.int32)
    sums = tl.zeros((WIDTH, BATCH) if OUTPUTS_FIRST else (BATCH, WIDTH), dtype=SUM)
    for begin in range(0, terms, TERMS):
        term = begin + tl.arange(0, TERMS)
        there = term < terms
        unit = first + term // PER
        feature = tl.load(columns + unit, mask=there, other=0).to(tl.int64) * PER + term % PER
        if order is not None:
            unit = tl.load(order + unit, mask=there, other=0).to(tl.int64)
        inputs = tl.load(
            x + feature[:, None] * batch + lanes[None, :], mask=there[:, None] & (lanes < batch)[None, :], other=0.0
        )
        at = unit * (PER * MADE) + (term % PER) * STEP_PER
        weights = tl.load(
            values + at[:, None] + made[None, :] * STEP_MADE, mask=there[:, None] & (made < MADE)[None, :], other=0.0
        )
        if OUTPUTS_FIRST:
            sums = tl.dot(tl.trans(weights), inputs, sums, input_precision=PRECISION, out_dtype=SUM)
        else:
            sums = tl.dot(tl.trans(inputs), weights, sums, input_precision=PRECISION, out_dtype=SUM)
    sums = sums if OUTPUTS_FIRST else tl.trans(sums)
    feature = row * MADE + made
    if bias is not None:
        sums += tl.load(bias + feature, mask=made < MADE, other=0.0).to(SUM)[:, None]
    at_out = feature.to(tl.int64)[:, None] * out_feature + lanes.to(tl.int64)[None, :] * out_batch
    tl.store(out + at_out, sums.to(out.dtype.element_ty), mask=(made < MADE)[:, None] & (lanes < batch)[None, :])


@triton.jit
def sampled(
    x,
    dy,
    starts,
    columns,
    tile_rows,
    tile_numbers,
    out,
    batch,
    rows,
    G: tl.constexpr,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[term, g] = the sum over b of x[feature(term), b] dy[row(term) G + g, b], for the terms of one tile."""
    tile = tl.program_id(0)
    row = tl.load(tile_rows + tile).to(tl.int64)
    if row >= rows:
        return
    first = tl.load(starts + row)
    terms = ((tl.load(starts + row + 1) - first) * K).to(tl.int32)
    term = tl.load(tile_numbers + tile) * TERMS + tl.arange(0, TERMS)
    there = term < terms
    feature = tl.load(columns + first + term // K, mask=there, other=0).to(tl.int64) * K + term % K
    made = tl.arange(0, WIDTH)
    sums = tl.zeros((TERMS, WIDTH), dtype=SUM)
    for begin in range(0, batch, BATCH):
        lanes = begin + tl.arange(0, BATCH)
        within = lanes < batch
        inputs = tl.load(
            x + feature[:, None] * batch + lanes[None, :], mask=there[:, None] & within[None, :], other=0.0
        )
        grads = tl.load(
            dy + (row * G + made)[:, None] * batch + lanes[None, :],
            mask=(made < G)[:, None] & within[None, :],
            other=0.0,
        )
        sums = tl.dot(inputs, tl.trans(grads), sums, input_precision=PRECISION, out_dtype=SUM)
    at = (first * K + term)[:, None] * G + made[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=there[:, None] & (made < G)[None, :])


@triton.jit
def partial(
    dy,
    values,
    starts,
    tile_rows,
    tile_numbers,
    out,
    batch,
    rows,
    tiles,
    begin,
    size,
    G: tl.constexpr,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[term, b] = the sum over g of v(term, g) dy[row(term) G + g, begin + b], b < size, for the terms of a tile.

    What each term adds to the gradient of its feature, before what belongs to one feature is summed.
    """
    program = tl.program_id(0)
    tile = program % tiles
    row = tl.load(tile_rows + tile).to(tl.int64)
    if row >= rows:
        return
    first = tl.load(starts + row)
    terms = ((tl.load(starts + row + 1) - first) * K).to(tl.int32)
    term = tl.load(tile_numbers + tile) * TERMS + tl.arange(0, TERMS)
    there = term < terms
    at = first * K + term
    lanes = (program // tiles) * BATCH + tl.arange(0, BATCH)
    sums = tl.zeros((TERMS, BATCH), dtype=SUM)
    for output in range(0, G, WIDTH):
        made = output + tl.arange(0, WIDTH)
        weights = tl.load(
            values + at[:, None] * G + made[None, :], mask=there[:, None] & (made < G)[None, :], other=0.0
        )
        grads = tl.load(
            dy + (row * G + made)[:, None] * batch + begin + lanes[None, :],
            mask=(made < G)[:, None] & (lanes < size)[None, :],
            other=0.0,
        )
        sums = tl.dot(weights, grads, sums, input_precision=PRECISION, out_dtype=SUM)
    tl.store(out + at[:, None] * size + lanes[None, :], sums, mask=there[:, None] & (lanes < size)[None, :])


@triton.jit
def summed(
    partials,
    bias,
    starts,
    order,
    out,
    begin,
    size,
    features,
    out_feature,
    out_batch,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    BATCH: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    """out[feature, begin + b] = bias + the sum of partials[term, b] over the terms of the feature, b < size."""
    program = tl.program_id(0)
    feature = program % features
    column = feature // K
    lanes = (program // features) * BATCH + tl.arange(0, BATCH)
    first = tl.load(starts + column)
    units = (tl.load(starts + column + 1) - first).to(tl.int32)
    sums = tl.zeros((BATCH,), dtype=SUM)
    for unit in range(0, units, TERMS):
        number = unit + tl.arange(0, TERMS)
        there = number < units
        term = tl.load(order + first + number, mask=there, other=0).to(tl.int64) * K + feature % K
        found = tl.load(
            partials + term[:, None] * size + lanes[None, :], mask=there[:, None] & (lanes < size)[None, :], other=0.0
        )
        sums += tl.sum(found, 0)
    if bias is not None:
        sums += tl.load(bias + feature).to(SUM)
    at = feature.to(tl.int64) * out_feature + (begin + lanes).to(tl.int64) * out_batch
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=lanes < size)
