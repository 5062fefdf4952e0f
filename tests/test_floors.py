"""The floors of the library: a file imports from folders strictly below its own, and only at its top."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"

FLOOR = {
    "core": 1,
    "parts": 2,
    "methods": 3,
    "kernels": 2,
    "nn": 3,
    "storage": 4,
    "engine": 5,
    "compaction": 6,
    "files": 6,
    "metrics": 6,
    "tickets": 6,
    "app": 7,
}
WINGS = {"parts", "methods"}, {"kernels", "nn", "storage"}
"""What a method is, and how it is computed: neither knows of the other."""
FILES = sorted((SOURCE / "regrow").rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in FILES}


def part(module: str) -> str:
    """The floor's name of a module: `regrow.methods.dynamic` lives in `methods`."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """The regrow modules that a file imports, submodules named through `from package import submodule` included."""
    found = set()
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in inner}
    return {name for name in found if name.partition(".")[0] == "regrow"}


def label(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def test_every_part_has_a_floor():
    assert {part(name) for name in MODULES} == {*FLOOR, "__main__", ""}


@pytest.mark.parametrize("path", [p for p in FILES if part(dotted(p)) in FLOOR], ids=label)
def test_imports_point_strictly_below_or_into_the_own_folder(path: Path):
    own = part(dotted(path))
    others = {name for name in imports(path) if part(name) != own}
    beside = {name for name in others if FLOOR.get(part(name), 0) >= FLOOR[own]}
    assert not beside, f"{label(path)} imports upward or sideways: {sorted(beside)}"
    for wing, other in (WINGS, WINGS[::-1]):
        across = {name for name in others if own in wing and part(name) in other}
        assert not across, f"{label(path)} imports from the other wing: {sorted(across)}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_but_app_imports_the_package_itself(path: Path):
    assert part(dotted(path)) in ("app", "__main__") or "regrow" not in imports(path)


def test_the_package_does_not_import_the_application():
    assert not {name for name in imports(SOURCE / "regrow/__init__.py") if part(name) in ("app", "__main__")}


def test_imports_have_no_cycle():
    TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("path", [p for p in FILES if part(dotted(p)) != "app"], ids=label)
def test_no_import_inside_a_function(path: Path):
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = [n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not lines


def test_test_modules_share_code_through_support_alone():
    """A test module imports none of the others, so that each may be renamed, split and run by itself."""
    others = {path.stem if path.is_file() else path.name for path in TESTS.iterdir()} - {"support"}
    found = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.relative_to(TESTS)}: {name}" for name in names if name.partition(".")[0] in {*others, ""}]
    assert not found


def test_import_regrow_loads_torch_numpy_and_safetensors_only():
    code = """
import sys
import torch, numpy, safetensors, safetensors.torch
before = set(sys.modules)
import regrow
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(names - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("regrow.app")))
"""
    path = {"PYTHONPATH": str(SOURCE), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    loaded, app = run.stdout.split("\n")[:2]
    assert set(loaded.split()) <= {"regrow", "torch", "numpy", "safetensors"}
    assert app == ""
