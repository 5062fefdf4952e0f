"""What every sparse module has in common: where values, topology and index of its weights are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from regrow import kernels
from regrow.core.draws import Stream
from regrow.core.method import Units
from regrow.core.text import by
from regrow.core.topology import Topology, fan_in_scale
from regrow.core.units import in_rows
from regrow.core.weight import Shaped
from regrow.kernels import Geometry, Index, UnitIndex

Init = Literal["module", "fan_in"]
"""How values are drawn: as the dense module draws its own, or those scaled to the fan-in each output really has."""

Draw = Callable[[Stream, int], Tensor]
"""Initial values: (stream, count) -> (count,) float64."""

PERSISTENT = ("starts", "columns", "unit")
"""Fields of a layout that a state dict holds; the others follow from them."""


def layout(topology: Topology, on_units: bool) -> dict[str, Tensor]:
    """What a module keeps of a topology, by field: where the values belong, and what its products read.

    That is an index of entries, or the rows of larger units, whose sizes stand in `unit`. Products that do not run on
    units read the index of their entries in rows, `entry_...`, and which value belongs to each, `entry_values`.
    """
    if topology.is_unstructured:
        return kernels.index(topology)._asdict()
    fields = {"starts": topology.starts, "columns": topology.columns, "unit": torch.tensor(topology.unit)}
    if on_units:
        return fields
    rows, order = topology.by_entries()
    index = kernels.index(rows)._asdict()
    return fields | {f"entry_{name}": field for name, field in index.items()} | {"entry_values": order}


class Keys(dict[str, int]):
    """Keys of the keepers that want to see a module's operands, by weight; a copied module has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Keys:
        return Keys()

    def __reduce__(self) -> tuple[type[Keys], tuple[()]]:
        return Keys, ()


