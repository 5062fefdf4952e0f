"""The settings of a run: a frozen value that is written beside its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from regrow.atomic import replacing


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
    epochs: float | None = None
    steps: int | None = None
    batch: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    """Optimizer steps over which the learning rate rises linearly."""
    augment: bool | None = None
    seed: int = 0
    threads: int | None = None
    explored: bool = True

    def to_json(self) -> str:
        """The settings as indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        """Settings that `to_json` wrote."""
        values = json.loads(text)
        known = {f.name for f in fields(Config)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError("the settings were written by another version of regrow: start a new folder")
        lists = {name: None if values[name] is None else tuple(values[name]) for name in ("hidden", "skip", "only")}
        return Config(**{**values, **lists})


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
    batch = config.batch or defaults["batch"]
    if batch < 1 or batch > n_train:
        raise ValueError(f"--batch must lie between 1 and the {n_train:,} training examples, got {batch}")
    if config.epochs is not None and config.steps is not None:
        raise ValueError(f"give --epochs or --steps, not both (got {config.epochs:g} and {config.steps})")
    per_epoch = n_train // batch
    steps = config.steps
    if steps is None:
        epochs = defaults["epochs"] if config.epochs is None else config.epochs
        steps = round(epochs * per_epoch)
    if steps < 1:
        raise ValueError(f"a run needs at least 1 step, got {steps}: raise --epochs or --steps")
    augment = config.augment if config.augment is not None else model == "wrn-22-2"
    new = replace(config, model=model, steps=steps, epochs=None, augment=augment, **filled)
    for name in ("lr", "weight_decay", "momentum", "warmup"):
        if getattr(new, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(new, name):g}")
    return new


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)
