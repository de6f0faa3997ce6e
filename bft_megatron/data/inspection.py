"""Reading one prepared row for inspection and printing it: its text, and which of it is supervised. HTML is in `page`.

The text is decoded from the row's own token ids, span by span, and never taken from the source, so that it shows
exactly the tokens that the model reads.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from datasets import Dataset as Table
from rich.console import Console
from rich.text import Text

from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.data.blend import Blend
from bft_megatron.data.packing import padded
from bft_megatron.errors import UserError

_COLUMNS = ("tokens", "learned", "weight", "file", "line")
_BROKEN = "\ufffd"  # replaces bytes that are not a whole character
_HARMLESS = "\n\t\u200c\u200d"  # the last two (ZWNJ, ZWJ) shape the letters and emoji around them


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a sample that are all supervised or not, and all control tokens or not.

    Attributes:
        text: the decoded text; bytes that are not a whole character are shown as U+FFFD.
        tokens: number of tokens.
        supervised: whether the tokens are supervised.
        control: whether they are control tokens, as opposed to text that spells one.
    """

    text: str
    tokens: int
    supervised: bool
    control: bool


@dataclass(frozen=True)
class Sample:
    """A sample in its row.

    Attributes:
        where: file and line, or file and row.
        weight: its weight in the data.
        start: its first place in the row.
        tokens: number of places, without padding; with the last label, it has one token more.
        supervised: number of supervised labels.
        padding: number of padding places after it.
        spans: its text.
    """

    where: str
    weight: float
    start: int
    tokens: int
    supervised: int
    padding: int
    spans: list[Span]


@dataclass(frozen=True)
class Row:
    """A prepared row and its samples.

    Attributes:
        number: the row's number from 0, counted through the sources.
        rows: number of rows in all sources.
        source: its source's name.
        places: length of a row in tokens.
        samples: the samples in their order in the row.
    """

    number: int
    rows: int
    source: str
    places: int
    samples: list[Sample]

    def summary(self) -> str:
        """Return one line about the row's content."""
        tokens = sum(sample.tokens for sample in self.samples)
        supervised = sum(sample.supervised for sample in self.samples)
        return (
            f"row {self.number} (of 0 to {self.rows - 1}), from {self.source}: {_count(len(self.samples), 'sample')}, "
            f"{tokens:,} of {self.places:,} places full ({tokens / self.places:.1%}), {supervised:,} labels learned "
            f"({supervised / tokens:.1%})"
        )


def read(blend: Blend, files: list[tuple[str, ...]], tokenizer: ChatTokenizer, number: int) -> Row:
    """Read a row of the prepared sources.

    Args:
        files: each source's files.
        tokenizer: the tokenizer that prepared them.
        number: the row's number from 0, counted through the sources.

    Raises:
        UserError: there is no such row.
    """
    rows = sum(blend.sizes)
    if not 0 <= number < rows:
        raise UserError(f"there are the rows 0 to {rows - 1}", f"--row {number}")
    source, within = blend.find(number)
    folder = blend.parts[source].prepared.folder
    members = Table.from_file(str(folder / "rows.arrow"))[within]["samples"]
    columns = Table.from_file(str(folder / "samples.arrow")).with_format("numpy")[members]
    samples, start = [], 0
    for ids, supervised, weight, file, line in zip(*(columns[name] for name in _COLUMNS), strict=True):
        tokens = len(ids) - 1
        size = padded(tokens, blend.pad_multiple) if blend.packing else blend.seq_length
        labels = np.append(False, supervised[1:])  # the first token is never a label
        spans = decode(ids.tolist(), labels.tolist(), tokenizer)
        where = f"{files[source][file]}:{line}"
        samples.append(Sample(where, float(weight), start, tokens, int(labels.sum()), size - tokens, spans))
        start += size
    return Row(number, rows, blend.parts[source].name, blend.seq_length, samples)


def decode(ids: list[int], supervised: list[bool], tokenizer: ChatTokenizer) -> list[Span]:
    """Decode a sample's tokens to spans of text; joined, the spans are the text of the whole sample.

    Decoding each span alone would lose a character whose bytes lie in two spans (it is shown in the second) and, with
    some tokenizers, the space before a span. So a span is decoded together with the spans before it, back to the last
    but one that began with a whole character, and its text is what this adds.
    """
    control = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    kinds = [(is_supervised, token in control) for token, is_supervised in zip(ids, supervised, strict=True)]
    spans: list[Span] = []
    start = window = shown = 0  # the text from token `window` on is decoded; its first `shown` characters are in spans
    begins_whole = True
    for (is_supervised, is_control), group in groupby(kinds):
        end = start + len(list(group))
        text = tokenizer.backend.decode(ids[window:end], skip_special_tokens=False)
        ends_whole = end == len(ids) or not text.endswith(_BROKEN)
        text = text if ends_whole else text.rstrip(_BROKEN)
        spans.append(Span(text[shown:], end - start, is_supervised, is_control))
        if begins_whole and ends_whole:
            window, text = start, tokenizer.backend.decode(ids[start:end], skip_special_tokens=False)
        shown = len(text) if ends_whole else max(shown, len(text))
        start, begins_whole = end, ends_whole
    return spans


def visible(text: str) -> str:
    """Spell out control and format characters, so that a terminal or browser displays them instead of obeying them."""
    return "".join(c if c in _HARMLESS or unicodedata.category(c) not in ("Cc", "Cf") else _spelled(c) for c in text)


def print_row(row: Row, console: Console) -> None:
    """Print the row: supervised text green, the rest dim; without colours, supervised text stands between ⟦ and ⟧."""
    bare = console.color_system is None or console.no_color
    legend = [("learned", True, False), (" not learned ", False, False), ("control token", False, True)]
    console.print(row.summary(), soft_wrap=True, highlight=False)
    console.print(_coloured([Span(text, 0, supervised, control) for text, supervised, control in legend], bare))
    for sample in row.samples:
        console.print(f"\n── {heading(sample)}", style="bold", soft_wrap=True, highlight=False, markup=False)
        console.print(_coloured(sample.spans, bare), soft_wrap=True)
    left = row.places - sum(sample.tokens + sample.padding for sample in row.samples)
    if left:
        console.print(f"\n── {left:,} places empty", style="bold", highlight=False)


def heading(sample: Sample) -> str:
    """Return one line about a sample: its origin, place, tokens and weight."""
    padding = f", {sample.padding:,} of padding" if sample.padding else ""
    return (
        f"{sample.where}, places {sample.start:,} to {sample.start + sample.tokens - 1:,}: "
        f"{_count(sample.tokens, 'token')}, {sample.supervised:,} learned{padding}, weight {sample.weight:g}"
    )


def _coloured(spans: list[Span], bare: bool) -> Text:
    text = Text()
    for supervised, group in groupby(spans, lambda span: span.supervised):
        text.append("⟦" if bare and supervised else "")
        for span in group:
            style = "bold green" if supervised else "dim"
            text.append(visible(span.text), f"{style} underline" if span.control else style)
        text.append("⟧" if bare and supervised else "")
    return text


def _spelled(character: str) -> str:
    """Return ESC as ␛, U+202E as <U+202E>."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
