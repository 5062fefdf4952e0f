"""Sparse models in one file: safetensors with JSON metadata, nothing executable, written atomically.

Of a sparse weight only the active values and their positions are stored, whatever its storage: a file of a masked model
can be read into a compressed one and the other way round. Names are canonical, so that a model wrapped for training can
be read into a plain one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regrow.core.names import canonical_names
from regrow.core.text import by
from regrow.core.topology import Topology
from regrow.engine.sparsifier import Sparsifier
from regrow.nn import SparseModule
from regrow.nn.base import PERSISTENT

FORMAT = 1

PARTIAL = ".partial"
"""How the name of a file ends that is being written."""


class Held(NamedTuple):
    """A model's state by canonical name; weights of sparse modules without what says where their values belong."""

    tensors: dict[str, Tensor]
    sparse: dict[str, tuple[SparseModule, str]]
    """Weights of sparse modules: the module, and the weight's name in it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a sparse weight, the one it has with its zeros."""
        if name in self.sparse:
            module, own = self.sparse[name]
            return module.shapes[own]
        return tuple(self.tensors[name].shape)


class Saved(NamedTuple):
    """One tensor of a file."""

    topology: Topology
    values: Tensor
    """(nnz,), in the order of the topology."""


def save(sparsifier: Sparsifier, path: str | Path) -> None:
    """Write the sparsifier's model to `path`, storing only the active entries of sparse weights.

    The file holds, for each sparsified weight and each weight of a sparse module, "values:NAME" (nnz,) and, unless all
    entries are active, "positions:NAME" (nnz,): ascending flat positions, int32 where they fit, else int64. Every other
    entry of the state dict is "tensor:NAME". A model has the same file in either storage.

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
    held = _held(sparsifier.model)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for name, parameter, saved in _weights(sparsifier, held):
        topology = saved.topology
        fits = topology.places <= torch.iinfo(torch.int32).max
        tensors[f"values:{name}"] = saved.values.cpu().contiguous()
        if not topology.is_dense:
            tensors[f"positions:{name}"] = topology.indices.cpu().to(torch.int32 if fits else torch.int64)
        weights[name] = {"shape": list(topology.shape), "parameter": parameter}
        if not topology.is_unstructured:
            weights[name]["unit"] = list(topology.unit)
    sparse = {_memory(held.tensors[w["parameter"]]) for w in weights.values()}
    aliases, first = _aliases(held.tensors)
    for name in first:
        if _memory(held.tensors[name]) not in sparse:
            tensors[f"tensor:{name}"] = held.tensors[name].detach().cpu().contiguous().clone()
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
    """Read a file of `save` into `model` and return the topologies of its sparse weights.

    A dense weight of the model gets zeros where nothing is active. A weight of a sparse module takes on the file's
    topology, whatever it had, without a dense form in between. Optimizer state stays as it is, and so do the topologies
    that a masked sparsifier keeps beside the model.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a truncated or foreign file, one of another model, or one with more active entries than a sparse
            module has room for; the model is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    meta, tensors = _read(path)
    held = _held(model)
    with _agreeing(path):
        shapes = _shapes(meta, tensors)
    _require_same(path, shapes, held)
    with _agreeing(path):
        topologies = {name: _topology(name, w, tensors) for name, w in meta["weights"].items()}
        found = _found(meta, tensors, topologies)
    _require_fit(path, found, held)
    for name, saved in found.items():
        _put(saved, name, held)
    return topologies


def _held(model: nn.Module) -> Held:
    # The parameters themselves, since of tied ones without entries nothing else is the same.
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    sparse = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseModule):
            for own in module.shapes:
                name = f"{path}.{own}" if path else own
                sparse[name] = module, own
                for field in PERSISTENT:
                    state.pop(f"{name}_{field}", None)
    names = canonical_names(state)
    return Held({names[n]: tensor for n, tensor in state.items()}, {names[n]: place for n, place in sparse.items()})


def _weights(sparsifier: Sparsifier, held: Held) -> Iterator[tuple[str, str, Saved]]:
    """(name, parameter, content) of every sparse weight: the sparsifier's, then those that were sparse without it."""
    for weight in sparsifier.weights:
        parameter = weight.name if weight.name in held.tensors else weight.name.rpartition("[")[0]
        yield weight.name, parameter, Saved(weight.topology, weight.values())
    seen = set(sparsifier.names)
    for name, (module, own) in held.sparse.items():
        tensor, topology = held.tensors[name], module.topology(own)
        if id(tensor) not in seen:
            yield name, name, Saved(topology, tensor.detach()[: topology.nnz].clone())
        seen.add(id(tensor))


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What is equal of two tensors that are one under two names."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (id(tensor),)


def _aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Later names of tied tensors -> the first name, and all first names."""
    seen: dict[tuple[Any, ...], str] = {}
    first = {name: seen.setdefault(_memory(tensor), name) for name, tensor in state.items()}
    return {name: other for name, other in first.items() if name != other}, list(seen.values())


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


@contextmanager
def _agreeing(path: Path) -> Iterator[None]:
    """Say of whatever goes wrong within that metadata and tensors of the file do not fit together."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged: its metadata and tensors disagree ({_line(error)}); save it anew"
        ) from None


