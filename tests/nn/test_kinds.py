"""One row for a module type is all that sparsification, FLOPs, sizes and compressed storage read of it."""

from __future__ import annotations

import ast
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, metrics, sparsify
from regrow.engine.discovery import find
from regrow.engine.timing import calls
from regrow.nn import Call, Kind, SparseLinear, SparseModule, Use, from_dense, kind_of, kinds, register, sparse_class
from regrow.nn.base import normal
from support.pairs import Run, positions
from support.table import METHODS
from support.twins import assert_equal, sparsified


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Kind]:
    """What a test registers is forgotten after it."""
    found = dict(kinds.KINDS)
    monkeypatch.setattr(kinds, "KINDS", found)
    return found


class Mixed(nn.Module):
    """A layer of someone's own: y = x @ kernel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(inputs, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.kernel, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class SparseMixed(SparseModule):
    def initial(self, name: str) -> Any:
        return normal(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.product("kernel", x, transposed=True)


ROW = Kind(Mixed, SparseMixed, weights={"kernel": 1}, out_axis=1, in_axis=0)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Mixed(12, 24), nn.Tanh(), nn.Linear(24, 5)).double()


def test_without_a_row_a_type_stays_dense() -> None:
    assert [f.name for f in find(model())[0]] == ["2.weight"]
    assert kind_of(Mixed) is None and sparse_class(Mixed(2, 3)) is None
    with pytest.raises(ValueError, match=r"there is no sparse form of Mixed: regrow\.nn\.register adds one"):
        from_dense(Mixed(2, 3))
    with pytest.raises(ValueError, match=r"a type with regrow\.nn\.register"):
        find(Mixed(2, 3))


def test_a_row_is_enough_to_be_found_counted_and_sized() -> None:
    before = metrics.flops(model(), torch.zeros(3, 12, dtype=torch.float64)).dense
    register(ROW._replace(sparse=None))
    found = find(model())[0]
    assert [(f.name, f.out_axis, f.in_axis) for f in found] == [("0.kernel", 1, 0), ("2.weight", 0, 1)]
    count = metrics.flops(model(), torch.zeros(3, 12, dtype=torch.float64), {"0.kernel": 0.5})
    assert count.dense == before + 24 * (2 * 12 + 1)
    assert (count.layers[0].kind, count.layers[0].sparse) == ("Mixed", 24 * (12 + 1))
    assert metrics.small_dense(lambda width: Mixed(max(1, int(16 * width)), 1), 32 * 5) * 16 // 1 == 5
    run = Run("masked", METHODS["rigl"](), model=model()).go(1, 12)
    assert not run.model[0].kernel[~run.sparsifier.topologies["0.kernel"].mask].any()
    with pytest.raises(ValueError, match="belongs to a Mixed, of which there is no sparse form"):
        Run("compressed", METHODS["rigl"](), model=model())


def test_with_a_sparse_class_compressed_storage_makes_the_same_run() -> None:
    register(ROW)
    dense = Mixed(5, 4).double()
    assert_equal(sparsified(dense, 0.4), dense, torch.randn(3, 5, dtype=torch.float64))
    masked, compressed = (Run(s, METHODS["rigl"](), model=model()) for s in ("masked", "compressed"))
    first = masked.sparsifier.topologies["0.kernel"]
    assert type(compressed.model[0]) is SparseMixed
    for step in range(1, 40):
        assert masked.step(step) == pytest.approx(compressed.step(step), rel=1e-9)
        assert masked.sparsifier.topologies == compressed.sparsifier.topologies
    masked.require_equal(compressed)
    assert masked.sparsifier.topologies["0.kernel"] != first
    assert metrics.flops(compressed.model, torch.zeros(1, 12, dtype=torch.float64)).layers[0].kind == "Mixed"
    assert type(compressed.model[0].to_dense()) is Mixed


def test_a_registered_type_may_lie_on_the_meta_device() -> None:
    register(ROW)
    with torch.device("meta"):
        wide = nn.Sequential(Mixed(120, 80))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    sparsify(wide, optimizer, methods.static(0.5), storage="compressed")
    assert abs(wide[0].kernel.std().item() - 0.1) < 0.01


def test_a_sparse_class_that_does_not_say_how_it_is_drawn_is_named() -> None:
    class Silent(SparseModule):
        forward = SparseMixed.forward

    register(ROW._replace(sparse=Silent))
    with torch.device("meta"):
        wide = nn.Sequential(Mixed(12, 8))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=r"Silent does not say how its kernel is drawn: give it .* initial"):
        sparsify(wide, optimizer, methods.static(0.5), storage="compressed")


def test_uses_of_ones_own_are_what_flops_counts() -> None:
    """A layer that multiplies twice."""

    def twice(call: Call) -> dict[str, Use]:
        return {name: Use((2 * len(call.first),), call.first.numel()) for name in call.weights}

    register(ROW._replace(uses=twice))
    row = metrics.flops(Mixed(4, 3), torch.zeros(5, 4), {"kernel": 0.5}).layers[0]
    assert (row.dense, row.sparse) == (2 * 12 * 2 + 3, 12 * 2 + 3)


def test_blocks_and_what_stays_dense_come_from_the_row() -> None:
    register(Kind(Mixed, weights={"kernel": 2}, left_out=lambda m: "small" if m.kernel.numel() < 20 else None))
    found, excluded = find(nn.Sequential(Mixed(6, 4), Mixed(2, 4)))
    assert [f.names for f in found] == [["0.kernel[0]", "0.kernel[1]"]]
    assert [(e.name, e.reason) for e in excluded] == [("1.kernel", "small")]


class Reading(nn.Module):
    """Multiplies by the weight of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.t()


