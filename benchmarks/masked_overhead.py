"""What masked storage costs over dense training: whole steps, interleaved in one process, ratios first.

    python benchmarks/masked_overhead.py [--repeats 15] [--out benchmarks/results/masked_overhead.md]

Each row trains the same network twice, dense and sparse (RigL, density 0.1), one step of each in turn. The ratio is
the median over the pairs of (masked step / dense step) in time; an update's cost is its whole step, forward and
backward included, over the median ordinary masked step beside it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import regrow
from regrow import methods
from regrow.app.machine import processor
from regrow.app.models import build

DENSITY = 0.1
UPDATE_EVERY = 6


class LanguageModel(nn.Module):
    """A pre-norm transformer of 6 layers and width 512 over 256 symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 512)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(512, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, 256) of tokens (batch, length)."""
        return self.head(self.body(self.embed(tokens)))


Case = tuple[str, str, Callable[[], nn.Module], Tensor, Tensor]


def cases() -> list[Case]:
    """(name, size, model, inputs, labels) of every row."""
    rows: list[Case] = []
    for batch, size in ((16, "small"), (128, "large")):
        images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        rows.append((f"WRN-22-2, batch {batch}", size, lambda: build("wrn-22-2", (3, 32, 32), 10), images, labels))
    for batch, length, size in ((4, 32, "small"), (8, 128, "large")):
        tokens = torch.randint(256, (batch, length))
        rows.append(
            (f"transformer 6 x 512, {batch} x {length} tokens", size, LanguageModel, tokens, tokens.roll(-1, 1))
        )
    return rows


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4),
    "AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
}


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    """Seconds of one whole training step."""
    began = time.perf_counter()
    optimizer.zero_grad()
    logits = model(x)
    F.cross_entropy(logits.flatten(0, -2), y.flatten()).backward()
    optimizer.step()
    return time.perf_counter() - began


def measure(case: Case, make: Callable[[nn.Module], Optimizer], repeats: int) -> tuple[float, float, float, float]:
    """(masked / dense ordinary step, its spread, update step / ordinary step, dense milliseconds)."""
    _, _, network, x, y = case
    torch.manual_seed(0)
    dense = network()
    sparse = copy.deepcopy(dense)
    first, second = make(dense), make(sparse)
    last = UPDATE_EVERY * (repeats + 2)
    sparsifier = regrow.sparsify(sparse, second, methods.rigl(DENSITY, until=last + 1, interval=UPDATE_EVERY))
    ratios, updates, ordinary, plain = [], [], [], []
    for _ in range(last):
        due = sparsifier.due
        seconds = step(dense, first, x, y)
        masked = step(sparse, second, x, y)
        if sparsifier.step <= UPDATE_EVERY:
            continue
        plain.append(seconds)
        (updates if due else ordinary).append(masked)
        if not due:
            ratios.append(masked / seconds)
    quartiles = statistics.quantiles(ratios, n=4)
    usual = statistics.median(ordinary)
    return (
        statistics.median(ratios),
        quartiles[2] - quartiles[0],
        statistics.median(updates) / usual,
        1e3 * statistics.median(plain),
    )


def main() -> None:
    """Measure every row and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="updates measured per row, with 5 ordinary steps each")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    lines = [
        "| network | optimizer | masked / dense, ordinary step | quartile spread | update / ordinary step | dense ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases():
        for name, make in OPTIMIZERS.items():
            ratio, spread, update, milliseconds = measure(case, make, given.repeats)
            lines.append(f"| {case[0]} | {name} | {ratio:.3f} | {spread:.3f} | {update:.2f} | {milliseconds:.1f} |")
            print(lines[-1], flush=True)
    about = (
        f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"regrow {regrow.__version__}, density {DENSITY}, {given.repeats} updates and {5 * given.repeats} ordinary "
        "steps per row.\n\n"
    )
    if given.out is not None:
        given.out.write_text(
            f"`python benchmarks/masked_overhead.py --repeats {given.repeats}`\n\n{about}" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
