"""Every method with small arguments, every optimizer: the tables whose products are the battery tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from regrow import methods
from regrow.allocation import er, erk, globally, uniform
from regrow.drops import lowest_per_sign
from regrow.method import Method
from regrow.redistribution import mean_magnitude, nonzeros
from regrow.schedules import constant, linear

DENSITY = 0.2
UNTIL = 24
INTERVAL = 4


@dataclass(frozen=True)
class Row:
    """A method with small arguments, and what its runs must show."""

    make: Callable[[], Method]
    conserving: bool = False
    """The total number of active entries never changes, from the start on."""
    own: bool = False
    """Each weight keeps its own number of active entries."""
    falling: bool = True
    """The total never rises from one step to the next."""
    moving: bool = False
    """Updates at multiples of INTERVAL below UNTIL move the topology, and nothing else does."""
    draws: bool = False
    """Another seed gives another topology."""
    density: float | None = DENSITY
    """What is active at the end; None where the method does not say."""
    compresses: bool = True
    """Compressed storage takes it (with allow_dense)."""
    dense_state: bool = False
    """Optimizer state lies at inactive positions too, as the method trains values there."""

    def __call__(self) -> Method:
        return self.make()


def fixed(make: Callable[[], Method]) -> Row:
    """A random topology that never changes."""
    return Row(make, conserving=True, own=True, draws=True)


def dynamic(make: Callable[[], Method], *, own: bool = True) -> Row:
    """Entries move at updates, their number stays; also that of each weight unless `own` is False."""
    return Row(make, conserving=True, own=own, moving=True, draws=True)


METHODS: dict[str, Row] = {
    "dense": Row(methods.dense, density=1.0),
    "static": fixed(lambda: methods.static(DENSITY)),
    "static-er": fixed(lambda: methods.static(DENSITY, allocate=er)),
    "set": dynamic(lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL)),
    "set-per-sign": dynamic(lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest_per_sign)),
    "set-instead": dynamic(lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, timing="instead")),
    "snfs": dynamic(lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL), own=False),
    "snfs-magnitude": dynamic(
        lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=mean_magnitude), own=False
    ),
    "snfs-nonzeros": dynamic(
        lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=nonzeros), own=False
    ),
    "snfs-none": dynamic(lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=None)),
    "snip": Row(lambda: methods.snip(DENSITY)),
    "snip-uniform": Row(lambda: methods.snip(DENSITY, allocate=uniform)),
    "gmp": Row(lambda: methods.gmp(DENSITY, until=UNTIL, interval=INTERVAL)),
    "gmp-erk": Row(lambda: methods.gmp(DENSITY, until=UNTIL, interval=5, allocate=erk)),
    "gmp-global": Row(lambda: methods.gmp(DENSITY, until=UNTIL, interval=7, allocate=globally, timing="instead")),
    "rigl": dynamic(lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL)),
    "rigl-after": dynamic(lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, timing="after")),
    "rigl-reset": dynamic(
        lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, anneal=constant, regrow_dropped="reset")
    ),
    "rigl-forbid": dynamic(
        lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, anneal=linear, regrow_dropped="forbid")
    ),
}

STORAGES = ("masked", "compressed")

IN_STORAGES = [(name, s) for name, row in METHODS.items() for s in STORAGES if s == "masked" or row.compresses]
"""Every method with each storage that takes it."""

Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def given(method: Method, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What `sparsify` is to be given beside the method: batches and loss for a start that reads several gradients."""
    loss: Loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return {"batches": batches, "loss": loss} if method.start.needs_batches else {}


Params = Iterable[nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Params], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-3),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=2e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1, fused=True),
}
