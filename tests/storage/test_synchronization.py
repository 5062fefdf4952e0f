"""On ordinary steps masked storage never has the host wait for a device; the meta device stands for one.

Its tensors have no values: an operator that brings values or sizes to the host, such as `item`, `nonzero`, `equal` and
`unique`, raises. Copies between devices and writes at a bool index work there, so `Device` refuses those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regrow import Sparsifier, sparsify
from regrow.core.method import Method
from regrow.engine.step import plan
from regrow.storage.pending import swap_memory
from support.table import METHODS, OPTIMIZERS, given

STEPS = 24
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
WRITES = (torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Device(TorchDispatchMode):
    """Raises RuntimeError, naming the operator, where one would have the host wait for the device of meta tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operator, kwargs = func._overloadpacket, kwargs or {}
        if operator in COPIES:
            devices = {tensor.device for tensor in args if isinstance(tensor, Tensor)}
            if len(devices | {kwargs.get("device") or args[0].device}) > 1:
                raise RuntimeError(f"{func} copies from one device to another")
        if operator in WRITES and args[2].dim() and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise RuntimeError(f"{func} counts what its bool index chooses")
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(f"{func} needs values on the host") from error


def ordinary(method: Method) -> int | None:
    """The first step after step 1 that is ordinary, and so is the next; None where there is none."""
    kinds = [plan(method, number > 1 or not method.start.needs_batches, number) for number in range(1, STEPS)]
    return next(
        (number for number, pair in enumerate(pairwise(kinds[1:]), 2) if pair == ("ordinary", "ordinary")), None
    )


LATENT = {name for name, row in METHODS.items() if row().latent is not None}
"""Methods of another storage, most of which choose a topology at every step or draw noise on the host."""
FIRST = {name: ordinary(row()) for name, row in METHODS.items() if name not in LATENT}
ORDINARY = sorted(name for name, first in FIRST.items() if first is not None)
PAIRS = [
    *product(ORDINARY, ["sgd", "adamw"]),
    *product(["static", "snip", "gmp", "rigl", "set", "snfs"], ["sgd-foreach", "adamw-foreach"]),
]


def network() -> nn.Module:
    torch.manual_seed(1)
    features = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def move(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> None:
    """Everything to the meta device but the optimizer's counts of steps, which torch keeps on the host."""
    optimizer.zero_grad()
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        swap_memory(parameter, nn.Parameter(parameter.detach().to("meta")))
    for module in model.modules():
        module._buffers.update({name: b.to("meta") for name, b in module._buffers.items() if b is not None})
    for state in optimizer.state.values():
        state.update({key: s.to("meta") for key, s in state.items() if torch.is_tensor(s) and key != "step"})
    for weight in sparsifier.weights:
        weight.state = {key: s.to("meta") for key, s in weight.state.items()}


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(6, 2, 6, 6, generator=draw), torch.randint(4, (6,), generator=draw)


def moved(name: str, optimizer: str) -> tuple[Sparsifier, Callable[[], None]]:
    """A run on the meta device before two ordinary steps, of which the first brings masks there; and its steps."""
    model, method, first = network(), METHODS[name](), FIRST[name]
    made, (x, y) = OPTIMIZERS[optimizer](model.parameters()), batch()
    sparsifier = sparsify(model, made, method, **given(method, [(x, y), (x, y)]))
    assert first is not None
    for _ in range(1, first):
        train(model, made, x, y)
    move(model, made, sparsifier)
    x, y = x.to("meta"), y.to("meta")
    return sparsifier, lambda: train(model, made, x, y)


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_an_ordinary_step_never_waits_for_the_device(name: str, optimizer: str) -> None:
    sparsifier, step = moved(name, optimizer)
    step()
    with Device():
        assert not sparsifier.due
        step()


def test_every_method_but_deep_rewiring_has_ordinary_steps() -> None:
    assert FIRST.keys() - set(ORDINARY) == {"deep_r", "deep_r-nm", "deep_r-parts"}


def test_an_update_waits_for_the_device_and_the_test_sees_it() -> None:
    sparsifier, step = moved("rigl", "sgd")
    while not sparsifier.due:
        step()
    with Device(), pytest.raises(RuntimeError, match="_local_scalar_dense"):
        step()


@pytest.mark.parametrize(
    ("operator", "wait"),
    [
        ("_to_copy", lambda t: t.cpu()),
        ("_to_copy", lambda t: torch.ones(2).to("meta")),
        ("copy_", lambda t: t.copy_(torch.ones(3))),
        ("_local_scalar_dense", lambda t: bool(t.any())),
        ("index", lambda t: t[t > 0]),
        ("nonzero", lambda t: t.nonzero()),
        ("masked_select", lambda t: t.masked_select(t > 0)),
        ("index_put_", lambda t: t.index_put_((t > 0,), t[:2])),
        ("equal", lambda t: torch.equal(t, t)),
    ],
)
def test_the_device_of_these_tests_names_what_waits(operator: str, wait: Callable[[Tensor], object]) -> None:
    with Device(), pytest.raises(RuntimeError, match=rf"aten.{operator}\."):
        wait(torch.ones(3, device="meta"))
