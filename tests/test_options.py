"""Every option of every method has a case, in the test module of its family, and every recipe is in a table."""

from __future__ import annotations

import inspect

import pytest

from regrow.methods import BY_NAME
from support.cases import tables
from support.paper import library

CASES, SHORT = tables("CASES"), tables("SHORT")


@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_has_a_case(name: str) -> None:
    """Property 48: an option without an oracle makes this fail."""
    assert set(CASES[name]) == set(inspect.signature(BY_NAME[name]).parameters)
    for option, changes in CASES[name].items():
        assert changes
        assert all(option in case[0] for case in changes)


@pytest.mark.parametrize("name", BY_NAME)
def test_an_unknown_option_is_refused(name: str) -> None:
    """Property 48."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsity'"):
        BY_NAME[name](**SHORT[name], sparsity=0.9)


def test_the_tables_have_every_recipe_by_its_name() -> None:
    assert all(library(name, SHORT[name]).name == name for name in BY_NAME)
    assert BY_NAME.keys() == SHORT.keys() == CASES.keys()
