"""The arguments that a LLaMA-Factory SFT config may have, each with its default and with what becomes of it here.

They are those of its data, model, finetuning and generating arguments, of its Megatron backends, and of transformers'
training arguments of releases 4 and 5. Each is in one of three tables: `carried` over to the recipe, `named` in the
list of what is not carried over, or `unneeded` here.
"""

from __future__ import annotations

from typing import Any

from bft_megatron.llamafactory.carried import CARRIED
from bft_megatron.llamafactory.named import NAMED
from bft_megatron.llamafactory.unneeded import UNNEEDED

REASONS: dict[str, str] = {
    name: reason for table in (NAMED, UNNEEDED) for reason, arguments in table.items() for name in arguments
}
"""Argument that is not carried over -> reason."""

DEFAULTS: dict[str, Any] = {
    name: default
    for table in (CARRIED, NAMED, UNNEEDED)
    for arguments in table.values()
    for name, default in arguments.items()
}
"""Argument -> its default."""

IS_CARRIED = frozenset(name for arguments in CARRIED.values() for name in arguments)
"""Arguments that are carried over."""

IS_NAMED = frozenset(name for arguments in NAMED.values() for name in arguments)
"""Arguments that are listed as not carried over unless they have their default."""

_SAME = {"report_to": ("tensorboard", ["tensorboard"], ["none"]), "include_num_input_tokens_seen": (False,)}
"""Argument -> values besides its default that ask for nothing else."""


def has_default(name: str, value: Any) -> bool:
    """Return whether a known argument's value is its default, or asks for nothing else: off where that is off."""
    default = DEFAULTS[name]
    return value == default or (not value and not default) or value in _SAME.get(name, ())
