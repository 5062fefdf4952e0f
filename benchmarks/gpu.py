"""Weights made of units on one NVIDIA GPU: first whether they are right, then a layer's and a model's training steps.

    python benchmarks/gpu.py [--save] [--rounds 9]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny

Under ten minutes on a card. A step of a layer of 4096 x 4096 with 8,192 tokens is the forward product and both
gradients, through autograd, in bfloat16; the model is a transformer of width 2048, trained by RigL and AdamW. Beside
them stand dense layers and torch's 2:4 weights: forward and input gradient on packed ones, the value gradient dense.
`--tiny` runs all of it at sizes that Triton's interpreter can do, to see that it runs; it needs no card.

So far that is all it has done: no card was at hand when it was written.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import click
import timing
import torch
from timing import Rounds
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow import Topology, kernels, methods
from regrow.kernels import UnitIndex, layout, unit_index
from regrow.parts import Boxes, blocks, groups

Unit = tuple[int, int]
LARGE: tuple[Unit, ...] = ((16, 1), (32, 1), (64, 1), (128, 1), (32, 32), (64, 64), (128, 128))


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a card, or in the interpreter."""

    device: str
    checked: tuple[torch.dtype, ...]
    dtype: torch.dtype
    layer: int
    tokens: int
    units: tuple[Unit, ...]
    densities: tuple[float, ...]
    width: int
    depth: int
    context: int
    batch: int
    structures: Mapping[str, Boxes]
    repeats: int


CARD = Sizes(
    "cuda",
    (torch.bfloat16, torch.float16, torch.float32),
    torch.bfloat16,
    layer=4096,
    tokens=8192,
    units=LARGE,
    densities=(0.1, 0.05),
    width=2048,
    depth=8,
    context=1024,
    batch=8,
    structures={"groups of 64": groups(64), "blocks of 64 x 64": blocks(64, 64)},
    repeats=5,
)
# The interpreter has no bfloat16, and AdamW takes no float16.
TINY = Sizes(
    "cpu",
    (torch.float16, torch.float32),
    torch.float32,
    layer=64,
    tokens=32,
    units=((16, 1), (32, 32)),
    densities=(0.5,),
    width=32,
    depth=1,
    context=4,
    batch=2,
    structures={"groups of 8": groups(8), "blocks of 16 x 16": blocks(16, 16)},
    repeats=1,
)


