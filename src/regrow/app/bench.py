"""From which density on the layers of a model run faster sparse than dense, on this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.app.machine import versions
from regrow.app.peers import peers as makers_of_peers
from regrow.core.draws import Stream
from regrow.core.method import Units
from regrow.core.text import by, table
from regrow.core.topology import Topology
from regrow.core.weight import Shaped
from regrow.engine.discovery import Selector, find
from regrow.engine.timing import (
    Call,
    Maker,
    Race,
    Topologies,
    alike,
    calls,
    compressed,
    masked,
    outputs,
    race,
    torch_sparse,
    without_hooks,
)
from regrow.nn import kind_of, sparse_class
from regrow.nn.base import sample
from regrow.parts import groups

DENSITIES = (0.2, 0.1, 0.05, 0.02, 0.01)
STRUCTURES: Mapping[str, Units] = {"groups(8)": groups(8)}
"""What compressed layers may be made of beside single entries, by the words of the command line."""
TOLERANCE = 1e-3
"""Relative error of outputs above which a layer computes something else than the dense one with zeros."""

Breakeven = float | Literal["always", "never"]
"""The density below which compressed is faster than dense, or whether it is at all that were measured."""


@dataclass(frozen=True)
class Layer:
    """What was measured of one layer, or of several equal ones."""

    names: tuple[str, ...]
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its sparse weights."""
    inputs: tuple[int, ...]
    """The shape of its first input."""
    races: Mapping[float, Race]
    """By density, descending; all were run in the same rounds."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Why a candidate was not timed."""
    structures: tuple[str, ...] = ()
    """Which candidates are compressed layers made of units."""

    @property
    def candidates(self) -> list[str]:
        """What was timed beside dense."""
        return list(dict.fromkeys(name for r in self.races.values() for name in r.seconds if name != "dense"))

    @property
    def dense(self) -> float:
        """Median seconds of a dense training step."""
        return next(iter(self.races.values())).time("dense")

    @property
    def wins_below(self) -> dict[str, Breakeven]:
        """The density below which compressed is faster than dense, of single entries and of each structure."""
        forms = ("compressed", *self.structures)
        return {form: breakeven({density: r.ratio(form) for density, r in self.races.items()}) for form in forms}

    def as_dict(self) -> dict[str, Any]:
        """What a JSON file holds of it; times in milliseconds, ratios to dense."""
        rows = [
            {
                "density": d,
                **{n: {"ms": 1e3 * r.time(n), "ratio": r.ratio(n)} for n in self.candidates if n in r.seconds},
            }
            for d, r in self.races.items()
        ]
        about = {"names": self.names, "kind": self.kind, "shapes": self.shapes, "input": self.inputs}
        times = {"dense_ms": 1e3 * self.dense, "wins_below": self.wins_below, "densities": rows}
        return {**about, **times, "notes": dict(self.notes)}

    def __str__(self) -> str:
        equal = f" and {len(self.names) - 1} equal to it" if len(self.names) > 1 else ""
        shapes = ", ".join(map(by, self.shapes))
        head = f"{self.names[0]}{equal}: {self.kind} {shapes}, input {by(self.inputs)}, dense {1e3 * self.dense:.3g} ms"
        rows = [[f"{d:g}", *(c for name in self.candidates for c in _cells(r, name))] for d, r in self.races.items()]
        heads = ["density", *(c for name in self.candidates for c in (f"{name} ms", "of dense"))]
        notes = [f"{name}: {note}" for name, note in self.notes.items()]
        wins = [
            f"{form} is faster than dense: "
            + (f"below density {where:.2g}" if isinstance(where, float) else f"{where}, at these densities")
            for form, where in self.wins_below.items()
        ]
        return "\n".join([head, table(heads, rows), *notes, *wins])


@dataclass(frozen=True)
class Report:
    """What was measured of a model's layers, and on what."""

    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]
    """Layers that could not be measured, and why."""
    machine: Mapping[str, str]

    def to_json(self) -> str:
        """Everything as indented JSON."""
        layers = [layer.as_dict() for layer in self.layers]
        return json.dumps({"machine": dict(self.machine), "layers": layers, "skipped": dict(self.skipped)}, indent=2)

    def __str__(self) -> str:
        m = self.machine
        of = f"{m['threads']} threads, load {m['load']} before, torch {m['torch']}, sparse kernels {m['kernels']}"
        head = f"{m['processor']}, {of}"
        skipped = [f"{name}: {why}" for name, why in self.skipped.items()]
        parts = [head, *map(str, self.layers), *(["\n".join(skipped)] if skipped else [])]
        foot = 'medians of a training step, forward and backward; "of dense" is the ratio of times'
        return "\n\n".join([*parts, foot])


def _cells(race: Race, name: str) -> tuple[str, str]:
    return (f"{1e3 * race.time(name):.3g}", f"{race.ratio(name):.2f}x") if name in race.seconds else ("-", "-")


