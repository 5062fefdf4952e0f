"""How the cost of a sparse layer grows: time of a step against connections, batch and width, each over a factor 64.

python benchmarks/scaling.py [--save]
"""

from __future__ import annotations

import click
import timing
import torch
from matplotlib.figure import Figure
from timing import RESULTS, interleave, training

from regrow.nn import SparseLinear

WHY = """Where it bends, and why.

* Connections: below some 200,000 the four tensors of activations, brought from batch-major into tiles and back, cost
  more than the products; that part does not depend on the connections.
* Batch: below 64 the tile of sums that a walk along a row fills is narrower, and reading the index and the values, one
  of each per connection whatever the batch, takes a larger share.
* Width: a connection reads one row of activations at random. Up to a width of 4,096 a tile of them stays in the
  second-level cache; beyond it comes from the third level, and from 16,384 on, where the tensors together exceed that
  too, from memory. Time then follows connections times the cost of a random access: twice the width, up to 3.3 times
  the time.
"""

Case = tuple[int, int, float]
"""(width, batch, density)"""

SERIES: dict[str, list[Case]] = {
    "connections": [(4096, 128, 0.1 / 2**i) for i in range(6, -1, -1)],
    "batch": [(4096, 8 * 2**i, 0.02) for i in range(7)],
    "width at 16 connections per row": [(512 * 2**i, 128, 16 / (512 * 2**i)) for i in range(7)],
}


def measured(series: list[Case], rounds: int) -> list[tuple[float, float]]:
    """(multiply-adds, median seconds) of a step, forward and both gradients, of each case."""
    steps, work = {}, []
    for width, batch, density in series:
        layer = SparseLinear(width, width, bias=False, density=density, seed=0)
        x, dy = torch.randn(batch, width), torch.randn(batch, width)
        steps[f"{width} {batch} {density}"] = training(layer, x, dy)
        work.append(3 * layer.weight.numel() * batch)
    seconds = interleave(steps, rounds)
    return [(n, seconds.time(name).median) for n, name in zip(work, steps, strict=True)]


@click.command()
@timing.ROUNDS
@timing.options
def main(rounds: int, save: bool, keep_memory: bool) -> None:
    """Measure, tabulate, draw."""
    kept = keep_memory and timing.keep_memory()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    parts = []
    for axes, (name, series) in zip(figure.subplots(1, len(SERIES), sharey=True), SERIES.items(), strict=True):
        found = measured(series, rounds)
        what = [{"connections": w * w * d, "batch": b}.get(name, w) for w, b, d in series]
        rows = []
        for value, (work, seconds), (_, before) in zip(what, found, [found[0], *found[:-1]], strict=True):
            growth = "" if seconds == before and value == what[0] else f"{seconds / before:.2f}"
            rows.append([f"{value:,.0f}", f"{seconds * 1e3:.3f}", growth, f"{2 * work / seconds / 1e9:.0f}"])
        parts += [f"## {name}", timing.markdown([name, "ms", "times the one before", "GFLOP/s"], rows)]
        axes.loglog(what, [s * 1e3 for _, s in found], "o-", label="measured")
        axes.loglog(what, [found[-1][1] * 1e3 * w / found[-1][0] for w, _ in found], "--", label="linear in the work")
        axes.set_xlabel(name)
    figure.axes[0].set_ylabel("ms a step")
    figure.axes[0].legend()
    if save:
        figure.savefig(RESULTS / "scaling.png", dpi=150)
    head = "Linear layers, forward and both gradients, batch-major tensors, float32; each row doubles the work."
    timing.report("scaling", [head, *parts, WHY], save, kept)


if __name__ == "__main__":
    main()
