"""What others do to the model: values written, dtype, memory format, tied weights, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from support.loops import (
    MAKE,
    data,
    loss_of,
    masks,
    mlp,
    require_zero_outside,
    rigl,
    start,
    train,
)


def dense_values(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn_like(p) for n, p in model.state_dict().items()}


def by_vector(model: nn.Module, values: dict[str, Tensor]) -> None:
    nn.utils.vector_to_parameters(torch.cat([v.view(-1) for v in values.values()]), model.parameters())


def by_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])


def by_new_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = values[name].clone()


def by_no_grad(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


WRITERS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "load_state_dict": lambda model, values: model.load_state_dict(values),
    "no_grad": by_no_grad,
    "data": by_data,
    "new data": by_new_data,
    "vector_to_parameters": by_vector,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_written_from_outside_are_projected_at_the_next_step(writer: str):
    """Property 9."""
    model, opt, sparsifier = start(methods.static(0.5))
    train(model, opt, 1)
    values = dense_values(model)
    WRITERS[writer](model, values)
    train(model, opt, 2)
    require_zero_outside(model, opt, sparsifier)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [0, 4])
def test_the_model_may_change_its_dtype(dtype: torch.dtype, after: int):
    """Property 14."""
    model, opt, sparsifier = start(rigl())
    for step in range(1, after + 1):
        train(model, opt, step)
    model.to(dtype)
    opt.state.clear()
    for step in range(after + 1, 12):
        train(model, opt, step)
        require_zero_outside(model, opt, sparsifier)
    assert sparsifier.updates == 3
    assert sum(int(m.sum()) for m in masks(sparsifier).values()) == 50


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(when: str):
    """Property 14: the memory format changes no topology."""
    runs = []
    for last in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()).double()
        if last and when == "before":
            model.to(memory_format=torch.channels_last)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier = sparsify(model, opt, rigl(0.3, interval=2))
        if last and when == "after":
            model.to(memory_format=torch.channels_last)
        for step in range(1, 8):
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()
            model.zero_grad()
            model(x.to(memory_format=torch.channels_last) if last else x).square().mean().backward()
            opt.step()
            require_zero_outside(model, opt, sparsifier)
        runs.append(sparsifier.topologies)
        assert sparsifier.updates == 3
    assert runs[0] == runs[1]


def test_tied_weights_are_masked_once_and_stay_tied():
    """Property 14."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)).double()
    model[2].weight = model[0].weight
    opt = MAKE["adam"](model.parameters())
    sparsifier = sparsify(model, opt, rigl(0.4))
    assert list(sparsifier.topologies) == ["0.weight", "3.weight"]
    assert sparsifier.numel == 60
    for step in range(1, 11):
        train(model, opt, step)
        require_zero_outside(model, opt, sparsifier)
    assert model[2].weight is model[0].weight
    assert sum(int((w.weight != 0).sum()) for w in (model[0], model[3])) == 24


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def test_a_head_tied_to_an_embedding_is_left_out():
    """Property 13."""
    model = Language()
    opt = MAKE["adam"](model.parameters())
    sparsifier = sparsify(model, opt, rigl(0.5, interval=1))
    for _ in range(3):
        opt.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        opt.step()
    assert list(sparsifier.topologies) == ["body.weight"]
    assert (model.head.weight != 0).all() and model.head.weight is model.embed.weight
    assert "shared with embed.weight" in repr(sparsifier)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_model_gets_the_same_topologies(backend: str):
    """Property 14."""
    if not torch.compiler.list_backends():
        pytest.skip("torch.compile is not supported here")
    runs = []
    for compiled in (False, True):
        model = mlp()
        opt = MAKE["sgd"](model.parameters())
        net = torch.compile(model, backend=backend) if compiled else model
        sparsifier = sparsify(net, opt, rigl(interval=2))
        for step in range(1, 6):
            opt.zero_grad()
            try:
                loss = loss_of(net, data(step))
            except Exception as error:
                if backend == "inductor" and "compiler" in str(error).lower():
                    pytest.skip("no C++ compiler")
                raise
            loss.backward()
            opt.step()
            require_zero_outside(model, opt, sparsifier)
        runs.append(sparsifier.topologies)
    assert runs[0] == runs[1]
