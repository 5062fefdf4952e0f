"""Every method with small arguments, every optimizer: the tables whose products are the battery tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from regrow import methods
from regrow.core.method import Growth, Method
from regrow.parts import (
    adaptive_threshold,
    at_random,
    blocks,
    by_flops,
    by_gradient,
    by_gradient_where_lost,
    by_momentum,
    by_momentum_per_neuron,
    constant,
    diagonals,
    diagonals_at_random,
    er,
    erk,
    globally,
    gradient,
    groups,
    half_by_gradient,
    highest_diagonals,
    highest_per_neuron,
    largest,
    layer_adaptive,
    linear,
    lowest,
    lowest_diagonals,
    lowest_globally,
    lowest_per_sign,
    magnitude,
    mean_magnitude,
    mean_momentum,
    mixed,
    n_of_m,
    nonzeros,
    random,
    random_topology,
    signed,
    survivors,
    taylor,
    unexplored_first,
    uniform,
)

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
    unit: int = 1
    """How many entries are active or inactive together; their number is the nearest to that of the density."""
    severs: bool = False
    """Whole channels may be cut off, so that nothing reads what their norms add."""

    def __call__(self) -> Method:
        return self.make()

    def active(self, density: float, numel: int) -> int:
        """How many entries of `numel` are active: as whole units come nearest, the fewer of two."""
        return self.unit * math.ceil(math.floor(density * numel + 0.5) / self.unit - 0.5)


def fixed(make: Callable[[], Method]) -> Row:
    """A random topology that never changes."""
    return Row(make, conserving=True, own=True, draws=True)


def dynamic(make: Callable[[], Method], *, own: bool = True, unit: int = 1, severs: bool = False) -> Row:
    """Entries move at updates, their number stays; also that of each weight unless `own` is False."""
    return Row(make, conserving=True, own=own, moving=True, draws=True, unit=unit, severs=severs)


def diagonal(recipe: Callable[..., Method], grow: Growth) -> Row:
    """Whole diagonals move at updates, and each weight keeps their number."""

    def make() -> Method:
        drop = lowest_diagonals(magnitude)
        # Of the few diagonals of small weights, a smaller fraction is none.
        method = recipe(DENSITY, until=UNTIL, interval=INTERVAL, fraction=0.6, drop=drop, grow=grow)
        return method._replace(start=random_topology(DENSITY, uniform, diagonals))

    return Row(make, own=True, moving=True, draws=True, density=None, severs=True)


def learned(make: Callable[[], Method], **shows: Any) -> Row:
    """Weights computed from latent values, which train at every position."""
    return Row(make, **{"compresses": False, "dense_state": True, "falling": False, **shows})


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
    "gmp-lamp": Row(lambda: methods.gmp(DENSITY, until=UNTIL, interval=INTERVAL, allocate=layer_adaptive)),
    "gmp-last": Row(lambda: methods.gmp(DENSITY, until=UNTIL, interval=5, last_density=0.4, allocate=erk)),
    "gmp-flops": Row(
        lambda: methods.gmp(DENSITY, until=UNTIL, interval=INTERVAL, allocate=by_flops({"*": 1}, globally))
    ),
    "dst": dynamic(lambda: methods.dst(DENSITY, until=UNTIL, interval=INTERVAL)),
    "dst-momentum": dynamic(
        lambda: methods.dst(DENSITY, until=UNTIL, interval=INTERVAL, grow=by_momentum, redistribute=survivors),
        own=False,
    ),
    "rigl": dynamic(lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL)),
    "rigl-after": dynamic(lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, timing="after")),
    "rigl-reset": dynamic(
        lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, anneal=constant, regrow_dropped="reset")
    ),
    "rigl-forbid": dynamic(
        lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, anneal=linear, regrow_dropped="forbid")
    ),
    "rigl-parts": dynamic(
        lambda: methods.rigl(
            DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest(taylor), grow=by_momentum_per_neuron, decay=0.5
        )
    ),
    "set-parts": dynamic(
        lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, grow=by_momentum, redistribute=mean_magnitude),
        own=False,
    ),
    "itop_set-parts": dynamic(
        lambda: methods.itop_set(
            DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest_per_sign, grow=by_momentum, redistribute=survivors
        ),
        own=False,
    ),
    "itop_set": dynamic(lambda: methods.itop_set(DENSITY, until=UNTIL, interval=INTERVAL)),
    "itop_set-unexplored": dynamic(
        lambda: methods.itop_set(
            DENSITY, until=UNTIL, interval=INTERVAL, anneal=constant, grow=unexplored_first, timing="instead"
        )
    ),
    "itop_rigl": dynamic(lambda: methods.itop_rigl(DENSITY, until=UNTIL, interval=INTERVAL)),
    "itop_rigl-mixed": dynamic(
        lambda: methods.itop_rigl(DENSITY, until=UNTIL, interval=INTERVAL, grow=mixed(by_gradient, at_random, 0.5))
    ),
    "itop_rigl-per-neuron": dynamic(
        lambda: methods.itop_rigl(DENSITY, until=UNTIL, interval=INTERVAL, grow=highest_per_neuron(gradient))
    ),
    "granet": Row(lambda: methods.granet(DENSITY, until=UNTIL, interval=INTERVAL), moving=True, draws=True),
    "granet-parts": Row(
        lambda: methods.granet(
            DENSITY, until=UNTIL, interval=INTERVAL, grow=half_by_gradient, redistribute=mean_momentum, decay=0.8
        ),
        moving=True,
        draws=True,
    ),
    "granet-lamp": Row(
        lambda: methods.granet(DENSITY, until=UNTIL, interval=INTERVAL, allocate=layer_adaptive),
        moving=True,
        draws=True,
    ),
    "granet-dense": Row(lambda: methods.granet(DENSITY, until=UNTIL, interval=5, init_density=1.0, timing="instead")),
    "granet-reset": Row(
        lambda: methods.granet(DENSITY, until=UNTIL, prune_until=UNTIL, interval=5, regrow_dropped="reset"), draws=True
    ),
    "granet_uniform": Row(
        lambda: methods.granet_uniform(DENSITY, until=UNTIL, interval=INTERVAL, last_density=0.4),
        moving=True,
        draws=True,
    ),
    "gmp_uniform": Row(lambda: methods.gmp_uniform(DENSITY, until=UNTIL, interval=INTERVAL, last_density=0.4)),
    "ac_dc": Row(lambda: methods.ac_dc(DENSITY, until=UNTIL, phase=INTERVAL), falling=False),
    "ac_dc-instead": Row(
        lambda: methods.ac_dc(DENSITY, until=UNTIL, begin=3, phase=5, allocate=erk, timing="instead"), falling=False
    ),
    "srigl": dynamic(lambda: methods.srigl(DENSITY, until=UNTIL, interval=INTERVAL)),
    "srigl-after": dynamic(
        lambda: methods.srigl(DENSITY, until=UNTIL, interval=INTERVAL, fraction=0.6, ablation=0.8, timing="after")
    ),
    "set-threshold": dynamic(
        lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, drop=adaptive_threshold(0.05))
    ),
    "set-taylor": dynamic(lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest(taylor))),
    "set-global": dynamic(
        lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest_globally(magnitude))
    ),
    "set-random": dynamic(lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, drop=lowest(random))),
    "snfs-survivors": dynamic(
        lambda: methods.snfs(DENSITY, until=UNTIL, interval=INTERVAL, redistribute=survivors), own=False
    ),
    "dsr": dynamic(lambda: methods.dsr(DENSITY, until=UNTIL, interval=INTERVAL, threshold=0.05), own=False),
    "dsr-parts": dynamic(
        lambda: methods.dsr(
            DENSITY, until=UNTIL, interval=INTERVAL, threshold=0.05, grow=unexplored_first, redistribute=None
        )
    ),
    "dsr-forbid": dynamic(
        lambda: methods.dsr(
            DENSITY, until=UNTIL, interval=INTERVAL, threshold=0.05, regrow_dropped="forbid", timing="instead"
        ),
        own=False,
    ),
    "mest": dynamic(lambda: methods.mest(DENSITY, until=UNTIL, interval=INTERVAL)),
    "mest-parts": dynamic(
        lambda: methods.mest(DENSITY, until=UNTIL, interval=INTERVAL, grow=by_gradient, redistribute=nonzeros),
        own=False,
    ),
    "mest-instead": dynamic(
        lambda: methods.mest(DENSITY, until=UNTIL, interval=INTERVAL, regrow_dropped="keep", timing="instead")
    ),
    "mest-soft": Row(
        lambda: methods.mest(DENSITY, until=UNTIL, interval=5, fraction=0.5, soft=True), falling=False, draws=True
    ),
    "mest-soft-instead": Row(
        lambda: methods.mest(DENSITY, until=UNTIL, interval=5, soft=True, regrow_dropped="forbid", timing="instead"),
        falling=False,
        draws=True,
    ),
    "deep_r": Row(
        lambda: methods.deep_r(DENSITY, until=UNTIL, l1=1e-3, noise=1e-2), conserving=True, own=True, draws=True
    ),
    "deep_r-parts": Row(
        lambda: methods.deep_r(
            DENSITY, until=UNTIL, l1=1e-3, noise=1e-2, grow=by_gradient, redistribute=mean_magnitude
        ),
        conserving=True,
        draws=True,
    ),
    "deep_r-nm": Row(
        lambda: methods.deep_r(0.5, until=UNTIL, l1=1e-3, noise=1e-2, grow=by_gradient_where_lost(2))._replace(
            start=signed(random_topology(0.5, uniform, n_of_m(1, 2)))
        ),
        own=True,
        draws=True,
        density=0.5,
    ),
    "static-diagonals": Row(
        lambda: methods.static(DENSITY)._replace(start=random_topology(DENSITY, uniform, diagonals)),
        own=True,
        draws=True,
        density=None,
        severs=True,
    ),
    "rigl-diagonals": diagonal(methods.rigl, highest_diagonals(gradient)),
    "set-diagonals": diagonal(methods.set_, diagonals_at_random),
    "rigl_nm": Row(
        lambda: methods.rigl_nm(n=1, m=2, until=UNTIL, interval=INTERVAL),
        own=True,
        moving=True,
        draws=True,
        density=0.5,
    ),
    "gse-parts": dynamic(
        lambda: methods.gse(
            DENSITY,
            until=UNTIL,
            interval=INTERVAL,
            drop=lowest_globally(magnitude),
            redistribute=mean_momentum,
            decay=0.5,
        ),
        own=False,
    ),
    "gse": dynamic(lambda: methods.gse(DENSITY, until=UNTIL, interval=INTERVAL)),
    "gse-few": dynamic(
        lambda: methods.gse(DENSITY, until=UNTIL, interval=INTERVAL, gamma=0.5, regrow_dropped="keep", timing="instead")
    ),
    "snip_it": Row(lambda: methods.snip_it(DENSITY, rounds=3), conserving=True, own=True),
    "snip_it-uniform": Row(lambda: methods.snip_it(DENSITY, allocate=uniform), conserving=True, own=True),
    "snap_it": Row(lambda: methods.snap_it(0.7, rounds=2), own=True, density=None),
    "snap_it-last": Row(lambda: methods.snap_it(0.4, prune_last=True), own=True, density=None),
    "grasp": Row(lambda: methods.grasp(DENSITY), conserving=True, own=True),
    "grasp-erk": Row(lambda: methods.grasp(DENSITY, allocate=erk), conserving=True, own=True),
    "synflow": Row(lambda: methods.synflow(DENSITY, rounds=10), conserving=True, own=True, severs=True),
    "force": Row(lambda: methods.force(DENSITY, rounds=4), conserving=True, own=True),
    "force-uniform": Row(lambda: methods.force(DENSITY, allocate=uniform), conserving=True, own=True, severs=True),
    "rigl-units": dynamic(lambda: methods.rigl(DENSITY, until=UNTIL, interval=INTERVAL, structure=groups(2)), unit=2),
    "set-units": dynamic(
        lambda: methods.set_(DENSITY, until=UNTIL, interval=INTERVAL, structure=blocks(2, 2, largest)),
        unit=4,
        severs=True,
    ),
    "mest-units": Row(
        lambda: methods.mest(DENSITY, until=UNTIL, interval=5, fraction=0.5, soft=True, structure=groups(2)),
        falling=False,
        draws=True,
        unit=2,
    ),
    "granet-units": Row(
        lambda: methods.granet(DENSITY, until=UNTIL, interval=INTERVAL, structure=groups(2)),
        moving=True,
        draws=True,
        unit=2,
    ),
    "haste-units": dynamic(
        lambda: methods.haste(DENSITY, until=UNTIL, interval=INTERVAL, fraction=0.3, structure=groups(2)), unit=2
    ),
    "gmp-units": Row(
        lambda: methods.gmp(DENSITY, until=UNTIL, interval=INTERVAL, allocate=globally, structure=blocks(2, 2)), unit=4
    ),
    "snip-units": Row(lambda: methods.snip(DENSITY, structure=groups(2)), unit=2, severs=True),
    "dnw": learned(lambda: methods.dnw(DENSITY), conserving=True, own=True),
    "dnw-global": learned(lambda: methods.dnw(DENSITY, allocate=globally), conserving=True),
    "ste": learned(lambda: methods.ste(DENSITY, ramp=UNTIL, allocate=erk), falling=True),
    "sr_ste": learned(lambda: methods.sr_ste(DENSITY, decay=0.01), conserving=True, own=True),
    "sr_ste-pattern": learned(lambda: methods.sr_ste(n=1, m=2), density=0.5, own=True),
    "s_ste": learned(lambda: methods.s_ste(n=1, m=2), density=0.5, own=True),
    "top_kast": learned(lambda: methods.top_kast(DENSITY, backward_density=0.4), conserving=True, own=True),
    "top_kast-rarely": learned(
        lambda: methods.top_kast(DENSITY, backward_density=1.0, interval=INTERVAL, penalty=0.01, allocate=globally),
        conserving=True,
    ),
    "dynadiag": learned(lambda: methods.dynadiag(DENSITY, until=UNTIL), falling=True, density=None),
    "pa_dst": learned(lambda: methods.pa_dst(DENSITY, until=UNTIL, interval=5), falling=True, density=None),
    "pa_dst-nm": learned(
        lambda: methods.pa_dst(0.5, until=UNTIL, interval=5, structure=n_of_m(1, 2)), falling=True, density=0.5
    ),
    "str": learned(lambda: methods.str_(initial=-3.0), density=None),
    "str-exp": learned(
        lambda: methods.str_(initial=-3.0, threshold="exp", threshold_lr=0.02, threshold_weight_decay=0.2), density=None
    ),
    "movement": learned(lambda: methods.movement(DENSITY, until=UNTIL), falling=True),
    "movement-global": learned(
        lambda: methods.movement(DENSITY, until=UNTIL, begin=3, allocate=globally), falling=True
    ),
    "soft_movement": learned(
        lambda: methods.soft_movement(until=9, threshold=0.499, penalty=0.01, score_lr=0.05), density=None
    ),
    "l0": learned(lambda: methods.l0(penalty=0.005, droprate=0.916), density=None, draws=True),
    "variational_dropout": learned(
        lambda: methods.variational_dropout(penalty=0.05, log_variance=-3.0, variance_lr=0.3), density=None, draws=True
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
