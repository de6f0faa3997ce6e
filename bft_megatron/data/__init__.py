"""The data pipeline: from a file of conversations to rows of tokens.

The modules read, mask, pack and cache the data and serve it as a run's data set. Only `dataset` imports torch; the rest
runs before anything slow or distributed starts.
"""
