"""A source as tokens and rows on disk: tokenised, packed, written once, found again. Reading rows is in `dataset`.

A prepared folder holds `samples.arrow` (one sample each), `rows.arrow` (the samples of each row) and `prepared.json`
(shape and counts). The Arrow streams are written through `datasets.ArrowWriter`: batch by batch in bounded memory, read
memory-mapped, and opened by anyone with `datasets.Dataset.from_file`; `from_generator` would write the same through a
second cache of its own, keyed on the generator's code. The folder's name is a hash of all that it depends on, and
it gets that name last, so whatever has the name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import batched
from pathlib import Path

from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from rich.console import Console
from rich.progress import Progress

from bft_megatron.data import chat, sources, tokenizers
from bft_megatron.data.packing import pack
from bft_megatron.errors import FieldError, UserError
from bft_megatron.recipe import DataSettings

FORMAT = 1
"""Part of the folder's name: to be raised when the same input is written otherwise than before."""

_BATCH = 1000  # conversations tokenised and written at a time


@dataclass
class Counts:
    """What became of a source's conversations.

    Attributes:
        conversations: those in the source.
        overlong: those longer than a row, dropped or truncated as the recipe says.
        unsupervised: those dropped because nothing of them is learned.
        samples: those kept.
        rows: the rows that these fill.
        tokens: inputs of the kept samples, padding not among them.
        supervised: labels that are learned.
        highest_token: the largest token of the kept samples, which the model's vocabulary has to reach.
    """

    conversations: int = 0
    overlong: int = 0
    unsupervised: int = 0
    samples: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    highest_token: int = 0


@dataclass(frozen=True)
class Prepared:
    """A prepared source.

    Attributes:
        folder: where it lies.
        seq_length: tokens of a row.
        packing: whether a row holds many samples.
        pad_multiple: what a packed sample is padded to a multiple of.
        overlong: what was done with samples longer than a row.
        counts: what became of the conversations.
    """

    folder: Path
    seq_length: int
    packing: bool
    pad_multiple: int
    overlong: str
    counts: Counts

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return self.counts.rows

    @property
    def efficiency(self) -> float:
        """The share of the rows' places that hold a sample's tokens."""
        return self.counts.tokens / (self.counts.rows * self.seq_length)

    def summary(self) -> str:
        """What was kept, and what was not and why, in a line."""
        c = self.counts
        dropped = "truncated" if self.overlong == "truncate" else "dropped"
        return (
            f"{c.conversations:,} conversations: {c.overlong:,} longer than {self.seq_length:,} tokens {dropped}, "
            f"{c.unsupervised:,} with nothing to learn dropped; {c.samples:,} samples of {c.tokens:,} tokens, "
            f"{c.supervised / c.tokens:.1%} learned, in {c.rows:,} rows that are {self.efficiency:.1%} full"
        )


def prepare(
    path: str | Path, model: str | Path, settings: DataSettings, pad_multiple: int, cache: str | Path
) -> Prepared:
    """Tokenise and pack a source, or find it as prepared before. For one process; the others read what it wrote.

    Args:
        path: JSONL of conversations.
        model: Hugging Face folder with the tokenizer and its chat template.
        settings: how conversations become rows (its own `pad_multiple` may be left out of a recipe, so isn't read).
        pad_multiple: what a packed sample is padded to a multiple of; divides `settings.seq_length`.
        cache: folder that prepared sources lie in; made where it is missing.

    Raises:
        UserError: a fault in the source, no tokenizer or template, nothing kept, or no place to write.
    """
    source = _Source(str(path), "data.valid" if str(path) == settings.valid else "data.train")
    folder = Path(cache) / _key(source, model, settings, pad_multiple)
    if folder.exists():
        return load(folder)
    tokenizer, counts = tokenizers.load(model), Counts()
    with _appearing_whole(folder) as part:
        lengths = _write_samples(part, _samples(source, tokenizer, settings, counts))
        if not lengths:
            raise UserError(f"nothing is left to learn from: {counts}", source.path)
        rows = pack(lengths, settings.seq_length, pad_multiple) if settings.packing else _one_each(lengths)
        _write_rows(part, rows)
        counts.samples, counts.rows, counts.tokens = len(lengths), len(rows), sum(lengths)
        prepared = Prepared(folder, settings.seq_length, settings.packing, pad_multiple, settings.overlong, counts)
        (part / "prepared.json").write_text(json.dumps(asdict(prepared) | {"folder": folder.name}, indent=2))
    return load(folder)


