"""A run's folder: begun, resumed or already complete, and what is written into it at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regrow.app import data as datasets
from regrow.app import loop, pictures
from regrow.app.config import Config, resolved, write_text
from regrow.files import save


def run(config: Config, folder: Path, report: loop.Report) -> dict[str, Any]:
    """Train `config` in `folder`, go on where an interrupted run stopped, or return a complete run's result.

    Raises:
        ValueError: for settings that cannot run, or a folder that holds another run.
    """
    data = datasets.load(config.data, None if config.data_dir is None else Path(config.data_dir))
    settings = resolved(config, len(data.train_y))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    job = loop.build(settings, data)
    if (done := complete(settings, folder)) is not None:
        return done
    scaled = datasets.normalize(data)
    data = data._replace(train_x=scaled.train_x, test_x=scaled.test_x)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", settings.to_json())
    loop.resume(job, folder)
    for _ in loop.train(job, data, folder, report):
        pass
    return _conclude(job, data, folder)


def complete(settings: Config, folder: Path) -> dict[str, Any] | None:
    """The result of a complete run with these settings, None where there is none yet.

    Raises:
        ValueError: when the folder holds a run with other settings, or something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds something other than a run: choose another --out")
    other = Config.from_json(path.read_text())
    differing = [name for name, value in vars(settings).items() if getattr(other, name) != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds a run with another {name} ({getattr(other, name)!r}, now {getattr(settings, name)!r}): "
            "choose another --out, or delete it"
        )
    result = folder / "result.json"
    return dict(json.loads(result.read_text())) if result.is_file() else None


def _conclude(job: loop.Run, data: datasets.Data, folder: Path) -> dict[str, Any]:
    result = loop.result(job, data)
    save(job.sparsifier, folder / "model.safetensors")
    draw(folder, result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
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
