"""Tokens added to a tokenizer: refused while the model has no embedding of them, learned once it has, as documented."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers.commands import ROOT, run_command
from tests.helpers.exported import tensors
from tests.helpers.material import TINY, chat_of

A, B = 500, 501


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny model with weights, 500 tokens and as many rows of the embedding."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(TINY, num_hidden_layers=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def words(folder: Path, model: Path, *more: str) -> list[str]:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": chat_of("go <|a|>", "yes <|b|> no")}))
    sizes = ["data.valid=null", "data.seq_length=64", "train.global_batch_size=1", "train.warmup_iterations=0"]
    steps = ["train.iterations=2", "train.lr=1e-2", "init=pretrained", f"output={folder / 'run'}"]
    return ["recipes/tiny.yaml", f"model={model}", f"data.train={rows}", *sizes, *steps, *more]


def documented(base: Path, larger: Path) -> None:
    """Run the page's own lines on these folders."""
    (code,) = re.findall(r"## New tokens.*?```python\n(.*?)```", (ROOT / "docs/huggingface.md").read_text(), re.DOTALL)
    assert "models/base" in code
    exec(code.replace("models/base", str(base)).replace("models/larger", str(larger)), {})


def test_the_documented_lines_then_a_run_then_transformers(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = tmp_path / "larger"
    documented(base, larger)
    named = "data.special_tokens=[<|a|>,<|b|>]"
    assert run_command(monkeypatch, "train", *words(tmp_path, larger, named)) == 0
    assert "warning" not in capfd.readouterr().out
    assert run_command(monkeypatch, "export", tmp_path / "run", tmp_path / "out") == 0
    before, after = (tensors(folder)["model.embed_tokens.weight"] for folder in (larger, tmp_path / "out"))
    assert before.shape == after.shape == (512, 64)
    moved = (before - after).abs().amax(1)
    assert moved[A] > 1e-3
    assert moved[B] > 1e-3
    assert moved[510] < moved[B] / 10  # no row holds it
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|a|><|b|>")["input_ids"] == [A, B]
    assert model(torch.tensor([[A, B]])).logits.shape == (1, 2, 512)


def test_a_tokenizer_beyond_the_embedding_is_refused_with_the_sizes(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|a|>", "<|b|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    assert run_command(monkeypatch, "train", *words(tmp_path, base, "data.special_tokens=all")) == 2
    said = capfd.readouterr().err
    assert f"model={base}: its tokenizer has 502 tokens, its embedding 500 rows (vocab_size in config.json)" in said
    assert "the training rows hold the token 501" in said
    assert '"New tokens" in docs/huggingface.md' in said
    assert not (tmp_path / "run" / "logs").exists()  # no rank has started
    # Rows without them are no reason to refuse: tokenizers with a token too many for padding are published.
    assert run_command(monkeypatch, "prepare", *words(tmp_path, base)) == 0
    said = capfd.readouterr().out
    assert f"warning: the tokenizer of {base} has 502 tokens, its embedding 500 rows" in said
    assert "rows, 1 samples: <|a|> is in messages and learned as text" in said
