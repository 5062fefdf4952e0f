"""SR-STE."""

from __future__ import annotations

from torch import Tensor

from regrow.core.checks import require_density
from regrow.methods.learned.latent import STRAIGHT
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Latent,
    Method,
    Parts,
    activate_highest,
    constant,
    latent_magnitude,
    n_of_m,
    start_by,
    straight_through,
    uniform,
)


@recipe
def sr_ste(
    density: float | None = None,
    *,
    n: int | None = None,
    m: int | None = None,
    decay: float = 2e-4,
    allocate: Allocation = uniform,
) -> Method:
    """SR-STE: straight-through training of N:M patterns that also decays what is pruned.

    The gradient of a latent value v is that of the loss, plus decay v where v is inactive now: topologies settle.

    Args:
        density: active share of the sparsified entries, in (0, 1], without a pattern; None takes n / m.
        n: entries that stay active of each `m` consecutive inputs.
        m: inputs of a group.
        decay: of inactive latent values (the paper's lambda_W), at least 0.
        allocate: how the active entries are shared among the weights; a pattern takes `uniform`.

    Source: Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, equation 8.

    Examples:
        >>> sr_ste(n=2, m=4).name
        'sr_ste'
    """
    if (n is None) != (m is None):
        raise ValueError(f"sr_ste: n and m belong together, got n = {n} and m = {m}")
    if not decay >= 0:
        raise ValueError(f"sr_ste: decay must be at least 0, got {decay:g}")
    structure = None
    if n is not None and m is not None:
        if density is not None:
            raise ValueError(f"sr_ste: the pattern {n}:{m} is a density already, and density is {density:g}: give one")
        structure, density = n_of_m(n, m), n / m
    require_density("sr_ste", density)

    def penalty(parts: Parts, step: int) -> Tensor:
        return decay / 2 * (parts.latent * ~parts.active).square().sum()

    schedule = None if density is None else constant(density)
    update = activate_highest(schedule, latent_magnitude, allocate, last=density, structure=structure)
    latent = Latent(straight_through, penalty=penalty)
    return Method("sr_ste", start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)
