"""Checkpoints over a run's life: stopping, integrity, recovery, retention. Importing this package costs nothing.

stopping    all ranks agree to save and stop    integrity   check a checkpoint for damage
recovery    the newest intact one, at a start   retention   delete old ones
saving      what follows a save                 hf_copies   export the kept ones for Hugging Face
gate        whether a step may be saved         streak      what is not finite in a row
"""
