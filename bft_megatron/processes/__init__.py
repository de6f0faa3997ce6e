"""Processes of one machine: starting ranks, their output, their signals."""