class SparseModule(nn.Module):
    """A module whose weights hold active entries only.

    A sparse weight NAME is a parameter NAME of shape (capacity,), of which the first nnz entries are its active values
    and the others inert zeros, with buffers NAME_starts and NAME_columns that say where the values belong: both are in
    the state dict. The dense shape of each is in `shapes`. Where it is made of larger units, `units` has their size,
    which NAME_unit keeps in the state dict.
    """

    dense_type: type[nn.Module]
    """The class of the dense module that this one stands for."""

    shapes: dict[str, tuple[int, ...]]
    units: dict[str, tuple[int, ...]]
    """The size of a unit of each sparse weight, where it is more than an entry."""
    keys: Keys

    def initial(self, name: str) -> Draw:
        """How the dense module draws its parameter `name`."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its {name} is drawn: give it a method initial(name)"
        )

    def to_dense(self) -> nn.Module:
        """A dense copy, with zeros where nothing is active."""
        module: nn.Module = copy.deepcopy(self)
        full = {n: nn.Parameter(self.dense(n).detach(), getattr(self, n).requires_grad) for n in self.shapes}
        for name in self.shapes:
            for field in self.fields(name):
                delattr(module, f"{name}_{field}")
        del module.shapes, module.units, module.keys
        module.__dict__.pop("dense_type", None)
        module.__class__ = self.dense_type
        for name, parameter in full.items():
            setattr(module, name, parameter)
        return module

    @classmethod
    def adopt(cls, module: nn.Module, weights: Mapping[str, tuple[nn.Parameter, Topology]]) -> Self:
        """Turn a dense `module` into one of this class in place, so that every reference to it goes on.

        Args:
            module: of the class that this one stands for.
            weights: each sparse weight's parameter, already of shape (capacity,), and its topology.
        """
        dense_type = type(module)
        module.__class__ = cls
        assert isinstance(module, cls)
        module.dense_type = dense_type
        module._begin()
        for name, (parameter, topology) in weights.items():
            module.hold(name, parameter, topology)
        return module

    def _begin(self) -> None:
        self.shapes = {}
        self.units = {}
        self.keys = Keys()

    def hold(self, name: str, parameter: nn.Parameter, topology: Topology) -> None:
        """Take `parameter` (capacity,), capacity >= nnz, as the values of sparse weight `name`."""
        self.register_parameter(name, parameter)
        self.shapes[name] = topology.shape
        if not topology.is_unstructured:
            self.units[name] = topology.unit
        for field, tensor in layout(topology, self.runs_on_units(topology)).items():
            self.register_buffer(f"{name}_{field}", tensor.to(parameter.device), persistent=field in PERSISTENT)

    def runs_on_units(self, topology: Topology) -> bool:
        """Whether products with a weight of this topology run on its units; else they run on its entries."""
        return kernels.has_kernels(topology)

    def fields(self, name: str) -> list[str]:
        """The fields of the layout of a sparse weight; its buffers are called NAME_FIELD."""
        known = (*Index._fields, "unit", *(f"entry_{field}" for field in Index._fields), "entry_values")
        return [field for field in known if f"{name}_{field}" in self._buffers]

    def index(self, name: str = "weight") -> Index | UnitIndex:
        """What products with a sparse weight read of its topology."""
        return self.operands(name)[1]

    def operands(self, name: str = "weight") -> tuple[Tensor, Index | UnitIndex]:
        """What products with a sparse weight read: its values and their index."""
        values: Tensor = getattr(self, name)
        if name not in self.units:
            return values, Index(*(getattr(self, f"{name}_{field}") for field in Index._fields))
        if f"{name}_entry_values" in self._buffers:
            return values.index_select(0, getattr(self, f"{name}_entry_values")), self._entries(name)
        outputs, inputs = self.units[name][0], math.prod(self.units[name][1:])
        whole = values.numel() // (outputs * inputs)
        values = values if values.numel() == whole * outputs * inputs else values[: whole * outputs * inputs]
        starts, columns = getattr(self, f"{name}_starts"), getattr(self, f"{name}_columns")
        index = UnitIndex(starts, columns, math.prod(self.shapes[name][1:]), outputs, inputs)
        return values.view(whole, inputs, outputs), index

    def _entries(self, name: str) -> Index:
        return Index(*(getattr(self, f"{name}_entry_{field}") for field in Index._fields))

    def nnz(self, name: str = "weight") -> int:
        """Active entries of a sparse weight."""
        # Asked several times in every training step, where looking up all fields of the layout would show.
        entries = self._buffers.get(f"{name}_entry_values")
        if entries is not None:
            return entries.numel()
        columns = self._buffers[f"{name}_columns"]
        assert columns is not None
        return columns.numel() * math.prod(self.units.get(name, ()))

    def topology(self, name: str = "weight") -> Topology:
        """The topology of a sparse weight."""
        starts, columns = getattr(self, f"{name}_starts"), getattr(self, f"{name}_columns")
        return Topology.trusted(self.shapes[name], starts, columns, self.units.get(name))

    def rewire(self, name: str, topology: Topology) -> None:
        """Replace the topology of a sparse weight, leaving its values where they are.

        Raises:
            ValueError: when it has another shape, other units, or more entries than the parameter has room for.
        """
        capacity, own = getattr(self, name).numel(), self.topology(name)
        if topology.unit != own.unit:
            raise ValueError(
                f"{name} is made of units of {by(own.unit)} entries, which a topology of units of "
                f"{by(topology.unit)} does not fit"
            )
        if topology.shape != own.shape or topology.nnz > capacity:
            raise ValueError(
                f"{name} has shape {self.shapes[name]} and room for {capacity:,} active entries, which a topology of "
                f"shape {topology.shape} with {topology.nnz:,} does not fit"
            )
        device = getattr(self, name).device
        for field, tensor in layout(topology, self.runs_on_units(topology)).items():
            setattr(self, f"{name}_{field}", tensor.to(device))

    def dense(self, name: str = "weight") -> Tensor:
        """The weight with its zeros, of its dense shape; differentiable."""
        topology = self.topology(name)
        values: Tensor = getattr(self, name)
        if topology.is_dense:
            return in_rows(topology.shape, topology.unit, values[: topology.nnz])
        flat = values.new_zeros(topology.numel)
        return flat.index_put((topology.entries.to(values.device),), values[: topology.nnz]).view(topology.shape)

    def product(self, name: str, x: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        """x W^T + bias, or x W + bias when `transposed`; x (..., features). A weight not in `shapes` is dense."""
        if name not in self.shapes:
            full = getattr(self, name)
            return nn.functional.linear(x, full.t() if transposed else full, bias)
        (values, index), key = self.operands(name), self.keys.get(name, 0)
        if index.nnz == index.rows * index.cols and not key:
            full = self._whole(name, values, index)
            return nn.functional.linear(x, full.t() if transposed else full, bias)
        return kernels.linear(x, values, bias, index, transposed=transposed, keep=key)

    def convolution(self, name: str, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The convolution of x (N, C, H, W) with a sparse weight, plus bias: (N, O, HO, WO)."""
        (values, index), key = self.operands(name), self.keys.get(name, 0)
        if index.nnz == index.rows * index.cols and not key:
            full = self._whole(name, values, index).view(index.rows, -1, *geometry.kernel)
            return nn.functional.conv2d(
                x, full, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
            )
        return kernels.conv(x, values, bias, index, geometry, keep=key)

    def transposed_convolution(self, name: str, x: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
        """The transpose of the convolution of `geometry` on x (N, I, H, W), without bias: (N, O, *size)."""
        (values, index), key = self.operands(name), self.keys.get(name, 0)
        assert isinstance(index, Index)
        if index.nnz == index.rows * index.cols and not key:
            full = self._whole(name, values, index).view(index.rows, -1, *geometry.kernel)
            least = geometry.smallest(x.shape[2], x.shape[3])
            extra = [n - m for n, m in zip(size, least, strict=True)]
            return nn.functional.conv_transpose2d(
                x, full, None, geometry.stride, geometry.padding, extra, geometry.groups, geometry.dilation
            )
        return kernels.conv_transpose(x, values, index, geometry, size, keep=key)

    def _whole(self, name: str, values: Tensor, index: Index | UnitIndex) -> Tensor:
        """A weight of which every entry is active, as the matrix (rows, cols), from what `operands` gives."""
        whole = self.dense(name) if isinstance(index, UnitIndex) else values[: index.nnz]
        return whole.view(index.rows, index.cols)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        strange: Any,
        errors: list[str],
    ) -> None:
        """Take on the saved topology of each weight before its values are read, whatever this module had."""
        for name, shape in self.shapes.items():
            starts, columns, unit = (state_dict.get(f"{prefix}{name}_{field}") for field in PERSISTENT)
            if starts is None and columns is None and unit is None:
                continue
            try:
                if starts is None or columns is None:
                    raise ValueError(f"{name}_starts and {name}_columns belong together, and one of them is not there")
                sizes = None if unit is None else tuple(map(int, unit.flatten().tolist()))
                self.rewire(name, Topology.from_rows(shape, starts, columns, sizes))
            except (ValueError, RuntimeError, TypeError, OverflowError) as error:
                errors.append(f"{prefix}{name}: {error}")
                # One of the buffers may fit by itself: reading it would tear the index apart.
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, strange, errors)

    def initialize(self, streams: Mapping[str, Stream]) -> None:
        """Draw the parameters named in `streams`, each from its stream, as the dense module draws its own.

        Of a sparse weight the active entries are drawn; its inert tail is zero.
        """
        with torch.no_grad():
            for name, stream in streams.items():
                flat = getattr(self, name).zero_().view(-1)
                size = self.nnz(name) if name in self.shapes else flat.numel()
                flat[:size] = self.initial(name)(stream, size)

    def _build(
        self,
        dense: nn.Module,
        density: float,
        seed: int | None,
        init: Init,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        out_axis: int = 0,
        structure: Units | None = None,
    ) -> None:
        """Become `dense`, which lies on the meta device and so costs nothing, with parameters drawn sparsely."""
        vars(self).update(vars(dense))
        self._begin()
        number = int(torch.randint(2**31, ())) if seed is None else seed
        dtype = dtype or torch.get_default_dtype()
        for name, parameter in list(dense.named_parameters()):
            stream = Stream(number, name, 0)
            if not name.startswith("weight"):
                drawn = self.initial(name)(stream, parameter.numel())
                self.register_parameter(name, nn.Parameter(drawn.to(device, dtype)))
                continue
            whole = Topology(tuple(parameter.shape))
            if structure is not None:
                sized = Shaped(name, whole.shape, whole, out_axis, 1 - out_axis)
                whole = Topology(whole.shape, unit=structure.box(sized))
            topology = sample(whole, density, stream)
            values = self.initial(name)(stream, topology.nnz)
            if init == "fan_in":
                values *= fan_in_scale(topology, out_axis)
            self.hold(name, nn.Parameter(values.to(device, dtype)), topology)

    def _describe(self) -> str:
        parts = []
        for name, shape in self.shapes.items():
            label = "" if name == "weight" else f"{name}: "
            unit = f" in units of {by(self.units[name])}" if name in self.units else ""
            parts.append(f"{label}{self.nnz(name):,} of {math.prod(shape):,} active{unit}")
        return ", ".join(parts)


