"""Floor 6: what sparse training costs and does: FLOPs, sizes, densities, exploration, distance."""

from __future__ import annotations

from regrow.metrics.flops import Flops, LayerFlops, flops, pruning_training_flops, training_flops
from regrow.metrics.size import Form, model_bits, to_bytes, weight_bits
from regrow.metrics.small_dense import small_dense
from regrow.metrics.topologies import Exploration, densities, distance, exploration

__all__ = [
    "Exploration",
    "Flops",
    "Form",
    "LayerFlops",
    "densities",
    "distance",
    "exploration",
    "flops",
    "model_bits",
    "pruning_training_flops",
    "small_dense",
    "to_bytes",
    "training_flops",
    "weight_bits",
]