def load(folder: str | Path) -> Prepared:
    """A prepared source, by its folder."""
    stored = json.loads((Path(folder) / "prepared.json").read_text())
    return Prepared(**stored | {"folder": Path(folder), "counts": Counts(**stored["counts"])})


@dataclass(frozen=True)
class _Sample:
    """n + 1 tokens: the row holds the first n, each with the next one as its label where that one is learned."""

    tokens: list[int]
    learned: list[bool]
    weight: float
    line: int

    @property
    def length(self) -> int:
        return len(self.tokens) - 1


class _Source:
    """A file of conversations, with a hash of its content and its number of lines, found in one reading."""

    def __init__(self, path: str, field: str) -> None:
        self.path, self.field, self.lines = path, field, 0
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    self.lines += block.count(b"\n")
        except OSError as e:
            raise FieldError(field, f"cannot read {path}: {e.strerror}") from None
        self.content = digest.hexdigest()


def _key(source: _Source, model: str | Path, settings: DataSettings, pad_multiple: int) -> str:
    parts = {
        "format": FORMAT,
        "source": source.content,
        "tokenizer": tokenizers.fingerprint(model),
        "seq_length": settings.seq_length,
        "packing": settings.packing,
        "pad_multiple": pad_multiple,
        "overlong": settings.overlong,
        "supervise": settings.supervise,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _samples(
    source: _Source, tokenizer: tokenizers.ChatTokenizer, settings: DataSettings, counts: Counts
) -> Iterator[list[_Sample]]:
    """The kept samples of a source, in batches; counts what it meets."""
    for conversations in batched(_with_progress(source), _BATCH):
        rendered = [_render(c, source, tokenizer, settings) for c in conversations]
        encoded = chat.tokenise(rendered, tokenizer)
        samples = [_Sample(*e, c.weight, c.line) for e, c in zip(encoded, conversations, strict=True)]
        yield [kept for sample in samples if (kept := _fitted(sample, settings, counts))]


def _render(
    conversation: sources.Conversation, source: _Source, tokenizer: tokenizers.ChatTokenizer, settings: DataSettings
) -> chat.Rendered:
    try:
        return chat.render(conversation.messages, tokenizer, settings.supervise)
    except UserError as e:
        raise UserError(str(e), f"{source.path}:{conversation.line}") from None


def _fitted(sample: _Sample, settings: DataSettings, counts: Counts) -> _Sample | None:
    """The sample as it goes into a row, or None if it doesn't."""
    counts.conversations += 1
    if sample.length > settings.seq_length:
        counts.overlong += 1
        if settings.overlong == "drop":
            return None
        end = settings.seq_length + 1
        sample = replace(sample, tokens=sample.tokens[:end], learned=sample.learned[:end])
    learned = sum(sample.learned[1:])
    if not learned:
        counts.unsupervised += 1
        return None
    counts.supervised += learned
    counts.highest_token = max(counts.highest_token, max(sample.tokens))
    return sample


def _with_progress(source: _Source) -> Iterator[sources.Conversation]:
    """The conversations of a source, with a bar where someone looks at a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(
            sources.read(source.path, source.field), total=source.lines, description=f"tokenising {source.path}"
        )


def _write_samples(folder: Path, batches: Iterator[list[_Sample]]) -> list[int]:
    """Write samples as they come; their lengths are all that stays in memory."""
    columns = {
        "tokens": List(Value("int32")),
        "learned": List(Value("bool")),
        "weight": Value("float32"),
        "line": Value("int64"),
    }
    lengths: list[int] = []
    with ArrowWriter(path=str(folder / "samples.arrow"), features=Features(columns)) as writer:
        for samples in batches:
            lengths += [sample.length for sample in samples]
            writer.write_batch({name: [getattr(sample, name) for sample in samples] for name in columns})
        writer.finalize()
    return lengths


def _one_each(lengths: list[int]) -> list[list[int]]:
    return [[sample] for sample in range(len(lengths))]


def _write_rows(folder: Path, rows: list[list[int]]) -> None:
    with ArrowWriter(path=str(folder / "rows.arrow"), features=Features({"samples": List(Value("int64"))})) as writer:
        for part in batched(rows, _BATCH):
            writer.write_batch({"samples": list(part)})
        writer.finalize()


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in that gets its name when all is written, and is gone if that fails.

    If another process has given the name to its own meanwhile, that one stays: it holds the same.
    """
    part = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        part.rename(folder)
    except OSError as e:
        if not folder.exists():
            raise UserError(f"cannot write the prepared data: {e.strerror}", str(folder.parent)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
