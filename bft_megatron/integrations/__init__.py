"""The objectives inside other projects' training loops, one module for each of them."""
