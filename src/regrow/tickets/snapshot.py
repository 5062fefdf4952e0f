"""Everything of a run at one step, to come back to."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from regrow.engine.sparsifier import Sparsifier
from regrow.tickets.ticket import VERSION, require_version, topology_entries


class Stateful(Protocol):
    """What belongs to a run beside its model: a learning-rate scheduler, a gradient scaler, a running mean."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The states of model, optimizers, sparsifier and others at one step, in memory of their own.

    Args:
        model: its state dict.
        optimizers: of each optimizer its state dict.
        sparsifier: its state dict.
        others: of each other object its state dict.

    Examples:
        >>> import torch, regrow
        >>> model = torch.nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sparsifier = regrow.sparsify(model, optimizer, regrow.methods.static(density=0.1))
        >>> snapshot = Snapshot.take(sparsifier)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 20)).sum().backward(); optimizer.step()
        >>> bool((model.weight == before).all())
        False
        >>> snapshot.restore(sparsifier)
        >>> bool((model.weight == before).all()), sparsifier.step, len(optimizer.state)
        (True, 0, 0)
    """

    model: Mapping[str, Any]
    optimizers: Sequence[dict[str, Any]]
    sparsifier: dict[str, Any]
    others: Sequence[dict[str, Any]] = ()

    @classmethod
    def take(cls, sparsifier: Sparsifier, *others: Stateful) -> Snapshot:
        """The run as it is now, best between two steps; gradients are not part of it.

        Args:
            sparsifier: with its model and its optimizers.
            others: whatever else has a state, as learning-rate schedulers.
        """
        optimizers = [optimizer.state_dict() for optimizer in sparsifier.optimizers]
        states = sparsifier.model.state_dict(), optimizers, sparsifier.state_dict(), [o.state_dict() for o in others]
        return cls(*copy.deepcopy(states))

    def restore(self, sparsifier: Sparsifier, *others: Stateful) -> None:
        """Bring the run back to what it was, in the same objects, also where it has become sparser since.

        Gradients are forgotten. The snapshot stays as it is and can be restored again.

        Args:
            sparsifier: the one the snapshot was taken of, or one made alike.
            others: as many as it was taken with, in that order.

        Raises:
            ValueError: when it is of another run; nothing is changed then.
        """
        self.require_same(sparsifier, others)
        # First what this module cannot check beforehand.
        for other, state in zip(others, self.others, strict=True):
            other.load_state_dict(copy.deepcopy(state))
        sparsifier.model.zero_grad()
        sparsifier.model.load_state_dict(self.model)
        for optimizer, state in zip(sparsifier.optimizers, self.optimizers, strict=True):
            # The optimizer would go on working in the tensors that it is given.
            optimizer.load_state_dict(copy.deepcopy(state))
        sparsifier.load_state_dict(self.sparsifier)

    def require_same(self, sparsifier: Sparsifier, others: Sequence[Stateful]) -> None:
        """Raise ValueError when this was taken of another run."""
        if len(others) != len(self.others):
            raise ValueError(
                f"snapshot: it was taken with {len(self.others)} other objects and is restored with {len(others)}: "
                "give the same, in the same order"
            )
        now = sparsifier.state_dict()
        for key in ("method", "shapes", "units", "storages"):
            if now[key] != (then := self.sparsifier.get(key, {})):
                raise ValueError(
                    f"snapshot: its sparsifier had {key} {_brief(then, now[key])}, and this one has "
                    f"{_brief(now[key], then)}: sparsify the same model in the same way first"
                )
        hidden = topology_entries(sparsifier.model)
        ours, theirs = _shapes(self.model, hidden), _shapes(sparsifier.model.state_dict(), hidden)
        if ours != theirs:
            differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
            raise ValueError(
                f"snapshot: {len(differing)} tensors of the model differ in name or shape "
                f"({', '.join(differing[:3])}): it is of another model"
            )
        sizes = [_sizes(state) for state in self.optimizers]
        own = [_sizes(optimizer.state_dict()) for optimizer in sparsifier.optimizers]
        if sizes != own:
            raise ValueError(
                f"snapshot: its optimizers had {sizes} parameters by group, and these have {own}: it is of another run"
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as far as the states of the others consist of such."""
        return {
            "version": VERSION,
            "model": self.model,
            "optimizers": list(self.optimizers),
            "sparsifier": self.sparsifier,
            "others": list(self.others),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot whose `state_dict` this is.

        Raises:
            ValueError: when it is none of this version.
        """
        require_version("snapshot", state)
        return cls(state["model"], list(state["optimizers"]), state["sparsifier"], list(state["others"]))


def _brief(value: Any, other: Any) -> str:
    """What differs of two dicts, or the value."""
    if not isinstance(value, dict):
        return repr(value)
    return str({k: v for k, v in value.items() if k not in other or other[k] != v})


def _shapes(state: Mapping[str, Any], but: Collection[str]) -> dict[str, Any]:
    """The shape of each tensor, those `but` what may differ."""
    return {name: tuple(t.shape) if isinstance(t, Tensor) else None for name, t in state.items() if name not in but}


def _sizes(state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]
