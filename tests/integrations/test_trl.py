"""An objective in TRL's SFTTrainer: the gradients of a step are the definition's, however its rows are spread."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from bft_megatron.errors import UserError
from bft_megatron.integrations.trl import BftSFTTrainer
from bft_megatron.objective import records
from tests.helpers.objective_reference import Setting
from tests.helpers.trainers import assert_same, expected_gradients, first_step, rows, tiny_llama, words_tokenizer
from tests.helpers.world import run_world

OBJECTIVES = {
    "bft": (records.balanced(group_size=4), Setting("bft", "samples")),
    "dft": (records.dft, Setting("dft", "tokens")),
    "sft": (records.sft, Setting("sft", "tokens")),
}
AS_THEY_ARE = {"skip_prepare_dataset": True}
"""Keeps the row without labels, which TRL leaves out when it prepares the rows."""


@cache
def expected(name: str):
    return expected_gradients(OBJECTIVES[name][1])


def _trainer(arguments: dict[str, Any], callbacks: list[Any], kind: type = BftSFTTrainer, **more: Any) -> SFTTrainer:
    return kind(
        tiny_llama(),
        SFTConfig(**{"bf16": False, "report_to": [], "max_length": None, "dataset_kwargs": AS_THEY_ARE, **arguments}),
        train_dataset=Dataset.from_list(rows()),
        processing_class=words_tokenizer(),
        callbacks=callbacks,
        **more,
    )


def _step(name: str, folder: Path, accumulation: int = 1, processes: int = 1, **options: Any):
    def make(arguments: dict[str, Any], callbacks: list[Any]) -> SFTTrainer:
        return _trainer(arguments, callbacks, objective=OBJECTIVES[name][0])

    return first_step(make, str(folder), accumulation, processes, **options)


@pytest.mark.parametrize(("name", "accumulation"), [("bft", 1), ("bft", 2), ("bft", 8), ("dft", 2), ("sft", 1)])
def test_accumulation(name: str, accumulation: int, tmp_path: Path):
    assert_same(_step(name, tmp_path, accumulation), expected(name))


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 64}], ids=str)
def test_rows_without_padding(options: dict[str, Any], tmp_path: Path):
    if "packing" in options:  # all rows are packed into a few, which make one step
        options = {**options, "per_device_train_batch_size": 16, "dataset_kwargs": {}}
    assert_same(_step("bft", tmp_path, **options), expected("bft"))


@pytest.mark.parametrize("padding_free", [False, True])
def test_two_processes(padding_free: bool, tmp_path: Path):
    for found in run_world(2, partial(_step, padding_free=padding_free), "bft", tmp_path, 2, 2):
        assert_same(found, expected("bft"))


def test_dft_is_trls_own(tmp_path: Path):
    def trls(arguments: dict[str, Any], callbacks: list[Any]) -> SFTTrainer:
        return _trainer(arguments, callbacks, SFTTrainer)

    peer = first_step(trls, str(tmp_path), 2, loss_type="dft")
    assert_same(_step("dft", tmp_path, 2), peer)


def test_evaluation_is_the_mean_over_the_batch(tmp_path: Path):
    trainer = _trainer(
        {"output_dir": str(tmp_path), "per_device_eval_batch_size": 16, "use_cpu": True},
        [],
        objective=OBJECTIVES["bft"][0],
    )
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_loss"] == pytest.approx(expected("bft")[0], rel=1e-5)
    assert 0 < found["eval_mean_token_accuracy"] < 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "dft"}, "loss_type"),
        ({"packing": True, "packing_strategy": "wrapped", "max_length": 32, "dataset_kwargs": {}}, "packing_strategy"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
    ids=str,
)
def test_what_would_change_the_objective_is_refused(options: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(UserError, match=named):
        _trainer({"output_dir": str(tmp_path), "use_cpu": True, **options}, [])