def test_children_that_are_read_are_timed_on_the_output() -> None:
    layer = Reading()
    assert layer.inner not in calls(layer, torch.zeros(3, 4), [layer.inner])
    register(Kind(Reading, weights=lambda module: {}, reads=("inner",)))
    assert calls(layer, torch.zeros(3, 4), [layer.inner])[layer.inner].args[0].shape == (3, 4)


def test_a_recurrent_layer_lets_go_of_its_weights_and_takes_them_up_again() -> None:
    """Torch keeps weak references to them, and memory of which there are some cannot be exchanged."""
    layer = nn.GRU(3, 2)
    kinds.release(layer)
    assert not weakref.getweakrefs(layer.weight_hh_l0)
    kinds.restore(layer)
    assert [reference() for reference in layer._flat_weight_refs] == layer._flat_weights
    assert len(layer._flat_weights) == 4
    kinds.release(nn.ReLU())
    kinds.restore(nn.ReLU())


def test_a_subclass_is_of_the_kind_of_its_nearest_base() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Owner(Own):
        pass

    class SparseOwn(SparseLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert kind_of(Owner) is kinds.KINDS[nn.Linear] and sparse_class(Owner(2, 2)) is None
    register(Kind(Own, SparseOwn))
    assert kind_of(Owner).name == "Own" and kind_of(nn.Linear).name == "Linear"
    assert sparse_class(Owner(2, 2)) is SparseOwn and sparse_class(nn.Linear(2, 2)) is SparseLinear
    dense = Owner(5, 4).double()
    assert_equal(sparsified(dense, 0.5), dense, torch.randn(3, 5, dtype=torch.float64))


def test_a_type_may_go_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixed, "__module__", "elsewhere.layers")
    register(ROW._replace(dense="elsewhere.Mixed"))
    assert sparse_class(Mixed(2, 3)) is SparseMixed and kind_of(Mixed).name == "Mixed"


def test_every_row_of_the_library_makes_sense(rows: dict[Any, Kind]) -> None:
    known = list(rows.values())
    rows.clear()
    for row in known:
        register(row)
    assert list(rows.values()) == known


