"""How long a training step of a layer takes on this machine: dense, and where only active entries are multiplied.

Candidates are timed in turn, in one process, in rounds: whatever slows the machine for a while slows all of them, so
the ratio within a round is steadier than any time, and the median over rounds is what counts.
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from timeit import Timer
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regrow import kernels
from regrow.core.topology import Topology
from regrow.nn import from_dense
from regrow.nn.kinds import read_children

ROUNDS = 7
SAMPLE = 0.01
"""Seconds that a sample lasts at least: shorter steps are repeated."""

Topologies = Mapping[str, Topology]
"""What is active in each sparse weight of a module, by parameter."""

Maker = Callable[[nn.Module, Topologies], nn.Module]
"""What makes a layer that computes with active entries only: (dense module, what is active) -> module."""


@dataclass(frozen=True)
class Race:
    """Seconds of a layer's training step, forward and backward, by candidate: one sample per round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> float:
        """The median of a candidate's seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str = "dense") -> float:
        """The median over rounds of a candidate's time divided by the reference's.

        Examples:
            >>> Race({"dense": [1.0, 2.0, 8.0], "compressed": [0.5, 0.5, 2.0]}).ratio("compressed")
            0.25
        """
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(own / other for own, other in pairs)


def race(
    module: nn.Module, topologies: Topologies, call: Call, candidates: Mapping[str, Maker], rounds: int = ROUNDS
) -> Race:
    """The seconds of a training step of `module`, dense and as each of `candidates`.

    The module, its gradients and the random state are left as they are.

    Args:
        module: dense.
        topologies: what is active.
        call: what it is called with.
        candidates: what it is compared with.
        rounds: samples of each.
    """
    bare = without_hooks(module)
    with torch.enable_grad(), torch.random.fork_rng():
        layers = {"dense": copy.deepcopy(bare)}
        layers |= {name: make(bare, topologies) for name, make in candidates.items()}
        gradient = torch.randn_like(outputs(layers["dense"], call))
        steps = {name: _training(layer, call, gradient) for name, layer in layers.items()}
        return Race(interleave(steps, rounds))


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, once: bool = False
) -> dict[str, list[float]]:
    """The seconds of every step in every round, in an order that rotates.

    A step runs untimed directly before it is timed: candidates with threads of their own otherwise share the cores with
    those of the one before, which spin for a while before they sleep.

    Args:
        steps: what is timed, by name.
        rounds: how many samples each gets.
        once: exactly one call of every step per round, nothing repeated, for steps that change state.
    """
    timers = {name: Timer(step) for name, step in steps.items()}
    repeats = dict.fromkeys(steps, 1)
    if not once:
        for name, timer in timers.items():
            timer.timeit(1)
            repeats[name] = math.ceil(SAMPLE / timer.timeit(1))
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if not once:
                timers[name].timeit(repeats[name])
            seconds[name].append(timers[name].timeit(repeats[name]) / repeats[name])
    return seconds


def _training(layer: nn.Module, call: Call, gradient: Tensor) -> Callable[[], object]:
    """Forward and backward, to the inputs that need a gradient and to all parameters."""
    layer.train()
    leaves = [t for t in (*_tensors((call.args, call.kwargs)), *layer.parameters()) if t.requires_grad]

    def step() -> object:
        # Forward alone, since a module's hooks are not its own work.
        output = _first(layer.forward(*call.args, **call.kwargs))
        return torch.autograd.grad(output, leaves, gradient, allow_unused=True) if leaves else output

    return step


@torch.no_grad()
def outputs(layer: nn.Module, call: Call) -> Tensor:
    """The first tensor of what a layer returns."""
    return _first(layer.forward(*call.args, **call.kwargs))


def _first(output: Any) -> Tensor:
    """The first tensor of what a module returns, which is where the gradient arrives."""
    if isinstance(output, PackedSequence):
        return output.data
    return output if isinstance(output, Tensor) else _first(output[0])


def without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy to be copied deeply: hooks may reach far beyond the module."""
    bare = copy.copy(module)
    for name, value in vars(bare).items():
        if "_hooks" in name and isinstance(value, dict):
            setattr(bare, name, type(value)())
    return bare


# What a module is called with


