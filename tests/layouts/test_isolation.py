"""No sample of a packed row sees another: changing one leaves every other's log p, to the bit, on any split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.load import weights_hook
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.layers.spec import layer_spec
from bft_megatron.objective.view import zigzag
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.reporting.totals import Meter
from bft_megatron.training import measuring
from bft_megatron.training.initialize import CPU_FLAGS
from bft_megatron.training.step import Step
from bft_megatron.upstream import command_line
from tests.helpers.runs import MODEL
from tests.helpers.world import run_world

EDGES = [0, 40, 44, 108, 112, 128]  # the last one is the row's tail
CHANGED = 2


def packed_row(changed: bool) -> dict[str, Tensor]:
    """A row of four samples as the data loader gives it; with `changed` one of them has other tokens."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(500, (1, EDGES[-1]), generator=g)
    if changed:
        tokens[:, EDGES[CHANGED] : EDGES[CHANGED + 1]] += 1
        tokens %= 500
    edges = torch.tensor([EDGES], dtype=torch.int32)
    at = torch.cat([torch.arange(n) for n in edges[0].diff().tolist()])[None]
    labels = tokens.roll(-1, 1)
    labels[:, [end - 1 for end in EDGES[1:]]] = -100  # the next token is another sample's
    labels[:, EDGES[-2] :] = -100
    return {
        "tokens": tokens,
        "labels": labels,
        "position_ids": at,
        "samples": torch.tensor([len(EDGES) - 2]),
        "weight": torch.ones(1, len(EDGES) - 1),
        "padding": torch.arange(EDGES[-1])[None] >= EDGES[-2],
        "real_tokens": torch.tensor([EDGES[-2]]),
        "row": torch.tensor([0]),
        "source": torch.tensor([0]),
        "cu_seqlens": edges,
        "max_seqlen": edges[0].diff().max()[None],
    }


def log_probs(model: Path, tensor: int, context: int) -> list[Tensor]:
    """log p [s/cp] of the row before and after the change, on this rank."""
    config = read_config(model)
    flags = ["--tensor-model-parallel-size", str(tensor), "--context-parallel-size", str(context)]
    flags += ["--seq-length", str(EDGES[-1]), "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"]
    flags += ["--no-gradient-accumulation-fusion", "--attention-dropout", "0", "--hidden-dropout", "0"]
    if config.experts is not None:
        flags += ["--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", str(context)]
    margs = command_line.parse([*flags, *megatron_flags(config), *CPU_FLAGS])
    parallel_state.initialize_model_parallel(
        tensor, 1, context_parallel_size=context, expert_model_parallel_size=margs.expert_model_parallel_size
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    gpt = gpt_config_from_args(margs)
    gpt.transformer_layer_spec = layer_spec
    gpt.pre_wrap_hooks.append(weights_hook(None, config, seed=7))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (chunk,) = GPTModelBuilder(gpt).build_distributed_models(groups, wrap_with_ddp=False)
    step = Step(ObjectiveSettings(), config.vocab_size, measuring.into(Meter()))
    return [step.forward(iter([packed_row(changed)]), chunk)[0].detach()[0] for changed in (False, True)]


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (1, 2), (2, 2)])
def test_changing_one_sample_changes_no_other(tensor: int, context: int):
    _check(MODEL, tensor, context)


@pytest.mark.parametrize("context", [1, 2])
def test_nor_does_it_where_samples_share_experts(data: Path, context: int):
    """With as many groups of experts as context-parallel ranks."""
    _check(data / "qwen3_moe", 1, context)


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (1, 2), (2, 2)])
def test_nor_does_it_where_a_state_runs_over_the_row(data: Path, tensor: int, context: int):
    """In gated delta nets, whose convolution and state go from token to token."""
    _check(data / "hybrid", tensor, context)


def _check(model: Path, tensor: int, context: int) -> None:
    ranks = run_world(tensor * context, log_probs, model, tensor, context, megatron=True)
    for rank, (before, after) in enumerate(ranks):
        at = zigzag(torch.tensor(EDGES), context, rank // tensor)
        own = (at >= EDGES[CHANGED]) & (at < EDGES[CHANGED + 1])
        assert torch.equal(before[~own], after[~own])
        assert not torch.equal(before[own], after[own])
