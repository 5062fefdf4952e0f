"""Which patterns of active entries are allowed: the best topology of a pattern, by a score of every position.

A structure is called with a weight, a score of every position (numel,), -inf where an entry is not allowed, and a
count. It sees scores in any real dtype, and equal ones go to the lower position. Memory is that of some copies of the
scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.method import Structure, Units
from regrow.core.topology import Topology
from regrow.core.units import Pool, by_index, by_unit, from_index, mean
from regrow.core.weight import Sized, SparseWeight


def unstructured(weight: SparseWeight, score: Tensor, count: int) -> Topology:
    """The `count` highest scores, wherever they are; a `Structure`."""
    score = _checked("unstructured", weight, score, count)
    return Topology(weight.shape, None if count == score.numel() else selection.highest(score, count))


class Boxes(Units):
    """Units that are also a `Structure`: the boxes of highest pooled score, of which a start or a ramp may be made.

    What a box has of allowed entries is active or not together; the number of boxes that stay is the one whose entries
    are nearest to the count. Of two equally near numbers it is the smaller. At least one box stays, so that no weight
    is emptied. As the `structure=` of a recipe the boxes are the units of its topologies.
    """

    def __call__(self, weight: SparseWeight, score: Tensor, count: int) -> Topology:
        """The topology of single entries, those of the best boxes.

        Args:
            weight: whose axes are divided.
            score: of every position (numel,), -inf where an entry is not allowed.
            count: entries.
        """
        score = _checked("units", weight, score, count).detach().cpu()
        unit, allowed = self.box(weight), score > -math.inf
        there = by_unit(weight.shape, unit, allowed)
        numbers = by_unit(weight.shape, unit, score.double().masked_fill(~allowed, 0.0))
        sizes = there.sum(1)
        some = sizes.nonzero().view(-1)
        # Entries that are not allowed have no say: they repeat the mean of the others.
        filled = torch.where(there[some], numbers[some], (numbers[some].sum(1) / sizes[some])[:, None])
        order = some[self.pool(filled).argsort(descending=True, stable=True)]
        reached = sizes[order].cumsum(0)
        taken = int(np.abs(reached.numpy() - count).argmin()) + 1 if len(order) else 0
        chosen = Topology(weight.shape, order[:taken].sort().values, unit).mask.view(-1)
        return _topology(weight, chosen & allowed)


def _one_output(weight: Sized) -> tuple[int, ...]:
    return tuple(1 if axis == weight.out_axis else max(1, size) for axis, size in enumerate(weight.shape))


def _one_input(weight: Sized) -> tuple[int, ...]:
    return tuple(1 if axis == weight.in_axis else max(1, size) for axis, size in enumerate(weight.shape))


rows = Boxes(_one_output, mean)
"""Whole output neurons or filters, of highest mean score; `Units`, and a `Structure`.

Source: Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1 (there the sum, which ranks alike).
"""

columns = Boxes(_one_input, mean)
"""Whole inputs: all that one input neuron or channel sends, of highest mean score; `Units`, and a `Structure`.

