"""LLaMA-Factory's configs become recipes that do the same; what cannot be carried over is named with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from typer.testing import CliRunner

from bft_megatron import cli
from bft_megatron.data import sources
from bft_megatron.errors import UserError
from bft_megatron.llamafactory import convert, print_table, recipe_text
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.recipe.sources import SourceSettings
from tests.helpers.commands import ROOT

CONFIGS = Path(__file__).parent / "configs"
INFO = "tests/llamafactory/configs/data/dataset_info.json"
SMALLEST = {"model_name_or_path": "m", "finetuning_type": "full", "dataset": "d", "output_dir": "o"}
RECOMPUTE = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch):
    """LLaMA-Factory's paths, as ours, are relative to the current folder."""
    monkeypatch.chdir(ROOT)
    for name in ("BFT_GROUP_SIZE", "BFT_CONF_GAMMA", "USE_MCA", "USE_MEGATRON_BRIDGE"):
        monkeypatch.delenv(name, raising=False)


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(SMALLEST | fields)))
    return path


def loaded(config: Path, gpus: int | None = None) -> Recipe:
    """The converted recipe as `train` would read it."""
    path = config.with_suffix(".recipe")
    path.write_text(recipe_text(convert(config, gpus)))
    return reader.load(path)


def field(made: Recipe, name: str) -> Any:
    group, _, leaf = name.rpartition(".")
    holder = getattr(made, group) if group else made
    return holder[leaf] if isinstance(holder, dict) else getattr(holder, leaf)


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
    ({"ray_num_workers": 4}, {"train.global_batch_size": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), FIELDS, ids=range(len(FIELDS)))
def test_field(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    made = loaded(written(tmp_path, **given))
    assert {key: field(made, key) for key in expected} == expected


def test_the_environment_of_bft_is_written_into_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BFT_GROUP_SIZE", "64")
    text = recipe_text(convert(written(tmp_path, use_bft_loss=True)))
    assert "group_size: 64" in text
    assert "gamma" not in text


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
    "expert_model_parallel_size": (8, "mixtures of experts"),
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


def test_what_is_off_or_needs_no_counterpart_is_not_lost(tmp_path: Path):
    fields = {
        "use_asft_loss": False,
        "resume_from_checkpoint": None,
        "quantization_bit": None,
        "neftune_noise_alpha": 0,
    }
    conversion = convert(written(tmp_path, **fields, logging_steps=5, plot_loss=True, freeze_vision_tower=True))
    assert not conversion.lost
    assert sorted(name for names in conversion.not_needed.values() for name in names) == [
        "freeze_vision_tower",
        "logging_steps",
        "plot_loss",
    ]


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