def _blocks(meta: Mapping[str, Any]) -> dict[str, list[str]]:
    """The weights that each sparse parameter consists of, in the order of its rows."""
    blocks: dict[str, list[str]] = {}
    for name, weight in meta["weights"].items():
        blocks.setdefault(str(weight["parameter"]), []).append(name)
    return blocks


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored with every entry, by the name it has in the model."""
    return {key.removeprefix("tensor:"): t for key, t in tensors.items() if key.startswith("tensor:")}


def _shape(weight: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in weight["shape"])


def _shapes(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of everything in the file, read without forming any of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _dense(tensors).items()}
    for parameter, names in _blocks(meta).items():
        own = [_shape(meta["weights"][name]) for name in names]
        if len({shape[1:] for shape in own}) > 1:
            raise ValueError(f"{parameter} has blocks of shapes {', '.join(map(str, own))}")
        shapes[parameter] = own[0] if len(own) == 1 else (sum(shape[0] for shape in own), *own[0][1:])
    return shapes | {alias: shapes[name] for alias, name in meta["aliases"].items()}


def _topology(name: str, weight: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Topology:
    positions = tensors.get(f"positions:{name}")
    unit = tuple(int(n) for n in weight["unit"]) if "unit" in weight else None
    topology = Topology(_shape(weight), None if positions is None else positions.long(), unit)
    if tensors[f"values:{name}"].shape != (topology.nnz,):
        raise ValueError(f"{tuple(tensors[f'values:{name}'].shape)} values for {topology.nnz} positions")
    return topology


def _found(
    meta: Mapping[str, Any], tensors: Mapping[str, Tensor], topologies: Mapping[str, Topology]
) -> dict[str, Saved]:
    """Everything in the file by its names in the model; tied tensors are one object."""
    found = {name: Saved(Topology(tuple(t.shape)), t.reshape(-1)) for name, t in _dense(tensors).items()}
    for parameter, names in _blocks(meta).items():
        values = [tensors[f"values:{name}"] for name in names]
        whole = Topology.stack([topologies[name] for name in names])
        found[parameter] = Saved(whole, values[0] if len(values) == 1 else torch.cat(values))
    return found | {alias: found[name] for alias, name in meta["aliases"].items()}


def _require_same(path: Path, shapes: Mapping[str, tuple[int, ...]], held: Held) -> None:
    missing, strange = sorted(set(held.tensors) - set(shapes)), sorted(set(shapes) - set(held.tensors))
    if missing or strange:
        raise ValueError(
            f"{path} is of another model: it lacks {len(missing)} of the model's tensors "
            f"({', '.join(missing[:3]) or 'none'}) "
            f"and has {len(strange)} that the model lacks ({', '.join(strange[:3]) or 'none'})"
        )
    for name, shape in shapes.items():
        if shape != held.shape(name):
            raise ValueError(f"{path} is of another model: {name} has shape {shape}, the model's {held.shape(name)}")


def _require_fit(path: Path, found: Mapping[str, Saved], held: Held) -> None:
    for name, first in _aliases(held.tensors)[0].items():
        if found[name] is not found[first]:
            raise ValueError(f"{path} is of another model: {first} and {name} differ there, and are tied in the model")
    for name, tensor in held.tensors.items():
        topology = found[name].topology
        if tensor.is_meta:
            raise ValueError(
                f"{name} lies on the meta device, which has no memory for values: build the model on a real device, or "
                'make it sparse first, by regrow.sparsify with storage="compressed"'
            )
        if name in held.sparse and topology.unit != (own := held.sparse[name][0].topology(held.sparse[name][1])).unit:
            raise ValueError(
                f"{path} has {name} in units of {by(topology.unit)} entries, and the model's sparse "
                f"module in units of {by(own.unit)}: make it with the same structure=, or load into "
                "a dense model"
            )
        if name in held.sparse and topology.nnz > tensor.numel():
            raise ValueError(
                f"{path} has {topology.nnz:,} active entries in {name}, and the model's sparse module has room for "
                f"{tensor.numel():,}: make it with a density of at least {topology.density:.4g}, or load into a dense "
                "model"
            )


def _put(saved: Saved, name: str, held: Held) -> None:
    """Write a tensor of the file into the model."""
    topology, values = saved
    tensor = held.tensors[name].detach()
    if name in held.sparse:
        module, own = held.sparse[name]
        module.rewire(own, topology)
        tensor[: topology.nnz] = values.to(tensor)
        tensor[topology.nnz :] = 0
    elif topology.is_dense and topology.is_unstructured:
        tensor.copy_(values.view(topology.shape))
    else:
        full = values.new_zeros(topology.numel)
        full[topology.entries] = values
        tensor.copy_(full.view(topology.shape))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` on success and removed on error.

    What was written lies on the disk before it is renamed, so that no loss of power leaves an empty file.

    Raises:
        FileNotFoundError: when the folder does not exist.
        OSError: when the disk is full, naming `path`.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: make it first")
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL, delete=False) as file:
            temporary = Path(file.name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"there is no room to write {path} ({error.strerror}): what was there before is kept") from None


def partial_files(folder: Path) -> list[Path]:
    """What `replacing` began to write in a folder and never finished, since its process was killed."""
    return sorted(folder.glob(f".*{PARTIAL}"))


def _flush(path: Path) -> None:
    """Have a file, or a folder's entries, written to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
