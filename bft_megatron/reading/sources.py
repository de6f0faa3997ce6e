"""Finding a source's files and reading the conversations in them; every error names file, line and field.

The source settings of a recipe are in `recipe.sources`; `readers` reads files and `formats` rows. Nothing is
downloaded: a data set of the hub must already be in the local cache, as models must.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bft_megatron.errors import FieldError, UserError, reading, shortened
from bft_megatron.reading import dataset_info, tables
from bft_megatron.reading.compression import compression, suffix
from bft_megatron.reading.formats import Conversation, conversation
from bft_megatron.reading.portion import portion
from bft_megatron.reading.readers import READERS, Chunk, count_rows, read_file, reader_of
from bft_megatron.recipe.schema import DataSettings
from bft_megatron.recipe.sources import COMPRESSIONS, SourceSettings
from bft_megatron.textfiles import read_object

_READ = f"reads {', '.join(READERS)}, also with {', '.join(COMPRESSIONS)}"
_SEEN = 4096
"""Bytes of a file from which it is told whether it holds text."""


@dataclass(frozen=True)
class Source:
    """A source with its files.

    Attributes:
        settings: the recipe's settings, completed by an entry of dataset_info.json if the source is one.
        field: the recipe's field that names the source.
        files: in reading order.
    """

    settings: SourceSettings
    field: str
    files: tuple[str, ...]

    @cached_property
    def content(self) -> str:
        """A hash of the files' content and readers, independent of their names, and of how rows become conversations.

        Raises:
            FieldError: a file cannot be read.
        """
        digest = hashlib.sha256(
            repr((self.settings.format, self.settings.columns, self.settings.roles, self.settings.rows)).encode()
        )
        for path, found in zip(self.files, self._digests, strict=True):
            digest.update(f"{compression(path) or ''}{reader_of(path).__name__}".encode() + found)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise FieldError if a file is no longer what `content` is the hash of: then other rows may have been read."""
        for path, before in zip(self.files, self._digests, strict=True):
            if self._digest(path) != before:
                raise FieldError(
                    self.field, f"{path} changed while it was prepared: start again when nothing writes to it"
                )

    @cached_property
    def _digests(self) -> tuple[bytes, ...]:
        return tuple(self._digest(path) for path in self.files)

    def _digest(self, path: str) -> bytes:
        with self._readable(path), open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def count_rows(self) -> int | None:
        """Return about how many rows are taken, for a progress bar, or None if that takes reading them."""
        rows = count_rows(self.files)
        return None if rows is None else len(range(rows)[slice(*self.settings.first_and_end)])

    def chunks(self, max_row_bytes: int = DataSettings.max_row_bytes) -> Iterator[Chunk]:
        """Yield the rows that are taken, in order, some hundreds at a time; a longer row's value is a UserError.

        Raises:
            UserError: a file cannot be read, or its content is not what its suffix says.
        """
        yield from portion(self._all_chunks(max_row_bytes), *self.settings.first_and_end)

    def _all_chunks(self, max_row_bytes: int) -> Iterator[Chunk]:
        for number, path in enumerate(self.files):
            with self._readable(path):
                yield from read_file(path, number, max_row_bytes)

    def convert(self, chunk: Chunk) -> Iterator[Conversation | UserError]:
        """Yield the conversations of a chunk; a row that is not a conversation yields its error instead."""
        for number, where, row in chunk:
            if isinstance(row, UserError):
                yield row
                continue
            row, dropped = tables.without_nulls(row) if chunk.unit == "row" else (row, False)
            try:
                found = conversation(row, self.settings, number, chunk.file, where)
                yield replace(found, notes=(tables.NULLS_DROPPED,)) if dropped else found
            except UserError as e:
                yield e

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations in order.

        Raises:
            UserError: at the first row that is not a conversation.
        """
        for chunk in self.chunks():
            for found in self.convert(chunk):
                if isinstance(found, UserError):
                    raise found
                yield found

    def _readable(self, path: str) -> AbstractContextManager[None]:
        return reading(path, self.field)


def open_source(settings: SourceSettings | str | Path, field: str = "data.train") -> Source:
    """Find a source's files.

    Args:
        settings: the source's settings, or only its path, absolute or relative to the current directory.
        field: the recipe's field that names the source, for errors.

    Raises:
        FieldError: the source does not exist or cannot be read.
    """
    if not isinstance(settings, SourceSettings):
        settings = SourceSettings(str(settings))
    with reading(settings.path, field):
        if Path(settings.path).name == dataset_info.NAME and Path(settings.path).is_file():
            settings = dataset_info.resolve(settings, field)
        files = _files(settings, field)
    return Source(settings, field, tuple(files))


def read(settings: SourceSettings | str | Path, field: str = "data.train") -> Iterator[Conversation]:
    """Yield the conversations of a source in order.

    Raises:
        UserError: the source does not exist or is empty; or, at the first such row, a row is not a conversation.
    """
    source, empty = open_source(settings, field), True
    for found in source:
        empty = False
        yield found
    if empty:
        raise UserError("holds no conversation", source.settings.path)


def check(settings: SourceSettings | str | Path, field: str = "data.train") -> int:
    """Read a whole source to find its faults, and return the number of conversations. Raises as `read`."""
    return sum(1 for _ in read(settings, field))


def _files(settings: SourceSettings, field: str) -> list[str]:
    path = settings.path
    if Path(path).is_file():
        _check_text(path, field)
        return [path]
    if Path(path).is_dir():
        return _folder(Path(path), settings, field)
    if glob.has_magic(path):
        found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise FieldError(field, f"no file matches {path}")
        for file in found:
            _check_text(file, field)
        return found
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and suffix(path) not in READERS:
        return _folder(_cached(path, field), settings, field)
    raise FieldError(field, f"cannot read {path}: No such file or directory")


def _cached(name: str, field: str) -> Path:
    """Return the folder of a hub data set in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except HFValidationError:
        raise FieldError(field, f"no such file or folder as {name}, which is no id of a data set either") from None
    except LocalEntryNotFoundError:
        raise FieldError(
            field,
            f"no such file or folder as {name}, and it is not in the local hub cache; to download it: "
            f"hf download --repo-type dataset {name}",
        ) from None


