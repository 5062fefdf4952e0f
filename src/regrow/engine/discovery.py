"""Which parameters of a model are sparsified, by module type, and which are left out and why.

Sparsified: the weights that the rows of `regrow.nn` name: of Linear, Bilinear, Conv, ConvTranspose, recurrent and
attention modules, transformers' Conv1D and registered types. Never: biases, norm parameters, embeddings, depthwise
convolutions. A tied parameter counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from regrow.core.names import canonical, canonical_names, matches
from regrow.nn import SparseModule, kind_of

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A parameter or module name or glob, a module type, or a predicate of (canonical parameter name, module)."""


@dataclass(frozen=True)
class Found:
    """A sparsifiable parameter and how its entries are to be read."""

    name: str
    """Canonical: without the `module.` and `_orig_mod.` of wrappers."""
    parameter: nn.Parameter
    module: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]
    """Every module of a sparsifiable type that holds the parameter, with the name it has there."""
    blocks: int = 1
    """Equal blocks of leading rows that are weights of their own: 3 in a packed attention projection."""
    out_axis: int = 0
    in_axis: int = 1

    @property
    def names(self) -> list[str]:
        """The names of its weights."""
        return [self.name] if self.blocks == 1 else [f"{self.name}[{i}]" for i in range(self.blocks)]


@dataclass(frozen=True)
class Excluded:
    """A parameter of a sparsifiable type that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str
    in_budget: bool
    """Whether it counts in budget="model": weights do, those shared with an embedding do not."""


def find(
    model: nn.Module, skip: Selector | Sequence[Selector] = (), only: Selector | Sequence[Selector] | None = None
) -> tuple[list[Found], list[Excluded]]:
    """The parameters of `model` to sparsify, in module order, and those left out.

    Raises:
        ValueError: when a selector matches nothing, or nothing is left to sparsify.
    """
    candidates = _candidates(model)
    skips, onlys = _as_list(skip), None if only is None else _as_list(only)
    for selector in (*skips, *(onlys or ())):
        if not any(_selects(selector, c) for c in candidates):
            names = ", ".join(c.name for c in candidates) or "none"
            raise ValueError(f"{selector!r} matches none of the sparsifiable weights: {names}")
    owners = _owners(model, candidates)
    found, excluded = [], [*_reparametrized(model), *_already_sparse(model)]
    for c in candidates:
        reason = _reason(c, skips, onlys, owners.get(id(c.parameter)))
        if reason is None:
            found.append(c)
        else:
            in_budget = id(c.parameter) not in owners
            excluded.append(Excluded(c.name, tuple(c.parameter.shape), c.parameter.numel(), reason, in_budget))
    if not found:
        why = (
            "; ".join(f"{e.name}: {e.reason}" for e in excluded)
            or "it has no Linear, Conv, recurrent or attention weight, and regrow.nn.register adds types of your own"
        )
        raise ValueError(f"nothing to sparsify in {type(model).__name__}: {why}")
    return found, excluded


def _as_list(selectors: Selector | Sequence[Selector]) -> list[Selector]:
    return [selectors] if isinstance(selectors, (str, type)) or callable(selectors) else list(selectors)


def _selects(selector: Selector, found: Found) -> bool:
    if isinstance(selector, str):
        return matches(selector, found.name) or any(matches(selector, n) for n in found.names)
    if isinstance(selector, type):
        return isinstance(found.module, selector)
    return selector(found.name, found.module)


def _reason(found: Found, skips: list[Selector], onlys: list[Selector] | None, other_owner: str | None) -> str | None:
    if any(_selects(s, found) for s in skips):
        return "skipped"
    if onlys is not None and not any(_selects(s, found) for s in onlys):
        return "not among only="
    if other_owner is not None:
        return f"shared with {other_owner}"
    kind = kind_of(type(found.module))
    if kind is not None and (why := kind.left_out(found.module)) is not None:
        return why
    if not found.parameter.requires_grad or found.parameter.numel() == 0:
        return "frozen" if found.parameter.numel() else "empty"
    return None


def _candidates(model: nn.Module) -> list[Found]:
    names = canonical_names(name for name, _ in model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    candidates = []
    for path, module in model.named_modules():
        for attribute, blocks, out_axis, in_axis in _weights_of(module):
            parameter = getattr(module, attribute, None)
            if not isinstance(parameter, nn.Parameter):
                continue
            holders.setdefault(id(parameter), []).append((module, attribute))
            if len(holders[id(parameter)]) > 1:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{path}.{attribute} has no shape yet: run one batch through the lazy module first")
            name = names[f"{path}.{attribute}" if path else attribute]
            candidates.append(Found(name, parameter, module, (), blocks, out_axis, in_axis))
            _require_shape(candidates[-1])
    return [replace(c, holders=tuple(holders[id(c.parameter)])) for c in candidates]


def _weights_of(module: nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """(attribute, blocks, output axis, input axis) of every weight that a module's kind declares."""
    kind = kind_of(type(module))
    if kind is not None:
        for attribute, blocks in kind.weights_of(module).items():
            yield attribute, blocks, kind.out_axis, kind.in_axis


def _require_shape(found: Found) -> None:
    """Raise ValueError unless the parameter has the axes and blocks that the row of its module's kind says."""
    shape = tuple(found.parameter.shape)
    if max(found.out_axis, found.in_axis) >= len(shape) or shape[0] % found.blocks:
        raise ValueError(
            f"{found.name} has shape {shape}, and the row of its module in regrow.nn says that it has axes "
            f"{found.out_axis} and {found.in_axis} and {found.blocks} equal blocks of rows"
        )


def _reparametrized(model: nn.Module) -> list[Excluded]:
    """Weights that are computed from other parameters, as weight norm does: they cannot be zero by themselves."""
    excluded = []
    for path, module in model.named_modules():
        for attribute, *_ in _weights_of(module):
            value = getattr(module, attribute, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                shape = tuple(value.shape)
                name = canonical(f"{path}.{attribute}" if path else attribute)
                excluded.append(Excluded(name, shape, math.prod(shape), "reparametrized", True))
    return excluded


def _already_sparse(model: nn.Module) -> list[Excluded]:
    """Weights of sparse modules, which have a topology already."""
    return [
        Excluded(canonical(f"{path}.{name}" if path else name), shape, math.prod(shape), "already sparse", False)
        for path, module in model.named_modules()
        if isinstance(module, SparseModule)
        for name, shape in module.shapes.items()
    ]


def _owners(model: nn.Module, candidates: list[Found]) -> dict[int, str]:
    """Parameters that a module which does not sparsify them owns too: id -> that module's name."""
    wanted = {id(c.parameter) for c in candidates}
    owners = {}
    for path, module in model.named_modules():
        declared = {attribute for attribute, *_ in _weights_of(module)}
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in wanted and attribute not in declared:
                owners[id(parameter)] = canonical(f"{path}.{attribute}" if path else attribute)
    return owners
