"""What was loaded comes out again, bit by bit, from a checkpoint of any layout; a bad checkpoint gives no folder."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bft_megatron.errors import UserError
from bft_megatron.hf.export import export, written_whole
from tests.helpers import sharded, tiny_models
from tests.helpers.exported import assert_same, tensors
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world


def _save(checkpoints: dict[Path, Path], layout: Sharding, **build: Any) -> None:
    """For each model folder: build its model in a world, load it, save a checkpoint into the folder it is mapped to."""
    run_world(layout.world, partial(sharded.save_loaded, checkpoints, layout, **build), megatron=True)


@pytest.fixture(scope="module")
def checkpoints(models: list[SavedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each model, TP 2 x PP 2, under the model's name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    _save({m.folder: folder / m.name for m in models}, Sharding(tp=2, pp=2))
    return folder


def test_round_trip_is_bit_identical(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    for model in models:
        out = tmp_path / model.name
        export(checkpoints / model.name, out, model.folder, shard_bytes=1e5)
        after = tensors(out)
        assert_same(tensors(model.folder), after)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
        assert sorted(f.name for f in out.iterdir() if f.suffix != ".safetensors") == [
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        ]
        for name in ("config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (model.folder / name).read_bytes()


def test_round_trip_tied_otherwise(models_tied_otherwise: list[SavedModel], tmp_path: Path) -> None:
    _save({m.folder: tmp_path / m.name for m in models_tied_otherwise}, Sharding(tp=2, pp=2))
    for model in models_tied_otherwise:
        export(tmp_path / model.name, tmp_path / "out" / model.name, model.folder)
        assert_same(tensors(model.folder), tensors(tmp_path / "out" / model.name))


def test_transformers_reads_it(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    model = models[1]
    export(checkpoints / model.name, tmp_path / "out", model.folder)
    assert [f.name for f in (tmp_path / "out").glob("*safetensors*")] == ["model.safetensors"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny_models.logits(again), model.logits)


@pytest.mark.parametrize(
    ("layout", "metadata"),
    [(Sharding(), None), (Sharding(), {"non_homogeneous_layers": True}), (Sharding(pp=2, vpp=2), None)],
    ids=["one process", "layer by layer", "virtual pipeline"],
)
def test_other_layouts(
    layout: Sharding, metadata: dict[str, bool] | None, models: list[SavedModel], tmp_path: Path
) -> None:
    saved = {m.folder: tmp_path / m.name for m in models[1:3]}
    _save(saved, layout, metadata=metadata)
    for folder, checkpoint in saved.items():
        export(checkpoint, tmp_path / "out" / folder.name, folder)
        assert_same(tensors(folder), tensors(tmp_path / "out" / folder.name))


def test_bfloat16_is_kept_and_chosen(tmp_path: Path) -> None:
    model, bf16 = tmp_path / "model", torch.bfloat16
    tiny_models.save("qwen2", model, dtype=bf16)
    _save({model: tmp_path / "ck"}, Sharding(tp=2), flags=("--bf16",))
    before = tensors(model)
    assert {t.dtype for t in before.values()} == {bf16}
    export(tmp_path / "ck", tmp_path / "kept", model)
    assert_same(before, tensors(tmp_path / "kept"))
    export(tmp_path / "ck", tmp_path / "chosen", model, dtype=torch.float32)
    assert_same({name: t.float() for name, t in before.items()}, tensors(tmp_path / "chosen"))
    config, chosen = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("model", "chosen"))
    assert config.pop("dtype") == "bfloat16"
    assert chosen.pop("dtype") == "float32"
    assert config == chosen


def test_random_weights_are_the_same_on_every_layout(models: list[SavedModel], tmp_path: Path) -> None:
    """Also: 0.02 wide, norms one, biases zero, no two tensors alike, and another seed gives another model."""
    layouts = [Sharding(), Sharding(tp=2), Sharding(tp=2, pp=2), Sharding(pp=2, vpp=2)]
    for i, layout in enumerate(layouts):
        saved = {m.folder: tmp_path / f"{m.name}-{i}" for m in models[1:3]}
        _save(saved, layout, random=True)
    for model in models[1:3]:
        drawn = []
        for i in range(len(layouts)):
            export(tmp_path / f"{model.name}-{i}", tmp_path / "out" / f"{model.name}-{i}", model.folder)
            drawn.append(tensors(tmp_path / "out" / f"{model.name}-{i}"))
        for other in drawn[1:]:
            assert_same(drawn[0], other)
        matrices = {name: t for name, t in drawn[0].items() if t.ndim == 2}
        assert len({float(t.flatten()[0]) for t in matrices.values()}) == len(matrices)
        assert all(abs(float(t.std()) / 0.02 - 1) < 0.1 for t in matrices.values())
        for name, t in drawn[0].items():
            if t.ndim == 1:
                assert torch.equal(t, torch.ones_like(t) if "norm" in name else torch.zeros_like(t)), name
    _save({models[1].folder: tmp_path / "reseeded"}, Sharding(), random=True, seed=8)
    export(tmp_path / "reseeded", tmp_path / "out" / "reseeded", models[1].folder)
    name, seeded = "model.embed_tokens.weight", tensors(tmp_path / "out" / f"{models[1].name}-0")
    assert not torch.equal(tensors(tmp_path / "out" / "reseeded")[name], seeded[name])


# -------------------------------------------------------------------------------------------------- what is refused
def _chunk(checkpoint: Path) -> Path:
    return max(checkpoint.glob("iter_0000003/*.distcp"), key=lambda f: f.stat().st_size)


def _overwrite(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _flip(file: Path) -> None:
    """One byte in the middle of the file's largest tensor, which torch would load."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: _chunk(c).unlink(), "a file is missing or broken"),
        (lambda c: _overwrite(_chunk(c), _chunk(c).read_bytes()[:-2000]), "a file is missing or broken"),
        (lambda c: _overwrite(_chunk(c), bytes(_chunk(c).stat().st_size)), "a file is missing or broken"),
        (lambda c: _flip(_chunk(c)), "does not match its CRC-32"),
        (lambda c: (c / "iter_0000003" / ".metadata").unlink(), "cannot read its .metadata"),
        (lambda c: _overwrite(c / "iter_0000003" / ".metadata", b"x"), "cannot read its .metadata"),
        (lambda c: (c / "iter_0000003" / "metadata.json").unlink(), "never finished"),
        (lambda c: shutil.rmtree(c / "iter_0000003"), "no such checkpoint"),
        (lambda c: (c / "latest_checkpointed_iteration.txt").unlink(), "holds no checkpoint"),
        (lambda c: (c / "latest_checkpointed_iteration.txt").write_text(""), "should hold the number"),
    ],
)
def test_damaged_checkpoint(
    damage: Callable[[Path], object], message: str, models: list[SavedModel], checkpoints: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "llama", checkpoint)
    damage(checkpoint)
    with pytest.raises(UserError, match=re.escape(message)):
        export(checkpoint, tmp_path / "out", models[0].folder)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoints"]  # no half an export, under no name


