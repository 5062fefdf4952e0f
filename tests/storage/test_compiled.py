"""A compiled model in compressed storage: no graph break, and the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from support.pairs import Run, model_of
from support.table import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.compiler.list_backends(), reason="torch.compile is not supported here"),
]


CASES = [("linear", "rigl", "before"), ("linear", "rigl", "after"), ("conv", "rigl-after", "before")]


@pytest.mark.parametrize(("net", "method", "when"), [*CASES, ("linear", "snfs", "after"), ("gru", "set", "before")])
def test_a_compiled_model_makes_the_same_run(net: str, method: str, when: str):
    """Compiled before or after it becomes sparse; through ordinary steps and two updates."""
    torch.compiler.reset()
    plain = Run("compressed", METHODS[method](), net)
    model = model_of(net)
    options: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    other = Run(
        "compressed", METHODS[method](), net, model=torch.compile(model, **options) if when == "before" else model
    )
    if when == "after":
        other.model = torch.compile(model, **options)
    for step in range(1, 11):
        assert other.step(step) == pytest.approx(plain.step(step), rel=1e-12)
        assert other.sparsifier.topologies == plain.sparsifier.topologies
    assert other.sparsifier.updates == 2
    expected = dict(plain.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-12, atol=1e-12)
    assert isinstance(model, nn.Module)
