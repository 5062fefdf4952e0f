"""Bytes per active connection of compressed storage: resident memory beyond that of a process without the layer.

    python benchmarks/memory.py [--size 16384] [--densities 0.1,0.05,0.01] [--save]

One linear layer, SGD with momentum, batch 4, so that activations weigh nothing. Steady: weights, gradients, momentum
and topology, between steps. Rewire: the highest resident memory of a step with an update by RigL, beyond steady.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import timing
import torch
from torch import nn
from torch.nn import functional as F

import regrow
from regrow import methods
from regrow.parts.allocation import uniform

BATCH, UPDATE_AT = 4, 6


def status(field: str) -> int:
    """A figure of this process in bytes: VmRSS is what is resident, VmHWM the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def trained(size: int, density: float, steps: int, interval: int) -> tuple[int, int, int]:
    """(active connections, resident bytes between steps, highest during the last step) of a training run."""
    with torch.device("meta"):
        layer = nn.Linear(size, size, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    method = methods.rigl(density, until=steps + 1, interval=interval, allocate=uniform)
    sparsifier = regrow.sparsify(layer, optimizer, method, storage="compressed")
    resident = 0
    for step in range(1, steps + 1):
        x = torch.randn(BATCH, size)
        optimizer.zero_grad(set_to_none=False)
        loss = F.mse_loss(layer(x), x)
        loss.backward()
        del loss, x
        if step == steps:
            gc.collect()
            resident = status("VmRSS")
            forget_peak()
        optimizer.step()
    return sparsifier.nnz, resident, status("VmHWM")


@click.command()
@click.option("--size", default=16384, show_default=True, help="Inputs and outputs of the layer.")
@click.option("--densities", default="0.1,0.05,0.01", show_default=True, help="Separated by commas.")
@click.option("--save", is_flag=True, help="Also write the table to benchmarks/results.")
@click.option("--child", type=float, hidden=True, help="Measure this density in this process.")
def main(size: int, densities: str, save: bool, child: float | None) -> None:
    """Measure each density in a process of its own."""
    if child is not None:
        trained(512, 0.1, UPDATE_AT, UPDATE_AT)
        gc.collect()
        base = status("VmRSS")
        nnz, resident, peak = trained(size, child, UPDATE_AT, UPDATE_AT)
        print(json.dumps({"nnz": nnz, "steady": resident - base, "rewire": peak - resident}))
        return
    rows = []
    for density in densities.split(","):
        command = [sys.executable, __file__, "--size", str(size), "--child", density]
        # Freed arrays go back to the system at once, so that what is resident is what is in use.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        found = json.loads(run.stdout.splitlines()[-1])
        nnz = found["nnz"]
        per = [f"{found[key] / nnz:.1f}" for key in ("steady", "rewire")]
        rows.append([f"{float(density):.0%}", f"{nnz:,}", *per, f"{12 * size * size / found['steady']:.1f}"])
    heads = ["density", "connections", "bytes per connection, steady", "more during a rewire", "dense / steady"]
    text = f"Linear {size:,} x {size:,}, float32. Dense: 12 bytes per entry for weight, gradient and momentum."
    timing.report("memory", [text, timing.markdown(heads, rows)], save)


if __name__ == "__main__":
    main()
