"""The data pipeline: from conversations to rows of tokens.

The modules count, pack and cache the samples and serve them as a run's data set. Only `dataset` imports torch; the rest
runs before anything slow or distributed starts.
"""
