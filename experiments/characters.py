"""Train a small GPT on characters by several methods, and tabulate bits per character over seeds.

    python experiments/characters.py FILE --out experiments/gpt-structures
        [--methods 'dense rigl rigl:structure=groups(8)'] [--densities 0.1] [--seeds 3] [--steps 2400]

FILE is any text; its last tenth is held out. Three layers of width 256 see 64 characters; all linear layers but the
last are sparse at one density each. A method is what the command line calls it, with its options. Finished runs are
kept in `results.json`, so an interrupted command goes on with the next one.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.app import vocabulary
from regrow.app.config import write_text
from regrow.app.machine import versions

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 256, 3, 4, 64, 16
LR, WARMUP, WEIGHT_DECAY = 4e-3, 100, 0.1
METHODS = "dense rigl rigl:structure=groups(4) rigl:structure=groups(8) rigl:structure=groups(16)"
INTERVAL = "50"


class Text(NamedTuple):
    """Characters as numbers, and how many different ones there are."""

    train: Tensor
    held_out: Tensor
    characters: int


class Block(nn.Module):
    """Attention to what came before and a perceptron, each on a normalized input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) in and out."""
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Scores of the next character, (batch, length, characters), from (batch, length)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for every place."""
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])))


def read(file: Path) -> Text:
    """A file as numbers, the last tenth apart."""
    text = file.read_text()
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    cut = len(numbers) * 9 // 10
    return Text(numbers[:cut], numbers[cut:], len(known))


def windows(numbers: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """What the model sees and what it should say, both (starts, length)."""
    pieces = numbers[starts[:, None] + torch.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy per character, in nats."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def bits(model: GPT, numbers: Tensor) -> float:
    """Bits per character over all of the held-out text, in windows side by side."""
    starts = torch.arange(0, len(numbers) - LENGTH, LENGTH)
    total = sum(float(loss(model, *windows(numbers, part))) * len(part) for part in starts.split(256))
    return total / len(starts) / math.log(2)


def run(text: Text, method: str, density: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once; the result as JSON holds it."""
    torch.manual_seed(seed)
    model = GPT(text.characters)
    # Decay is for matrices of the blocks; biases, norms and embeddings have none.
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks")]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("blocks"))]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    name, options = vocabulary.parse_method(method)
    known = vocabulary.options(name)
    options |= {"density": str(density)} if "density" in known else {}
    options |= {"interval": INTERVAL} if "interval" in known and "interval" not in options else {}
    options |= {"allocate": "uniform"} if "allocate" in known and "allocate" not in options else {}
    made = vocabulary.make(name, options, steps)
    storage = "masked" if name == "dense" or name.startswith("granet") else "compressed"
    sparsifier = regrow.sparsify(model, optimizer, made, skip="head", storage=storage, seed=seed)
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, t / steps))))
    )
    generator = torch.Generator().manual_seed(seed)
    with click.progressbar(range(steps), label=f"{method} {density:g} seed {seed}") as counted:
        for _ in counted:
            x, y = windows(text.train, torch.randint(len(text.train) - LENGTH, (BATCH,), generator=generator))
            optimizer.zero_grad()
            loss(model, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm.step()
    active = sum(topology.nnz for topology in sparsifier.topologies.values())
    about = {"method": method, "density": None if name == "dense" else density, "seed": seed, "steps": steps}
    return about | {"storage": storage, "active": active, "bits": bits(model, text.held_out), "versions": versions()}


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the table goes.")
@click.option("--methods", default=METHODS, show_default=True, help="As the command line calls them.")
@click.option("--densities", default="0.1", show_default=True, help="Separated by commas.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each.")
@click.option("--steps", default=2400, show_default=True, help="Optimizer steps of each run.")
def main(file: Path, out: Path, methods: str, densities: str, seeds: int, steps: int) -> None:
    """Run what is not there yet, then write the table."""
    text, record = read(file), out / "results.json"
    out.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = json.loads(record.read_text())["runs"] if record.exists() else []
    command = (
        f"python experiments/characters.py $REGROW_DATA/text/tinyshakespeare.txt --methods '{methods}' --densities "
        f"{densities} --seeds {seeds} --steps {steps} --out {out.parent.name}/{out.name}"
    )
    wanted = []
    for method in methods.split():
        dense = method.startswith("dense")
        for density in [None] if dense else [float(d) for d in densities.split(",")]:
            wanted += [(method, density, seed) for seed in range(seeds)]
    for method, density, seed in wanted:
        if any((r["method"], r["density"], r["seed"], r["steps"]) == (method, density, seed, steps) for r in done):
            continue
        done.append(run(text, method, density or 1.0, seed, steps))
        write_text(record, json.dumps({"command": command, "runs": done}, indent=1) + "\n")
    write_text(out / "table.md", table(command, done))


def table(command: str, runs: list[dict[str, Any]]) -> str:
    """The runs of each method and density on a line."""
    lines = ["| method | density | active | bits per character | runs |", "| --- | --- | --- | --- | --- |"]
    for method, density in dict.fromkeys((r["method"], r["density"]) for r in runs):
        group = [r for r in runs if (r["method"], r["density"]) == (method, density)]
        found = [r["bits"] for r in group]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        mean, each = f"{statistics.fmean(found):.3f}{spread}", ", ".join(f"{b:.3f}" for b in found)
        lines.append(f"| {method} | {density or 1:g} | {group[0]['active']:,} | {mean} | {each} |")
    about = runs[0]["versions"]
    setting = f"regrow {about['regrow']}, torch {about['torch']}, {about['processor']}"
    note = f"{runs[0]['steps']:,} steps of {BATCH} x {LENGTH} characters, AdamW; {setting}."
    return f"`{command}`\n\n{note}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
