"""Processes on one machine: starting ranks, redirecting their output, handling signals."""
