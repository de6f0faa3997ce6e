"""Plans of memory and time on a cluster, without using it: a rank's real training step over tensors without values."""
