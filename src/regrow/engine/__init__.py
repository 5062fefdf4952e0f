"""Floor 5, the roof: the call, the sparsifier and the training step; joins both wings, knows no particular method."""
