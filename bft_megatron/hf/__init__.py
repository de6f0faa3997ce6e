"""Hugging Face in and out: architectures, weights, and the objectives for transformers' Trainer."""
