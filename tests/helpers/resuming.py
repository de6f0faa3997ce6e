"""Runs that go on after some of them, on the same layout or another, held to the run left alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.checkpoints import assert_same_tensors, tensors
from tests.helpers.comparing import differences
from tests.helpers.runs import Case, Layout, Result, do_nothing, make_recipe, read_metrics, train_rank
from tests.helpers.world import run_world

CLOSE = 1e-6
"""Of a number that is reported, relative."""


@dataclass(frozen=True)
class Resuming:
    """A model, and the folder in which its whole runs are kept, one a layout."""

    data: Path
    model: str
    words: tuple[str, ...] = ()
    """Overrides of the recipe."""
    steps: int = 4

    def undisturbed(self, layout: Layout) -> tuple[Path, Result]:
        """The folder of a whole run and what it reported; taken once."""
        folder = self.data / "-".join([self.model, *self.words, f"{self.steps}-steps", str(layout)])
        made = self._recipe(layout, folder)
        if folder.exists():
            return folder, Result(*read_metrics(RunFolder.of(made).metrics))
        return folder, _run(made, layout)

    def resumed(self, folder: Path, layout: Layout, step: int) -> Result:
        """Go on on a layout after a step, as if the later ones had not been saved."""
        run = RunFolder(folder)
        for later in range(step + 1, self.steps + 1):
            shutil.rmtree(run.checkpoint(later))
        (folder / "done").unlink()
        run.write_tracker(step)
        return _run(self._recipe(layout, folder), layout)

    def check(self, first: Layout, then: Layout, folder: Path) -> None:
        """Assert that a run that goes on on another layout after half of its steps reports what it would have."""
        whole, expected = self.undisturbed(first)
        shutil.copytree(whole, folder)
        self.assert_close(self.resumed(folder, then, self.steps // 2), expected)
        assert self.last_tensors(folder).keys() == self.last_tensors(whole).keys()

    def check_bits(self, whole: Path, expected: Result, layout: Layout, folder: Path) -> None:
        """Assert that a run that goes on on its own layout reports and leaves the same bits."""
        shutil.copytree(whole, folder)
        assert self.resumed(folder, layout, self.steps - 1) == expected
        assert_same_tensors(*(RunFolder(root).checkpoint(self.steps) for root in (folder, whole)))

    def assert_close(self, result: Result, expected: Result) -> None:
        """Every step once, and every number as expected."""
        assert [line["iteration"] for line in result.train] == list(range(1, self.steps + 1))
        found = differences(result, expected)
        assert max(found.values()) <= CLOSE, found

    def last_tensors(self, folder: Path) -> dict[str, Any]:
        """Everything in a run's last checkpoint."""
        return tensors(RunFolder(folder).checkpoint(self.steps))

    def _recipe(self, layout: Layout, folder: Path) -> Recipe:
        words = ["train.save_every=1", f"train.keep_last={self.steps}", f"train.validate_every={self.steps}"]
        words += ["train.clip_grad=1", "train.global_batch_size=4", *self.words]
        return make_recipe(folder, self.data, Case(model=self.model, pad_multiple=4), layout, self.steps, *words)


def _run(made: Recipe, layout: Layout) -> Result:
    model = find_model(made.model)
    prepared = prepare_rows(made, model, read_config(model).vocab_size)
    run_world(layout.world, train_rank, made, prepared, do_nothing, megatron=True)
    return Result(*read_metrics(RunFolder.of(made).metrics))
