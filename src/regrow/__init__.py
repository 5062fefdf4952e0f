"""Sparse training: networks most of whose connections do not exist, during training as well as after it."""

from regrow import methods as methods
from regrow import metrics as metrics
from regrow import nn as nn
from regrow.compaction import compact as compact
from regrow.compaction import order_outputs as order_outputs
from regrow.core.topology import Topology as Topology
from regrow.engine.sparsifier import Sparsifier as Sparsifier
from regrow.engine.sparsify import sparsify as sparsify
from regrow.files import load as load
from regrow.files import save as save

__version__ = "0.1.0"
