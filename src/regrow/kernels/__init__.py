"""Floor 2, how: products with sparse weights as torch operators; native code behind them, a reference beside it."""

from regrow.kernels.activations import Keeper as Keeper
from regrow.kernels.geometry import Geometry as Geometry
from regrow.kernels.index import Index as Index
from regrow.kernels.native import instruction_set as instruction_set
from regrow.kernels.ops import conv as conv
from regrow.kernels.ops import conv_transpose as conv_transpose
from regrow.kernels.ops import index as index
from regrow.kernels.ops import linear as linear
from regrow.kernels.ops import sampled as sampled
from regrow.kernels.units import UnitIndex as UnitIndex
from regrow.kernels.units import has_kernels as has_kernels
from regrow.kernels.units import unit_index as unit_index
