"""The example of TRL trains a model on a file and saves it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.helpers.commands import ROOT
from tests.helpers.trainers import tiny_llama, words_tokenizer


def test_the_example(tmp_path: Path):
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    tiny_llama().save_pretrained(model)
    words_tokenizer().save_pretrained(model)
    texts = [{"prompt": "<5> <6>", "completion": f" <{i}> <{i + 1}> <9>"} for i in range(4, 20)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    main = runpy.run_path(str(ROOT / "examples/trl/train.py"))["main"]
    options = {"max_steps": 2, "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = main(str(model), str(rows), str(tmp_path / "out"), **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert min(losses) > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(saved.lm_head.weight, tiny_llama().lm_head.weight)
