"""Recipes of sparse training, by family; each is a function of its options that returns a `Method`."""

from collections.abc import Callable as _Callable

from regrow.method import Method as _Method
from regrow.methods.baselines import dense as dense
from regrow.methods.baselines import static as static
from regrow.methods.dynamic import rigl as rigl
from regrow.methods.dynamic import set_ as set_
from regrow.methods.dynamic import snfs as snfs
from regrow.methods.pruning import gmp as gmp
from regrow.methods.pruning import snip as snip
from regrow.methods.small_dense import small_dense as small_dense

RECIPES: dict[str, _Callable[..., _Method]] = {
    "dense": dense,
    "static": static,
    "set": set_,
    "snfs": snfs,
    "snip": snip,
    "gmp": gmp,
    "rigl": rigl,
}
"""Every recipe by the name that users type."""
