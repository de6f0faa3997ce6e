"""The numbers of a source that `prepare` reports, and that later starts read again from its `prepared.json`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass
class Counts:
    """Numbers of conversations, samples and tokens of a source, kept and dropped.

    Attributes:
        conversations: conversations in the source.
        refused: rows left out because they are not conversations (`data.on_error: skip`); not in `conversations`.
        overlong: samples longer than a row, dropped or truncated as the recipe says.
        unsupervised: samples dropped because they have no supervised token.
        samples: kept samples.
        rows: rows that the kept samples fill.
        tokens: input tokens of the kept samples, without padding.
        supervised: supervised labels.
        weightless: kept samples of weight 0, which are not learned from.
        highest_token: the largest token id of the kept samples, which must be inside the model's vocabulary.
        lengths: histogram of samples by length, before any is dropped: entry k counts 2^(k-1) < tokens <= 2^k.
        notes: sentence about some of the samples -> how many of them, before any is dropped.
        turns: supervised turns of the kept samples, without those that a sample's truncation cut.
        ends: added token that ends such a turn -> how many; its id is text, as JSON's keys are.
        spelled: the same of tokens that a message's text can spell.
        inside: added token that is learned elsewhere -> how often.
    """

    conversations: int = 0
    refused: int = 0
    overlong: int = 0
    unsupervised: int = 0
    samples: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    weightless: int = 0
    highest_token: int = 0
    lengths: list[int] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    spelled: dict[str, int] = field(default_factory=dict)
    inside: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Add another chunk's or source's counts to these."""
        for name in (f.name for f in fields(Counts)):
            mine, its = getattr(self, name), getattr(other, name)
            if name == "lengths":
                longer, shorter = sorted((mine, its), key=len, reverse=True)
                self.lengths = [n + (shorter[k] if k < len(shorter) else 0) for k, n in enumerate(longer)]
            elif isinstance(mine, dict):
                setattr(self, name, dict(Counter(mine) + Counter(its)))
            else:
                setattr(self, name, max(mine, its) if name == "highest_token" else mine + its)