def _folder(folder: Path, settings: SourceSettings, field: str) -> list[str]:
    """Return the files of a folder from `save_to_disk`, or of one whose file names tell the splits, as on the hub."""
    if (folder / "dataset_dict.json").exists():
        splits = read_object(folder / "dataset_dict.json", field).get("splits")
        if not isinstance(splits, list) or settings.split not in splits:
            names = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
            raise FieldError(field, f"{folder} has no split {settings.split}; it has {shortened(names, 200)}")
        folder = folder / settings.split
    if (folder / "state.json").exists():
        state = read_object(folder / "state.json", field)
        if state.get("_indices_data_files"):
            raise FieldError(field, f"{folder} was saved with indices: call `flatten_indices` before `save_to_disk`")
        with reading(f"{folder / 'state.json'}: _data_files", field):
            return [str(folder / file["filename"]) for file in state["_data_files"]]
    return _split_files(folder, settings, field)


def _split_files(folder: Path, settings: SourceSettings, field: str) -> list[str]:
    """Return a split's files by `datasets`' own rules: from the folder's README, else from the file names."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset_builder(str(folder), settings.subset).config.data_files or {}
    except (DatasetsError, OSError, ValueError) as e:
        raise FieldError(field, f"no data set in {folder}: {(str(e) or type(e).__name__).splitlines()[0]}") from None
    if settings.split not in found:
        raise FieldError(field, f"{folder} has no split {settings.split}; it has {', '.join(map(str, found))}")
    files = [str(path) for path in found[settings.split]]
    if unknown := [path for path in files if suffix(path) not in READERS]:
        raise FieldError(field, f"{unknown[0]}: {_READ}")
    return files


def _check_text(path: str, field: str) -> None:
    """Raise FieldError for a file that is read as JSON Lines, because its suffix says nothing, and is no text."""
    if suffix(path) in READERS or compression(path):
        return
    with reading(path, field), open(path, "rb") as file:
        begins = file.read(_SEEN)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begins)
    except UnicodeDecodeError:
        readable = False
    else:
        readable = b"\0" not in begins
    if not readable:
        raise FieldError(field, f"{path} holds no text of UTF-8: {_READ}; write it as one of these")
