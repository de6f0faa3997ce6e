"""Every argument that a config may have does what its table says, given its default and given another value."""

from __future__ import annotations

from collections import Counter
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainingArguments

from bft_megatron.errors import UserError
from bft_megatron.llamafactory import Conversion, convert
from bft_megatron.llamafactory.arguments import DEFAULTS, IS_CARRIED, IS_NAMED, REASONS
from bft_megatron.llamafactory.carried import CARRIED
from bft_megatron.llamafactory.conversion import GROUPS
from bft_megatron.llamafactory.named import NAMED
from bft_megatron.llamafactory.unneeded import UNNEEDED
from tests.llamafactory.written import written

LORA = {"finetuning_type": "lora"}
MEGATRON = {"use_mca": True}
VALIDATED = {"eval_dataset": "e", "eval_strategy": "steps", "eval_steps": 10, "save_steps": 20}
ADAPTER = LORA | {"adapter_name_or_path": "a"}

# argument -> another value than its default, and the fields beside which it has a meaning
ANOTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "ray_num_workers": (2, {}),
    "finetuning_type": ("full", {"finetuning_type": None}),
    "train_from_scratch": (True, {}),
    "use_cpu": (True, {}),
    "lora_rank": (4, LORA),
    "lora_alpha": (4, LORA),
    "lora_target": ("q_proj", LORA),
    "use_rslora": (True, LORA),
    "adapter_name_or_path": ("b", ADAPTER),
    "create_new_adapter": (True, ADAPTER),
    "template": ("llama3", {"model_name_or_path": "some-base"}),
    "enable_thinking": (False, {}),
    "eval_dataset": ("e", {}),
    "max_samples": (5, {}),
    "val_size": (2, {"dataset_dir": "tests/llamafactory/configs/data", "dataset": "identity"}),
    "virtual_pipeline_model_parallel_size": (2, MEGATRON),
    "expert_tensor_parallel_size": (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "sequence_parallel": (True, {"tensor_model_parallel_size": 2}),
    "recompute_granularity": ("full", MEGATRON),
    "recompute_method": ("block", MEGATRON | {"recompute_granularity": "full"}),
    "recompute_num_layers": (2, MEGATRON | {"recompute_granularity": "full"}),
    "recompute_modules": ("core_attn", MEGATRON | {"recompute_granularity": "selective"}),
    "overlap_param_gather": (True, MEGATRON),
    "overlap_grad_reduce": (True, MEGATRON),
    "deepspeed": ({"gradient_clipping": 2.0}, {}),
    "fsdp": ("full_shard", {}),
    "fp16": (True, {}),
    "mixed_precision": ("32", {"use_megatron_bridge": True}),
    "pipeline_model_parallel_layout": ("Et|tL", MEGATRON),
    "lr_scheduler_type": ("cosine", {}),
    "lr_scheduler_kwargs": ({"min_lr": 1e-6}, {"lr_scheduler_type": "cosine_with_min_lr"}),
    "max_steps": (5, {}),
    "warmup_ratio": (0.1, {}),
    "optim": ("adafactor", {}),
    "save_strategy": ("no", {}),
    "save_total_limit": (3, {}),
    "eval_strategy": ("steps", {"eval_dataset": "e"}),
    "evaluation_strategy": ("steps", {"eval_dataset": "e"}),
    "eval_steps": (7, {"eval_dataset": "e", "eval_strategy": "steps"}),
    "logging_steps": (7, {"eval_dataset": "e", "eval_strategy": "steps"}),
    "load_best_model_at_end": (True, VALIDATED),
    "metric_for_best_model": ("bleu", VALIDATED | {"load_best_model_at_end": True}),
    "packing": (True, {}),
}
MEGATRONS = {
    name for name in CARRIED["parallelism"] if "model_parallel" in name or name.startswith(("context", "recompute"))
}  # by which a config is known to be for one of its Megatron backends
RECIPE = {f"{group}.{f.name}": f.default for group, settings in GROUPS.items() for f in fields(settings)}
# argument -> fields that its default gives where the config says it; the recipe's own default computes the same
SAID = {"sequence_parallel": {"parallel.sequence": False}}
REFUSED = {"stage": "dpo", "do_train": False}


@pytest.fixture
def converted(tmp_path: Path):
    """Convert the smallest config with some fields."""

    def convert_with(given: dict[str, Any]) -> Conversion:
        return convert(written(tmp_path, **given))

    return convert_with


@pytest.fixture
def base(converted):
    """The conversion without the argument in question, made once."""
    known = cache(lambda items: converted(dict(items)))

    def of(context: dict[str, Any]) -> Conversion:
        try:
            return known(tuple(sorted(context.items())))
        except TypeError:  # a value that cannot be hashed
            return converted(context)

    return of


def context_of(name: str) -> dict[str, Any]:
    return ANOTHER.get(name, (None, MEGATRON if name in MEGATRONS else {}))[1]


def another(default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "x"


def outcome(conversion: Conversion) -> tuple[Any, ...]:
    """The recipe's fields that differ from its own defaults, and what is not carried over."""
    changed = {k: v for k, v in conversion.fields.items() if k not in RECIPE or v != RECIPE[k]}
    return changed, [(lost.name, lost.why) for lost in conversion.lost], conversion.not_needed


def test_no_argument_is_in_two_tables():
    names = Counter(name for table in (CARRIED, NAMED, UNNEEDED) for arguments in table.values() for name in arguments)
    assert {name for name, times in names.items() if times > 1} == set()


def test_transformers_arguments_have_its_defaults():
    differ = {}
    for declared in fields(Seq2SeqTrainingArguments):
        default = declared.default if declared.default_factory is MISSING else declared.default_factory()
        if DEFAULTS.get(declared.name, "missing") != default:
            differ[declared.name] = default
    # a config that trains nothing is none of an SFT; an empty list is no list here
    assert differ == {"do_train": False, "include_for_metrics": []}


def test_defaults_change_nothing(converted, base):
    wrong = {}
    for name in [name for name, default in DEFAULTS.items() if default is not None]:
        context = context_of(name) | {name: None}
        given, without = converted(context | {name: DEFAULTS[name]}), base(context)
        (changed, *others), (unchanged, *before) = outcome(given), outcome(without)
        if (changed, *others) != (unchanged | SAID.get(name, {}), *before):
            wrong[name] = changed, unchanged, others
    assert wrong == {}


def test_what_is_named_is_named(converted):
    wrong = {}
    for name in IS_NAMED:
        lost = converted({name: another(DEFAULTS[name])}).lost
        if [(one.name, one.why) for one in lost] != [(name, REASONS[name])]:
            wrong[name] = lost
    assert wrong == {}


def test_what_is_not_needed_is_said_not_to_be(converted, base):
    wrong = {}
    for name in DEFAULTS.keys() - IS_CARRIED - IS_NAMED:
        made = converted({name: another(DEFAULTS[name])})
        if outcome(made) != (outcome(base({}))[0], [], {REASONS[name]: [name]}):
            wrong[name] = outcome(made)
    assert wrong == {}


def test_what_is_carried_changes_the_recipe(converted, base):
    wrong = []
    for name in sorted(IS_CARRIED - REFUSED.keys()):
        value, context = ANOTHER.get(name, (another(DEFAULTS[name]), context_of(name)))
        made, before = converted(context | {name: value}), base(context)
        if (made.fields, made.rows) == (before.fields, before.rows) and not made.lost:
            wrong.append(name)
        if made.not_needed:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sft_is_refused(name: str, converted):
    with pytest.raises(UserError, match=name):
        converted({name: REFUSED[name]})
