"""One training run: an ordinary PyTorch loop, its record, and its resumption.

The library's whole part in it is one call of `regrow.sparsify`.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import regrow
from regrow import metrics
from regrow.app import data as datasets
from regrow.app import models, pictures
from regrow.app.config import Config, write_text
from regrow.app.machine import versions
from regrow.app.procedures import Around, Plain, Procedure, procedure
from regrow.app.vocabulary import STARTS, make, parsed, parsed_around
from regrow.core.draws import Stream
from regrow.core.method import Method, Need, Start
from regrow.core.topology import Topology
from regrow.engine.sparsifier import Sparsifier
from regrow.files import replacing
from regrow.metrics.flops import Flops
from regrow.parts.starts import given
from regrow.storage.stored import Storage

_log = logging.getLogger("regrow")

CHECKPOINT_SECONDS = 30.0
RECORDS = 200
START_BATCHES = 10
TRAIN_CHUNK = 1000
MAPS = 24
COLOURS = 3
"""Channels of photographs, which may be flipped; digits and letters may not."""

Report = Callable[[dict[str, Any]], None]
"""Called with the newest record, for progress."""


class Meter:
    """Running means of the training loss and accuracy since the last record."""

    def __init__(self) -> None:
        self.loss, self.correct, self.n = torch.zeros(()), torch.zeros(()), 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (n, classes), labels (n,)."""
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.n += len(labels)

    def take(self) -> tuple[float, float]:
        """(mean loss, accuracy), starting anew."""
        means = float(self.loss) / max(1, self.n), float(self.correct) / max(1, self.n)
        self.__init__()  # type: ignore[misc]
        return means


