"""Bridge's whole `pretrain` and `finetune` on the CPU: set-up, loop, logs and checkpoints are Bridge's.

Bridge computes with Transformer Engine's optimizer kernels wherever it can import them, which need a GPU; those of
Megatron in torch take their place (`without_kernels`).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import megatron.bridge.training.initialize as bridge_initialize
import pytest
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.recipes.common import _sft_common
from megatron.bridge.training.config import MockGPTDatasetConfig
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bft_megatron.integrations.bridge import BftForwardStep
from bft_megatron.upstream import checkpoint_writer
from tests.bridge.test_step import block
from tests.helpers.runs import MODEL
from tests.helpers.world import run_world

LENGTH, STEPS = 128, 3


def without_kernels() -> None:
    """Put Megatron's implementations in torch in place of kernels, compiled code and helper processes."""
    stand_ins = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
        "multi_tensor_scale_tensor_impl": None,
    }
    for name, stand_in in stand_ins.items():
        setattr(clip_grads, name, stand_in)
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    bridge_initialize.compile_helpers = lambda: None
    checkpoint_writer.without_helper_process()


def configuration(folder: Path) -> Any:
    """Bridge's common configuration of a fine-tune, with the tiny Llama on the CPU and made-up text."""
    config = _sft_common()
    config.model = model = AutoBridge.from_hf_pretrained(MODEL).to_megatron_provider(load_weights=False)
    model.transformer_layer_spec, model.seq_length = block, LENGTH
    model.bf16, model.params_dtype, model.autocast_dtype = False, torch.float32, torch.float32
    model.use_cpu_initialization = model.calculate_per_token_loss = True
    model.gradient_accumulation_fusion = model.bias_activation_fusion = model.apply_rope_fusion = False
    model.masked_softmax_fusion = model.bias_dropout_fusion = model.cross_entropy_loss_fusion = False
    config.mixed_precision, config.optimizer.bf16 = None, False
    config.tokenizer.tokenizer_model = str(MODEL)
    config.dataset = MockGPTDatasetConfig(
        seq_length=LENGTH,
        random_seed=1,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
        num_dataset_builder_threads=1,
        dataloader_type="single",
        num_workers=0,
    )
    config.ddp.use_distributed_optimizer = config.optimizer.use_distributed_optimizer = False
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = config.ddp.average_in_collective = False
    config.train.train_iters, config.train.global_batch_size = STEPS, 4
    config.scheduler.lr_warmup_iters, config.validation.eval_iters = 1, 0
    config.dist.distributed_backend = "gloo"
    config.checkpoint.save, config.checkpoint.load = str(folder / "checkpoints"), None
    config.checkpoint.async_save = False
    config.logger.tensorboard_dir = str(folder / "tensorboard")
    return config


def train(run: Any, step: Any, folder: Path, start: Path | None, port: int) -> None:
    """One rank of Bridge's `pretrain` or `finetune`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    without_kernels()
    config = configuration(folder)
    config.checkpoint.pretrained_checkpoint = None if start is None else str(start / "checkpoints")
    run(config, step)


def curves(run: Any, step: Any, folder: Path, start: Path | None = None) -> dict[str, list[float]]:
    """What Bridge writes to TensorBoard of a run on two data-parallel ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run_world(2, train, run, step, folder, start, port, megatron=True)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_finetune_trains_and_reports(tmp_path: Path):
    plain = curves(pretrain, forward_step, tmp_path / "plain")
    ours = curves(pretrain, BftForwardStep("bft", group_size=8), tmp_path / "ours")
    assert ours["lm loss"][0] == pytest.approx(plain["lm loss"][0], rel=1e-6)
    tuned = curves(finetune, BftForwardStep("bft", group_size=8), tmp_path / "tuned", tmp_path / "ours")
    for name in ("bft loss", "lm loss", "mean p", "accuracy", "confidence"):
        assert len(ours[name]) == len(tuned[name]) == STEPS
    assert tuned["lm loss"][0] != ours["lm loss"][0]  # it starts from the saved weights
