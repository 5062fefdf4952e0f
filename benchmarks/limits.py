"""What this machine can do at best, as far as torch's own operations show it: the scale for every other table.

    python benchmarks/limits.py [--save]

Multiply-adds by the best dense products of oneDNN. Reads by sums over an array again and again, in one call and on all
threads, so the smallest stays in each core's first cache; additions limit that to less than the caches could give.
Copies one call at a time, calls and all.
"""

from __future__ import annotations

import click
import timing
import torch
from torch import Tensor

PRODUCT = 4096
KILOBYTES = {"first cache": 16, "second cache": 256, "memory": 256 * 1024}
READ = 2**29  # bytes that one sample of reading goes over


def product(dtype: torch.dtype) -> timing.Step:
    """A product of two square matrices, the second packed beforehand."""
    x, weight = (torch.randn(PRODUCT, PRODUCT, dtype=dtype) for _ in range(2))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PRODUCT)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def reading(array: Tensor) -> timing.Step:
    """Sums of an array, again and again."""
    again = array.expand(READ // array.nbytes, -1)
    return lambda: again.sum(1)


def copying(array: Tensor) -> timing.Step:
    """One copy of an array."""
    to = array.clone()
    return lambda: to.copy_(array)


def limits() -> dict[str, tuple[timing.Step, float]]:
    """What is timed, and the operations or bytes of each step."""
    ways: dict[str, tuple[timing.Step, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        ways[f"dense product, {str(dtype).removeprefix('torch.')}, GFLOP/s"] = product(dtype), 2 * PRODUCT**3
    for place, size in KILOBYTES.items():
        array = torch.randn(size * 256)
        ways[f"reads, {size} KB, {place}, GB/s"] = reading(array), READ
        ways[f"copies, read and written, {size} KB, {place}, GB/s"] = copying(array), 2 * array.nbytes
    return ways


@click.command(help=__doc__)
@timing.ROUNDS
@timing.options
def main(rounds: int, save: bool, keep_memory: bool) -> None:
    """Measure, print and perhaps save."""
    kept = keep_memory and timing.keep_memory()
    ways = limits()
    measured = timing.interleave({name: step for name, (step, _) in ways.items()}, rounds)
    lines = []
    for name, (_, amount) in ways.items():
        low, rate, high = (amount / seconds / 1e9 for seconds in reversed(measured.time(name)))
        lines.append([name, f"{rate:.0f} ({low:.0f} to {high:.0f})"])
    timing.report("limits", [timing.markdown(["limit", "median (quartiles)"], lines)], save, kept)


if __name__ == "__main__":
    main()
