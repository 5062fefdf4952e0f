"""Pairs of a dense module with zeros and the sparse one with the same values, and what must be equal in both."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.topology import Topology
from regrow.nn import SparseModule, kind_of, sparse_class


def topology(shape: tuple[int, ...], density: float, outputs: int = 1) -> Topology:
    """Each unit of `outputs` rows active by chance, from torch's generator."""
    whole = Topology(shape, unit=(outputs, *[1] * (len(shape) - 1)))
    return whole.at((torch.rand(whole.grid) < density).view(-1).nonzero().view(-1))


def sparsified(
    dense: nn.Module, density: float, names: Sequence[str] | None = None, room: int = 0, outputs: int = 1
) -> SparseModule:
    """A sparse copy of `dense`, which gets zeros where no unit is active; `room` is left for more entries."""
    cls, kind = sparse_class(dense), kind_of(type(dense))
    assert cls is not None and kind is not None
    weights = {}
    for name in kind.weights_of(dense) if names is None else names:
        parameter = getattr(dense, name)
        at = topology(tuple(parameter.shape), density, outputs)
        with torch.no_grad():
            parameter *= at.mask
        values = torch.cat([parameter.detach().view(-1)[at.entries], parameter.new_zeros(room)])
        weights[name] = nn.Parameter(values), at
    return cls.adopt(copy.deepcopy(dense), weights)


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []


def gradients(module: nn.Module, dense: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, gradient, what it must be) of every parameter of a sparse `module`, from its dense twin's gradients."""
    theirs = dict(dense.named_parameters())
    shapes = {
        f"{path}.{name}".removeprefix("."): (m, name)
        for path, m in module.named_modules()
        if isinstance(m, SparseModule)
        for name in m.shapes
    }
    for name, parameter in module.named_parameters():
        expected = theirs[name].grad
        if expected is not None and name in shapes:
            owner, own = shapes[name]
            at = owner.topology(own)
            room = expected.new_zeros(parameter.numel() - at.nnz)
            expected = torch.cat([expected.reshape(-1)[at.entries], room])
        if parameter.grad is None or expected is None:
            assert parameter.grad is None and expected is None, name
        else:
            yield name, parameter.grad, expected


def assert_equal(sparse: nn.Module, dense: nn.Module, *args: Any, rtol: float = 1e-9, **options: Any) -> None:
    """Outputs, gradients of all inputs and gradients of all parameters are equal."""
    runs = []
    for module in (dense, sparse):
        leaves: list[Tensor] = []
        own = _with_gradients(args, {}, leaves)
        module.zero_grad()
        torch.manual_seed(1)
        outputs = tensors(module(*own, **options))
        torch.manual_seed(2)
        # Of one layout for both, so that random numbers fall on the same entries.
        sum((o * torch.randn(o.shape).to(o)).sum() for o in outputs).backward()
        runs.append((outputs, leaves))
    (expected, theirs), (got, ours) = runs
    assert len(expected) == len(got)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=rtol, atol=rtol)
    for name, mine, other in gradients(sparse, dense):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


def _with_gradients(value: Any, copies: dict[int, Tensor], leaves: list[Tensor]) -> Any:
    """`value` with its tensors as leaves that take gradients; one tensor stays one tensor."""
    if isinstance(value, Tensor) and value.is_floating_point():
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone().requires_grad_()
            leaves.append(copies[id(value)])
        return copies[id(value)]
    if isinstance(value, tuple | list):
        parts = [_with_gradients(v, copies, leaves) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
