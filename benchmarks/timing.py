"""How everything here is timed, checked and written down.

Candidates are timed in turn, in one process, in rounds: whatever slows the machine for a while slows all of them, so
the ratio within a round is steadier than any time, and the median over rounds is what is reported.

Threads: torch, oneDNN, MKL and peers built on OpenMP all obey OMP_NUM_THREADS, set before the start; nothing here does.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn

from regrow.app.machine import versions
from regrow.engine import timing
from regrow.kernels.native import instruction_set

RESULTS = Path(__file__).parent / "results"
PEERS = ("sparselab", "sparseprop")
ENVIRONMENT = ("OMP_NUM_THREADS", "REGROW_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that a result depends on."""
LOAD = os.getloadavg()[0]  # before anything here has run

KEEP = "Whether the process keeps freed memory, which spares large dense gradients their page faults."

Step = Callable[[], object]
Batches = Sequence[tuple[Tensor, Tensor]]
Layers = dict[tuple[str, float], nn.Module]


class Quartiles(NamedTuple):
    """Where the middle half of some samples lies."""

    lower: float
    median: float
    upper: float


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Quartiles of samples, of which there are at least two."""
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


@dataclass(frozen=True)
class Rounds:
    """Seconds of every candidate in every round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> Quartiles:
        """Seconds of a candidate."""
        return quartiles(self.seconds[name])

    def ratio(self, name: str, reference: str) -> Quartiles:
        """A candidate's time over the reference's, round by round."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return quartiles([candidate / other for candidate, other in pairs])

    def where(self, chosen: Sequence[bool]) -> Rounds:
        """The chosen rounds alone."""
        return Rounds(
            {name: [s for s, yes in zip(all_, chosen, strict=True) if yes] for name, all_ in self.seconds.items()}
        )


def interleave(steps: Mapping[str, Step], rounds: int = 9, once: bool = False) -> Rounds:
    """Time every step in every round, as `regrow.engine.timing.interleave` does."""
    return Rounds(timing.interleave(steps, rounds, once))


def table(rounds: Rounds, references: Sequence[str], flops: Mapping[str, float] | None = None) -> str:
    """Markdown, ratios first: how many times faster than each reference, with quartiles, then milliseconds.

    Args:
        rounds: what `interleave` measured.
        references: candidates that all are compared with.
        flops: useful floating-point operations of each candidate's step, for a column of GFLOP/s.
    """
    heads = ["candidate", *(f"times faster than {name}" for name in references), "ms"]
    lines = []
    for name in rounds.seconds:
        cells = [name]
        for reference in references:
            slow, ratio, fast = (1 / share for share in reversed(rounds.ratio(name, reference)))
            cells.append(f"{ratio:.2f} ({slow:.2f} to {fast:.2f})")
        low, time, high = (1e3 * seconds for seconds in rounds.time(name))
        cells.append(f"{time:.2f} ({low:.2f} to {high:.2f})")
        if flops is not None:
            cells.append(f"{flops[name] / rounds.time(name).median / 1e9:.0f}")
        lines.append(cells)
    return markdown([*heads, *(["GFLOP/s"] if flops is not None else [])], lines)


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def conditions(kept: bool) -> str:
    """Date, processor, threads, instruction set, versions: what a result depends on besides its command."""
    about = versions() | {"kernels": instruction_set() or "reference"}
    processor, threads = about.pop("processor"), about.pop("threads")
    for package in PEERS:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    memory = "freed memory kept by the process" if kept else "the allocator's defaults"
    words = ", ".join(f"{name} {version}" for name, version in about.items())
    return f"{datetime.date.today()}, {processor}, {threads} threads, load {LOAD:.1f} before, {memory}, {words}."


def report(name: str, parts: Sequence[str], save: bool, kept: bool = False) -> None:
    """Print a result with its command and conditions, and perhaps write it to results/<name>.md.

    Args:
        name: of the file, without its ending.
        parts: Markdown, joined by empty lines.
        save: whether to write.
        kept: whether `keep_memory` was in force.
    """
    settings = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    command = shlex.join([*settings, "python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = "\n\n".join([f"`{command}`", conditions(kept), *parts]) + "\n"
    click.echo(text)
    if save:
        (RESULTS / f"{name}.md").write_text(text)


def keep_memory() -> bool:
    """Have glibc keep what is freed; whether that could be done.

    A fresh dense gradient of a 4096 x 4096 weight can cost 14 ms of page faults where memory goes back to the system
    each step, which is glibc's default at that size, and which sparse gradients are too small to meet. Kept memory
    is the comparison that favours dense.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(-4, 0) and libc.mallopt(-1, -1))  # M_MMAP_MAX, M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        return False


@contextmanager
def busy() -> Iterator[None]:
    """Another process takes one core."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every benchmark has."""
    command = click.option("--save", is_flag=True, help="Also write the tables to benchmarks/results.")(command)
    return click.option("--keep-memory/--return-memory", default=True, show_default=True, help=KEEP)(command)


ROUNDS = click.option("--rounds", default=9, show_default=True, help="Samples of every candidate.")