class UnitLinear(nn.Module):
    """y = x W^T, with a share of the units of W active, at random places."""

    def __init__(self, size: int, unit: Unit, density: float, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        whole = Topology((size, size), unit=unit)
        active = torch.randperm(whole.places)[: round(density * whole.places)].sort().values
        index = unit_index(whole.at(active))
        self.index: UnitIndex = index._replace(starts=index.starts.to(device), columns=index.columns.to(device))
        values = torch.randn(len(active), *reversed(unit), device=device) / (density * size) ** 0.5
        self.weight = nn.Parameter(values.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return kernels.linear(x, self.weight, None, self.index)

    def dense(self) -> Tensor:
        """The weight with its zeros, float64."""
        (starts, columns, cols, outputs, inputs), units = self.index, len(self.weight)
        rows = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
        full = torch.zeros(len(starts) - 1, cols // inputs, inputs, outputs, dtype=torch.float64, device=starts.device)
        full[rows, columns.long()] = self.weight.detach()[:units].double()
        return full.permute(0, 3, 1, 2).reshape(-1, cols)


def errors(layer: UnitLinear, x: Tensor, dy: Tensor) -> dict[str, float]:
    """How far outputs and both gradients lie from float64, relative to the largest number there; or no repetition."""
    weight, index = layer.dense(), layer.index
    units = weight.view(-1, index.outputs, index.cols // index.inputs, index.inputs)
    rows = torch.arange(units.shape[0], device=x.device).repeat_interleave(index.starts.diff())
    grad = (dy.double().t() @ x.double()).view(units.shape)[rows, :, index.columns.long()].transpose(1, 2)
    right = {"outputs": x.double() @ weight.t(), "input gradient": dy.double() @ weight, "value gradient": grad}
    found = [step(layer, x, dy) for _ in range(2)]
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise ArithmeticError(f"the same step gave other numbers the second time: units of {index[3]} x {index[4]}")
    return {
        name: float((result.double() - value).abs().max() / value.abs().max())
        for (name, value), result in zip(right.items(), found[0], strict=True)
    }


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Outputs, input gradient and value gradient of a layer with one parameter."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy))


def check(sizes: Sizes) -> str:
    """A table of errors; an ArithmeticError where one is more than its type explains."""
    lines, size = [], min(sizes.layer, 1024)
    for dtype in sizes.checked:
        for unit in sizes.units:
            layer = UnitLinear(size, unit, sizes.densities[0], sizes.device, dtype)
            x, dy = torch.randn(2, min(sizes.tokens, 512), size, device=sizes.device).to(dtype)
            found = errors(layer, x, dy)
            if max(found.values()) > (limit := 2 * torch.finfo(dtype).eps + 1e-5):
                raise ArithmeticError(f"{unit}, {dtype}: errors of {found} are more than {limit:.1g}")
            lines.append([" x ".join(map(str, unit)), str(dtype), *(f"{error:.1e}" for error in found.values())])
    heads = ["unit", "type", "outputs", "input gradient", "value gradient"]
    return (
        f"Largest errors against float64, relative to the largest number, {size} x {size}; repeated to the bit:\n\n"
        + (timing.markdown(heads, lines))
    )


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of one run, the mean of `repeats` in a row on a card."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int, device: str, repeats: int) -> Rounds:
    """Every candidate in every round, after two that compile and settle."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            taken = seconds(run, device, repeats)
            if number >= 2:
                samples[name].append(taken)
    return Rounds(samples)


def semi_structured(size: int, sizes: Sizes, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """A step on torch's own 2:4 weights, packed for both directions beforehand."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    weight = torch.randn(size, size, device=sizes.device, dtype=sizes.dtype)
    packed = SparseSemiStructuredTensorCUTLASS.prune_dense_static_sort(weight)

    @torch.no_grad()
    def run() -> object:
        return F.linear(x, packed), F.linear(dy, packed.t()), dy.t() @ x

    run()
    return run


def layer_table(sizes: Sizes, density: float, rounds: int) -> str:
    """A step of one layer: dense, 2:4 and units."""
    size, tokens = sizes.layer, sizes.tokens
    x, dy = torch.randn(2, tokens, size, device=sizes.device).to(sizes.dtype)
    runs: dict[str, Callable[[], object]] = {}
    notes, flops = [], {}
    dense = nn.Linear(size, size, bias=False, device=sizes.device, dtype=sizes.dtype)
    runs["dense"] = partial(step, dense, x, dy)
    try:
        runs["torch 2:4"] = semi_structured(size, sizes, x, dy)
    except (RuntimeError, NotImplementedError, AttributeError, ImportError, ValueError) as error:
        notes.append(f"torch 2:4: not timed, {str(error).split('. ')[0]}")
    for unit in sizes.units:
        layer, name = UnitLinear(size, unit, density, sizes.device, sizes.dtype), " x ".join(map(str, unit))
        runs[name] = partial(step, layer, x, dy)
        runs[f"{name}, feature-major"] = partial(step, layer, x.t().contiguous().t(), dy.t().contiguous().t())
    for name in runs:
        flops[name] = 6 * tokens * size**2 * (1.0 if name == "dense" else 0.5 if "2:4" in name else density)
    table = timing.table(interleave(runs, rounds, sizes.device, sizes.repeats), ["dense"], flops)
    head = f"{size} x {size}, {tokens:,} tokens, density {100 * density:g} %, {sizes.dtype}, a training step"
    return "\n\n".join([f"{head}; GFLOP/s count active entries:", table, *notes])


class Block(nn.Module):
    """Attention and two linear maps, each after a norm, around which the input is carried."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(1, width // 64)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, context, width) -> the same shape."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.between(x))))


def trainings(sizes: Sizes, density: float) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps of a stack of blocks that learns to copy: dense, then sparse in each structure."""
    x = torch.randn(sizes.batch, sizes.context, sizes.width, device=sizes.device).to(sizes.dtype)
    for name, structure in {"dense": None, **sizes.structures}.items():
        model = nn.Sequential(*(Block(sizes.width) for _ in range(sizes.depth))).to(sizes.device, sizes.dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=sizes.device == "cuda")
        if structure is not None:
            method = methods.rigl(density, until=10**6, interval=100, structure=structure)
            regrow.sparsify(model, optimizer, method, storage="compressed")

        def run(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.mse_loss(model(x).float(), x.float()).backward()
            optimizer.step()

        yield name, run
        del model, optimizer, run
        gc.collect()


def model_table(sizes: Sizes, density: float, rounds: int) -> str:
    """Time and memory of whole training steps, one model after the other, since together they would not fit."""
    samples, memory = {}, []
    for name, run in trainings(sizes, density):
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        samples[name] = interleave({name: run}, rounds, sizes.device, 1).seconds[name]
        if sizes.device == "cuda":
            memory.append(f"{name}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
        del run  # which holds the model, while the next one is made
    head = f"A transformer of width {sizes.width}, {sizes.depth} blocks, {sizes.batch} x {sizes.context} tokens"
    about = f"{head}, density {100 * density:g} %, a training step with RigL and AdamW"
    return "\n\n".join([f"{about}:", timing.table(Rounds(samples), ["dense"]), ", ".join(memory)]).rstrip()


@click.command(help=__doc__)
@click.option("--tiny", is_flag=True, help="Sizes for Triton's interpreter.")
@click.option("--save", is_flag=True, help="Also write the tables to benchmarks/results.")
@timing.ROUNDS
def main(tiny: bool, save: bool, rounds: int) -> None:
    """Check, measure, print and perhaps save."""
    sizes = TINY if tiny else CARD
    if tiny:
        from regrow.kernels import gpu

        layout.kernels = lambda *tensors: gpu  # what tensors on a card meet
    elif not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here: --tiny runs on Triton's interpreter, with TRITON_INTERPRET=1")
    elif layout.on_gpu().__name__ != "regrow.kernels.gpu":
        raise click.ClickException("Triton cannot be imported: pip install triton")
    torch.manual_seed(0)
    name = "Triton's interpreter" if tiny else torch.cuda.get_device_name()
    parts = [f"On {name}.", check(sizes)]
    parts += [layer_table(sizes, density, rounds) for density in sizes.densities]
    parts += [model_table(sizes, density, rounds) for density in sizes.densities]
    timing.report("gpu", parts, save)


if __name__ == "__main__":
    main()
