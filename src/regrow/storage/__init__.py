"""Floor 4, how: how the values of a weight are held, masked, compressed or latent, and what a backward leaves."""
