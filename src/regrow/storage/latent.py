"""Latent storage: a dense parameter that is computed from values which the optimizer steps in its place.

Between steps the parameter holds the effective weight, zero outside its topology, as in masked storage. Right before
the optimizer steps, the latent values and their gradient take the places of the weight and its own; right after, they
are taken out again. Beside masked storage this holds the latent values, what is trained beside them, and a second
gradient during a step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.method import Latent, Parts
from regrow.core.topology import Topology
from regrow.storage.gradient import Gradient
from regrow.storage.masked import masked_twin, zero_outside
from regrow.storage.rows import DenseRows, blocks_of
from regrow.storage.state import add_beside, gradient_scale, has_scheduler, take_out
from regrow.storage.stored import Stored

LATENT = "latent"
"""The key of the latent values in a weight's state."""


class LatentParameter(Stored):
    """One dense parameter, the latent values that it is computed from, and its optimizer.

    Args:
        parameter: any device and real dtype.
        optimizer: the optimizer that steps the latent values.
        names: canonical name of each equal block of leading rows; a single name for an ordinary weight.
        out_axis: which axis counts the outputs.
        in_axis: which axis counts the inputs.
        latent: how the weight is computed.
    """

    storage = "masked"

    def __init__(
        self,
        parameter: nn.Parameter,
        optimizer: Optimizer,
        names: Sequence[str],
        out_axis: int,
        in_axis: int,
        latent: Latent,
    ) -> None:
        self.parameter = parameter
        self.optimizer = optimizer
        self.gradient = Gradient(parameter, names[0])
        self.latent = latent
        self.drawn = False
        """Whether the parameter holds the noisy weight of a training forward."""
        self._restored = False
        """Whether topologies and state were loaded, and the parameter is yet to be computed from them."""
        self._through_noise = False
        """Whether the gradient is that of a noisy weight."""
        self._given: Tensor | None = None
        """The parameter's own gradient, while that of the latent values is in its place."""
        self._version = parameter._version
        """The parameter's version counter when this wrote it last."""
        self._weights = [LatentWeight(self, *block, out_axis, in_axis) for block in blocks_of(parameter, names)]
        self.gradient.watch(self._arrived)

    @property
    def weights(self) -> Sequence[LatentWeight]:
        """The weights that it holds."""
        return self._weights

    def become(self, room: int, seed: int) -> Stored:
        """Compute the weight."""
        self.write(drawn=False)
        return self

    def remove(self) -> None:
        """Detach from parameter and optimizer; the weight that is evaluated stays."""
        if self.drawn:
            self.write(drawn=False)
        super().remove()
        take_out(self.optimizer, [t for w in self.weights for t in w.trained.values()])

    def hardened(self, remember: Collection[str]) -> Stored:
        """The weight as it is evaluated, in masked storage; of the weights' state what is to `remember` goes along."""
        self.remove()
        states = [{key: w.state[key] for key in remember if key in w.state} for w in self.weights]
        twin = masked_twin(self, [w.topology for w in self.weights], states)
        twin.mask()
        return twin

    def shows(self, training: bool) -> bool:
        """Whether it holds the noisy weight of this step for a training forward, or else the one that is evaluated."""
        return training == self.drawn

    def show(self, training: bool) -> None:
        """Hold the noisy weight of this step for a training forward, or else the one that is evaluated."""
        if not self.shows(training):
            self.write(drawn=training)

    def write(self, drawn: bool) -> None:
        """Compute the weight from the latent values, with the noise of this step if `drawn`."""
        for weight in self.weights:
            weight.compute(drawn)
        self.drawn = drawn

    def wrote(self) -> None:
        """What is in the parameter now was computed here."""
        self._version = self.parameter._version

    def restored(self) -> None:
        """Topologies were loaded: the parameter is to be computed when its state is there too."""
        self._restored = True

    def _arrived(self, grad: Tensor) -> None:
        self._through_noise = self.drawn
        self.mask()

    def mask(self) -> None:
        """Zero the gradient where the method does not read it."""
        grad = self.parameter.grad
        if grad is not None and self.latent.reach is not None:
            for weight in self.weights:
                zero_outside(grad[weight.rows], self.latent.reach(weight.parts()).to(grad.device))

    def project(self, state: bool) -> None:
        """Compute the weight anew where state was loaded; refuse values that were written over it.

        The optimizer's state is that of the latent values, which live everywhere.

        Raises:
            ValueError: when the parameter is not what was computed last.
        """
        if self._restored:
            for weight in self.weights:
                weight.adopt()
            self.write(drawn=False)
            self._restored = False
        elif self._version != self.parameter._version:
            if not all(weight.is_written(self.drawn) for weight in self.weights):
                raise ValueError(
                    f"{self.gradient.name} was written to from outside, and is computed from latent values, which "
                    "would be lost: load or change weights before regrow.sparsify, or load the sparsifier's state too"
                )
            self.wrote()

    def stepping(self, step: int) -> None:
        """Put the latent values and their gradient in the places of the weight and its own."""
        given = self.parameter.grad
        if given is None:
            return
        scale = gradient_scale(self.optimizer)
        pulled = torch.empty_like(given)
        found = [w.pull(given[w.rows], self._through_noise, step, scale) for w in self.weights]
        for weight, (grad, others) in zip(self.weights, found, strict=True):
            pulled[weight.rows] = grad.to(pulled.dtype)
            for name, tensor in weight.trained.items():
                tensor.grad = others[name]
            self.parameter.detach()[weight.rows] = weight.state[LATENT]
        self._given, self.parameter.grad = given, pulled

    def stepped(self) -> None:
        """Take the latent values out of the parameter, and compute the weight from them."""
        if self._given is not None:
            for weight in self.weights:
                weight.state[LATENT].copy_(self.parameter.detach()[weight.rows])
                for tensor in weight.trained.values():
                    tensor.grad = None
            self.parameter.grad, self._given = self._given, None
        for weight in self.weights:
            weight.noise = None
        self.write(drawn=False)

    def rewired(self) -> None:
        """A topology changed: the parameter is computed with it at once."""
        self._restored = False
        self.write(self.drawn)


