"""Which recipes continue the run of a folder, by the fields and flags that differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bft_megatron.commands import request
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.recipe import flag_groups, reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run import same_model
from bft_megatron.run.changes import MAY_CHANGE
from bft_megatron.run.folder import RunFolder
from tests.helpers.material import TINY


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The tiny recipe with a flag that counts and one that does not."""
    file = tmp_path / "recipe.yaml"
    text = (TINY.parent / "tiny.yaml").read_text()
    file.write_text(f"{text}megatron: {{lr_decay_style: linear, log_params_norm: true}}\n")
    return file


def load(file: Path, *overrides: str) -> Recipe:
    return reader.load(file, [f"output={file.parent / 'run'}", f"model={TINY}", *overrides])


@pytest.fixture
def begun(recipe: Path) -> RunFolder:
    """A folder as a run leaves it, checkpoints aside; its config has the flags' names as they were written."""
    folder = RunFolder(recipe.parent / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.write_config(load(recipe), TINY)
    folder.config.write_text(folder.config.read_text().replace("lr-decay-style", "lr_decay_style"))
    folder.write_tracker(1)
    return folder


def refusal(folder: RunFolder, made: Recipe) -> FieldError | None:
    try:
        folder.check_continues(made)
    except FieldError as e:
        return e
    return None


@pytest.mark.parametrize("name", ["unfinished", "streak.json", "metrics.jsonl", "trained_on.json", "config.yaml"])
@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "a folder"), (os.mkfifo, "no regular file")])
def test_what_stands_in_the_way_of_a_file_is_named(
    begun: RunFolder, recipe: Path, name: str, make: Callable[[Path], None], kind: str
):
    path = begun.root / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(UserError, match=f"^{path}: is {kind}: move it away$"):
        request.read(recipe, [f"output={begun.root}", f"model={TINY}"])


def test_a_run_with_underscored_flags_resumes(begun: RunFolder, recipe: Path):
    assert "lr_decay_style: linear" in begun.config.read_text()
    assert refusal(begun, load(recipe)) is None
    assert refusal(begun, load(recipe, "megatron.lr-decay-style=linear")) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=2"),
        ("objective.head=chunked", "objective.chunk_size=64", "objective.kernels=torch"),
        ("data.valid=null",),
        ("train.validate_every=3", "train.keep_last=9", "train.keep_best=1", "train.save_hf=true"),
        ("megatron.recompute_granularity=full", "megatron.recompute-num-layers=1"),
        ("megatron.log_params_norm=false", "megatron.distributed-timeout-minutes=3"),
        ("megatron.num-workers=2", "megatron.attention-backend=flash", "megatron.overlap-grad-reduce=true"),
        ("megatron.grad-reduce-in-bf16=false", "megatron.fp8-format=null"),
    ],
)
def test_what_may_change(begun: RunFolder, recipe: Path, overrides: tuple[str, ...]):
    assert refusal(begun, load(recipe, *overrides)) is None


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("megatron.lr_decay_style=constant", "megatron.lr-decay-style linear, not constant"),
        ("megatron.lr_decay_style=null", "megatron.lr-decay-style linear, not left out"),
        ("megatron.lr-decay-style=false", "megatron.lr-decay-style linear, not False"),
        ("megatron.grad-reduce-in-bf16=true", "megatron.grad-reduce-in-bf16 left out, not True"),
        ("lora.rank=8", "lora."),
        *(
            (f"{field}={value}", f"{field} ")
            for field, value in {
                "model": "recipes/other",
                "init": "pretrained",
                "objective.name": "sft",
                "objective.group_size": 4,
                "objective.gamma": 2,
                "objective.confidence": "arithmetic",
                "objective.reduce": "tokens",
                "objective.cp_windows": "exact",
                "data.train": "other.jsonl",
                "data.seq_length": 128,
                "data.packing": False,
                "data.pad_multiple": 8,
                "data.overlong": "truncate",
                "data.supervise": "all",
                "data.turns": "split",
                "data.chat_template": "x",
                "data.chat_template_kwargs": "{enable_thinking: false}",
                "data.on_error": "skip",
                "train.global_batch_size": 4,
                "train.iterations": 21,
                "train.lr": 1,
                "train.min_lr": 0,
                "train.warmup_iterations": 1,
                "train.weight_decay": 1,
                "train.adam_beta1": 0.5,
                "train.adam_beta2": 0.5,
                "train.adam_eps": 1,
                "train.clip_grad": 2,
                "train.seed": 1,
                "train.precision": "bf16",
                "moe.balance": 0.001,
                "moe.z_loss": 0.001,
                "moe.freeze_router": True,
            }.items()
        ),
    ],
)
def test_what_may_not_change(begun: RunFolder, recipe: Path, override: str, field: str):
    error = refusal(begun, load(recipe, override))
    assert error is not None
    assert f"holds checkpoints of a run with {field}" in error.message
    assert "set it back to go on with that run, or choose another output folder" in error.message
    assert "to train its model further" not in error.message  # it is not finished


@pytest.mark.parametrize("changed", ["train.iterations=21", "train.epochs=3"])
def test_a_finished_run_says_the_way_on(begun: RunFolder, recipe: Path, changed: str):
    begun.mark_done()
    error = refusal(begun, load(recipe, changed))
    assert error is not None
    assert error.message.endswith(f"to train its model further, set model={begun.root} and init=pretrained there")
    other = refusal(begun, load(recipe, "train.lr=1"))
    assert other is not None
    assert "further" not in other.message


def test_checkpoints_without_their_recipe_are_refused(begun: RunFolder, recipe: Path):
    begun.config.unlink()
    said = "holds checkpoints without config.yaml: put it back, or choose another output folder"
    for check in (begun.check_continues, begun.with_pack):
        with pytest.raises(FieldError, match=said):
            check(replace(load(recipe), data=replace(load(recipe).data, pad_multiple=None)))


def test_another_config_of_the_same_model_is_refused(begun: RunFolder, recipe: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"rope_theta": 50, "rms_norm_eps": 0.1}))
    with pytest.raises(FieldError, match=r"has changed: .*with rope_theta 10000\.0, not 50\.0: put it back") as error:
        same_model.check(begun, read_config(model))
    assert error.value.field == "model"
    (model / "config.json").write_text(json.dumps(dict(reversed(values.items())) | {"comment": 1}))
    same_model.check(begun, read_config(model))
    (begun.model / "config.json").unlink()
    with pytest.raises(FieldError, match=r"no config of their model \(.*: copy there the config\.json"):
        same_model.check(begun, read_config(model))


def test_fields_that_may_change_are_fields():
    groups = {name: vars(value) for name, value in vars(load_plain()).items() if hasattr(value, "__dict__")}
    for field in MAY_CHANGE:
        group, dot, name = field.partition(".")
        assert name in groups[group] if dot else hasattr(load_plain(), group), field


def test_no_flag_is_in_both_groups():
    both = [
        {p for names in g.values() for p in names.split()} for g in (flag_groups.MAY_CHANGE, flag_groups.MAY_NOT_CHANGE)
    ]
    assert both[0] & both[1] == set()


def load_plain() -> Recipe:
    return reader.load(TINY.parent / "tiny.yaml")
