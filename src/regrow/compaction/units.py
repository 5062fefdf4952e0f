"""Which elements of all tensors stay or go together: classes of labels, joined step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FREE = 0
"""The label of elements that no weight makes: they stay."""


class Units:
    """Disjoint classes of labels. A class is what can only be removed whole: a neuron, a channel, a head.

    Examples:
        >>> units = Units()
        >>> first, second = units.fresh(2), units.fresh(2)
        >>> units.tie(first, second, "an addition")
        >>> bool((units.find(first) == units.find(second)).all())
        True
    """

    def __init__(self) -> None:
        self.parent = torch.zeros(1, dtype=torch.int64)
        self.bound = torch.zeros(1, dtype=torch.bool)
        """Labels that must stay whatever their elements are."""
        self.why = torch.zeros(1, dtype=torch.int64)
        """The number of what is said of a label, 0 for nothing."""
        self.words = [""]
        self.bound[FREE] = True

    def fresh(self, count: int) -> Tensor:
        """(count,) int64 labels of classes of their own."""
        labels = torch.arange(len(self.parent), len(self.parent) + count)
        self.parent = torch.cat([self.parent, labels])
        self.bound = torch.cat([self.bound, self.bound.new_zeros(count)])
        self.why = torch.cat([self.why, self.why.new_zeros(count)])
        return labels

    def find(self, labels: Tensor) -> Tensor:
        """The least label of the class of each."""
        return self.parent[labels]

    def tie(self, a: Tensor, b: Tensor, why: str | None = None) -> None:
        """Join the classes of a and b (same shape), element by element."""
        a, b = distinct(a, b)
        if why is not None:
            self.tell(a, why)
        pairs = self.find(torch.stack([a.reshape(-1), b.reshape(-1)]))
        while (differ := pairs[0] != pairs[1]).any():
            # One number for a pair, since torch finds different columns many times slower than different numbers.
            count = len(self.parent)
            numbers = torch.unique(pairs.amin(0)[differ] * count + pairs.amax(0)[differ])
            low, high = numbers // count, numbers % count
            self.parent.scatter_reduce_(0, high, low, "amin")
            while not torch.equal(self.parent, shorter := self.parent[self.parent]):
                self.parent = shorter
            pairs = self.find(torch.stack([low, high]))

    def pin(self, labels: Tensor, why: str) -> None:
        """Say that these must stay, and why."""
        (labels,) = distinct(labels)
        self.why[labels[~self.bound[labels]]] = 0
        self.tell(labels, why)
        self.bound[labels] = True

    def tell(self, labels: Tensor, why: str) -> None:
        """Keep what is said of labels of which nothing was said."""
        if why not in self.words:
            self.words.append(why)
        said = self.why[labels]
        self.why[labels] = torch.where(said == 0, self.words.index(why), said)

    def stays(self) -> Tensor:
        """(labels,) bool: the least labels of the classes of which something must stay."""
        found = torch.zeros_like(self.bound)
        found[self.find(self.bound.nonzero().view(-1))] = True
        return found

    def reasons(self) -> list[str | None]:
        """What is said of the class of each least label."""
        number, why = torch.zeros_like(self.why), self.why
        for said in (why, torch.where(self.bound, why, 0)):  # what makes one stay says more than what ties it
            most = torch.zeros_like(why).scatter_reduce_(0, self.parent, said, "amax")
            number = torch.where(most > 0, most, number)
        return [self.words[n] if n else None for n in number.tolist()]


def lean(apply: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What an element-wise function makes of tensors of one shape, each different element once."""
    return apply(*distinct(*tensors)).expand(tensors[0].shape)


def distinct(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape without the indices along which all of them are views of the same elements."""
    for axis in range(tensors[0].dim()):
        if all(t.stride(axis) == 0 for t in tensors) and tensors[0].shape[axis]:
            tensors = tuple(t.narrow(axis, 0, 1) for t in tensors)
    return list(tensors)
