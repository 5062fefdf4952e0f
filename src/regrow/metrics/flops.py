"""Floating-point operations of a forward pass and of a training step, counted as the RigL paper counts them.

An output costs `2 * fan_in * density + 1`: one multiplication and one addition per active entry (the first
product needs no addition, the bias brings it back) and one operation for the ReLU, charged to every layer
alike. Summed over a layer that is `2 * density * numel * uses + outputs`, where `uses` says how often one
entry of the weight is multiplied: output positions of a convolution, tokens of a linear layer, time steps
of a recurrent one. Only shapes are read, so a model and an input on the meta device give the same figures
for free.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regrow.core.names import canonical
from regrow.core.text import some, table
from regrow.nn import Call, Kind, SparseModule, Use, kind_of
from regrow.nn.base import dense_type, shape_of

_OMITTED = "norms, pooling, softmax, attention products and element-wise work are not counted"
_BLOCK = re.compile(r"(.+)\[(\d+)\]")
_Args = tuple[Any, ...]


class LayerFlops(NamedTuple):
    """One weight's share of a forward pass, per sample.

    A weight that the forward pass never multiplies (an embedding, a module that is not called) costs nothing.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    outputs: float
    """Numbers that this weight computes."""
    times: tuple[float, ...]
    """How often one entry is multiplied, for each equal block of leading rows."""
    densities: tuple[float, ...]
    """Of each of these blocks."""

    @property
    def density(self) -> float:
        """The density of the whole weight."""
        return sum(self.densities) / len(self.densities)

    @property
    def dense(self) -> float:
        """FLOPs with every entry active."""
        return self._cost([1.0] * len(self.times))

    @property
    def sparse(self) -> float:
        """FLOPs at the given densities."""
        return self._cost(self.densities)

    def _cost(self, densities: Sequence[float]) -> float:
        entries = math.prod(self.shape) // len(self.times)
        products = sum(times * density for times, density in zip(self.times, densities, strict=True))
        return 2 * entries * products + self.outputs


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of one sample, weight by weight, in the order of the model's modules.

    >>> row = LayerFlops("fc.weight", "Linear", (10, 100), 10, times=(1,), densities=(0.1,))
    >>> total = Flops((row, row))
    >>> total.dense, total.sparse, round(total.ratio, 4)
    (4020.0, 420.0, 0.1045)
    """

    layers: tuple[LayerFlops, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    """Later names of tied weights -> the first name."""

    @property
    def dense(self) -> float:
        """FLOPs per sample with every weight dense."""
        return sum((row.dense for row in self.layers), 0.0)

    @property
    def sparse(self) -> float:
        """FLOPs per sample at the given densities."""
        return sum((row.sparse for row in self.layers), 0.0)

    @property
    def ratio(self) -> float:
        """`sparse / dense`; NaN for a model in which nothing is counted."""
        return self.sparse / self.dense if self.dense else math.nan

    def at(self, densities: Mapping[str, float]) -> Flops:
        """The same forward pass at other densities; weights and blocks that are not named keep theirs.

        Args:
            densities: as `flops` takes them.

        Raises:
            ValueError: a name that is none of these weights, a density that is given twice or lies outside [0, 1].

        >>> count = flops(nn.Linear(100, 10), torch.zeros(1, 100))
        >>> count.at({"weight": 0.1}).sparse, count.at({"weight": 0.2}).sparse
        (210.0, 410.0)
        """
        chosen = self._chosen(densities)
        rows = []
        for row in self.layers:
            name = self.aliases.get(row.name, row.name)
            given = tuple(chosen.get((name, i), old) for i, old in enumerate(row.densities))
            rows.append(row._replace(densities=given))
        return replace(self, layers=tuple(rows))

    def _chosen(self, densities: Mapping[str, float]) -> dict[tuple[str, int], float]:
        """(first name of a weight, number of a block) -> its density."""
        n_blocks = {self.aliases.get(row.name, row.name): len(row.densities) for row in self.layers}
        chosen: dict[tuple[str, int], float] = {}
        for given, density in densities.items():
            match = _BLOCK.fullmatch(given)
            base = _base(given)
            name = self.aliases.get(base, base)
            count = n_blocks.get(name, 0)
            indices = [int(match[2])] if match else list(range(count))
            if count == 0 or (match and (count == 1 or indices[0] >= count)):
                raise ValueError(_unknown_name(given, n_blocks))
            if not 0 <= density <= 1:
                raise ValueError(f"flops: the density of {given!r} must lie in [0, 1], got {density}")
            for index in indices:
                if (name, index) in chosen:
                    raise ValueError(f"flops: {given!r} gives {name!r} a second density; keep one of the two")
                chosen[name, index] = float(density)
        return chosen

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "outputs", "density", "dense", "sparse")
        body = [
            (
                *(row.name, row.kind, "x".join(map(str, row.shape)), f"{row.outputs:,.6g}"),
                *(f"{row.density:.4f}", _metric(row.dense), _metric(row.sparse)),
            )
            for row in self.layers
        ]
        total = ("total", "", "", "", "", _metric(self.dense), _metric(self.sparse))
        note = f"FLOPs of one sample's forward pass, ratio {self.ratio:.4f}; {_OMITTED}"
        return f"{table(head, [*body, total])}\n{note}"


@dataclass
class _Tally:
    """The sum of all uses of one weight; `times` has one count per block of leading rows."""

    kind: str
    shape: tuple[int, ...]
    densities: list[float]
    times: list[int]
    outputs: int = 0

    def add(self, use: Use) -> None:
        self.times = [old + new for old, new in zip(self.times, use.times, strict=True)]
        self.outputs += use.outputs

    def row(self, name: str, n_samples: int) -> LayerFlops:
        times = tuple(times / n_samples for times in self.times)
        return LayerFlops(name, self.kind, self.shape, self.outputs / n_samples, times, tuple(self.densities))


def flops(
    model: nn.Module,
    example_input: Any,
    densities: Mapping[str, float] | None = None,
    *,
    batch_size: int | None = None,
    paper_quirks: bool = False,
) -> Flops:
    """FLOPs per sample of one forward pass, dense and at the given densities.

    A weight costs `2 * density * numel * uses + outputs`. Counted are Linear, Bilinear, Conv1d/2d/3d
    and their transposes (any groups), RNN, GRU, LSTM and their cells, MultiheadAttention's projections,
    transformers' `Conv1D`, types with a row by `regrow.nn.register`, and the sparse modules that stand for any of
    these. Norms, pooling, embeddings, softmax, the products of attention, those of a bilinear layer's two inputs,
    residual sums and the loss are not. A module called several times counts as often.
    Like any convolution's, the border's products with padding are counted; a transposed convolution counts
    one product per entry and input position, cropped or not.

    The model runs once, in evaluation mode, without gradients and uncompiled, and is left as it was.

    Args:
        model: any module; on the meta device the count costs no arithmetic.
        example_input: a tensor (batch, ...), or a tuple or dict of the model's arguments, on the model's
            device. The figures are divided by the leading size of its first tensor.
        densities: weight name ("conv1.weight") to density in [0, 1]; what is not named is dense, or in a sparse
            module has the density that it has there. `module.` and `_orig_mod.` in a name are ignored, and a
            tied weight goes by any of its names. The equal blocks of leading rows of a packed weight have names
            too: "attn.in_proj_weight[0]", "gru.weight_hh[2]".
        batch_size: samples in `example_input`, where that is not its leading size (time-major recurrent
            models).
        paper_quirks: reproduce the printed figures of the paper, whose code differs in two points.
            (1) A strided convolution that is the model's first or is depthwise gets its padding p twice: with
            kernel k, stride s and input size n it has ceil((n + 2p - k + 1 + 2 floor(k / 2)) / s) output
            positions, 115 instead of 112 in ResNet-50's first. (The paper's Keras models pad these
            convolutions by a layer of its own, after which its counter still assumes padding "same".)
            (2) A depthwise convolution of C channels, whose Keras kernel is shaped (k, k, C, 1), counts as
            one with a single output channel: as many products, but 1 / C of the outputs.

    Raises:
        ValueError: a name that is no weight of the model, a density that is given twice or lies outside
            [0, 1], or an example input without a batch.

    >>> mlp = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    >>> count = flops(mlp, torch.zeros(1, 784), {"0.weight": 0.1})
    >>> count.dense, count.sparse
    (476710.0, 53350.0)

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), appendix "Calculating FLOPs of models and
    methods", and the released code. Ours differs in the two quirks above, and counts layers that the paper
    has none of (transposed, recurrent, attention).
    """
    n_samples = _leading_size(example_input) if batch_size is None else batch_size
    if n_samples < 1:
        raise ValueError(f"flops: the batch must hold a sample or more, got {n_samples}; pass batch_size=")
    tallies = _tallies(model)
    aliases = _add_uncounted(model, densities or {}, tallies)
    _run(model, example_input, tallies, paper_quirks)
    rows = tuple(tally.row(name, n_samples) for name, tally in tallies.items())
    return Flops(rows, aliases).at(densities or {})


def training_flops(
    sparse: float,
    dense: float,
    *,
    gradient_interval: float = math.inf,
    timing: Literal["instead", "after"] = "instead",
) -> float:
    """FLOPs per sample of a training step, averaged over steps with and without a dense weight gradient.

    An ordinary step costs three forward passes, 3 f_S: forward, gradient to the activations, gradient to
    the active weights. Where the gradient of all weights is wanted, the last third costs f_D. With
    T = `gradient_interval`:

        timing="instead":  (3 f_S T + 2 f_S + f_D) / (T + 1)    T ordinary steps, then one that only updates
        timing="after":    (3 f_S (T - 1) + 2 f_S + f_D) / T    every T-th step updates too

    Methods that never look at a dense gradient (static, SET, SNIP, small-dense) have T = inf: 3 f_S. SNFS,
    which always does, has T = 0 under "instead" or T = 1 under "after": 2 f_S + f_D. Dense training is
    `training_flops(f_D, f_D)`. Sorting and selecting are not counted.

    Args:
        sparse: f_S, FLOPs per sample of the sparse forward pass.
        dense: f_D, FLOPs per sample of the dense one.
        gradient_interval: T, in steps; a clock that counts the update step too, so that one step in n is
            an update, has T = n - 1 under "instead".
        timing: whether the update takes the place of an optimizer step or shares its batch.

    Raises:
        ValueError: negative FLOPs, an interval below 0 ("instead") or 1 ("after"), or an unknown timing.

    >>> training_flops(1.0, 10.0)
    3.0
    >>> training_flops(1.0, 10.0, gradient_interval=100, timing="after")
    3.09

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), appendix "Calculating FLOPs of models and
    methods", for "instead"; "after" is the same account applied to codes that update on the batch they
    train on, which the paper has none of.
    """
    if not (sparse >= 0 and dense >= 0):
        raise ValueError(f"training_flops: FLOPs must not be negative, got sparse {sparse} and dense {dense}")
    least = {"instead": 0, "after": 1}.get(timing)
    if least is None:
        raise ValueError(f'training_flops: timing must be "instead" or "after", got {timing!r}')
    if not gradient_interval >= least:
        raise ValueError(
            f'training_flops: gradient_interval must be at least {least} with timing="{timing}", '
            f"got {gradient_interval}"
        )
    period = gradient_interval + 1 - least
    return 3 * sparse + (dense - sparse) / period


def pruning_training_flops(forward: Iterable[float]) -> float:
    """FLOPs per sample of a training step whose density changes over the run: `3 * mean(f(s_t))`.

    Args:
        forward: FLOPs per sample of the forward pass at evenly spaced steps of the whole run.

    Raises:
        ValueError: `forward` is empty.

    >>> pruning_training_flops([10.0, 6.0, 2.0])
    18.0

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), appendix "Calculating FLOPs of models and
    methods": E_t[3 f_D (1 - s_t)]. Here f is counted at each density, as the paper's figures do, so layers
    that stay dense are charged in full.
    """
    costs = list(forward)
    if not costs:
        raise ValueError("pruning_training_flops: forward is empty; give the forward FLOPs at one step or more")
    return 3 * math.fsum(costs) / len(costs)


def _metric(value: float) -> str:
    """`value` with four significant digits and a metric prefix."""
    prefixes = ("", "k", "M", "G", "T", "P")
    power = min(max(int(math.log10(value) // 3), 0), len(prefixes) - 1) if value > 0 else 0
    return f"{value / 1000**power:.4g} {prefixes[power]}".rstrip()


def _name(path: str, weight: str) -> str:
    return canonical(f"{path}.{weight}" if path else weight)


def _tallies(model: nn.Module) -> dict[str, _Tally]:
    """An empty tally for every counted weight, by canonical name, in the order of the model's modules."""
    return {
        _name(path, weight): _Tally(
            kind.name, shape_of(module, weight), _densities(module, weight, blocks), [0] * blocks
        )
        for path, module, kind in _counted(model)
        for weight, blocks in kind.weights_of(module).items()
    }