def breakeven(ratios: Mapping[float, float]) -> Breakeven:
    """Below which density a ratio to dense is below 1, on a straight line between the measured ones around it.

    Examples:
        >>> round(breakeven({0.2: 1.5, 0.1: 0.5, 0.05: 0.25}), 3)
        0.15
        >>> breakeven({0.1: 0.9}), breakeven({0.1: 1.1})
        ('always', 'never')
    """
    points = sorted(ratios.items())
    first = next((i for i, (_, ratio) in enumerate(points) if ratio >= 1), None)
    if first is None:
        return "always"
    if first == 0:
        return "never"
    (low, fast), (high, slow) = points[first - 1 : first + 1]
    return low + (high - low) * (1 - fast) / (slow - fast)


def bench(
    model: nn.Module,
    example: Any,
    densities: Sequence[float] = DENSITIES,
    *,
    structures: Mapping[str, Units] = STRUCTURES,
    peers: bool = False,
    skip: Selector | Sequence[Selector] = (),
    only: Selector | Sequence[Selector] | None = None,
) -> Report:
    """Time a training step of every layer that could be sparse: dense, compressed, and by torch.sparse where it can.

    Compressed layers are timed of single entries and of each structure. Positions are uniformly random. Equal layers
    are timed once. The model is left as it was.

    Args:
        model: dense, on the CPU.
        example: an input of the model with the batch of training: a tensor, or a tuple or dict of its arguments. No
            gradient is computed to it unless it requires one.
        densities: shares of active entries.
        structures: what else than single entries may be active or inactive together, by name.
        peers: also time SparseLab and SparseProp, where they are installed.
        skip: layers to leave out, as `regrow.sparsify` takes them.
        only: the only layers to take.

    Raises:
        ValueError: for densities outside (0, 1], or a model without a weight that could be sparse.

    Examples:
        >>> report = bench(nn.Linear(8, 4), torch.zeros(2, 8), densities=[0.5])
        >>> report.layers[0].shapes
        ((4, 8),)
    """
    shares = sorted(set(densities), reverse=True)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"densities must lie in (0, 1], got {', '.join(f'{d:g}' for d in densities) or 'none'}")
    load = f"{os.getloadavg()[0]:.1f}"
    machine = {**versions(), "kernels": kernels.instruction_set() or "reference", "load": load}
    found, _ = find(model, skip, only)
    layers: dict[nn.Module, _Task] = {}
    for f in found:
        for module, attribute in f.holders:
            task = layers.setdefault(module, _Task(f.name.rpartition(".")[0] or type(module).__name__, {}))
            shape = tuple(f.parameter.shape)
            name = f"{task.name}.{attribute}"
            task.weights[attribute] = Shaped(name, shape, Topology(shape), f.out_axis, f.in_axis)
    skipped = {t.name: why for module, t in layers.items() if (why := _obstacle(module)) is not None}
    able = {module: task for module, task in layers.items() if task.name not in skipped}
    inputs = calls(model, example, able)
    done: dict[Hashable, Layer] = {}
    for module, task in able.items():
        if module not in inputs:
            skipped[task.name] = "the example does not reach it"
            continue
        key = alike(module, {}, inputs[module])
        before = done.get(key)
        if before is None:
            done[key] = _layer(module, task, inputs[module], shares, structures, peers)
        else:
            done[key] = replace(before, names=(*before.names, task.name))
    return Report(tuple(done.values()), skipped, machine)


