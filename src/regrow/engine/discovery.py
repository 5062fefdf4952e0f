"""Which parameters of a model are sparsified, by module type, and which are left out and why.

Sparsified: the weights that the rows of `regrow.nn` name: of Linear, Bilinear, Conv, ConvTranspose, recurrent and
attention modules, transformers' Conv1D and stacked experts, registered types, and what `also` declares. Never: biases,
norm parameters, embeddings, depthwise convolutions. A tied parameter counts once. Every other parameter that has two
axes of more than one is listed with the reason why it stays dense, so that nothing does unsaid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from regrow.core.names import canonical, canonical_names, matches
from regrow.core.text import some
from regrow.nn import Axes, SparseModule, kind_of, stacked_experts

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
    """A parameter that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str
    in_budget: bool
    """Whether it counts in budget="model": weights do, those shared with an embedding do not."""


def find(
    model: nn.Module,
    skip: Selector | Sequence[Selector] = (),
    only: Selector | Sequence[Selector] | None = None,
    also: Mapping[str, Axes] | None = None,
) -> tuple[list[Found], list[Excluded]]:
    """The parameters of `model` to sparsify, in module order, and those left out.

    Args:
        model: its parameters.
        skip: what stays dense.
        only: what is sparsified at all; None is all.
        also: parameters that no row knows, by name or glob, and how they are read.

    Raises:
        ValueError: when a selector or name matches nothing, or nothing is left to sparsify.
    """
    candidates = _candidates(model, also or {})
    others = _others(model, {id(c.parameter) for c in candidates})
    skips, onlys = _as_list(skip), None if only is None else _as_list(only)
    everything: list[Found | _Other] = [*candidates, *others]
    for selector in skips:
        if not any(_selects(selector, each) for each in everything):
            names = some([each.name for each in everything])
            raise ValueError(f"{selector!r} in skip= matches none of the weights: {names}")
    for selector in onlys or ():
        if not any(_selects(selector, c) for c in candidates):
            known = any(_selects(selector, c) for c in others)
            way_out = "; declare how it is read with also=" if known else ""
            names = some([c.name for c in candidates])
            raise ValueError(f"{selector!r} in only= matches none of the sparsifiable weights: {names}{way_out}")
    owners = _owners(model, candidates)
    found, excluded = [], [*_reparametrized(model), *_already_sparse(model)]
    for c in candidates:
        reason = _reason(c, skips, onlys, owners.get(id(c.parameter)))
        if reason is None:
            found.append(c)
        else:
            in_budget = id(c.parameter) not in owners
            excluded.append(Excluded(c.name, tuple(c.parameter.shape), c.parameter.numel(), reason, in_budget))
    for o in others:
        reason = "skipped" if any(_selects(s, o) for s in skips) else o.reason
        excluded.append(Excluded(o.name, tuple(o.parameter.shape), o.parameter.numel(), reason, o.in_budget))
    if not found:
        why = some([f"{e.name}: {e.reason}" for e in excluded], "; ") or "it has no weight of a type that is known"
        raise ValueError(
            f"nothing to sparsify in {type(model).__name__} ({why}): declare a parameter of your own with also=, or a "
            "type with regrow.nn.register"
        )
    return found, excluded


def _as_list(selectors: Selector | Sequence[Selector]) -> list[Selector]:
    return [selectors] if isinstance(selectors, (str, type)) or callable(selectors) else list(selectors)


def _selects(selector: Selector, found: Found | _Other) -> bool:
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


