"""Statistics of BatchNorm as they are over a whole data set, for a model that was never trained as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _of_first(model: nn.Module, batch: Any) -> object:
    """The model on the batch, or on the first thing in it."""
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


@dataclass
class _Moments:
    """What went through one module: mean and sum of squared deviations (channels,) in float64, and how much it was."""

    mean: Tensor
    squares: Tensor
    count: float = 0.0
    batches: float = 0.0

    def take(self, x: Tensor) -> None:
        """Add x (batch, channels, ...)."""
        x = x.detach().double()
        over = [d for d in range(x.dim()) if d != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, over, correction=0)
        self._merge(count, 1, mean, variance * count)

    def _merge(self, count: float, batches: float, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        self.batches += batches
        if count:
            apart = mean - self.mean
            self.squares += squares + apart**2 * (self.count * count / total)
            self.mean += apart * (count / total)
            self.count = total

    def over_ranks(self) -> None:
        """Pool with what the other ranks have."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        own = torch.cat([self.mean.new_tensor([self.count, self.batches]), self.mean, self.squares])
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own)
        self.count, self.batches, self.mean, self.squares = 0.0, 0.0, self.mean * 0, self.squares * 0
        for part in parts:
            self._merge(float(part[0]), float(part[1]), *part[2:].chunk(2))


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object] = _of_first,
) -> None:
    """Replace the running statistics of BatchNorm by the exact ones of `batches`, in one pass in training mode.

    The mean and the unbiased variance of all that reaches each module are pooled over batches of any size, and over
    ranks where there are several. Weights, momentum, and the mode of every module stay as they are; the number of
    batches is that of this pass. A module that no batch reaches keeps its statistics. Without BatchNorm nothing is
    done, and no batch is drawn.

    Args:
        model: any.
        batches: of training data.
        forward: runs the model on a batch; by default on its first part where it is a tuple or list.

    Raises:
        ValueError: when there is no batch; nothing is changed then.

    Source: Ioffe and Szegedy 2015, Batch Normalization, algorithm 2, with one mean over the data in the place of a mean
    over batches. Sup-tickets (Yin et al. 2022) uses torch.optim.swa_utils.update_bn, which weighs a last, smaller batch
    like a full one.

    Examples:
        >>> model, x = nn.BatchNorm1d(2), torch.tensor([[0.0, 1.0], [2.0, 1.0], [7.0, 4.0]])
        >>> reestimate_batchnorm(model, [x[:2], x])
        >>> model.running_mean
        tensor([2.2000, 1.6000])
    """
    modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not modules:
        return
    modes = {m: m.training for m in model.modules()}
    saved = [{name: b.clone() for name, b in m.named_buffers(recurse=False)} for m in modules]
    found = {m: _Moments(*torch.zeros_like(_mean(m), dtype=torch.float64).repeat(2, 1)) for m in modules}
    handles = [m.register_forward_pre_hook(_watch(found[m]), with_kwargs=True) for m in modules]
    done = False
    try:
        with torch.no_grad():
            for m in modules:
                m.reset_running_stats()
            model.train()
            for batch in batches:
                forward(model, batch)
            for handle in handles:
                handle.remove()
            for moments in found.values():
                moments.over_ranks()
        if not any(moments.count for moments in found.values()):
            raise ValueError(
                f"reestimate_batchnorm: no batch reached any of the {len(modules)} BatchNorm modules: give batches of "
                "training data, anew if they are used up"
            )
        done = True
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for m, old in zip(modules, saved, strict=True):
                _write(m, old, found[m] if done else None)


def _mean(module: _BatchNorm) -> Tensor:
    assert module.running_mean is not None
    return module.running_mean


def _watch(moments: _Moments) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments.take(args[0] if args else kwargs["input"])

    return hook


def _write(module: _BatchNorm, old: dict[str, Tensor], moments: _Moments | None) -> None:
    """The statistics that were found; the old ones where there are none."""
    if moments is None or not moments.count:
        for name, buffer in module.named_buffers(recurse=False):
            buffer.copy_(old[name])
    else:
        assert module.running_mean is not None and module.running_var is not None
        module.running_mean.copy_(moments.mean)
        module.running_var.copy_(moments.squares / max(1.0, moments.count - 1))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(int(moments.batches))
