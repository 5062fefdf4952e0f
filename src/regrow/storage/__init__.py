"""How the active entries of a weight are kept: one module for each storage, behind `weight.SparseWeight`."""
