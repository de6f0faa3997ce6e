"""The objectives inside other trainers."""
