"""Saved models: exact, canonical, atomic, and hostile input refused without touching the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import regrow
from regrow import methods
from regrow.atomic import replacing


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12, bias=False)
        self.b = nn.Linear(12, 12, bias=False)
        self.b.weight = self.a.weight
        self.attention = nn.MultiheadAttention(12, 2)
        self.norm = nn.BatchNorm1d(12)


def sparse(model: nn.Module, density: float = 0.25) -> regrow.Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return regrow.sparsify(model, optimizer, methods.static(density))


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
