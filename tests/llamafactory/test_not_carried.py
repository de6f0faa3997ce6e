"""What a config asks for and cannot be carried over is named with its line, what is wrong with it refused with that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bft_megatron.errors import UserError
from bft_megatron.llamafactory import convert, print_table, recipe_text
from tests.llamafactory.written import CONFIGS, written

LOST = {
    "use_asft_loss": (True, "a second model"),
    "use_eaft_loss": (True, "examples/objectives"),
    "quantization_bit": (4, "2 bytes a parameter"),
    "pissa_init": (True, "plain LoRA"),
    "label_smoothing_factor": (0.1, "no longer be the label's probability"),
    "lr_scheduler_type": ("polynomial", "megatron.lr-decay-style"),
    "lr_scheduler_kwargs": ({"num_cycles": 3}, "lowest learning rate"),
    "save_strategy": ("epoch", "train.save_every"),
    "save_steps": (0.1, "a share of the steps"),
    "val_size": (0.1, "not here to be counted"),
    "deepspeed": ("no/such.json", "is not here"),
    "lora_dropout": (0.05, "lora.dropout must be 0"),
    "rope_scaling": ("yarn", "keep data.seq_length within them"),
    "run_name": ("mine", "`wandb-project` under `megatron`"),
    "report_to": ("wandb", "`wandb-project` under `megatron`"),
    "mix_strategy": ("interleave_over", "`weight` times"),
    "moe_aux_loss_coef": (0.01, "coefficient is moe.balance"),
    "moe_expert_capacity_factor": (1.25, "no token is dropped"),
    "sequence_parallel": (True, "of which there is one"),
    "fp16": (True, "bf16"),
    "optim": ("adafactor", "AdamW"),
    "learning_rat": (1, "did you mean learning_rate?"),
    "quite_new": ([1], "is none of the fields"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_not_carried_over_is_named(name: str, tmp_path: Path):
    value, why = LOST[name]
    path = written(tmp_path, **{name: value})
    conversion = convert(path)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"{name}:"))
    [lost] = conversion.lost
    assert (lost.where, lost.value) == (f"{path}:{line}: {name}", value)
    assert why in lost.why
    assert f"#   line {line}, {name}: " in recipe_text(conversion)
    with (console := Console(width=200)).capture() as said:
        print_table(conversion, console)
    assert f"{path}:{line}: {name}" in said.get()


REFUSED = {
    "stage": ("dpo", "dpo is another kind of training"),
    "finetuning_type": ("freeze", "freeze has no counterpart"),
    "do_train": (False, "trains nothing"),
    "learning_rate": ("fast", "must be a number, not 'fast'"),
    "gradient_accumulation_steps": (1.5, "must be a whole number, not 1.5"),
    "cutoff_len": (-4, "must not be below 1, as -4 is"),
    "warmup_ratio": (1.5, "must be below 1"),
    "bf16": ("yes", "must be true or false, not 'yes'"),
    "dataset": ("a,b,a", "names a twice"),
    "dataset_dir": ("REMOTE:llamafactory/demo_data", "lies on the hub"),
    "lora_target": ([1], "must be names with commas"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(name: str, tmp_path: Path):
    value, why = REFUSED[name]
    kind = {"finetuning_type": "lora"} if name == "lora_target" else {}
    path = written(tmp_path, **kind, **{name: value})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"{name}:"))
    with pytest.raises(UserError) as error:
        convert(path)
    assert str(error.value).startswith(f"{path}:{line}: {name}: ")
    assert why in str(error.value)


def test_masks_that_exclude_each_other_are_refused(tmp_path: Path):
    path = written(tmp_path, train_on_prompt=True, mask_history=True)
    with pytest.raises(UserError, match=r"config\.yaml:\d: mask_history: and train_on_prompt cannot both be true"):
        convert(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "config.yaml:2: not YAML"),
        ("- a\n", "config.yaml: must be a mapping of fields"),
        ("template: qwen\n", "config.yaml: names no model_name_or_path"),
        ("model_name_or_path: m\ndataset: d\n", "config.yaml: names no output_dir"),
    ],
)
def test_what_is_no_config_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "config.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val_size": 100}, "leaves none of the 4 rows of identity"),
        ({"val_size": 1, "eval_dataset": "e"}, "give one of"),
    ],
)
def test_a_held_out_share_that_cannot_be_is_refused(fields: dict[str, Any], message: str, tmp_path: Path):
    path = written(tmp_path, dataset_dir=str(CONFIGS / "data"), dataset="identity,questions", **fields)
    with pytest.raises(UserError, match=message):
        convert(path)
