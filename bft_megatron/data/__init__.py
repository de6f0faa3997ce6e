"""From a file of conversations to rows of tokens: reading, masking, packing, caching, and the data set of a run.

Only `dataset` imports torch; the rest runs before anything slow or distributed starts.
"""
