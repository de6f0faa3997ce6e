"""Mixtures of experts: transformers' logits and every bit of the files, on any layout; a rank reads its own experts."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from bft_megatron.errors import UserError
from bft_megatron.hf import reference
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.load import check_weights
from bft_megatron.hf.weights import weights
from tests.helpers import sharded, tiny_models
from tests.helpers.commands import run_command
from tests.helpers.exported import assert_same, rewrite, tensors
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world
from tests.hf.test_load import counting, logits_are_close

WRITTEN, READ = Sharding(tp=2, ep=2), Sharding(tp=2, dp=2, ep=2, etp=2)
Visited = list[tuple[int, torch.Tensor | None]]
"""Of each model: the elements that a rank read, and its logits."""


def _visit(folders: dict[Path, Path], layout: Sharding) -> Visited:
    """A checkpoint of each model is left where it is mapped to."""
    found = []
    for folder, checkpoints in folders.items():
        with counting() as pieces, sharded.model(folder, layout) as chunks:
            found.append((sum(pieces), sharded.logits(chunks)))
            sharded.save(chunks, checkpoints)
    return found


@pytest.fixture(scope="module")
def written(mixtures: list[SavedModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Visited]]:
    """A folder with a checkpoint of each model, under its name, and what each rank found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {m.folder: folder / m.name for m in mixtures}
    return folder, run_world(WRITTEN.world, _visit, saved, WRITTEN, megatron=True)


def test_logits_files_and_what_a_rank_reads(
    mixtures: list[SavedModel], written: tuple[Path, list[Visited]], tmp_path: Path
) -> None:
    checkpoints, ranks = written
    for model, *of_ranks in zip(mixtures, *ranks, strict=True):
        logits_are_close(model, WRITTEN, [logits for _, logits in of_ranks])
        assert sum(elements for elements, _ in of_ranks) == _elements_read(model.folder, WRITTEN)
        export(checkpoints / model.name, tmp_path / model.name, model.folder)
        assert_same(tensors(model.folder), tensors(tmp_path / model.name))


def test_checkpoints_are_models_of_another_layout(
    mixtures: list[SavedModel], written: tuple[Path, list[Visited]], tmp_path: Path
) -> None:
    checkpoints, _ = written
    chosen = [m for m in mixtures if m.name in ("qwen3_moe", "glm")]
    for model in chosen:
        shutil.copyfile(model.folder / "config.json", checkpoints / model.name / "config.json")
    again = {checkpoints / m.name: tmp_path / m.name for m in chosen}
    ranks = run_world(READ.world, _visit, again, READ, megatron=True)
    for model, *of_ranks in zip(chosen, *ranks, strict=True):
        logits_are_close(model, READ, [logits for _, logits in of_ranks])
        export(tmp_path / model.name, tmp_path / "out" / model.name, model.folder)
        assert_same(tensors(model.folder), tensors(tmp_path / "out" / model.name))


def _elements_read(folder: Path, layout: Sharding) -> int:
    """By all ranks of a layout without pipeline: a tensor as often as there are copies of it, whole or in parts."""
    total = 0
    for weight in weights(read_config(folder)):
        parts = layout.etp * layout.ep if weight.expert is not None else layout.tp
        copies = layout.world // (1 if weight.axis is None else parts)
        total += copies * sum(torch.Size(t.shape).numel() for t in weight.tensors)
    return total


def test_the_reference_is_transformers(mixtures: list[SavedModel]) -> None:
    ids, _ = tiny_models.prompts()
    for model in mixtures:
        loaded = reference.load(model.folder, read_config(model.folder), pretrained=True, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids[:1]).logits, model.logits[:1])


RECIPE = """\
model: {model}
data: {{train: none.jsonl, seq_length: 24}}
train: {{iterations: 5, precision: fp32}}
device: cpu
output: {out}
"""
CORRECTION = "mlp.gate.e_score_correction_bias"


def test_a_correction_stays_in_fp32_beside_bf16(tmp_path: Path) -> None:
    """Megatron's wrapper for mixed precision would round it, and other experts would be chosen."""
    tiny_models.save("glm", tmp_path / "glm", dtype=torch.bfloat16)
    before = {n: torch.rand(8) if n.endswith(CORRECTION) else t for n, t in tensors(tmp_path / "glm").items()}
    rewrite(tmp_path / "glm", before)
    saved = {tmp_path / "glm": tmp_path / "checkpoints"}
    run_world(2, partial(sharded.save_loaded, saved, Sharding(pp=2), flags=("--bf16",)), megatron=True)
    for dtype in (None, torch.float16):
        out = tmp_path / f"out {dtype}"
        export(tmp_path / "checkpoints", out, tmp_path / "glm", dtype=dtype)
        for name, t in tensors(out).items():
            if name.endswith(CORRECTION):
                assert t.dtype == torch.float32
                assert torch.equal(t, before[name])
            else:
                assert t.dtype == (dtype or torch.bfloat16)


# ------------------------------------------------------------------------------------ layers for multi-token prediction
def _with_prediction(model: SavedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Copy GLM with a layer after its last, as its files on the hub have one, in bf16; returns all tensors."""
    shutil.copytree(model.folder, folder)
    made = {f"model.layers.4.{name}": torch.randn(3, 5).bfloat16() for name in ("eh_proj.weight", "enorm.weight")}
    whole = tensors(folder) | made
    rewrite(folder, whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return whole


def test_an_export_has_the_bases_layers_for_multi_token_prediction_or_announces_none(
    mixtures: list[SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    whole = _with_prediction(mixtures[-1], base)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=base, out=out))
    assert run_command(monkeypatch, "convert", tmp_path / "recipe.yaml") == 0

    def exported(name: str) -> tuple[int, str]:
        capfd.readouterr()
        assert run_command(monkeypatch, "export", out, tmp_path / name, "--dtype", "float32") == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        return config["num_nextn_predict_layers"], capfd.readouterr().out

    announced, said = exported("with")
    assert announced == 1
    assert "multi-token prediction: 2 tensors of the base model, unchanged" in said
    assert_same(whole, tensors(tmp_path / "with"))
    base.rename(tmp_path / "elsewhere")
    announced, said = exported("without")
    assert announced == 0
    assert "num_nextn_predict_layers is 0" in said
    assert_same({n: t for n, t in whole.items() if "layers.4" not in n}, tensors(tmp_path / "without"))


def test_layers_beyond_those_announced_are_unknown_tensors(mixtures: list[SavedModel], tmp_path: Path) -> None:
    _with_prediction(mixtures[-1], tmp_path / "base")
    check_weights(tmp_path / "base", read_config(tmp_path / "base"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(UserError, match=r"2 tensors that Glm4MoeForCausalLM does not have, model\.layers\.4"):
        check_weights(tmp_path / "base", read_config(tmp_path / "base"))