def test_a_dtype_nobody_expected(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "llama", tmp_path / "checkpoints")
    index = tmp_path / "checkpoints" / "iter_0000003" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = torch.float64
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"final_layernorm.weight has the dtype torch.float64: choose one with --dtype"):
        export(tmp_path / "checkpoints", tmp_path / "out", models[0].folder)


def test_chunk_that_no_file_holds(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    """Unnoticed, it would leave memory that was never written to in the export."""
    shutil.copytree(checkpoints / "llama", tmp_path / "checkpoints")
    index = tmp_path / "checkpoints" / "iter_0000003" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"a part of decoder\.layers\.3\.mlp\.linear_fc2\.weight is missing"):
        export(tmp_path / "checkpoints", tmp_path / "out", models[0].folder)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("qwen3", "embedding.word_embeddings.weight is (512, 48) in the checkpoint, (301, 40) by config.json"),
        ("qwen2", "has no decoder.layers.0.self_attention.linear_qkv.bias: it is a checkpoint of another model"),
    ],
)
def test_checkpoint_of_another_model(
    other: str, message: str, models: list[SavedModel], checkpoints: Path, tmp_path: Path
) -> None:
    tiny_models.config(
        other, hidden_size=40 if other == "qwen3" else 48, architectures=["Qwen2ForCausalLM"]
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        export(checkpoints / "llama", tmp_path / "out", tmp_path)


def test_other_iteration(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="iter_0000002: no such checkpoint"):
        export(checkpoints / "llama", tmp_path / "out", models[0].folder, iteration=2)
    export(checkpoints / "llama", tmp_path / "out", models[0].folder, iteration=3)
    assert_same(tensors(models[0].folder), tensors(tmp_path / "out"))


def test_a_folder_in_use_is_left_alone(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(checkpoints / "llama", tmp_path, models[0].folder)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_nothing(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    """This process may write files of at most 50 kB for the while: as on a full disk, a write fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot write the model: File too large"):
            export(checkpoints / "llama", tmp_path / "out", models[0].folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def _cut_short(model: SavedModel, checkpoints: Path, out: Path) -> tuple[Path, Path]:
    """An export that failed at the second stage's layers -> the checkpoints, whole again, and a file it wrote."""
    source = shutil.copytree(checkpoints / model.name, out.parent / "checkpoints")
    second_stage, away = source / "iter_0000003" / "__2_0.distcp", out.parent / "away"
    second_stage.rename(away)
    with pytest.raises(UserError, match="No such file"):
        export(source, out, model.folder, shard_bytes=6e4)
    away.rename(second_stage)
    assert not out.exists()
    return source, min((out.parent / f".{out.name}.partial").glob("*.safetensors"))


def test_an_export_that_was_cut_short_goes_on(models: list[SavedModel], checkpoints: Path, tmp_path: Path) -> None:
    source, written = _cut_short(models[1], checkpoints, tmp_path / "out")
    before = written.stat()
    export(source, tmp_path / "out", models[1].folder, shard_bytes=6e4)
    after = (tmp_path / "out" / written.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert_same(tensors(models[1].folder), tensors(tmp_path / "out"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoints", "out"]
    assert not (tmp_path / "out" / ".content").exists()


def test_a_note_of_an_export_that_is_no_text_is_one_of_something_else(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/.content").write_bytes(b"\xff\x00")
    with written_whole(tmp_path / "out", "these weights") as folder:
        assert (folder / ".content").read_text() == "these weights"


def test_what_was_cut_short_is_not_mixed_with_something_else(
    models: list[SavedModel], checkpoints: Path, tmp_path: Path
) -> None:
    """With another dtype, or with a checkpoint that was saved again in the same place."""
    model, bf16 = models[1], torch.bfloat16
    for name, dtype in (("chosen", bf16), ("again", torch.float32)):
        (tmp_path / name).mkdir()
        source, written = _cut_short(model, checkpoints, tmp_path / name / "out")
        before = written.stat().st_mtime_ns
        if name == "again":
            os.utime(source / "iter_0000003" / ".metadata")
        export(source, tmp_path / name / "out", model.folder, dtype=dtype, shard_bytes=6e4)
        if name == "again":
            assert (tmp_path / name / "out" / written.name).stat().st_mtime_ns > before
        expected = {name: t.to(dtype) for name, t in tensors(model.folder).items()}
        assert_same(expected, tensors(tmp_path / name / "out"))


class _Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_an_index_that_would_run_something_is_not_unpickled(
    models: list[SavedModel], checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints / "llama", tmp_path / "checkpoints")
    index = tmp_path / "checkpoints" / "iter_0000003" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = _Trap(tmp_path / "sprung")
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"pathlib(\._local)?\.Path\.touch does not belong|getattr does not belong"):
        export(tmp_path / "checkpoints", tmp_path / "out", models[0].folder)
    assert not (tmp_path / "sprung").exists()
