"""Sparse models in one file: safetensors with JSON metadata, nothing executable, written atomically.

Of a sparse weight only the active values and their positions are stored. Names are canonical, so that a model
wrapped for training can be read into a plain one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regrow.atomic import replacing
from regrow.discovery import canonical_names
from regrow.sparsifier import Sparsifier
from regrow.topology import Topology

FORMAT = 1


def save(sparsifier: Sparsifier, path: str | Path) -> None:
    """Write the sparsifier's model to `path`, storing only the active entries of sparse weights.

    The file holds, for each sparsified weight, "values:NAME" (nnz,) and, unless all entries are active,
    "positions:NAME" (nnz,): ascending flat positions, int32 where they fit, else int64. Every other entry of the
    state dict is "tensor:NAME".

    Raises:
        FileNotFoundError: when the folder does not exist.

    Examples:
        >>> import tempfile, regrow
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = regrow.sparsify(model, optimizer, regrow.methods.static(density=0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(sparsifier, f"{folder}/model.safetensors")
        ...     load(f"{folder}/model.safetensors", nn.Linear(20, 10))
        {'weight': Topology(shape=(10, 20), nnz=20, density=0.1)}
    """
    state = _canonical_state(sparsifier.model)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for weight in sparsifier.weights:
        topology = weight.topology
        fits = topology.numel <= torch.iinfo(torch.int32).max
        tensors[f"values:{weight.name}"] = weight.values().cpu().contiguous()
        if not topology.is_dense:
            tensors[f"positions:{weight.name}"] = topology.indices.cpu().to(torch.int32 if fits else torch.int64)
        parameter = weight.name if weight.name in state else weight.name.rpartition("[")[0]
        weights[weight.name] = {"shape": list(weight.shape), "parameter": parameter}
    sparse = {state[w["parameter"]].data_ptr() for w in weights.values()}
    aliases, first = _aliases(state)
    for name in first:
        if state[name].data_ptr() not in sparse or state[name].numel() == 0:
            tensors[f"tensor:{name}"] = state[name].detach().cpu().contiguous().clone()
    meta = {
        "format": FORMAT,
        "method": sparsifier.method.name,
        "step": sparsifier.step,
        "weights": weights,
        "aliases": aliases,
    }
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, {"regrow": json.dumps(meta)})


def load(path: str | Path, model: nn.Module) -> dict[str, Topology]:
    """Read a file of `save` into `model`, sparse weights as dense tensors with zeros, and return the topologies.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a truncated or foreign file, or one of another model; the model is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    meta, tensors = _read(path)
    own = _canonical_state(model)
    try:
        topologies = {name: _topology(name, w, tensors) for name, w in meta["weights"].items()}
        parts: dict[str, list[Tensor]] = {}
        for name, weight in meta["weights"].items():
            parts.setdefault(str(weight["parameter"]), []).append(_dense(topologies[name], tensors[f"values:{name}"]))
        full = {name: torch.cat(blocks) for name, blocks in parts.items()}
        full |= {key.removeprefix("tensor:"): t for key, t in tensors.items() if key.startswith("tensor:")}
        full |= {alias: full[name] for alias, name in meta["aliases"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged: its metadata and tensors disagree ({_line(error)}); save it anew"
        ) from None
    _require_same(path, full, own)
    with torch.no_grad():
        for name, tensor in full.items():
            own[name].copy_(tensor)
    return topologies


def _canonical_state(model: nn.Module) -> dict[str, Tensor]:
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    names = canonical_names(state)
    return {names[name]: tensor for name, tensor in state.items()}


def _aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Later names of tied tensors -> the first name, and all first names."""
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    aliases, first = {}, []
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            first.append(name)
    return aliases, first


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("regrow")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file of {path.stat().st_size:,} bytes ({_line(error)}): copy or "
            "save it anew"
        ) from None
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but not one that regrow.save wrote: load it with safetensors")
    try:
        meta = json.loads(text)
        version = meta["format"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} has damaged metadata: save it anew") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this regrow reads format {FORMAT}: use the version that wrote it"
        )
    return meta, tensors


def _topology(name: str, weight: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Topology:
    positions = tensors.get(f"positions:{name}")
    topology = Topology(tuple(int(n) for n in weight["shape"]), None if positions is None else positions.long())
    if tensors[f"values:{name}"].shape != (topology.nnz,):
        raise ValueError(f"{tuple(tensors[f'values:{name}'].shape)} values for {topology.nnz} positions")
    return topology


def _dense(topology: Topology, values: Tensor) -> Tensor:
    dense = values.new_zeros(topology.numel)
    dense[topology.indices] = values
    return dense.view(topology.shape)


def _require_same(path: Path, full: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing, strange = sorted(set(own) - set(full)), sorted(set(full) - set(own))
    if missing or strange:
        raise ValueError(
            f"{path} is of another model: it lacks {len(missing)} of the model's tensors "
            f"({', '.join(missing[:3]) or 'none'}) "
            f"and has {len(strange)} that the model lacks ({', '.join(strange[:3]) or 'none'})"
        )
    for name, tensor in full.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{path} is of another model: {name} has shape {tuple(tensor.shape)}, the model's "
                f"{tuple(own[name].shape)}"
            )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
