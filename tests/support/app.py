"""The application as its tests drive it: small runs, the command line, data sets on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from regrow.app import cli
from regrow.app.config import Config


def config(**changes: object) -> Config:
    """RigL on digits, small and short."""
    plain = {
        "method": "rigl",
        "options": {"density": "0.2", "interval": "5"},
        "hidden": (32, 16),
        "steps": 60,
        "threads": 1,
    }
    return Config(**{**plain, **changes})  # type: ignore[arg-type]


def command(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Status, output and errors of `regrow` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["regrow", *arguments])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def png(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def table(
    blobs: Sequence[bytes | None], labels: Sequence[int | None], image: str = "img", label: str = "label"
) -> pa.Table:
    """Images and labels as data sets of the hub store them."""
    rows = [{"bytes": blob, "path": None} for blob in blobs]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {"id": pa.array(range(len(rows))), image: pa.array(rows, kind), label: pa.array(labels, pa.int64())}
    )


def write_parquet(path: Path, images: np.ndarray, labels: np.ndarray, **names: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table([png(image) for image in images], labels.tolist(), **names), path)
    return path
