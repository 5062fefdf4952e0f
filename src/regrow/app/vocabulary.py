"""How methods are spoken on the command line: names for values, and options read from signatures.

The library takes functions, the command line takes words; this table is the only place where they meet.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from regrow import methods
from regrow.app.procedures import Around, around
from regrow.core.checks import require_density
from regrow.core.method import Allocation, Drop, Growth, Method, Score, Start, Statistic, Structure, Units
from regrow.methods.recipe import own_words, recipe
from regrow.parts import Anneal, allocation, drops, growth, redistribution, schedules, scores, starts, structures

T = TypeVar("T")

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": allocation.uniform,
    "er": allocation.er,
    "erk": allocation.erk,
    "globally": allocation.globally,
    "layer_adaptive": allocation.layer_adaptive,
}
ANNEALS: dict[str, Anneal] = {
    "constant": schedules.constant,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "inverse_power": schedules.inverse_power,
    "cosine_to_0.005": schedules.cosine_to_half_percent,
}
DROPS: dict[str, Drop] = {
    "magnitude": drops.smallest,
    "per_sign": drops.lowest_per_sign,
    "threshold": drops.adaptive_threshold(),
    "taylor": drops.lowest(scores.taylor),
    "global_magnitude": drops.lowest_globally(scores.magnitude),
    "random": drops.lowest(scores.random),
}
GROWTHS: dict[str, Growth] = {
    "gradient": growth.by_gradient,
    "random": growth.at_random,
    "momentum": growth.by_momentum,
    "momentum_neuron": growth.by_momentum_per_neuron,
    "unexplored_first": growth.unexplored_first,
    "mixed": growth.half_by_gradient,
    "sampled": growth.sampled_gradient(1.0),
}
SCORES: dict[str, Score] = {
    "magnitude": scores.magnitude,
    "saliency": scores.saliency,
    "taylor": scores.taylor,
    "random": scores.random,
}
SWITCH = {"yes": True, "no": False}
STARTS: dict[str, Callable[[float], Start]] = {
    "prune_uniform": starts.prune_uniform,
    "prune_global": starts.prune_global,
    "prune_structured": starts.prune_structured,
    "prune_and_grow_uniform": starts.prune_and_grow_uniform,
    "prune_and_grow_global": starts.prune_and_grow_global,
    "prune_and_grow_structured": starts.prune_and_grow_structured,
}
"""Starts from a trained model, by density."""
UNITS: dict[str, Units | None] = {"rows": structures.rows, "columns": structures.columns, "none": None}
"""What is active or inactive together, beside what takes a size: `parse_units`."""
PATTERNS: dict[str, Structure] = {"diagonals": structures.diagonals}
"""Patterns that are no units, beside what takes numbers: `parse_structure`."""
REDISTRIBUTIONS: dict[str, Statistic | None] = {
    "momentum": redistribution.mean_momentum,
    "magnitude": redistribution.mean_magnitude,
    "nonzeros": redistribution.nonzeros,
    "survivors": redistribution.survivors,
    "none": None,
}


@recipe
def small_dense(density: float | None, *, allocate: Allocation = allocation.erk) -> Method:
    """A dense network made narrow enough to take as many bits as the sparse one would.

    Args:
        density: active share of the sparse network that it is compared with, in (0, 1].
        allocate: how that network would share its active entries; matters where it is explicit.

    Source: Evci et al. 2020, Rigging the Lottery, section 4 ("Small-Dense").
    """
    require_density("small_dense", density)
    return methods.dense()._replace(name="small_dense")


@recipe
def lottery(
    density: float | None,
    *,
    rounds: int = 5,
    rewind_to: int = 0,
    control: Literal["none", "shuffled", "reinitialized"] = "none",
) -> Method:
    """Lottery tickets: train dense, prune the smallest magnitudes, rewind, and train again, round by round.

    Args:
        density: active share of the winning ticket, in (0, 1].
        rounds: how often the network is pruned, each time to the same share of what is left.
        rewind_to: optimizer step to which values, optimizer and learning rate go back; 0 is the initialization.
        control: what the last round trains instead of the ticket: the same counts at "shuffled" positions, or the same
            positions with "reinitialized" values.

    Source: Frankle and Carbin 2019, The Lottery Ticket Hypothesis, section 2; Frankle et al. 2020, Linear Mode
    Connectivity and the Lottery Ticket Hypothesis, Algorithm 2. Each of the rounds + 1 trainings takes the run's steps.
    """
    if density is None:
        raise ValueError("lottery: give a density: it has no allocation that says one")
    require_density("lottery", density)
    if rounds < 1 or rewind_to < 0:
        raise ValueError(f"lottery: rounds must be at least 1 and rewind_to at least 0, got {rounds} and {rewind_to}")
    return methods.dense()._replace(name="lottery")


RECIPES: dict[str, Callable[..., Method]] = {**methods.BY_NAME, "small_dense": small_dense, "lottery": lottery}
"""Everything that `--method` accepts."""

WHOLE_RUN = frozenset({"itop_set", "itop_rigl", "granet", "granet_uniform"})
"""Methods whose updates go on to the end of a run."""

AROUND = "around"
"""The name under which `options` lists what goes around any method."""


def until(method: str) -> str:
    """When the updates of a method end where `until` is not given."""
    return f"{_share(method)} of the run"


def _share(method: str) -> str:
    return "all" if method in WHOLE_RUN else "three quarters"


@dataclass(frozen=True)
class Option:
    """One option of a method as the command line sees it."""

    name: str
    parse: Callable[[str], Any]
    words: str
    """What may be written: a type or the choices."""
    help: str
    default: Any
    """The word for it; None where there is none."""
    required: bool = False
    """Whether a method cannot do without it."""


def options(method: str) -> dict[str, Option]:
    """The options of a method, or of what goes `AROUND` any, read from signature and the docstring's Args section."""
    made = around if method == AROUND else RECIPES[method]
    hints = get_type_hints(made)
    said = own_words(inspect.getdoc(made) or "")
    found = {}
    for name, parameter in inspect.signature(made).parameters.items():
        parse, words = _parser(hints[name])
        default = None if parameter.default is parameter.empty else _word(parameter.default)
        default = until(method) if name == "until" else default
        found[name] = Option(name, parse, words, said.get(name, ""), default, parameter.default is parameter.empty)
    return found


