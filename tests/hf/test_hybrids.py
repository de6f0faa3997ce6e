"""Hybrids of gated delta nets and attention: transformers' logits and every bit of the files, on any layout."""

from __future__ import annotations

import json
import shutil
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
from tests.helpers.commands import run_command
from tests.helpers.exported import assert_same, rewrite, tensors
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import FP32, SavedModel
from tests.helpers.world import run_world
from tests.hf.test_load import check_logits, counting, logits_are_close

LAYOUTS = [Sharding(tp=2), Sharding(pp=2), Sharding(pp=2, vpp=2), Sharding(pp=2, first=1)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_are_those_of_transformers(layout: Sharding, hybrids: list[SavedModel]) -> None:
    check_logits(layout, hybrids)


def _layout(model: SavedModel) -> Sharding:
    return Sharding(tp=2, sp=True, pp=2, vpp=2, ep=2 if read_config(model.folder).experts else 1)


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
    """A folder with a checkpoint of each model, under its name, and what each rank found."""
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


def test_bf16_files_keep_what_they_have_in_fp32(tmp_path: Path) -> None:
    """From one process. Of files that have all in bf16 the same tensors come out in fp32, with the same values."""
    folders = [tmp_path / name for name in ("hybrid", "next", "rounded")]
    for folder in folders:
        tiny_models.save("next" if folder.name == "next" else "hybrid", folder, dtype=torch.bfloat16)
    rewrite(folders[2], {name: t.bfloat16() for name, t in tensors(folders[2]).items()})
    saved = {folder: tmp_path / "checkpoints" / folder.name for folder in folders}
    run_world(1, partial(sharded.save_loaded, saved, Sharding(), flags=("--bf16",)), megatron=True)
    for folder, checkpoints in saved.items():
        export(checkpoints, tmp_path / "out" / folder.name, folder)
        before = {name: t.float() if name.endswith(FP32) else t for name, t in tensors(folder).items()}
        assert {t.dtype for t in before.values()} == {torch.bfloat16, torch.float32}
        assert_same(before, tensors(tmp_path / "out" / folder.name))


def test_both_forms_of_experts_are_read_and_written_again(
    hybrids: list[SavedModel], written: tuple[Path, list[Visited]], tmp_path: Path
) -> None:
    """Each model in the other form than its own, and an export without the base, which has a tensor an expert."""
    other = []
    for model in (hybrids[1], hybrids[4]):
        folder = tmp_path / model.name
        shutil.copytree(model.folder, folder)
        whole = tensors(folder)
        rewrite(folder, _apart(whole) if model.name == "hybrid_moe_vl" else tiny_models.joined(whole))
        assert tensors(folder).keys() != whole.keys()
        other.append(SavedModel(model.name, folder, model.logits))
        export(written[0] / model.name, tmp_path / "out" / model.name, folder, base=str(folder))
        assert_same(tensors(folder), tensors(tmp_path / "out" / model.name))
    check_logits(Sharding(), other)
    export(written[0] / "hybrid_moe", tmp_path / "out" / "no base", hybrids[1].folder)
    assert_same(tensors(hybrids[1].folder), tensors(tmp_path / "out" / "no base"))


def _apart(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `tiny_models.joined`."""
    found = dict[str, torch.Tensor]()
    for name, t in whole.items():
        at, dot, kind = name.partition(".mlp.experts.")
        if not dot:
            found[name] = t
            continue
        matrices = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for i, of_expert in enumerate(t):
            parts = zip(matrices, of_expert.chunk(len(matrices)), strict=True)
            found |= {f"{at}{dot}{i}.{m}.weight": part.clone() for m, part in parts}
    return found


# ---------------------------------------------------------------------------------------- what is not trained, carried
RECIPE = """\
model: {model}
data: {{train: none.jsonl, seq_length: 24}}
train: {{iterations: 5, precision: fp32}}
device: cpu
output: {out}
"""


def _convert(patch: pytest.MonkeyPatch, model: Path, out: Path) -> int:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(RECIPE.format(model=model, out=out))
    return run_command(patch, "convert", recipe)


def test_an_export_has_the_vision_part_of_the_base_or_is_refused(
    hybrids: list[SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the model is a converted one, of which the base is further back."""
    base, first, second = tmp_path / "base", tmp_path / "first", tmp_path / "second"
    shutil.copytree(hybrids[3].folder, base)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["dtype"] = "float32"
    (base / "config.json").write_text(json.dumps(config))
    assert _convert(monkeypatch, base, first) == 0
    assert _convert(monkeypatch, first, second) == 0
    capfd.readouterr()
    assert run_command(monkeypatch, "export", second, tmp_path / "out", "--dtype", "bfloat16") == 0
    said = capfd.readouterr().out
    carried = {n: t for n, t in tensors(base).items() if n.startswith(("mtp.", "model.visual."))}
    vision = len(carried) - 2
    assert vision > 0
    assert f"vision part: {vision} tensors of the base model, unchanged" in said
    assert "multi-token prediction: 2 tensors of the base model, unchanged" in said
    after = tensors(tmp_path / "out")
    assert_same(carried, {n: after[n] for n in carried})
    assert {t.dtype for n, t in after.items() if n not in carried and not n.endswith(FP32)} == {torch.bfloat16}
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.pop("dtype") == exported["text_config"]["dtype"] == "bfloat16"
    assert exported["text_config"]["mtp_num_hidden_layers"] == 1

    base.rename(tmp_path / "elsewhere")
    assert run_command(monkeypatch, "export", second, tmp_path / "refused") == 2
    said = capfd.readouterr().err
    assert "model.visual.*" in said
    assert str(base) in said
    assert not (tmp_path / "refused").exists()


def test_without_a_vision_part_to_carry_nothing_starts(
    hybrids: list[SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(hybrids[3].folder, base)
    rewrite(base, {n: t for n, t in tensors(base).items() if not n.startswith("model.visual.")})
    assert _convert(monkeypatch, base, tmp_path / "out") == 2
    assert "no tensors model.visual.* of Qwen3_5ForConditionalGeneration" in capfd.readouterr().err
    assert run_command(monkeypatch, "convert", tmp_path / "out.yaml", "init=random", f"output={tmp_path / 'o'}") == 2
    assert "init=random: the model's vision part is copied from its files" in capfd.readouterr().err


def test_without_the_base_no_layers_for_multi_token_prediction_are_announced(
    hybrids: list[SavedModel], written: tuple[Path, list[Visited]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hybrid"
    shutil.copytree(hybrids[0].folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    export(written[0] / "hybrid", tmp_path / "out", folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"mtp_num_hidden_layers": 0}
    assert "config.json announces none" in capfd.readouterr().out
