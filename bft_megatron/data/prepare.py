"""Preparing a source: tokenise, pack and write it to a cache once, and find it again. `dataset` reads the rows.

A prepared folder holds `samples.arrow` (one sample each), `rows.arrow` (the samples of each row), `prepared.json`
(shape, counts, a hash of the content, checksums), and `refused.txt` if rows were left out. `datasets.ArrowWriter`
writes the Arrow streams batch by batch in bounded memory; they are read memory-mapped, and anyone can open them with
`datasets.Dataset.from_file`. Megatron's indexed format has no place for masks and weights, and `from_generator` would
add a second cache, keyed on the generator's code. The folder's name is a hash of everything its content depends on, and
it is given last, so a folder with that name is complete.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path

from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bft_megatron.conversations import special_tokens, tokenizers
from bft_megatron.data import intact
from bft_megatron.data.content import ContentHash
from bft_megatron.data.counts import Counts
from bft_megatron.data.encoding import Encoded, Encoder
from bft_megatron.data.folders import appearing_whole, set_aside
from bft_megatron.data.packing import pack
from bft_megatron.data.workers import ordered_map
from bft_megatron.errors import UserError
from bft_megatron.reading.sources import Source, open_source
from bft_megatron.recipe.schema import DataSettings
from bft_megatron.recipe.sources import SourceSettings

FORMAT = 6
"""Part of the hash in the folder's name; raised whenever the same input is written differently."""

SAMPLES = Features(
    {
        "tokens": List(Value("int32")),
        "learned": List(Value("bool")),
        "weight": Value("float32"),
        "line": Value("int64"),
        "file": Value("int32"),
    }
)
ROWS = Features({"samples": List(Value("int64"))})
_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Prepared:
    """A prepared source.

    Attributes:
        folder: the prepared folder.
        seq_length: tokens of a row.
        packing: whether a row holds more than one sample.
        pad_multiple: the multiple that the length of a packed sample is padded to.
        overlong: whether samples longer than a row were dropped or truncated.
        counts: numbers of conversations, samples and tokens.
        content: a hash of the samples and rows (`content.ContentHash`).
        tokenizer_size: one more than the largest token id of the tokenizer.
    """

    folder: Path
    seq_length: int
    packing: bool
    pad_multiple: int
    overlong: str
    counts: Counts
    content: str
    tokenizer_size: int = 0

    @property
    def rows(self) -> int:
        """The number of rows in one epoch."""
        return self.counts.rows

    @property
    def efficiency(self) -> float:
        """The share of the rows' places that hold a sample's tokens."""
        return self.counts.tokens / (self.counts.rows * self.seq_length)


def prepare(
    source: SourceSettings | str | Path,
    model: str | Path,
    settings: DataSettings,
    pad_multiple: int,
    cache: str | Path,
    field: str = "data.train",
) -> Prepared:
    """Tokenise and pack a source, or find it in the cache. Call it on one process; the others read what it wrote.

    What is found is checked against its checksums; a damaged folder is renamed, and the source prepared anew.

    Args:
        source: its settings, or only its path.
        model: Hugging Face folder with the tokenizer and its chat template.
        settings: how conversations become rows (its own `pad_multiple` is optional in a recipe and not read here).
        pad_multiple: the multiple that a packed sample's length is padded to; divides `settings.seq_length`.
        cache: folder of the prepared sources; created if missing.
        field: the recipe's field that names the source, for errors.

    Raises:
        UserError: a fault in the source, no tokenizer or template, no sample kept, or a folder that cannot be read or
            written.
        FieldError: a file of the source is missing, or changed while it was read; or `data.special_tokens` names a
            token that the tokenizer has not.
    """
    opened = open_source(source, field)
    folder = Path(cache) / _key(opened, model, settings, pad_multiple)
    if found := _found(folder):
        return found
    loaded = tokenizers.load(model, settings.chat_template, variables=settings.chat_template_kwargs)
    tokenizer = special_tokens.allowing(loaded, settings.special_tokens)
    with appearing_whole(folder) as part:
        content = ContentHash()
        lengths, counts = _write_samples(part, _encoded(opened, Encoder(opened, tokenizer, settings)), content)
        opened.check_unchanged()
        if not counts.conversations and not counts.refused:
            raise UserError("holds no conversation", opened.settings.path)
        if not lengths:
            raise UserError(_nothing_left(counts, settings.overlong, part), opened.settings.path)
        rows = pack(lengths, settings.seq_length, pad_multiple) if settings.packing else _one_each(lengths)
        _write_rows(part, rows, content)
        counts.rows = len(rows)
        shape = (settings.seq_length, settings.packing, pad_multiple, settings.overlong)
        prepared = Prepared(folder, *shape, counts, content.hexdigest(), tokenizer.size)
        intact.record(part, asdict(prepared) | {"folder": folder.name})
    return load(folder)