def _counted(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind]]:
    """Every module, dense or sparse, whose weights are counted: its name, itself, its kind."""
    for path, module in model.named_modules():
        if (kind := kind_of(dense_type(module))) is not None:
            yield path, module, kind


def _densities(module: nn.Module, weight: str, blocks: int) -> list[float]:
    """The density of each of the equal blocks of leading rows of a weight, which is 1 in a dense one."""
    if not isinstance(module, SparseModule) or weight not in module.shapes:
        return [1.0] * blocks
    topology = module.topology(weight)
    rows = topology.rows // blocks
    return [topology.block(i * rows, (i + 1) * rows).density for i in range(blocks)]


def _run(model: nn.Module, example_input: Any, tallies: dict[str, _Tally], quirks: bool) -> None:
    """Run `model` once and add what each call does to the tallies."""
    seen_convolution = False

    def record(path: str, kind: Kind, module: nn.Module, args: _Args, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal seen_convolution
        call = Call(module, kind.weights_of(module), args, kwargs, output)
        used = kind.uses(call)
        if kind.paper_uses is not None:
            used = kind.paper_uses(call, not seen_convolution) if quirks else used
            seen_convolution = True
        for weight, use in used.items():
            tallies[_name(path, weight)].add(use)

    # Nothing is compiled before this module is imported, and importing it for nothing takes a second.
    has_compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if has_compiled else nullcontext()
    with _observed(model, record), torch.no_grad(), eager:
        if isinstance(example_input, Mapping):
            model(**example_input)
        elif isinstance(example_input, tuple) and not isinstance(example_input, PackedSequence):
            model(*example_input)
        else:
            model(example_input)


@contextmanager
def _observed(model: nn.Module, record: Callable[..., None]) -> Iterator[None]:
    """The model in evaluation mode, with `record` told of every call of a counted module."""
    modes = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_hook(partial(record, path, kind), with_kwargs=True)
        for path, module, kind in _counted(model)
    ]
    # Fused encoder layers call none of their parts.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _leading_size(example_input: Any) -> int:
    """The leading size of the first tensor in `example_input`."""
    if isinstance(example_input, PackedSequence):
        return int(example_input.batch_sizes[0])
    if isinstance(example_input, Tensor):
        if example_input.ndim == 0:
            raise ValueError("flops: the example input has no batch dimension; pass a tensor (batch, ...)")
        return example_input.shape[0]
    parts = example_input.values() if isinstance(example_input, Mapping) else example_input
    for part in parts if isinstance(parts, Iterable) and not isinstance(parts, str) else ():
        if isinstance(part, (Tensor, PackedSequence, tuple, list)):
            return _leading_size(part)
    raise ValueError(f"flops: no tensor in the example input, a {type(example_input).__name__}; pass batch_size=")


