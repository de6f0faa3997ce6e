"""Runs that survive: signals, whole checkpoints, which are kept. A module a concern; importing this one costs nothing.

signals     what a scheduler or a person asks of a rank     stopping    all ranks agree, save and stop
integrity   is a checkpoint whole                           recovery    the newest whole one, before a start
retention   which are deleted                               writer      how Megatron saves
hf_copies   those kept as Hugging Face models
"""

from bft_megatron.checkpoint.writer import without_helper_process

__all__ = ["without_helper_process"]
