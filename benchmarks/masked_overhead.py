"""What masked storage costs over dense training: whole steps, interleaved in one process, ratios first.

    python benchmarks/masked_overhead.py [--repeats 15] [--save] [--return-memory]

Each row trains the same network twice, dense and sparse (RigL, density 0.1), one step of each in turn. The ratio is
the median over the pairs of (masked step / dense step) in time; an update's cost is its whole step, forward and
backward included, over the median ordinary masked step beside it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import click
import timing
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import regrow
from regrow import methods
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


def training(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> timing.Step:
    """One whole training step."""

    def step() -> None:
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits.flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    return step


def measure(case: Case, make: Callable[[nn.Module], Optimizer], repeats: int) -> list[str]:
    """Masked / dense ordinary step, its quartile spread, update step / ordinary step, dense milliseconds."""
    _, _, network, x, y = case
    torch.manual_seed(0)
    dense = network()
    sparse = copy.deepcopy(dense)
    first, second = make(dense), make(sparse)
    last = UPDATE_EVERY * (repeats + 2)
    sparsifier = regrow.sparsify(sparse, second, methods.rigl(DENSITY, until=last + 1, interval=UPDATE_EVERY))
    train = training(sparse, second, x, y)
    updates: list[bool] = []

    def masked() -> None:
        updates.append(sparsifier.due)
        train()

    steps = {"dense": training(dense, first, x, y), "masked": masked}
    rounds = timing.interleave(steps, last, once=True)
    warm = [index >= UPDATE_EVERY for index in range(last)]
    ordinary = rounds.where([yes and not update for yes, update in zip(warm, updates, strict=True)])
    updating = rounds.where([yes and update for yes, update in zip(warm, updates, strict=True)])
    ratio = ordinary.ratio("masked", "dense")
    update = statistics.median(updating.seconds["masked"]) / ordinary.time("masked").median
    milliseconds = 1e3 * rounds.where(warm).time("dense").median
    return [f"{ratio.median:.3f}", f"{ratio.upper - ratio.lower:.3f}", f"{update:.2f}", f"{milliseconds:.1f}"]


HEADS = [
    "network",
    "optimizer",
    "masked / dense, ordinary step",
    "quartile spread",
    "update / ordinary step",
    "dense ms",
]


@click.command(help=__doc__)
@click.option("--repeats", default=15, show_default=True, help="Updates measured per row, with 5 ordinary steps each.")
@timing.options
def main(repeats: int, save: bool, keep_memory: bool) -> None:
    """Measure, print and perhaps save."""
    kept = keep_memory and timing.keep_memory()
    lines = []
    for case in cases():
        for name, make in OPTIMIZERS.items():
            lines.append([case[0], name, *measure(case, make, repeats)])
            click.echo(f"{case[0]}, {name}", err=True)
    about = f"Density {DENSITY}, {repeats} updates and {5 * repeats} ordinary steps per row."
    timing.report("masked_overhead", [about, timing.markdown(HEADS, lines)], save, kept)


if __name__ == "__main__":
    main()