def _add_uncounted(model: nn.Module, densities: Mapping[str, float], tallies: dict[str, _Tally]) -> dict[str, str]:
    """Give named weights that are not counted an empty tally; return later names of tied weights -> the first."""
    parameters = {canonical(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}
    alias = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
    counted = {alias.get(name, name) for name in tallies}
    for base in map(_base, densities):
        if alias.get(base, base) not in counted and base in parameters and parameters[base].ndim > 1:
            owner = _owner(model, parameters[base])
            tallies.setdefault(base, _Tally(owner, tuple(parameters[base].shape), [1.0], [0]))
    return {name: other for name, other in alias.items() if name != other}


def _base(name: str) -> str:
    """The canonical name of a weight, by its own name or that of one of its blocks."""
    match = _BLOCK.fullmatch(name)
    return canonical(match[1] if match else name)


def _owner(model: nn.Module, parameter: nn.Parameter) -> str:
    """The class name of the first module that holds `parameter`."""
    holders = (m for m in model.modules() if any(p is parameter for p in m.parameters(recurse=False)))
    return type(next(holders)).__name__


def _unknown_name(given: str, n_blocks: Mapping[str, int]) -> str:
    names = [f"{name}[0..{count - 1}]" if count > 1 else name for name, count in n_blocks.items()]
    return f"flops: {given!r} in densities names no weight or block that is counted, of which there are {some(names)}"
