"""The phases of Sup-tickets: pretraining, then cycles of the learning rate, each of which ends in a ticket.

Source: Yin et al. 2022, Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training,
section 3 and its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from regrow.core.method import Method, Need, Rule
from regrow.parts import drops
from regrow.parts.drops import lowest
from regrow.parts.growth import gradient, highest
from regrow.parts.schedules import constant
from regrow.parts.scores import magnitude
from regrow.parts.updates import chain, drop_and_grow, every


@dataclass(frozen=True)
class Plan:
    """How many optimizer steps the phases take.

    Args:
        pretrain: steps before the first cycle, at the end of which the first ticket is collected; 0 for a model that is
            trained already.
        cycle: steps of a cycle.
        cycles: how many there are; each ends in a ticket.

    Raises:
        ValueError: for a negative `pretrain`, or no cycle.

    Examples:
        >>> [step for step in range(1, 31) if Plan(20, 4, 2).collects_at(step)]
        [20, 24, 28]
    """

    pretrain: int
    cycle: int
    cycles: int

    def __post_init__(self) -> None:
        if self.pretrain < 0 or self.cycle < 1 or self.cycles < 1:
            raise ValueError(
                "sup-tickets: a plan has at least 0 steps of pretraining and at least 1 cycle of at least 1 step, got "
                f"{self.pretrain} steps and {self.cycles} cycles of {self.cycle}"
            )

    @property
    def total(self) -> int:
        """Steps of all phases: pretrain + cycles cycle."""
        return self.pretrain + self.cycles * self.cycle

    def collects_at(self, step: int) -> bool:
        """Whether a ticket is collected after optimizer step `step`: cycles + 1 of them in all."""
        return self.pretrain <= step <= self.total and (step - self.pretrain) % self.cycle == 0


def plan(steps: int, share: float, cycle: int) -> Plan:
    """As many cycles of `cycle` steps as fit into the last `share` of `steps`, and pretraining before.

    Args:
        steps: optimizer steps of the whole run.
        share: of them that the cycles may take, in (0, 1].
        cycle: steps of one cycle.

    Raises:
        ValueError: when not one cycle fits.

    Source: Yin et al. 2022, the code: C = floor(share steps), less C mod cycle; the published code trains no cycle
    where none fits, without a word.

    Examples:
        >>> plan(250, 0.1, 8)
        Plan(pretrain=226, cycle=8, cycles=3)
    """
    if not 0 < share <= 1:
        raise ValueError(f"sup-tickets: the share of steps that cycles take must lie in (0, 1], got {share:g}")
    if cycle < 1:
        raise ValueError(f"sup-tickets: a cycle must have at least 1 step, got {cycle}")
    room = drops.share(share, steps)
    if cycle > room:
        raise ValueError(
            f"sup-tickets: a cycle of {cycle:,} steps does not fit into a share of {share:g} of {steps:,} steps, which "
            f"is {room:,}: shorten the cycle or raise the share"
        )
    cycles = room // cycle
    return Plan(steps - cycles * cycle, cycle, cycles)


def triangular(low: float, high: float, cycle: int, begin: int = 0) -> Callable[[int], float]:
    """The learning rate of a step: `low` at both ends of each cycle, `high` in its middle, linear in between.

    low + (high - low) (1 - |1 - 2u|), with u = ((step - begin) mod cycle) / cycle: tickets are collected at `low`.

    Args:
        low: learning rate at steps begin, begin + cycle, ...
        high: learning rate halfway between them.
        cycle: steps of a cycle.
        begin: the step before the first cycle's first, `Plan.pretrain`.

    Raises:
        ValueError: when `low` is above `high`; from the schedule, for a step before `begin`.

    Source: Yin et al. 2022, section 3.2. Their text names the two the other way round than the code uses them, whose
    defaults collect tickets at the highest rate; here the order is checked.

    Examples:
        >>> rate = triangular(0.001, 0.005, cycle=8, begin=100)
        >>> [round(rate(step), 4) for step in range(100, 109)]
        [0.001, 0.002, 0.003, 0.004, 0.005, 0.004, 0.003, 0.002, 0.001]
    """
    if not 0 <= low <= high:
        raise ValueError(
            f"sup-tickets: the lower learning rate, where tickets are collected, must lie between 0 and the higher "
            f"one, got {low:g} and {high:g}: exchange them"
        )
    if cycle < 1 or begin < 0:
        raise ValueError(f"sup-tickets: a cycle has at least 1 step and begins at 0 or later, got {cycle} and {begin}")

    def rate(step: int) -> float:
        if step < begin:
            raise ValueError(
                f"sup-tickets: cycles begin after step {begin:,}, and step {step:,} is before: it has none"
            )
        progress = (step - begin) % cycle / cycle
        return low + (high - low) * (1 - abs(1 - 2 * progress))

    return rate


def without_updates_from(method: Method, step: int) -> Method:
    """`method` with the topologies that it has before optimizer step `step`, from there on.

    Args:
        method: any.
        step: the first without an update, `Plan.pretrain` + 1 for the whole of the cycles.

    Raises:
        ValueError: when a ramp of the method ends there or later, so that its density would never be reached.

    Examples:
        >>> from regrow import methods
        >>> method = without_updates_from(methods.rigl(0.1, until=1000), 250)
        >>> [step for step in range(1000) if method.due(step)]
        [100, 200]
    """
    late = [rule.last for rule in method.update if rule.last is not None and rule.last >= step]
    if late:
        raise ValueError(
            f"sup-tickets: {method.name} reaches its density at step {max(late):,}, and its updates stop before step "
            f"{step:,}: end its ramp earlier, or pretrain for longer"
        )
    return method._replace(update=tuple(_until(rule, step) for rule in method.update))


def _until(rule: Rule, step: int) -> Rule:
    return rule._replace(due=lambda now: now < step and rule.due(now))


def reexploring(method: Method, plan: Plan, fraction: float) -> Method:
    """`method` with one large drop and growth by gradient in the first step of each cycle.

    It drops the smallest magnitudes and grows where the gradient of that very step is largest; every weight keeps its
    count. Apply `without_updates_from` before, not after.

    Args:
        method: any.
        plan: says when cycles begin.
        fraction: share of active entries dropped, in (0, 1]; the published commands take 0.5.

    Raises:
        ValueError: for a fraction that drops nothing, or cycles of one step, which train nothing that was grown.

    Source: Yin et al. 2022, the code. There the gradient is what was left of the last batch before the cycle.

    Examples:
        >>> from regrow import methods
        >>> method = reexploring(methods.static(0.1), Plan(20, 4, 2), 0.5)
        >>> [step for step in range(40) if method.due(step)]
        [21, 25]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sup-tickets: the fraction that is dropped must lie in (0, 1], got {fraction:g}")
    if plan.cycle < 2:
        raise ValueError(
            f"sup-tickets: a cycle of {plan.cycle} step has none to train what is grown in its first: take 2 or more"
        )
    update = drop_and_grow(constant(fraction), lowest(magnitude), highest(gradient))
    gated = every(plan.cycle, update, begin=plan.pretrain + 1, until=plan.total + 1)
    return method._replace(update=chain(method.update, gated), needs=method.needs | Need.GRADIENT)
