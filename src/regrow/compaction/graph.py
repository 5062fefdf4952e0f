"""From a model to a graph of tensor operators: dense, in evaluation, each with one result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from regrow.nn import SparseModule

aten = torch.ops.aten

_TOLERANCE = 1e-5

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(example: Any) -> Arguments:
    """Positional and named arguments of a call of the model."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple) else ((example,), {})


def trace(model: nn.Module, example: Arguments, dynamic_shapes: Any, *, by: str) -> fx.GraphModule:
    """The graph of a dense `model` in evaluation, with copies of its parameters, for the function called `by`.

    Raises:
        ValueError: when torch.export cannot trace it.
    """
    args, kwargs = example
    if dynamic_shapes is None:
        dynamic_shapes = pytree.tree_map(_first_axis, args or kwargs)
    with evaluating(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own tracing, about torch's own functions
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            module = exported.run_decompositions({}).module(check_guards=False)
        except Exception as error:
            raise ValueError(
                f"{by} cannot trace {_where(model, error)} by torch.export, which says: {_first_line(error)}"
            ) from error
    assert isinstance(module, fx.GraphModule)
    graph = fx.GraphModule(module, module.graph)
    _name_shared_parameters(graph, model)
    _copy_parameters(graph)
    for node in graph.graph.nodes:
        node.meta = {"dynamic": _dynamic(node), "path": _path(node)}
    _simplify(graph)
    return graph


def _name_shared_parameters(graph: fx.GraphModule, model: nn.Module) -> None:
    """Give a parameter of several names the first that the model has."""
    first = {id(p): name for name, p in model.named_parameters()}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            owner, _, own = str(node.target).rpartition(".")
            name = first.get(id(getattr(graph.get_submodule(owner), own, None)))
            if name is not None and name != node.target:
                setattr(
                    graph.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], model.get_parameter(name)
                )
                node.target = name
    graph.delete_all_unused_submodules()


def _copy_parameters(module: nn.Module) -> None:
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            copied = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, tensor.requires_grad)
            setattr(part, name, copies.setdefault(id(tensor), copied))


def _first_axis(leaf: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None


@contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """The model, whose compressed modules are replaced by dense ones for as long as the context lasts."""
    if isinstance(model, SparseModule):
        yield model.to_dense()
        return
    sparse = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    sparse = [(parent, name, child) for parent, name, child in sparse if isinstance(child, SparseModule)]
    made = {id(child): child.to_dense() for _, _, child in sparse if isinstance(child, SparseModule)}
    try:
        for parent, name, child in sparse:
            setattr(parent, name, made[id(child)])
        yield model
    finally:
        for parent, name, child in sparse:
            setattr(parent, name, child)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, for as long as the context lasts."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(model: nn.Module, example: Arguments) -> list[Tensor]:
    """All tensors that a model answers with in evaluation."""
    args, kwargs = example
    with evaluating(model), torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def require_same(name: str, expected: list[Tensor], found: list[Tensor]) -> None:
    """Raise ValueError where outputs differ by more than rounding, after what the function called `name` did."""
    for one, other in zip(expected, found, strict=True):
        if not one.is_floating_point() or not one.numel():
            continue
        error, size = (float(t.nan_to_num().abs().max()) for t in (one - other, one))
        if error > max(torch.finfo(one.dtype).eps ** 0.5, _TOLERANCE) * max(size, 1.0):
            raise ValueError(
                f"{name} would change outputs of up to {size:.3g} by up to {error:.3g}, because an operator "
                "of it does not do what it declares: leave out the module that has it"
            )


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module whose code was running."""
    names = {module: name for name, module in model.named_modules()}
    found, trail = model, error.__traceback__
    while trail is not None:
        running = trail.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and running in names:
            found = running
        trail = trail.tb_next
    return f"{names[found] or 'the model'} ({type(found).__name__})"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _dynamic(node: fx.Node) -> tuple[bool, ...]:
    """Which axes of a tensor have a size that may vary."""
    value = node.meta.get("val")
    return tuple(not isinstance(n, int) for n in value.shape) if isinstance(value, Tensor) else ()


def _path(node: fx.Node) -> str:
    """The name of the module whose code made a node."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


# Fewer kinds of operators: what gives a tuple becomes slices, what asserts goes.


def _simplify(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _TUPLES:
            for user in list(node.users):
                _TUPLES[packet](module.graph, node, user)
        elif packet is aten.baddbmm and not node.kwargs:
            with module.graph.inserting_before(node):
                product = module.graph.call_function(aten.bmm.default, node.args[1:])
            product.meta = dict(node.meta)
            _replace(module.graph, node, aten.add.Tensor, (node.args[0], product))
        elif packet is not None and packet.__name__.startswith("_assert"):
            module.graph.erase_node(node)
    tidy(module)


def tidy(module: fx.GraphModule) -> None:
    """Forget nodes that nothing uses, then parameters that nothing reads."""
    for node in reversed(module.graph.nodes):  # fx itself keeps what may draw, as attention may
        if node.op in ("call_function", "get_attr") and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    module.delete_all_unused_submodules()
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_parameters(remove_duplicate=False)] + [
        n for n, _ in module.named_buffers()
    ]:
        if name not in read:
            owner, _, own = name.rpartition(".")
            delattr(module.get_submodule(owner), own)
    module.recompile()


def _replace(graph: fx.Graph, old: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(old):
        new = graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _batch_norm(graph: fx.Graph, node: fx.Node, item: fx.Node) -> None:
    if item.args[1] == 0:
        x, weight, bias, mean, var, momentum, eps = node.args
        _replace(graph, item, aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False))


def _slice(graph: fx.Graph, node: fx.Node, item: fx.Node) -> None:
    x, sizes, *rest = cast(tuple[Any, ...], node.args)
    axis, number = (rest[0] if rest else 0), item.args[1]
    assert isinstance(number, int)
    sizes = sizes if isinstance(sizes, list | tuple) else [sizes] * (number + 1)
    if all(isinstance(size, int) for size in sizes[: number + 1]):
        low = sum(sizes[:number])
        _replace(graph, item, aten.slice.Tensor, (x, axis, low, low + sizes[number]))


def _select(graph: fx.Graph, node: fx.Node, item: fx.Node) -> None:
    x, *rest = node.args
    _replace(graph, item, aten.select.int, (x, rest[0] if rest else 0, item.args[1]))


_TUPLES: dict[Any, Callable[[fx.Graph, fx.Node, fx.Node], None]] = {
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten.split: _slice,
    aten.split_with_sizes: _slice,
    aten.unbind: _select,
}
