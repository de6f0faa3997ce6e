"""The objective inside other trainers."""
