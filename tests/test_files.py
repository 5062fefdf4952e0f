"""Saved models: exact, canonical, atomic, and hostile input refused without touching the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import regrow
from regrow import methods
from regrow.engine.placement import Storage
from regrow.files import replacing
from regrow.nn import SparseConv2d, SparseGRU, SparseLinear, SparseModule, from_dense


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12, bias=False)
        self.b = nn.Linear(12, 12, bias=False)
        self.b.weight = self.a.weight
        self.attention = nn.MultiheadAttention(12, 2)
        self.norm = nn.BatchNorm1d(12)


class Mixed(nn.Module):
    """Everything at once: packed blocks, a convolution, tied weights, buffers, a weight that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.attention = nn.MultiheadAttention(12, 2)
        self.a = nn.Linear(12, 12, bias=False)
        self.b = nn.Linear(12, 12)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(12)
        self.plain = nn.Linear(12, 3)


def sparse(
    model: nn.Module, density: float = 0.25, storage: Storage = "masked", seed: int = 0, **options: Any
) -> regrow.Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return regrow.sparsify(model, optimizer, methods.static(density), storage=storage, seed=seed, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Largest(TorchDispatchMode):
    """The most entries that a tensor made within had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(t.numel() for t in torch.utils._pytree.tree_leaves(made) if torch.is_tensor(t))]
        )
        return made


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_model_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Tied().to(dtype)
    sparsifier = sparse(model)
    regrow.save(sparsifier, tmp_path / "m.safetensors")
    other = Tied().to(dtype)
    topologies = regrow.load(tmp_path / "m.safetensors", other)
    assert topologies == sparsifier.topologies
    assert other.b.weight is other.a.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_active_zeros_survive(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    sparsifier = sparse(model)
    sparsifier.weights[0].set_values(torch.zeros(sparsifier.nnz))
    regrow.save(sparsifier, tmp_path / "m.safetensors")
    assert regrow.load(tmp_path / "m.safetensors", nn.Linear(8, 8))["weight"].nnz == sparsifier.nnz


def test_the_file_holds_active_entries_only(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    regrow.save(sparse(model, 0.05), tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert tensors["values:weight"].numel() == tensors["positions:weight"].numel() == 500
    assert tensors["positions:weight"].dtype == torch.int32
    assert sum(t.numel() for t in tensors.values()) == 500 + 500 + 100


def test_a_wrapped_model_loads_into_a_plain_one(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(nn.Linear(8, 8))
    sparsifier = sparse(wrapped)
    regrow.save(sparsifier, tmp_path / "m.safetensors")
    plain = nn.Linear(8, 8)
    regrow.load(tmp_path / "m.safetensors", plain)
    assert torch.equal(plain.weight, wrapped.module.weight)


def test_a_truncated_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    regrow.save(sparse(nn.Linear(8, 8)), path)
    whole = path.read_bytes()
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"no whole safetensors file of {length:,} bytes"):
            regrow.load(path, model)
    assert torch.equal(model.weight, before)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"weight": torch.zeros(8, 8)}, path)
    with pytest.raises(ValueError, match=r"not one that regrow\.save wrote"):
        regrow.load(path, nn.Linear(8, 8))
    save_file({"weight": torch.zeros(8, 8)}, path, {"regrow": "{"})
    with pytest.raises(ValueError, match="damaged metadata"):
        regrow.load(path, nn.Linear(8, 8))
    save_file({"weight": torch.zeros(8, 8)}, path, {"regrow": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match="format 99"):
        regrow.load(path, nn.Linear(8, 8))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        regrow.load(tmp_path / "absent", nn.Linear(8, 8))


@pytest.mark.parametrize("positions", [[0, 0], [1, 0], [-1, 3], [3, 64]])
def test_hostile_positions_are_refused(tmp_path: Path, positions: list[int]) -> None:
    path = tmp_path / "m.safetensors"
    regrow.save(sparse(nn.Linear(8, 8), 2 / 64), path)
    tensors = load_file(path)
    tensors["positions:weight"] = torch.tensor(positions, dtype=torch.int32)
    save_file(tensors, path, metadata(path))
    with pytest.raises(ValueError, match="is damaged"):
        regrow.load(path, nn.Linear(8, 8))


def test_values_without_a_position_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    regrow.save(sparse(nn.Linear(8, 8), 2 / 64), path)
    tensors = load_file(path)
    tensors["values:weight"] = tensors["values:weight"][:1]
    save_file(tensors, path, metadata(path))
    with pytest.raises(ValueError, match="is damaged"):
        regrow.load(path, nn.Linear(8, 8))


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    regrow.save(sparse(nn.Linear(8, 8)), path)
    narrow = nn.Linear(4, 8)
    before = narrow.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight has shape \(8, 8\), the model's \(8, 4\)"):
        regrow.load(path, narrow)
    with pytest.raises(ValueError, match="lacks 2 of the model's tensors"):
        regrow.load(path, nn.Sequential(nn.Linear(8, 8)))
    assert torch.equal(narrow.weight, before)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), replacing(path) as temporary:
        temporary.write_text("new, but")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        regrow.save(sparse(nn.Linear(8, 8)), tmp_path / "absent" / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_has_the_same_file_in_either_storage(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    for storage in ("masked", "compressed"):
        regrow.save(sparse(copy.deepcopy(model), storage=storage, skip="plain"), tmp_path / storage)
    assert (tmp_path / "masked").read_bytes() == (tmp_path / "compressed").read_bytes()
    keys = set(load_file(tmp_path / "compressed"))
    assert not any("starts" in key or "columns" in key for key in keys)
    assert {"values:attention.in_proj_weight[2]", "values:conv.weight", "tensor:plain.weight"} <= keys
    assert not any(key.endswith(":b.weight") or key == "tensor:a.weight" for key in keys)


@pytest.mark.parametrize("source", ["masked", "compressed"])
@pytest.mark.parametrize("target", ["masked", "compressed"])
def test_a_file_goes_from_any_storage_to_any_other(tmp_path: Path, source: Storage, target: Storage) -> None:
    regrow.save(first := sparse(Mixed(), storage=source, skip="plain"), tmp_path / "first")
    model = Mixed()
    second = sparse(model, storage=target, skip="plain", seed=1)
    assert second.topologies != first.topologies
    assert regrow.load(tmp_path / "first", model) == first.topologies
    dense = Mixed()
    regrow.load(tmp_path / "first", dense)
    mine = model if target == "masked" else to_dense(model)
    assert_unchanged(mine, dense.state_dict())
    if target == "compressed":
        assert second.topologies == first.topologies
        regrow.save(second, tmp_path / "second")
        assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


def to_dense(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, child in model.named_children():
        setattr(model, name, child.to_dense() if isinstance(child, SparseModule) else child)
    return model


def test_a_compressed_model_goes_on_training_after_a_load(tmp_path: Path) -> None:
    x, y = torch.randn(32, 8), torch.randn(32, 8)
    model = nn.Linear(8, 8)
    regrow.save(first := sparse(copy.deepcopy(model)), tmp_path / "m")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    second = regrow.sparsify(model, optimizer, methods.rigl(0.25, until=20, interval=5), storage="compressed", seed=1)
    regrow.load(tmp_path / "m", model)
    expected = first.model.weight.detach().clone().requires_grad_()
    bias = first.model.bias.detach().clone().requires_grad_()
    twin = torch.optim.SGD([expected, bias], lr=0.1, momentum=0.9)
    mask = first.topologies["weight"].mask
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        twin.zero_grad()
        (nn.functional.linear(x, expected, bias) - y).square().mean().backward()
        expected.grad *= mask
        twin.step()
    assert torch.allclose(model.to_dense().weight, expected, atol=1e-6)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert second.updates == 1 and second.nnz == first.nnz


def test_modules_made_sparse_take_on_the_topology_of_a_file(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    sparsifier = sparse(dense)
    regrow.save(sparsifier, tmp_path / "m")
    model = nn.Sequential(SparseConv2d(2, 6, 3, density=0.5), nn.Flatten(), SparseLinear(24, 5, density=1.0))
    capacities = [p.numel() for p in model.parameters()]
    regrow.load(tmp_path / "m", model)
    assert [p.numel() for p in model.parameters()] == capacities
    for layer, name in ((model[0], "0.weight"), (model[2], "2.weight")):
        at = sparsifier.topologies[name]
        assert layer.topology() == at
        assert at.nnz < layer.weight.numel()
        assert not layer.weight[at.nnz :].any() and layer.weight[: at.nnz].all()
    x = torch.randn(3, 2, 4, 4)
    assert torch.allclose(model(x), dense(x), atol=1e-6)


def test_blocks_and_whole_weights_are_the_same(tmp_path: Path) -> None:
    dense = nn.ModuleList([nn.MultiheadAttention(12, 2), nn.GRU(5, 4, bidirectional=True)])
    sparsifier = sparse(dense)
    regrow.save(sparsifier, tmp_path / "m")
    whole = nn.ModuleList([from_dense(dense[0]), SparseGRU(5, 4, bidirectional=True, density=1)])
    found = regrow.load(tmp_path / "m", whole)
    assert "1.weight_ih_l0_reverse[2]" in found and found == sparsifier.topologies
    sequence = torch.randn(7, 3, 5)
    assert torch.allclose(whole[1](sequence)[0], dense[1](sequence)[0], atol=1e-6)
    # And back, where the weights of a sparse module are one each.
    head = nn.Linear(4, 4)
    regrow.save(sparse(nn.ModuleList([whole, head])), tmp_path / "whole")
    plain = nn.ModuleList([nn.MultiheadAttention(12, 2), nn.GRU(5, 4, bidirectional=True)])
    found = regrow.load(tmp_path / "whole", nn.ModuleList([plain, nn.Linear(4, 4)]))
    assert {"0.0.in_proj_weight", "0.1.weight_hh_l0", "1.weight"} <= set(found)
    assert torch.equal(plain[0].in_proj_weight, dense[0].in_proj_weight)
    assert torch.equal(plain[1].weight_hh_l0_reverse, dense[1].weight_hh_l0_reverse)


def test_too_little_room_is_said_with_the_numbers_and_changes_nothing(tmp_path: Path) -> None:
    regrow.save(sparse(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5), tmp_path / "m")
    model = nn.Sequential(nn.Linear(8, 8), SparseLinear(8, 8, density=0.25))
    before = state(model)
    with pytest.raises(ValueError, match=r"32 active entries in 1\.weight.*room for 16.*density of at least 0\.5"):
        regrow.load(tmp_path / "m", model)
    assert_unchanged(model, before)


def test_a_dense_weight_needs_room_for_all_of_it(tmp_path: Path) -> None:
    regrow.save(sparse(nn.ModuleList([nn.Linear(8, 8), nn.Linear(4, 4)]), skip="0"), tmp_path / "m")
    with pytest.raises(ValueError, match=r"64 active entries in 0\.weight.*room for 16"):
        regrow.load(tmp_path / "m", nn.ModuleList([SparseLinear(8, 8, density=0.25), nn.Linear(4, 4)]))
    model = nn.ModuleList([SparseLinear(8, 8, density=1.0), nn.Linear(4, 4)])
    regrow.load(tmp_path / "m", model)
    assert torch.equal(model[0].weight, load_file(tmp_path / "m")["tensor:0.weight"].view(-1))


def test_another_or_damaged_file_leaves_a_compressed_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "m"
    model = nn.Linear(8, 8)
    sparsifier = sparse(model, storage="compressed")
    before = state(model)
    regrow.save(sparse(nn.Linear(4, 8)), path)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 4\), the model's \(8, 8\)"):
        regrow.load(path, model)
    regrow.save(sparse(nn.Linear(8, 8), seed=1), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        regrow.load(path, model)
    path.write_bytes(whole)
    tensors = load_file(path)
    for positions in ([5, *range(15)], [*range(15), 64]):
        tensors["positions:weight"] = torch.tensor(positions, dtype=torch.int32)
        save_file(tensors, path, metadata(path))
        with pytest.raises(ValueError, match="is damaged"):
            regrow.load(path, model)
    assert_unchanged(model, before)
    assert sparsifier.topologies["weight"] == model.topology()


@pytest.mark.parametrize(
    "shapes", [[[4, 8], [4, 9]], [[2**40, 8], [4, 8]], [[-4, 8], [12, 8]], [["a", 8], [4, 8]], [[], [8, 8]]]
)
def test_hostile_shapes_are_refused_before_anything_is_formed(tmp_path: Path, shapes: list[list[int]]) -> None:
    path = tmp_path / "m"
    gru = nn.RNN(8, 8)
    regrow.save(sparse(gru), path)
    text = metadata(path)
    meta = json.loads(text["regrow"])
    entry = meta["weights"].pop("weight_ih_l0")
    tensors = load_file(path)
    for i, shape in enumerate(shapes):
        meta["weights"][f"weight_ih_l0[{i}]"] = {**entry, "shape": shape}
        tensors[f"values:weight_ih_l0[{i}]"] = torch.zeros(0)
        tensors[f"positions:weight_ih_l0[{i}]"] = torch.zeros(0, dtype=torch.int32)
    save_file(tensors, path, {"regrow": json.dumps(meta)})
    with pytest.raises(ValueError, match=r"is damaged|is of another model"):
        regrow.load(path, gru)


@pytest.mark.parametrize("density", [0.0, 0.25])
def test_tied_weights_stay_tied_even_without_entries(tmp_path: Path, density: float) -> None:
    def tied() -> nn.ModuleList:
        layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        layers[1].weight = layers[0].weight
        return layers

    def at_work(model: nn.Module, storage: Storage, seed: int) -> regrow.Sparsifier:
        allocate = regrow.parts.allocation.explicit({"0": density, "2": 0.5, "3": 0.0})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return regrow.sparsify(model, optimizer, methods.static(None, allocate=allocate), storage=storage, seed=seed)

    model = tied()
    for storage in ("masked", "compressed"):
        regrow.save(at_work(copy.deepcopy(model), storage, 0), tmp_path / storage)
    assert (tmp_path / "masked").read_bytes() == (tmp_path / "compressed").read_bytes()
    other = tied()
    sparsifier = at_work(other, "compressed", 1)
    found = regrow.load(tmp_path / "masked", other)
    assert other[0].weight is other[1].weight
    assert other[0].topology() == other[1].topology() == found["0.weight"] == sparsifier.topologies["0.weight"]
    assert found["0.weight"].nnz == 64 * density
    assert found["3.weight"].nnz == 0 and other[3].weight is not other[0].weight


def test_a_module_under_two_names_is_one(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": layer})
    for storage in ("masked", "compressed"):
        regrow.save(sparse(copy.deepcopy(model), storage=storage), tmp_path / storage)
    assert (tmp_path / "masked").read_bytes() == (tmp_path / "compressed").read_bytes()
    sparsifier = sparse(model, storage="compressed", seed=1)
    assert regrow.load(tmp_path / "masked", model) == sparsifier.topologies
    assert model["a"] is model["b"] is layer


def test_two_weights_do_not_load_into_tied_ones(tmp_path: Path) -> None:
    regrow.save(sparse(nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])), tmp_path / "m")
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    model[1].weight = model[0].weight
    for own in (model, copy.deepcopy(model)):
        if own is not model:
            sparse(own, storage="compressed")
        before = state(own)
        with pytest.raises(ValueError, match=r"0\.weight and 1\.weight differ there, and are tied"):
            regrow.load(tmp_path / "m", own)
        assert_unchanged(own, before)


def test_a_sparse_module_beside_a_sparsifier_is_saved_sparse(tmp_path: Path) -> None:
    layer = SparseLinear(8, 8, density=0.25, seed=0)
    model = nn.Sequential(layer, nn.Linear(8, 4))
    regrow.save(sparse(model), tmp_path / "m")
    assert load_file(tmp_path / "m")["values:0.weight"].numel() == 16
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    found = regrow.load(tmp_path / "m", plain)
    assert found["0.weight"] == layer.topology()
    assert torch.equal(plain[0].weight, layer.to_dense().weight)


def test_nothing_dense_is_formed_for_a_compressed_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        models = [nn.Linear(600, 500) for _ in range(2)]
    first, second = (sparse(m, 0.01, "compressed", seed) for seed, m in enumerate(models))
    with Largest() as largest:
        regrow.save(first, tmp_path / "m")
        regrow.load(tmp_path / "m", models[1])
    assert second.topologies == first.topologies and torch.equal(models[0].weight, models[1].weight)
    # The bytes of what is active are the most; dense the weight has 300,000 entries.
    assert 3000 <= largest.numel <= 12_000


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    regrow.save(sparse(nn.Linear(8, 8)), tmp_path / "m")
    with pytest.raises(ValueError, match=r"weight lies on the meta device.*regrow\.sparsify"):
        regrow.load(tmp_path / "m", nn.Linear(8, 8, device="meta"))


def test_a_wrapped_compressed_model_loads_and_saves(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(nn.Linear(8, 8))
    sparsifier = sparse(wrapped, storage="compressed")
    regrow.save(sparse(nn.Linear(8, 8), seed=1), tmp_path / "m")
    regrow.load(tmp_path / "m", wrapped)
    regrow.save(sparsifier, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()
