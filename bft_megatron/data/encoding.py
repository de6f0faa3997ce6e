"""Encoding a chunk of a source into samples: render, tokenise, fit to the row length, count. Runs in many processes.

Writing the samples to disk is in `prepare`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from bft_megatron.conversations import chat, masks, special_tokens
from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.conversations.template_limits import Limits, TemplateFault
from bft_megatron.data.counts import Counts
from bft_megatron.data.ends import EndFinder
from bft_megatron.data.workers import unprepared
from bft_megatron.errors import UserError
from bft_megatron.reading.formats import Conversation
from bft_megatron.reading.readers import CHUNK_BYTES, Chunk
from bft_megatron.reading.sources import Source
from bft_megatron.recipe.schema import DataSettings

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Encoded:
    """The kept samples of a chunk.

    Attributes:
        samples: a table of tokens (list of int32), learned (list of bool: supervised), weight (float32), line (int64)
            and file (int32). A sample has n + 1 tokens: the row holds the first n, each with the next one as its label
            if that one is supervised.
        lengths: n of each sample.
        counts: the chunk's counts.
        refused: for each row left out, its place and the reason.
    """

    samples: pyarrow.Table
    lengths: np.ndarray
    counts: Counts
    refused: list[str]


_Text = tuple[Conversation, masks.Rendered]

_SPLIT_TO = 4  # with turns: split, the text of a row's samples grows with the square of its turns


@dataclass(frozen=True)
class Encoder:
    """A function from the chunks of one source to samples."""

    source: Source
    tokenizer: ChatTokenizer
    settings: DataSettings

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the chunk's samples.

        Raises:
            UserError: at the first row that is not a conversation or that the template refuses, unless
                `data.on_error` is skip; always if the template goes beyond its limits, or memory is not enough.
        """
        counts, refused = Counts(), list[str]()
        kept, rendered = list[_Sample](), list[_Text]()
        for found in self._rendered(chunk):
            if not isinstance(found, UserError):
                counts.conversations += 1
                rendered += found
            elif self.settings.on_error == "skip":
                refused.append(str(found))
            else:
                raise found
            if sum(len(text.text) for _, text in rendered) > CHUNK_BYTES:
                kept += self._kept(rendered, counts)
                rendered = []
        counts.refused = len(refused)
        kept += self._kept(rendered, counts)
        return Encoded(_table(kept), np.array([len(s.tokens) - 1 for s in kept], np.int64), counts, refused)

    def _rendered(self, chunk: Chunk) -> Iterator[list[_Text] | UserError]:
        """Yield each conversation as the rendered texts of its samples, or the error of its row."""
        for found in self.source.convert(chunk):
            if isinstance(found, UserError):
                yield found
                continue
            place = chunk.place(found.line)
            try:
                yield self._texts(found)
            except TemplateFault as e:
                raise TemplateFault(f"{e}, for the row at {place}", self.tokenizer.origin) from None
            except UserError as e:
                yield UserError(str(e), place)
            except (MemoryError, RecursionError) as e:
                raise UserError(unprepared(e), place) from None

    def _texts(self, conversation: Conversation) -> list[_Text]:
        limits = Limits(self.settings.max_row_bytes)
        most = _SPLIT_TO * limits.row_bytes
        made, written = list[_Text](), 0
        for part in chat.split(conversation) if self.settings.turns == "split" else [conversation]:
            made.append((part, chat.render(part, self.tokenizer, self.settings.supervise, limits)))
            written += len(made[-1][1].text)
            if written > most and len(made) > 1:
                raise UserError(
                    f"data.turns: split makes more than {most:,} characters of its answers with all that is before "
                    f"each, {_SPLIT_TO} times data.max_row_bytes: cut the conversation, or raise that"
                )
        return made

    def _kept(self, rendered: list[_Text], all_counts: Counts) -> Iterator[_Sample]:
        """Yield the samples that go into rows, and count the ones that don't."""
        longest, lengths, counts = self.settings.seq_length, Counter[int](), Counts()
        notes = Counter[str]()
        encoded = masks.tokenise([text for _, text in rendered], self.tokenizer)
        for (conversation, text), (tokens, supervised) in zip(rendered, encoded, strict=True):
            notes.update([*conversation.notes, *text.notes, *special_tokens.notes(text.text, self.tokenizer)])
            lengths[max(len(tokens) - 2, 0).bit_length()] += 1
            cut = len(tokens) - 1 > longest
            if cut:
                counts.overlong += 1
                if self.settings.overlong == "drop":
                    continue
                tokens, supervised = tokens[: longest + 1], supervised[: longest + 1]
            labels = int(supervised[1:].sum())
            if not labels:
                counts.unsupervised += 1
                continue
            counts.samples += 1
            counts.tokens += len(tokens) - 1
            counts.supervised += labels
            counts.weightless += conversation.weight == 0
            self._find_ends(tokens, supervised, cut, counts)
            counts.highest_token = max(counts.highest_token, int(tokens.max()))
            yield _Sample(tokens, supervised, conversation)
        counts.lengths = [lengths[k] for k in range(max(lengths, default=-1) + 1)]
        counts.notes = dict(notes)
        all_counts.add(counts)

    @cached_property
    def _find_ends(self) -> EndFinder:
        return EndFinder(self.tokenizer, self.settings.supervise == "all")


@dataclass(frozen=True)
class _Sample:
    tokens: np.ndarray  # [n + 1] int32
    supervised: np.ndarray  # [n + 1] bool
    conversation: Conversation


def _table(samples: list[_Sample]) -> pyarrow.Table:
    import pyarrow as pa

    edges = pa.array(np.cumsum([0, *(len(s.tokens) for s in samples)]), pa.int32())

    def lists(parts: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(edges, pa.array(np.concatenate(parts) if parts else [], kind))

    return pa.table(
        {
            "tokens": lists([s.tokens for s in samples], pa.int32()),
            "learned": lists([s.supervised for s in samples], pa.bool_()),
            "weight": pa.array([s.conversation.weight for s in samples], pa.float32()),
            "line": pa.array([s.conversation.line for s in samples], pa.int64()),
            "file": pa.array([s.conversation.file for s in samples], pa.int32()),
        }
    )