@dataclass
class Run:
    """Everything that moves during training."""

    config: Config
    steps: int
    model: nn.Module
    optimizer: Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sparsifier: Sparsifier
    forward: Flops
    """Of one sample, with every weight dense."""
    baseline: float
    """Forward FLOPs per sample of the dense model at full width."""
    spent: float = 0.0
    """Training FLOPs per sample, summed over the steps so far."""
    seconds: float = 0.0
    done: int = 0
    meter: Meter = field(default_factory=Meter)
    procedure: Procedure = field(default_factory=lambda: Plain(0))

    def checkpoint(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "done": self.done,
            "spent": self.spent,
            "seconds": self.seconds,
            "meter": vars(self.meter).copy(),
            "procedure": self.procedure.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `checkpoint` was made."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.done, self.spent, self.seconds = state["done"], state["spent"], state["seconds"]
        vars(self.meter).update(state["meter"])
        self.procedure.load_state_dict(state["procedure"])


def build(config: Config, data: datasets.Data) -> Run:
    """Model, optimizer, learning-rate schedule and sparsifier of a resolved config."""
    assert config.model is not None and config.steps is not None
    shape = (int(data.train_x.shape[1]), int(data.train_x.shape[2]), int(data.train_x.shape[3]))

    def network(width: float) -> nn.Module:
        return models.build(str(config.model), shape, data.classes, width=width, hidden=config.hidden, seed=config.seed)

    if config.optimizer not in ("sgd", "adam", "adamw"):
        raise ValueError(f"there is no optimizer {config.optimizer!r}: choose sgd, adam, adamw")
    outer, own = parsed_around(config.options), parsed(config.method, config.options)
    around = procedure(config.method, own, outer, config.steps, config.seed)
    method = around.method(make(config.method, config.options, around.horizon))
    width = _small_width(network, config) if config.method == "small_dense" else 1.0
    model = network(width)
    known = regrow.load(config.weights, model) if config.weights else None
    method = method._replace(start=_start(outer, own, method, known))
    optimizer = _optimizer(config, model)
    storage = storage_for(config, method)
    if storage == "masked":
        # A record of every position, which the other storages exist to avoid.
        method = method._replace(needs=method.needs | Need.EXPLORED)
    example = torch.zeros(1, *shape)
    forward, baseline = metrics.flops(model, example), metrics.flops(network(1.0), example).dense
    sparsifier = regrow.sparsify(
        model,
        optimizer,
        method,
        storage=storage,
        skip=config.skip,
        only=config.only or None,
        budget=_budget(config),
        seed=config.seed,
        **_first_batches(outer, method, config, data),
    )
    # After the sparsifier, which may have given the optimizer more to train.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_schedule(config, around))
    return Run(config, around.steps, model, optimizer, scheduler, sparsifier, forward, baseline, procedure=around)


def _start(outer: Around, own: Mapping[str, Any], method: Method, known: Mapping[str, Topology] | None) -> Start:
    """The start that the options ask for: the method's own, a file's topologies, or the pruned values of the model."""
    if outer.start == "method":
        return method.start
    if outer.start == "file":
        if known is None:
            raise ValueError("--start file takes the topologies of a file: give it as --weights")
        return given(known)
    density = own.get("init_density", own.get("density"))
    if density is None or method.start.needs_gradient or method.start.needs_batches:
        raise ValueError(f"{method.name} cannot begin by --start {outer.start}: it needs a density and no other start")
    return STARTS[outer.start](density)


def _first_batches(outer: Around, method: Method, config: Config, data: datasets.Data) -> dict[str, Any]:
    """Batches and loss for a start that reads gradients, where it does not take the first step's."""
    start, count = method.start, outer.start_batches
    if not (start.needs_batches or start.needs_gradient):
        if count is not None:
            raise ValueError(f"{method.name} reads no gradient at its start: leave out --start-batches")
        return {}
    if not start.needs_batches and count is None:
        return {}
    images = datasets.normalize(data).train_x if data.train_x.dtype == torch.uint8 else data.train_x
    order = datasets.batches(len(data.train_y), int(config.batch or 1), config.seed, 0)
    batches = [(images[index], data.train_y[index]) for index in islice(order, count or START_BATCHES)]
    return {"batches": batches, "loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}


def storage_for(config: Config, method: Method) -> Storage:
    """The storage of a run: what was asked for, but masked for a network that is dense from the first step to the last.

    Such a baseline is measured as its users have it, on torch's own kernels.
    """
    always_dense = Need.DENSE_VALUES in method.needs and not method.update
    return "masked" if always_dense else cast(Storage, config.storage)


def _budget(config: Config) -> Literal["sparsified", "model"]:
    return cast(Literal["sparsified", "model"], config.budget)


def _small_width(network: Callable[[float], nn.Module], config: Config) -> float:
    """The width at which a dense network is as large as the sparse one of the same options."""
    static = make("static", config.options, int(config.steps or 1))
    model = network(1.0)
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = regrow.sparsify(model, plain, static, skip=config.skip, only=config.only or None, budget=_budget(config))
    sparse.remove()
    pairs = [(w.shape, w.topology.nnz) for w in sparse.weights] + [(e.shape, e.numel) for e in sparse.excluded]
    biases = sum(
        m.bias.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None
    )
    return metrics.small_dense(network, metrics.model_bits(pairs, n_biases=biases))


def _optimizer(config: Config, model: nn.Module) -> Optimizer:
    assert config.lr is not None and config.weight_decay is not None
    decay, parameters = config.weight_decay, model.parameters()
    if config.optimizer == "sgd":
        momentum = config.momentum or 0.0
        return torch.optim.SGD(
            parameters, config.lr, momentum, weight_decay=decay, nesterov=config.nesterov and momentum > 0
        )
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return make(parameters, config.lr, weight_decay=decay)


def _lr_schedule(config: Config, around: Procedure) -> Callable[[int], float]:
    """The factor of the learning rate after so many steps; a procedure may say the rate itself."""
    steps, warmup, peak = around.span, config.warmup, config.lr or 1.0
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda p: 1.0,
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
        "step": lambda p: 0.1 ** sum(p >= drop for drop in (0.5, 0.75)),
    }
    if config.schedule not in shapes:
        raise ValueError(f"there is no schedule {config.schedule!r}: choose {', '.join(shapes)}")
    shape = shapes[config.schedule]

    def factor(step: int) -> float:
        rate = around.lr(step + 1)
        return min(1.0, (step + 1) / (warmup + 1)) * shape(min(step / steps, 1.0)) if rate is None else rate / peak

    return factor


def step_flops(run: Run) -> float:
    """Training FLOPs per sample of the coming step: forward, input gradients, weight gradients.

    3 f_S in general; 2 f_S + f_D where the weight gradient is dense; f is the forward cost at the present topology.
    """
    method: Method = run.sparsifier.method
    sparse, dense = forward_flops(run), run.forward.dense
    due = run.sparsifier.due
    if not run.sparsifier.started:
        return metrics.training_flops(dense, dense)
    dense_gradient = Need.EVERY_GRADIENT in method.needs or (Need.GRADIENT in method.needs and due)
    return metrics.training_flops(sparse, dense, gradient_interval=0 if dense_gradient else math.inf)


def forward_flops(run: Run) -> float:
    """Forward FLOPs per sample at the present topology."""
    return run.forward.at(metrics.densities(run.sparsifier)).sparse


def train(run: Run, data: datasets.Data, folder: Path, report: Report) -> Iterator[None]:
    """Train on normalized `data` to the last step, yielding after each; records and checkpoints go to `folder`."""
    batch = int(run.config.batch or 1)
    meter, maps = run.meter, Maps(run, data, folder)
    every = max(1, run.steps // RECORDS)
    cost = step_flops(run)
    began = saved = time.monotonic()
    before = run.seconds
    run.model.train()
    orders = Orders(len(data.train_y), batch, run.config.seed)
    if run.done == 0:
        run.procedure.after(0, run.sparsifier, run.scheduler)
    with (folder / "metrics.jsonl").open("a", buffering=1) as log, interruptible() as interrupted:
        while run.done < run.steps:
            index = orders.batch(run.procedure.place(run.done))
            images = _augmented(data.train_x[index], run) if run.config.augment else data.train_x[index]
            changes = run.sparsifier.due
            cost = step_flops(run) if changes or run.done == 0 else cost
            run.optimizer.zero_grad()
            logits = run.model(images)
            loss = F.cross_entropy(logits, data.train_y[index])
            loss.backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()
            run.scheduler.step()
            run.spent += cost
            cost = step_flops(run) if changes else cost
            run.done += 1
            held = run.sparsifier.nnz
            run.procedure.after(run.done, run.sparsifier, run.scheduler)
            cost = cost if run.sparsifier.nnz == held else step_flops(run)
            meter.add(loss, logits, data.train_y[index])
            maps.see(run)
            if run.done % every == 0 or run.done == run.steps:
                record = _record(run, meter)
                log.write(json.dumps(record) + "\n")
                report(record)
            run.seconds = before + time.monotonic() - began
            if interrupted() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(run, maps, folder)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
            yield
    save_checkpoint(run, maps, folder)


class Orders:
    """The batch of each step: every epoch has an order of its own."""

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n, self.size, self.seed = n, batch, seed
        self.epoch = -1
        self.order: list[Tensor] = []

    def batch(self, place: int) -> Tensor:
        """Indices of the examples of the step that `place` steps lie before, (batch,)."""
        epoch, at = divmod(place, self.n // self.size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(datasets.batches(self.n, self.size, self.seed, epoch))
        return self.order[at]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let a run end its step and save itself on the first interrupt or termination; a second one ends it at once."""
    signals = (signal.SIGINT, signal.SIGTERM)
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in signals:
        signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number in signals:
            signal.signal(number, before[number])


def _augmented(images: Tensor, run: Run) -> Tensor:
    key = Stream(run.config.seed, "augmentation", run.done).integers(2**31, 1)
    generator = torch.Generator().manual_seed(int(key[0]))
    return datasets.augment(images, generator, pad=4, flip=images.shape[1] == COLOURS)


def _record(run: Run, meter: Meter) -> dict[str, Any]:
    loss, accuracy = meter.take()
    if not math.isfinite(loss):
        raise ValueError(
            f"training diverged: the loss is {loss} at step {run.done:,}; lower --lr (now {run.config.lr})"
        )
    known = metrics.exploration(run.sparsifier) if run.sparsifier.started and run.sparsifier.explored else None
    return {
        "step": run.done,
        "loss": loss,
        "accuracy": accuracy,
        "density": run.sparsifier.density,
        **({} if known is None else _explored(known)),
        "lr": float(run.scheduler.get_last_lr()[0]),
    }


def _explored(known: metrics.Exploration) -> dict[str, Any]:
    """R_s overall and of each layer, with what it can be at most."""
    return {
        "explored": known.overall,
        "explored_bound": known.bound,
        "explored_layers": {name: [rate, known.bounds[name]] for name, rate in known.layers.items()},
    }


def connections(topology: Topology) -> Tensor:
    """How many entries are active in each column of a matrix, (columns,) int64, without forming its mask."""
    rows, columns = topology.shape[0], math.prod(topology.shape[1:])
    if topology.is_dense:
        return torch.full((columns,), rows)
    return torch.bincount(topology.entries % columns, minlength=columns)


class Maps:
    """Outgoing connections per input pixel at some steps, where the first layer reads an image."""

    def __init__(self, run: Run, data: datasets.Data, folder: Path) -> None:
        layer = models.vision_input_layer(run.model)
        self.name = None if layer is None else (f"{layer}.weight" if layer else "weight")
        self.shape = tuple(data.train_x.shape[1:])
        if self.name not in run.sparsifier.topologies or min(self.shape[1:]) < pictures.SMALLEST_MAP:
            self.name = None
        self.every = max(1, run.steps // MAPS)
        self.steps: list[int] = []
        self.counts: list[np.ndarray[Any, Any]] = []
        kept = folder / "connections.npz"
        if run.done and kept.exists():
            self._take(kept, run.done)
        elif run.sparsifier.started:
            self.see(run)

    def _take(self, path: Path, done: int) -> None:
        """Go on with the maps of an earlier process; what is damaged is left out, since a picture stops no run."""
        try:
            with path.open("rb") as held, np.load(held, allow_pickle=False) as file:
                steps, counts = file["steps"], file["counts"]
            if counts.shape != (*steps.shape, *self.shape[1:]):
                raise ValueError(f"it holds maps of shape {counts.shape} for {steps.shape} steps")
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            _log.warning("%s cannot be read (%s): the maps begin at step %s", path, error, f"{done:,}")
            return
        upto = int((steps <= done).sum())
        self.steps, self.counts = steps[:upto].tolist(), list(counts[:upto])

    def see(self, run: Run) -> None:
        """Count connections if a map is wanted at this step."""
        if self.name is None or (run.done % self.every and run.done != run.steps):
            return
        counts = connections(run.sparsifier.topologies[self.name])
        self.steps.append(run.done)
        self.counts.append(counts.view(self.shape).sum(0).cpu().numpy())

    def write(self, folder: Path) -> None:
        """Write `connections.npz`: steps (moments,), counts (moments, h, w)."""
        if self.name is not None:
            with replacing(folder / "connections.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, steps=np.array(self.steps), counts=np.array(self.counts))


def save_checkpoint(run: Run, maps: Maps, folder: Path) -> None:
    """Write `checkpoint.pt` and `connections.npz` atomically."""
    maps.write(folder)
    # Through a file of Python's, whose errors name what is wrong with the disk.
    with replacing(folder / "checkpoint.pt") as temporary, temporary.open("wb") as file:
        torch.save(run.checkpoint(), file)


def resume(run: Run, folder: Path) -> bool:
    """Continue from the folder's checkpoint if there is one; later records are cut off."""
    path = folder / "checkpoint.pt"
    records = folder / "metrics.jsonl"
    if not path.exists():
        records.unlink(missing_ok=True)
        return False
    try:
        run.restore(torch.load(path, weights_only=True))
    except Exception as error:  # whatever a damaged or foreign file makes of torch.load
        why = " ".join(str(error).split()).partition(". ")[0][:120] or "it is empty"
        raise ValueError(f"{path} cannot be resumed ({type(error).__name__}: {why}): delete {folder}") from None
    lines = records.read_text().splitlines() if records.exists() else []
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= run.done]
    write_text(records, "".join(line + "\n" for line in kept))
    return True


def _step_of(line: str) -> int | None:
    """The step of a record; None for a line that was cut off when its run was killed."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class TestSet:
    """A `Judge` on normalized test images."""

    def __init__(self, model: nn.Module, data: datasets.Data) -> None:
        self.model, self.x, self.y = model, data.test_x, data.test_y

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """What the model makes of the test set, (n, classes)."""
        self.model.eval()
        parts = [self.model(self.x[i : i + 1000]).softmax(1) for i in range(0, len(self.y), 1000)]
        return torch.cat(parts)

    def accuracy(self, probabilities: Tensor) -> float:
        """The share of the test set that `probabilities` (n, classes) get right."""
        return int((probabilities.argmax(1) == self.y).sum()) / len(self.y)


def result(run: Run, data: datasets.Data) -> dict[str, Any]:
    """What is reported in the end; the only place where the (normalized) test set is read, once by each model."""
    judge = TestSet(run.model, data)
    images = (data.train_x[i : i + TRAIN_CHUNK] for i in range(0, len(data.train_y), TRAIN_CHUNK))
    also = run.procedure.conclude(run.sparsifier, images, judge)
    accuracy = judge.accuracy(judge.probabilities())
    sparse = forward_flops(run)
    layers = {
        name: {"shape": list(t.shape), "nnz": t.nnz, "numel": t.numel} for name, t in run.sparsifier.topologies.items()
    }
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "data": data.name,
        "method": run.config.method,
        "storage": storage_for(run.config, run.sparsifier.method),
        "seed": run.config.seed,
        "steps": run.steps,
        "accuracy": accuracy,
        "also": also,
        "density": run.sparsifier.density,
        "nnz": run.sparsifier.nnz,
        "numel": run.sparsifier.numel,
        "layers": layers,
        "updates": run.sparsifier.updates,
        "explored": run.sparsifier.explored,
        "inference_flops_ratio": sparse / run.baseline,
        "training_flops_ratio": run.spent / (3 * run.baseline * run.steps),
        "seconds": run.seconds,
        "peak_rss_bytes": rss,
        "versions": versions(),
    }
