"""Gradients over several batches, leaving no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from regrow.core import selection
from regrow.core.method import Method, Probe
from regrow.core.names import canonical_names
from regrow.core.topology import Topology
from regrow.storage.stored import Draft

T = TypeVar("T")

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


@dataclass(frozen=True)
class Nothing:
    """The start reads no gradient."""


@dataclass(frozen=True)
class FirstStep:
    """The start reads the gradient of the first training step, whose place it takes."""


@dataclass(frozen=True)
class Batches:
    """The start reads gradients of batches, before training.

    Args:
        batches: data.
        loss: (model, batch) -> scalar, a mean over the batch.
        asked: whether the start asks for gradients at topologies that it only tries, instead of reading one mean.
    """

    batches: Iterable[Any]
    loss: Loss
    asked: bool


Source = Nothing | FirstStep | Batches
"""Where a start gets its gradients."""


def source_of(method: Method, batches: Iterable[Any] | None, loss: Loss | None) -> Source:
    """Where the start of `method` gets its gradients.

    Raises:
        ValueError: when `batches` and `loss` are missing, one without the other, or given to a start that reads none.
    """
    reads, asks = method.start.needs_gradient, method.start.needs_batches
    if (batches is None) != (loss is None):
        raise ValueError("batches= and loss= belong together: give both or neither")
    if batches is None or loss is None:
        if asks:
            raise ValueError(
                f"{method.name} asks for several gradients before training: give batches= and loss= to regrow.sparsify"
            )
        return FirstStep() if reads else Nothing()
    if not (reads or asks):
        raise ValueError(f"{method.name} reads no gradient at its start: leave out batches= and loss=")
    return Batches(batches, loss, asks)


@contextmanager
def asking(source: Nothing | Batches, model: nn.Module, drafts: Sequence[Draft]) -> Iterator[Probe]:
    """Within the context a start finds its gradients: in `grad` of the parameters, or by asking the probe.

    Raises:
        ValueError: when a gradient in `grad` is not finite; from `mean_gradient` and `BatchProbe`.
    """
    if isinstance(source, Nothing):
        yield NoProbe()
    elif source.asked:
        yield BatchProbe(model, [(d.parameter, len(d.weights)) for d in drafts], source.batches, source.loss)
    else:
        with mean_gradient(model, [d.parameter for d in drafts], source.batches, source.loss):
            for draft in drafts:
                draft.gradient.require_finite()
            yield NoProbe()


@contextmanager
def mean_gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss
) -> Iterator[None]:
    """Within the context `grad` of `parameters` is the mean over `batches` of the gradient of `loss`.

    On several ranks it is the mean over the batches of all. Afterwards all gradients, all buffers (running statistics
    of batch norm), the modes of all modules and the random state are as before.

    Raises:
        ValueError: when `batches` is empty, or a part of the model has no values to take a gradient at.
    """
    with _untouched(model):
        means = _mean(model, parameters, batches, lambda batch: _gradient(loss(model, batch), parameters))
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = None if mean is None else mean.to(parameter.dtype)
        yield


class BatchProbe:
    """A `Probe` over `batches`, which is iterated anew at every question but `flow`, which reads the first once.

    On several ranks means are over the batches of all. A packed parameter is as many weights as it has blocks.

    Args:
        model: left as it was by every question.
        parameters: each sparsified parameter with the number of equal blocks of leading rows that are its weights.
        batches: data, such as a list or a `DataLoader`; no iterator, which could be read only once.
        loss: (model, batch) -> scalar, a mean over the batch.

    Raises:
        ValueError: when `batches` is an iterator; from every question, when a part of the model has no values, a weight
            is not reached, or a result is not finite, naming the weight.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[tuple[nn.Parameter, int]], batches: Iterable[Any], loss: Loss
    ) -> None:
        if isinstance(batches, Iterator):
            raise ValueError("batches= is read several times here, and an iterator can be read once: give a list of it")
        # Compiled code has no second derivative, and would be compiled anew in double precision.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.parameters = list(parameters)
        self.batches = batches
        self.loss = loss
        self._ones: tuple[Any, Any] | None = None

    def gradients(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """The mean gradient at every position, (numel,) of each weight, weights being zero outside `topologies`."""
        own = [p for p, _ in self.parameters]
        with _untouched(self.model), _zero_outside(self._of_parameters(topologies)):
            means = _mean(self.model, own, self.batches, lambda batch: _gradient(self.loss(self.model, batch), own))
        return self._of_weights(means, "gradient of the loss over batches=")

    def curvature(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times `vectors`, (numel,) of each weight, both."""
        own = [p for p, _ in self.parameters]
        along = [torch.cat(parts).view(p.shape) for p, parts in self._of_parameters(vectors)]
        with _untouched(self.model), _twice_differentiable():
            means = _mean(
                self.model, own, self.batches, lambda batch: _curvature(self.loss(self.model, batch), own, along)
            )
        # Where the gradient does not depend on a weight its curvature is zero.
        known = [torch.zeros_like(v) if m is None else m for m, v in zip(means, along, strict=True)]
        return self._of_weights(known, "curvature of the loss over batches=")

    def flow(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """The gradient of the summed outputs for an input of ones, (numel,) float64 of each weight.

        Every parameter is replaced by its absolute value, the model is in evaluation mode and in double precision. All
        outputs that are no scalars are summed (or the scalar, if there is nothing else), and all floating-point inputs
        are ones, of the shapes that the first batch has.

        Raises:
            ValueError: as from the other questions; when `batches` is empty, `loss` does not call the model, or the
                model has no floating-point input.
        """
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        with _untouched(self.model), torch.random.fork_rng(_gpus(model)), torch.enable_grad():
            if self._ones is None:
                self._ones = _input_of_ones(model, lambda: self.loss(self.model, _first(self.batches)))
            args, kwargs = self._ones
            model.eval()
            with _zero_outside(self._of_parameters(topologies)), _absolute_doubles(model) as copies:
                own = [copies[p] for p, _ in self.parameters]
                grads = _gradient(_summed(model(*args, **kwargs)), own)
            # Batches, and with them the sums, may differ from rank to rank.
            means = _over_ranks(own, [None if g is None else _wide(g) for g in grads], 1)
        return self._of_weights(means, "flow of an input of ones")

    def _of_parameters(self, each: Sequence[T]) -> list[tuple[nn.Parameter, list[T]]]:
        """What there is for `each` weight, parameter by parameter."""
        items = iter(each)
        return [(p, [next(items) for _ in range(blocks)]) for p, blocks in self.parameters]

    def _of_weights(self, results: Sequence[Tensor | None], what: str) -> list[Tensor]:
        """The results of the parameters as those of their weights, (numel,) each."""
        found: list[Tensor] = []
        for (parameter, blocks), result in zip(self.parameters, results, strict=True):
            if result is None:
                raise ValueError(
                    f"{self._name(parameter)}: no {what} reaches it: give batches and a loss that do, or leave it "
                    "dense with skip="
                )
            for i, part in enumerate(result.reshape(blocks, -1).unbind()):
                if not selection.is_finite(part):
                    name = self._name(parameter) + (f"[{i}]" if blocks > 1 else "")
                    bad = int((~part.isfinite()).sum())
                    raise ValueError(
                        f"{name}: {bad:,} of {part.numel():,} entries of the {what} are not finite: look for values or "
                        "data that are not, or scale them down"
                    )
                found.append(part)
        return found

    def _name(self, parameter: nn.Parameter) -> str:
        held = next(name for name, p in self.model.named_parameters() if p is parameter)
        return canonical_names(name for name, _ in self.model.named_parameters())[held]


class NoProbe:
    """The `Probe` of a start without batches, which is never asked."""

    def gradients(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """Raise ValueError."""
        raise ValueError(_NO_BATCHES)

    def curvature(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Raise ValueError."""
        raise ValueError(_NO_BATCHES)

    def flow(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """Raise ValueError."""
        raise ValueError(_NO_BATCHES)


_NO_BATCHES = "this start asks for gradients: declare Start(needs_batches=True), and give batches= and loss="
_EMPTY = "batches= is empty: give at least one batch"


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes and `requires_grad` are as before afterwards; within there are no gradients."""
    _require_values(model)
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for module, name, buffer, values in buffers:
            setattr(module, name, buffer.copy_(values))
        for parameter, grad, requires_grad in parameters:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        for module, mode in modes:
            module.training = mode


def _mean(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Any],
    of_batch: Callable[[Any], Sequence[Tensor | None]],
) -> list[Tensor | None]:
    """The mean over all batches of what each gives for `parameters`, in float32 at least; one graph at a time."""
    sums: list[Tensor | None] = [None] * len(parameters)
    count = 0
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_gpus(model)))
        stack.enter_context(torch.enable_grad())
        if isinstance(model, DistributedDataParallel):
            # It would wait for a backward through all parameters, which never comes.
            stack.enter_context(model.no_sync())
        for batch in batches:
            for i, part in enumerate(of_batch(batch)):
                if part is not None:
                    known = sums[i]
                    sums[i] = _wide(part) if known is None else known.add_(part.detach())
            count += 1
    if not count:
        raise ValueError(_EMPTY)
    return _over_ranks(parameters, sums, count)


def _over_ranks(parameters: Sequence[nn.Parameter], sums: list[Tensor | None], count: int) -> list[Tensor | None]:
    """Sums over counts, both over all ranks, so that each makes the same topologies."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [None if s is None else s.div_(count) for s in sums]
    reached = torch.tensor([count, *(s is not None for s in sums)], device=parameters[0].device)
    distributed.all_reduce(reached)
    together: list[Tensor | None] = []
    for parameter, own, ranks in zip(parameters, sums, reached[1:].tolist(), strict=True):
        total = _wide(torch.zeros_like(parameter)) if own is None else own
        if ranks:
            total = total.contiguous()
            distributed.all_reduce(total)
        together.append(total.div_(int(reached[0])) if ranks else None)
    return together


def _wide(part: Tensor) -> Tensor:
    """A copy in float32 at least."""
    dtype = torch.float32 if part.dtype in (torch.float16, torch.bfloat16) else part.dtype
    return part.detach().to(dtype, copy=True)


def _gradient(loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient at `tensors`, past all hooks on accumulated gradients; None where `loss` does not depend on one."""
    grads: Sequence[Tensor | None] = torch.autograd.grad(loss, tensors, allow_unused=True)
    return grads


def _curvature(loss: Tensor, tensors: Sequence[Tensor], along: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The Hessian of `loss` at `tensors` times `along`; None where it is zero."""
    grads: Sequence[Tensor | None] = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    products = [(g.to(v.dtype) * v).sum() for g, v in zip(grads, along, strict=True) if g is not None]
    product = torch.stack([p.to(products[0]) for p in products]).sum() if products else loss.detach()
    return _gradient(product, tensors) if product.requires_grad else [None] * len(tensors)


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Fused attention and the recurrent layers of cuDNN have a first derivative only."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def _zero_outside(held: Sequence[tuple[nn.Parameter, Sequence[Topology]]]) -> Iterator[None]:
    """Each parameter is zero outside the topologies of its blocks, and as before afterwards, to the bit."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter, topologies in held:
                if not all(t.is_dense for t in topologies):
                    saved.append((parameter, parameter.detach().clone()))
                    mask = torch.cat([t.mask.to(parameter.device) for t in topologies])
                    parameter.masked_fill_(~mask, 0)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved:
                parameter.copy_(values)


@contextmanager
def _absolute_doubles(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Absolute values in float64 in place of all parameters, buffers in float64 too; from each parameter to its copy.

    Set as attributes, since the list of parameters that a recurrent module keeps beside them follows at once.
    """
    modules = list(model.modules())
    parameters = [(m, n, p) for m in modules for n, p in m.named_parameters(recurse=False, remove_duplicate=False)]
    buffers = [(m, n, b) for m in modules for n, b in m.named_buffers(recurse=False, remove_duplicate=False)]
    copies = {p: nn.Parameter(p.detach().double().abs()) for _, _, p in parameters if p.is_floating_point()}
    try:
        for module, name, parameter in parameters:
            setattr(module, name, copies.get(parameter, parameter))
        for module, name, buffer in buffers:
            setattr(module, name, buffer.double() if buffer.is_floating_point() else buffer.clone())
        yield copies
    finally:
        for module, name, tensor in (*parameters, *buffers):
            setattr(module, name, tensor)


class _Reached(Exception):
    """Leaves a loss where it calls the model."""


def _input_of_ones(model: nn.Module, call: Callable[[], object]) -> tuple[Any, Any]:
    """The arguments with which `call` calls `model`, ones in float64 in place of all floating-point numbers.

    Raises:
        ValueError: when it does not call the model, or with no floating-point tensor.
    """

    inputs: list[tuple[Any, Any]] = []

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        raise _Reached

    handle = model.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        call()
    except _Reached:
        pass
    finally:
        handle.remove()
    if not inputs:
        raise ValueError("loss= never calls the model that it is given, so that no input of ones can take its place")
    leaves = tree_leaves(inputs[0])
    if not any(_is_floating(leaf) for leaf in leaves):
        kinds = sorted({str(leaf.dtype).removeprefix("torch.") for leaf in leaves if torch.is_tensor(leaf)})
        raise ValueError(
            f"an input of ones takes floating-point inputs, and loss= gives the model {', '.join(kinds) or 'no'} "
            "tensors: token ids have no ones, so take a start that ranks gradients, such as snip or force"
        )
    ones: tuple[Any, Any] = tree_map(_one, inputs[0])
    return ones


def _one(leaf: Any) -> Any:
    return torch.ones_like(leaf, dtype=torch.float64) if _is_floating(leaf) else leaf


def _is_floating(leaf: Any) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point()


def _first(batches: Iterable[Any]) -> Any:
    for batch in batches:
        return batch
    raise ValueError(_EMPTY)


def _summed(outputs: Any) -> Tensor:
    """The sum of all floating-point numbers in `outputs`; scalars, such as a loss, only where there is nothing else."""
    found = [leaf for leaf in tree_leaves(outputs) if _is_floating(leaf)]
    if not found:
        raise ValueError("the model returns no floating-point tensor for an input of ones")
    return torch.stack([t.double().sum() for t in ([t for t in found if t.dim()] or found)]).sum()


def _gpus(model: nn.Module) -> list[int]:
    """The GPUs on which the model lies."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _require_values(model: nn.Module) -> None:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(
            f"batches= asks for a gradient, and {len(on_meta)} of the model's {len(tensors)} tensors lie on the meta "
            f"device, where they have no values ({', '.join(on_meta[:3])}): build the model on a real device, or take "
            "a method that starts without a gradient"
        )
