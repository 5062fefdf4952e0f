"""What the programs compile to for cards that are not here: tensor cores, copies in flight, nothing spilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is an extra: make test-gpu installs it")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARCHITECTURES = [80, 90]
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may take."""


def run(*command: str, **environment: str) -> str:
    """What a benchmark prints, by itself: Triton decides when it is loaded whether it interprets or compiles."""
    path = os.pathsep.join([str(BENCHMARKS.parent / "src"), *filter(None, sys.path)])
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**clean, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(str(BENCHMARKS / "gpu_compile.py"), "--json"))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_of_a_step_fits_the_card(architecture: int, reports: list[dict[str, Any]]):
    found = [r for r in reports if r["architecture"] == architecture]
    assert {r["unit"] for r in found} >= {"8 x 1", "64 x 1", "64 x 64"}
    for report in found:
        assert report["spills"] == 0, report
        assert report["registers"] <= (168 if report["dtype"] != "float32" else 255), report
        assert report["shared"] <= SHARED[architecture], report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_run_on_tensor_cores(architecture: int, reports: list[dict[str, Any]]):
    word = {80: " mma m16n8k", 90: " wgmma m64n"}[architecture]
    found = [r for r in reports if r["architecture"] == architecture and r["dtype"] != "float32"]
    for report in found:
        kinds = report["products"].split(", ")
        assert all(word in kind for kind in kinds) or report["program"].endswith("summed"), report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_come_in_16_bytes_at_a_time_while_others_are_multiplied(
    architecture: int, reports: list[dict[str, Any]]
):
    found = [r for r in reports if r["architecture"] == architecture and "16" in r["dtype"]]
    assert len(found) > 30
    for report in found:
        assert report["scalars"] == 0, report
        # What adds to an input gradient is one short product where 64 outputs or fewer are a tile.
        assert report["copies"] >= 8 or ":" in report["program"], report


def test_the_benchmark_for_a_card_runs_in_the_interpreter():
    told = run(str(BENCHMARKS / "gpu.py"), "--tiny", "--rounds", "2", TRITON_INTERPRET="1")
    assert "On Triton's interpreter." in told
    assert told.count("| dense | 1.00 (1.00 to 1.00) |") == 2
    for name in ("16 x 1 | torch.float16", "32 x 32, feature-major", "groups of 8", "blocks of 16 x 16"):
        assert f"\n| {name} |" in told
    assert "torch 2:4: not timed, Could not run" in told
