"""Other libraries' sparse layers, made as their own documentation makes them, to be compared with."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
from torch import nn

from regrow.engine.timing import Maker, Topologies, masked

_WIDE = 32
"""From this width of the image on, SparseProp's README has its convolutions go along the width."""


def peers(module: nn.Module, width: int) -> dict[str, Maker]:
    """What makes other libraries' layers that can stand for a dense `module`, by library.

    A maker raises ImportError when its library is not installed.

    Args:
        module: dense.
        width: the last axis of its input.
    """
    if any(p.dtype != torch.float32 for p in module.parameters()):
        return {}
    if isinstance(module, nn.Linear):
        return {"SparseLab": sparselab, "SparseProp": sparseprop}
    if isinstance(module, nn.Conv2d) and _is_plain(module):
        return {"SparseProp": lambda dense, topologies: sparseprop(dense, topologies, wide=width >= _WIDE)}
    return {}


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether SparseProp has such a convolution: square, padded by zeros, neither dilated nor in groups."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or conv.groups != 1 or conv.dilation != (1, 1):
        return False
    return all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))


def sparselab(module: nn.Module, topologies: Topologies) -> nn.Module:
    """SparseLab's layer with the weight and bias of an `nn.Linear`, set as its constructor sets its own."""
    package = import_module("sparselab")
    assert isinstance(module, nn.Linear)
    weight = masked(module, topologies).get_parameter("weight").detach()
    sparsity = min(1 - topologies["weight"].density, 0.99)
    layer: nn.Module = package.SparseLinear(
        module.in_features, module.out_features, bias=module.bias is not None, sparsity=sparsity
    )
    csr = package.PaddedCSR.from_dense(weight)
    layer.__dict__["_csr"] = csr
    layer.register_parameter("_values", nn.Parameter(torch.from_numpy(np.asarray(csr.values))))
    if module.bias is not None:
        layer.get_parameter("bias").detach().copy_(module.bias)
    return layer


def sparseprop(module: nn.Module, topologies: Topologies, *, wide: bool = False) -> nn.Module:
    """SparseProp's layer, made from an `nn.Linear` or `nn.Conv2d` with zeros as its README does.

    Args:
        module: dense.
        topologies: what is active.
        wide: have a convolution go along the width of the image.
    """
    package = import_module("sparseprop.modules")
    dense = masked(module, topologies)
    made: nn.Module
    if isinstance(dense, nn.Linear):
        made = package.SparseLinear.from_dense(dense)
    else:
        made = package.SparseConv2d.from_dense(dense, vectorizing_over_on=wide)
    return made
