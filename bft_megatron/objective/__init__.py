"""What is descended: log-probabilities of the labels over a sharded vocabulary, and the weights made of them.

Nothing here knows of recipes, data files or Megatron's loop. Importing the package alone imports no torch.
"""