def uniform(bound: float) -> Draw:
    """Draws from U(-bound, bound)."""
    return lambda stream, count: torch.from_numpy(stream.uniform(count)).mul_(2 * bound).sub_(bound)


def normal(std: float) -> Draw:
    """Draws from N(0, std^2), by the inverse of its distribution function."""
    return lambda stream, count: torch.erfinv(
        torch.from_numpy(stream.uniform(count)).add_(2.0**-54).mul_(2).sub_(1)
    ).mul_(std * math.sqrt(2))


def dense_type(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or the dense class that a sparse one stands for."""
    return module.dense_type if isinstance(module, SparseModule) else type(module)


def shape_of(module: nn.Module, weight: str) -> tuple[int, ...]:
    """The shape of a weight that `module` holds; of a sparse one, the shape with its zeros."""
    if isinstance(module, SparseModule) and weight in module.shapes:
        return module.shapes[weight]
    return tuple(getattr(module, weight).shape)


def nonzero(weight: Tensor) -> Topology:
    """The topology of the entries that are not zero."""
    return Topology(tuple(weight.shape), weight.detach().reshape(-1).nonzero().view(-1))


def zeros(stream: Stream, count: int) -> Tensor:
    """Zeros."""
    return torch.zeros(count, dtype=torch.float64)


def sample(whole: Topology, density: float, stream: Stream) -> Topology:
    """A uniformly random part of a dense topology with floor(density places + 1/2) units, in O(active).

    Raises:
        ValueError: when density lies outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must lie in [0, 1], got {density:g}")
    if density == 1:
        return whole
    return whole.at(torch.from_numpy(stream.subset(whole.places, math.floor(density * whole.places + 0.5))))
