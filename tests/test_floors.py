"""The floors of the library: a file imports only from floors below its own, and only at its top."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

FLOORS = [
    {"streams", "selection", "atomic", "optimizers"},
    {"topology"},
    {"weight", "validation", "table", "kernels"},
    {"method", "nn"},
    {
        "scores",
        "drops",
        "growth",
        "allocation",
        "schedules",
        "observers",
        "redistribution",
        "structures",
        "latents",
        "storage",
        "measure",
    },
    {"updates", "starts", "foresight"},
    {"methods"},
    {"discovery", "gradients", "registry", "storages", "auto", "sparsifier"},
    {"files", "metrics", "tickets"},
    {"app", "__main__"},
]
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}
FILES = sorted((SOURCE / "regrow").rglob("*.py"))
PACKAGE = "regrow/__init__.py"


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
    assert {part(name) for name in MODULES} - {""} <= set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_down(path: Path):
    own = HEIGHT["app"] - 0.5 if label(path) == PACKAGE else HEIGHT[part(dotted(path))]
    upward = {name for name in imports(path) if name != "regrow" and HEIGHT[part(name)] > own}
    assert not upward, f"{label(path)} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_but_app_imports_the_package_itself(path: Path):
    assert HEIGHT.get(part(dotted(path))) == HEIGHT["app"] or "regrow" not in imports(path)


def test_imports_have_no_cycle():
    TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("path", [p for p in FILES if part(dotted(p)) != "app"], ids=label)
def test_no_import_inside_a_function(path: Path):
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = [n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not lines


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
