"""Whole training steps, optimizer and updates included: dense as users have it, through oneDNN, and compressed.

    python benchmarks/training.py mlp --data-dir $REGROW_DATA/mnist [--densities 0.1,0.05,0.01] [--save]
    python benchmarks/training.py accuracy --data-dir $REGROW_DATA/mnist --density 0.1 [--seeds 5] [--save]
    python benchmarks/training.py wrn [--density 0.1] [--save]

`mlp` trains 784-4096-4096-4096-10 by RigL (ERK, an update every 100 steps) and takes a dense step after every
25 sparse ones; `accuracy` trains it masked and compressed from the same seeds; `wrn` takes steps of a WRN-22-2
on images of the size of CIFAR-10 in turn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import timing
import torch
from linear import OneDNNLinear
from timing import RESULTS
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow import methods
from regrow.app.data import batches, load, normalize
from regrow.app.models import build

STEPS, UPDATES, BATCH, WIDTH, BETWEEN = 1000, 10, 128, 4096, 25
DENSITIES = click.option("--densities", default="0.1,0.05,0.01", show_default=True, help="Separated by commas.")
DATA = click.option("--data-dir", type=click.Path(path_type=Path), required=True, help="A folder with MNIST.")

Images = tuple[Tensor, Tensor]


class Model:
    """A network with its optimizer, and perhaps its sparsifier."""

    def __init__(self, linear: type[nn.Linear], seed: int, density: float | None = None, storage: str = "compressed"):
        torch.manual_seed(seed)
        sizes = [784, WIDTH, WIDTH, WIDTH, 10]
        layers = [layer for n, m in pairwise(sizes) for layer in (linear(n, m), nn.ReLU())]
        self.network = nn.Sequential(nn.Flatten(), *layers[:-1])
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        if density is not None:
            interval = STEPS // UPDATES
            method = methods.rigl(density, until=STEPS, interval=interval, begin=interval - 1)
            self.sparsifier = regrow.sparsify(self.network, self.optimizer, method, storage=storage, seed=seed)

    def step(self, x: Tensor, y: Tensor) -> None:
        """What every user writes."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(x), y).backward()
        self.optimizer.step()

    def timed(self, x: Tensor, y: Tensor) -> float:
        """Seconds of a step."""
        begun = time.perf_counter()
        self.step(x, y)
        return time.perf_counter() - begun


def mnist(folder: Path) -> tuple[Images, Images]:
    """Training and test images of MNIST, normalized, with their labels."""
    data = load("mnist", folder)
    images = normalize(data)
    return (images.train_x, data.train_y), (images.test_x, data.test_y)


def drawn(train: Images, seed: int, steps: int) -> Iterator[Images]:
    """`steps` batches, epoch after epoch."""
    x, y = train
    done = epoch = 0
    while done < steps:
        for index in batches(len(y), BATCH, seed, epoch):
            if done < steps and len(index) == BATCH:
                yield x[index], y[index]
                done += 1
        epoch += 1


@click.group()
def main() -> None:
    """Whole training steps."""


@main.command()
@DATA
@DENSITIES
@timing.options
def mlp(data_dir: Path, densities: str, save: bool, keep_memory: bool) -> None:
    """Steps of the multilayer perceptron."""
    kept = keep_memory and timing.keep_memory()
    train, _ = mnist(data_dir)
    rows = []
    for density in map(float, densities.split(",")):
        dense, onednn, sparse = Model(nn.Linear, 0), Model(OneDNNLinear, 0), Model(nn.Linear, 0, density)
        ordinary, updates = [], []
        others: dict[str, list[float]] = {"nn.Linear": [], "oneDNN": []}
        for index, (x, y) in enumerate(drawn(train, 0, STEPS)):
            (updates if sparse.sparsifier.due else ordinary).append(sparse.timed(x, y))
            if index % BETWEEN == BETWEEN - 1:
                for name, model in {"nn.Linear": dense, "oneDNN": onednn}.items():
                    model.step(x, y)
                    others[name].append(model.timed(x, y))
                sparse.network(x)
        total = sum(ordinary) + sum(updates)
        ratios = [f"{statistics.median(seconds) * STEPS / total:.1f}" for seconds in others.values()]
        times = [statistics.median(s) * 1e3 for s in (ordinary, updates, *others.values())]
        rows.append(
            [f"{density:.0%}", *ratios, *(f"{t:.1f}" for t in times), f"{total:.1f}", str(sparse.sparsifier.updates)]
        )
    heads = ["density", "times faster than nn.Linear", "than oneDNN", "ms an ordinary step", "ms an update's step"]
    heads += ["ms nn.Linear", "ms oneDNN", f"s of {STEPS:,} steps", "updates"]
    text = (
        f"MLP 784-{WIDTH}-{WIDTH}-{WIDTH}-10, batch {BATCH}, SGD with momentum and weight decay, RigL. Ratio: the "
        f"median dense step times {STEPS:,} over the time of all {STEPS:,} sparse steps, updates included."
    )
    timing.report("training_mlp", [text, timing.markdown(heads, rows)], save, kept)


