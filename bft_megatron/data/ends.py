"""Counting what ends the supervised turns, and choosing from it the tokens at which the trained model is to stop.

A model stops where its training did: at the control token that ended its turns. The base model's own end of text may
be another one, so what is exported has to name these too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.conversations.special_tokens import added_tokens

if TYPE_CHECKING:
    from bft_megatron.data.counts import Counts

RARELY = 100
"""A token that text can spell is a stop token if it ends at least one in this many turns: one answer that happens to
end in `</think>` must not stop every other answer there. What the template alone can write needs no such number: the
end of a rare tool call is where the server has to take over."""

AT_ENDS = 99
"""A stop token is learned at the end of a turn this many times for each time inside one, where stopping would cut the
answer. (That it is inside at all is left to a few odd rows.)"""


@dataclass(frozen=True)
class EndFinder:
    """A function that counts the ends of a sample's supervised turns.

    Attributes:
        whole: whether a sample is supervised as a whole (`data.supervise: all`), and only its own end counts.
    """

    tokenizer: ChatTokenizer
    whole: bool

    def __call__(self, tokens: np.ndarray, supervised: np.ndarray, cut: bool, counts: Counts) -> None:
        """Add a sample's turns to the counts.

        Args:
            tokens: [n + 1] int32.
            supervised: [n + 1] bool.
            cut: whether the sample was truncated: a turn that reaches its last token ends elsewhere.
        """
        edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
        turns = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b < len(tokens) or not cut]
        if self.whole:
            turns = [(a, b) for a, b in turns if b == len(tokens)]
        at = {last for a, b in turns if (last := self._last(tokens, a, b)) is not None}
        counts.turns += len(turns)
        _count(counts.ends, tokens, at)
        _count(counts.spelled, tokens, {place for place in at if tokens[place] in self._spelled})
        if not self.whole:
            _count(counts.inside, tokens, set(np.flatnonzero(supervised & self._is_added(tokens)).tolist()) - at)

    def _last(self, tokens: np.ndarray, start: int, end: int) -> int | None:
        """Return the place of the added token in [start, end) that only white space follows, or None."""
        while end > start:
            end -= 1
            if tokens[end] in self._added:
                return int(end)
            if not self._is_space(int(tokens[end])):
                break
        return None

    def _is_space(self, token: int) -> bool:
        if token not in self._spaces:
            self._spaces[token] = not self.tokenizer.backend.decode([token], skip_special_tokens=False).strip()
        return self._spaces[token]

    def _is_added(self, tokens: np.ndarray) -> np.ndarray:
        return np.isin(tokens, self._ids)

    @cached_property
    def _spaces(self) -> dict[int, bool]:
        return {}

    @cached_property
    def _added(self) -> frozenset[int]:
        """The added tokens but the unknown one, which any text may become."""
        unknown = self.tokenizer.variables.get("unk_token")
        return frozenset(i for i, token in added_tokens(self.tokenizer).items() if token.content != unknown)

    @cached_property
    def _spelled(self) -> frozenset[int]:
        """The added tokens that a message's text can spell."""
        control = set(self.tokenizer.control) - self.tokenizer.allowed
        return frozenset(i for i, token in added_tokens(self.tokenizer).items() if token.content not in control)

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.array(sorted(self._added), np.int32)


def stop_tokens(counts: Counts) -> set[int]:
    """Return the ids of the tokens at which a model trained on these samples, of all its sources, is to stop."""
    return {
        int(token)
        for token, times in counts.ends.items()
        if (token not in counts.spelled or times * RARELY >= counts.turns)
        and times >= AT_ENDS * counts.inside.get(token, 0)
    }


def _count(into: dict[str, int], tokens: np.ndarray, places: set[int]) -> None:
    for place in places:
        token = str(tokens[place])
        into[token] = into.get(token, 0) + 1
