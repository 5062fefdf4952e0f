"""S-STE."""

from __future__ import annotations

import torch

from regrow.methods.learned.latent import STRAIGHT
from regrow.methods.recipe import recipe
from regrow.parts import (
    LATENT,
    SCALE,
    Latent,
    Method,
    Probe,
    Start,
    Weights,
    activate_highest,
    constant,
    latent_magnitude,
    n_of_m,
    rewire,
    shrunk,
    start_by,
    uniform,
)


@recipe
def s_ste(*, n: int = 2, m: int = 4) -> Method:
    """S-STE: straight-through training of n:m patterns by a soft threshold, so that weights change continuously.

    In each m consecutive inputs the n largest magnitudes are active and shrink by the largest of the others, t:
    w = beta sign(v) max(|v| - t, 0). The factor beta = <v, w> / <w, w>, of w without it, is that of the first values,
    one number for each weight, and stays. The gradient with respect to w reaches every latent value v as it is.

    Args:
        n: entries that stay active of each `m` consecutive inputs, in [1, m].
        m: inputs of a group.

    Source: Hu et al. 2024, S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training, by its published
    code, for 2:4. Gradients of outputs are exact, where the paper makes them 2:4 by an unbiased estimator, and there is
    no FP8: both are of the product, not of the weight. A weight of zeros has beta 1.

    Examples:
        >>> s_ste(n=2, m=4).name
        's_ste'
    """
    update = activate_highest(constant(n / m), latent_magnitude, uniform, last=n / m, structure=n_of_m(n, m))
    first = start_by(update)

    def make(weights: Weights, probe: Probe) -> None:
        for weight in weights:
            SCALE.set(weight, torch.ones((), dtype=torch.float64, device=LATENT.of(weight).device))
        first.make(weights, probe)
        for weight in weights:
            sparse = weight.values().double()
            dense = LATENT.flat(weight)[weight.topology.indices.to(sparse.device)].double()
            norm = float(sparse.square().sum())
            SCALE.of(weight).fill_(float(dense @ sparse) / norm if norm else 1.0)
        rewire(weights, [w.topology for w in weights])

    start = Start(make, require=first.require)
    return Method("s_ste", start, update, timing="after", needs=STRAIGHT, latent=Latent(lambda p: shrunk(p, m)))
