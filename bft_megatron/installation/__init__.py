"""The parts of this installation that a run on a GPU computes with: which are there, and what is missing."""
