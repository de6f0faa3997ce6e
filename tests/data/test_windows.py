"""The samples without a window that are counted before a run, against a count token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from bft_megatron.data import windows
from bft_megatron.data.blend import Blend, Part
from bft_megatron.data.packing import padded
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.reading import readers
from bft_megatron.recipe.schema import DataSettings
from tests.helpers import objective_reference as reference
from tests.helpers.material import TINY

SETTINGS = DataSettings(train=str(TINY / "train.jsonl"), seq_length=256)


def one_by_one(made: Prepared, group_size: int, context: int) -> windows.Windows:
    short = lost = 0
    for learned in Dataset.from_file(str(made.folder / "samples.arrow"))["learned"]:
        labels = learned[1:]
        size = padded(len(labels), made.pad_multiple) if made.packing else made.seq_length
        labels += [False] * (size - len(labels))
        pieces = [[0.0 for t in chunk if labels[t]] for chunk in reference.split(range(size), context)]
        alone = reference.without_window(pieces, group_size)
        short += alone and sum(labels) < group_size
        lost += alone and sum(labels) >= group_size
    return windows.Windows(short, lost)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_as_counted_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool, context: int) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", 7)  # several batches
    chunks, seen = 2 * context if context > 1 else 1, set()
    settings = replace(SETTINGS, packing=packing)
    made = prepare(settings.train, TINY, settings, chunks, tmp_path)
    for group_size in (1, 8, 13, 20, 50):
        found = windows.count(Blend.of(made), group_size, chunks)
        assert found == one_by_one(made, group_size, context)
        seen.add(found)
    assert len(seen) > 3
    twice = Blend((Part("a", made, 0.5), Part("b", made, 3)))
    assert windows.count(twice, 20, chunks) == windows.Windows(
        *(2 * n for n in vars(windows.count(Blend.of(made), 20, chunks)).values())
    )
