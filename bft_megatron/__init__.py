"""Balanced Fine-Tuning on Megatron-Core: recipes, the vocab-parallel objective, and its place in Megatron's training
step.
"""
