"""The settings of a run: a frozen value that is written beside its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from regrow.files import replacing


@dataclass(frozen=True)
class Config:
    """One training run; what is None is filled in by `resolved` from the data and the model."""

    data: str = "digits"
    data_dir: str | None = None
    model: str | None = None
    hidden: tuple[int, ...] | None = None
    method: str = "rigl"
    options: Mapping[str, str] = field(default_factory=dict)
    """The method's options as typed."""
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    budget: str = "sparsified"
    storage: str = "masked"
    weights: str | None = None
    """A saved model whose values the network begins with."""
    epochs: float | None = None
    steps: int | None = None
    batch: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool = True
    """Whether momentum of sgd looks ahead."""
    weight_decay: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    """Optimizer steps over which the learning rate rises linearly."""
    augment: bool | None = None
    seed: int = 0
    threads: int | None = None

    def to_json(self) -> str:
        """The settings as indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        """Settings that `to_json` wrote."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(Config)}:
            raise ValueError("it was written by another version of regrow")
        lists = {
            name: tuple(values[name]) if isinstance(values[name], list) else None for name in ("hidden", "skip", "only")
        }
        return Config(**{**values, **lists})


MOST_STEPS = 10**9

_MODELS = {"digits": "mlp", "mnist": "lenet-300-100", "fashion-mnist": "lenet-300-100"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"epochs": 60.0, "batch": 64, "lr": 0.1, "weight_decay": 1e-4},
    "lenet-300-100": {"epochs": 30.0, "batch": 100, "lr": 0.1, "weight_decay": 1e-4},
    "wrn-22-2": {"epochs": 30.0, "batch": 128, "lr": 0.1, "weight_decay": 5e-4},
}
"""Settings by model; the wide ResNet's are those of the RigL paper's CIFAR-10 experiments but for the length."""


def resolved(config: Config, n_train: int) -> Config:
    """Every None filled in; `epochs` becomes `steps` with `n_train` examples.

    Raises:
        ValueError: for values out of range, or both epochs and steps.
    """
    model = config.model or _MODELS.get(config.data, "wrn-22-2")
    defaults = _DEFAULTS.get(model, _DEFAULTS["mlp"])
    filled = {k: v for k, v in defaults.items() if k != "epochs" and getattr(config, k) is None}
    batch = defaults["batch"] if config.batch is None else config.batch
    if not 1 <= batch <= n_train:
        raise ValueError(f"--batch must lie between 1 and the {n_train:,} training examples, got {batch}")
    steps = _steps(config, defaults["epochs"], n_train // batch)
    if config.momentum is not None and config.optimizer != "sgd":
        raise ValueError(f"--momentum is an option of sgd, and the optimizer is {config.optimizer}: leave it out")
    momentum = 0.9 if config.momentum is None and config.optimizer == "sgd" else config.momentum
    augment = config.augment if config.augment is not None else model == "wrn-22-2"
    new = replace(config, model=model, steps=steps, epochs=None, augment=augment, momentum=momentum, **filled)
    _require_ranges(new, steps)
    return new


def _steps(config: Config, epochs: float, per_epoch: int) -> int:
    if config.epochs is not None and config.steps is not None:
        raise ValueError(f"give --epochs or --steps, not both (got {config.epochs:g} and {config.steps})")
    epochs = epochs if config.epochs is None else config.epochs
    steps = config.steps if config.steps is not None else epochs * per_epoch
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"a run has 1 to {MOST_STEPS:,} steps, got {steps:g}: change --epochs or --steps")
    return round(steps)


def _require_ranges(config: Config, steps: int) -> None:
    """Raise ValueError unless every number lies where it makes sense; NaN lies nowhere."""
    ranges = {
        "lr": (0.0, 1e6),
        "weight_decay": (0.0, 1e6),
        "momentum": (0.0, 0.9999),
        "warmup": (0, steps),
        "seed": (0, 2**62),
        "threads": (1, 4096),
    }
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie between {low:g} and {high:g}, got {value:g}")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)
