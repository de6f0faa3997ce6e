"""Hugging Face interoperability: model configurations, weights in and out, and loss functions for its Trainer."""