class LatentWeight(DenseRows):
    """A `SparseWeight` over a block of rows of a parameter that is computed from latent values."""

    owner: LatentParameter

    def __init__(self, owner: LatentParameter, name: str, rows: slice, out_axis: int, in_axis: int) -> None:
        super().__init__(owner, name, rows, out_axis, in_axis)
        self.noise: Tensor | None = None
        """What was drawn for this step, (shape)."""
        block = owner.parameter.detach()[rows]
        self.mask = torch.ones(self.shape, dtype=torch.bool, device=block.device)
        self.state: dict[str, Tensor] = {LATENT: block.clone(memory_format=torch.contiguous_format)}
        self.trained = {t.name: nn.Parameter(t.first(self.parts())) for t in owner.latent.trained}
        self.state |= {name: tensor.detach() for name, tensor in self.trained.items()}

    def parts(self, noise: Tensor | None = None, trained: Mapping[str, Tensor] | None = None) -> Parts:
        """What the weight is computed from, `trained` tensors in the place of those held."""
        latent = _wide(self.state[LATENT]) if trained is None else trained[LATENT]
        state = self.state if trained is None else {**self.state, **trained}
        return Parts(latent, self.mask, state, noise, self.in_axis)

    def computed(self, drawn: bool) -> Tensor:
        """The weight of a training forward if `drawn`, else the one that is evaluated, (shape)."""
        noise = self._noise() if drawn else None
        value = self.owner.latent.effective(self.parts(noise)).to(self.owner.parameter.dtype, copy=True)
        if not drawn:
            zero_outside(value, self.mask)
        return value

    def compute(self, drawn: bool) -> None:
        """Put what is computed into the parameter."""
        self._follow()
        self.owner.parameter.detach()[self.rows] = self.computed(drawn)
        self.owner.wrote()

    def is_written(self, drawn: bool) -> bool:
        """Whether the parameter holds what is computed."""
        return torch.equal(self.owner.parameter.detach()[self.rows], self.computed(drawn))

    def pull(self, given: Tensor, noisy: bool, step: int, scale: float) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Turn the gradient of the loss with respect to the weight into those of loss and penalty, times `scale`.

        Args:
            given: (shape), already times `scale`.
            noisy: whether it is that of a noisy weight.
            step: of the optimizer.
            scale: of a gradient scaler.

        Returns:
            With respect to the latent values (shape), and to each tensor trained beside them by its name.
        """
        latent = self.owner.latent
        leaves = {
            key: _wide(t).detach().requires_grad_() for key, t in {LATENT: self.state[LATENT], **self.trained}.items()
        }
        with torch.enable_grad():
            parts = self.parts(self._noise() if noisy else None, leaves)
            outputs = [latent.effective(parts)]
            grads = [given.to(outputs[0].dtype)]
            if latent.penalty is not None:
                outputs.append(latent.penalty(parts, step))
                grads.append(torch.full_like(outputs[1], scale))
            first, *others = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return first, dict(zip(self.trained, others, strict=True))

    def adopt(self) -> None:
        """Train on what was loaded into `state`."""
        for name, tensor in self.trained.items():
            tensor.detach().copy_(self.state[name])
            self.state[name] = tensor.detach()
        self.noise = None

    def values(self) -> Tensor:
        """Active values of the weight that is evaluated, (nnz,)."""
        return self.active(self.computed(drawn=False).reshape(-1))

    def set_values(self, values: Tensor) -> None:
        """Refuse `values` (nnz,), which say nothing of what they would be computed from."""
        raise ValueError(
            f"{self.name} is computed from latent values and cannot be set: call sparsifier.harden() first, or change "
            "weights before regrow.sparsify"
        )

    def rewire(self, topology: Topology) -> None:
        """Change the topology and compute the weight, also where the topology stays: its state may have changed.

        Latent values and their optimizer state stay as they are everywhere.
        """
        if topology != self.topology:
            self._take(topology)
        self.owner.rewired()

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology; the parameter is computed when its state is there too."""
        self._take(topology)
        self.owner.restored()

    def _take(self, topology: Topology) -> None:
        self.topology = topology.to(self.owner.parameter.device)
        self.mask = self.topology.mask.to(self.owner.parameter.device)

    def _noise(self) -> Tensor:
        draw = self.owner.latent.noise
        assert draw is not None
        if self.noise is None:
            like = _wide(self.state[LATENT])
            self.noise = torch.from_numpy(draw(self.generator, like.numel())).view(self.shape).to(like)
        return self.noise

    def _follow(self) -> None:
        """Move along where the model was moved."""
        device = self.owner.parameter.device
        if self.state[LATENT].device != device:
            for name, tensor in self.trained.items():
                tensor.data = tensor.data.to(device)
                self.state[name] = tensor.detach()
            self.state = {key: tensor.to(device) for key, tensor in self.state.items()}
            self.mask, self.noise = self.mask.to(device), None


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: small steps of what is trained beside half-precision values would vanish."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def latent_parameters(
    found: Sequence[tuple[nn.Parameter, Optimizer, Sequence[str], int, int]], method: str, latent: Latent
) -> list[LatentParameter]:
    """Latent storage of parameters; what is trained beside them joins the optimizers that hold them.

    Args:
        found: each parameter with its optimizer, names, output axis and input axis.
        method: its name, for errors.
        latent: how weights are computed.

    Raises:
        ValueError: when a learning-rate scheduler is there already that would not know what is added.
    """
    optimizers = list({id(optimizer): optimizer for _, optimizer, *_ in found}.values())
    if latent.trained and any(has_scheduler(optimizer) for optimizer in optimizers):
        names = ", ".join(t.name for t in latent.trained)
        raise ValueError(
            f"{method}: trains {names} beside the weights, of which a learning-rate scheduler that was built before "
            "would not know: build it after regrow.sparsify"
        )
    parameters = [LatentParameter(*f, latent) for f in found]
    try:
        for optimizer in optimizers:
            _join(optimizer, [p for p in parameters if p.optimizer is optimizer], latent)
    except BaseException:
        for parameter in parameters:
            parameter.remove()
        raise
    return parameters


def _join(optimizer: Optimizer, parameters: Sequence[LatentParameter], latent: Latent) -> None:
    """Add to an optimizer what is trained beside `parameters`, one group for each kind and group of theirs."""
    for group in list(optimizer.param_groups):
        inside = [p for p in parameters if any(p.parameter is q for q in group["params"])]
        for kind in latent.trained if inside else ():
            tensors = [w.trained[kind.name] for p in inside for w in p.weights]
            add_beside(optimizer, group, tensors, kind.lr, kind.weight_decay)