def paper(method: str) -> str:
    """The first line of a method's docstring and its source."""
    doc = inspect.getdoc(RECIPES[method]) or ""
    source = re.search(r"Source: (.+?)(?:\n\n|\Z)", doc, re.S)
    return " ".join(source.group(1).split()) if source else ""


def summary(method: str) -> str:
    """The first line of a method's docstring."""
    return (inspect.getdoc(RECIPES[method]) or "").partition("\n")[0]


def make(method: str, given: Mapping[str, str], steps: int) -> Method:
    """The method with options as typed; `until`, where it is needed and not given, is a share of `steps`.

    Raises:
        ValueError: for an unknown method or option, or a value that does not parse, naming what there is.
    """
    known = known_options(method)
    values = parsed(method, given)
    if "until" in known and "until" not in values:
        values["until"] = max(1, steps if method in WHOLE_RUN else steps * 3 // 4)
    if "density" in known and "density" not in values:
        values["density"] = None
    if (values.get("until") or 0) > steps:
        raise ValueError(
            f"{method}: until is {values['until']:,}, after the run's last step {steps:,}: lower it or train longer"
        )
    missing = [name for name, option in known.items() if option.required and name not in values]
    if missing:
        raise ValueError(f"{method} needs {', '.join(missing)}: {known[missing[0]].help}")
    density = (values.pop("density"),) if "density" in known else ()
    try:
        return RECIPES[method](*density, **values)
    except ValueError as error:
        filled = "until" in known and "until" not in given
        note = f" (until is {_share(method)} of the {steps:,} steps where it is not given)" if filled else ""
        raise ValueError(f"{error}{note}") from None


def parsed(method: str, given: Mapping[str, str]) -> dict[str, Any]:
    """The method's own options among those given, as values; the others must be of what goes around it.

    Raises:
        ValueError: for an unknown method or option, or a value that does not parse, naming what there is.
    """
    known = known_options(method)
    for name in given:
        if name not in known and name not in options(AROUND):
            raise ValueError(f"{method} has no option {name}: it has {', '.join(known) or 'none'}")
    return {name: _parsed(method, known[name], text) for name, text in given.items() if name in known}


def parsed_around(given: Mapping[str, str]) -> Around:
    """What goes around the method, from the options given; those of the method are skipped.

    Raises:
        ValueError: for a value that does not parse or options that contradict each other.
    """
    known = options(AROUND)
    return around(**{name: _parsed(AROUND, known[name], text) for name, text in given.items() if name in known})


def known_options(method: str) -> dict[str, Option]:
    """The options of a method that may not exist.

    Raises:
        ValueError: naming the methods there are.
    """
    if method not in RECIPES:
        raise ValueError(f"there is no method {method!r}: choose {', '.join(RECIPES)}")
    return options(method)


def _parsed(method: str, option: Option, text: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        raise ValueError(f"{method}: {option.name} takes {option.words}, got {text!r} ({error})") from None


def _parser(hint: Any) -> tuple[Callable[[str], Any], str]:
    """How a parameter of this type is written: (text -> value, words for the help)."""
    tables: list[tuple[Any, Mapping[str, Any]]] = [
        (Anneal, ANNEALS),
        (Drop, DROPS),
        (Growth, GROWTHS),
        (Score, SCORES),
        (bool, SWITCH),
        (Statistic | None, REDISTRIBUTIONS),
    ]
    for kind, values in tables:
        if hint == kind:
            return partial(_choose, values), " | ".join(values)
    if hint == Units | None:
        return parse_units, "groups(G) | blocks(H,W) | heads(N) | rows | columns | none"
    if hint == Structure:
        return parse_structure, "diagonals | n_of_m(N,M) | groups(G) | blocks(H,W) | heads(N) | rows | columns"
    if hint == Allocation:
        return parse_allocation, " | ".join(ALLOCATIONS) + " | GLOB=DENSITY,...[,rest=NAME]"
    if get_origin(hint) is Literal:
        return partial(_choose, {word: word for word in get_args(hint)}), " | ".join(get_args(hint))
    for kind, words in ((int, "an integer"), (float, "a number"), (str, "a name")):
        if hint in (kind, kind | None):
            return kind, words
    raise TypeError(f"the command line has no words for options of type {hint}: add them to regrow.app.vocabulary")


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """A method and its options as typed, from "rigl:structure=groups(8),interval=50".

    Raises:
        ValueError: for an unknown method, naming all.
    """
    method, _, given = text.partition(":")
    if method not in RECIPES:
        raise ValueError(
            f"there is no method {method!r}: choose {', '.join(RECIPES)}; separate by spaces where one has options"
        )
    # Not at the comma of blocks(4,4).
    pairs = [part.partition("=") for part in re.split(r",(?![^(]*\))", given) if part]
    return method, {name.replace("-", "_"): value for name, _, value in pairs}


def parse_units(text: str) -> Units | None:
    """What is active or inactive together: groups(G), blocks(H,W), heads(N), rows, columns or none.

    Examples:
        >>> parse_units("rows") is structures.rows, parse_units("none")
        (True, None)
    """
    if text in UNITS:
        return UNITS[text]
    made: dict[tuple[str, int], Callable[..., Units]] = {
        ("groups", 1): structures.groups,
        ("heads", 1): structures.heads,
        ("blocks", 2): structures.blocks,
    }
    match = re.fullmatch(r"(\w+)\((\d+(?:, ?\d+)*)\)", text)
    sizes = [int(size) for size in match[2].split(",")] if match else []
    if match is None or (match[1], len(sizes)) not in made:
        raise ValueError("there are groups(8), blocks(4,4), heads(8) and the like, rows, columns and none")
    return made[match[1], len(sizes)](*sizes)


def parse_structure(text: str) -> Structure:
    """Which patterns are allowed: diagonals, n_of_m(N,M), or the boxes of `parse_units`.

    Examples:
        >>> parse_structure("diagonals") is structures.diagonals
        True
    """
    if text in PATTERNS:
        return PATTERNS[text]
    match = re.fullmatch(r"n_of_m\((\d+), ?(\d+)\)", text)
    found = structures.n_of_m(int(match[1]), int(match[2])) if match else parse_units(text)
    if not callable(found):
        raise ValueError("a structure is needed: diagonals, n_of_m(2,4), groups(8) and the like")
    return found


def parse_allocation(text: str) -> Allocation:
    """A name, or GLOB=DENSITY pairs separated by commas with an optional rest=NAME.

    Examples:
        >>> parse_allocation("erk") is allocation.erk
        True
        >>> shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
        >>> allocation.counts(parse_allocation("fc1=0.02,fc2=0.118,fc3=1"), shapes, None)
        {'fc1': 4704, 'fc2': 3540, 'fc3': 1000}
    """
    if "=" not in text:
        return _choose(ALLOCATIONS, text)
    parts = [part.partition("=") for part in text.split(",") if part]
    pairs = {glob: density for glob, _, density in parts}
    if len(pairs) < len(parts):
        raise ValueError("a glob is given twice")
    rest = pairs.pop("rest", None)
    return allocation.explicit(
        {glob: float(d) for glob, d in pairs.items()}, None if rest is None else _choose(ALLOCATIONS, rest)
    )


def _choose(values: Mapping[str, T], word: str) -> T:
    if word not in values:
        raise ValueError(f"there are {', '.join(values)}")
    return values[word]


def _word(value: Any) -> Any:
    """The word that stands for a default value."""
    for table in (ALLOCATIONS, ANNEALS, DROPS, GROWTHS, SCORES, REDISTRIBUTIONS, SWITCH, UNITS, PATTERNS):
        for word, known in table.items():
            if known is value and value is not None:
                return word
    return str(value.box) if isinstance(value, Units) else value