class _Task(NamedTuple):
    name: str
    weights: dict[str, Shaped]
    """Its sparse weights, by parameter."""


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer cannot be measured."""
    if sparse_class(module) is None:
        return f"there is no sparse form of {type(module).__name__}"
    elsewhere = next((p.device for p in module.parameters() if p.device.type != "cpu"), None)
    return None if elsewhere is None else f"sparse kernels run on the CPU, and it lies on {elsewhere}"


def _layer(
    module: nn.Module,
    task: _Task,
    call: Call,
    densities: Sequence[float],
    structures: Mapping[str, Units],
    peers: bool,
) -> Layer:
    inputs = tuple(call.args[0].shape) if call.args and isinstance(call.args[0], Tensor) else ()
    bare, notes = without_hooks(module), {}
    topologies = {density: _random(task, density) for density in densities}
    forms: dict[str, Units | None] = {"compressed": None, **structures}
    for form, units in structures.items():
        if (why := _misfit(task, module, units)) is not None:
            notes[form] = why
            del forms[form]
    made = {
        density: {form: compressed(bare, _random(task, density, units)) for form, units in forms.items()}
        for density in densities
    }
    with torch.random.fork_rng():
        for name, make in _others(module, peers, inputs[-1] if inputs else 0).items():
            for density, active in topologies.items():
                try:
                    made[density][name] = _checked(make(bare, active), masked(bare, active), call)
                except ImportError:
                    notes[name] = "not installed"
                    break
                except (ArithmeticError, RuntimeError) as error:
                    notes[f"{name} at {density:g}"] = " ".join(str(error).split())[:100]
    # All densities in the same rounds, so that dense is timed once.
    entries: dict[str, Maker] = {
        f"{name} {density}": lambda *_, layer=layer: layer
        for density, layers in made.items()
        for name, layer in layers.items()
    }
    seconds = race(bare, {}, call, entries).seconds
    races = {
        density: Race({"dense": seconds["dense"], **{name: seconds[f"{name} {density}"] for name in layers}})
        for density, layers in made.items()
    }
    kind = kind_of(type(module))
    assert kind is not None
    shapes = tuple(weight.shape for weight in task.weights.values())
    return Layer(
        (task.name,), kind.name, shapes, inputs, races, notes, tuple(form for form in structures if form in forms)
    )


def _misfit(task: _Task, module: nn.Module, units: Units) -> str | None:
    """Why a layer cannot be made of units: they would span two blocks of a packed weight, or fit none."""
    kind = kind_of(type(module))
    blocks = {} if kind is None else kind.weights_of(module)
    try:
        boxes = {name: units.box(w) for name, w in task.weights.items()}
    except ValueError as error:
        return str(error)
    split = [n for n, box in boxes.items() if task.weights[n].shape[0] // blocks.get(n, 1) % box[0]]
    return f"units would span two blocks of {', '.join(split)}" if split else None


def _random(task: _Task, density: float, units: Units | None = None) -> Topologies:
    """Uniformly random positions, of units or of single entries."""
    return {
        name: sample(Topology(w.shape, unit=None if units is None else units.box(w)), density, Stream(0, w.name, 0))
        for name, w in task.weights.items()
    }


def _others(module: nn.Module, peers: bool, width: int) -> dict[str, Maker]:
    """What else than compressed a layer is timed as."""
    others: dict[str, Maker] = {}
    if isinstance(module, nn.Linear) and module.weight.dtype in (torch.float32, torch.float64):
        others["torch.sparse"] = torch_sparse
    return {**others, **(makers_of_peers(module, width) if peers else {})}


def _checked(layer: nn.Module, dense: nn.Module, call: Call) -> nn.Module:
    """`layer`, unless it computes something else than `dense`: ArithmeticError then."""
    expected, found = (outputs(module.eval(), call) for module in (dense, layer))
    error = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny))
    if not error < TOLERANCE:
        raise ArithmeticError(f"not timed, since its outputs have a relative error of {error:.1e}")
    return layer


# What the command line can describe

_NUMBER = r"([1-9]\d*)"
_LINEAR = re.compile("x".join([_NUMBER] * 2))
_CONV = re.compile("conv:" + "x".join([_NUMBER] * 4) + "@" + "x".join([_NUMBER] * 2))


def layer_of(words: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A layer and an input of it that requires a gradient.

    Args:
        words: the shape of a weight: OUTxIN, or conv:OUTxINxHEIGHTxWIDTH@HEIGHTxWIDTH with that of the image; the
            convolution pads by half its kernel.
        batch: samples in the input.

    Raises:
        ValueError: for other words.

    Examples:
        >>> layer, x = layer_of("conv:16x8x3x3@32x32", 2)
        >>> layer, x.shape
        (Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), torch.Size([2, 8, 32, 32]))
    """
    if match := _LINEAR.fullmatch(words):
        out, features = map(int, match.groups())
        return nn.Linear(features, out), torch.randn(batch, features, requires_grad=True)
    if match := _CONV.fullmatch(words):
        out, channels, high, wide, height, width = map(int, match.groups())
        conv = nn.Conv2d(channels, out, (high, wide), padding=(high // 2, wide // 2))
        return conv, torch.randn(batch, channels, height, width, requires_grad=True)
    raise ValueError(
        f"--layer takes the shape of a weight, 300x784 (out x in) or conv:64x32x3x3@16x16 (out x in x kernel @ image), "
        f"got {words!r}"
    )


def bench_layers(
    layers: Sequence[str],
    batch: int,
    densities: Sequence[float],
    *,
    structures: Mapping[str, Units] = STRUCTURES,
    peers: bool = False,
) -> Report:
    """As `bench`, of layers in the words of `layer_of`, each by itself."""
    reports = []
    for words in layers:
        layer, example = layer_of(words, batch)
        report = bench(layer, example, densities, structures=structures, peers=peers)
        reports.append(replace(report, layers=tuple(replace(row, names=(words,)) for row in report.layers)))
    skipped = {words: why for words, r in zip(layers, reports, strict=True) for why in r.skipped.values()}
    return replace(reports[0], layers=tuple(row for r in reports for row in r.layers), skipped=skipped)
