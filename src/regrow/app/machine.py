"""What a result depends on besides its settings: versions and processor."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch

import regrow


def versions() -> dict[str, str]:
    """Versions of what computes, the processor's name, and the number of torch's threads."""
    return {
        "regrow": regrow.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The processor's name with family and model, which alone tell some virtual machines' apart."""
    path = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in path.read_text().splitlines()] if path.exists() else []
    about = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    if "model name" not in about:
        return platform.processor() or platform.machine()
    return f"{about['model name']} (family {about.get('cpu family', '?')}, model {about.get('model', '?')})"
