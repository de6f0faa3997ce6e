"""Commands on a hybrid of experts with a vision part: converted, exported, scored, asked, trained with adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers import tiny_models
from tests.helpers.commands import run_command
from tests.helpers.exported import assert_same, tensors
from tests.helpers.runs import MODEL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    tiny_models.save("hybrid_moe_vl", folder, vocab_size=500)
    for file in MODEL.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def _words(model: Path, out: Path, *more: str) -> list[str]:
    return ["recipes/tiny.yaml", f"model={model}", "init=pretrained", "device=cpu", f"output={out}", *more]


@pytest.mark.slow
def test_a_converted_model_is_scored_exported_and_asked_as_the_original(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    converted, parallel = tmp_path / "converted", ["parallel.tensor=2", "parallel.expert=2"]
    assert run_command(monkeypatch, "convert", *_words(model, converted, *parallel)) == 0
    scores = []
    for name, start in (("scored", model), ("scored again", converted)):
        assert run_command(monkeypatch, "score", *_words(start, tmp_path / name, *parallel)) == 0
        scores.append((tmp_path / name / "scores.jsonl").read_bytes())
    assert scores[0] == scores[1] != b""
    assert run_command(monkeypatch, "export", converted, tmp_path / "exported") == 0
    assert_same(tensors(model), tensors(tmp_path / "exported"))
    answers = []
    for folder in (model, tmp_path / "exported"):
        capfd.readouterr()
        assert run_command(monkeypatch, "generate", folder, "hello", "--max-new-tokens", "5") == 0
        said = capfd.readouterr()
        assert "not installed" not in said.err
        answers.append(said.out)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_merged_adapters_beside_what_is_not_trained(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapters = ["lora.rank=2", "lora.target=[o_proj]", "train.iterations=2", "train.warmup_iterations=0"]
    assert run_command(monkeypatch, "train", *_words(model, tmp_path / "run", *adapters)) == 0
    assert run_command(monkeypatch, "export", tmp_path / "run", tmp_path / "merged", "--merge") == 0
    before, after = tensors(model), tensors(tmp_path / "merged")
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == {"model.language_model.layers.3.self_attn.o_proj.weight"}
    assert_same({n: before[n] for n in before.keys() - changed}, {n: after[n] for n in after.keys() - changed})
    transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "merged")
