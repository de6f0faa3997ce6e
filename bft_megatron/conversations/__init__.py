"""Conversations through a chat template: their text, their tokens, and which of them are learned."""
