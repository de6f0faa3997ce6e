"""Every flag of Megatron is sorted, and a recipe's flags are read, refused and passed on by one name each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.recipe import flag_groups, flags, reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import initialize
from bft_megatron.training.arguments import megatron_arguments
from tests.helpers.runs import MODEL, RECIPE, VARIANTS, write_data

GROUPS = (flag_groups.REFUSED, flag_groups.MAY_CHANGE, flag_groups.MAY_NOT_CHANGE)
SORTED = [made.flag for made in flags.MADE if made.field or made.why] + [
    pattern for groups in GROUPS for names in groups.values() for pattern in names.split()
]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


@pytest.fixture(scope="module")
def names(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The spellings of each flag, without dashes in front."""
    return [[option.lstrip("-") for option in action.option_strings] for action in parser._actions]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def load(*overrides: str) -> Recipe:
        return reader.load(RECIPE, [f"output={tmp_path}", *overrides])

    return load


def test_every_flag_is_sorted_once(names: list[list[str]]):
    assert len(names) > 800
    for spellings in names:
        found = [p for p in SORTED if any(fnmatchcase(flags.canonical(name), p) for name in spellings)]
        assert len(found) == 1, f"{spellings}: {found}"


def test_everything_sorted_is_a_flag(names: list[list[str]]):
    known = [flags.canonical(name) for spellings in names for name in spellings]
    sorted_names = {*SORTED, *(made.flag for made in flags.MADE), *flag_groups.REFUSED_VALUES}
    assert [p for p in sorted_names if not any(fnmatchcase(name, p) for name in known)] == []
    assert not set(flag_groups.NOT_MEGATRONS) & set(known)


def test_the_spellings_of_a_flag_fare_alike(parser: argparse.ArgumentParser, names: list[list[str]]):
    passed = 0
    for action, spellings in zip(parser._actions, names, strict=True):
        canonical = {flags.canonical(name) for name in spellings}
        assert len({flags.refusal(name) for name in canonical}) == 1, spellings
        if flags.refusal(canonical.pop()) is None:
            passed += 1
            assert len({flags.canonical(name) for name in spellings}) == 1, spellings
            assert flags.canonical(f"--{action.option_strings[0].lstrip('-').replace('-', '_')}") in spellings
    assert passed > 200


def test_the_defaults_may_be_changed_and_the_rest_of_what_a_run_sets_may_not(tmp_path: Path):
    for made in flags.MADE:
        assert flags.passes(made.flag) == (not made.field and not made.why), made.flag
    write_data(tmp_path)
    for folder in (MODEL, *(tmp_path / name for name in VARIANTS)):
        words = megatron_flags(read_config(folder))
        for flag in (word.removeprefix("--") for word in words if word.startswith("--")):
            assert flags.refusal(flag), flag


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("adam-beta1", "is set by the recipe's own field train.adam_beta1"),
        ("eval-iters", "is set by the recipe's own field data.valid"),
        ("fp16", "is set by the recipe's own field train.precision"),
        ("num-experts", "cannot be used here: the architecture is the model"),
        ("hidden-dropout", "cannot be used here: each rank would draw its own mask"),
        ("optimizer", "cannot be used here: the optimizer is AdamW"),
        ("hidden-size", "from its config.json"),
        ("step-batch-size-schedule", "every step takes train.global_batch_size rows"),
        ("check-for-nan-in-loss-and-grad", "such steps are skipped and counted"),
        ("no-sequence-parallel", "is set by the recipe's own field parallel.sequence"),
        ("label_smoothing", "exp(-loss) would no longer be the probability of the label"),
    ],
)
def test_refused(recipe: Callable[..., Recipe], flag: str, reason: str):
    made = recipe(f"megatron.{flag}=1")
    with pytest.raises(FieldError) as error:
        megatron_arguments(made, [], [], 1, (0, 0))
    assert reason in error.value.message
    assert error.value.field == f"megatron.{flags.canonical(flag)}"


@pytest.mark.parametrize(
    ("value", "reason"), [("local", "cannot be used here: it knows no packed rows"), ("flash", None), (3, None)]
)
def test_a_refused_value(value: object, reason: str | None):
    assert flags.refusal("attention-backend", value) == reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("aux_loss", "depends on train.micro_batch_size (12 % off at 2 rows"),
        ("global_aux_loss", "divides by the data-parallel size (on 2 ranks its gradient is half"),
        ("sinkhorn", "sends tokens to other experts in training"),
        ("seq_aux_loss", "is set by the recipe's own field moe.balance"),
        (["aux_loss", "seq_aux_loss"], "is set by the recipe's own field moe.balance"),
    ],
)
def test_other_losses_of_routers_are_refused_with_their_reason(value: object, reason: str):
    assert reason in (flags.refusal("moe-router-load-balancing-type", value) or "")


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("recompute_granularity", "recompute-granularity"),
        ("--recompute-granularity", "recompute-granularity"),
        ("disable_tp_comm_bulk_wgrad", "no-tp-comm-bulk-wgrad"),
        ("disable-gloo-process-groups", "disable-gloo-process-groups"),
        ("override-opt_param-scheduler", "override-opt-param-scheduler"),
        ("persistent-save-interval", "save-interval"),
        ("no-such_flag", "no-such-flag"),
    ],
)
def test_canonical_names(written: str, canonical: str):
    assert flags.canonical(written) == canonical


