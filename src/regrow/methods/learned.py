"""Learned sparsity: weights that are computed from values which are trained in their place.

Latent values live at every position and may come back; what the model holds between steps is the weight computed from
them, zero outside its topology. `Sparsifier.harden` ends a method and lets the weights train on as they are.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from regrow.core.checks import require_choice, require_density
from regrow.core.method import Allocation, Latent, Method, Need, Parts, Rule, Trained
from regrow.core.weight import SparseWeight, Weights
from regrow.parts import reparametrizations
from regrow.parts.allocation import uniform
from regrow.parts.schedules import constant, cubic
from regrow.parts.structures import n_of_m

STRAIGHT = Need.DENSE_VALUES | Need.EVERY_GRADIENT
"""What straight-through methods need: values and gradients of inactive entries too."""

Threshold = Literal["sigmoid", "exp"]
"""How a trained number becomes a threshold."""


def dnw(density: float | None, *, allocate: Allocation = uniform) -> Method:
    """DNW: train all weights straight through, use the largest magnitudes.

    After every optimizer step the active entries are the largest magnitudes among all positions. The gradient with
    respect to the sparse weight reaches every latent value, active or not, so that what was dropped may come back.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        allocate: how the active entries are shared among the weights: `uniform` as in RigL's comparison, or `globally`.

    Source: Wortsman et al. 2019, Discovering Neural Wirings, Algorithm 1 and section 3.3; per-layer counts as in the
    code of Evci et al. 2020. The optimizer's weight decay acts on latent values at every position.

    Examples:
        >>> dnw(0.1).due(1)
        True
    """
    require_density("dnw", density)
    return _by_magnitude("dnw", density, allocate, None)


def ste(density: float | None, *, ramp: int | None = None, allocate: Allocation = uniform) -> Method:
    """STE: magnitude pruning with straight-through gradients, at once or along a ramp from dense.

    As `dnw`; with a `ramp` of T steps the density after step t is density + (1 - density) (1 - t / T)^3.

    Args:
        density: final active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        ramp: optimizer steps over which the density falls from 1; without it the density holds from the start.
        allocate: how the active entries are shared among the weights: `uniform`, `erk` or `globally`.

    Source: Bengio et al. 2013, section 4 (straight-through); Lin et al. 2020, Dynamic Model Pruning with Feedback,
    Algorithm 1, whose masks change every 16 steps where here they change at each; the ramp of Zhu and Gupta 2017.

    Examples:
        >>> ste(0.1, ramp=1000).name
        'ste'
    """
    require_density("ste", density)
    if ramp is not None and ramp < 1:
        raise ValueError(f"ste: the ramp must take 1 step or more, got {ramp}: leave it out to begin sparse")
    if ramp is not None and density is None:
        raise ValueError(f"ste: a ramp of {ramp} steps needs a density to end at, and density is None")
    return _by_magnitude("ste", density, allocate, ramp)


def _by_magnitude(name: str, density: float | None, allocate: Allocation, ramp: int | None) -> Method:
    schedule = None if density is None else constant(density) if ramp is None else cubic(1.0, density, ramp)
    update = reparametrizations.select(schedule, reparametrizations.magnitude, allocate, last=density)
    latent = Latent(reparametrizations.straight_through)
    return Method(name, reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent)


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
    update = reparametrizations.select(
        schedule, reparametrizations.magnitude, allocate, last=density, structure=structure
    )
    latent = Latent(reparametrizations.straight_through, penalty=penalty)
    return Method("sr_ste", reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent)


def top_kast(
    density: float,
    *,
    backward_density: float,
    penalty: float = 1e-4,
    interval: int = 1,
    allocate: Allocation = uniform,
) -> Method:
    """Top-KAST: use the largest magnitudes, train these and the next largest.

    A is the share `density` of largest magnitudes, which the model uses; B, the share `backward_density`, contains it
    and is what gradients reach. The penalty on a latent value v is |v| in A, |v| / density in the rest of B, else 0.

    Args:
        density: active share of the sparsified entries (the paper's D), in (0, 1].
        backward_density: share of them that gradients reach (the paper's D + M), from `density` to 1.
        penalty: weight of the exploration penalty, at least 0.
        interval: optimizer steps between two choices of A and B.
        allocate: how A and B are shared among the weights: `uniform` as in the paper, `erk` or `globally`.

    Source: Jayakumar et al. 2020, Top-KAST: Top-K Always Sparse Training, sections 2.1 to 2.3. |v| of the penalty is
    read as the absolute value. Where rounding would give B fewer entries of a weight than A, it gets those of A. Values
    outside B have no gradient, but momentum and weight decay are the optimizer's: give it no weight decay to leave them
    at rest, as in the paper.

    Examples:
        >>> [step for step in range(1, 10) if top_kast(0.1, backward_density=0.2, interval=4).due(step)]
        [4, 8]
    """
    require_density("top_kast", density)
    if not density <= backward_density <= 1:
        raise ValueError(
            f"top_kast: backward_density must lie from the density, {density:g}, to 1, got {backward_density:g}: "
            "gradients must reach what the model uses"
        )
    if not penalty >= 0:
        raise ValueError(f"top_kast: penalty must be at least 0, got {penalty:g}")
    if interval < 1:
        raise ValueError(f"top_kast: choices must be at least 1 step apart, got interval {interval}")

    def apply(weights: Weights, step: int) -> None:
        scores = [reparametrizations.magnitude(w) for w in weights]
        used, trained = (
            reparametrizations.ranked_counts(weights, scores, share, allocate) for share in (density, backward_density)
        )
        sets = [
            (reparametrizations.highest(w, s, a), reparametrizations.highest(w, s, max(a, b)))
            for w, s, a, b in zip(weights, scores, used, trained, strict=True)
        ]
        for weight, (forward, backward) in zip(weights, sets, strict=True):
            weight.state["backward"] = backward.mask.to(weight.state["latent"].device)
            weight.rewire(forward)

    def exploration(parts: Parts, step: int) -> Tensor:
        magnitudes = parts.latent.abs()
        rest = parts.state["backward"] & ~parts.active
        return penalty * ((magnitudes * parts.active).sum() + (magnitudes * rest).sum() / density)

    update = (Rule(apply, lambda step: step % interval == 0, require=lambda weights: weights.require(density)),)
    latent = Latent(
        reparametrizations.straight_through, penalty=exploration, reach=lambda parts: parts.state["backward"]
    )
    return Method("top_kast", reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent)


def str_(
    *,
    initial: float = -10.0,
    threshold: Threshold = "sigmoid",
    threshold_lr: float | None = None,
    threshold_weight_decay: float | None = None,
) -> Method:
    """STR: a soft threshold for each weight, learned with the values.

    w = sign(v) max(|v| - g(s), 0) with one trained number s per weight. What is active, |v| > g(s), is an outcome: a
    larger weight decay, of s too, makes it less.

    Args:
        initial: first s; how far below 0 it lies sets when sparsity begins.
        threshold: g: "sigmoid" as for convolutional networks, "exp" as for recurrent ones.
        threshold_lr: learning rate of s; without it that of the weight, as in the paper.
        threshold_weight_decay: of s; without it that of the weight, as in the paper.

    Source: Kusupati et al. 2020, Soft Threshold Weight Reparameterization for Learnable Sparsity, equations 3 to 5.
    The paper tunes weight decay and `initial` for each budget: -3200 for 100 epochs of ResNet-50, where decay alone
    draws s towards 0, and -10 for recurrent networks, the default here.

    Examples:
        >>> str_().latent.trained[0].name
        'threshold'
    """
    require_choice("str", "threshold", threshold, ("sigmoid", "exp"))
    _require_rate("str", "threshold_lr", threshold_lr)
    _require_rate("str", "threshold_weight_decay", threshold_weight_decay)
    g = torch.sigmoid if threshold == "sigmoid" else torch.exp

    def above(weight: SparseWeight) -> Tensor:
        return reparametrizations.magnitude(weight) > g(weight.state["threshold"])

    update = reparametrizations.where(above)
    latent = Latent(
        lambda parts: reparametrizations.soft_threshold(parts, g),
        trained=(Trained("threshold", reparametrizations.single(initial), threshold_lr, threshold_weight_decay),),
        reach=lambda parts: parts.active,
    )
    return Method("str", reparametrizations.now(update), update, timing="after", needs=Need.DENSE_VALUES, latent=latent)


def movement(
    density: float,
    *,
    until: int,
    begin: int = 0,
    allocate: Allocation = uniform,
) -> Method:
    """Movement pruning: keep the weights that training moves away from zero.

    Each entry has a trained score s beside its value v; the entries of highest s are active. The gradient of s is
    v dL/dw at every position, that of v is dL/dw where active. After step t the density is
    density + (1 - density) (1 - (t - begin) / (until - begin))^3.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step at which the ramp ends.
        begin: optimizer step at which the ramp begins.
        allocate: how the active entries are shared among the weights: `uniform` as in the paper, or `globally`.

    Source: Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning, section 4 (hard, top-v). Scores begin
    at 0 and have no weight decay, as in the code. They have the weights' learning rate: a factor of it changes no
    ranking. Made for fine-tuning: begin with a trained model.

    Examples:
        >>> movement(0.1, until=1000).latent.trained[0].name
        'scores'
    """
    require_density("movement", density)
    update = reparametrizations.select(
        cubic(1.0, density, until, begin), reparametrizations.state("scores"), allocate, last=density
    )
    latent = Latent(
        reparametrizations.gated, trained=(Trained("scores", reparametrizations.filled(0.0), weight_decay=0.0),)
    )
    return Method("movement", reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent)


def soft_movement(
    *,
    until: int,
    begin: int = 0,
    threshold: float = 0.1,
    penalty: float = 1e-5,
    score_lr: float | None = 1e-2,
) -> Method:
    """Soft movement pruning: movement pruning with one threshold for all scores, and a penalty instead of a density.

    An entry is active when sigmoid(s) > threshold. The loss gets penalty(t) times the sum of sigmoid(s) over all
    entries, with penalty(t) = penalty (1 - (1 - (t - begin) / (until - begin))^3).

    Args:
        until: optimizer step at which the penalty has its full weight.
        begin: optimizer step at which it begins to act.
        threshold: of sigmoid(s) (the paper's tau), in (0, 1).
        penalty: weight of the penalty (the paper's lambda_mvp), at least 0; what is active is an outcome of it.
        score_lr: learning rate of the scores; without it that of the weights.

    Source: Sanh et al. 2020, Movement Pruning, section 4 (soft). The sum is over entries, as printed; the code takes a
    mean over each matrix. A weight may lose all of its entries, where the code keeps at least 0.5 %.

    Examples:
        >>> soft_movement(until=1000).name
        'soft_movement'
    """
    if not 0 < threshold < 1:
        raise ValueError(
            f"soft_movement: threshold must lie in (0, 1), got {threshold:g}: sigmoid(s) is compared with it"
        )
    _require_penalty("soft_movement", penalty)
    _require_rate("soft_movement", "score_lr", score_lr)
    ramp = cubic(0.0, penalty, until, begin)
    scores = reparametrizations.state("scores")
    update = reparametrizations.where(lambda weight: scores(weight).sigmoid() > threshold)
    latent = Latent(
        reparametrizations.gated,
        trained=(Trained("scores", reparametrizations.filled(0.0), score_lr, 0.0),),
        penalty=lambda parts, step: ramp(step) * parts.state["scores"].sigmoid().sum(),
    )
    return Method(
        "soft_movement", reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent
    )


def l0(
    *,
    penalty: float = 0.1 / 60_000,
    droprate: float = 0.5,
    temperature: float = 2 / 3,
    gate_lr: float | None = None,
) -> Method:
    """L0 regularization: every entry has a random gate that may be exactly zero, and open gates cost.

    A training forward sees v z, with z a stretched and clipped concrete draw around the trained log_alpha; the loss
    gets penalty times the expected number of open gates. Evaluation, `state_dict`, counts and exports see v times
    the gate without noise: what is active is where that is above zero, an outcome of the penalty.

    Args:
        penalty: cost of an open gate (the paper's lambda, already divided by the number of examples), at least 0.
        droprate: how probably a gate is closed at first, in (0, 1).
        temperature: of the concrete distribution (the paper's beta), above 0.
        gate_lr: learning rate of log_alpha; without it that of the weights.

    Source: Louizos et al. 2018, Learning Sparse Neural Networks through L0 Regularization, sections 2 and 4. There a
    gate stands for an input or a filter, here for one entry, as in Gale et al. 2019, The State of Sparsity. All
    forwards of an optimizer step share one draw. First log_alpha are equal, where the code adds a little noise, and
    they are not clipped. log_alpha has no weight decay; that of the weights is the optimizer's.

    Examples:
        >>> [t.name for t in l0().latent.trained]
        ['log_alpha']
    """
    _require_penalty("l0", penalty)
    if not 0 < droprate < 1:
        raise ValueError(f"l0: droprate must lie in (0, 1), got {droprate:g}")
    if not temperature > 0:
        raise ValueError(f"l0: temperature must be above 0, got {temperature:g}")
    _require_rate("l0", "gate_lr", gate_lr)
    log_alpha = reparametrizations.state("log_alpha")
    update = reparametrizations.where(
        lambda weight: reparametrizations.hard_concrete(log_alpha(weight), None, temperature) > 0
    )
    latent = Latent(
        lambda parts: (
            parts.latent * reparametrizations.hard_concrete(parts.state["log_alpha"], parts.noise, temperature)
        ),
        trained=(
            Trained("log_alpha", reparametrizations.filled(math.log(1 - droprate) - math.log(droprate)), gate_lr, 0.0),
        ),
        penalty=lambda parts, step: (
            penalty * reparametrizations.open_probability(parts.state["log_alpha"], temperature).sum()
        ),
        noise=lambda stream, count: stream.uniform(count),
    )
    return Method("l0", reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent)


def variational_dropout(
    *,
    penalty: float = 1 / 60_000,
    threshold: float = 3.0,
    log_variance: float = -10.0,
    variance_lr: float | None = None,
) -> Method:
    """Sparse variational dropout: every entry has a trained variance, and entries that are mostly noise go.

    A training forward sees v + sigma e with e of variance 1; the loss gets penalty times the divergence from the
    log-uniform prior, summed over entries. Evaluation, `state_dict`, counts and exports see v where
    log alpha = log sigma^2 - log v^2 is below `threshold`, else 0: what is active is an outcome of the penalty.

    Args:
        penalty: weight of the divergence, at least 0: one over the number of examples where the loss is a mean.
        threshold: log alpha from which an entry is inactive.
        log_variance: first log sigma^2.
        variance_lr: learning rate of log sigma^2; without it that of the weights.

    Source: Molchanov et al. 2017, Variational Dropout Sparsifies Deep Neural Networks, sections 4.1 to 4.4 (additive
    noise, equation 14). One draw of the weights serves all forwards of an optimizer step, where the paper draws
    activations for each example, at less variance. Noise is `Stream.normal`. log sigma^2 has no weight decay.

    Examples:
        >>> variational_dropout().latent.trained[0].name
        'log_variance'
    """
    _require_penalty("variational_dropout", penalty)
    _require_rate("variational_dropout", "variance_lr", variance_lr)

    def noise_ratio(weight: SparseWeight) -> Tensor:
        values = weight.state["latent"].view(-1)
        return reparametrizations.log_dropout(values.to(weight.state["log_variance"].dtype), state(weight))

    def divergence(parts: Parts, step: int) -> Tensor:
        log_alpha = reparametrizations.log_dropout(parts.latent, parts.state["log_variance"])
        return penalty * reparametrizations.dropout_divergence(log_alpha).sum()

    state = reparametrizations.state("log_variance")
    update = reparametrizations.where(lambda weight: noise_ratio(weight) < threshold)
    latent = Latent(
        reparametrizations.noisy,
        trained=(Trained("log_variance", reparametrizations.filled(log_variance), variance_lr, 0.0),),
        penalty=divergence,
        noise=lambda stream, count: stream.normal(count),
    )
    return Method(
        "variational_dropout", reparametrizations.now(update), update, timing="after", needs=STRAIGHT, latent=latent
    )


def _require_penalty(method: str, penalty: float) -> None:
    if not 0 <= penalty < math.inf:
        raise ValueError(f"{method}: penalty must be at least 0, got {penalty:g}")


def _require_rate(method: str, option: str, value: float | None) -> None:
    if value is not None and not value >= 0:
        raise ValueError(f"{method}: {option} must be at least 0, got {value:g}: leave it out for that of the weights")
