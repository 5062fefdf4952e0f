"""What all recipes share: the words for options that many have, and presets, which are recipes with other defaults.

A recipe's docstring describes the options that are its own. Those that it shares are described in `SHARED`, once;
`recipe` and `preset` put them in, so that `help()`, `regrow methods` and the command line's help tell every option.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Concatenate, ParamSpec, get_type_hints

from regrow.core.method import Made, Method, Need

P = ParamSpec("P")

Recipe = Callable[..., Method]
"""A function of options that returns a method."""

SHARED: dict[str, str] = {
    "density": "active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.",
    "until": "optimizer step from which the topology is fixed.",
    "begin": "optimizer step of the first update; None means `interval`.",
    "interval": "optimizer steps between two updates.",
    "fraction": "share of active entries dropped at first, in [0, 1].",
    "anneal": "how that share moves: `cosine`, `constant`, `linear`, `inverse_power`, `cosine_to(0.005)`.",
    "drop": "what goes: `smallest` magnitudes, `lowest_per_sign`, `lowest(score)`, or any other drop.",
    "grow": "where entries appear: `by_gradient`, `at_random`, `by_momentum`, `unexplored_first`, or any other growth.",
    "redistribute": "each weight's share of all that was dropped: `mean_momentum`, `mean_magnitude`, `nonzeros`, "
    "`survivors`, or None to give every weight back what it lost. What a full weight cannot take goes to the others.",
    "decay": "of the running mean of gradients, in [0, 1), where `grow` or `redistribute` reads it; 0.9 where it is "
    "not given.",
    "allocate": "how the active entries are shared among the weights: `uniform`, `er`, `erk`, densities by name, or "
    "where entries are ranked `globally` or `layer_adaptive`.",
    "regrow_dropped": '"keep", "reset" or "forbid" entries that are dropped and would grow again at once.',
    "structure": "what is active or inactive together: `groups(8)` of outputs, `blocks(h, w)`, `rows`, `columns`, "
    "`heads(n)`; None is every entry by itself.",
    "timing": 'the update comes "instead" of an optimizer step or "after" one.',
    "rounds": "how often gradients are asked for.",
    "last_density": "the least density of the last layer, in [0, 1]; None lets it fall like the others.",
    "last_layer": "glob of the name of the layer that `last_density` holds; None is the last of the weights.",
}
"""What options mean that several recipes have."""

_SECTION = re.compile(r"^(Args|Raises|Source|Examples):", re.M)
_ENTRY = re.compile(r"^ {4}(\w+): (.+?)(?=^ {4}\w+: |\Z)", re.S | re.M)


def recipe(function: Callable[P, Method]) -> Callable[P, Method]:
    """`function` with a docstring that describes every option; its methods know the call that made them.

    Raises:
        TypeError: when an option is described nowhere, or the docstring describes one that does not exist.
    """

    @functools.wraps(function)
    def made(*args: P.args, **options: P.kwargs) -> Method:
        method = function(*args, **options)
        return method._replace(made=Made(made, args, options, method[:-1]))

    made.__doc__ = described(function)
    return made


def preset(
    base: Callable[Concatenate[str, P], Method], *, needs: Need = Need.NOTHING, **defaults: object
) -> Callable[[Callable[[], None]], Callable[P, Method]]:
    """A recipe that is `base` with other defaults, under the name and the docstring of the decorated function.

    Args:
        base: (name, options) -> method; the name is the decorated function's, without a last underscore.
        needs: what the method needs beside what `base` says.
        defaults: the options whose defaults differ.

    Raises:
        TypeError: when `base` has no option of that name.
    """

    def decorate(function: Callable[[], None]) -> Callable[P, Method]:
        name = function.__name__.removesuffix("_")

        @functools.wraps(function)
        def made(*args: P.args, **options: P.kwargs) -> Method:
            method = base(name, *args, **(defaults | options))  # type: ignore[arg-type]
            return method._replace(needs=method.needs | needs)

        _, *parameters = inspect.signature(base).parameters.values()
        unknown = defaults.keys() - {p.name for p in parameters}
        if unknown:
            raise TypeError(f"{name}: there is no option {', '.join(sorted(unknown))}")
        signature = inspect.Signature([p.replace(default=defaults.get(p.name, p.default)) for p in parameters])
        vars(made).update(__signature__=signature)
        del vars(made)["__wrapped__"]  # It takes no options, and get_type_hints would look there.
        made.__annotations__ = {k: hint for k, hint in get_type_hints(base).items() if k != "name"}
        return recipe(made)

    return decorate


def described(function: Recipe) -> str:
    """The docstring with an `Args:` section for all options, in the order of the signature."""
    doc = inspect.getdoc(function) or ""
    own = own_words(doc)
    names = list(inspect.signature(function).parameters)
    stray, mute = [n for n in own if n not in names], [n for n in names if n not in own and n not in SHARED]
    if stray or mute:
        raise TypeError(f"{function.__name__}: described but not there: {stray}; there but not described: {mute}")
    if not names:
        return doc
    lines = [
        textwrap.fill(f"{n}: {own.get(n) or SHARED[n]}", 116, initial_indent="    ", subsequent_indent=" " * 8)
        for n in names
    ]
    section = "Args:\n" + "\n".join(lines) + "\n\n"
    without = re.sub(r"^Args:\n.+?(\n\n|\Z)", "", doc, count=1, flags=re.S | re.M)
    first = _SECTION.search(without)
    at = first.start() if first else len(without)
    return without[:at].rstrip() + "\n\n" + section + without[at:]


def own_words(doc: str) -> dict[str, str]:
    """What the `Args:` section of a docstring says of each option."""
    match = re.search(r"^Args:\n(.+?)(?:\n\n|\Z)", doc, re.S | re.M)
    entries = _ENTRY.findall(match.group(1) + "\n") if match else []
    return {name: " ".join(text.split()) for name, text in entries}
