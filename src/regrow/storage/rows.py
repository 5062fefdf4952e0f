"""A weight as a block of rows of a dense parameter: what masked, latent and pending weights have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from regrow.core.draws import Stream
from regrow.core.method import Units
from regrow.core.topology import Topology
from regrow.core.units import Pool, mean
from regrow.storage.stored import Draft


def blocks_of(parameter: nn.Parameter, names: Sequence[str]) -> list[tuple[str, slice]]:
    """Each name with its rows: equal blocks of the leading ones, a single block for an ordinary weight."""
    rows = parameter.shape[0] // len(names)
    return [(name, slice(i * rows, (i + 1) * rows)) for i, name in enumerate(names)]


class DenseRows:
    """A `SparseWeight` over a block of rows of a dense parameter; a storage says how it is rewired.

    Args:
        owner: holds the parameter, its optimizer and its gradient.
        name: canonical.
        rows: of the parameter.
        out_axis: which axis counts the outputs.
        in_axis: which axis counts the inputs.
    """

    owner: Draft

    def __init__(self, owner: Draft, name: str, rows: slice, out_axis: int, in_axis: int) -> None:
        self.owner = owner
        self.name = name
        self.rows = rows
        self.out_axis = out_axis
        self.in_axis = in_axis
        self.shape = (rows.stop - rows.start, *owner.parameter.shape[1:])
        self.topology = Topology(self.shape)
        self.pool: Pool = mean
        self.generator = Stream(0, name, 0)
        self.state: dict[str, Tensor] = {}

    def divide(self, units: Units) -> None:
        """Be made of `units` from now on, all of which are active.

        Raises:
            ValueError: when a unit would span two blocks of the parameter, naming the weight.
        """
        unit = units.box(self)
        if len(self.owner.weights) > 1 and self.shape[0] % unit[0]:
            raise ValueError(
                f"{self.name} is one of {len(self.owner.weights)} blocks of {self.shape[0]:,} rows, and units of "
                f"{unit[0]} rows would span two of them: give units whose rows divide a block, or name it in skip="
            )
        self.topology, self.pool = Topology(self.shape, unit=unit), units.pool

    @property
    def has_grad(self) -> bool:
        """Whether the last backward reached this weight."""
        return self.owner.gradient.reached

    def block(self, tensor: Tensor) -> Tensor:
        """This weight's rows of a tensor of the parameter's shape, (numel,): a view where memory allows."""
        return tensor.detach()[self.rows].reshape(-1)

    def active(self, block: Tensor) -> Tensor:
        """The active entries, (nnz,), of this weight's rows (numel,): a view where all are, in their own order."""
        whole = self.topology.is_dense and self.topology.is_unstructured
        return block if whole else block[self.topology.entries.to(block.device)]

    def write(self, tensor: Tensor, positions: Tensor, values: Tensor | float) -> None:
        """Write `values` (n,) to the entries at flat `positions` (n,) of this weight's rows.

        Args:
            tensor: of the parameter's shape.
            positions: in the weight.
            values: of its type, or a number.
        """
        block = self.block(tensor).clone()
        block[positions.to(block.device)] = values.to(block) if isinstance(values, Tensor) else values
        tensor.detach()[self.rows] = block.view(self.shape)

    def everywhere(self) -> Tensor:
        """The gradient at every position, of the parameter's shape."""
        return self.owner.gradient.read()

    def values(self) -> Tensor:
        """Active values, (nnz,)."""
        return self.active(self.block(self.owner.parameter)).clone()

    def set_values(self, values: Tensor) -> None:
        """Replace the active values by `values` (nnz,)."""
        self.write(self.owner.parameter, self.topology.entries, values)

    def grads(self) -> Tensor:
        """Gradients of the loss at the active entries, (nnz,)."""
        return self.active(self.block(self.owner.gradient.read()))

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The gradient at every position, in one block."""
        yield 0, self.block(self.everywhere())

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient at the entries of the units at ascending `positions` (n,)."""
        block = self.block(self.everywhere())
        return block[self.topology.entries_of(positions).to(block.device)]

    def rewire(self, topology: Topology) -> None:
        """Change the topology: survivors keep value and optimizer state, newcomers start at zero."""
        raise NotImplementedError

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology; values and optimizer state are already those that were saved with it."""
        raise NotImplementedError
