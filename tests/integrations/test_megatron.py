"""`ForwardStep` in Megatron-LM's own `pretrain`, on rows in the form of its data sets, beside the command `train`."""

from __future__ import annotations

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
LAYOUTS = [
    Layout(),
    Layout(tensor=2, pipeline=2),
    Layout(context=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, sequence=True, data=2),
]


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

    def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        return rows, None, None

    provide.is_distributed = True
    device = initialize.device_flags(made, experts=False)
    made_of = arguments.megatron_arguments(made, megatron_flags(config), [*device, *flags], STEPS, (0, 0))
    margs = command_line.parse([word for word in made_of if word != "--exit-signal-handler"])
    model = model_config(made, config, model_folder, margs, True, fill=True)
    step = ForwardStep(made.objective.name, vocab_size=config.vocab_size, **settings)
    pretrain(pretrain_cfg_container_from_args(margs, model), provide, ModelType.encoder_or_decoder, step)


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pretrain_with_it_is_the_run_of_train(layout: Layout, packing: bool, tmp_path: Path):
    def recipe(name: str) -> Recipe:
        overrides = [f"train.iterations={STEPS}", "data.valid=null", f"data.packing={packing}", "train.save_every=5"]
        overrides += [f"parallel.{key}={value}" for key, value in vars(layout).items() if key != "micro_batch_size"]
        return reader.load(runs.RECIPE, [*overrides, "objective.cp_windows=exact", f"output={tmp_path / name}"])

    ours, theirs = recipe("ours"), recipe("theirs")
    model = find_model(ours.model)
    prepared = prepare_rows(ours, model, read_config(model).vocab_size)
    run_world(layout.world, runs.train_rank, ours, prepared, runs.do_nothing, megatron=True)
    flags = ["--sft"] if packing else []
    run_world(layout.world, stock, theirs, prepared, flags, {"group_size": 8, "cp_windows": "exact"}, megatron=True)
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
