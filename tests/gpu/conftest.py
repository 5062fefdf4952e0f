"""Where the programs for GPUs run: on a card, else in Triton's interpreter, which `make test-gpu` turns on."""

from __future__ import annotations

import os

import pytest
import torch

# On a card cuBLAS repeats its numbers only with this, and the tests ask torch for nothing else.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def _card_or_interpreter() -> None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1 in the environment: run make test-gpu")