@main.command()
@DATA
@click.option("--density", default=0.1, show_default=True, help="Active share.")
@click.option("--seeds", default=5, show_default=True, help="Runs of each storage.")
@timing.options
def accuracy(data_dir: Path, density: float, seeds: int, save: bool, keep_memory: bool) -> None:
    """Test accuracy of masked and compressed runs; finished runs are kept, so an interrupted command goes on."""
    timing.keep_memory()
    train, (x, y) = mnist(data_dir)
    record = RESULTS / f"training_accuracy_{density:g}.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for seed in range(seeds):
        for storage in ("compressed", "masked"):
            key = f"{storage} {seed}"
            if key in done:
                continue
            model = Model(OneDNNLinear if storage == "masked" else nn.Linear, seed, density, storage)
            with click.progressbar(drawn(train, seed, STEPS), length=STEPS, label=key) as steps:
                for images, labels in steps:
                    model.step(images, labels)
            with torch.no_grad():
                done[key] = float((model.network(x).argmax(1) == y).double().mean())
            record.write_text(json.dumps(done, indent=1))
    rows = []
    for storage in ("masked", "compressed"):
        values = [100 * v for k, v in done.items() if k.startswith(storage)]
        rows.append(
            [
                storage,
                f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}",
                ", ".join(f"{v:.2f}" for v in values),
            ]
        )
    text = (
        f"MLP 784-{WIDTH}-{WIDTH}-{WIDTH}-10 on MNIST, RigL at {density:.0%}, {STEPS:,} steps of {BATCH}: accuracy "
        f"in % over {seeds} seeds."
    )
    timing.report(
        f"training_accuracy_{density:g}", [text, timing.markdown(["storage", "mean ± sd", "runs"], rows)], save
    )


@main.command()
@click.option("--density", default=0.1, show_default=True, help="Active share.")
@timing.ROUNDS
@timing.options
def wrn(density: float, rounds: int, save: bool, keep_memory: bool) -> None:
    """Steps of a WRN-22-2."""
    kept = keep_memory and timing.keep_memory()
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    steps = {}
    for name, layout in {"dense": torch.contiguous_format, "dense, channels last": torch.channels_last}.items():
        steps[name] = _trainer(None, x.contiguous(memory_format=layout), y, layout)
    steps[f"compressed, {density:.0%}"] = _trainer(density, x, y, torch.contiguous_format)
    table = timing.table(timing.interleave(steps, rounds), ["dense", "dense, channels last"])
    text = f"WRN-22-2, batch {BATCH} of 3 x 32 x 32, forward, backward and SGD with momentum; RigL's ordinary steps."
    timing.report("training_wrn", [text, table], save, kept)


def _trainer(density: float | None, x: Tensor, y: Tensor, layout: torch.memory_format) -> timing.Step:
    torch.manual_seed(0)
    model = build("wrn-22-2", (3, 32, 32), 10).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if density is not None:
        method = methods.rigl(density, until=10**9, interval=10**8)
        regrow.sparsify(model, optimizer, method, storage="compressed")

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
