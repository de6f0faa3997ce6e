"""The arguments that are not carried over: each is listed with its reason, or needs no counterpart."""

from __future__ import annotations

import difflib

from bft_megatron.llamafactory.arguments import DEFAULTS, IS_CARRIED, IS_NAMED, REASONS, has_default
from bft_megatron.llamafactory.conversion import Conversion


def carry(to: Conversion) -> None:
    """Record the arguments that the config gives another value than their default, and the unknown ones, as lost.

    Those that need no counterpart are recorded by reason. Call it after every other concern.
    """
    config = to.config
    for name in config.names:
        if name not in DEFAULTS:
            to.lose(name, f"is none of the fields of LLaMA-Factory's SFT that are known here{_hint(name)}")
        elif has_default(name, config.raw(name)):
            continue
        elif name in IS_NAMED:
            to.lose(name, REASONS[name])
        elif name not in IS_CARRIED:
            to.not_needed.setdefault(REASONS[name], []).append(name)


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, DEFAULTS, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""
