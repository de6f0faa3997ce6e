"""The layers of a GPU run hold, load, save and export what the CPU's do: names, shapes, checkpoint keys, every bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from megatron.core.extensions import transformer_engine as te

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.load import place_of
from bft_megatron.hf.weights import weights
from tests.helpers import sharded
from tests.helpers.exported import assert_same, tensors
from tests.helpers.sharded import TRANSFORMER_ENGINE, Sharding, stored_tensors
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world

LAYOUTS = [Sharding(), Sharding(tp=2), Sharding(tp=2, pp=2), Sharding(pp=2, vpp=2)]
SPECS = {"cpu": (), "te": TRANSFORMER_ENGINE}


def contents(folders: list[Path], layout: Sharding, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each model, this rank's parameters by their path in the whole model, and its sharded tensors by key."""
    found = []
    for folder in folders:
        with sharded.model(folder, layout, flags=flags) as chunks:
            parameters, stored = {}, set()
            for chunk in chunks:
                place = place_of(chunk, read_config(folder))
                parameters |= {place.path(n): p.detach() for n, p in chunk.named_parameters()}
                stored |= stored_tensors(chunk)
            found.append({"parameters": parameters, "stored": stored})
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_and_checkpoint_keys_are_those_of_the_cpu(layout: Sharding, models: list[SavedModel]):
    folders = [m.folder for m in models]
    cpu, engine = (run_world(layout.world, contents, folders, layout, flags, megatron=True) for flags in SPECS.values())
    for expected_rank, rank in zip(cpu, engine, strict=True):
        for expected, found in zip(expected_rank, rank, strict=True):
            assert_same(expected["parameters"], found["parameters"])
            assert expected["stored"] == found["stored"]


def test_layers_are_transformer_engines(models: list[SavedModel]):
    [kinds] = run_world(1, _kinds, models[0].folder, megatron=True)
    assert kinds == {
        "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
        "self_attention.linear_proj": "TERowParallelLinear",
        "self_attention.core_attention": "TEDotProductAttention",
        "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
        "mlp.linear_fc2": "TERowParallelLinear",
    }


def _kinds(folder: Path) -> dict[str, str]:
    with sharded.model(folder, Sharding(), flags=TRANSFORMER_ENGINE) as (chunk,):
        layer = chunk.decoder.layers[0]
        return {n: type(m).__name__ for n, m in layer.named_modules() if type(m).__module__ == te.__name__}


@pytest.mark.parametrize("layout", [Sharding(tp=2, pp=2), Sharding(pp=2, vpp=2)], ids=str)
def test_load_then_export_is_bit_identical(layout: Sharding, models: list[SavedModel], tmp_path: Path):
    saved = {m.folder: tmp_path / m.name for m in models}
    save = partial(sharded.save_loaded, saved, layout, flags=TRANSFORMER_ENGINE)
    run_world(layout.world, save, megatron=True)
    for folder, checkpoints in saved.items():
        export(checkpoints, tmp_path / "out" / folder.name, folder)
        assert_same(tensors(folder), tensors(tmp_path / "out" / folder.name))


def test_every_parameter_is_in_the_table(models: list[SavedModel]):
    ranks = run_world(1, contents, [m.folder for m in models], Sharding(), TRANSFORMER_ENGINE, megatron=True)
    for model, found in zip(models, ranks[0], strict=True):
        assert found["parameters"].keys() == {w.path for w in weights(read_config(model.folder))}
