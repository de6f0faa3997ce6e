"""Recipes: schema, reader, rules. Imports no torch."""