def test_an_override_wins_whatever_the_spelling(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.read_text() + "megatron:\n  recompute_granularity: full\n  --log_interval: 2\n")
    assert reader.load(file).megatron == {"recompute-granularity": "full", "log-interval": 2}
    made = reader.load(file, ["megatron.recompute-granularity=selective"])
    assert made.megatron == {"recompute-granularity": "selective", "log-interval": 2}
    file.write_text(RECIPE.read_text() + "megatron: {recompute-granularity: full}\n")
    assert reader.load(file, ["megatron.recompute_granularity=null"]).megatron == {"recompute-granularity": None}


def test_one_flag_under_two_names_is_refused(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("megatron:\n  log-interval: 1\n  log_interval: 2\n")
    with pytest.raises(
        UserError, match=r"recipe.yaml:3: megatron.log_interval: is Megatron's flag log-interval, which"
    ):
        reader.load(file)


def test_a_flags_place_is_named_as_it_was_written(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: x\nmegatron:\n  --adam_beta1: 0.5\n")
    assert reader.where(file, [], "megatron.adam-beta1") == f"{file}:3: megatron.--adam_beta1"
    override = "megatron.adam_beta1=0.5"
    assert reader.where(file, ["train.lr=1", override], "megatron.adam-beta1") == override


@pytest.mark.parametrize("device_flags", [initialize.CPU_FLAGS, initialize.GPU_FLAGS, initialize.TORCH_LAYER_FLAGS])
def test_a_passed_flag_wins_over_defaults_and_devices(
    recipe: Callable[..., Recipe], parser: argparse.ArgumentParser, device_flags: list[str]
):
    def parse(*overrides: str) -> argparse.Namespace:
        return parser.parse_args(megatron_arguments(recipe(*overrides), [], device_flags, 7, (0, 0)))

    plain = parse()
    assert (plain.lr_decay_style, plain.ckpt_fully_parallel_load, plain.num_workers) == (
        "cosine",
        True,
        1 if "nccl" in device_flags else 0,
    )
    given = parse(
        "megatron.lr_decay_style=linear",
        "megatron.ckpt_fully_parallel_load=false",
        "megatron.num_workers=3",
        "megatron.recompute_modules=[mlp,layernorm]",
    )
    assert (given.lr_decay_style, given.ckpt_fully_parallel_load, given.num_workers) == ("linear", False, 3)
    assert given.recompute_modules == ["mlp", "layernorm"]


def test_the_recipes_fields_reach_the_flags_that_they_own(
    recipe: Callable[..., Recipe], parser: argparse.ArgumentParser, tmp_path: Path
):
    words = ["parallel.tensor=2", "parallel.pipeline=4", "parallel.virtual_pipeline=3", "parallel.context=2"]
    words += [f"train.{name}" for name in ("lr=0.5", "min_lr=0.25", "warmup_iterations=3", "weight_decay=0.125")]
    words += [f"train.{name}" for name in ("adam_beta1=0.5", "adam_beta2=0.75", "adam_eps=0.0625", "clip_grad=2")]
    words += ["train.precision=bf16", "train.save_every=4", "train.validate_every=2", "train.seed=5"]
    seen = parser.parse_args(megatron_arguments(recipe(*words), [], [], 7, (8, 3)))
    assert (seen.tensor_model_parallel_size, seen.pipeline_model_parallel_size) == (2, 4)
    assert (seen.num_virtual_stages_per_pipeline_rank, seen.context_parallel_size) == (3, 2)
    assert (seen.sequence_parallel, seen.bf16, seen.fp16, seen.seed) == (True, True, False, 5)
    assert (seen.train_iters, seen.micro_batch_size, seen.global_batch_size, seen.seq_length) == (7, 1, 8, 256)
    assert (seen.lr, seen.min_lr, seen.lr_warmup_iters, seen.weight_decay) == (0.5, 0.25, 3, 0.125)
    assert (seen.adam_beta1, seen.adam_beta2, seen.adam_eps, seen.clip_grad) == (0.5, 0.75, 0.0625, 2)
    assert (seen.save_interval, seen.eval_interval, seen.eval_iters, seen.eval_global_batch_size) == (4, 2, 3, 8)
    assert seen.save == seen.load == str(tmp_path / "checkpoints")
    assert (seen.hidden_dropout, seen.attention_dropout, seen.loss_scale) == (0, 0, 1)
    assert not seen.check_for_nan_in_loss_and_grad
