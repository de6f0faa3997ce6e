"""A command's request: a recipe file and the overrides beside it, read and checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf import stops
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.installation import layers
from bft_megatron.processes import launcher, lease, ranks
from bft_megatron.recipe import layout_rules, reader, rules
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run import atomic, obstacles, same_model
from bft_megatron.run.folder import RunFolder
from bft_megatron.training import arguments

if TYPE_CHECKING:
    from bft_megatron.run.prepared import RunRows

MOST_PASSES = 1000
"""Passes over the training rows in one step, above which the batch is likely to be a slip."""


@dataclass(frozen=True)
class Request:
    """A recipe, the file and overrides that set its fields, and its model's configuration."""

    file: Path
    overrides: list[str]
    recipe: Recipe
    config: ModelConfig

    @cached_property
    def model_folder(self) -> Path:
        """Return the folder of the model's files. Raises UserError if they are not on this machine."""
        return find_model(self.recipe.model)

    @property
    def folder(self) -> RunFolder:
        """Return the run's folder."""
        return RunFolder.of(self.recipe)

    def check[T](self, check: Callable[[], T]) -> T:
        """Call a function; add to a FieldError the file and line, or the override, that set the field."""
        return _placing(self.file, self.overrides, check)

    def check_fields(self) -> None:
        """Raise UserError, with file and line, for a recipe that cannot run on any machine."""
        self.check(lambda: rules.check_recipe(self.recipe, self.config))
        self.check(lambda: arguments.passed_through(self.recipe))

    def world(self) -> tuple[bool, int]:
        """Return whether this process is a rank, and the number of processes of the run. Raises UserError."""
        in_rank = ranks.in_rank()
        if in_rank:
            ranks.check()
        processes = ranks.world_size() if in_rank else launcher.local_processes(self.recipe)
        self.check(lambda: layers.check(self.recipe))
        self.check(lambda: layout_rules.check_world(self.recipe, processes))
        return in_rank, processes

    def folder_held(self) -> AbstractContextManager[None]:
        """Hold the lease of the run's folder. Raises InUse if another command uses it."""
        from bft_megatron.run.prepared import identity

        return lease.held(self.folder.lease, identity(self.recipe))

    def prepare(self) -> RunRows:
        """Prepare the rows, unless they are prepared already, and print a report of the data. Raises UserError."""
        from bft_megatron.commands import token_warnings
        from bft_megatron.data.summary import summary_table
        from bft_megatron.run.prepared import prepare_rows

        rows = self.check(lambda: prepare_rows(self.recipe, self.model_folder, self.config.vocab_size))
        Console(emoji=False).print(summary_table(rows.named))
        batch, rows_there = self.recipe.train.global_batch_size, rows.train.rows
        if batch > MOST_PASSES * rows_there:
            times = f"{batch // rows_there:,} times the {rows_there:,} of data.train"
            print(f"warning: train.global_batch_size: a step reads {batch:,} rows, {times}", flush=True)
        for part in rows.train.parts:
            if part.prepared.counts.weightless == part.prepared.counts.samples:
                print(f"warning: every sample of {part.name} has weight 0: nothing is learned from it", flush=True)
        for line in token_warnings.of(rows, self.recipe, self.model_folder, self.config.vocab_size):
            print(f"warning: {line}", flush=True)
        return rows

    def rows_of_rank(self) -> RunRows:
        """Return the prepared rows on a rank; see `run.prepared.rows_of_rank`."""
        from bft_megatron.run.prepared import rows_of_rank

        return self.check(lambda: rows_of_rank(self.recipe, self.prepare))

    def trained(self) -> Request:
        """Return the request with the run's newest checkpoint as its model. Raises UserError if it has none."""
        if self.recipe.lora is not None:
            raise UserError("a LoRA run's adapters: export them, and set lora.adapter to their folder", "--trained")
        if not self.folder.saved_iteration():
            raise UserError(f"{self.folder.root} holds no checkpoint", "--trained")
        return replace(self, recipe=replace(self.recipe, model=str(self.folder.root), init="pretrained"))

    def check_adapters(self) -> None:
        """Check a LoRA run's base model and adapters.

        Raises:
            UserError: the base is not the model that the run began with, or `lora.adapter` does not fit it.
        """
        if self.recipe.lora is None:
            return
        from bft_megatron.lora.base import check_base
        from bft_megatron.lora.peft import AdapterFolder

        check_base(self.folder, self.recipe, self.config, self.model_folder)
        if self.recipe.lora.adapter is not None:
            AdapterFolder(Path(self.recipe.lora.adapter), self.config, self.recipe.lora)

    def describe_run(self, rows: RunRows) -> None:
        """Write what an export and a later start need into the run's folder.

        The recipe, what the rows hold, the stop tokens, a LoRA run's base and the chat template.
        """
        from bft_megatron.run import trained_on

        self.folder.write_config(self.recipe, self.model_folder)
        if (text := stops.with_stops(self.model_folder, rows.stops)) is not None:
            atomic.write(self.folder.model / stops.FILE, text)
        trained_on.record(self.folder, rows.train)
        if self.recipe.lora is not None:
            from bft_megatron.lora.base import record_base

            record_base(self.folder, self.recipe, self.config, self.model_folder)
        if self.recipe.data.chat_template is not None:
            from bft_megatron.conversations import tokenizers

            # The exported model keeps the template it was trained with; this file overrides the tokenizer's own.
            template = tokenizers.load(self.model_folder, self.recipe.data.chat_template).template
            (self.folder.model / "chat_template.jinja").write_text(template, encoding="utf-8")


def _placing[T](file: Path, overrides: list[str], check: Callable[[], T]) -> T:
    """Call a function; add to a FieldError where its field was set. See `Request.check`."""
    try:
        return check()
    except FieldError as e:
        placed = UserError(e.message, reader.where(file, overrides, e.field))
        for note in getattr(e, "__notes__", ()):
            placed.add_note(note)
        raise placed from e


def read(file: Path, overrides: list[str] | None) -> Request:
    """Read and check the recipe of a run.

    Raises:
        UserError: the first thing that is wrong, with its file, line and field.
    """
    recipe = reader.load(file, overrides or [])
    model = _placing(file, overrides or [], lambda: find_model(recipe.model))
    request = Request(file, overrides or [], recipe, read_config(model))
    request.check(lambda: rules.check_output(recipe))
    obstacles.check(request.folder)
    request = replace(request, recipe=request.check(lambda: request.folder.with_pack(recipe)))
    request.check_fields()
    request.check(lambda: request.folder.check_continues(request.recipe))
    request.check(lambda: same_model.check(request.folder, request.config))
    return request
