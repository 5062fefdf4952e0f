"""What tests of the compiled kernels share: every instruction set, memory that shows stray reads, exact tolerances."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from support import edges

ISAS = ("plain", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# What a float32 or float64 sum may lose, and the last rounding to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 8e-3}


def instance(isa: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another instance of the extension, for an instruction set; skips the test where the processor lacks it."""
    monkeypatch.setenv("REGROW_ISA", isa)
    installed = importlib.util.find_spec("regrow.kernels._native")
    assert installed is not None
    spec = importlib.util.spec_from_file_location("_native", installed.origin)
    assert spec is not None and spec.loader is not None
    try:
        module: Any = importlib.util.module_from_spec(spec)
    except ImportError as error:
        pytest.skip(str(error))
    spec.loader.exec_module(module)
    assert module.isa() == isa
    return module


def within(tensor: Tensor, around: float) -> Tensor:
    """A copy of `tensor` in the middle of a larger one full of `around`, which a stray read would bring in."""
    flat = torch.full((tensor.numel() + 128,), around, dtype=tensor.dtype)
    flat[64 : 64 + tensor.numel()] = tensor.reshape(-1)
    return flat[64 : 64 + tensor.numel()].view(tensor.shape)


def is_alone(tensor: Tensor) -> bool:
    """Whether the NaN around a tensor made by `within` are still there."""
    base = tensor._base
    assert base is not None
    return bool(base[:64].isnan().all() and base[-64:].isnan().all())


def check(result: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Errors are relative to the sum of absolute values of what was added up; nothing around the result was written."""
    assert not result.isnan().any()
    error = (result.double() - expected).abs()
    assert bool((error <= TOLERANCES[result.dtype] * (scale + 1e-30)).all()), float((error / (scale + 1e-30)).max())
    assert is_alone(result)


def require_untouched_edges(isa: str, script: str) -> None:
    """That `script`, whose operands all lie `at_edge`, prints "done" with an instruction set."""
    path = [os.path.abspath(p) for p in sys.path if p]
    environment = os.environ | {"REGROW_ISA": isa, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    if "lacks REGROW_ISA" in done.stderr or "names no instruction set" in done.stderr:
        pytest.skip(f"not on this processor: {isa}")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def at_edge(tensor: Tensor, around: float) -> Tensor:
    """As `within`, with memory that must not be touched instead of numbers around it."""
    return edges.at_edge(tensor)