BAD: dict[str, tuple[Any, str]] = {
    "twice": (Kind(nn.Linear, SparseLinear), "Linear has a row already: give a subclass of it a row of its own"),
    "twice by name": (Kind("transformers.Conv1D"), "Conv1D has a row already"),
    "no module": (Kind(Tensor), "a row is about a class of modules, got <class 'torch.Tensor'>"),
    "an instance": (Kind(nn.ReLU()), r"a row is about a class of modules, got ReLU\(\)"),
    "every module": (Kind(nn.Module), "a row is about a class of modules"),
    "no name": (Kind("Mixed"), r"a type goes by its class or by \"package.Name\", got 'Mixed'"),
    "a sparse module": (Kind(SparseMixed), "SparseMixed is sparse already"),
    "a dense form": (Kind(Mixed, nn.Linear), "the sparse class of Mixed must be a regrow.nn.SparseModule, got"),
    "no forward": (Kind(Mixed, SparseModule), "SparseModule, the sparse class of Mixed, has no forward"),
    "one axis": (ROW._replace(in_axis=1), "outputs and the inputs of Mixed, from 0 on: got out_axis=1 and in_axis=1"),
    "an axis from the end": (ROW._replace(in_axis=-1), "got out_axis=1 and in_axis=-1"),
    "no weight": (ROW._replace(weights={}), "Mixed needs weights, each with 1 block or more"),
    "no block": (ROW._replace(weights={"kernel": 0}), "Mixed needs weights, each with 1 block or more"),
    "blocks of inputs": (ROW._replace(weights={"kernel": 3}), "blocks of outputs: Mixed must have out_axis=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_makes_no_sense_is_refused(case: str, rows: dict[Any, Kind]) -> None:
    row, match = BAD[case]
    before = dict(rows)
    with pytest.raises(ValueError, match=match):
        register(row)
    assert rows == before


def test_only_rows_are_registered() -> None:
    with pytest.raises(
        TypeError, match=r"register takes a row, as regrow.nn.Kind\(MyLayer, MySparseLayer\), got <class"
    ):
        register(Mixed)


def test_a_row_that_does_not_fit_its_modules_is_refused_where_they_are_found() -> None:
    register(Kind(Mixed))
    with pytest.raises(ValueError, match=r"Mixed has no weight, which its row in regrow\.nn says that it has"):
        find(model())

    class Without(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            del self.weight

    assert [f.name for f in find(nn.Sequential(Without(), nn.Linear(2, 2)))[0]] == ["1.weight"]


@pytest.mark.parametrize("row", [{"weights": {"kernel": 5}}, {"in_axis": 2}])
def test_a_weight_without_the_axes_or_blocks_of_its_row_is_refused(row: dict[str, Any]) -> None:
    register(Kind(Mixed, **{"weights": {"kernel": 1}, **row}))
    with pytest.raises(
        ValueError, match=r"0\.kernel has shape \(12, 24\), and the row of its module in regrow\.nn or also= says"
    ):
        find(model())


@pytest.mark.parametrize("net", ["volume", "decoder", "bilinear"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_new_forms_make_the_same_run_in_either_storage(net: str, optimizer: str) -> None:
    masked, compressed = (Run(s, METHODS["rigl"](), net, optimizer) for s in ("masked", "compressed"))
    first = masked.sparsifier.topologies
    assert positions(compressed.model).keys() == first.keys()
    for step in range(1, 41):
        assert compressed.step(step) == pytest.approx(masked.step(step), rel=1e-9), f"step {step}"
        assert compressed.sparsifier.topologies == masked.sparsifier.topologies, f"step {step}"
    masked.require_equal(compressed)
    assert all(masked.sparsifier.topologies[name] != topology for name, topology in first.items())


SOURCE = Path(kinds.__file__).parent.parent
RIVAL = "engine/timing.py"
"""Builds torch.sparse's linear layer, to race against it."""


def test_nothing_else_in_the_library_knows_module_types() -> None:
    """Neither engine nor storage nor metrics names a class that has a row; examples may."""
    named = {row.name for row in kinds.KINDS.values()} | {
        row.sparse.__name__ for row in kinds.KINDS.values() if row.sparse
    }
    found = {}
    for path in (p for folder in ("engine", "storage", "metrics") for p in (SOURCE / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {
            n.id for n in nodes if isinstance(n, ast.Name)
        }
        found[path.relative_to(SOURCE).as_posix()] = names & named
    assert len(found) > 15
    assert {path for path, names in found.items() if names} <= {RIVAL}
