"""The programs for GPUs against dense products in float64: in Triton's interpreter, or on a card where there is one.

Tensors lie between NaN and indices between wild numbers, since the interpreter says nothing about a stray read.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow import Topology
from regrow.kernels import UnitIndex, reference
from support.edges import at_edge
from support.units import Unit, unit_index

WHY = "Triton is an extra: make test-gpu installs it"
gpu: Any = pytest.importorskip("regrow.kernels.gpu", reason=WHY)
triton: Any = pytest.importorskip("triton", reason=WHY)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter reads bfloat16 as integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
UNITS = [Unit(8), Unit(16), Unit(64), Unit(1, 16), Unit(16, 16), Unit(32, 32), Unit(64, 2), Unit(12, 3), Unit(128, 20)]
BAND = 64


def within(tensor: Tensor, around: float) -> Tensor:
    """A copy of `tensor` on the device, in the middle of a larger one full of `around`."""
    flat = torch.full((tensor.numel() + 2 * BAND,), around, dtype=tensor.dtype, device=DEVICE)
    flat[BAND : BAND + tensor.numel()] = tensor.reshape(-1)
    return flat[BAND : BAND + tensor.numel()].view(tensor.shape)


def is_alone(tensor: Tensor) -> bool:
    """Whether the NaN around a tensor made by `within` are still there."""
    flat = torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(tensor.untyped_storage())
    return bool(flat[:BAND].isnan().all() and flat[-BAND:].isnan().all())


def activations(batch: int, features: int, dtype: torch.dtype, feature_major: bool = True) -> Tensor:
    shape = (features, batch) if feature_major else (batch, features)
    inside = within(torch.randn(shape).to(dtype), torch.nan)
    return inside.t() if feature_major else inside


class Weight:
    """A random weight made of units; where it has more than two rows of them, the second is empty."""

    def __init__(self, unit: Unit, grid: tuple[int, int], density: float, dtype: torch.dtype, wide: bool = False):
        mask = torch.rand(grid) < density
        if grid[0] > 2:
            mask[1] = False
        index = unit_index(Topology(grid, mask.view(-1).nonzero().view(-1)), unit)
        columns = index.columns.to(torch.int64 if wide else torch.int32)
        # Whoever follows one of the numbers around the index does not come back.
        self.index = index._replace(starts=within(index.starts, 2**40), columns=within(columns, 2**30))
        self.values = within(torch.randn(index.units, unit.inputs, unit.outputs).to(dtype), torch.nan)
        units = torch.zeros(*grid, unit.inputs, unit.outputs, dtype=torch.float64)
        units[mask] = self.values.double().cpu()
        self.unit, self.mask, self.dtype, self.dense = unit, mask, dtype, unit.join(units).to(DEVICE)

    def at(self, full: Tensor) -> Tensor:
        """Entries of a (rows, cols) matrix in the order of the values."""
        return self.unit.split(full.cpu())[self.mask].to(DEVICE)


def check(result: Tensor, expected: Tensor, scale: Tensor) -> None:
    """What sums in float32 lose, relative to the sum of magnitudes, and the last rounding; nothing written beside."""
    error = (result.double() - expected).abs()
    eps = torch.finfo(result.dtype).eps
    assert bool((error <= 1e-5 * scale + eps * expected.abs() + 1e-7).all()), float(error.max())
    assert is_alone(result)


def check_products(w: Weight, batch: int, major: bool = True, bias: bool = False) -> None:
    """Both products and the value gradient, with outputs in either layout."""
    index, dtype = w.index, w.dtype
    x, dy = activations(batch, index.cols, dtype), activations(batch, index.rows, dtype)
    for transposed, operand, weight in ((False, x, w.dense.t()), (True, dy, w.dense)):
        shift = within(torch.randn(weight.shape[1]).to(dtype), torch.nan) if bias else None
        out = activations(batch, weight.shape[1], dtype, major).fill_(torch.nan)
        gpu.unit_spmm(operand, w.values, shift, index, transposed, out)
        offset = torch.zeros(weight.shape[1], device=DEVICE) if shift is None else shift
        scale = operand.double().abs() @ weight.abs() + offset.double().abs()
        check(out, operand.double() @ weight + offset.double(), scale)
    found = within(torch.full_like(w.values, torch.nan), torch.nan)
    gpu.unit_sddmm(x, dy, index, found)
    expected, scale = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    check(found, w.at(expected), w.at(scale))


@pytest.fixture(autouse=True)
def _memory_is_nan_before_it_is_written(monkeypatch: pytest.MonkeyPatch):
    """And plans lie between wild numbers, too."""
    plan = gpu._plan
    monkeypatch.setattr(gpu, "_plan", lambda index: gpu.Plan(*(within(t, 2**30) for t in plan(index))))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_products(unit: Unit, dtype: torch.dtype):
    check_products(Weight(unit, (4, 9), 0.4, dtype), 33, bias=True)
    check_products(Weight(unit, (3, 80), 0.9, dtype, wide=True), 130, major=False)


@given(
    st.builds(Unit, st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_sizes(unit: Unit, grid: tuple[int, int], density: float, batch: int, dtype: torch.dtype, flag: bool):
    check_products(Weight(unit, grid, density, dtype, flag), batch, flag, not flag)


@pytest.mark.parametrize("unit", [Unit(8), Unit(16), Unit(32, 32), Unit(64)], ids=str)
def test_tiles_for_tensor_cores_of_16_rows(unit: Unit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "at_once", lambda x: 16)
    check_products(Weight(unit, (4, 9), 0.4, torch.float16), 33, bias=True)


def test_what_an_input_gradient_holds_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    w = Weight(Unit(8), (4, 9), 0.4, torch.float32)
    dy, outs = activations(300, w.index.rows, w.dtype), []
    # 64 lanes of 4 bytes for each unit are one tile: then all at once, two tiles at a time, and one, the least.
    for limit in (gpu._WORKSPACE, 2 * 64 * 4 * w.index.units, 0):
        monkeypatch.setattr(gpu, "_WORKSPACE", limit)
        launches = [*gpu.products(dy.t(), w.values, None, w.index, True, torch.empty(300, 9, device=DEVICE), 64)]
        outs.append((len(launches), torch.empty(300, w.index.cols, device=DEVICE)))
        gpu.unit_spmm(dy, w.values, None, w.index, True, outs[-1][1])
    assert [count for count, _ in outs] == [2, 6, 10]
    assert torch.equal(outs[0][1], outs[1][1]) and torch.equal(outs[0][1], outs[2][1])


@pytest.mark.parametrize("unit", [Unit(8), Unit(16, 16), Unit(64, 2)], ids=str)
def test_a_nan_reaches_what_reads_it_and_nothing_else(unit: Unit):
    w = Weight(unit, (4, 9), 0.4, torch.float32)
    for transposed, reads in ((False, w.dense.t()), (True, w.dense)):
        features, others = reads.shape
        for feature in (0, features - 1):
            x = torch.randn(features, 5, device=DEVICE)
            x[feature, 2] = torch.nan
            out = torch.empty(5, others, device=DEVICE)
            gpu.unit_spmm(x.t(), w.values, None, w.index, transposed, out)
            met = torch.zeros(5, others, dtype=torch.bool, device=DEVICE)
            met[2] = reads[feature] != 0
            assert torch.equal(out.isnan(), met)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="pages are protected on the CPU")
def test_no_memory_beyond_the_operands_is_touched():
    """Also not where it would change no result: every operand begins or ends at a page that must not be touched."""
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("unit", [Unit(8), Unit(16, 16)], ids=str)
def test_batch_major_operands_and_no_batch_at_all(unit: Unit):
    w = Weight(unit, (4, 9), 0.4, torch.float32)
    x, dy = activations(5, w.index.cols, w.dtype, False), activations(5, w.index.rows, w.dtype, False)
    y, dvalues = torch.empty(5, w.index.rows, device=DEVICE), torch.empty_like(w.values)
    gpu.unit_spmm(x, w.values, None, w.index, False, y)
    gpu.unit_sddmm(x, dy, w.index, dvalues)
    torch.testing.assert_close(y.double(), x.double() @ w.dense.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dvalues.double(), w.at(dy.double().t() @ x.double()), rtol=1e-5, atol=1e-5)
    gpu.unit_spmm(x[:0], w.values, None, w.index, False, y[:0])
    gpu.unit_sddmm(x[:0], dy[:0], w.index, dvalues)
    assert not dvalues.any()


@pytest.mark.parametrize(("unit", "dtype"), [(Unit(8), torch.float64), (Unit(130), torch.float32)], ids=str)
def test_what_the_programs_do_not_take_runs_on_the_reference(
    unit: Unit, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    w = Weight(unit, (2, 9), 0.6, dtype)
    monkeypatch.setattr(gpu, "_run", None)
    x, dy = activations(5, w.index.cols, dtype), activations(5, w.index.rows, dtype)
    y, right = (torch.empty(5, w.index.rows, dtype=dtype, device=DEVICE) for _ in range(2))
    gpu.unit_spmm(x, w.values, None, w.index, False, y)
    reference.unit_spmm(x, w.values, None, w.index, False, right)
    assert torch.equal(y, right)
    dvalues = torch.empty_like(w.values)
    gpu.unit_sddmm(x, dy, w.index, dvalues)
    torch.testing.assert_close(dvalues.double(), w.at(dy.double().t() @ x.double()), rtol=1e-5, atol=1e-5)


def terms(index: UnitIndex, plan: Any) -> list[tuple[int, int]]:
    """(row, number) of all tiles that a plan names."""
    pairs = zip(plan.tile_rows.tolist(), plan.tile_numbers.tolist(), strict=True)
    return [(row, number) for row, number in pairs if row < index.starts.numel() - 1]


def test_a_plan_is_the_transposed_list_and_tiles_that_hold_every_term_once():
    places = torch.arange(0, 350, 2)
    rows, cols = places // 70, places % 70
    index = unit_index(Topology((5, 70), places), Unit(4, 3))
    index = index._replace(starts=index.starts.to(DEVICE), columns=index.columns.to(DEVICE))
    plan = gpu.plan_of(index)
    order = sorted(range(175), key=lambda j: (int(cols[j]), int(rows[j])))
    assert plan.order.tolist() == order
    assert plan.rows.tolist() == [int(rows[j]) for j in order]
    assert plan.starts.tolist() == [int((cols < c).sum()) for c in range(71)]
    fan_in = [int((rows == r).sum()) * 3 for r in range(5)]
    assert terms(index, plan) == [(r, n) for r in range(5) for n in range(-(-fan_in[r] // 64))]


def test_a_plan_lives_as_long_as_its_index_and_until_somebody_writes_to_it():
    w = Weight(Unit(8), (4, 9), 0.4, torch.float32)
    plan = gpu.plan_of(w.index)
    assert gpu.plan_of(w.index) is plan
    others = w.index._replace(starts=w.index.starts.clone().add_(0))
    assert others.starts._version == w.index.starts._version
    assert gpu.plan_of(others) is not plan
    plan = gpu.plan_of(w.index)
    w.index.columns.copy_(w.index.columns)
    assert gpu.plan_of(w.index) is not plan
    order = weakref.ref(gpu.plan_of(w.index).order)
    del plan, w, others
    gc.collect()
    assert order() is None


def test_inputs_made_in_inference_mode_have_plans():
    with torch.inference_mode():
        w = Weight(Unit(8), (4, 9), 0.4, torch.float32)
        assert gpu.plan_of(w.index) is gpu.plan_of(w.index)
        check_products(w, 7)


@pytest.mark.parametrize("word", ["ieee", "tf32"])
def test_float32_is_multiplied_as_torch_is_told_to(word: str):
    matmul, x = torch.backends.cuda.matmul, torch.zeros(1, 4)
    before, index = matmul.fp32_precision, unit_index(Topology((1, 4)), Unit(16))
    matmul.fp32_precision = word
    try:
        (launch,) = gpu.products(x.t(), torch.zeros(4, 1, 16), None, index, False, torch.empty(1, 16), 64)
    finally:
        matmul.fp32_precision = before
    assert launch.arguments["PRECISION"] == word


if __name__ == "__main__":
    within, is_alone, plan = lambda tensor, around: at_edge(tensor), lambda tensor: True, gpu._plan
    gpu._plan = lambda index: gpu.Plan(*map(at_edge, plan(index)))
    for size in (Unit(8), Unit(12, 3), Unit(16, 16), Unit(64)):
        for number in (33, 130):
            check_products(Weight(size, (4, 9), 0.4, torch.float32), number, number % 2 == 0, bias=True)
    print("done")
