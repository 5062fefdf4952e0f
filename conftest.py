"""Runs the Python code blocks of README and docs as tests, each document in a folder of its own."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# Doctests import every module, and these need an extra.
collect_ignore = [] if find_spec("triton") else [f"src/regrow/kernels/{name}.py" for name in ("gpu", "gpu_programs")]


def enter(namespace: dict[str, Any]) -> None:
    """Work in an empty folder, since examples write files."""
    torch.set_num_threads(1)
    namespace["_folder"], namespace["_before"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_folder"].name)


def leave(namespace: dict[str, Any]) -> None:
    """Go back."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md", "docs/**/*.md"], setup=enter, teardown=leave
).pytest()