class Call(NamedTuple):
    """The arguments of a module; those that a gradient flows to are leaves that require one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls(model: nn.Module, example: Any, modules: Iterable[nn.Module]) -> dict[nn.Module, Call]:
    """What each of `modules` is called with when `model` runs once on `example`; of several calls the largest.

    The model runs in evaluation mode, without gradients and uncompiled, and is left as it was, buffers and random state
    included. A module that is not reached is missing from the result.

    Args:
        model: any module.
        example: a tensor, or a tuple or dict of the model's arguments; those that require a gradient count as needing
            one.
        modules: dense modules within the model.
    """
    wanted = set(modules)
    given = {t.untyped_storage().data_ptr() for t in _tensors(example) if not t.requires_grad}
    found: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        copies: dict[int, Tensor] = {}
        for name, value in bound.arguments.items():
            bound.arguments[name] = _leaves(value, given, copies, "mask" not in name)
        call = Call(bound.args, bound.kwargs)
        if module not in found or _size(call) > _size(found[module]):
            found[module] = call

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in wanted:
            note(module, args, kwargs)
        for child in read_children(module):
            if child in wanted:
                note(child, (_first(output),), {})

    watched = [m for m in model.modules() if m in wanted or read_children(m)]
    with _as_it_was(model):
        handles = [m.register_forward_hook(record, with_kwargs=True) for m in watched]
        try:
            args, kwargs = _arguments(example)
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return found


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, run without gradients, uncompiled and module by module; restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    # Nothing is compiled before this module is imported, and importing it for nothing takes a second.
    has_compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if has_compiled else nullcontext()
    # Fused encoder layers call none of their parts.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                setattr(module, name, buffer.copy_(values))
        for module, mode in modes:
            module.training = mode


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple) and not isinstance(example, PackedSequence):
        return example, {}
    return (example,), {}


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _leaves(value: Any, given: Container[int], copies: dict[int, Tensor], differentiable: bool) -> Any:
    """`value` with tensors of its own, sharing memory; one tensor stays one."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            needed = differentiable and value.is_floating_point() and value.untyped_storage().data_ptr() not in given
            copies[id(value)] = value.detach().requires_grad_(needed)
        return copies[id(value)]
    if isinstance(value, PackedSequence):
        return value._replace(data=_leaves(value.data, given, copies, differentiable))
    if isinstance(value, (tuple, list)):
        parts = [_leaves(part, given, copies, differentiable) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _size(call: Call) -> int:
    return sum(t.numel() for t in _tensors(call))


def alike(module: nn.Module, topologies: Topologies, call: Call) -> Hashable:
    """What is equal for two layers that take equally long."""
    settings = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
    weights = [(name, p.shape, p.dtype, p.stride(), p.requires_grad) for name, p in module.named_parameters()]
    inputs = [(t.shape, t.dtype, t.stride(), t.requires_grad) for t in _tensors(call)]
    return repr((type(module), settings, weights, inputs, [(name, t.unit, t.nnz) for name, t in topologies.items()]))


# What is compared


def compressed(module: nn.Module, topologies: Topologies) -> nn.Module:
    """The sparse form of a dense `module` that has one."""
    return from_dense(module, topologies)


def masked(module: nn.Module, topologies: Topologies) -> nn.Module:
    """A copy of a dense `module` with zeros outside its topologies."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name, topology in topologies.items():
            twin.get_parameter(name).mul_(topology.mask)
    return twin


class _CSRProduct(torch.autograd.Function):
    """A linear layer's three products, each through the fastest that torch.sparse has for it.

    Torch's own backward of a CSR product transposes the weight anew, or multiplies with a CSC one, each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: CSRLinear) -> Tensor:
        """x (batch, in) -> (batch, out)."""
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return (layer.matrix(values) @ x.t().contiguous()).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Gradients of inputs and values."""
        x, values = ctx.saved_tensors
        columns = dy.t().contiguous()
        dx = (ctx.layer.transposed(values) @ columns).t() if ctx.needs_input_grad[0] else None
        pattern = ctx.layer.matrix(values)
        return dx, torch.sparse.sampled_addmm(pattern, columns, x, beta=0.0).values(), None


class CSRLinear(nn.Module):
    """A linear layer by torch.sparse at its best: CSR of the weight and of its transpose.

    Args:
        weight: dense, (out, in).
        topology: its active entries.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, topology: Topology, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        topology, _ = topology.by_entries()
        index = kernels.index(topology)
        self.shape = topology.shape
        self.rows = index.starts.to(index.columns.dtype), index.columns
        self.columns = index.t_starts.to(index.columns.dtype), index.t_rows
        self.order = index.order.long()
        self.values = nn.Parameter(weight.detach().reshape(-1)[topology.indices])
        self.bias = bias

    def matrix(self, values: Tensor) -> Tensor:
        """The weight with `values` (nnz,)."""
        return torch.sparse_csr_tensor(*self.rows, values, self.shape, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        turned = values[self.order]
        return torch.sparse_csr_tensor(*self.columns, turned, self.shape[::-1], check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in this layout."""
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _CSRProduct.apply(flat, self.values, self).contiguous()  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])


def torch_sparse(module: nn.Module, topologies: Topologies) -> nn.Module:
    """A dense `nn.Linear` by torch.sparse."""
    assert isinstance(module, nn.Linear)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        layer = CSRLinear(module.weight, topologies["weight"], copy.deepcopy(module.bias))
        # Torch says so of the first one only.
        layer.matrix(layer.values)
    return layer
