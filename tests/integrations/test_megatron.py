"""`ForwardStep` in Megatron-LM's own `pretrain`, on rows in the form of its data sets, beside the command `train`."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import Dataset

from bft_megatron.data.dataset import training_rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.integrations.megatron import ForwardStep
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, prepare_rows
from bft_megatron.training import arguments, initialize
from bft_megatron.training.model import model_config
from bft_megatron.upstream import bucket_padding, checkpoint_writer, command_line
from tests.helpers import runs
from tests.helpers.checkpoints import tensors
from tests.helpers.runs import Layout
from tests.helpers.world import run_world

STEPS = 5
EXACT = {"group_size": 8, "cp_windows": "exact"}
CASES = [(Layout(), True), (Layout(context=2), True)]
SLOW = [
    *((layout, True) for layout in (Layout(tensor=2, pipeline=2), Layout(pipeline=2, virtual_pipeline=2))),
    (Layout(tensor=2, pipeline=2), False),
    *((Layout(tensor=2, sequence=True, data=2), packing) for packing in (True, False)),
    *((layout, False) for layout in (Layout(), Layout(context=2), Layout(pipeline=2, virtual_pipeline=2))),
]
"""Layouts, and whether rows are packed."""


class StockRows(Dataset[dict[str, Tensor]]):
    """Prepared rows in the form of Megatron-LM's data sets: a loss mask, and edges filled up to the row's length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = self.rows[place]
        labels = row["labels"]
        item = {"tokens": row["tokens"], "labels": labels.clamp(min=0), "loss_mask": (labels >= 0).float()}
        item["position_ids"] = row["position_ids"]
        if "cu_seqlens" in row:
            edges = row["cu_seqlens"].flatten()
            item["cu_seqlens"] = torch.full((len(labels) + 1,), len(labels), dtype=torch.int32)
            item["cu_seqlens"][: len(edges)] = edges
            item["max_seqlen"] = edges.diff().max()
            item["cu_seqlens_padded"] = item["cu_seqlens"]
        return item


def stock(made: Recipe, prepared: RunRows, flags: list[str], settings: dict[str, Any]) -> None:
    """One rank of Megatron's own `pretrain`, with nothing of this package's loop."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    model_folder = find_model(made.model)
    config = read_config(model_folder)
    initialize.join(made, on_cpu=True)
    checkpoint_writer.without_helper_process()
    bucket_padding.mend()
    rows = StockRows(training_rows(prepared.train, seed=made.train.seed, limit=STEPS * made.train.global_batch_size))

    def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        return rows, rows, None

    provide.is_distributed = True
    device = initialize.device_flags(made, experts=False)
    made_of = arguments.megatron_arguments(made, megatron_flags(config), [*device, *flags], STEPS, (8, 1))
    margs = command_line.parse([word for word in made_of if word != "--exit-signal-handler"])
    model = model_config(made, config, model_folder, margs, True, fill=True)
    step = ForwardStep(made.objective.name, vocab_size=config.vocab_size, **settings)
    pretrain(pretrain_cfg_container_from_args(margs, model), provide, ModelType.encoder_or_decoder, step)


def recipe(folder: Path, layout: Layout, *overrides: str) -> Recipe:
    sizes = [f"parallel.{key}={value}" for key, value in vars(layout).items() if key != "micro_batch_size"]
    steps = [f"train.iterations={STEPS}", f"train.save_every={STEPS}", "data.valid=null"]
    return reader.load(runs.RECIPE, [*steps, *sizes, *overrides, "objective.cp_windows=exact", f"output={folder}"])


def prepared_rows(made: Recipe) -> RunRows:
    model = find_model(made.model)
    return prepare_rows(made, model, read_config(model).vocab_size)


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("layout", "packing"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_pretrain_with_it_is_the_run_of_train(layout: Layout, packing: bool, tmp_path: Path):
    ours, theirs = (recipe(tmp_path / name, layout, f"data.packing={packing}") for name in ("ours", "theirs"))
    prepared = prepared_rows(ours)
    run_world(layout.world, runs.train_rank, ours, prepared, runs.do_nothing, megatron=True)
    flags = ["--sft"] if packing else []
    run_world(layout.world, stock, theirs, prepared, flags, EXACT, megatron=True)
    expected, _ = runs.read_metrics(RunFolder.of(ours).metrics)
    found = scalars(RunFolder.of(theirs).tensorboard)
    for name, ours_name in {
        "bft loss": "loss",
        "lm loss": "lm_loss",
        "mean p": "mean_p",
        "grad-norm": "grad_norm",
    }.items():
        assert found[name] == pytest.approx([line[ours_name] for line in expected], rel=1e-6), name
    weights, wanted = (tensors(RunFolder.of(made).checkpoints / f"iter_{STEPS:07}") for made in (theirs, ours))
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-6 * float(tensor.abs().max()))


def test_a_validation_is_the_same_under_context_parallelism(tmp_path: Path):
    """With `--sft`, where Megatron takes the mean of the micro-batches' and the ranks' means."""
    found = []
    for layout in (Layout(), Layout(context=2)):
        made = recipe(tmp_path / str(layout), layout, "data.pad_multiple=4")
        run_world(layout.world, stock, made, prepared_rows(made), ["--sft"], EXACT, megatron=True)
        found.append(scalars(RunFolder.of(made).tensorboard))
    for name in ("bft loss", "lm loss", "mean p", "accuracy", "confidence"):
        assert found[1][f"{name} validation"] == pytest.approx(found[0][f"{name} validation"], rel=1e-6), name


EXAMPLES = Path(__file__).parents[2] / "examples" / "megatron"


def script(name: str, folder: Path, *flags: str) -> None:
    arguments = [*(EXAMPLES / "tiny.args").read_text().split(), *flags, "--tensorboard-dir", str(folder / name)]
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_the_examples_start_with_the_same_model_and_differ_in_their_loss(tmp_path: Path):
    found = []
    for name in ("bft.py", "plain.py"):
        run_world(2, script, name, tmp_path, "--tensor-model-parallel-size", "2")
        found.append(scalars(tmp_path / name))
    bft, plain = found
    assert bft["lm loss"][0] == pytest.approx(plain["lm loss"][0], rel=1e-6)
    assert bft["lm loss"][4] != pytest.approx(plain["lm loss"][4], rel=1e-3)
    assert bft["bft loss"][0] > 0
    assert 0 < bft["confidence"][0] < bft["mean p"][0]


@pytest.mark.parametrize(
    ("left_out", "flags", "said"),
    [
        ("--calculate-per-token-loss", (), "--calculate-per-token-loss is off"),
        ("--no-create-attention-mask-in-dataloader", (), "add --no-create-attention-mask-in-dataloader"),
        ("", ("--mtp-num-layers", "1"), "multi-token prediction"),
    ],
)
def test_what_would_be_wrong_is_refused(
    left_out: str, flags: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, asked = "create_attention_mask=False", "create_attention_mask=args.create_attention_mask_in_dataloader"
    text = (EXAMPLES / "bft.py").read_text().replace(asked, made)
    words = (EXAMPLES / "tiny.args").read_text().split()
    (tmp_path / "tiny.args").write_text(" ".join(word for word in words if word != left_out))
    (tmp_path / "bft.py").write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "EXAMPLES", tmp_path)
    with pytest.raises(AssertionError, match=said):
        run_world(1, script, "bft.py", tmp_path / "board", *flags)


def test_the_examples_are_short():
    texts = [[line for line in (EXAMPLES / name).read_text().splitlines() if line] for name in ("plain.py", "bft.py")]
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert len(texts[1]) < 60
    assert 0 < len(changed) < 15, changed
