"""Floor 3, what: recipes of sparse training, a file for each with its presets, in the families of the README.

A recipe is a function of its options that returns a `Method`, composed from `regrow.parts`. `RECIPES` holds them all.
"""

from regrow.methods.at_start.force import force as force
from regrow.methods.at_start.grasp import grasp as grasp
from regrow.methods.at_start.snap_it import snap_it as snap_it
from regrow.methods.at_start.snip import snip as snip
from regrow.methods.at_start.snip_it import snip_it as snip_it
from regrow.methods.at_start.synflow import synflow as synflow
from regrow.methods.baselines.dense import dense as dense
from regrow.methods.baselines.static import static as static
from regrow.methods.dynamic.deep_r import deep_r as deep_r
from regrow.methods.dynamic.dsr import dsr as dsr
from regrow.methods.dynamic.dst import dst as dst
from regrow.methods.dynamic.gse import gse as gse
from regrow.methods.dynamic.haste import haste as haste
from regrow.methods.dynamic.itop import itop_rigl as itop_rigl
from regrow.methods.dynamic.itop import itop_set as itop_set
from regrow.methods.dynamic.mest import mest as mest
from regrow.methods.dynamic.rigl import rigl as rigl
from regrow.methods.dynamic.rigl_nm import rigl_nm as rigl_nm
from regrow.methods.dynamic.set_ import set_ as set_
from regrow.methods.dynamic.snfs import snfs as snfs
from regrow.methods.dynamic.srigl import srigl as srigl
from regrow.methods.gradual.ac_dc import ac_dc as ac_dc
from regrow.methods.gradual.gmp import gmp as gmp
from regrow.methods.gradual.gmp import gmp_uniform as gmp_uniform
from regrow.methods.gradual.granet import granet as granet
from regrow.methods.gradual.granet import granet_uniform as granet_uniform
from regrow.methods.learned.dnw import dnw as dnw
from regrow.methods.learned.dynadiag import dynadiag as dynadiag
from regrow.methods.learned.l0 import l0 as l0
from regrow.methods.learned.movement import movement as movement
from regrow.methods.learned.pa_dst import pa_dst as pa_dst
from regrow.methods.learned.s_ste import s_ste as s_ste
from regrow.methods.learned.soft_movement import soft_movement as soft_movement
from regrow.methods.learned.sr_ste import sr_ste as sr_ste
from regrow.methods.learned.ste import ste as ste
from regrow.methods.learned.str_ import str_ as str_
from regrow.methods.learned.top_kast import top_kast as top_kast
from regrow.methods.learned.variational_dropout import variational_dropout as variational_dropout
from regrow.methods.recipe import Recipe as Recipe

RECIPES: dict[str, dict[str, Recipe]] = {
    "baselines": {
        "dense": dense,
        "static": static,
    },
    "at_start": {
        "snip": snip,
        "snip_it": snip_it,
        "snap_it": snap_it,
        "grasp": grasp,
        "synflow": synflow,
        "force": force,
    },
    "gradual": {
        "gmp": gmp,
        "gmp_uniform": gmp_uniform,
        "granet": granet,
        "granet_uniform": granet_uniform,
        "ac_dc": ac_dc,
    },
    "dynamic": {
        "set": set_,
        "snfs": snfs,
        "rigl": rigl,
        "rigl_nm": rigl_nm,
        "dst": dst,
        "itop_set": itop_set,
        "itop_rigl": itop_rigl,
        "srigl": srigl,
        "dsr": dsr,
        "mest": mest,
        "deep_r": deep_r,
        "gse": gse,
        "haste": haste,
    },
    "learned": {
        "dnw": dnw,
        "ste": ste,
        "sr_ste": sr_ste,
        "s_ste": s_ste,
        "top_kast": top_kast,
        "str": str_,
        "movement": movement,
        "soft_movement": soft_movement,
        "l0": l0,
        "variational_dropout": variational_dropout,
        "dynadiag": dynadiag,
        "pa_dst": pa_dst,
    },
}
"""Every recipe by family, and in it by the name that users type."""

BY_NAME: dict[str, Recipe] = {name: made for family in RECIPES.values() for name, made in family.items()}
"""The same without the families."""
