"""The prepared rows of a run: one process writes them before any rank starts, and every rank opens them.

If one rank of a running job prepared them, the others would wait in a collective until it times out. Therefore
`bft-megatron prepare`, or `train` if it starts the ranks itself, writes the rows and a small file that names them. A
rank reads that file before it joins the others. If the file is missing, rank 0 of a job on a single machine writes it
while the others poll for it, and a job on many machines is refused. Once on each machine the rows are compared with
their checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bft_megatron.data import intact, prepare
from bft_megatron.data.blend import Blend, Part
from bft_megatron.data.counts import Counts
from bft_megatron.data.ends import stop_tokens
from bft_megatron.data.prepare import Prepared
from bft_megatron.errors import FieldError, Unreadable, UserError
from bft_megatron.processes import lease, ranks
from bft_megatron.recipe.layout_rules import pad_multiple
from bft_megatron.recipe.schema import Recipe
from bft_megatron.recipe.sources import SourceSettings
from bft_megatron.run import trained_on
from bft_megatron.run.folder import RunFolder

WAIT_SECONDS = 0.5
"""Seconds between two checks for the file that rank 0 writes."""
CHECKED_BY = "BFT_MEGATRON_ROWS_CHECKED_BY"
"""Environment variable with the process that has checked the rows; its children, the ranks, need not do so again."""


class NotPrepared(UserError):
    """There are no prepared rows for a recipe."""


@dataclass(frozen=True)
class RunRows:
    """The training rows, the validation rows if the recipe has any, and the length of the run."""

    train: Blend
    valid: Blend | None
    total: int
    """Training rows that the whole run reads."""
    steps: int
    """Steps of the whole run, from the recipe's iterations or epochs; the last step may be a partial batch."""

    @classmethod
    def of(cls, recipe: Recipe, train: Blend, valid: Blend | None) -> RunRows:
        """Return the rows of a recipe's run."""
        batch, iterations = recipe.train.global_batch_size, recipe.train.iterations
        if iterations is not None:
            return cls(train, valid, iterations * batch, iterations)
        assert recipe.train.epochs is not None, "rules refuse a recipe without steps"
        total = max(1, round(recipe.train.epochs * train.rows))
        return cls(train, valid, total, -(-total // batch))

    @property
    def stops(self) -> set[int]:
        """The tokens that end the training rows' learned turns."""
        counts = Counts()
        for part in self.train.parts:
            counts.add(part.prepared.counts)
        return stop_tokens(counts)

    @property
    def tokenizer_size(self) -> int:
        """One more than the largest id of the tokenizer."""
        return max(made.tokenizer_size for made in self.named.values())

    @property
    def sources_apart(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the training and the validation sources that are reported separately; empty for a single source."""
        train, valid = (blend.names if blend and len(blend.parts) > 1 else () for blend in (self.train, self.valid))
        return train, valid

    @property
    def named(self) -> dict[str, Prepared]:
        """Every source by its name; "(valid)" marks a validation source whose name a training source has too."""
        train = {part.name: part.prepared for part in self.train.parts}
        valid = {part.name: part.prepared for part in self.valid.parts} if self.valid else {}
        return train | {f"{name} (valid)" if name in train else name: prepared for name, prepared in valid.items()}


def identity(recipe: Recipe) -> str:
    """Return what tells the rows of one recipe from those of another, whatever their files hold."""
    return hashlib.sha256(json.dumps(_wanted(recipe), sort_keys=True).encode()).hexdigest()[:16]


def prepare_rows(recipe: Recipe, model_folder: Path, vocab_size: int) -> RunRows:
    """Tokenise and pack the recipe's files, unless they are prepared already. Only one process may call this.

    Rows that are prepared already are checked against their checksums, and prepared anew if they are damaged.

    Args:
        model_folder: the folder of the tokenizer and its template.
        vocab_size: size of the model's vocabulary, above every token id.

    Raises:
        UserError: the data are faulty; the message names file, line and field.
        FieldError: a file is missing, the tokenizer does not match the model, or the run in the recipe's folder began
            with other training rows.
        InUse: another command uses the folder, with other rows.
    """
    with lease.held(RunFolder.of(recipe).lease, identity(recipe), share=True):
        return _prepare_rows(recipe, model_folder, vocab_size)


def _prepare_rows(recipe: Recipe, model_folder: Path, vocab_size: int) -> RunRows:
    folder = RunFolder.of(recipe)

    def blend(field: Literal["train", "valid"]) -> Blend | None:
        sources = recipe.data.sources(field)
        made = [
            prepare.prepare(source, model_folder, recipe.data, pad_multiple(recipe), folder.data, f"data.{field}")
            for source in sources
        ]
        return _blend(sources, made)

    rows = _run_rows(recipe, blend)
    warmup = recipe.train.warmup_iterations
    if warmup and warmup >= rows.steps:
        raise FieldError("train.warmup_iterations", f"must be below the {rows.steps:,} steps of train.epochs")
    highest = max(made.counts.highest_token for made in (rows.train, rows.valid) if made)
    if highest >= vocab_size:  # a sharded embedding would silently read another token's row
        raise FieldError(
            "model",
            f"its tokenizer has {rows.tokenizer_size:,} tokens, its embedding {vocab_size:,} rows (vocab_size in "
            f"config.json), and the training rows hold the token {highest:,}: they do not match. If the token is new, "
            'enlarge the embedding: "New tokens" in docs/huggingface.md',
        )
    trained_on.check(folder, rows.train)
    names = {"train": _folders(rows.train), "valid": rows.valid and _folders(rows.valid), **_wanted(recipe)}
    _write_names(folder, intact.with_own_crc(names))
    os.environ[CHECKED_BY] = str(os.getpid())
    return rows


def _write_names(folder: RunFolder, text: str) -> None:
    """Write the file that names the rows, if it names others. Raises InUse if another command uses those."""
    path = folder.data / "rows.json"
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    with lease.held(folder.lease) if path.exists() else contextlib.nullcontext():
        own = f"rows.{socket.gethostname()}.{os.getpid()}.tmp"  # another `prepare` of the same rows may run beside
        path.with_name(own).write_text(text)
        path.with_name(own).replace(path)


def rows_of_rank(recipe: Recipe, make: Callable[[], RunRows]) -> RunRows:
    """Return the rows prepared for this recipe, on a rank that a launcher started, before any process group exists.

    On a single machine rank 0 prepares them if they are missing. The others poll for the file that names them instead
    of waiting in a collective, which has a time limit. The first rank of each machine checks the rows against their
    checksums, unless the process that started it has done so.

    Args:
        make: calls `prepare_rows`.

    Raises:
        UserError: there are no prepared rows, and the job runs on many machines; or they are damaged.
        FieldError: the run began with other training rows.
    """
    rows = _opened_or_made(recipe, make)
    trained_on.check(RunFolder.of(recipe), rows.train)
    if ranks.local_rank() == 0 and os.environ.get(CHECKED_BY) not in (str(os.getppid()), str(os.getpid())):
        intact.check({prepared.folder for prepared in rows.named.values()})
    return rows


def _opened_or_made(recipe: Recipe, make: Callable[[], RunRows]) -> RunRows:
    try:
        return open_rows(recipe)
    except NotPrepared:
        if ranks.local_world_size() != ranks.world_size():
            raise
    if ranks.rank() == 0:
        return make()
    print(f"rank {ranks.rank()}: waiting for rank 0 to prepare the data", flush=True)
    launcher = os.getppid()
    while True:
        time.sleep(WAIT_SECONDS)
        try:
            return open_rows(recipe)
        except NotPrepared:
            if os.getppid() != launcher:  # the launcher has ended, for example after a failure of rank 0
                raise


def open_rows(recipe: Recipe) -> RunRows:
    """Open the rows that `prepare_rows` wrote for this recipe.

    Raises:
        NotPrepared: there are no prepared rows, or they belong to another recipe.
        Damaged: what describes prepared rows is damaged; the rows themselves are not read.
        Unreadable: the file system does not let a file be read.
    """
    folder = RunFolder.of(recipe).data
    names = _read_names(folder / "rows.json", recipe)

    def blend(field: Literal["train", "valid"]) -> Blend | None:
        return _blend(recipe.data.sources(field), [prepare.load(folder / name) for name in names[field]])

    return _run_rows(recipe, blend)


def _read_names(path: Path, recipe: Recipe) -> dict[str, list[str]]:
    """Return the names of the prepared folders of `train` and `valid`, one for each of the recipe's sources."""

    def of(field: Literal["train", "valid"]) -> list[str]:
        return [str(name) for name, _ in zip(stored[field] or (), recipe.data.sources(field), strict=True)]

    try:
        stored = intact.checked(json.loads(path.read_bytes()))
        names = {"train": of("train"), "valid": of("valid")}
        _check_settings(path, stored, _wanted(recipe))
    except FileNotFoundError:
        raise NotPrepared(
            "the data are not prepared: run `bft-megatron prepare RECIPE` once, before the job", str(path)
        ) from None
    except OSError as e:
        raise Unreadable.of(path, e) from None
    except (KeyError, RecursionError, TypeError, ValueError):
        raise NotPrepared("names no prepared data: run `bft-megatron prepare RECIPE`", str(path)) from None
    return names


def _check_settings(path: Path, stored: dict[str, object], wanted: dict[str, object]) -> None:
    for field, value in wanted.items():
        if stored[field] != value:
            raise NotPrepared(
                f"the rows were prepared with {field} {stored[field]}, the recipe has {value}: "
                "run `bft-megatron prepare RECIPE`",
                str(path),
            )


def _run_rows(recipe: Recipe, blend: Callable[[Literal["train", "valid"]], Blend | None]) -> RunRows:
    train = blend("train")
    assert train is not None, "rules refuse a recipe without training data"
    return RunRows.of(recipe, train, blend("valid"))


def _blend(sources: tuple[SourceSettings, ...], made: list[Prepared]) -> Blend | None:
    return Blend(tuple(Part(s.label, p, s.weight) for s, p in zip(sources, made, strict=True))) if made else None


def _folders(blend: Blend) -> list[str]:
    return [part.prepared.folder.name for part in blend.parts]


def _wanted(recipe: Recipe) -> dict[str, object]:
    return {"model": recipe.model, "data": asdict(recipe.data) | {"pad_multiple": pad_multiple(recipe)}}
