"""Plain training loops on a small network in masked storage, and what must hold beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from regrow import Sparsifier, methods, sparsify
from regrow.core.method import Method
from regrow.parts.schedules import constant

MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)


def data(step: int, n: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(n, 6, generator=draw, dtype=torch.float64).to(dtype), torch.randint(0, 4, (n,), generator=draw)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    loss_of(model, data(step, dtype=dtype)).backward()
    optimizer.step()


def rigl(density: float = 0.5, interval: int = 3, until: int = 30, **options: Any) -> Method:
    return methods.rigl(density, interval=interval, until=until, anneal=constant, **options)


def set_(density: float = 0.5, interval: int = 3, until: int = 30, **options: Any) -> Method:
    return methods.set_(density, interval=interval, until=until, **options)


def start(method: Method, optimizer: str = "sgd", **options: Any) -> tuple[nn.Sequential, Any, Sparsifier]:
    model = mlp()
    opt = MAKE[optimizer](model.parameters())
    return model, opt, sparsify(model, opt, method, **options)


def masks(sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: t.mask for name, t in sparsifier.topologies.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def require_zero_outside(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> None:
    for name, mask in masks(sparsifier).items():
        weight = model.get_parameter(name)
        state = {k: s for k, s in optimizer.state.get(weight, {}).items() if getattr(s, "shape", None) == weight.shape}
        for kind, tensor in {"value": weight.detach(), **state}.items():
            assert not tensor[~mask].any(), f"{kind} of {name} outside its topology"


def dense_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss_of(model, batch), list(named.values())), strict=True))


class Noisy(torch.optim.SGD):
    """Leaves no zero where it is."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    own = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    steps = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    return [*own, *steps, len(torch_optimizer._global_optimizer_pre_hooks)]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)
