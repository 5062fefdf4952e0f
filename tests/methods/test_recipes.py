"""Every recipe stands wherever methods are listed: card, index, navigation, README, tests; and says its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from regrow import methods
from regrow.core.method import Method, Need
from regrow.methods import BY_NAME, RECIPES
from regrow.methods.recipe import SHARED, own_words, preset, recipe
from support.table import METHODS

ROOT = Path(__file__).parent.parent.parent
INDEX = (ROOT / "docs/methods/index.md").read_text()
NAVIGATION = (ROOT / "mkdocs.yml").read_text()
README = (ROOT / "README.md").read_text()
FAMILIES = {
    "baselines": "baselines",
    "at_start": "at initialization",
    "gradual": "gradual pruning",
    "dynamic": "dynamic sparse training",
    "learned": "learned sparsity",
}
"""The README's word for each folder."""


def python_name(name: str) -> str:
    """What the recipe is called in Python: set and str have an underscore there."""
    return name if hasattr(methods, name) else f"{name}_"


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, family in RECIPES.items() for n in family])
def test_a_recipe_is_everywhere_where_methods_are_listed(family: str, name: str) -> None:
    made = RECIPES[family][name]
    assert getattr(methods, python_name(name)) is made
    assert made.__module__.startswith(f"regrow.methods.{family}.")
    card = (ROOT / f"docs/methods/{name}.md").read_text()
    assert card.startswith(f"# {name}\n")
    assert f"::: regrow.methods.{python_name(name)}\n" in card
    assert f"\n| [{name}]({name}.md) |" in INDEX
    assert f"      - methods/{name}.md\n" in NAVIGATION
    (row,) = re.findall(rf"^\| {FAMILIES[family]} \|(.*)\|$", README, re.M)
    assert f"`{python_name(name)}`" in row
    assert name in {row.partition("-")[0] for row in METHODS}


@pytest.mark.parametrize("name", BY_NAME)
def test_the_docstring_says_every_option(name: str) -> None:
    doc = inspect.getdoc(BY_NAME[name]) or ""
    options = list(inspect.signature(BY_NAME[name]).parameters)
    assert list(own_words(doc)) == options
    assert name == "dense" or "\nSource: " in doc
    assert "\nExamples:\n" in doc
    assert max(map(len, doc.splitlines())) <= 116


def test_shared_options_are_in_the_docs_word_for_word() -> None:
    for name, said in SHARED.items():
        assert f"\n| `{name}` | {said.replace('|', chr(92) + '|')} |\n" in INDEX


def test_every_shared_word_is_used_by_several() -> None:
    uses = [name for made in BY_NAME.values() for name in inspect.signature(made).parameters]
    assert [name for name in SHARED if uses.count(name) < 2] == []


def base(name: str, density: float, *, steps: int = 3, power: float = 1.0) -> Method:
    return methods.static(density)._replace(name=f"{name} {steps} {power}")


def test_a_preset_is_its_base_with_other_defaults() -> None:
    @preset(base, needs=Need.EXPLORED, power=2.0)
    def mine_() -> None:
        """What it does.

        Args:
            steps: how many.
            power: how steep.

        Source: nobody.
        """

    assert mine_(0.5).name == "mine 3 2.0"
    assert mine_(0.5, power=4.0, steps=1).name == "mine 1 4.0"
    assert mine_(0.5).needs == Need.EXPLORED
    assert str(inspect.signature(mine_)) == "(density: 'float', *, steps: 'int' = 3, power: 'float' = 2.0)"
    assert own_words(inspect.getdoc(mine_) or "")["steps"] == "how many."
    assert (inspect.getdoc(mine_) or "").index("density: active share") < (inspect.getdoc(mine_) or "").index("Source")
    assert mine_.__name__ == "mine_"


def test_a_preset_of_an_option_that_is_not_there_is_refused() -> None:
    with pytest.raises(TypeError, match="mine: there is no option colour"):
        preset(base, colour="red")(lambda_named("mine"))


@pytest.mark.parametrize(
    ("doc", "told"),
    [
        ("Does.", r"f: described but not there: \[\]; there but not described: \['own'\]"),
        ("Does.\n\nArgs:\n    own: this.\n    other: that.\n", r"f: described but not there: \['other'\]"),
    ],
)
def test_an_option_without_words_and_words_without_an_option_are_refused(doc: str, told: str) -> None:
    def f(density: float, *, own: int) -> Method:
        return methods.static(density)

    f.__doc__ = doc
    with pytest.raises(TypeError, match=told):
        recipe(f)


def lambda_named(name: str) -> Callable[[], None]:
    def function() -> None:
        """Nothing."""

    function.__name__ = name
    return function
