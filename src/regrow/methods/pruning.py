"""Methods that only remove: once at initialization, or gradually during training."""

from __future__ import annotations

from regrow.core.checks import require_density, require_timing
from regrow.core.method import Allocation, Method, Need, Timing
from regrow.parts import starts
from regrow.parts.allocation import globally, uniform
from regrow.parts.schedules import cubic
from regrow.parts.scores import magnitude, saliency
from regrow.parts.updates import every, prune


def snip(density: float | None, *, allocate: Allocation = globally) -> Method:
    """SNIP: keep the entries whose removal would change the loss most, before training.

    The score |w g| is read from the gradient that the first optimizer step would have used, and takes that step's
    place; given `batches` and `loss`, `regrow.sparsify` reads it from their mean gradient at once.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight, as RigL's code does.

    Source: Lee et al. 2019, SNIP, Algorithm 1. The gradient is that of the loss alone; RigL's code adds L2.

    Examples:
        >>> snip(0.1).start.needs_gradient
        True
    """
    require_density("snip", density)
    return Method("snip", starts.by_score(density, saliency, allocate, needs_gradient=True))


def gmp(
    density: float,
    *,
    until: int,
    begin: int = 0,
    interval: int = 1000,
    allocate: Allocation = uniform,
    timing: Timing = "after",
) -> Method:
    """Gradual magnitude pruning: from dense to `density` along a cubic ramp.

    d(t) = density + (1 - density) (1 - (t - begin) / (until - begin))^3, applied every `interval` steps and once
    more at `until`, where the final density is reached exactly.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step at which the ramp ends.
        begin: optimizer step at which the ramp begins.
        interval: optimizer steps between two prunings.
        allocate: `uniform` as in the paper, `erk`, or `globally` for one threshold over all weights.
        timing: prune "after" the optimizer step (as TensorFlow's model pruning does) or "instead" of it.

    Source: Zhu and Gupta 2017, To prune, or not to prune, section 3. Pruned entries do not come back; in
    TensorFlow's code they may, since it thresholds the raw weights.

    Examples:
        >>> method = gmp(0.1, until=2500)
        >>> [step for step in range(3000) if method.due(step)]
        [1000, 2000, 2500]
    """
    require_density("gmp", density)
    require_timing("gmp", timing)
    ramp = prune(cubic(1.0, density, until, begin), magnitude, allocate)
    update = every(interval, ramp, begin=begin or None, until=until)
    return Method("gmp", starts.dense(), update, timing=timing, needs=Need.DENSE_VALUES)
