"""Two processes of one group: a test module runs itself as a script, once for each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regrow


def two_ranks(script: str, folder: Path) -> list[Any]:
    """What each of two ranks found: `script` ends in `as_rank`, and is given its rank and the folder."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    path = os.pathsep.join([str(Path(regrow.__file__).parents[1]), str(Path(__file__).parents[1])])
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], **options) for rank in range(2)]
    try:
        for run in runs:
            _, errors = run.communicate(timeout=300)
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def as_rank(find: Callable[[int], Any]) -> None:
    """Join the other rank, save what `find(rank)` gives, and end the process."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.save(find(rank), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Gloo's threads may outlive the group on a busy machine, and abort an ordinary exit; all results are on disk.
    os._exit(0)
