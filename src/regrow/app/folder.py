"""A run's folder: begun, resumed or already complete, and what is written into it at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from regrow.app import data as datasets
from regrow.app import loop, pictures
from regrow.app.config import Config, resolved, write_text
from regrow.files import partial_files, save

LOCK = ".lock"


def run(config: Config, folder: Path, report: loop.Report) -> dict[str, Any]:
    """Train `config` in `folder`, go on where an interrupted run stopped, or return a complete run's result.

    Raises:
        ValueError: for settings that cannot run, a folder that holds another run, or one in use.
    """
    data, settings = prepare(config)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    job = loop.build(settings, data)
    if (done := complete(settings, folder)) is not None:
        return done
    scaled = datasets.normalize(data)
    data = data._replace(train_x=scaled.train_x, test_x=scaled.test_x)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is training in {folder}: wait for it, or choose another --out") from None
    try:
        if (done := complete(settings, folder)) is not None:
            # Another process was faster since the folder was looked at.
            return done
        for leftover in partial_files(folder):
            leftover.unlink(missing_ok=True)
        write_text(folder / "config.json", settings.to_json())
        loop.resume(job, folder)
        for _ in loop.train(job, data, folder, report):
            pass
        return _conclude(job, data, folder)
    finally:
        # While it is held: whoever had opened it already finds it gone, and not free.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def prepare(config: Config) -> tuple[datasets.Data, Config]:
    """The data of a run and its settings with every None filled in."""
    data = datasets.load(config.data, None if config.data_dir is None else Path(config.data_dir))
    return data, resolved(config, len(data.train_y))


def complete(settings: Config, folder: Path) -> dict[str, Any] | None:
    """The result of a complete run with these settings, None where there is none yet.

    The number of threads may differ: it changes how fast a run is, and its results by rounding alone.

    Raises:
        ValueError: when the folder holds a run with other settings, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {
        LOCK,
        *(p.name for p in partial_files(folder)),
    }:
        return None
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds something other than a run: choose another --out")
    other = _read(path, lambda text: vars(Config.from_json(text)))
    differing = [name for name, value in vars(settings).items() if name != "threads" and other[name] != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds a run with another {name} ({other[name]!r}, now {getattr(settings, name)!r}): "
            "choose another --out, or delete it"
        )
    result = folder / "result.json"
    return _read(result, json.loads) if result.is_file() else None


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        values = parse(path.read_text())
        if not isinstance(values, dict) or not values:
            raise ValueError("it holds no settings or results")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another --out, or delete the folder") from None
    return values


def _conclude(job: loop.Run, data: datasets.Data, folder: Path) -> dict[str, Any]:
    result = loop.result(job, data)
    save(job.sparsifier, folder / "model.safetensors")
    draw(folder, result)
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def draw(folder: Path, result: dict[str, Any]) -> None:
    """Write the pictures of a run from its record, result and connection counts."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pictures.training_curves(records, folder / "curves.png")
    pictures.density_per_layer([(n, w["numel"], w["nnz"]) for n, w in result["layers"].items()], folder / "density.png")
    if (folder / "connections.npz").exists():
        with np.load(folder / "connections.npz", allow_pickle=False) as file:
            title = f"{result['method']} on {result['data']}, {result['density']:.3g} of the connections"
            pictures.connection_maps(file["steps"].tolist(), file["counts"], folder / "connections.png", title)
