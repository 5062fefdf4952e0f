"""Learned sparsity: weights computed from values that are trained in their place.

Latent values live at every position and may come back. What the model holds between steps is the weight computed from
them, zero outside its topology. `Sparsifier.harden` ends a method and lets the weights train on as they are.
"""
