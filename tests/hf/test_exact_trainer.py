"""An objective in transformers' Trainer: the gradients of a step are the definition's, however its rows are spread."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import DataCollatorWithFlattening, TrainingArguments

from bft_megatron.errors import UserError
from bft_megatron.hf.exact_trainer import BftTrainer
from bft_megatron.objective import records
from tests.helpers.objective_reference import Setting
from tests.helpers.trainers import (
    assert_same,
    expected_gradients,
    first_step,
    padded,
    rows,
    tiny_llama,
)
from tests.helpers.world import run_world

newer = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="before 5, packed rows need flash attention, FSDP an accelerator, and Liger is asked for first",
)
OBJECTIVES = {
    "bft": (records.balanced(group_size=4), Setting("bft", "samples")),
    "dft": (records.dft, Setting("dft", "tokens")),
}


@cache
def expected(name: str):
    return expected_gradients(OBJECTIVES[name][1])


def _trainer(arguments: dict[str, Any], callbacks: list[Any], collator: Any = None, **more: Any) -> BftTrainer:
    return BftTrainer(
        tiny_llama(),
        TrainingArguments(**arguments),
        train_dataset=rows(),
        data_collator=collator or padded,
        callbacks=callbacks,
        **more,
    )


def _step(name: str, folder: Path, accumulation: int = 1, processes: int = 1, **more: Any):
    fsdp = more.pop("options", {})

    def make(arguments: dict[str, Any], callbacks: list[Any]) -> BftTrainer:
        return _trainer(arguments, callbacks, objective=OBJECTIVES[name][0], **more)

    return first_step(make, str(folder), accumulation, processes, **fsdp)


FLATTENED = DataCollatorWithFlattening()


@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "chunked"])
@pytest.mark.parametrize(("name", "accumulation"), [("bft", 1), ("bft", 2), ("bft", 8), ("dft", 2)])
def test_accumulation(name: str, accumulation: int, chunked: bool, tmp_path: Path):
    assert_same(_step(name, tmp_path, accumulation, chunked=chunked), expected(name))


@newer
@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "chunked"])
def test_rows_without_padding(chunked: bool, tmp_path: Path):
    assert_same(_step("bft", tmp_path, 2, collator=FLATTENED, chunked=chunked), expected("bft"))


@pytest.mark.parametrize(
    "more",
    [{}, {"chunked": True}, pytest.param({"collator": FLATTENED}, marks=newer)],
    ids=["logits", "chunked", "packed"],
)
def test_two_processes(more: dict[str, Any], tmp_path: Path):
    for found in run_world(2, partial(_step, **more), "bft", tmp_path, 2, 2):
        assert_same(found, expected("bft"))


def test_evaluation_is_the_mean_over_the_batch(tmp_path: Path):
    arguments = {"output_dir": str(tmp_path), "per_device_eval_batch_size": 16, "use_cpu": True, "report_to": []}
    trainer = _trainer({**arguments, "remove_unused_columns": False}, [], objective=OBJECTIVES["bft"][0])
    assert trainer.evaluate(rows())["eval_loss"] == pytest.approx(expected("bft")[0], rel=1e-5)


@newer
@pytest.mark.parametrize("named", ["use_liger_kernel", "label_smoothing_factor"])
def test_what_would_change_the_objective_is_refused(named: str, tmp_path: Path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    setattr(arguments, named, 0.1 if named == "label_smoothing_factor" else True)
    with pytest.raises(UserError, match=named):
        BftTrainer(tiny_llama(), arguments)


def test_a_capped_head_is_not_chunked(tmp_path: Path):
    model = tiny_llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        BftTrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]), chunked=True)


@newer
@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "chunked"])
def test_fsdp2(chunked: bool, tmp_path: Path):
    sharded = {
        "fsdp": "full_shard",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    for found in run_world(2, partial(_step, chunked=chunked, options=sharded), "bft", tmp_path, 2, 2):
        assert_same(found, expected("bft"))
