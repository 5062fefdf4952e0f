"""`regrow.parts` is one namespace: every public name of every part is in it, once."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

from regrow import parts
from regrow.core import method

MODULES = sorted(p.stem for p in Path(parts.__file__).parent.glob("*.py") if p.stem != "__init__")


def public(stem: str) -> list[str]:
    """The names that a file defines for others, functions, classes and values."""
    found: list[str] = []
    for node in ast.parse(Path(parts.__file__).with_name(f"{stem}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return [name for name in found if not name.startswith("_")]


def test_no_two_parts_define_the_same_name() -> None:
    uses = Counter(name for stem in MODULES for name in public(stem))
    assert [name for name, count in uses.items() if count > 1] == []
    assert not uses.keys() & set(MODULES)


@pytest.mark.parametrize("stem", MODULES)
def test_the_namespace_has_every_part(stem: str) -> None:
    """Also in `__all__`, and the very same object."""
    module = importlib.import_module(f"regrow.parts.{stem}")
    assert public(stem)
    assert [name for name in public(stem) if name not in parts.__all__] == []
    assert all(getattr(parts, name) is getattr(module, name) for name in public(stem))


def test_the_namespace_has_the_vocabulary() -> None:
    here = {name for name, value in vars(method).items() if getattr(value, "__module__", "") == method.__name__}
    own = {name for name in here if not name.startswith("_")}
    types = {"Score", "Field", "Growth", "Drop", "Allocation", "Statistic", "Structure", "Observer", "Timing", "Regrow"}
    wanted = own | types | {"Update", "Topology", "SparseWeight", "Weights", "Stream"}
    assert wanted - set(parts.__all__) == set()


def test_every_name_is_there_once() -> None:
    assert len(set(parts.__all__)) == len(parts.__all__)
    assert all(hasattr(parts, name) for name in parts.__all__)
