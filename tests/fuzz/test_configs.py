"""Any config.json of a model and any LLaMA-Factory config is read, or refused by its file; FUZZ_SECONDS asks more."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import ARCHITECTURES, read_config
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.llamafactory import convert, recipe_text
from bft_megatron.recipe import reader
from tests.fuzz.test_recipes import TINY, budget, mostly, trees

CONFIG = json.loads((TINY / "config.json").read_text())
MORE = {"rope_parameters": {}, "rope_scaling": {}, "sliding_window": 8, "use_sliding_window": True, "layer_types": []}
llamas = st.sampled_from([{"architectures": [name]} for name in ARCHITECTURES])
changes = st.dictionaries(
    st.sampled_from([*CONFIG, *MORE, "max_window_layers", "head_dim", "num_experts"]), trees, max_size=2
)
models = st.builds(
    lambda llama, more, changed: CONFIG | llama | more | changed, llamas, st.sampled_from([{}, MORE]), changes
)


@budget(0.1)
@given(content=mostly(models))
def test_config_json(tmp_path_factory: pytest.TempPathFactory, content: Any):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(content))
    made: ModelConfig | UserError
    try:
        made = read_config(folder)
    except UserError as error:
        made = error
    if isinstance(made, UserError):
        assert str(made).startswith(f"{folder}/config.json")
    else:
        assert "--num-layers" in megatron_flags(made)


FACTORY = {"model_name_or_path": "m", "dataset": "a", "output_dir": "o"}
NAMES = [
    "stage", "finetuning_type", "lora_rank", "lora_alpha", "lora_target", "lora_dropout", "use_bft_loss", "packing",
    "cutoff_len", "max_samples", "val_size", "eval_dataset", "dataset_dir", "template", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "save_strategy", "eval_steps",
    "eval_strategy", "load_best_model_at_end", "max_grad_norm", "weight_decay", "adam_beta1", "seed", "bf16", "fp16",
    "deepspeed", "fsdp", "tensor_model_parallel_size", "pipeline_model_parallel_size", "mixed_precision",
    "ray_num_workers", "optim",
]  # fmt: skip
factory = st.dictionaries(st.sampled_from([*NAMES, *FACTORY]), trees | st.integers(0, 9) | st.floats(0, 1), max_size=4)


@budget(0.1)
@given(fields=factory)
def test_llamafactory_configs(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]):
    file, written = (tmp_path_factory.getbasetemp() / name for name in ("factory.yaml", "written.yaml"))
    file.write_text(yaml.safe_dump(FACTORY | fields, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    text, said = "", ""
    try:
        text = recipe_text(convert(file))
        written.write_text(text)
        reader.load(written)
    except UserError as error:
        said = str(error)
    assert said or text
    assert not said or said.startswith((str(file), str(written))), said
