"""Every method with small arguments, every optimizer: the tables whose products are the battery tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
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

METHODS: dict[str, Callable[[], Method]] = {
    "dense": methods.dense,
    "static": lambda: methods.static(DENSITY),
    "static-er": lambda: methods.static(DENSITY, allocate=er),
    "set": lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL),
    "set-per-sign": lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest_per_sign),
    "set-instead": lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, timing="instead"),
    "snfs": lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL),
    "snfs-magnitude": lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=mean_magnitude),
    "snfs-nonzeros": lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=nonzeros),
    "snfs-none": lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=None),
    "snip": lambda: methods.snip(DENSITY),
    "snip-uniform": lambda: methods.snip(DENSITY, allocate=uniform),
    "gmp": lambda: methods.gmp(DENSITY, until=UNTIL, interval=INTERVAL),
    "gmp-erk": lambda: methods.gmp(DENSITY, until=UNTIL, interval=5, allocate=erk),
    "gmp-global": lambda: methods.gmp(DENSITY, until=UNTIL, interval=7, allocate=globally, timing="instead"),
    "rigl": lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL),
    "rigl-after": lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, timing="after"),
    "rigl-reset": lambda: methods.rigl(
        DENSITY, until=UNTIL, interval=INTERVAL, anneal=constant, regrow_dropped="reset"
    ),
    "rigl-forbid": lambda: methods.rigl(
        DENSITY, until=UNTIL, interval=INTERVAL, anneal=linear, regrow_dropped="forbid"
    ),
}

STORAGES = ("masked", "compressed")

CONSERVING = [name for name in METHODS if name.partition("-")[0] in ("static", "set", "snfs", "rigl")]
"""Methods whose total number of active entries never changes."""


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
