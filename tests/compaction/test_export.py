"""A compacted model goes where any dense model goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regrow


def _small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 16),
        nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[::2] = 0
        model[5].self_attn.in_proj_weight[36:40] = 0
        model[5].linear1.weight[::2] = 0
    model.eval()
    return regrow.compact(model, torch.randn(2, 3, 8, 8)), torch.randn(3, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, of its own copying
def test_torch_export_takes_it():
    small, x = _small()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(exported.module()(more), small(more))


def test_compile_takes_it_in_one_graph():
    small, x = _small()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), small(x))


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_onnx_takes_it(tmp_path: Path):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime runs what was exported")
    small, x = _small()
    torch.onnx.export(
        small, (x,), tmp_path / "small.onnx", dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"))
    more = torch.randn(5, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    np.testing.assert_allclose(found, small(more).detach().numpy(), atol=1e-5)
