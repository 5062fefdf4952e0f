"""What compaction gains: outputs, files and latency of models half of whose hidden units were removed, ratios first.

    python benchmarks/compact.py [--rounds 5] [--models resnet-18,vit,gpt-2] [--save] [--return-memory]

Weights are random, sizes real: half of the inner channels of each ResNet block, half of the hidden units of each
feed-forward layer and half of each layer's heads have no weights. The sparse model is dense tensors with zeros, as
masked storage leaves it. Where onnx, onnxscript and onnxruntime are installed, both are exported and run there too.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import timing
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import regrow

RUNTIME = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


class Case(NamedTuple):
    """A model with zeros, and an input by the names of the model's arguments."""

    model: nn.Module
    example: dict[str, Tensor]


class Block(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class ResNet(nn.Sequential):
    """ResNet-18."""

    def __init__(self) -> None:
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        blocks = [Block(a, b, 1 + (a != b)) for a, b in pairwise(widths)]
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def half(count: int) -> Tensor:
    """Half of `count` indices, at random."""
    return torch.randperm(count)[: count // 2]


def resnet() -> Case:
    """ResNet-18 at 224 x 224, batch 4."""
    model = ResNet()
    for block in model:
        if isinstance(block, Block):
            block.conv1.weight[half(len(block.conv1.weight))] = 0
    return Case(model, {"input": torch.randn(4, 3, 224, 224)})


def vit() -> Case:
    """ViT-B/16 at 224 x 224, batch 2."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig())
    for layer in model.vit.layers:
        layer.mlp.fc1.weight[half(3072)] = 0
        layer.attention.v_proj.weight.view(12, 64, -1)[half(12)] = 0
    return Case(model, {"pixel_values": torch.randn(2, 3, 224, 224)})


def gpt_2() -> Case:
    """GPT-2 small, 2 x 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    for block in model.transformer.h:
        block.mlp.c_fc.weight[:, half(3072)] = 0
        block.attn.c_attn.weight[:, 1536:].view(-1, 12, 64)[:, half(12)] = 0
    return Case(model, {"input_ids": torch.randint(50257, (2, 128))})


CASES: dict[str, Callable[[], Case]] = {"resnet-18": resnet, "vit": vit, "gpt-2": gpt_2}


def output(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    """Logits."""
    found = model(**example)
    return found if isinstance(found, Tensor) else found.logits


def exported(model: nn.Module, example: dict[str, Tensor], path: Path) -> timing.Step:
    """A call of the model in onnxruntime."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, kwargs=example, f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    names = [node.name for node in session.get_inputs()]
    feed = dict(zip(names, [tensor.numpy() for tensor in example.values()], strict=True))
    return lambda: session.run(None, feed)


def bytes_of(model: nn.Module, path: Path) -> int:
    """The size of the model's file."""
    unique: dict[int, tuple[str, Tensor]] = {id(p): (n, p.detach()) for n, p in model.named_parameters()}
    unique |= {id(b): (n, b) for n, b in model.named_buffers()}
    save_file({name: tensor.contiguous() for name, tensor in unique.values()}, path)
    return path.stat().st_size


@torch.no_grad()
def measure(name: str, rounds: int, folder: Path) -> list[str]:
    """A line of sizes and a table of latencies."""
    torch.manual_seed(0)
    model, example = CASES[name]()
    model.eval()
    begin = time.perf_counter()
    small = regrow.compact(model, example)
    seconds = time.perf_counter() - begin
    one, two = output(model, example), output(small, example)
    error = float((one - two).abs().max() / one.abs().max())
    away = ""
    before, after = small.report.parameters
    files = bytes_of(model, folder / "a.safetensors"), bytes_of(small, folder / "b.safetensors")
    steps: dict[str, Any] = {"sparse": lambda: model(**example), "compacted": lambda: small(**example)}
    if RUNTIME:
        steps["sparse, onnxruntime"] = exported(model, example, folder / "a.onnx")
        steps["compacted, onnxruntime"] = exported(small, example, folder / "b.onnx")
        three = torch.from_numpy(steps["compacted, onnxruntime"]()[0])
        away = f", in onnxruntime by {float((one - three).abs().max() / one.abs().max()):.1e}"
    measured = timing.interleave(steps, rounds)
    sizes = (
        f"### {CASES[name].__doc__}\n\nEntries {before:,} to {after:,} ({before / after:.2f} times fewer); file "
        f"{files[0] / 1e6:.0f} to {files[1] / 1e6:.0f} MB ({files[0] / files[1]:.2f} times smaller); outputs differ by "
        f"{error:.1e} of the largest{away}; {len(small.report.kept)} weights hold dead outputs that stay; "
        f"compaction took {seconds:.0f} s."
    )
    table = timing.table(measured, ["sparse", *(["sparse, onnxruntime"] if RUNTIME else [])])
    return [sizes, table]


@click.command()
@click.option("--models", default=",".join(CASES), show_default=True, help="Which models.")
@timing.ROUNDS
@timing.options
def main(models: str, rounds: int, save: bool, keep_memory: bool) -> None:
    """Time models half of whose hidden units were removed, before and after compaction."""
    kept = keep_memory and timing.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        parts = [part for name in models.split(",") for part in measure(name, rounds, Path(folder))]
    timing.report("compact", parts, save, kept)


if __name__ == "__main__":
    main()
