"""What a recipe needs of a cluster, without one: the real training step of a rank over tensors without values."""
