"""Whole training steps, optimizer and updates included: dense as users have it, through oneDNN, and compressed.

    python benchmarks/training.py mlp --data-dir $REGROW_DATA/mnist [--densities 0.1,0.05,0.01] [--steps 1000] [--save]
    python benchmarks/training.py accuracy --data-dir $REGROW_DATA/mnist --density 0.1 [--seeds 5] [--save]
    python benchmarks/training.py wrn [--density 0.1] [--save]
    python benchmarks/training.py gpt [--densities 0.1,0.05] [--layers 4] [--save]

`mlp` trains 784-4096-4096-4096-10 by RigL (ERK, an update every 100 steps) and takes a dense step after every
25 sparse ones; `accuracy` trains it masked and compressed from the same seeds; `wrn` takes steps of a WRN-22-2
on images of the size of CIFAR-10 in turn, `gpt` those of a GPT of width 512 on 8 sequences of 128 characters.
Compressed models are trained with each of `--structures`, of which "none" is single entries.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import click
import timing
import torch
from linear import OneDNNLinear
from timing import RESULTS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import regrow
from regrow import methods
from regrow.app.data import batches, load, normalize
from regrow.app.models import build
from regrow.app.vocabulary import parse_units
from regrow.core.method import Method, Units

STEPS, INTERVAL, BATCH, WIDTH, BETWEEN = 1000, 100, 128, 4096, 25
LAST, NEVER = 10**9, 10**8
DENSITIES = click.option("--densities", default="0.1,0.05,0.01", show_default=True, help="Separated by commas.")
DATA = click.option("--data-dir", type=click.Path(path_type=Path), required=True, help="A folder with MNIST.")
STRUCTURES = click.option(
    "--structures",
    default="none,groups(4),groups(8)",
    show_default=True,
    callback=lambda context, option, text: {words: parse_units(words) for words in re.split(r",(?![^(]*\))", text)},
    help="What is active or inactive together; none is single entries.",
)

Images = tuple[Tensor, Tensor]
Structures = dict[str, Units | None]


class Model:
    """A network with its optimizer, and perhaps its sparsifier."""

    def __init__(self, linear: type[nn.Linear], seed: int, method: Method | None = None, storage: str = "compressed"):
        torch.manual_seed(seed)
        sizes = [784, WIDTH, WIDTH, WIDTH, 10]
        layers = [layer for n, m in pairwise(sizes) for layer in (linear(n, m), nn.ReLU())]
        self.network = nn.Sequential(nn.Flatten(), *layers[:-1])
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        if method is not None:
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


def rigl(density: float, steps: int = STEPS, structure: Units | None = None) -> Method:
    """RigL with an update at the end of every 100 steps."""
    return methods.rigl(density, until=steps, interval=INTERVAL, begin=INTERVAL - 1, structure=structure)


def named(words: str, density: float) -> str:
    """A compressed candidate's name."""
    return timing.label("single entries" if words == "none" else words, density)


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
@STRUCTURES
@click.option("--steps", default=STEPS, show_default=True, help="Steps of every sparse model.")
@timing.options
def mlp(data_dir: Path, densities: str, structures: Structures, steps: int, save: bool, keep_memory: bool) -> None:
    """Steps of the multilayer perceptron."""
    kept = keep_memory and timing.keep_memory()
    train, _ = mnist(data_dir)
    dense = {"nn.Linear": Model(nn.Linear, 0), "oneDNN": Model(OneDNNLinear, 0)}
    rows = []
    for density in map(float, densities.split(",")):
        sparse = {words: Model(nn.Linear, 0, rigl(density, steps, units)) for words, units in structures.items()}
        others, ordinary, updates = ({name: [] for name in names} for names in (dense, sparse, sparse))
        batches = drawn(train, 0, steps)
        while block := list(islice(batches, BETWEEN)):
            for words, model in sparse.items():
                model.network(block[0][0])
                for pair in block:
                    (updates if model.sparsifier.due else ordinary)[words].append(model.timed(*pair))
            for name, model in dense.items():
                model.step(*block[-1])
                others[name].append(model.timed(*block[-1]))
        middle = {name: statistics.median(seconds) for name, seconds in others.items()}
        for words, model in sparse.items():
            total = sum(ordinary[words]) + sum(updates[words])
            times = [statistics.median(seconds[words]) for seconds in (ordinary, updates)]
            rows.append(
                [
                    named(words, density),
                    *(f"{seconds * steps / total:.1f}" for seconds in middle.values()),
                    *(f"{1e3 * seconds:.1f}" for seconds in (*times, *middle.values())),
                    f"{total:.1f}",
                    str(model.sparsifier.updates),
                ]
            )
    heads = ["candidate", "times faster than nn.Linear", "than oneDNN", "ms an ordinary step", "ms an update's step"]
    heads += ["ms nn.Linear", "ms oneDNN", f"s of {steps:,} steps", "updates"]
    text = (
        f"MLP 784-{WIDTH}-{WIDTH}-{WIDTH}-10, batch {BATCH}, SGD with momentum and weight decay, RigL. Ratio: the "
        f"median dense step times {steps:,} over the time of all {steps:,} sparse steps, updates included."
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
            model = Model(OneDNNLinear if storage == "masked" else nn.Linear, seed, rigl(density), storage)
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
@STRUCTURES
@timing.ROUNDS
@timing.options
def wrn(density: float, structures: Structures, rounds: int, save: bool, keep_memory: bool) -> None:
    """Steps of a WRN-22-2."""
    kept = keep_memory and timing.keep_memory()
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def stepping(method: Method | None, layout: torch.memory_format = torch.contiguous_format) -> timing.Step:
        torch.manual_seed(0)
        model = build("wrn-22-2", (3, 32, 32), 10).to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        if method is not None:
            regrow.sparsify(model, optimizer, method, storage="compressed")
        images = x.contiguous(memory_format=layout)
        return trainer(optimizer, lambda: F.cross_entropy(model(images), y))

    steps = {"dense": stepping(None), "dense, channels last": stepping(None, torch.channels_last)}
    for words, units in structures.items():
        steps[named(words, density)] = stepping(methods.rigl(density, until=LAST, interval=NEVER, structure=units))
    table = timing.table(timing.interleave(steps, rounds), [*steps][:2])
    text = f"WRN-22-2, batch {BATCH} of 3 x 32 x 32, forward, backward and SGD with momentum; RigL's ordinary steps."
    timing.report("training_wrn", [text, table], save, kept)


LENGTH, SEQUENCES, SYMBOLS, HEAD, FEATURES = 128, 8, 65, 64, 512


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.qkv, self.out = linear(FEATURES, 3 * FEATURES, bias=False), linear(FEATURES, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (sequences x length, features) to the same shape."""
        q, k, v = self.qkv(x).view(SEQUENCES, LENGTH, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


class GPT(nn.Module):
    """A pre-norm transformer over characters, its linear layers without biases."""

    def __init__(self, linear: type[nn.Linear], layers: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(SYMBOLS, FEATURES), nn.Embedding(LENGTH, FEATURES)
        self.attention = nn.ModuleList(nn.Sequential(nn.LayerNorm(FEATURES), Attention(linear)) for _ in range(layers))
        self.feed = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(FEATURES),
                linear(FEATURES, 4 * FEATURES, bias=False),
                nn.GELU(),
                linear(4 * FEATURES, FEATURES, bias=False),
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, SYMBOLS, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (sequences x length, symbols) of text (sequences, length)."""
        x = (self.characters(text) + self.places.weight).flatten(0, 1)
        for attention, feed in zip(self.attention, self.feed, strict=True):
            x = x + attention(x)
            x = x + feed(x)
        return self.head(self.norm(x))


@main.command()
@click.option("--densities", default="0.1,0.05", show_default=True, help="Separated by commas.")
@STRUCTURES
@click.option("--layers", default=4, show_default=True, help="Layers of the transformer.")
@timing.ROUNDS
@timing.options
def gpt(densities: str, structures: Structures, layers: int, rounds: int, save: bool, keep_memory: bool) -> None:
    """Steps of a GPT."""
    kept = keep_memory and timing.keep_memory()
    text = torch.randint(SYMBOLS, (SEQUENCES, LENGTH + 1))
    x, y = text[:, :-1], text[:, 1:].flatten()

    def stepping(linear: type[nn.Linear] = nn.Linear, method: Method | None = None, half: bool = False) -> timing.Step:
        torch.manual_seed(0)
        model = GPT(linear, layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if method is not None:
            regrow.sparsify(model, optimizer, method, storage="compressed", skip="head")

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, half):
                return F.cross_entropy(model(x), y)

        return trainer(optimizer, loss)

    dense = {"dense": stepping(), "dense, oneDNN": stepping(OneDNNLinear), "dense, bfloat16": stepping(half=True)}
    sparse = {
        named(words, density): partial(methods.rigl, density, until=LAST, structure=units)
        for density in map(float, densities.split(","))
        for words, units in structures.items()
    }
    steps = dense | {name: stepping(method=method(interval=NEVER)) for name, method in sparse.items()}
    measured = timing.interleave(steps, rounds)
    table = timing.table(measured, ["dense", "dense, oneDNN"])
    updating = {name: stepping(method=method(interval=1, begin=2)) for name, method in sparse.items()}
    for step in updating.values():
        step()
    update = timing.interleave(updating, 3, once=True)
    lines = []
    for name in sparse:
        ordinary, whole = measured.time(name).median, update.time(name).median
        mean = ((INTERVAL - 1) * ordinary + whole) / INTERVAL
        ratios = [f"{measured.time(reference).median / mean:.2f}" for reference in ("dense", "dense, oneDNN")]
        lines.append([name, f"{1e3 * whole:.0f}", f"{whole / ordinary:.1f}", *ratios])
    heads = ["candidate", "ms an update's step", "ordinary steps"]
    heads += [f"times faster than {name}, an update every {INTERVAL} steps" for name in ("dense", "dense, oneDNN")]
    about = (
        f"GPT of {layers} layers, width {FEATURES}, heads of {HEAD}, {SYMBOLS} symbols, {SEQUENCES} x {LENGTH} of them "
        "in a step: forward, backward and AdamW. Embeddings and the last layer are dense; RigL's ordinary steps."
    )
    timing.report("training_gpt", [about, table, "With updates:", timing.markdown(heads, lines)], save, kept)


def trainer(optimizer: Optimizer, loss: Callable[[], Tensor]) -> timing.Step:
    """A whole training step."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
