"""Recipes of sparse training, by family; each is a function of its options that returns a `Method`."""

from collections.abc import Callable as _Callable

from regrow.core.method import Method as _Method
from regrow.methods.baselines import dense as dense
from regrow.methods.baselines import static as static
from regrow.methods.dynamic import dst as dst
from regrow.methods.dynamic import rigl as rigl
from regrow.methods.dynamic import set_ as set_
from regrow.methods.dynamic import snfs as snfs
from regrow.methods.exploring import itop_rigl as itop_rigl
from regrow.methods.exploring import itop_set as itop_set
from regrow.methods.foresight import force as force
from regrow.methods.foresight import grasp as grasp
from regrow.methods.foresight import snap_it as snap_it
from regrow.methods.foresight import snip_it as snip_it
from regrow.methods.foresight import synflow as synflow
from regrow.methods.gradual import ac_dc as ac_dc
from regrow.methods.gradual import gmp_uniform as gmp_uniform
from regrow.methods.gradual import granet as granet
from regrow.methods.gradual import granet_uniform as granet_uniform
from regrow.methods.learned import dnw as dnw
from regrow.methods.learned import l0 as l0
from regrow.methods.learned import movement as movement
from regrow.methods.learned import soft_movement as soft_movement
from regrow.methods.learned import sr_ste as sr_ste
from regrow.methods.learned import ste as ste
from regrow.methods.learned import str_ as str_
from regrow.methods.learned import top_kast as top_kast
from regrow.methods.learned import variational_dropout as variational_dropout
from regrow.methods.pruning import gmp as gmp
from regrow.methods.pruning import snip as snip
from regrow.methods.rewiring import deep_r as deep_r
from regrow.methods.rewiring import dsr as dsr
from regrow.methods.rewiring import gse as gse
from regrow.methods.rewiring import mest as mest
from regrow.methods.structured import srigl as srigl

RECIPES: dict[str, _Callable[..., _Method]] = {
    "dense": dense,
    "static": static,
    "set": set_,
    "snfs": snfs,
    "snip": snip,
    "gmp": gmp,
    "rigl": rigl,
    "dst": dst,
    "itop_set": itop_set,
    "itop_rigl": itop_rigl,
    "granet": granet,
    "granet_uniform": granet_uniform,
    "gmp_uniform": gmp_uniform,
    "ac_dc": ac_dc,
    "srigl": srigl,
    "dsr": dsr,
    "mest": mest,
    "deep_r": deep_r,
    "gse": gse,
    "snip_it": snip_it,
    "snap_it": snap_it,
    "grasp": grasp,
    "synflow": synflow,
    "force": force,
    "dnw": dnw,
    "ste": ste,
    "sr_ste": sr_ste,
    "top_kast": top_kast,
    "str": str_,
    "movement": movement,
    "soft_movement": soft_movement,
    "l0": l0,
    "variational_dropout": variational_dropout,
}
"""Every recipe by the name that users type."""
