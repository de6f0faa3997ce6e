"""Mixtures of experts: transformers' logits and every bit of the files, on any layout; a rank reads its own experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bft_megatron.hf import reference
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.weights import weights
from tests.helpers import sharded, tiny_models
from tests.helpers.exported import assert_same, tensors
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world
from tests.hf.test_load import counting, logits_are_close

LAYOUTS = [Sharding(tp=2, dp=2, ep=2, etp=2), Sharding(tp=2, pp=2, ep=2)]


def _visit(folders: dict[Path, Path], layout: Sharding) -> list[tuple[int, torch.Tensor | None]]:
    """Of each model: the elements that this rank read, and its logits; a checkpoint of each is left where mapped to."""
    found = []
    for folder, checkpoints in folders.items():
        with counting() as pieces, sharded.model(folder, layout) as chunks:
            found.append((sum(pieces), sharded.logits(chunks)))
            sharded.save(chunks, checkpoints)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_files_and_what_is_read(layout: Sharding, mixtures: list[SavedModel], tmp_path: Path) -> None:
    saved = {m.folder: tmp_path / m.name for m in mixtures}
    ranks = run_world(layout.world, _visit, saved, layout, megatron=True)
    for model, *of_ranks in zip(mixtures, *ranks, strict=True):
        logits_are_close(model, layout, [logits for _, logits in of_ranks])
        assert sum(elements for elements, _ in of_ranks) == _elements_read(model.folder, layout)
        export(saved[model.folder], tmp_path / "out" / model.name, model.folder)
        assert_same(tensors(model.folder), tensors(tmp_path / "out" / model.name))


def _elements_read(folder: Path, layout: Sharding) -> int:
    """By all ranks: a tensor whole is read by as many as have a copy of it, whole or in parts."""
    config, ranks = read_config(folder), layout.world // layout.pp
    total = 0
    for weight in weights(config):
        parts = layout.etp * layout.ep if weight.expert is not None else layout.tp
        copies = ranks if weight.axis is None else ranks // parts
        if config.tied and weight.padded and layout.pp > 1:
            copies *= 2  # the last stage's output layer
        total += copies * sum(torch.Size(t.shape).numel() for t in weight.tensors)
    return total


def test_the_reference_is_transformers(mixtures: list[SavedModel]) -> None:
    ids, _ = tiny_models.prompts()
    for model in mixtures:
        loaded = reference.load(model.folder, read_config(model.folder), pretrained=True, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids[:1]).logits, model.logits[:1])
