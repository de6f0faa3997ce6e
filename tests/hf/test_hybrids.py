"""Hybrids of gated delta nets and attention: transformers' logits and every bit of the files, on any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.joined_experts import places_in
from bft_megatron.hf.shards import read_headers
from bft_megatron.hf.weights import weights
from tests.helpers import sharded, tiny_models
from tests.helpers.exported import assert_same, rewrite, tensors
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import FP32, SavedModel
from tests.helpers.world import run_world
from tests.hf.test_load import check_logits, counting, logits_are_close

LAYOUTS = [Sharding(tp=2), Sharding(pp=2), Sharding(pp=2, first=1)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_are_those_of_transformers(layout: Sharding, hybrids: list[SavedModel]) -> None:
    check_logits(layout, hybrids)


def test_logits_on_virtual_pipeline_stages(hybrids: list[SavedModel]) -> None:
    check_logits(Sharding(pp=2, vpp=2), hybrids)


def _layout(model: SavedModel) -> Sharding:
    return Sharding(tp=2, sp=True, pp=2, ep=2 if read_config(model.folder).experts else 1)


Visited = list[tuple[int, torch.Tensor | None]]
"""Of each model: the elements that a rank read, and its logits."""


def _visit(models: list[SavedModel], checkpoints: Path) -> Visited:
    """A checkpoint of each model is left under its name."""
    found = []
    for model in models:
        with counting() as pieces, sharded.model(model.folder, _layout(model)) as chunks:
            found.append((sum(pieces), sharded.logits(chunks)))
            sharded.save(chunks, checkpoints / model.name)
    return found


@pytest.fixture(scope="module")
def written(hybrids: list[SavedModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Visited]]:
    """A folder with a checkpoint of each model, TP 2 with sequence parallelism x PP 2, and what each rank found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_world(4, _visit, hybrids, folder, megatron=True)


def test_logits_and_what_a_rank_reads(hybrids: list[SavedModel], written: tuple[Path, list[Visited]]) -> None:
    for model, *of_ranks in zip(hybrids, *written[1], strict=True):
        logits_are_close(model, _layout(model), [logits for _, logits in of_ranks])
        assert sum(elements for elements, _ in of_ranks) == _elements_read(model.folder), model.name


def _elements_read(folder: Path) -> int:
    """By all ranks: a tensor once over the ranks of its stage, or by both where they hold it whole, and an expert's by
    the one that has it; a tied embedding on both stages. Of rows in blocks, such as a gate beside its query, the whole
    blocks are read.
    """
    config, total = read_config(folder), 0
    there = places_in(read_headers(folder), config)
    for weight in weights(config):
        copies = 2 if weight.axis is None or (config.tied and weight.padded) else 1
        for tensor in (there[t] for t in weight.tensors):
            blocks = tensor.rows is not None and tensor.rows.blocks > 1
            total += copies * torch.Size(tensor.whole.shape if blocks else tensor.shape).numel()
    return total


def test_exports_are_the_files_to_the_bit(
    hybrids: list[SavedModel], written: tuple[Path, list[Visited]], tmp_path: Path
) -> None:
    for model in hybrids:
        out = tmp_path / model.name
        export(written[0] / model.name, out, model.folder, base=str(model.folder))
        assert_same(tensors(model.folder), tensors(out))
        assert (out / "config.json").read_bytes() == (model.folder / "config.json").read_bytes()
        kind = getattr(transformers, read_config(out).architecture)
        assert torch.equal(tiny_models.logits(kind.from_pretrained(out)), model.logits)
