"""Tests of the launch scripts and the image that need neither; on a real Slurm they are in tests/slurm."""
