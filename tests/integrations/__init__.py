"""Tests of the objectives inside other projects' training loops."""
