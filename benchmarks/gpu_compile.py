"""What Triton makes of the programs for GPUs: compiled for two architectures, on a machine that needs no GPU.

    python benchmarks/gpu_compile.py [--save] [--json]

Compiles every launch of a training step of a 4096 x 4096 layer with 8,192 tokens at 10 % density: the very values that
`regrow.kernels.gpu` would launch. Needs Triton (`pip install triton`), whose wheel brings NVIDIA's assembler and
`cuobjdump`. sm_80 is the A100, sm_90 the H100 and H200.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regrow import Topology
from regrow.kernels import gpu, unit_index

SIZE, TOKENS, DENSITY = 4096, 8192, 0.1
UNITS = ((8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (16, 16), (32, 32), (64, 64), (128, 128))
FEW = ((64, 1), (32, 32))
ARCHITECTURES = {80: 16, 90: 64}
"""Rows that tensor cores take at once."""
WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES = {
    "bfloat16": (torch.bfloat16, UNITS),
    "float16": (torch.float16, FEW),
    "float32": (torch.float32, FEW),
    "float32 as tf32": (torch.float32, FEW),
}
RESULT = Path(__file__).parent / "results" / "gpu_compile.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Loads of one number a thread: what an index or a small tile may take, and the loops over activations must not.
SCALAR = r"ld\.global(?:\.\w+)*\.b16 "


class Report(NamedTuple):
    """What became of one launch."""

    program: str
    unit: str
    dtype: str
    architecture: int
    registers: int
    spills: int
    """Bytes of stack in the machine code: what did not fit into registers."""
    shared: int
    """Bytes of shared memory."""
    products: str
    """The instructions that multiply, and how many stand in the program."""
    copies: int
    """Copies of 16 bytes from global to shared memory that the program goes on beside."""
    scalars: int
    """Loads of one 16-bit number."""


def launches(unit: tuple[int, int], dtype: torch.dtype, architecture: int) -> Iterator[tuple[str, gpu.Launch]]:
    """The name and the value of each launch of a step; activations have no memory."""
    whole = Topology((SIZE, SIZE), unit=unit)
    draw = torch.Generator().manual_seed(0)
    active = torch.randperm(whole.places, generator=draw)[: round(DENSITY * whole.places)].sort().values
    index = unit_index(whole.at(active))
    meta = {"dtype": dtype, "device": "meta"}
    features, out = torch.empty(SIZE, TOKENS, **meta), torch.empty(SIZE, TOKENS, **meta).t()
    values = torch.empty(index.units, unit[1], unit[0], **meta)
    at_once = ARCHITECTURES[architecture]
    for word, found in (
        ("forward", gpu.products(features, values, None, index, False, out, at_once)),
        ("input gradient", gpu.products(features, values, None, index, True, out, at_once)),
        ("value gradient", gpu.samples(features, features, index, torch.empty_like(values))),
    ):
        seen = set()
        for launch in found:
            name = launch.program.fn.__name__
            if name not in seen:
                seen.add(name)
                yield (word if name in ("gathered", "sampled") else f"{word}: {name}"), launch


def compiled(launch: gpu.Launch, architecture: int) -> Any:
    """The launch as a kernel for sm_`architecture`, specialized as Triton's launcher does it."""
    names = launch.program.arg_names
    signature, constants, attributes = {}, {}, {}
    fixed = {parameter.name for parameter in launch.program.params if parameter.is_constexpr}
    for number, name in enumerate(names):
        value = launch.arguments[name]
        if name in fixed or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + WORDS[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.program, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def report(name: str, unit: tuple[int, int], dtype: str, architecture: int, kernel: Any) -> Report:
    """Read off the machine code."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.findall(rf"{word}:(\d+)", told)[-1]) for word in ("REG", "STACK"))
    shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)|mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)
    kinds = [f"wgmma {wide}" if wide else f"mma {narrow}" for wide, narrow in shapes]
    kinds += ["fma"] * len(re.findall(r"fma\.rn\.f32\s", ptx))
    products = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx))
    return Report(
        name,
        " x ".join(map(str, unit)),
        dtype,
        architecture,
        registers,
        stack,
        kernel.metadata.shared,
        products,
        copies,
        len(re.findall(SCALAR, ptx)),
    )


def reports() -> list[Report]:
    """All of them."""
    found = []
    for word, (dtype, units) in TYPES.items():
        torch.backends.cuda.matmul.fp32_precision = "tf32" if "tf32" in word else "ieee"
        for unit, architecture in itertools.product(units, ARCHITECTURES):
            for name, launch in launches(unit, dtype, architecture):
                found.append(report(name, unit, word, architecture, compiled(launch, architecture)))
    return found


def table(found: list[Report]) -> str:
    """Markdown."""
    heads = ["program", "unit", "type", "sm", "registers", "spilled bytes", "shared bytes", "products"]
    heads += ["copies of 16 bytes", "loads of 2 bytes"]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [heads, ["---"] * len(heads), *found])


@click.command(help=__doc__)
@click.option("--save", is_flag=True, help="Write the table into results/gpu_compile.md.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(save: bool, as_json: bool) -> None:
    """Compile, print and perhaps save."""
    found = reports()
    print(json.dumps([line._asdict() for line in found]) if as_json else table(found))
    if save:
        versions = f"triton {triton.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}"
        layer = f"{SIZE} x {SIZE}, {TOKENS:,} tokens, {100 * DENSITY:g} % of the units active"
        about = f"A training step of a layer of {layer}. Compiled, not run, by {versions}."
        RESULT.write_text(f"`python benchmarks/gpu_compile.py --save`\n\n{about}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
