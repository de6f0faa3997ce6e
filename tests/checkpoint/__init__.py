"""Runs that are stopped, damaged or fed bad rows, and what becomes of them."""
