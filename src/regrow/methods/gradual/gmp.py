"""Gradual magnitude pruning."""

from __future__ import annotations

from regrow.core.checks import require_timing
from regrow.methods.gradual.ramp import last_of, pruning, require_target
from regrow.methods.recipe import preset
from regrow.parts import Allocation, Method, Need, Timing, Units, cubic, dense, every, uniform


def _gmp(
    name: str,
    density: float,
    *,
    until: int,
    begin: int = 0,
    interval: int = 1000,
    allocate: Allocation = uniform,
    last_density: float | None = None,
    last_layer: str | None = None,
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    require_target(name, density)
    require_timing(name, timing)
    prunes = pruning(cubic(1.0, density, until, begin), allocate, last_of(name, last_density, last_layer))
    update = every(interval, prunes, begin=begin or None, until=until)
    return Method(name, dense(), update, timing=timing, needs=Need.DENSE_VALUES, units=structure)


@preset(_gmp)
def gmp() -> None:
    """Gradual magnitude pruning: from dense to `density` along a cubic ramp.

    d(t) = density + (1 - density) (1 - (t - begin) / (until - begin))^3, applied every `interval` steps and once
    more at `until`, where the final density is reached exactly. With `allocate=layer_adaptive` it is LAMP.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step at which the ramp ends.
        begin: optimizer step at which the ramp begins.

    Source: Zhu and Gupta 2017, To prune, or not to prune, section 3, with the same density in every weight, after the
    optimizer step as TensorFlow's model pruning does. Pruned entries do not come back; in TensorFlow's code they may,
    since it thresholds the raw weights.

    Examples:
        >>> method = gmp(0.1, until=2500)
        >>> [step for step in range(3000) if method.due(step)]
        [1000, 2000, 2500]
    """


@preset(_gmp, allocate=uniform, last_density=0.2)
def gmp_uniform() -> None:
    """Gradual magnitude pruning with the same density in every layer, except that the last keeps at least a fifth.

    It is `gmp` with a default for `last_density`.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step at which the ramp ends.
        begin: optimizer step at which the ramp begins.

    Source: Gale et al. 2019, The State of Sparsity in Deep Neural Networks, section 5.2; ramp of Zhu and Gupta 2017,
    To prune, or not to prune, section 3. Gale et al. also leave the first convolution dense: `skip=` does that.

    Examples:
        >>> method = gmp_uniform(0.1, until=2500)
        >>> [step for step in range(3000) if method.due(step)]
        [1000, 2000, 2500]
    """