Source: He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks, section 3, for its units alone.
"""


def heads(number: int, pool: Pool = mean) -> Boxes:
    """All outputs of an attention head, for projections to `number` heads; `Units`, and a `Structure`.

    It is for weights that project to heads and to nothing else: name them in `only=`. Packed ones are known as their
    blocks in torch's own attention, not in transformers' `Conv1D`, whose `c_attn` has three times the heads.

    Args:
        number: heads, 1 or more, into which the outputs of every weight are divided evenly.
        pool: as for `blocks`.

    Raises:
        ValueError: for a number below 1; from the structure, where it does not divide a weight's outputs, naming it.

    Source: Michel et al. 2019, Are Sixteen Heads Really Better than One?, section 3, for its units alone.

    Examples:
        >>> from regrow.parts import Shaped
        >>> heads(8).box(Shaped("q.weight", (512, 256), Topology((512, 256))))
        (64, 256)
    """
    if number < 1:
        raise ValueError(f"heads: the number must be at least 1, got {number}")
    return Boxes(_Heads(number), pool)


@dataclass(frozen=True)
class _Heads:
    """How far a head reaches along each axis."""

    number: int

    def __call__(self, weight: Sized) -> tuple[int, ...]:
        outputs = weight.shape[weight.out_axis]
        if outputs % self.number:
            raise ValueError(f"heads({self.number}): {weight.name} has {outputs:,} outputs, which they do not divide")
        return tuple(size // self.number if axis == weight.out_axis else size for axis, size in enumerate(weight.shape))

    def __str__(self) -> str:
        return f"heads({self.number})"


def blocks(height: int, width: int, pool: Pool = mean) -> Boxes:
    """Blocks of `height` consecutive outputs and `width` consecutive inputs; `Units`, and a `Structure`.

    Each position of a convolution's kernel has blocks of its own. Where a size does not divide a weight, the weight's
    blocks have the largest smaller one that does, so that all are equal: `blocks(8, 1)` are 6 x 1 where there are 300
    outputs, and single entries where there are 13. A block is ranked by the mean of its entries' scores unless another
    `pool` is given.

    Args:
        height: outputs of a block, 1 or more.
        width: inputs of a block, 1 or more.
        pool: `mean`, `root_mean_square`, `largest`, or any other.

    Raises:
        ValueError: for a size below 1.

    Source: Narang et al. 2017, Block-Sparse Recurrent Neural Networks, section 3 (there the maximum, not the mean).

    Examples:
        >>> from regrow import methods
        >>> methods.rigl(0.1, until=1000, structure=blocks(4, 4)).name
        'rigl'
    """
    if height < 1 or width < 1:
        raise ValueError(f"blocks: height and width must be at least 1, got {height} x {width}")

    return Boxes(_Block(height, width), pool)


@dataclass(frozen=True)
class _Block:
    """How far a block reaches along each axis; a value, so that equal structures are equal."""

    height: int
    width: int

    def __call__(self, weight: Sized) -> tuple[int, ...]:
        steps = [1] * len(weight.shape)
        for axis, wanted in ((weight.out_axis, self.height), (weight.in_axis, self.width)):
            size = weight.shape[axis]
            steps[axis] = next((n for n in range(min(wanted, size), 0, -1) if size % n == 0), 1)
        return tuple(steps)

    def __str__(self) -> str:
        return f"groups({self.height})" if self.width == 1 else f"blocks({self.height},{self.width})"


def groups(size: int, pool: Pool = mean) -> Boxes:
    """Groups of `size` consecutive outputs that share an input, as `blocks(size, 1)`: what CPUs run fastest.

    Each activation that is loaded serves all outputs of a group. `blocks(1, size)` is the transpose.

    Args:
        size: outputs of a group, 1 or more.
        pool: as for `blocks`.

    Raises:
        ValueError: for a size below 1.
    """
    return blocks(size, 1, pool)


def n_of_m(n: int, m: int) -> Structure:
    """The `n` highest scores of each `m` consecutive inputs, at every output and position of a kernel.

    Where `m` does not divide the inputs, the last group has r inputs and keeps floor(n r / m) of them. If the count
    asks for more, the outputs and positions with the best next score keep one more.

    Args:
        n: how many stay, in [1, m].
        m: inputs of a group.

    Raises:
        ValueError: from the structure, for a count that is not that of the pattern, n / m of all entries.

    Source: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, section 3; Zhou et al. 2021, Learning N:M
    Fine-grained Structured Sparse Neural Networks From Scratch, section 3.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n_of_m: n must lie in [1, m], got n = {n} and m = {m}")
    name = f"n_of_m({n}, {m})"

    def structure(weight: SparseWeight, score: Tensor, count: int) -> Topology:
        lines = _lines(weight, _checked(name, weight, score, count))
        groups, rest = divmod(lines.shape[1], m)
        least, most = (len(lines) * (groups * n + k) for k in (n * rest // m, -(-n * rest // m)))
        if not least <= count <= most:
            numbers = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            raise ValueError(
                f"{name}: {weight.name} keeps {numbers} of its {score.numel():,} entries, and {count:,} are asked for: "
                f"give it the density {n}/{m}, as allocate=uniform does"
            )
        split = groups * m
        chosen = torch.zeros_like(lines, dtype=torch.bool)
        whole = lines[:, :split].reshape(-1, m)
        chosen[:, :split] = best_of_each(whole, whole.new_full((len(whole),), n, dtype=torch.int64)).view(
            len(lines), split
        )
        chosen[:, split:] = evenly(lines[:, split:], count - len(lines) * groups * n)
        if bool(lines[chosen].isneginf().any()):
            raise ValueError(f"{name}: {weight.name} has groups with fewer than {n} allowed entries: prune from dense")
        moved = chosen.view([*_without(weight.shape, weight.in_axis), -1])
        return _topology(weight, moved.movedim(-1, weight.in_axis))

    return structure


def constant_fan_in(weight: SparseWeight, score: Tensor, count: int) -> Topology:
    """The highest scores of each output, as many in every one; a `Structure`.

    Where the outputs do not divide `count`, fan-ins differ by one: the surplus goes to the outputs with the best next
    score, so that the count is exact.

    Raises:
        ValueError: for a count that leaves an output without entries, or an output that has too few allowed ones.

    Source: Lasby et al. 2024, Dynamic Sparse Training with Structured Sparsity, section 3.1, whose counts are rounded
    so that all fan-ins are equal.
    """
    scores = by_output(weight, _checked("constant_fan_in", weight, score, count))
    outputs = len(scores)
    if count < outputs:
        raise ValueError(
            f"constant_fan_in: {weight.name} has {outputs:,} outputs, and its {count:,} entries leave some without "
            f"any: it takes a density of {outputs / score.numel():.6g} there"
        )
    chosen = evenly(scores, count)
    short = (chosen & scores.isneginf()).any(1)
    if bool(short.any()):
        first = int(short.nonzero()[0])
        raise ValueError(
            f"constant_fan_in: {weight.name} has {count / outputs:.4g} entries for each output, and output {first} has "
            f"{int((scores[first] > -math.inf).sum()):,} that are allowed: start from an equal fan-in"
        )
    return of_outputs(weight, chosen)


def diagonals(weight: SparseWeight, score: Tensor, count: int) -> Topology:
    """Whole wrapped diagonals, of highest mean score; a `Structure`.

    A weight is the matrix of its first axis by all others. Diagonal d holds the entries (i, j) with (i - j) mod rows
    = d, or (j - i) mod columns = d where there are more columns. There are as many as the longer side is long, each as
    long as the shorter, and every entry lies on one. The number that stays is the one whose entries are nearest to the
    count, the smaller of two, and at least 1.

    Raises:
        ValueError: from the structure, where fewer diagonals than that are allowed as a whole, naming the weight.

    Source: Tyagi et al. 2025, Dynamic Sparse Training of Diagonally Sparse Networks, by its published code.
    """
    score = _checked("diagonals", weight, score, count)
    whole = Diagonals.of(weight.shape)
    means = whole.sums(0, score) / max(1, whole.length)
    number = max(1, -((whole.length - 2 * count) // (2 * whole.length))) if whole.length else 0
    allowed = int((means > -math.inf).sum())
    if number > allowed:
        raise ValueError(
            f"diagonals: {weight.name} has {allowed:,} diagonals all of whose entries are allowed, and {number:,} are "
            "asked for: start from whole diagonals, or from dense"
        )
    return _topology(weight, whole.mask(selection.highest(means, number)).to(score.device))


class Diagonals(NamedTuple):
    """The wrapped diagonals of a weight: where they lie, and what lies on them."""

    rows: int
    """The size of the first axis."""
    columns: int
    """The product of the others."""

    @classmethod
    def of(cls, shape: Sequence[int]) -> Diagonals:
        """Those of a weight of `shape`."""
        return cls(shape[0], math.prod(shape[1:]))

    @property
    def number(self) -> int:
        """How many there are."""
        return max(self.rows, self.columns)

    @property
    def length(self) -> int:
        """How many entries each has."""
        return min(self.rows, self.columns)

    def at(self, positions: Tensor) -> Tensor:
        """The diagonal on which each of the flat `positions` (n,) lies, (n,)."""
        i, j = positions // max(1, self.columns), positions % max(1, self.columns)
        return (i - j if self.rows >= self.columns else j - i) % max(1, self.number)

    def sums(self, first: int, values: Tensor) -> Tensor:
        """What the `values` (n,) of the flat positions from `first` on add to each diagonal, (number,) float64.

        On the CPU and in order, so that every rank and run has the same sums.
        """
        on = self.at(torch.arange(first, first + values.numel()))
        return torch.bincount(on, values.double().cpu(), minlength=self.number)

    def mask(self, chosen: Tensor) -> Tensor:
        """Which flat positions lie on the diagonals `chosen` (n,), bool (rows columns,)."""
        marked = torch.zeros(self.number, dtype=torch.bool)
        marked[chosen.cpu()] = True
        return self.spread(marked).reshape(-1)

    def spread(self, values: Tensor) -> Tensor:
        """`values` (number,) at every entry of their diagonals, (rows, columns).

        Examples:
            >>> Diagonals(3, 2).spread(torch.tensor([0, 1, 2])).tolist()
            [[0, 2], [1, 0], [2, 1]]
        """
        wrapped = torch.cat([values[self.number - self.length + 1 :], values])
        tall = wrapped.unfold(0, max(1, self.length), 1).flip(1)[:, : self.length]
        return tall if self.rows >= self.columns else tall.t()


def active_diagonals(weight: Sized, topology: Topology) -> Tensor:
    """The numbers of the diagonals that are active in `topology`, (n,) int64 ascending.

    Raises:
        ValueError: when only a part of a diagonal is active, naming the weight.
    """
    whole = Diagonals.of(weight.shape)
    on = torch.bincount(whole.at(topology.entries.cpu()), minlength=whole.number)
    active = on.nonzero().view(-1)
    parted = int((on[active] < whole.length).sum())
    if parted:
        raise ValueError(
            f"{weight.name}: of {active.numel():,} active diagonals {parted:,} are not active as a whole: start with "
            "random_topology(density, uniform, diagonals), and drop and grow diagonals"
        )
    return active


def fan_ins(topology: Topology, out_axis: int) -> Tensor:
    """How many entries each output has, (outputs,) int64."""
    return outputs_of(topology.entries, topology.shape, out_axis).bincount(minlength=topology.shape[out_axis])


def outputs_of(positions: Tensor, shape: Sequence[int], out_axis: int) -> Tensor:
    """The output to which each of the flat `positions` (n,) belongs, (n,)."""
    return positions // math.prod(shape[out_axis + 1 :]) % shape[out_axis]


def by_output(weight: SparseWeight, values: Tensor) -> Tensor:
    """`values` (numel,) as (outputs, entries of one), positions ascending in each."""
    return by_index(weight.shape, weight.out_axis, values)


def of_outputs(weight: SparseWeight, chosen: Tensor) -> Topology:
    """The topology of what is `chosen`, bool (outputs, entries of one)."""
    return _topology(weight, from_index(weight.shape, weight.out_axis, chosen))


def best_of_each(score: Tensor, counts: Tensor) -> Tensor:
    """The counts[i] highest entries of row i, bool (rows, n); equal scores go to the lower position.

    Args:
        score: (rows, n), without NaN.
        counts: (rows,) int64, each in [0, n].
    """
    most = int(counts.max()) if len(counts) else 0
    if most == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    best = score.topk(most, dim=1).values
    threshold = best.gather(1, (counts - 1).clamp(min=0)[:, None])
    above, ties = score > threshold, score == threshold
    room = counts - above.sum(1)
    return above | (ties & (ties.cumsum(1) <= room[:, None]))


def evenly(score: Tensor, count: int) -> Tensor:
    """The best `count` entries when all rows have equally many, or some one more, bool (rows, n).

    The rows with the best next score have one more; of equal ones the first.

    Args:
        score: (rows, n), without NaN.
        count: in [0, rows n].
    """
    if score.numel() == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    each, surplus = divmod(count, len(score))
    counts = torch.full((len(score),), each, device=score.device)
    chosen = best_of_each(score, counts)
    if surplus:
        more = best_of_each(score, counts + 1)
        winners = selection.highest(score.masked_fill(chosen | ~more, -math.inf).amax(1), surplus)
        chosen[winners] = more[winners]
    return chosen


def _checked(name: str, weight: SparseWeight, score: Tensor, count: int) -> Tensor:
    """`score` itself.

    Raises:
        ValueError: when a score is NaN, or `count` is above the number of allowed entries.
    """
    if bool(score.isnan().any()):
        raise ValueError(
            f"{weight.name}: {int(score.isnan().sum()):,} of {score.numel():,} scores are NaN: training has diverged"
        )
    allowed = int((score > -math.inf).sum())
    if not 0 <= count <= allowed:
        raise ValueError(f"{name}: {weight.name} has {allowed:,} allowed entries, and {count:,} are asked for")
    return score


def _lines(weight: SparseWeight, values: Tensor) -> Tensor:
    """`values` (numel,) as (outputs and positions of the kernel, inputs)."""
    return values.view(weight.shape).movedim(weight.in_axis, -1).reshape(-1, weight.shape[weight.in_axis])


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [size for a, size in enumerate(shape) if a != axis]


def _topology(weight: SparseWeight, mask: Tensor) -> Topology:
    """The topology of a bool mask of the weight's shape or (numel,)."""
    positions = mask.reshape(-1).nonzero().view(-1)
    return Topology(weight.shape, None if positions.numel() == mask.numel() else positions)
