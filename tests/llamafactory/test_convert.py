"""LLaMA-Factory's configs become recipes that do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bft_megatron import cli
from bft_megatron.errors import UserError
from bft_megatron.llamafactory import convert, data, print_table, recipe_text
from bft_megatron.reading import sources
from bft_megatron.recipe import reader
from bft_megatron.recipe.sources import SourceSettings
from tests.llamafactory.written import CONFIGS, field, loaded, written

INFO = "tests/llamafactory/configs/data/dataset_info.json"
RECOMPUTE = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}


EXAMPLES: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (
        8,
        {
            "model": "Qwen/Qwen3-4B-Instruct-2507",
            "lora": None,
            "objective.name": "sft",
            "data.train": [{"path": INFO, "name": name, "rows": ":12"} for name in ("identity", "questions")],
            "data.valid": None,
            "data.packing": False,
            "data.seq_length": 256,
            "data.overlong": "truncate",
            "data.supervise": "assistant",
            "train.global_batch_size": 16,
            "train.micro_batch_size": 1,
            "train.epochs": 1.0,
            "train.lr": 1e-3,
            "train.warmup_iterations": 0,
            "train.adam_beta2": 0.999,
            "train.weight_decay": 0.0,
            "train.clip_grad": 1.0,
            "train.seed": 42,
            "train.precision": "bf16",
            "train.save_every": 400,
            "megatron": RECOMPUTE | {"lr-warmup-fraction": 0.1},
            "output": "saves/qwen3-4b/full",
        },
    ),
    "lora": (
        1,
        {
            "lora.rank": 8,
            "lora.alpha": 16.0,
            "lora.dropout": 0.0,
            "lora.target": "all",
            "objective.name": "bft",
            "data.train": [{"path": INFO, "name": "conversations", "rows": ":6"}],
            "data.valid": [{"path": INFO, "name": "conversations", "rows": "6:8"}],
            "train.global_batch_size": 3,
            "train.lr": 1e-4,
            "train.validate_every": 200,
            "megatron": RECOMPUTE | {"lr-warmup-fraction": 0.1},
        },
    ),
    "megatron_bridge": (
        4,
        {
            "lora.rank": 8,
            "objective.name": "dft",
            "data.packing": True,
            "train.global_batch_size": 8,
            "train.iterations": 6,
            "train.epochs": None,
            "train.warmup_iterations": 2,
            "train.weight_decay": 0.01,
            "train.clip_grad": 0.5,
            "parallel.tensor": 1,
            "megatron": {"overlap-param-gather": True, "overlap-grad-reduce": True},
        },
    ),
    "megatron": (
        64,
        {
            "parallel.tensor": 4,
            "parallel.pipeline": 4,
            "parallel.virtual_pipeline": 5,
            "parallel.context": 2,
            "parallel.sequence": True,
            "data.seq_length": 4096,  # cutoff_len 4090, which context x tensor cannot cut
            "train.global_batch_size": 32,
            "megatron": RECOMPUTE
            | {"overlap-param-gather": True, "overlap-grad-reduce": True, "lr-decay-style": "constant"},
        },
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path):
    gpus, expected = EXAMPLES[name]
    conversion = convert(CONFIGS / f"{name}.yaml", gpus)
    (tmp_path / "recipe.yaml").write_text(recipe_text(conversion))
    made = reader.load(tmp_path / "recipe.yaml")
    assert {key: field(made, key) for key in expected} == expected
    assert not conversion.lost


@pytest.mark.parametrize(("name", "count"), [("identity", 4), ("questions", 16), ("conversations", 8), ("chat", 1)])
def test_entries_of_each_formatting_are_read(name: str, count: int):
    found = list(sources.read(SourceSettings(INFO, name=name)))
    assert len(found) == count
    assert all(made.messages[-1]["role"] == "assistant" for made in found)
    assert {message["role"] for made in found for message in made.messages} <= {"system", "user", "assistant"}


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what is left out has LLaMA-Factory's defaults, not ours
    (
        {},
        {"train.lr": 5e-5, "train.epochs": 3.0, "train.global_batch_size": 8, "train.micro_batch_size": 8}
        | {"train.seed": 42, "train.precision": "fp32", "data.seq_length": 2048, "data.packing": False}
        | {"megatron": RECOMPUTE | {"lr-decay-style": "linear"}, "train.save_every": 500},
    ),
    ({"finetuning_type": None}, {"lora.rank": 8, "lora.alpha": 16.0}),
    ({"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 4, "use_rslora": True}, {"lora.alpha": 8.0}),
    ({"finetuning_type": "lora", "lora_target": "q_proj, v_proj"}, {"lora.target": ["q_proj", "v_proj"]}),
    ({"finetuning_type": "lora", "adapter_name_or_path": "a"}, {"lora.adapter": "a"}),
    ({"use_dft_loss": True, "use_bft_loss": True}, {"objective.name": "bft", "objective.reduce": None}),
    ({"train_on_prompt": True}, {"data.supervise": "all"}),
    ({"mask_history": True}, {"data.supervise": "last"}),
    ({"neat_packing": True}, {"data.packing": True, "train.micro_batch_size": 1, "train.global_batch_size": 8}),
    ({"max_steps": 50, "warmup_ratio": 0.03}, {"train.warmup_iterations": 2, "train.iterations": 50}),
    ({"warmup_steps": 0.2, "max_steps": 50}, {"train.warmup_iterations": 10}),
    ({"warmup_steps": 7, "warmup_ratio": 0.5}, {"train.warmup_iterations": 7}),
    ({"lr_scheduler_type": "constant", "warmup_steps": 7}, {"train.warmup_iterations": 0}),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "learning_rate": 1e-3},
        {"train.min_lr": 1e-4, "megatron": RECOMPUTE},
    ),
    ({"save_strategy": False}, {"train.save_every": None}),
    ({"save_steps": 0.5, "max_steps": 9, "save_total_limit": 5}, {"train.save_every": 5, "train.keep_last": 5}),
    (
        {"eval_dataset": "e", "eval_strategy": "steps", "eval_steps": 10, "save_steps": 20}
        | {"load_best_model_at_end": True},
        {"train.validate_every": 10, "train.keep_best": 1, "train.best_metric": "loss"},
    ),
    ({"dataset_dir": "ONLINE", "dataset": "org/set"}, {"data.train": [{"path": "org/set"}]}),
    ({"disable_gradient_checkpointing": True}, {"megatron": {"lr-decay-style": "linear"}}),
    ({"train_from_scratch": True}, {"init": "random"}),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}
        | {"max_grad_norm": 3.0},
        {"train.clip_grad": 3.0}
        | {"megatron": RECOMPUTE | {"optimizer-cpu-offload": True, "use-precision-aware-optimizer": True}
        | {"lr-decay-style": "linear"}},
    ),
    ({"deepspeed": {"gradient_clipping": 0.3}, "max_grad_norm": 3.0}, {"train.clip_grad": 0.3}),
    (
        {"deepspeed": {"tensor_parallel": {"autotp_size": 2}}, "cutoff_len": 99},
        {"parallel.tensor": 2, "data.seq_length": 100},
    ),
    ({"hyper_parallel_cp_size": 4, "cutoff_len": 99}, {"parallel.context": 4, "data.seq_length": 104}),
    ({"tensor_model_parallel_size": 2}, {"parallel.tensor": 2, "parallel.sequence": None}),
    ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, {"parallel.sequence": False}),
    ({"expert_model_parallel_size": 4}, {"parallel.expert": 4, "parallel.expert_tensor": 1}),
    (
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        {"parallel.expert": 2, "parallel.tensor": 2, "parallel.expert_tensor": 2},
    ),
    (
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"parallel.expert": 2, "parallel.expert_tensor": 1},
    ),
    ({"ray_num_workers": 4}, {"train.global_batch_size": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), FIELDS, ids=range(len(FIELDS)))
def test_field(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    made = loaded(written(tmp_path, **given))
    assert {key: field(made, key) for key in expected} == expected


def test_an_adapter_goes_on_with_its_own_settings(tmp_path: Path):
    """LLaMA-Factory passes over lora_rank and the like where it continues an adapter."""
    own = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    path = written(tmp_path, finetuning_type="lora", lora_rank=64, adapter_name_or_path=str(tmp_path))
    lora = loaded(path).lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.target) == (4, 8, ["q_proj", "v_proj"])
    assert not convert(path).differing.get("adapter_name_or_path")
    (tmp_path / "adapter_config.json").unlink()
    assert "set lora.rank" in convert(path).differing["adapter_name_or_path"]


def test_the_environment_of_bft_is_written_into_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BFT_GROUP_SIZE", "64")
    text = recipe_text(convert(written(tmp_path, use_bft_loss=True)))
    assert "group_size: 64" in text
    assert "gamma" not in text


def test_a_number_of_held_out_rows_is_of_all_sources_together(tmp_path: Path):
    made = loaded(written(tmp_path, dataset_dir=str(CONFIGS / "data"), dataset="identity,questions", val_size=5))
    assert [source["rows"] for source in made.data.train] == [":3", ":12"]
    assert [source["rows"] for source in made.data.valid] == ["3:4", "12:16"]


def test_json_is_read_too(tmp_path: Path):
    (tmp_path / "config.json").write_text('{\n\t"model_name_or_path": "m",\n\t"dataset": "d",\n\t"stage": "dpo"\n}')
    with pytest.raises(UserError, match=r"config\.json:4: stage: dpo"):
        convert(tmp_path / "config.json")


def test_gpus_that_do_not_hold_the_model_are_refused():
    with pytest.raises(UserError, match="= 32 GPUs hold the model once; 40 is not a multiple"):
        convert(CONFIGS / "megatron.yaml", 40)


def test_a_broken_deepspeed_file_is_refused_with_its_line(tmp_path: Path):
    (tmp_path / "ds.json").write_text('{\n"zero_optimization": {,\n}')
    with pytest.raises(UserError, match=r"ds\.json:2: not JSON"):
        convert(written(tmp_path, deepspeed="ds.json"))


def test_effective_values_side_by_side():
    with (console := Console(width=200)).capture() as said:
        print_table(convert(CONFIGS / "full.yaml", 8), console)
    text = " ".join(said.get().split())
    assert "batch 1 x accumulation 2 x 8 GPUs = 16 samples │ train.global_batch_size 16 samples" in text
    assert "num_train_epochs 1 of 16 samples = 1 step │ train.epochs 1 = 1 step" in text
    assert "warmup_ratio 0.1 = 1 step │" in text
    with console.capture() as said:
        print_table(convert(CONFIGS / "megatron_bridge.yaml"), console)
    assert "use_dft_loss (which its Megatron backends ignore)" in said.get()


def test_command(tmp_path: Path):
    out = tmp_path / "recipe.yaml"
    words = ["from-llamafactory", str(CONFIGS / "lora.yaml")]
    assert CliRunner().invoke(cli.app, [*words, str(out), "--gpus", "2"], catch_exceptions=False).exit_code == 0
    assert reader.load(out).train.global_batch_size == 6
    with pytest.raises(UserError, match="cannot write the recipe: File exists"):
        CliRunner().invoke(cli.app, [*words, str(out)], catch_exceptions=False)
    printed = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert printed.stdout == recipe_text(convert(CONFIGS / "lora.yaml"))
    assert "LLaMA-Factory on 1 GPU" in printed.stderr


@pytest.mark.parametrize(
    ("counts", "share", "held"),
    [([156], 100, [100]), ([25], 7, [7]), ([37, 23], 6, [3, 3]), ([100, 1], 0.1, [10, 1]), ([3, 100], 1, [0, 1])],
)
def test_as_many_rows_are_held_out_as_asked(counts: list[int], share: float, held: list[int]) -> None:
    assert data._held_out(counts, share) == held


def test_a_validation_without_its_data_is_named_with_the_fields_to_set(tmp_path: Path) -> None:
    evaluated = {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 7, "load_best_model_at_end": True}
    lost = {lost.name: lost.why for lost in convert(written(tmp_path, **evaluated)).lost}
    assert "set train.validate_every 7" in lost["eval_strategy"]
    assert "set train.keep_best 1" in lost["load_best_model_at_end"]