def _candidates(model: nn.Module, also: Mapping[str, Axes]) -> list[Found]:
    """Every parameter of which it is known how it is read."""
    names = canonical_names(name for name, _ in model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    candidates, used = [], set()
    for path, module in model.named_modules():
        known = dict(_weights_of(module))
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names[f"{path}.{attribute}" if path else attribute]
            for pattern, axes in also.items():
                if attribute not in known and (pattern == name or matches(pattern, name)):
                    used.add(pattern)
                    known[attribute] = axes
        for attribute, axes in known.items():
            parameter = getattr(module, attribute, None)
            if not isinstance(parameter, nn.Parameter):
                continue
            holders.setdefault(id(parameter), []).append((module, attribute))
            if len(holders[id(parameter)]) > 1:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{path}.{attribute} has no shape yet: run one batch through the lazy module first")
            name = names[f"{path}.{attribute}" if path else attribute]
            _require_shape(name, tuple(parameter.shape), axes)
            blocks = axes.blocks_of(parameter)
            candidates.append(Found(name, parameter, module, (), blocks, axes.outputs, axes.inputs))
    for pattern in also:
        if pattern not in used:
            unknown = some([name for name in names.values() if not any(name == c.name for c in candidates)])
            raise ValueError(f"{pattern!r} in also= matches no parameter that is not known already: {unknown}")
    return [replace(c, holders=tuple(holders[id(c.parameter)])) for c in candidates]


def _weights_of(module: nn.Module) -> Iterator[tuple[str, Axes]]:
    """Every weight that a module's kind declares, and how it is read."""
    kind = kind_of(type(module))
    if kind is not None:
        for attribute, blocks in kind.weights_of(module).items():
            yield attribute, Axes(kind.out_axis, kind.in_axis, blocks)
    else:
        yield from stacked_experts(module).items()


def _require_shape(name: str, shape: tuple[int, ...], axes: Axes) -> None:
    """Raise ValueError unless the parameter has the axes and blocks that its row or declaration says."""
    blocks = 1 if axes.blocks is None else axes.blocks
    apart = axes.outputs != axes.inputs and min(axes.outputs, axes.inputs) >= (axes.blocks is None)
    if not apart or max(axes.outputs, axes.inputs) >= len(shape) or blocks < 1 or shape[0] % blocks:
        raise ValueError(
            f"{name} has shape {shape}, and the row of its module in regrow.nn or also= says that axis {axes.outputs} "
            f"counts outputs and axis {axes.inputs} inputs in {'stacked' if axes.blocks is None else blocks} blocks"
        )


class _Other(NamedTuple):
    """A parameter of which it is not known how it is read, or that it is no weight."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    reason: str
    in_budget: bool

    @property
    def names(self) -> list[str]:
        return []


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _others(model: nn.Module, known: set[int]) -> list[_Other]:
    """Every parameter with two axes or more, of more than one each, that is not among the `known` (ids)."""
    seen, others = set(known), []
    for path, module in model.named_modules():
        if isinstance(module, (SparseModule, parametrize.ParametrizationList)):
            continue
        # What weight norm and its like keep in the place of a weight, which is listed itself.
        computed = {a for a, _ in _weights_of(module) if not isinstance(getattr(module, a, None), nn.Parameter)}
        for attribute, parameter in module.named_parameters(recurse=False):
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if id(parameter) in seen or lazy or sum(n > 1 for n in parameter.shape) < 2 or _stem(attribute) in computed:
                continue
            seen.add(id(parameter))
            reason, counts = _why_other(module, attribute)
            others.append(
                _Other(canonical(f"{path}.{attribute}" if path else attribute), parameter, module, reason, counts)
            )
    return others


def _stem(attribute: str) -> str:
    return attribute.rpartition("_")[0]


def _why_other(module: nn.Module, attribute: str) -> tuple[str, bool]:
    """Why a parameter stays dense of which no row says that it is a weight, and whether the budget counts it."""
    if isinstance(module, _EMBEDDINGS):
        return "embedding", False
    if isinstance(module, _NORMS):
        return "norm", False
    if kind_of(type(module)) is not None:
        return "no weight", False
    return f"in an unknown {type(module).__name__}", True


def _reparametrized(model: nn.Module) -> list[Excluded]:
    """Weights that are computed from other parameters, as weight norm does: they cannot be zero by themselves."""
    excluded = []
    for path, module in model.named_modules():
        for attribute, _ in _weights_of(module):
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
    held = {(id(module), attribute) for c in candidates for module, attribute in c.holders}
    owners = {}
    for path, module in model.named_modules():
        declared = {attribute for attribute, _ in _weights_of(module)}
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in wanted and (id(module), attribute) not in held and attribute not in declared:
                owners[id(parameter)] = canonical(f"{path}.{attribute}" if path else attribute)
    return owners
