"""Tests of what examples/ holds."""
