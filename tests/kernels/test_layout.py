"""How an operator finds its kernels: by device, by what is installed, and by what the environment asks for."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from regrow.kernels import layout, native, reference

GPU = "regrow.kernels.gpu"
ON_CUDA: Any = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A build of torch for CUDA and a module of kernels for it, neither asked before."""
    module = ModuleType(GPU)
    monkeypatch.setattr(layout, "on_gpu", layout.on_gpu.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, GPU, module)
    monkeypatch.delenv("REGROW_ISA", raising=False)
    return module


def test_tensors_on_a_gpu_meet_the_programs_for_it(cuda: ModuleType):
    assert layout.kernels(ON_CUDA) is cuda


def test_tensors_on_the_cpu_meet_compiled_kernels_or_the_reference():
    compiled = native.instruction_set() is not None
    assert layout.kernels(torch.zeros(1)) is (native if compiled else reference)
    assert layout.kernels(torch.zeros(1, dtype=torch.float16)) is reference


@pytest.mark.parametrize("lacks", ["triton", GPU])
def test_without_triton_a_gpu_has_the_reference_and_the_log_says_so(
    lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delitem(sys.modules, GPU)
    monkeypatch.setitem(sys.modules, lacks, None)
    with caplog.at_level(logging.WARNING, "regrow"):
        assert layout.kernels(ON_CUDA) is reference
    (record,) = caplog.records
    assert "since Triton cannot be imported" in record.getMessage() and "pip install triton" in record.getMessage()


def test_the_environment_may_ask_for_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REGROW_ISA", "reference")
    assert layout.kernels(ON_CUDA) is reference


def test_gpus_of_others_have_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert layout.kernels(ON_CUDA) is reference
