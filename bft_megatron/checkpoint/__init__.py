"""Runs that survive: stopping, whole checkpoints, which are kept. A module a concern; importing this one costs nothing.

stopping    all ranks agree, save and stop      integrity   is a checkpoint whole
recovery    the newest whole one, at a start    retention   which are deleted
hf_copies   those kept as Hugging Face models
"""