# Layers: what is timed is a training step of one, and what is timed has first been checked.


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    Attributes:
        make: the layer at a density, without bias; an ImportError says that its package is not installed.
        convert: from float32, contiguous, to what this layer likes best; not timed.
        tolerance: relative error that its arithmetic may have.
    """

    make: Callable[[float], nn.Module]
    convert: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Operation:
    """What a layer without bias has to compute.

    Attributes:
        dense: outputs of inputs and a dense weight.
        weight: the dense weight of whatever maps inputs to outputs, read off its answers to unit inputs.
    """

    dense: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Callable[[Tensor], Tensor]], Tensor]


def training(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of a layer, forward and both backward products; it returns outputs and input gradients.

    Outputs come in the layout of dy, input gradients in that of x: who computes in another one pays for it.
    """
    parameters = list(layer.parameters())
    layout = torch.contiguous_format if dy.is_mkldnn or dy.is_contiguous() else torch.channels_last

    def step() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        y = layer(leaf)
        if not y.is_mkldnn:
            y = y.contiguous(memory_format=layout)
        y.backward(dy)
        return y.detach(), leaf.grad

    return step


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, dense and detached."""
    return (tensor.to_dense() if tensor.is_mkldnn else tensor).detach().double()


def check(candidate: Candidate, layer: nn.Module, operation: Operation, batches: Batches, density: float) -> None:
    """Raise ArithmeticError unless a layer computes, at this density, what the operation says, and all its gradients.

    Nothing is known of how a layer stores its weight: unit inputs show it. Nor of the order of its values' gradients:
    their product with a random direction of the values has to be that of the output gradients with the outputs which
    values in that direction would give, and a gradient that is wrong anywhere fails that.

    Args:
        candidate: the layer's.
        layer: one that it made.
        operation: what is to be computed.
        batches: inputs and output gradients, float32.
        density: share of the weight that is to be active.
    """

    @torch.no_grad()
    def answer(inputs: Tensor) -> Tensor:
        return exact(layer(candidate.convert(inputs)))

    weight = operation.weight(answer)
    share = weight.count_nonzero().item() / weight.numel()
    if not math.isclose(share, density, rel_tol=0.02):
        raise ArithmeticError(f"density {share:.4f} instead of {density}")
    values = {parameter: parameter.detach().clone() for parameter in layer.parameters()}
    directions = {parameter: torch.randn_like(parameter) for parameter in values}
    for x, dy in ((candidate.convert(x), candidate.convert(dy)) for x, dy in batches):
        inputs = exact(x).requires_grad_()
        outputs = operation.dense(inputs, weight)
        (gradients,) = torch.autograd.grad(outputs, inputs, exact(dy))
        y, dx = training(layer, x, dy)()
        found = sum((exact(direction) * exact(p.grad)).sum().item() for p, direction in directions.items())
        size = sum(exact(parameter.grad).square().sum().item() for parameter in directions) ** 0.5
        with torch.no_grad():
            for parameter, direction in directions.items():
                parameter.copy_(direction)
            expected = (exact(layer(x)) * exact(dy)).sum().item()
            for parameter, value in values.items():
                parameter.copy_(value)
        errors = {
            "outputs": ((exact(y) - outputs).norm() / outputs.norm()).item(),
            "input gradients": ((exact(dx) - gradients).norm() / gradients.norm()).item(),
            "weight gradients": abs(found - expected) / size,
        }
        for what, error in errors.items():
            if not error < candidate.tolerance:
                raise ArithmeticError(f"relative error {error:.1e} in {what} at batch {len(dy)}")


def prepare(
    candidates: Mapping[str, Candidate], densities: Sequence[float], operation: Operation, batches: Batches
) -> tuple[Layers, list[str]]:
    """Layers by candidate and density, each checked, and a line about each that cannot be timed."""
    layers: Layers = {}
    notes = []
    for name, candidate in candidates.items():
        for density in densities:
            try:
                layer = candidate.make(density)
                check(candidate, layer, operation, batches, density)
            except ImportError:
                notes.append(f"{name}: not installed.")
                break
            except ArithmeticError as error:
                notes.append(f"{label(name, density)}: not timed, {error}.")
            else:
                layers[name, density] = layer
    return layers, notes


def label(name: str, density: float) -> str:
    """A candidate's name in tables."""
    return name if density == 1 else f"{name}, {100 * density:g} %"


def inference(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """A step of a layer that only goes forward."""

    @torch.no_grad()
    def step() -> Tensor:
        return layer(x)

    return step


def compare(
    candidates: Mapping[str, Candidate],
    layers: Layers,
    pair: tuple[Tensor, Tensor],
    references: Sequence[str],
    flops: float,
    rounds: int,
    make: Callable[[nn.Module, Tensor, Tensor], Step] = training,
) -> str:
    """A table of these layers' steps with the same inputs and output gradients.

    Args:
        candidates: what made the layers.
        layers: what is timed.
        pair: inputs and output gradients, float32.
        references: candidates that all are compared with.
        flops: floating-point operations of a dense step.
        rounds: samples of each.
        make: what a step is.
    """
    steps, counts = {}, {}
    for (name, density), layer in layers.items():
        entry = label(name, density)
        steps[entry] = make(layer, *map(candidates[name].convert, pair))
        counts[entry] = flops * density
    return table(interleave(steps, rounds), references, counts)