def load(folder: str | Path) -> Prepared:
    """Open the prepared source in a folder, without looking at the content of its rows.

    Raises:
        Damaged: its `prepared.json` is missing, or not as it was written.
        UserError: it cannot be read.
    """
    stored = intact.read(Path(folder))
    del stored["files"]
    return Prepared(**stored | {"folder": Path(folder), "counts": Counts(**stored["counts"])})


def _found(folder: Path) -> Prepared | None:
    """Return the prepared source in a folder, unless there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        intact.check([folder])
    except intact.Damaged as e:
        aside = set_aside(folder)
        print(f"{folder} is damaged ({e.fault}): renamed to {aside.name}, preparing the source anew", flush=True)
        return None
    return load(folder)


def _key(source: Source, model: str | Path, settings: DataSettings, pad_multiple: int) -> str:
    parts = {
        "format": FORMAT,
        "source": source.content,
        "tokenizer": tokenizers.fingerprint(model, settings.chat_template),
        "pad_multiple": pad_multiple,
        **{name: getattr(settings, name) for name in _MAKE_ROWS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


_MAKE_ROWS = (
    "seq_length",
    "packing",
    "overlong",
    "supervise",
    "turns",
    "chat_template_kwargs",
    "on_error",
    "max_row_bytes",
    "special_tokens",
)


def _encoded(source: Source, encoder: Encoder) -> Iterator[Encoded]:
    """Yield the samples of a source in order, with a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    total = source.count_rows() if console.is_terminal else None
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"preparing {source.settings.label}", total=total)
        for encoded in ordered_map(encoder, source.chunks(encoder.settings.max_row_bytes)):
            progress.advance(task, encoded.counts.conversations + encoded.counts.refused)
            yield encoded


def _write_samples(folder: Path, batches: Iterator[Encoded], content: ContentHash) -> tuple[array[int], Counts]:
    """Write samples as they come; only their lengths and counts stay in memory."""
    lengths, counts = array("l"), Counts()
    with ArrowWriter(path=str(folder / "samples.arrow"), features=SAMPLES) as writer:
        for batch in batches:
            counts.add(batch.counts)
            lengths.frombytes(batch.lengths.tobytes())
            writer.write_table(batch.samples)
            content.add_samples(batch.samples)
            if batch.refused:
                with (folder / "refused.txt").open("a", encoding="utf-8") as file:
                    file.write("".join(f"{reason}\n" for reason in batch.refused))
        writer.finalize()
    return lengths, counts


def _nothing_left(counts: Counts, overlong: str, folder: Path) -> str:
    """Return in a sentence what became of a source's rows, and the first refused one."""
    fates = {
        "are no conversations": counts.refused,
        "samples are too long" if overlong == "drop" else "samples are too long and truncated": counts.overlong,
        "samples have nothing to learn": counts.unsupervised,
    }
    said = ", ".join(f"{number:,} {fate}" for fate, number in fates.items() if number)
    refused = folder / "refused.txt"
    first = f"; {refused.read_text(encoding='utf-8').splitlines()[0]}" if refused.exists() else ""
    return f"nothing is left to learn from: of {counts.conversations + counts.refused:,} rows, {said}{first}"


def _one_each(lengths: array[int]) -> list[list[int]]:
    return [[sample] for sample in range(len(lengths))]


def _write_rows(folder: Path, rows: list[list[int]], content: ContentHash) -> None:
    content.add_rows(rows)
    with ArrowWriter(path=str(folder / "rows.arrow"), features=ROWS) as writer:
        for part in batched(rows, _ROWS_AT_A_TIME):
            writer.write_batch({"samples": list(part)})
        writer.finalize()
