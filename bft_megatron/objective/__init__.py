"""The objectives and their loss: log-probabilities of the labels over a sharded vocabulary, and the weights from them.

Nothing here depends on recipes, data files or Megatron's training loop. Importing the package alone imports no torch.
"""
