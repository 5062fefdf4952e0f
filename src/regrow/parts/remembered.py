"""What parts remember of a weight from one step to the next. Each thing has one owner here, which knows its key.

`weight.state` is the form in which all of it is saved. Parts read and write it through these owners only, so that
no part spells a key of another, and what is missing is told in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from regrow.core.weight import SparseWeight


class Stateful(Protocol):
    """A weight, or the `Parts` that a latent weight is computed from."""

    @property
    def state(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Remembered:
    """One thing that is remembered of each weight.

    Args:
        key: where it lies in `weight.state`, and so in a sparsifier's state dict.
        what: what an error calls it.
        remedy: how a method comes to have it.

    Examples:
        >>> Remembered("age", "record of ages", "observe=count_ages").key
        'age'
    """

    key: str
    what: str
    remedy: str

    def known(self, holder: Stateful) -> bool:
        """Whether it is there."""
        return self.key in holder.state

    def of(self, holder: Stateful) -> Tensor:
        """The tensor itself, not a copy.

        Raises:
            ValueError: when it is not there, naming the weight and the remedy.
        """
        if self.key not in holder.state:
            raise ValueError(f"{getattr(holder, 'name', 'this weight')} has no {self.what}: {self.remedy}")
        return holder.state[self.key]

    def flat(self, holder: Stateful) -> Tensor:
        """`of` as (numel,)."""
        return self.of(holder).view(-1)

    def set(self, weight: SparseWeight, value: Tensor) -> None:
        """Remember `value` from now on."""
        weight.state[self.key] = value

    def begin(self, weight: SparseWeight, first: Callable[[], Tensor]) -> Tensor:
        """The tensor itself; where it is not there yet, `first()` from now on."""
        if self.key not in weight.state:
            weight.state[self.key] = first()
        return weight.state[self.key]


MOMENTUM = Remembered("momentum", "running mean of gradients", "give the method observe=keep_momentum(decay)")
"""The running mean of gradients at every position, (numel,), that `keep_momentum` keeps."""

_RECORD = "record of explored positions", "add Need.EXPLORED to the needs of the method"

EXPLORED = Remembered("explored", *_RECORD)
"""Which units were ever active, bool (places,), that `mark_explored` keeps."""

PLACED = Remembered("placed", *_RECORD)
"""How often a unit became active, int64 (), that `mark_explored` keeps."""

DROP_THRESHOLD = Remembered("threshold", "drop threshold", "drop by adaptive_threshold() once")
"""The threshold of `adaptive_threshold` and how often it was used, float64 (2,)."""

TARGET = Remembered("target", "number of entries to come back to", "update it by a soft memory bound once")
"""How many units a weight had before it held more for a while, int64 ()."""

_LATENT = "give the method a Latent"

LATENT = Remembered("latent", "latent values", _LATENT)
"""The values that are trained in place of the weight, of its shape."""

BACKWARD_SET = Remembered("backward", "set of positions that gradients reach", "start the method first")
"""The positions that gradients reach in Top-KAST, bool of the weight's shape."""

MOVEMENT_SCORES = Remembered("scores", "trained scores", f'{_LATENT} that trains "scores"')
"""The trained scores of movement pruning, of the weight's shape."""

SOFT_THRESHOLD = Remembered("threshold", "trained threshold", f'{_LATENT} that trains "threshold"')
"""The trained number behind the threshold of STR, (1,)."""

GATE_LOGITS = Remembered("log_alpha", "trained gates", f'{_LATENT} that trains "log_alpha"')
"""log alpha of the gates of L0 regularization, of the weight's shape."""

DIAGONAL_LOGITS = Remembered("alpha", "trained diagonals", f'{_LATENT} that trains "alpha"')
"""alpha of the diagonals of DynaDiag, (diagonals,)."""

DIAGONAL_COUNT = Remembered("diagonals", "number of diagonals to choose", "start the method first")
"""How many diagonals DynaDiag chooses, int64 ()."""

PATTERN = Remembered("pattern", "pattern of its values", "start the method first")
"""Where a weight whose inputs are permuted has values before that, bool of its shape."""

PERMUTATION = Remembered("permutation", "trained permutation", f'{_LATENT} that trains "permutation"')
"""The matrix by which PA-DST mixes a weight's inputs, (inputs, inputs)."""

INPUT_ORDER = Remembered("order", "order of its inputs", "train the method until its permutation is chosen")
"""Which input of the pattern each input of the weight is, int64 (inputs,), once the permutation is chosen."""

TEMPERATURE = Remembered("temperature", "temperature", "start the method first")
"""The temperature of a softmax, float64 (); 0 once its choice is made."""

SCALE = Remembered("scale", "factor of what is left of its values", "start the method first")
"""The factor that makes up for a soft threshold in S-STE, float64 ()."""

LOG_VARIANCE = Remembered("log_variance", "trained variances", f'{_LATENT} that trains "log_variance"')
"""log sigma^2 of variational dropout, of the weight's shape."""
