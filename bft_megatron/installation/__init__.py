"""The parts that a run on a GPU computes with, and which are missing."""
